"""What every chart of a report consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from .drawing import Drawing
from .palette import STANDALONE_STYLE
from .table import Table

__all__ = ["NARROW", "WIDE", "Chart"]

WIDE = 860.0
NARROW = 350.0


@dataclass(frozen=True)
class Chart:
    """A title, a sentence on how to read it, a drawing, and the numbers that it shows.

    `draw(identity, width)` draws for a screen of that width: a chart for a phone is laid out anew instead of shrunk
    until its text cannot be read.
    """

    identity: str
    title: str
    reading: str
    draw: Callable[[str, float], Drawing]
    tables: tuple[Table, ...]
    notes: tuple[str, ...] = ()

    def html(self) -> str:
        drawings = "".join(
            f'<div class="{name}">{self.draw(f"{self.identity}-{name}", width).svg()}</div>'
            for name, width in (("wide", WIDE), ("narrow", NARROW))
        )
        notes = "".join(f'<p class="note">{escape(note)}</p>' for note in self.notes)
        tables = "".join(table.html() for table in self.tables)
        return (
            f'<figure id="{escape(self.identity)}"><figcaption><h3>{escape(self.title)}</h3>'
            f"<p>{escape(self.reading)}</p></figcaption>\n{drawings}{notes}\n"
            f"<details><summary>Data of this chart</summary>{tables}</details></figure>\n"
        )

    def svg_file(self, width: float = WIDE) -> str:
        """The drawing as a file, which says itself how to read it."""
        return self.draw(self.identity, width).svg_file(STANDALONE_STYLE, self.reading) + "\n"
