"""`load`: any saved sharding into any target sharding, in place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, MutableMapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch

from . import garbage, state, tensors, values
from .checkpoint import Checkpoint
from .collective import Deadline, Group
from .config import LoadOptions
from .errors import CorruptCheckpointError, IncompatibleCheckpointError
from .progress import Progress
from .reader import Reader
from .tensors import LocalShard
from .trace import Trace

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
        strict: raise unless names agree exactly; False returns them in `missing_keys` and `unexpected_keys` of the
            result.
        cast: convert dtypes that differ; otherwise they are an error.
        verify: check every chunk's digest before its bytes reach a tensor.
        strategy: "direct": each rank reads what it needs.
        allow_pickle: unpickle values that were saved with `allow_pickle=True`. This can run code from the checkpoint.
        timeout: seconds after which the load fails on every rank (SNAPSTONE_TIMEOUT, 1800 s).
        progress: True for a bar on a terminal, or a callback (bytes_done, bytes_total) of this rank.

    Raises:
        CheckpointNotFoundError, IncompleteCheckpointError: nothing, or nothing committed, is there.
        CorruptCheckpointError: a wrong byte, named by file, tensor, chunk and rank.
        IncompatibleCheckpointError: missing, unexpected or wrong-shape keys (one error lists them all), other
            dtypes, a newer format.
        RankFailedError: another rank raised, died or missed the deadline.
        ValueError: a target that cannot be filled.
    """
    options = LoadOptions.of(
        strict=strict, cast=cast, verify=verify, strategy=strategy, allow_pickle=allow_pickle, timeout=timeout
    )
    group = Group.create(process_group, no_dist=no_dist)
    channel = group.channel("load")
    deadline = Deadline(options.timeout_seconds)
    trace = Trace("load", group.rank, group.world_size)
    operation = _Load(state_dict, options, group.rank, trace)
    checkpoint: Checkpoint | None = None
    error: BaseException | None = None
    save_id = ""
    try:
        checkpoint = operation.read(os.path.abspath(os.fspath(checkpoint_id)), deadline, progress)
        save_id = checkpoint.save_id
    except BaseException as failure:
        error = failure
    try:
        with trace.span("vote"):
            votes = channel.vote("read", error, json.dumps(save_id).encode(), deadline)
        if len(set(votes)) > 1:
            raise CorruptCheckpointError(
                "ranks read different checkpoints under one name", path=os.fspath(checkpoint_id)
            )
        operation.finish()
    finally:
        channel.close()
    trace.close()
    assert checkpoint is not None
    return checkpoint


class _Load:
    def __init__(self, state_dict: Mapping[str, Any], options: LoadOptions, rank: int, trace: Trace) -> None:
        if not isinstance(state_dict, MutableMapping):
            raise TypeError(f"the state must be a dict that can take loaded values, not a {type(state_dict).__name__}")
        self.state_dict = state_dict
        self.options = options
        self.rank = rank
        self.trace = trace
        self.flattened = state.Flattened()
        self.loaded: dict[str, Any] = {}
        self.saved_paths: dict[str, state.LeafPath] = {}

    def read(self, path: str, deadline: Deadline, progress: bool | Callable[[int, int], None]) -> Checkpoint:
        with self.trace.span("plan"), garbage.paused():
            reader = Reader(path)
            objects = reader.objects(self.rank)
            self.saved_paths = {name: decode_path(name, encoded) for name, (encoded, _) in objects.items()}
            self.saved_paths.update({name: decode_path(name, encoded) for name, encoded in reader.paths.items()})
            self.flattened = self._flatten_target(reader)
            missing, unexpected = self._compare_keys(reader, objects)
            targets = self._targets(reader)
            for name, (_, encoded) in objects.items():
                if name in self.flattened.objects or self._is_new_in_stateful(name):
                    self.loaded[name] = values.decode(encoded, name=name, allow_pickle=self.options.allow_pickle)
        needed = sum(target.item.nbytes for target in targets)
        try:
            with Progress(progress, "load", needed) as bar, torch.no_grad():
                stats = reader.fill(
                    targets,
                    cast=self.options.cast,
                    verify=self.options.verify,
                    timeout_seconds=deadline.remaining(),
                    progress=bar,
                    trace=self.trace,
                )
        except CorruptCheckpointError as error:
            raise reader.name_tensor(error) from None
        self.trace.stats.update(stats)
        return Checkpoint(reader, stats=self.trace.stats, missing_keys=missing, unexpected_keys=unexpected)

    def _flatten_target(self, reader: Reader) -> state.Flattened:
        flattened = state.flatten(self.state_dict)
        optimizers = [item for item in flattened.stateful if isinstance(item.target, torch.optim.Optimizer)]
        saved = {name: (reader.describe(name).dtype, reader.describe(name).shape) for name in reader.shards}
        fresh = False
        for item in optimizers:
            prefix = ".".join(map(str, item.path))
            if any(name.startswith(f"{prefix}.state.") and name not in flattened.tensors for name in saved):
                state.materialize_optimizer(item.target, saved, prefix, saved_paths=self.saved_paths)
                fresh = True
        return state.flatten(self.state_dict) if fresh else flattened

    def _compare_keys(self, reader: Reader, objects: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        wanted_tensors, wanted_objects = self.flattened.tensors, self.flattened.objects
        problems = []
        missing = [name for name in wanted_tensors if name not in reader.shards]
        missing += [name for name in wanted_objects if name not in objects]
        unexpected = [name for name in reader.shards if name not in wanted_tensors]
        unexpected += [name for name in objects if name not in wanted_objects and not self._is_new_in_stateful(name)]
        if self.options.strict:
            problems += [f"missing from the checkpoint: {name}" for name in missing]
            problems += [f"unexpected in the checkpoint: {name}" for name in unexpected]
        for name, tensor in wanted_tensors.items():
            if name in reader.shards and reader.describe(name).shape != tuple(tensor.shape):
                problems.append(
                    f"{name}: saved with shape {list(reader.describe(name).shape)}, wanted {list(tensor.shape)}"
                )
        if problems:
            raise IncompatibleCheckpointError(
                f"{len(problems)} keys do not fit (strict=False accepts missing and unexpected ones):\n  "
                + "\n  ".join(problems),
                path=reader.path,
            )
        return missing, unexpected

    def _is_new_in_stateful(self, name: str) -> bool:
        """Values that a Stateful does not have yet (an optimizer before its first step) are handed to its
        load_state_dict, which knows what to do with them.
        """
        path = self.saved_paths[name]
        return name not in self.flattened.paths and any(path[: len(item.path)] == item.path for item in self.flattened.stateful)

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
