"""The report as one HTML file: no script, no network, no font or picture from elsewhere.

The page forbids itself all of that in a Content-Security-Policy, so that nothing which a document smuggles into it can
load or run either.
"""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape

from .documents import Measurement, Measurements
from .palette import CHART_STYLE, THEME
from .sections import Section, command_of, environment_table, sections_of

__all__ = ["page"]

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif}
header,main,footer{max-width:940px;margin:0 auto;padding:0 40px}
header{padding-top:48px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .4rem;letter-spacing:-.01em}
h2{font-size:1.4rem;line-height:1.25;margin:3.5rem 0 .4rem;padding-top:1.2rem;border-top:1px solid var(--rule)}
h3{font-size:1.05rem;margin:0}
h1,h2,h3,p,li,code{overflow-wrap:anywhere}
p{margin:.3rem 0}
a{color:var(--link)}
nav{margin:1.2rem 0 0}nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;padding:0;margin:0}
.lead,.note,figcaption p,footer{color:var(--muted)}
.facts{color:var(--muted)}
.said{font-size:1.1rem;margin-top:.6rem}
figure{margin:2.2rem 0 0}
figcaption{margin-bottom:.9rem;max-width:46rem}
figcaption p,.note{font-size:.9rem}
svg.chart{display:block;width:100%;height:auto}
.narrow{display:none}
details{margin:.8rem 0 0}
summary{cursor:pointer;color:var(--link);font-size:.9rem}
.tabled{margin-top:2.2rem}.tabled caption{color:var(--ink);font-weight:600;font-size:1.05rem}
details.more{border-top:1px solid var(--grid);padding-top:.5rem}
.scroll{overflow-x:auto;margin:.7rem 0 0;max-width:100%}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--muted);padding:0 0 .3rem}
th,td{padding:.35rem .9rem .35rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid);
min-width:4rem;max-width:26rem;overflow-wrap:break-word}
td:last-child{min-width:11rem}
td.number,tbody th{white-space:nowrap}
tbody th{max-width:16rem;overflow:hidden;text-overflow:ellipsis}
td.number,td.number:last-child{min-width:4rem}
thead th{color:var(--muted);font-weight:600;border-bottom-color:var(--rule);vertical-align:bottom;overflow-wrap:normal}
tbody th{font-weight:600}
.number{text-align:right}
.alert{border-left:4px solid var(--bad);background:var(--bad-paper);padding:.8rem 1.1rem;margin:1.4rem 0 0;
border-radius:0 6px 6px 0}
.alert h2{color:var(--bad);border:0;padding:0;margin:0 0 .2rem;font-size:1.05rem}
.alert ul{margin:.2rem 0;padding-left:1.2rem}
pre{background:var(--panel);padding:.8rem 1rem;border-radius:6px;white-space:pre-wrap;overflow-wrap:anywhere;
font:.82rem/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace}
footer{margin-top:4rem;padding-bottom:3rem;font-size:.85rem}
@media (max-width:760px){header,main,footer{padding-left:20px;padding-right:20px}header{padding-top:28px}
h1{font-size:1.5rem}h2{font-size:1.25rem;margin-top:2.6rem}.wide{display:none}.narrow{display:block;max-width:480px}}
@media print{details{display:none}.scroll{overflow:visible}h2,figure{break-inside:avoid}}
"""


def page(measurements: Measurements) -> str:
    """The whole file. Texts of documents are escaped where they become HTML: in `Table`, `Drawing`, `Chart`, here."""
    sections = sections_of(measurements)
    count = len(measurements.all)
    links = [(section.identity, section.title) for section in sections] + [("environment", "Environment and commands")]
    contents = "".join(f'<li><a href="#{escape(identity)}">{escape(title)}</a></li>' for identity, title in links)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>Checkpoint benchmark: {escape(measurements.directory)}</title>\n"
        f"<style>{THEME}{CHART_STYLE}{_STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>Checkpoint benchmark</h1><p class="lead">{count} measurement{"s" if count != 1 else ""} in '
        f"{escape(measurements.directory)}, {escape(_when(measurements))}</p>"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav></header>\n<main>\n{_alerts(measurements)}'
        f"{''.join(map(_section, sections))}{_environment(measurements)}</main>\n"
        "<footer><p>Made by snapstone report. Units are decimal: a GB is 10⁹ bytes. docs/report.md explains each "
        "chart, docs/bench.md how it was measured.</p></footer>\n</body>\n</html>\n"
    )


def _when(measurements: Measurements) -> str:
    dates = sorted(date for one in measurements.all if (date := one.fields.text("date")))
    if not dates:
        return "at an unknown time"
    return " to ".join(dict.fromkeys(_minute(date) for date in (dates[0], dates[-1])))


def _minute(date: str) -> str:
    """ISO 8601 to the minute, as people write it; what is none of it as it is."""
    try:
        return datetime.fromisoformat(date).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError):
        return date


def _alerts(measurements: Measurements) -> str:
    alerts = (
        (
            "mixed-hardware",
            "Not one machine: these documents must not be compared with each other",
            measurements.mixtures(),
        ),
        ("skipped", "Files that could not be read are not in this report", list(measurements.skipped)),
        ("problems", "Problems during the measurements", measurements.problems()),
    )
    return "".join(
        f'<section class="alert" id="{identity}" role="alert"><h2>{escape(title)}</h2><ul>'
        f"{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul></section>\n"
        for identity, title, lines in alerts
        if lines
    )


def _section(section: Section) -> str:
    facts, *said = section.lines or [""]
    parts = [f'<section id="{escape(section.identity)}"><h2>{escape(section.title)}</h2>']
    parts.append(f'<p class="facts">{escape(facts)}</p>' if facts else "")
    parts += [f'<p class="said">{escape(line)}</p>' for line in said]
    parts += [chart.html() for chart in section.charts]
    for chart in section.folded:
        parts.append(f'<details class="more"><summary>{escape(chart.title)}</summary>{chart.html()}</details>')
    for table in section.tables:
        parts.append(f'<div class="tabled">{table.html()}</div>')
    return "\n".join([*parts, "</section>\n"])


def _environment(measurements: Measurements) -> str:
    if not measurements.all:
        return ""
    commands = "".join(_command(one) for one in measurements.all)
    return (
        '<section id="environment"><h2>Environment and commands</h2>'
        f'{environment_table(measurements).html()}<div class="tabled">{commands}</div></section>\n'
    )


def _command(measurement: Measurement) -> str:
    command = command_of(measurement) or "(the document does not say)"
    facts = f"{measurement.name}, {_minute(measurement.fields.text('date')) or 'no date'}"
    return f'<p class="facts">{escape(facts)}</p><pre>{escape(command)}</pre>'
