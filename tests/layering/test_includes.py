"""The #include lines of csrc/ against the include table of docs/architecture.md."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import pytest

from layering.tree import CSRC, architecture_table, files

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
NATIVE_SUFFIXES = (".h", ".cc", ".cu", ".cuh")

# Headers that have one home: pattern of the header, directories that may include it, single files that may too.
HOMES: tuple[tuple[re.Pattern[str], frozenset[str], frozenset[str]], ...] = (
    (re.compile(r"liburing(\.h|/.*)"), frozenset({"io"}), frozenset()),
    (re.compile(r"Python\.h|pybind11/.*"), frozenset({"bind"}), frozenset()),
    (re.compile(r"(cuda|nvrtc|nvml|cupti|cu[A-Z]).*"), frozenset({"cuda"}), frozenset()),
    (
        re.compile(r"fcntl\.h|unistd\.h|sys/(stat|mman)\.h"),
        frozenset({"os", "io"}),
        frozenset({"base/fault_hook.cc"}),
    ),
)

TABLE = architecture_table("Include table")


def violations(name: str, text: str, table: dict[str, frozenset[str]]) -> list[str]:
    """What is wrong with the includes of ``name``, a path relative to csrc/ such as ``os/file.h``."""
    directory = PurePosixPath(name).parts[0]
    if directory not in table:
        return [f"{name}: the include table has no row for {directory}/"]
    problems = []
    for bracket, header in INCLUDE.findall(text):
        if bracket == '"':
            target = PurePosixPath(header).parts[0]
            if "/" not in header or target not in table:
                problems.append(f'{name}: "{header}" is not relative to csrc/')
            elif target != directory and target not in table[directory]:
                problems.append(f"{name}: {directory}/ may not include {target}/ ({header})")
            continue
        for pattern, homes, exceptions in HOMES:
            if pattern.fullmatch(header) and directory not in homes and name not in exceptions:
                problems.append(f"{name}: <{header}> belongs in {', '.join(sorted(homes))}")
    return problems


SOURCES = [path.relative_to(CSRC).as_posix() for path in files("csrc", suffixes=NATIVE_SUFFIXES)]


@pytest.mark.parametrize("name", SOURCES)
def test_includes_follow_the_table(name: str) -> None:
    assert violations(name, Path(CSRC, name).read_text(), TABLE) == []


def test_table_has_only_downward_edges() -> None:
    seen: set[str] = set()
    for directory, allowed in TABLE.items():
        assert allowed <= seen, f"{directory} points to rows that are not above it: {sorted(allowed - seen)}"
        seen.add(directory)


def test_every_directory_with_sources_has_a_row() -> None:
    assert SOURCES, "csrc/ has no sources: the check would pass on nothing"
    assert {PurePosixPath(name).parts[0] for name in SOURCES} <= set(TABLE)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("base/clock.h", '#include "os/file.h"'),
        ("os/file.cc", '#  include "pipeline/engine.h"'),
        ("store/names.cc", '#include "io/io_engine.h"'),
        ("os/file.cc", '#include "file.h"'),
        ("os/file.cc", '#include "../base/error.h"'),
        ("os/file.cc", "#include <liburing.h>"),
        ("pipeline/engine.cc", "#include <pybind11/pybind11.h>"),
        ("mem/slot_ring.cc", "#include <cuda.h>"),
        ("mem/slot_ring.cc", "#include <cuda_runtime_api.h>"),
        ("store/names.cc", "#include <unistd.h>"),
        ("base/error.cc", "#include <fcntl.h>"),
        ("extras/thing.cc", "#include <vector>"),
    ],
)
def test_a_forbidden_include_is_found(name: str, line: str) -> None:
    assert len(violations(name, f"// a comment\n{line}\n", TABLE)) == 1


def test_allowed_includes_pass() -> None:
    text = '#include "store/names.h"\n#include "base/error.h"\n#include "os/file.h"\n#include <vector>\n'
    assert violations("store/names.cc", text, TABLE) == []
    assert violations("base/fault_hook.cc", "#include <unistd.h>\n", TABLE) == []
