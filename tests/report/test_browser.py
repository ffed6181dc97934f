"""The report in a real browser: no error on its console, every chart drawn, and a phone's width is enough.

Pictures are left in the temporary directory of the test, and in $SNAPSTONE_SCREENSHOTS where that names one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from report.chromium import chromium_path
from report.hostile import write_hostile
from report.measured import CHARTS, write_results
from snapstone.report import Measurements, chart_files, markdown, page

pytestmark = [pytest.mark.needs_browser, pytest.mark.timeout(120)]

PHONE, DESK = 390, 1280

# Text outside its drawing, and text over other text of the same drawing, by more than rounding.
MISPLACED = """() => {
  const wrong = [];
  for (const svg of document.querySelectorAll('svg.chart')) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;
    const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim());
    const boxes = texts.map(t => t.getBoundingClientRect());
    boxes.forEach((box, i) => {
      const name = svg.getAttribute('aria-labelledby').split('-title')[0] + ': ' + texts[i].textContent.slice(0, 60);
      if (box.left < frame.left - 2 || box.right > frame.right + 2 || box.bottom > frame.bottom + 2)
        wrong.push('outside ' + name);
      for (let j = 0; j < i; j++) {
        const other = boxes[j];
        const x = Math.min(box.right, other.right) - Math.max(box.left, other.left);
        const y = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
        if (x > 2 && y > 5) wrong.push('over ' + texts[j].textContent.slice(0, 40) + ' in ' + name);
      }
    });
  }
  return wrong;
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Containers have no user namespaces for its sandbox, and a small /dev/shm.
        found = playwright.chromium.launch(
            executable_path=chromium_path(), args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield found
        found.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("pages")
    found = {}
    for name, write in (("measured", write_results), ("hostile", write_hostile)):
        found[name] = directory / f"{name}.html"
        found[name].write_text(page(Measurements.read(write(directory / name))), encoding="utf-8")
    return found


@pytest.mark.parametrize("width", [DESK, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["measured", "hostile"])
def test_the_report_is_drawn_whole(
    chromium: Any, files: dict[str, Path], tmp_path: Path, name: str, scheme: str, width: int
) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    opened = context.new_page()
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(files[name].as_uri())

    if name == "measured":
        for chart in CHARTS:
            drawing = opened.locator(f"#{chart} svg:visible")
            assert drawing.count() == 1, chart
            box = drawing.bounding_box()
            assert box["width"] > 300, chart
            assert box["height"] > 60, chart
    opened.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    if name == "measured":
        assert opened.evaluate(MISPLACED) == []
    opened.evaluate("document.querySelectorAll('details').forEach(one => { one.open = false })")

    directory = Path(os.environ.get("SNAPSTONE_SCREENSHOTS") or tmp_path)
    picture = directory / f"{name}-{scheme}-{width}.png"
    opened.screenshot(path=picture, full_page=name == "measured")
    assert picture.stat().st_size > 10_000
    background = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)")
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    context.close()


@pytest.mark.parametrize(("width", "name"), [(DESK, "stall.svg"), (PHONE, "stall-narrow.svg")])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_chart_of_a_readme_suits_the_screen(
    chromium: Any, tmp_path: Path, scheme: str, width: int, name: str
) -> None:
    """As <picture> in Markdown, which picks one of two files, and each file alone, where its text can be looked at."""
    measured = Measurements.read(write_results(tmp_path / "measured"))
    files = chart_files(measured, str(tmp_path / "stall.svg"))
    for path, text in files.items():
        Path(path).write_text(text, encoding="utf-8")
    picture = markdown(measured, "stall.svg").partition("</picture>")[0] + "</picture>"
    readme = tmp_path / "readme.html"
    readme.write_text(
        f'<meta name="viewport" content="width=device-width"><style>img{{max-width:100%}}</style>{picture}'
    )
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    opened = context.new_page()
    opened.goto(readme.as_uri())
    image = opened.locator("img")
    image.evaluate("image => image.decode()")
    assert image.evaluate("image => image.currentSrc").endswith(f"/{name}")
    shown, natural = image.evaluate("image => [image.clientWidth, image.naturalWidth]")
    assert 0.95 * natural <= shown <= natural, "text keeps its size"
    directory = Path(os.environ.get("SNAPSTONE_SCREENSHOTS") or tmp_path)
    opened.screenshot(path=directory / f"readme-{scheme}-{width}.png")

    opened.goto((tmp_path / name).as_uri())
    assert opened.evaluate(MISPLACED) == []
    background = opened.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)")
    context.close()


def test_contrast_of_text_is_enough(chromium: Any, files: dict[str, Path]) -> None:
    """4.5 to 1 against the background of the page, which WCAG asks of small text."""
    luminance = """name => {
      const channel = v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4 };
      const probe = document.body.appendChild(document.createElement('i'));
      probe.style.color = `var(--${name})`;
      const [r, g, b] = getComputedStyle(probe).color.match(/\\d+/g).map(Number).map(channel);
      probe.remove();
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    }"""
    for scheme in ("light", "dark"):
        context = chromium.new_context(color_scheme=scheme, bypass_csp=True)
        opened = context.new_page()
        opened.goto(files["measured"].as_uri())
        paper = opened.evaluate(luminance, "paper")
        for name, least in (
            ("ink", 4.5),
            ("muted", 4.5),
            ("bad", 4.5),
            ("link", 4.5),
            *((f"s{i}", 3.0) for i in range(7)),
        ):
            ink = opened.evaluate(luminance, name)
            ratio = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
            assert ratio >= least, (scheme, name, ratio)
        context.close()
