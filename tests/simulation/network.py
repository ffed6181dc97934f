"""The network between simulated ranks: a key-value store like c10d's TCPStore or FileStore, and gloo's messages.

A call of the store takes effect at its server at one instant, half a round trip after it was made. A server dies or
stops with the process that serves it. A client that is cut off waits, as TCP does, until the link is back; one whose
connection is reset hears of it, and does not know whether its call had its effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch

from simulation.world import Process, World, current_process

KEY_PARTS = 3  # of a key before its label: two of the group, one of the channel
ABSENT_PAUSE_S = 0.01

__all__ = ["Fabric", "Link", "Prefixed", "Server", "Store"]


class Link:
    """How long messages take. `slow`: one in a hundred takes so many times longer."""

    def __init__(self, world: World, mean_s: float, slow: float) -> None:
        self._world = world
        self._mean_s = mean_s
        self._slow = slow

    def latency(self) -> float:
        random = self._world.random
        seconds = random.expovariate(1 / self._mean_s)
        return seconds * self._slow if random.random() < 0.01 else seconds

    def arrival(self, *ends: Process | None) -> float:
        """When what is sent now arrives; infinite when it never does."""
        start = self._world.now
        for end in ends:
            if end is not None:
                start = max(start, end.cut_until)
        return start + self.latency()


class Server:
    """What a store holds. `host`: the rank that serves it, None for a launcher."""

    def __init__(self, world: World, link: Link, host: Process | None, *, has_address: bool) -> None:
        self.world = world
        self.link = link
        self.host = host
        self.has_address = has_address
        self.values: dict[str, bytes] = {}
        self.calls: set[_Call] = set()
        if host is not None:
            host.on_death.append(self._die)

    @property
    def alive(self) -> bool:
        return self.host is None or self.host.alive

    def _die(self) -> None:
        for call in sorted(self.calls, key=lambda call: call.number):
            self.world.at(self.link.arrival(call.client), call.fail, call.client)


class _Call:
    """One call of one client, from its sending to its answer."""

    _made = 0

    def __init__(self, server: Server, client: Process, operation: Callable[[dict[str, bytes]], Any]) -> None:
        _Call._made += 1
        self.number = _Call._made
        self.server = server
        self.client = client
        self.operation = operation
        self.answer: list[Any] = []
        self.broken = False
        self.dropped = False  # on its way to the server
        self._told: Callable[[], None] | None = None
        self._lost: Callable[[], None] | None = None

    def make(self) -> Any:
        server, world = self.server, self.server.world
        if not server.alive:
            self.answer.append(None)
            self.broken = True
        else:
            server.calls.add(self)
            self._send(self._arrive, None)
        while not self.answer:
            world.wait(self._subscribe, math.inf)
        server.calls.discard(self)
        if self.broken:
            raise RuntimeError("Connection reset by peer")
        return self.answer[0]

    def _send(self, then: Callable[[], None], process: Process | None) -> None:
        when = self.server.link.arrival(self.client, self.server.host)
        if when < math.inf:
            self.server.world.at(when, then, process or self.server.host)
        else:
            self._lost = lambda: self._send(then, process)

    def resend(self) -> None:
        """What a cut for good has swallowed, now that the link is back after all."""
        lost, self._lost = self._lost, None
        if lost is not None and not self.answer:
            lost()

    def _arrive(self) -> None:
        if self.dropped or not self.server.alive:
            return
        result = self.operation(self.server.values)
        self._send(lambda: self._end(result), self.client)

    def _end(self, result: Any) -> None:
        if not self.answer:
            self.answer.append(result)
            if self._told is not None:
                self._told()

    def fail(self) -> None:
        self.broken = True
        self._end(None)

    def _subscribe(self, told: Callable[[], None]) -> None:
        self._told = told


class Store:
    """One connection of one rank, with the methods of `torch.distributed.Store` that are used."""

    def __init__(self, server: Server, client: Process) -> None:
        self._server = server
        self._client = client
        self.was_reset = False
        client.facts.setdefault("connections", []).append(self)
        if server.has_address:
            self.host = "node-0"

    def clone(self) -> Store:
        self._call(lambda values: None)
        return Store(self._server, self._client)

    def reset(self) -> None:
        self.was_reset = True
        mine = [call for call in self._server.calls if call.client is self._client]
        for call in sorted(mine, key=lambda call: call.number):
            call.dropped = self._server.world.random.random() < 0.5
            call.fail()

    def resend(self) -> None:
        for call in sorted(self._server.calls, key=lambda call: call.number):
            if call.client is self._client:
                call.resend()

    def set(self, key: str, value: bytes) -> None:
        def operation(values: dict[str, bytes]) -> None:
            values[key] = value
            self._server.world.note(self._client, f"arrived {_short(key)}")

        self._call(operation, f"set {key}")

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        found = self._call(lambda values: [values.get(key) for key in keys])
        while None in found:  # the real one waits for it, longer than any deadline
            self._server.world.sleep(ABSENT_PAUSE_S)
            found = self._call(lambda values: [values.get(key) for key in keys])
        return list(found)

    def check(self, keys: list[str]) -> bool:
        return bool(self._call(lambda values: all(key in values for key in keys)))

    def add(self, key: str, value: int) -> int:
        def operation(values: dict[str, bytes]) -> int:
            total = int(values.get(key, b"0")) + value
            values[key] = str(total).encode()
            return total

        return int(self._call(operation))

    def compare_set(self, key: str, expected_value: bytes, desired_value: bytes) -> bytes:
        def operation(values: dict[str, bytes]) -> bytes:
            if (key not in values and not expected_value) or values.get(key) == expected_value:
                values[key] = desired_value
            return values.get(key, expected_value)

        return bytes(self._call(operation, f"claim {key}"))

    def delete_key(self, key: str) -> bool:
        return self._call(lambda values: values.pop(key, None)) is not None

    def _call(self, operation: Callable[[dict[str, bytes]], Any], step: str | None = None) -> Any:
        if step is not None:
            verb, _, key = step.partition(" ")
            self._client.step(f"{verb} {_short(key)}")
        if self.was_reset:
            raise RuntimeError("Connection reset by peer")
        return _Call(self._server, self._client, operation).make()


def _short(key: str) -> str:
    return "/".join(key.split("/")[KEY_PARTS:])


class Prefixed:
    """As `torch.distributed.PrefixStore`."""

    def __init__(self, prefix: str, store: Store) -> None:
        self.underlying_store = store
        self._prefix = prefix

    def set(self, key: str, value: bytes) -> None:
        self.underlying_store.set(f"{self._prefix}/{key}", value)

    def get(self, key: str) -> bytes:
        return self.underlying_store.get(f"{self._prefix}/{key}")

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self.underlying_store.multi_get([f"{self._prefix}/{key}" for key in keys])

    def check(self, keys: list[str]) -> bool:
        return self.underlying_store.check([f"{self._prefix}/{key}" for key in keys])

    def add(self, key: str, value: int) -> int:
        return self.underlying_store.add(f"{self._prefix}/{key}", value)

    def compare_set(self, key: str, expected_value: bytes, desired_value: bytes) -> bytes:
        return self.underlying_store.compare_set(f"{self._prefix}/{key}", expected_value, desired_value)

    def delete_key(self, key: str) -> bool:
        return self.underlying_store.delete_key(f"{self._prefix}/{key}")


class Fabric:
    """What `snapstone.fabric` uses of `torch.distributed`, between the ranks of `processes`."""

    isend, irecv = "send", "receive"
    group = SimpleNamespace(WORLD=SimpleNamespace(_device_types=[torch.device("cpu")]))

    def __init__(self, world: World, link: Link, processes: list[Process]) -> None:
        self._world = world
        self._link = link
        self._processes = processes
        self._boxes: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        self._waiting: dict[tuple[Any, ...], Callable[[], None]] = {}
        self._listening: dict[int, list[Callable[[], None]]] = {}
        self._gathers: dict[int, int] = {}
        for process in processes:
            process.on_death.append(lambda rank=process.rank: self._died(rank))  # type: ignore[misc]

    def P2POp(self, kind: str, tensor: torch.Tensor, peer: int, group: Any, tag: int) -> Any:
        return SimpleNamespace(kind=kind, tensor=tensor, peer=peer, tag=tag)

    def batch_isend_irecv(self, operations: list[Any]) -> list[Any]:
        me = current_process()
        me.step("messages")
        works = []
        for one in operations:
            if one.kind == self.isend:
                self._post(me, one.peer, ("message", me.rank, one.peer, one.tag), one.tensor)
                works.append(_Work(lambda limit: None))
            else:
                works.append(_Work(self._receiving((("message", one.peer, me.rank, one.tag)), one.peer, one.tensor)))
        return works

    def all_gather(self, gathered: list[torch.Tensor], mine: torch.Tensor, group: Any, async_op: bool) -> Any:
        me = current_process()
        me.step("all_gather")
        number = self._gathers[me.rank] = self._gathers.get(me.rank, 0) + 1
        for peer in range(len(self._processes)):
            self._post(me, peer, ("gather", number, me.rank, peer), mine)
        parts = [
            self._receiving(("gather", number, peer, me.rank), peer, target) for peer, target in enumerate(gathered)
        ]
        return _Work(lambda limit: [part(limit) for part in parts])

    def _post(self, me: Process, peer: int, key: tuple[Any, ...], tensor: torch.Tensor) -> None:
        copy = tensor.clone()

        def arrive() -> None:
            self._boxes.setdefault(key, []).append(copy)
            if told := self._waiting.pop(key, None):
                told()

        when = self._link.arrival(me, self._processes[peer])
        if when < math.inf:
            self._world.at(when, arrive, self._processes[peer])

    def _receiving(self, key: tuple[Any, ...], peer: int, target: torch.Tensor) -> Callable[[float], None]:
        def receive(limit: float) -> None:
            end = self._world.now + limit
            while not self._boxes.get(key):
                if not self._processes[peer].alive:
                    raise RuntimeError(f"Connection closed by peer [node-{peer}]")
                if self._world.now >= end:
                    raise RuntimeError(f"Timed out waiting {limit:.3f} s for recv operation to complete")
                self._world.wait(lambda told: self._listen(key, peer, told), end - self._world.now)
            arrived = self._boxes[key].pop(0)
            if arrived.shape != target.shape:
                raise RuntimeError("op.preamble.length <= op.nbytes. message of another length")
            target.copy_(arrived)

        return receive

    def _listen(self, key: tuple[Any, ...], peer: int, told: Callable[[], None]) -> None:
        self._waiting[key] = told
        self._listening.setdefault(peer, []).append(told)

    def _died(self, rank: int) -> None:
        for told in self._listening.pop(rank, []):
            self._world.at(self._world.now + self._link.latency(), told)


class _Work:
    def __init__(self, finish: Callable[[float], Any]) -> None:
        self._finish = finish

    def wait(self, limit: timedelta) -> None:
        self._finish(limit.total_seconds())
