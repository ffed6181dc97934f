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
from snapstone.bench import results
from snapstone.report import Measurements, chart_files, csv_text, json_document, markdown


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
    assert 'srcset="charts/stall-narrow.svg"' in text
    assert 'src="charts/stall.svg"' in text
    row = next(line for line in text.splitlines() if line.startswith("| snapstone | 1.2.3 |"))
    assert re.search(r"\| 40\.\d\sms \| \d+\.\d–\d+\.\d\sms \|", row)
    assert "2026-11-21T12:00:00+00:00; 2 x AMD EPYC 9B45; " in text
    assert re.search(r"; ext4 on \w.*; Linux \d.*; torch 2\.13\.0; command:\n\n    snapstone bench", text)
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


def test_markdown_lists_absent_engines_without_a_row_and_failed_ones_with_reasons(measurements: Measurements) -> None:
    rows = [line for line in markdown(measurements).splitlines() if line.startswith("| ")]
    assert not [row for row in rows if row.startswith("| Orbax")]
    assert "Not installed here: Orbax (no module named 'orbax'), torchsnapshot" in markdown(measurements)
    (failed,) = (row for row in rows if row.startswith("| ByteCheckpoint"))
    assert failed.endswith("| – | – | – | – | – | – | failed |")
    assert "ByteCheckpoint failed: step 24: optim.state.exp" in markdown(measurements)
    (other,) = (row for row in rows if row.startswith("| torch.save "))
    assert other.endswith("| syncfs |")
    assert "syncfs: the engine does not sync its files" in markdown(measurements)


def test_a_cadence_that_was_not_measured_has_no_column(tmp_path: Path) -> None:
    document = stall_document()
    for engine in document["engines"]:
        engine["cadences"] = engine["cadences"][:1]
    results.write(document, tmp_path, "relaxed")
    header = next(line for line in markdown(Measurements.read(tmp_path)).splitlines() if line.startswith("| engine "))
    assert header == "| engine | version | stall per save | lowest–highest | to durable | first save: call | note |"


def test_the_chart_files_need_no_page_around_them(measurements: Measurements) -> None:
    files = chart_files(measurements, "charts/stall.svg")
    assert list(files) == ["charts/stall.svg", "charts/stall-narrow.svg"]
    widths = []
    for text in files.values():
        drawing = ElementTree.fromstring(text)
        assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme:dark" in (drawing.findtext("{http://www.w3.org/2000/svg}style") or "")
        widths.append(float(drawing.attrib["width"]))
    assert widths[0] > 800
    assert widths[1] < 400


def test_without_a_stall_document_there_is_no_chart(tmp_path: Path) -> None:
    assert chart_files(Measurements.read(tmp_path), "stall.svg") == {}
