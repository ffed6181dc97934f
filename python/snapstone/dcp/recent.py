"""A few values that were of use most recently."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Recent"]

V = TypeVar("V")


class Recent(Generic[V]):
    """At most `count_max` values, the one used last in front. Any thread may call."""

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._values: list[V] = []
        self._lock = threading.Lock()

    def find(self, wanted: Callable[[V], bool]) -> V | None:
        for value in self.all():
            if wanted(value):
                self.put(value)
                return value
        return None

    def put(self, value: V) -> None:
        with self._lock:
            others = [other for other in self._values if other is not value]
            self._values = [value, *others][: self._count_max]

    def all(self) -> list[V]:
        with self._lock:
            return list(self._values)

    def clear(self) -> None:
        with self._lock:
            self._values = []
