"""Rewrites what README.md and docs/benchmarks.md show of the newest results, between markers, and the README's chart.

The README has the stall table, between <!-- stall:begin --> and its end, and the speed of large tensors, in "bench";
the page has all tables of `make bench`. With --check nothing is changed, and the status is 1 if a table or a chart is
out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import speed_table
import stall_table
from results import newest

REPOSITORY = Path(__file__).resolve().parent.parent


def replaced(text: str, name: str, block: str) -> str:
    """`text` with `block` between the markers of that name. ValueError if they are not there exactly once, in order."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"one {begin} is needed, and one {end} after it")
    head, rest = text.split(begin)
    lines = f"{block}\n" if block else ""
    return f"{head}{begin}\n{lines}{end}{rest.split(end)[1]}"


def generated(readme: Path, page: Path, result: Path, stall: Path | None) -> dict[Path, str]:
    """What each file should hold."""
    document = json.loads(result.read_text())
    text = replaced(readme.read_text(), "stall", stall_table.table(stall))
    files = {
        readme: replaced(text, "bench", speed_table.summary(document)),
        page: replaced(page.read_text(), "bench", speed_table.full(document)),
    }
    return files | {readme.parent / path: drawing for path, drawing in stall_table.charts(stall).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=REPOSITORY / "README.md")
    parser.add_argument("--page", type=Path, default=REPOSITORY / "docs" / "benchmarks.md")
    parser.add_argument("--result", type=Path, help="of make bench; default: the newest of benchmarks/results")
    parser.add_argument("--stall", type=Path, help="of make readme-bench, a directory; default: the newest, if any")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if something is out of date")
    options = parser.parse_args()
    try:
        stall = options.stall or stall_table.newest_stall()
        files = generated(options.readme, options.page, options.result or newest(), stall)
    except (OSError, ValueError) as error:
        print(f"readme_table: {error}", file=sys.stderr)
        return 1
    stale = {path: text for path, text in files.items() if not path.exists() or path.read_text() != text}
    if options.check:
        for path in stale:
            print(f"readme_table: {path.name} is out of date: run `make readme-table`", file=sys.stderr)
        return int(bool(stale))
    for path, text in stale.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
