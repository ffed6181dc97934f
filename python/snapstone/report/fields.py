"""A JSON object read without trust: what is missing, of another type or not finite is as good as not there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["Fields"]

_TEXT_CHARACTERS_MAX = 2000


class Fields:
    """The members of one JSON object, by name and wanted type. `Fields(None)` has none."""

    def __init__(self, value: Any) -> None:
        self._members: Mapping[str, Any] = value if isinstance(value, Mapping) else {}

    def __bool__(self) -> bool:
        return bool(self._members)

    def names(self) -> list[str]:
        return [str(name) for name in self._members]

    def text(self, name: str) -> str:
        """A string or a number as text; "" where there is none."""
        return as_text(self._members.get(name))

    def texts(self, name: str) -> list[str]:
        return [text for value in self._list(name) if (text := as_text(value))]

    def number(self, name: str) -> float | None:
        return as_number(self._members.get(name))

    def numbers(self, name: str) -> list[float]:
        """Those members of a list that are finite numbers; a number alone is a list of one."""
        alone = self.number(name)
        if alone is not None:
            return [alone]
        return [number for value in self._list(name) if (number := as_number(value)) is not None]

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._members.get(name)
        return value if isinstance(value, bool) else default

    def fields(self, name: str) -> Fields:
        return Fields(self._members.get(name))

    def items(self, name: str) -> list[Fields]:
        return [Fields(value) for value in self._list(name) if isinstance(value, Mapping)]

    def _list(self, name: str) -> list[Any]:
        value = self._members.get(name)
        return value if isinstance(value, list) else []


def as_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of a thousand digits is valid JSON
        return None
    return number if math.isfinite(number) else None


def as_text(value: Any) -> str:
    """Printable text of at most 2000 characters; line breaks stay."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        number = as_number(value)
        return "" if number is None else f"{number:.15g}"
    if not isinstance(value, str):
        return ""
    if len(value) > _TEXT_CHARACTERS_MAX:
        value = value[:_TEXT_CHARACTERS_MAX] + "…"
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in value)
