"""The result documents of a directory, and what is wrong with them as a set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..bench import results
from .fields import Fields
from .quantity import format_bytes

__all__ = ["Measurement", "Measurements"]

# What must agree for numbers to be compared, with the name that people know it by.
_COMPARED = (
    ("hardware", "cpu", "processors"),
    ("hardware", "cores", "numbers of cores"),
    ("hardware", "memory_bytes", "memory sizes"),
    ("hardware", "accelerator", "accelerators"),
    ("storage", "file_system", "file systems"),
    ("storage", "device", "kinds of disk"),
    ("software", "torch", "versions of torch"),
    ("software", "snapstone", "versions of snapstone"),
    ("software", "kernel", "kernels"),
)


@dataclass(frozen=True)
class Measurement:
    """One document: `name` is its file's, `document` what stands in it, `fields` the same, read without trust."""

    name: str
    document: Any
    fields: Fields

    @property
    def kind(self) -> str:
        return self.fields.text("kind")

    def environment(self, part: str) -> Fields:
        return self.fields.fields("environment").fields(part)


@dataclass(frozen=True)
class Measurements:
    """All documents of `directory` by name; `skipped` says which files were left out and why."""

    directory: str
    all: tuple[Measurement, ...]
    skipped: tuple[str, ...]

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> Measurements:
        """Raises OSError when the directory cannot be read; a file that cannot is one of `skipped`."""
        documents, skipped = results.read_all(directory)
        found = (Measurement(path.name, document, Fields(document)) for path, document in documents)
        return cls(os.fspath(directory), tuple(found), tuple(skipped))

    def of_kind(self, kind: str) -> list[Measurement]:
        return [one for one in self.all if one.kind == kind]

    def mixtures(self) -> list[str]:
        """In what the machines differ: "processors: A (disk-a.json), B (stall-b.json)". Models have no machine."""
        measured = [one for one in self.all if one.kind != "model"]
        found = []
        for part, name, title in _COMPARED:
            values: dict[str, list[str]] = {}
            for one in measured:
                if part == "storage" and one.kind == "link":
                    continue  # no storage took part
                values.setdefault(_value(one.environment(part), name), []).append(one.name)
            if len(values) > 1:
                found.append(f"{title}: {'; '.join(f'{value} ({_listed(names)})' for value, names in values.items())}")
        return found

    def problems(self) -> list[str]:
        """What the documents say went wrong, each with its file."""
        found = []
        for one in self.all:
            if not one.fields.flag("complete", default=True):
                found.append(
                    f"{one.name}: not complete; the measurement was interrupted or failed, what it has is shown"
                )
            found += [f"{one.name}: {problem}" for problem in one.fields.texts("problems")]
        return found


def _value(fields: Fields, name: str) -> str:
    """Memory to three digits: what a kernel keeps for itself differs from boot to boot."""
    return format_bytes(fields.number(name)) if name.endswith("bytes") else fields.text(name) or "none"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
