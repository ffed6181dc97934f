"""The report page: what it shows, what it leaves out, and that a document can put nothing into it but text.

Invariants: the page loads nothing and runs nothing; no coordinate or number in it is not finite; an engine that failed
has a reason and no time.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from report.hostile import SCRIPT, write_hostile
from report.measured import CHARTS, disk_document, link_document, load_document, stall_document, write_results
from snapstone.bench import results
from snapstone.report import Measurements, page

VOID = {"meta", "link", "br", "img", "input", "hr"}
ALLOWED = {
    "html", "head", "meta", "link", "title", "style", "body", "header", "main", "footer", "nav", "section", "ul", "li",
    "a", "h1", "h2", "h3", "p", "pre", "div", "figure", "figcaption", "details", "summary", "table", "caption", "thead",
    "tbody", "tr", "th", "td", "svg", "desc", "g", "rect", "line", "circle", "polyline", "polygon", "text",
}  # fmt: skip


class Outline(HTMLParser):
    """Elements with their attributes, the texts inside them, and whether every tag was closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def ids(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.elements if "id" in attributes]


def svgs(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def figure(text: str, identity: str) -> str:
    return text[text.index(f'<figure id="{identity}"') :].partition("</figure>")[0]


@pytest.fixture
def report(tmp_path: Path) -> str:
    return page(Measurements.read(write_results(tmp_path)))


@pytest.fixture
def hostile(tmp_path: Path) -> str:
    return page(Measurements.read(write_hostile(tmp_path)))


def shown(tmp_path: Path, document: Any) -> str:
    results.write(document, tmp_path, "one")
    return page(Measurements.read(tmp_path))


@pytest.mark.parametrize("identity", CHARTS)
def test_every_chart_is_there_twice_with_its_data(report: str, identity: str) -> None:
    """Once for a wide screen and once for a narrow one, each with title and description, and one table of the data."""
    chart = figure(report, identity)
    drawings = svgs(chart)
    assert len(drawings) == 2
    for drawing, width in zip(drawings, ("860", "350"), strict=True):
        assert drawing.get("role") == "img"
        assert drawing.get("width") == width
        names = (drawing.get("aria-labelledby") or "").split()
        described = {element.get("id"): element.text for element in drawing if element.tag in ("title", "desc")}
        assert [bool(described[name]) for name in names] == [True, True]
    table = chart.partition("<details>")[2]
    assert '<th scope="col"' in table
    assert table.count("<tr>") > 1


def test_no_identity_is_used_twice(report: str, hostile: str) -> None:
    for text in (report, hostile):
        ids = Outline(text).ids()
        assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", ["report", "hostile"])
def test_the_page_loads_nothing_and_runs_nothing(name: str, request: pytest.FixtureRequest) -> None:
    outline = Outline(request.getfixturevalue(name))
    assert {tag for tag, _ in outline.elements} <= ALLOWED
    for tag, attributes in outline.elements:
        assert not [
            attribute for attribute in attributes if attribute.startswith("on") or attribute in ("src", "style")
        ]
        assert str(attributes.get("href", "#")).startswith(("#", "data:,")), tag
    policy = next(a["content"] for _, a in outline.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy)
    styles = re.findall(r"<style>.*?</style>", request.getfixturevalue(name), re.DOTALL)
    assert len(styles) == 1
    assert "url(" not in styles[0]
    assert "@import" not in styles[0]


def test_texts_of_documents_arrive_as_text(hostile: str) -> None:
    texts = "".join(Outline(hostile).texts)
    assert "<script>alert('x')</script>" in texts
    assert "\\x1b[31m\\u202e" in texts
    assert "\x1b" not in hostile


def test_no_coordinate_is_not_finite(hostile: str) -> None:
    for drawing in svgs(hostile):
        for element in drawing.iter():
            for value in element.attrib.values():
                assert not re.search(r"\b(nan|inf)\b", value), ElementTree.tostring(element)
            for name in ("width", "height", "r"):
                assert float(element.get(name, "0")) >= 0
    for cell in re.findall(r"<td[^>]*>([^<]*)</td>", hostile):
        assert cell.strip().lower() not in ("nan", "inf", "-inf")


def test_files_that_cannot_be_read_are_named_and_the_others_are_shown(hostile: str) -> None:
    alert = hostile.partition('id="skipped"')[2].partition("</section>")[0]
    for name in ("stall-future.json: version 2", "stall-torn.json", "stall-deep.json", "load-array.json"):
        assert name in alert
    assert "notes.json" not in hostile
    assert 'id="chart-stall-2"' in hostile or 'id="chart-stall-1"' in hostile


def test_an_engine_that_failed_has_a_red_mark_and_no_time(report: str) -> None:
    chart = figure(report, "chart-stall-1")
    drawing = svgs(chart)[0]
    failures = [group for group in drawing.iter("g") if group.get("class") == "failure"]
    assert len(failures) == 1
    assert "holds values of step 25" in (failures[0].findtext("title") or "")
    assert [line.get("class") for line in failures[0].iter("line")] == ["cross", "cross"]
    for identity in ("chart-ledger-1", "chart-steps-1", "chart-roofline"):
        assert "ByteCheckpoint" not in figure(report, identity)
    row = re.search(r'<th scope="row">ByteCheckpoint</th>(.*?)</tr>', chart)
    assert row is not None
    assert not re.search(r"\d m?s<", row[1])


def test_an_engine_that_fails_its_truth_check_gets_no_time_whatever_its_status(tmp_path: Path) -> None:
    document: Any = stall_document()
    document["engines"][0]["truth"]["failures"] = ["tensor w differs after step 8"]
    text = figure(shown(tmp_path, document), "chart-stall-1")
    titles = [group.findtext("title") for group in svgs(text)[0].iter("g") if group.get("class") == "bar"]
    assert not [title for title in titles if title and title.startswith("snapstone")]
    assert "tensor w differs after step 8" in text


def test_engines_are_sorted_by_stall_and_absent_ones_are_listed(report: str) -> None:
    chart = figure(report, "chart-stall-1")
    names = [text.findtext("title") for text in svgs(chart)[0].iter("text") if text.get("class") == "name"]
    assert names == [
        "snapstone", "moonclip", "DCP, pinned memory", "DCP, asynchronous", "torch.save", "DCP, synchronous",
        "ByteCheckpoint",
    ]  # fmt: skip
    assert "Not installed here: Orbax (no module named &#x27;orbax&#x27;), torchsnapshot" in chart
    assert "DCP, synchronous: only part of it was measured: rank 2 died in pair 4" in chart
    assert "1 save skipped" in chart


def test_bars_begin_at_zero_and_are_as_long_as_their_values(tmp_path: Path) -> None:
    document: Any = stall_document()
    for engine, stall in zip(document["engines"], (0.1, 0.2, 0.4, 0.8, 1.6, 3.2), strict=False):
        engine["cadences"] = [{**engine["cadences"][0], "stall_seconds": [stall]}]
    drawing = svgs(figure(shown(tmp_path, document), "chart-stall-1"))[0]
    bars = [group.find("rect") for group in drawing.iter("g") if group.get("class") == "bar"]
    places = [(float(bar.get("x", "")), float(bar.get("width", ""))) for bar in bars if bar is not None]
    base = next(float(line.get("x1", "")) for line in drawing.iter("line") if line.get("class") == "base")
    assert {x for x, _ in places} == {base}
    for (_, shorter), (_, longer) in pairwise(places):
        assert longer == pytest.approx(2 * shorter, abs=0.2)


def test_a_part_of_the_ledger_below_zero_lies_left_of_the_line(tmp_path: Path) -> None:
    document: Any = stall_document()
    engine = document["engines"][0]
    engine["cadences"] = engine["cadences"][:1]
    engine["cadences"][0]["ledger"]["unexplained"] = [-0.02] * 5
    document["engines"] = [engine]
    drawing = svgs(figure(shown(tmp_path, document), "chart-ledger-1"))[0]
    base = next(float(line.get("x1", "")) for line in drawing.iter("line") if line.get("class") == "base")
    bar = next(group for group in drawing.iter("g") if group.get("class") == "bar")
    places = {r.get("class"): (float(r.get("x", "")), float(r.get("width", ""))) for r in bar.iter("rect")}
    x, width = places.pop("unexplained")
    assert x < base
    assert x + width <= base
    assert all(x >= base for x, _ in places.values())


def test_mixed_hardware_is_said_first_and_by_name(tmp_path: Path) -> None:
    other: Any = disk_document()
    other["environment"] = {**other["environment"], "hardware": {"cpu": "Xeon <8480>", "cores": 112}}
    results.write(other, tmp_path, "other")
    text = shown(tmp_path, stall_document())
    alert = text.partition('id="mixed-hardware"')[2].partition("</section>")[0]
    assert "must not be compared" in alert
    assert "processors: Xeon &lt;8480&gt; (disk-other.json); AMD EPYC 9B45 (stall-one.json)" in alert
    assert text.index('id="mixed-hardware"') < text.index("<figure")
    assert "measured on machines that differ" in text


def test_one_machine_gives_no_warning(report: str) -> None:
    assert 'id="mixed-hardware"' not in report
    assert 'role="alert"' not in report


def test_a_measurement_that_was_interrupted_says_so(tmp_path: Path) -> None:
    document: Any = load_document()
    document |= {"complete": False, "problems": ["interrupted after 2 of 4 strategies"]}
    text = shown(tmp_path, document)
    assert "load-one.json: not complete" in text
    assert "load-one.json: interrupted after 2 of 4 strategies" in text


def test_the_exact_command_is_shown_as_a_shell_takes_it(report: str) -> None:
    assert "<pre>snapstone bench stall --model &#x27;llama 1b&#x27;</pre>" in report


def test_of_many_ranks_the_slowest_are_drawn_and_all_are_in_the_table(tmp_path: Path) -> None:
    document: Any = stall_document(64)
    engine = document["engines"][0]
    for span in engine["timeline"]:
        if span["rank"] == 37 and span["stage"] == "commit":
            span["end"] = 5.0
    document["engines"] = [engine]
    chart = figure(shown(tmp_path, document), "chart-timeline-1-1")
    names = [text.text for text in svgs(chart)[0].iter("text") if text.get("class") == "name"]
    assert len(names) == 8
    assert "rank 37" in names
    assert "8 of 64 ranks are drawn" in chart
    assert {f'<th scope="row">{rank}</th>' in chart for rank in range(64)} == {True}


def test_a_step_that_is_cut_off_carries_its_time(tmp_path: Path) -> None:
    document: Any = stall_document()
    document["engines"][0]["steps"][4]["seconds"] = 20.0
    drawing = svgs(figure(shown(tmp_path, document), "chart-steps-1"))[0]
    assert "20.0 s" in [text.text for text in drawing.iter("text")]
    tops = [float(rect.get("y", "0")) for rect in drawing.iter("rect")]
    assert min(tops) >= 0


def test_an_empty_set_of_parts_makes_a_page_all_the_same(tmp_path: Path) -> None:
    document: Any = stall_document()
    document["engines"] = []
    assert 'id="chart-stall-1"' in shown(tmp_path, document)
    assert SCRIPT not in shown(tmp_path, document)


def test_the_roofline_draws_the_link_for_loads_that_read_once(tmp_path: Path) -> None:
    """2 GB came to each rank in 0.79 s, out of memory that gives 6.4 GB/s; nobody else's bytes take that way."""
    results.write(link_document(), tmp_path, "one")
    results.write(disk_document(), tmp_path, "one")
    chart = figure(shown(tmp_path, load_document()), "chart-roofline")
    texts = [text.text or "" for text in svgs(chart)[0].iter("text")]
    assert any(text.startswith("memory between ranks: 6.4") for text in texts)
    assert any(text.startswith("disk, reading: 3.1") for text in texts)
    rows = re.findall(r'<th scope="row">([^<]*)</th><td>([^<]*)</td>.*?</tr>', chart.replace("\n", ""))
    assert [what for _, what in rows].count("load scatter, to each rank") == 1
    share = re.search(r"load scatter, to each rank</td>.*?(\d+(\.\d+)?) % of the limit", chart, re.DOTALL)
    assert share is not None
    assert float(share[1]) == pytest.approx(100 * (2 / 0.79) / 6.4, rel=0.02)
    assert "load direct, to each rank" not in chart


def test_a_load_of_several_nodes_is_compared_with_the_network_that_was_measured_between_them(tmp_path: Path) -> None:
    load: Any = load_document()
    load["environment"] = {**load["environment"], "world": {"ranks": 4, "nodes": 2, "backend": "gloo"}}
    results.write(link_document(), tmp_path, "one-node")
    assert "scatter, to each rank" not in shown(tmp_path, load)  # nobody has measured that link
    results.write(link_document(nodes=2), tmp_path, "two-nodes")
    chart = figure(shown(tmp_path, load), "chart-roofline")
    assert any((text.text or "").startswith("between nodes: 1.6") for text in svgs(chart)[0].iter("text"))


def test_saves_from_devices_stand_under_the_copy_to_the_host(tmp_path: Path) -> None:
    link: Any = link_document()
    link["links"][-1] |= {"bytes_per_second": [50e9], "reason": None}
    results.write(link, tmp_path, "one")
    stall: Any = stall_document()
    assert "device to host" not in shown(tmp_path, stall)
    hardware = {**stall["environment"]["hardware"], "device": "cuda"}
    stall["environment"] = {**stall["environment"], "hardware": hardware}
    assert "device to host: 50" in figure(shown(tmp_path, stall), "chart-roofline")


def test_a_link_has_no_disk_that_could_differ(tmp_path: Path) -> None:
    results.write(link_document(), tmp_path, "one")
    results.write(disk_document(), tmp_path, "one")
    assert Measurements.read(tmp_path).mixtures() == []
