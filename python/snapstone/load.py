"""`load`: any saved sharding into any target sharding, in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, MutableMapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch

from . import garbage, opening, state, tensors, values
from .checkpoint import Checkpoint
from .collective import Channel, Deadline, Group
from .config import LoadOptions
from .errors import IncompatibleCheckpointError
from .fabric import Fabric
from .joint import FIRST_VOTE, fill_jointly
from .progress import Progress
from .reader import Reader
from .tensors import LocalShard
from .trace import Trace
from .voting import together

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["load"]


def load(
    state_dict: Mapping[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str],
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    strict: bool = True,
    cast: bool = False,
    verify: bool = True,
    strategy: Literal["auto", "direct", "scatter", "broadcast"] = "auto",
    allow_pickle: bool = False,
    timeout: timedelta | float | None = None,
    progress: bool | Callable[[int, int], None] = False,
) -> Checkpoint:
    """Fills the tensors of `state_dict` in place and puts saved Python values into it.

    Args:
        state_dict: the shape of what is wanted: tensors and DTensors of any sharding, nested dicts and lists,
            Python values (replaced), Stateful objects (their `load_state_dict` is called; optimizers that have not
            stepped yet get their state built).
        checkpoint_id: a committed checkpoint.
        process_group: the ranks that load together (default group); every rank of it calls.
        no_dist: load alone even though torch.distributed is initialised.
        strict: raise unless names agree exactly: this rank's are all saved, and each saved one is wanted by some rank.
            False returns those that differ on this rank in `missing_keys` and `unexpected_keys` of the result.
        cast: convert dtypes that differ; otherwise they are an error.
        verify: check every chunk's digest before its bytes reach a tensor.
        strategy: who reads what; the same on every rank. "direct": each rank what it needs. "scatter": bytes that
            several ranks need are read once, by one of them, and exchanged, through memory within a node and over the
            process group between nodes. "broadcast": rank 0 reads all of it for everybody. "auto" chooses by how much
            the needs overlap and by what it measures, and says why in the log `snapstone`.
        allow_pickle: unpickle values that were saved with `allow_pickle=True`. This can run code from the checkpoint.
        timeout: seconds after which the load fails on every rank (SNAPSTONE_TIMEOUT, 1800 s).
        progress: True for a bar on a terminal, or a callback (bytes_done, bytes_total) of this rank.

    Raises:
        CheckpointNotFoundError, IncompleteCheckpointError: nothing, or nothing committed, is there.
        CorruptCheckpointError: a wrong byte, named by file, tensor, chunk and rank.
        IncompatibleCheckpointError: missing, unexpected or wrong-shape keys (one error lists them all), other
            dtypes, a newer format.
        RankFailedError: another rank raised, died or missed the deadline.
        ValueError: a target that cannot be filled, or strategies that differ between ranks.
    """
    group = Group.create(process_group, no_dist=no_dist)
    channel = group.channel("load")  # first, so that the ranks stay in step whatever is raised here on one of them
    trace = Trace("load", group.rank, group.world_size)
    try:
        options = LoadOptions.of(
            strict=strict, cast=cast, verify=verify, strategy=strategy, allow_pickle=allow_pickle, timeout=timeout
        )
        deadline = Deadline(options.timeout_seconds)
        operation = _Load(state_dict, options, group, channel, Fabric(process_group, group), trace)
        path = os.path.abspath(os.fspath(checkpoint_id))
        with trace.span("open"):
            operation.reader = opening.open_together(path, group, channel, operation.fabric, deadline, trace)
        votes = together(channel, "plan", deadline, trace, operation.plan)
        operation.refuse_unwanted(votes)
        together(channel, "read", deadline, trace, lambda: operation.read(deadline, progress))
        together(channel, "fill", deadline, trace, operation.finish)
    except BaseException as error:
        channel.abort(_VOTES, error)
        raise
    finally:
        channel.close()
        trace.close()
    return operation.checkpoint()


_VOTES = (*opening.VOTES, "plan", FIRST_VOTE, "read", "fill")  # of one load, in this order


class _Load:
    """One rank's part of one load: `plan`, `refuse_unwanted`, `read`, `finish`, `checkpoint`, in this order."""

    def __init__(
        self,
        state_dict: Mapping[str, Any],
        options: LoadOptions,
        group: Group,
        channel: Channel,
        fabric: Fabric,
        trace: Trace,
    ) -> None:
        if not isinstance(state_dict, MutableMapping):
            raise TypeError(f"the state must be a dict that can take loaded values, not a {type(state_dict).__name__}")
        self.state_dict = state_dict
        self.options = options
        self.group = group
        self.channel = channel
        self.fabric = fabric
        self.trace = trace
        self.reader: Reader  # set by the caller
        self.flattened = state.Flattened()
        self.targets: list[LocalShard] = []
        self.loaded: dict[str, Any] = {}
        self.saved_paths: dict[str, state.LeafPath] = {}
        self.missing: list[str] = []
        self.unexpected: list[str] = []

    def plan(self) -> bytes:
        """Lays out what this rank reads; nothing is changed yet.

        Its vote: a byte for each name in the checkpoint, in alphabetical order: 1 for one not wanted here.
        """
        with self.trace.span("plan"), garbage.paused():
            reader = self.reader
            objects = reader.objects(self.group.rank)
            self.saved_paths = {name: decode_path(name, encoded) for name, (encoded, _) in objects.items()}
            self.saved_paths.update({name: decode_path(name, encoded) for name, encoded in reader.shards.paths.items()})
            self.flattened = self._flatten_target(reader)
            self._compare_keys(reader, objects)
            self.targets = self._targets(reader)
            for name, (_, encoded) in objects.items():
                if name in self.flattened.objects or self._is_new_in_stateful(name):
                    self.loaded[name] = values.decode(encoded, name=name, allow_pickle=self.options.allow_pickle)
            unexpected = set(self.unexpected)
            return bytes(name in unexpected for name in sorted(self.saved_paths))

    def refuse_unwanted(self, votes: list[bytes]) -> None:
        """Ranks may want names of their own: unexpected is only what nobody wants. The same answer on every rank, so
        there is nothing to vote on.
        """
        if self.options.strict and self.group.world_size > 1:
            nobody_wants = map(all, zip(*votes, strict=True))
            names = [name for name, unwanted in zip(sorted(self.saved_paths), nobody_wants, strict=True) if unwanted]
            self._refuse([f"unexpected in the checkpoint: {name}" for name in names])

    def read(self, deadline: Deadline, progress: bool | Callable[[int, int], None]) -> None:
        try:
            needed = sum(map(self.reader.stored_nbytes, self.targets))
            with Progress(progress, "load", needed) as bar, torch.no_grad():
                stats = fill_jointly(
                    self.reader,
                    self.targets,
                    self.options.strategy,
                    self.group,
                    self.channel,
                    self.fabric,
                    deadline,
                    cast=self.options.cast,
                    verify=self.options.verify,
                    progress=bar,
                    trace=self.trace,
                )
                bar.at(needed)  # a master that is wanted itself is read once
        except BaseException as error:
            self.channel.abort([FIRST_VOTE], error)  # where it never came to that
            raise
        self.trace.stats.update(stats)

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(
            self.reader, stats=self.trace.stats, missing_keys=self.missing, unexpected_keys=self.unexpected
        )

    def _flatten_target(self, reader: Reader) -> state.Flattened:
        flattened = state.flatten(self.state_dict)
        optimizers = [item for item in flattened.stateful if isinstance(item.target, torch.optim.Optimizer)]
        if not optimizers:
            return flattened
        saved = {name: (reader.describe(name).dtype, reader.describe(name).shape) for name in reader.shards}
        fresh = False
        for item in optimizers:
            prefix = ".".join(map(str, item.path))
            if any(name.startswith(f"{prefix}.state.") and name not in flattened.tensors for name in saved):
                state.materialize_optimizer(item.target, saved, prefix, saved_paths=self.saved_paths)
                fresh = True
        return state.flatten(self.state_dict) if fresh else flattened

    def _compare_keys(self, reader: Reader, objects: Mapping[str, Any]) -> None:
        wanted_tensors, wanted_objects = self.flattened.tensors, self.flattened.objects
        missing = [name for name in wanted_tensors if name not in reader.shards]
        # An empty container at the place of a Stateful is the state of one that has not started: nothing to find.
        blank = {item.path for item in self.flattened.stateful}
        missing += [name for name in wanted_objects if name not in objects and self.flattened.paths[name] not in blank]
        unexpected = [name for name in reader.shards if name not in wanted_tensors]
        unexpected += [name for name in objects if name not in wanted_objects and not self._is_new_in_stateful(name)]
        self.missing, self.unexpected = missing, unexpected
        problems = []
        if self.options.strict:
            problems += [f"missing from the checkpoint: {name}" for name in missing]
        if self.options.strict and self.group.world_size == 1:  # of several ranks, see refuse_unwanted
            problems += [f"unexpected in the checkpoint: {name}" for name in unexpected]
        for name, tensor in wanted_tensors.items():
            if name in reader.shards:
                saved, wanted = reader.describe(name).shape, tensor.shape
                if saved != wanted:
                    problems.append(f"{name}: saved with shape {list(saved)}, wanted {list(wanted)}")
        self._refuse(problems)

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            raise IncompatibleCheckpointError(
                f"{len(problems)} keys do not fit (strict=False accepts missing and unexpected ones):\n  "
                + "\n  ".join(problems),
                path=self.reader.path,
            )

    def _is_new_in_stateful(self, name: str) -> bool:
        """Values that a Stateful does not have yet (an optimizer before its first step) are handed to its
        load_state_dict, which knows what to do with them.
        """
        path = self.saved_paths[name]
        return name not in self.flattened.paths and any(
            path[: len(item.path)] == item.path for item in self.flattened.stateful
        )

    def _targets(self, reader: Reader) -> list[LocalShard]:
        targets = [
            shard
            for name, tensor in self.flattened.tensors.items()
            if name in reader.shards
            for shard in tensors.describe(name, tensor)
        ]
        # Tied targets get their bytes once; where the saved tensors differ the last one stays, as with load_state_dict.
        last = {tie: position for position, tie in enumerate(tensors.tie_positions(targets))}
        return [targets[position] for position in sorted(last.values())]

    def finish(self) -> None:
        """Every rank has its bytes: values into the state, then load_state_dict of every Stateful."""
        new = {name for name in self.saved_paths if name not in self.flattened.paths}
        paths = {name: path for name, path in self.saved_paths.items() if name in new}
        assert isinstance(self.state_dict, MutableMapping)
        state.finish(self.state_dict, self.flattened, self.loaded, paths)


def decode_path(name: str, encoded: Any) -> state.LeafPath:
    """A stored path; None stands for the name itself."""
    return (name,) if encoded is None else state.decode_path(encoded)
