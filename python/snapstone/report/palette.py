"""Colours and type of charts and page, for light and dark.

Hues are those of Okabe and Ito, which people with any common colour blindness tell apart, in shades that keep a
contrast of 3:1 with either background. No meaning hangs on a colour alone: charts name their parts in text.
"""

from __future__ import annotations

__all__ = ["CHART_STYLE", "LEDGER_CLASSES", "SERIES_COUNT", "STANDALONE_STYLE", "THEME", "stage_class"]

SERIES_COUNT = 7

_LIGHT = {
    "paper": "#ffffff", "panel": "#f6f7f9", "ink": "#1b1f24", "muted": "#5b6470", "rule": "#d9dde3", "grid": "#e8ebef",
    "bad": "#b3261e", "bad-paper": "#fdecea", "link": "#0b57a4", "idle": "#9aa3ad",
    "s0": "#0072b2", "s1": "#d55e00", "s2": "#009e73", "s3": "#b35a92", "s4": "#2491cb", "s5": "#b27a00",
    "s6": "#5b6470",
}  # fmt: skip
_DARK = {
    "paper": "#14171b", "panel": "#1d2127", "ink": "#e8eaed", "muted": "#a3acb8", "rule": "#363c45", "grid": "#282d35",
    "bad": "#ff8a80", "bad-paper": "#3a1f1e", "link": "#8ab8f0", "idle": "#6b7480",
    "s0": "#4aa3df", "s1": "#f08a4b", "s2": "#35c49b", "s3": "#dd92c2", "s4": "#8fd0f5", "s5": "#e6b34a",
    "s6": "#a3acb8",
}  # fmt: skip


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


THEME = (
    f":root{{color-scheme:light dark;{_variables(_LIGHT)}}}\n"
    f"@media (prefers-color-scheme:dark){{:root{{{_variables(_DARK)}}}}}\n"
)

_SERIES = "".join(
    f".chart .s{index}{{fill:var(--s{index})}}.chart .l{index}{{stroke:var(--s{index})}}"
    for index in range(SERIES_COUNT)
)

CHART_STYLE = (
    '.chart text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif;'
    "font-size:13px;font-variant-numeric:tabular-nums;paint-order:stroke;stroke:var(--paper);stroke-width:3px}\n"
    ".chart .ink{fill:var(--ink)}.chart .name{fill:var(--ink);font-weight:600}.chart .muted{fill:var(--muted)}"
    ".chart .value{fill:var(--ink);font-weight:600}.chart .bad{fill:var(--bad)}.chart .idle{fill:var(--idle)}"
    ".chart .small,.chart .tick{font-size:11px}.chart .tick{fill:var(--muted)}"
    ".chart .grid{stroke:var(--grid)}.chart .base{stroke:var(--muted)}.chart .rule{stroke:var(--rule)}"
    ".chart .whisker{stroke:var(--ink);stroke-width:1.5}.chart .dot{fill:var(--paper);stroke:var(--ink)}"
    ".chart .cross{stroke:var(--bad);stroke-width:2.5;stroke-linecap:round}"
    ".chart .limit{stroke:var(--bad);stroke-width:1.5;stroke-dasharray:5 3}.chart .limit-name{fill:var(--bad)}"
    ".chart .faint{opacity:.55}.chart .lane{fill:var(--panel)}.chart .gap{fill:var(--paper)}"
    ".chart .unexplained{fill:var(--idle)}"
    ".chart .series{fill:none;stroke-width:2}.chart .band{opacity:.18}\n"
    f"{_SERIES}\n"
)

# A picture beside a README has no page around it, and its background is not known: it brings one.
STANDALONE_STYLE = (
    THEME + CHART_STYLE + ".chart .title{fill:var(--ink);font-weight:600;font-size:15px}svg{background:var(--paper)}"
)

LEDGER_CLASSES = {
    "call": "s0",
    "wait_previous": "s1",
    "fence": "s2",
    "finalize": "s3",
    "inflation": "s4",
    "unexplained": "unexplained",
}

_STAGES = {
    "plan": 6, "stage": 0, "copy": 0, "d2h": 0, "digest": 4, "encode": 3, "decode": 3, "write": 1, "read": 1, "sync": 2,
    "slot_wait": 6, "call": 0, "fence": 2, "finalize": 3, "save": 4, "vote": 5, "exchange": 5, "commit": 3,
    "scatter": 0,
}  # fmt: skip


def stage_class(stage: str) -> str:
    """The same stage has the same colour in every chart and every report."""
    known = _STAGES.get(stage)
    return f"s{sum(map(ord, stage)) % SERIES_COUNT if known is None else known}"
