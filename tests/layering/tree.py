"""The checkout as the layering tests see it: its files, and the tables of docs/architecture.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "snapstone"


def files(*directories: str, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files under ``directories`` of the checkout with one of ``suffixes``, in a stable order."""
    for directory in directories:
        for path in sorted((ROOT / directory).rglob("*")):
            if path.suffix in suffixes and path.is_file():
                yield path


def read_table(page: str, heading: str) -> dict[str, frozenset[str]]:
    """The first table after ``heading``: its first column, which names a row, to the names in its last column."""
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [
        [cell.strip().replace("`", "").replace("\\_", "_") for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    return {
        cells[0]: frozenset(name.strip() for name in cells[-1].split(",") if name.strip() != "-") for cells in rows[2:]
    }


def architecture_table(heading: str) -> dict[str, frozenset[str]]:
    return read_table((ROOT / "docs" / "architecture.md").read_text(), heading)
