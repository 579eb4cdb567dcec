"""The pages in a real browser: nothing in the console, no request, no text over another, and the table sorts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from html_browser import CHROMIUM, Browser, browser
from test_html import crowded, fleet

from lrconvert.report.html import fleet_page

pytestmark = [
    pytest.mark.medium,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH"),
]

# Pairs of texts of one plot whose boxes, as the browser draws them, have more than a pixel in common.
OVERLAPS = """[...document.querySelectorAll("svg")].flatMap((svg) => {
  const boxes = [...svg.querySelectorAll("text")].map((t) => [t.textContent, t.getBBox()]);
  return boxes.flatMap(([name, a], n) => boxes.slice(0, n).filter(([, b]) =>
    Math.min(a.x + a.width, b.x + b.width) - Math.max(a.x, b.x) > 1 &&
    Math.min(a.y + a.height, b.y + b.height) - Math.max(a.y, b.y) > 3).map(([other]) => `${name} / ${other}`));
})"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("pages")
    written = {"comparison": crowded(), "fleet": fleet_page("91 adapters", fleet(), "lrconvert compress")}
    for name, text in written.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in written}


@pytest.mark.parametrize("width", (1280, 360))
@pytest.mark.parametrize("dark", (False, True))
@pytest.mark.parametrize("name", ("comparison", "fleet"))
def test_a_page_asks_for_nothing_and_complains_of_nothing(tab, pages, name, dark, width):
    tab.show(pages[name], width, dark)
    assert tab.value(OVERLAPS) == []
    assert tab.value("document.documentElement.scrollWidth") <= width  # what is wider scrolls by itself
    red, green, blue = tab.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(red, green, blue) < 60) == dark
    assert tab.requests == [] and tab.complaints == []


def test_a_page_on_paper_is_light_and_shows_every_target(tab, pages):
    tab.show(pages["comparison"], dark=True, media="print")
    assert tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.value("document.querySelector('details table').getBoundingClientRect().height") > 0


def test_the_table_of_a_fleet_sorts(tab, pages):
    tab.show(pages["fleet"])
    first = "document.querySelector('.sorted tbody th').textContent"
    heads = [tab.value(f"document.querySelectorAll('.sorted button')[{n}].textContent") for n in range(6)]
    assert tab.value(first) == "user-0"
    for column, expected in (("bytes", ("user-0", "user-89")), ("adapter", ("user-0", "user-9"))):
        for name in expected:
            tab.value(f"document.querySelectorAll('.sorted button')[{heads.index(column)}].click()")
            assert tab.value(first) == name
    assert tab.complaints == []
