"""The time line of a measured save has the engine's own stages, of every rank, where the engine tells them."""

from __future__ import annotations

import os
import random
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import snapstone as ss
from bench.conftest import measure, memory_directory
from snapstone.bench import results
from snapstone.bench.engines.inner_stages import InnerSpan, condensed, traced_saves
from snapstone.report import Measurements, page


def test_a_save_tells_its_stages_and_the_user_s_trace_stays_his(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAPSTONE_TRACE", str(tmp_path / "mine.json"))
    state = {"t": torch.ones(1 << 20)}
    with traced_saves() as spans:
        ss.async_save(state, checkpoint_id=tmp_path / "a").result()
        ss.load(state, checkpoint_id=tmp_path / "a")
        assert spans == []
    assert {"plan", "stage", "write", "sync", "vote", "commit"} <= {span.stage for span in spans}
    assert "read" not in {span.stage for span in spans}  # of the load
    assert sum(span.nbytes for span in spans if span.stage == "write") == state["t"].nbytes
    assert os.environ["SNAPSTONE_TRACE"] == str(tmp_path / "mine.json")
    assert not (tmp_path / "mine.json").exists()
    monkeypatch.delenv("SNAPSTONE_TRACE")
    with traced_saves() as spans, pytest.raises(KeyError):
        raise KeyError
    assert "SNAPSTONE_TRACE" not in os.environ


def test_many_events_become_few_stretches_of_the_same_bytes_and_extent() -> None:
    chance = random.Random(5)
    spans = []
    for lane in ("lane 0", "lane 1"):
        at = 0.0
        for _ in range(3000):
            begin = at + chance.uniform(0.0, 0.01)
            at = begin + chance.uniform(0.001, 0.02)
            spans.append(InnerSpan(lane, "write", begin, at + chance.choice([0.0, 0.02]), 10))
    wide = InnerSpan("lane 0", "write", 10_000.0, 10_001.0, 10)
    few = condensed([*spans, wide], 50)
    for lane in ("lane 0", "lane 1"):
        mine = [span for span in few if span.lane == lane]
        assert len(mine) == 50
        assert all(before.end < after.begin for before, after in pairwise(mine))
    assert few[-1] == wide  # the widest gap stays one
    assert sum(span.nbytes for span in few) == 10 * 6001
    assert min(span.begin for span in few) == min(span.begin for span in spans)
    assert condensed(spans[:1]) == spans[:1]


def test_the_report_shows_the_stages_of_a_measured_engine(tmp_path: Path) -> None:
    with memory_directory() as directory:
        done = measure(
            tmp_path,
            *("stall", "--model", "tiny", "--engine", "snapstone,snapstone-dcp,torch-save", "--cadence", "tight"),
            *("--dir", directory, "--saves", 1, "--pairs", 1, "--checks", 1, "--kills", 0, "--out", tmp_path),
            ranks=2,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    document = results.read(tmp_path / "stall-tiny.json")
    stages = {
        (engine["name"], rank): {span["stage"] for span in engine["timeline"] if span["rank"] == rank}
        for engine in document["engines"]
        for rank in (0, 1)
    }
    for rank in (0, 1):
        assert {"call", "fence", "plan", "stage", "write", "sync", "vote", "commit"} <= stages["snapstone", rank]
        assert "save" not in stages["snapstone", rank]
        assert {"call", "plan", "stage", "write", "sync"} <= stages["snapstone-dcp", rank]
        assert stages["torch-save", rank] == {"call", "fence", "save"}  # it syncs, and tells no stages
    for span in (span for engine in document["engines"] for span in engine["timeline"]):
        assert -0.01 <= span["begin"] <= span["end"] < 60
    text = page(Measurements.read(tmp_path))
    figures = re.findall(r'<figure[^>]*id="chart-timeline-1-\d+".*?</figure>', text, re.DOTALL)  # ordered by stall
    (drawn,) = [one for one in figures if "rank by rank: snapstone async_save<" in one]
    svg = ElementTree.fromstring(drawn[drawn.index("<svg") : drawn.index("</svg>") + 6])
    names = {part for text in svg.iter() if text.tag.endswith("text") for part in text.itertext()}
    assert {"rank 0", "rank 1", "plan", "stage", "write", "sync", "vote", "commit"} <= names
