"""SVG: shapes and text at pixel positions, with every text and attribute escaped.

Colours are CSS classes, so that one drawing serves light and dark; `palette` has the rules. Widths of text are
estimates: a report has no fonts of its own to measure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape

__all__ = ["Drawing", "fitted", "text_width", "wrapped"]

_ADVANCE_EM = 0.58  # of an average character of a sans-serif face
_BOLD = 1.16
_MARGIN = 16.0  # of a file, whose background need not be that of what is around it


class Drawing:
    """One SVG of `width` pixels; `height` is set when everything has been placed."""

    def __init__(self, identity: str, title: str, description: str, width: float) -> None:
        self.identity = identity
        self.title = title
        self.description = description
        self.width = width
        self.height = 0.0
        self._parts: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, css: str, *, title: str = "", r: float = 0) -> None:
        corner = f' rx="{_n(r)}"' if r else ""
        self._shape("rect", f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"{corner}', css, title)

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        self._shape("line", f'x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"', css, "")

    def circle(self, x: float, y: float, radius: float, css: str, *, title: str = "") -> None:
        self._shape("circle", f'cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}"', css, title)

    def polyline(self, points: Sequence[tuple[float, float]], css: str, *, closed: bool = False) -> None:
        joined = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        self._shape("polygon" if closed else "polyline", f'points="{joined}"', css, "")

    def text(self, x: float, y: float, text: str, css: str = "", *, anchor: str = "start", title: str = "") -> None:
        """Text with its baseline at `y`."""
        where = f'x="{_n(x)}" y="{_n(y)}"' + ("" if anchor == "start" else f' text-anchor="{anchor}"')
        self._parts.append(f'<text {where} class="{escape(css or "ink")}">{_title(title)}{escape(text)}</text>')

    @contextmanager
    def group(self, css: str, title: str = "") -> Iterator[None]:
        self._parts.append(f'<g class="{escape(css)}">{_title(title)}')
        yield
        self._parts.append("</g>")

    def svg(self) -> str:
        """The element, for a page that has the rules of `palette`."""
        return self._element("", (0.0, 0.0, self.width, self.height), "")

    def svg_file(self, style: str, reading: str) -> str:
        """A document of its own, with a margin; above the drawing its title and how to read it."""
        lines = wrapped(reading, self.width, 11, 5)
        top = _MARGIN + 22 + 16.0 * len(lines)
        head = [f'<text x="0" y="{_n(_MARGIN + 12 - top)}" class="title">{escape(self.title)}</text>']
        for number, line in enumerate(lines):
            head.append(
                f'<text x="0" y="{_n(_MARGIN + 30 + 16 * number - top)}" class="muted small">{escape(line)}</text>'
            )
        frame = (-_MARGIN, -top, self.width + 2 * _MARGIN, self.height + top + _MARGIN)
        return self._element(f"<style>{style}</style>{''.join(head)}", frame, ' xmlns="http://www.w3.org/2000/svg"')

    def _element(self, head: str, frame: tuple[float, float, float, float], namespace: str) -> str:
        size = f'viewBox="{" ".join(map(_n, frame))}" width="{_n(frame[2])}" height="{_n(frame[3])}"'
        names = f"{self.identity}-title {self.identity}-desc"
        return (
            f'<svg{namespace} {size} role="img" aria-labelledby="{escape(names)}" class="chart">'
            f'<title id="{escape(self.identity)}-title">{escape(self.title)}</title>'
            f'<desc id="{escape(self.identity)}-desc">{escape(self.description)}</desc>'
            f"{head}{''.join(self._parts)}</svg>"
        )

    def _shape(self, name: str, attributes: str, css: str, title: str) -> None:
        end = f">{_title(title)}</{name}>" if title else "/>"
        self._parts.append(f'<{name} {attributes} class="{escape(css)}"{end}')


def _n(value: float) -> str:
    """A coordinate, to a tenth of a pixel; what is not finite must never reach a file."""
    if not math.isfinite(value):
        raise ValueError(f"coordinate {value} is not finite")
    return f"{value:.1f}".removesuffix(".0")


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """About the pixels that `text` takes in a font of `size` pixels; characters beyond Latin count as wide ones."""
    return sum(_ADVANCE_EM if ord(c) < 0x2E80 else 1.0 for c in text) * size * (_BOLD if bold else 1.0)


def fitted(text: str, width: float, size: float, *, bold: bool = False) -> str:
    """`text`, cut with an ellipsis where it would be wider than `width` pixels."""
    text = " ".join(text.split())
    if text_width(text, size, bold=bold) <= width:
        return text
    while text and text_width(text + "…", size, bold=bold) > width:
        text = text[:-1] if len(text) < 80 else text[: len(text) // 2]
    return text.rstrip() + "…"


def wrapped(text: str, width: float, size: float, lines: int, *, bold: bool = False) -> list[str]:
    """At most `lines` lines of `width` pixels, broken between words."""
    left = text.split()
    found: list[str] = []
    while left and len(found) < lines - 1:
        line = [left.pop(0)]
        while left and text_width(" ".join([*line, left[0]]), size, bold=bold) <= width:
            line.append(left.pop(0))
        found.append(fitted(" ".join(line), width, size, bold=bold))
    return [*found, fitted(" ".join(left), width, size, bold=bold)] if left else found
