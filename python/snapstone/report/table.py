"""A table of a report, as HTML and as Markdown. Every cell is escaped here, in one place for each format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Table"]

_NO_BREAK = "\u00a0"


@dataclass(frozen=True)
class Table:
    """Cells are plain text; the first column names the row. `numeric` lists columns that are aligned to the right."""

    caption: str
    headers: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()

    def html(self) -> str:
        head = "".join(
            f'<th scope="col"{self._class(column)}>{escape(header)}</th>' for column, header in enumerate(self.headers)
        )
        body = "\n".join(self._html_row(row) for row in self.rows)
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(self.caption)}"><table>'
            f"<caption>{escape(self.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>"
            f"</table></div>"
        )

    def _html_row(self, row: Sequence[str]) -> str:
        first, *others = row
        cells = "".join(f"<td{self._class(column)}>{escape(cell)}</td>" for column, cell in enumerate(others, start=1))
        return f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'

    def _class(self, column: int) -> str:
        return ' class="number"' if column in self.numeric else ""

    def markdown(self) -> str:
        rule = ["---:" if column in self.numeric else "---" for column in range(len(self.headers))]
        lines = [[_markdown(cell) for cell in self.headers]]
        for row in self.rows:  # a number stays on one line, whatever else of its row needs the width
            cells = [_markdown(cell) for cell in row]
            lines.append([cell.replace(" ", _NO_BREAK) if n in self.numeric else cell for n, cell in enumerate(cells)])
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))


def _markdown(cell: str) -> str:
    """Text that Markdown shows as it is: no link, no emphasis, no HTML, no end of the cell."""
    text = escape(" ".join(cell.split()), quote=False)
    for mark in "\\`*_[]|~":
        text = text.replace(mark, "\\" + mark)
    return text
