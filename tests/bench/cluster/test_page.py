"""docs/cluster-model.md and docs/cli.md show what the command shows; tests/unit/test_docs.py runs the page's cases."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from snapstone.bench.cluster import Cluster, Timing, goodput
from snapstone.cli import cli

DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGE = DOCS / "cluster-model.md"


def shown(default: Any) -> str:
    return "none" if default is None else default if isinstance(default, str) else f"{default:g}"


def test_every_figure_has_its_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert rows == [
        (figure.name, shown(figure.default), figure.metadata["text"], figure.metadata["source"])
        for figure in fields(Cluster)
    ]


@pytest.mark.parametrize("page", ["cluster-model.md", "cli.md"])
def test_the_command_prints_what_the_page_shows(page: str) -> None:
    found = re.findall(r"^\$ snapstone (bench model .*)\n((?:.+\n)+)```", (DOCS / page).read_text(), re.MULTILINE)
    assert len(found) == 1
    for command, output in found:
        if "--simulate" in command:
            pytest.importorskip("simpy", reason="the simulation needs the package simpy")
        assert CliRunner().invoke(cli, shlex.split(command)).stdout == output


def test_saves_that_wait_are_worse_unless_the_time_to_durable_is_beyond_the_mtbf() -> None:
    """Then the best cadence that waits is the mtbf, better than any that does not, and both are below 22 %."""
    for durable in (120, 150, 300):
        timing = Timing(0, durable, 0, 100)
        waiting = goodput(timing, 100)
        assert max(goodput(timing, 90), goodput(timing, 110), goodput(timing, durable)) < waiting < 0.22
    below = Timing(0, 90, 0, 100)
    assert goodput(below, 80) < goodput(below, 89) < goodput(below, 90)
