"""Markdown, CSV and JSON of the same documents."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from report.hostile import write_hostile
from report.measured import stall_document, write_results
from snapstone.report import Measurements, csv_text, json_document, markdown, standalone_chart


@pytest.fixture
def measurements(tmp_path: Path) -> Measurements:
    return Measurements.read(write_results(tmp_path))


@pytest.fixture
def hostile(tmp_path: Path) -> Measurements:
    return Measurements.read(write_hostile(tmp_path))


def test_json_has_every_document_whole(measurements: Measurements) -> None:
    found = json_document(measurements)
    by_file = {one["file"]: one["document"] for one in found["documents"]}
    stall = by_file["stall-llama-1b.json"]
    assert {**stall, "date": 0} == {**json.loads(json.dumps(stall_document())), "date": 0}
    assert sorted(by_file) == [
        *("disk-checkpoints.json", "link-4-ranks.json", "load-step-8.json", "model-cluster.json", "stall-llama-1b.json")
    ]


def test_json_stays_json_with_numbers_that_json_lacks(hostile: Measurements) -> None:
    text = json.dumps(json_document(hostile), allow_nan=False)
    assert '"nan"' in text
    assert '"inf"' in text


def test_csv_has_every_number_of_a_list(measurements: Measurements) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(measurements))))
    engine = stall_document()["engines"][0]
    stalls = [
        float(row["value"])
        for row in rows
        if (row["name"], row["cadence"], row["quantity"]) == (engine["name"], "tight", "stall")
    ]
    assert stalls == pytest.approx(engine["cadences"][1]["stall_seconds"])
    assert {row["unit"] for row in rows if row["quantity"] == "stall"} == {"s"}
    failed = [row for row in rows if row["name"] == "bytecheckpoint"]
    assert [row["quantity"] for row in failed] == ["reason"]


def test_no_cell_of_the_csv_is_a_formula(hostile: Measurements) -> None:
    rows = list(csv.reader(io.StringIO(csv_text(hostile))))
    assert {len(row) for row in rows} == {9}
    assert "'=HYPERLINK(1)" in {row[2] for row in rows}
    assert not [cell for row in rows for cell in row[:8] if cell[:1] in ("=", "+", "-", "@")]


def test_markdown_has_the_table_with_its_conditions(measurements: Measurements) -> None:
    text = markdown(measurements, "charts/stall.svg")
    assert "![Stall per save, by engine](charts/stall.svg)" in text
    row = next(line for line in text.splitlines() if line.startswith("| snapstone | 1.2.3 |"))
    assert re.search(r"\| 40\.\d ms \(\d", row)
    assert "AMD EPYC 9B45; ext4; torch 2.13.0" in text
    assert "    snapstone bench stall --model 'llama 1b'" in text
    assert (
        text.index("| snapstone | 1.2.3 |") < text.index("| dcp direct |") < text.index("| probe uring-fixed, write |")
    )


def test_markdown_of_hostile_documents_has_neither_html_nor_broken_rows(hostile: Measurements) -> None:
    text = markdown(hostile)
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert not re.search(r"<[a-z/!]", prose, re.IGNORECASE)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert tables
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_the_chart_file_needs_no_page_around_it(measurements: Measurements) -> None:
    text = standalone_chart(measurements)
    assert text is not None
    drawing = ElementTree.fromstring(text)
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme:dark" in (drawing.findtext("{http://www.w3.org/2000/svg}style") or "")


def test_without_a_stall_document_there_is_no_chart(tmp_path: Path) -> None:
    assert standalone_chart(Measurements.read(tmp_path)) is None
