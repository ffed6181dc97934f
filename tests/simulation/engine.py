"""The engine on simulated ranks: what it takes from the machine is replaced, and nothing of what it decides.

Real: `save`, `load`, `Group`, `Channel`, the store's thread, the votes, `Writer`, `Outcome`, the staging directory and
its commit (native, on a real file system), opening, joint loads, their segments, boards and rounds, `Fabric`.
Simulated: clock, threads, queues and the store of `collective`; torch.distributed under `Fabric`; the pauses of a wait
on a board; a rank's share of a save, which is a small file and takes virtual time. Staging calls are points where
something may befall the rank; one native call is one instant, except that a commit can be broken off in the middle.
"""

from __future__ import annotations

import errno
import importlib
import math
import types
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import numpy as np
from greenlet import getcurrent

from simulation.network import Fabric, Prefixed
from simulation.world import Task, World, current_process
from snapstone import (
    _native,
    agreement,
    collective,
    fabric,
    joint,
    manifest,
    opening,
    outcome,
    reader,
    rounds,
    store_worker,
    target,
    writer,
)
from snapstone.base import Stored
from snapstone.collective import Deadline, Group
from snapstone.errors import CheckpointError
from snapstone.manifest import FileEntry

__all__ = ["data_of", "simulated"]

load = importlib.import_module("snapstone.load")  # the package has a function of that name
BOARD_PAUSE_S = 0.002
BUCKET_BYTES = 64 << 10  # several rounds of a small checkpoint


class _Clock:
    def __init__(self, world: World) -> None:
        self._world = world

    def monotonic(self) -> float:
        return self._world.now

    def sleep(self, seconds: float) -> None:
        self._world.sleep(seconds)


class _Queue:
    """As queue.SimpleQueue, between tasks."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._told: Callable[[], None] | None = None

    def put(self, item: Any) -> None:
        self._items.append(item)
        if self._told is not None:
            self._told()

    def get(self) -> Any:
        while not self._items:
            current_process().world.wait(self._subscribe, math.inf)
        return self._items.popleft()

    def _subscribe(self, told: Callable[[], None]) -> None:
        self._told = told


class _Thread:
    """As threading.Thread, of the simulated process that makes it."""

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...], name: str, daemon: bool) -> None:
        self._process = current_process()
        self._run = lambda: target(*args)

    def start(self) -> None:
        self._process.spawn(self._run)


def _wait_for_futures(futures: list[Any], timeout: float) -> None:
    (future,) = futures
    current_process().world.wait(lambda told: future.add_done_callback(lambda _: told()), timeout)


class _Staging:
    """A native Staging whose calls are steps of the rank that makes them. It dies with the rank."""

    def __init__(self, native: Any) -> None:
        self._process = current_process()
        self._native = native
        self._process.on_death.append(native.close)

    @staticmethod
    def create(parent: str, save_id: str, boots: list[str]) -> _Staging:
        current_process().step("create")
        return _Staging(_native.Staging.create(parent, save_id, boots))

    @staticmethod
    def join(parent: str, save_id: str) -> _Staging:
        current_process().step("join")
        return _Staging(_native.Staging.join(parent, save_id))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def write_file(self, name: str, data: bytes, step: str = "unnamed") -> None:
        self._process.step("write_file")
        self._native.write_file(name, data, step)

    def sync(self, shared: list[str]) -> None:
        self._process.step("sync")
        self._native.sync(shared)

    def keep_shared(self, shared: list[Any]) -> None:
        self._process.step("keep_shared")
        self._native.keep_shared(shared)

    def withdraw(self) -> None:
        self._process.step("withdraw")
        self._native.withdraw()

    def discard(self) -> None:
        self._process.step("discard")
        self._native.discard()

    def commit(self, *arguments: Any) -> None:
        process = self._process
        process.step("commit")
        rules, dies = process.facts.pop("commit", ("", False))
        if rules:
            _native.fault_arm(rules)
        try:
            self._native.commit(*arguments)
        except OSError:
            if rules and dies:
                process.kill()
            raise
        finally:
            _native.fault_disarm()
        process.step("committed")


class _Native:
    """`snapstone._native` with another Staging."""

    Staging = _Staging

    def __getattr__(self, name: str) -> Any:
        return getattr(_native, name)

    def reap(self, parent: str) -> None:
        current_process().step("reap")
        _native.reap(parent)


class _Share:
    """As `share.Share`; the state's only tensor says what the data file holds."""

    staged = True
    payload_bytes = bytes_staged = bytes_written = 0
    digests = np.zeros((0,), "V16")

    def __init__(self, structure: Any, shards: Any, staging: Any, rank: int, *_: Any, **__: Any) -> None:
        self._process = current_process()
        self._process.step("share")
        self._structure = structure
        self._staging = staging
        self._rank = rank

    def start(self) -> None:
        self._process.step("start")

    def wait_written(self, deadline: Deadline, progress: Any) -> None:
        world = self._process.world
        seconds = world.random.expovariate(1 / 0.01) + self._process.facts.pop("slow_write", 0.0)
        world.sleep(min(seconds, deadline.remaining()))
        if deadline.expired:
            raise CheckpointError("the data file was not written in time", path=self._staging.path, rank=self._rank)
        if (error := self._process.facts.pop("write_error", None)) is not None:
            raise error
        self._staging.write_file(f"rank-{self._rank:05d}.data", data_of(self._staging.save_id, self._rank))

    def before(self, memory: Any) -> None:
        return None

    def used_bytes(self) -> dict[str, int]:
        return {}

    def drop_sparse_files(self, used_bytes: Any, check: Callable[[], None]) -> None:
        check()

    def write_index(self, save_id: str, world_size: int, step: int | None, objects: Any) -> tuple[Any, Any]:
        entries = []
        for kind in ("index", "data"):
            data = data_of(save_id, self._rank)
            entries.append(FileEntry(f"rank-{self._rank:05d}.{kind}", len(data), _native.digest_hex(data)))
        self._staging.write_file(entries[0].name, data_of(save_id, self._rank))
        stored = Stored(entries[0].xxh128, (), b"", 0, (), step)
        return manifest.Writer(self._rank, entries[0], (entries[1],)), stored

    def cancel(self) -> None: ...

    def release(self) -> None: ...

    def close(self) -> None: ...


def data_of(save_id: str, rank: int) -> bytes:
    """What the files of a simulated share hold."""
    return f"{save_id} rank {rank}\n".encode()


class _Board:
    """A native Board that waits in virtual time."""

    STRIDE = _native.Board.STRIDE

    def __init__(self, address: int, count: int) -> None:
        self._native = _native.Board(address, count)

    def post(self, counter: int, value: int) -> None:
        current_process().step(f"post {value}")
        self._native.post(counter, value)

    def fail(self, counter: int) -> None:
        current_process().step("fail")
        self._native.fail(counter)

    def wait_for(self, value: int, seconds: float) -> str:
        world = current_process().world
        end = world.now + seconds
        while (state := self._native.wait_for(value, 0.0)) == "timed out" and world.now < end:
            world.sleep(BOARD_PAUSE_S)
        return str(state)


def _failing(together: Callable[..., Any]) -> Callable[..., Any]:
    """A rank's own step before a vote of a load raises, where a fault says so."""

    def instead(channel: Any, label: str, deadline: Deadline, trace: Any, step: Callable[[], bytes | None]) -> Any:
        def fails_or_steps() -> bytes | None:
            _fail_to_read(label)
            return step()

        return together(channel, label, deadline, trace, fails_or_steps)

    return instead


def _fail_to_read(place: str) -> None:
    label, error = current_process().facts.get("read_error", ("", None))
    if label == place:
        del current_process().facts["read_error"]
        raise error


def _failing_wait(wait: Callable[..., None]) -> Callable[..., None]:
    def instead(*arguments: Any, **named: Any) -> None:
        wait(*arguments, **named)
        if isinstance(getcurrent(), Task):
            _fail_to_read("wait")

    return instead


def _failing_first(call: Callable[..., Any], place: str) -> Callable[..., Any]:
    def instead(*arguments: Any, **named: Any) -> Any:
        _fail_to_read(place)
        return call(*arguments, **named)

    return instead


def _failing_fill(fill: Callable[..., Any]) -> Callable[..., Any]:
    def instead(*arguments: Any, **named: Any) -> Any:
        _fail_to_read("joint")
        stats = fill(*arguments, **named)
        _fail_to_read("filled")
        return stats

    return instead


def _failing_open(open_segment: Callable[..., Any]) -> Any:
    """A segment that cannot be mapped, so that every rank makes one of its own: for a fault at that vote."""

    def instead(path: str, nbytes: int) -> Any:
        if current_process().facts.get("read_error", ("", None))[0] == "segments":
            raise OSError(errno.ESTALE, "no mapping in the simulation", path)
        return open_segment(path, nbytes)

    return staticmethod(instead)


def _group(process_group: Any = None, *, no_dist: bool = False) -> Group:
    found: Group = current_process().facts["group"]
    return found


def _spoken(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def spoken(*arguments: Any, **named: Any) -> Any:
        current_process().step(name)
        return method(*arguments, **named)

    return spoken


@contextmanager
def simulated(world: World, network: Fabric, *, real_shares: bool = False) -> Iterator[None]:
    """Inside, the engine runs on the processes of `world`, with `network` under its Fabric."""
    threads = types.SimpleNamespace(Thread=_Thread)
    seeded = types.SimpleNamespace(uuid4=lambda: uuid.UUID(int=world.random.getrandbits(128), version=4))
    native = _Native()
    replaced: list[tuple[Any, str, Any]] = [
        (collective, "time", _Clock(world)),
        (store_worker, "queue", types.SimpleNamespace(SimpleQueue=_Queue)),
        (store_worker, "threading", threads),
        (store_worker, "_threads", WeakKeyDictionary()),
        (collective, "wait_for_futures", _wait_for_futures),
        (collective, "PrefixStore", Prefixed),
        (collective.Group, "create", _group),
        (target, "time", _Clock(world)),
        (target, "_native", native),
        (outcome, "_native", native),
        (outcome.Outcome, "committed", _spoken("look", outcome.Outcome.committed)),
        (writer, "_native", native),
        (writer, "uuid", seeded),
        (writer, "_cache", writer.StructureCache()),
        (writer, "_keys", writer.StructureKeys()),
        (writer, "_memory", writer.Memory()),
        (writer, "describe_all", _failing_first(writer.describe_all, "state")),
        (agreement, "_assign_all", _failing_first(agreement._assign_all, "assign")),
        (writer, "link", lambda *_: None),
        (fabric, "dist", network),
        (fabric, "_orphans", []),
        *[(module, "together", _failing(module.together)) for module in (joint, load, opening)],
        (load, "fill_jointly", _failing_fill(load.fill_jointly)),
        (reader.Reader, "wait", _failing_wait(reader.Reader.wait)),
        (joint.Segment, "open", _failing_open(joint.Segment.open)),
        (joint, "node_name", lambda: current_process().node),
        (rounds, "Board", _Board),
        (rounds, "BUCKET_BYTES", BUCKET_BYTES),
        (rounds, "BUCKET_BYTES_PER_NODE", BUCKET_BYTES // 2),
    ]
    if not real_shares:
        replaced.append((writer, "Share", _Share))
    with ExitStack() as stack:
        for place, name, value in replaced:
            stack.enter_context(mock.patch.object(place, name, value))
        try:
            yield
        finally:
            world.end()
