"""The HTML page of a comparison: everything is on it, nothing outside is, and strangers' names are inert."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from typing import Any

import click
import pytest
from click.testing import CliRunner
from conftest import ADAPTERS, random_lora
from hypothesis import given, settings
from hypothesis import strategies as st
from test_input_statistics import statistics_for

from lrconvert import api
from lrconvert.cli import cli
from lrconvert.core.errors import DataError
from lrconvert.formats.fidelity import Answers, Fidelity, TargetFidelity
from lrconvert.report.html import About, Adapter, Curve, fleet_page, labels, page, read_curves

LORA = random_lora([(96, 64), (64, 96), (40, 72)], rank=6, seed=1)


@cache
def compared(statistics: bool = True) -> list[tuple[str, Fidelity]]:
    requests: dict[str, dict[str, Any]] = {"small.lrc": {"rank": 1}, "large.lrc": {"rank": 4, "bits": 4}}
    files = [api.convert(LORA, "lowrank", **options).compact for options in requests.values()]
    rows = api.compare(LORA, files, statistics=statistics_for(LORA) if statistics else None)
    answers = Answers("KL", 2000, 0.25, 2.0, 0.8125, 0.125)
    return [(name, replace(row, answers=answers)) for name, row in zip(requests, rows, strict=True)]


def large(targets: int, files: int) -> list[tuple[str, Fidelity]]:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rows = tuple(
        TargetFidelity(f"model.layers.{n // 7}.{kinds[n % 7]}.weight", 16, n % 9, 2.0, 0.01 * (n % 50))
        for n in range(targets)
    )
    return [(f"{n}.lrc", Fidelity(rows, "nola", 10**7, 10**5 * (n + 1), 3000, 0)) for n in range(files)]


class Looker(HTMLParser):
    """Tags, attributes, and the text that a reader sees."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.seen = ""
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_data(self, data):
        self.seen += data


def check(document: str) -> Looker:
    """What holds of every page: well-formed, self-contained, inert but for the one script that its policy names."""
    ET.fromstring(re.sub(r"^<!doctype html>", "", document.strip(), flags=re.IGNORECASE))
    looker = Looker(document)
    assert not {"link", "iframe", "img", "object", "embed", "base", "form"} & set(looker.tags)
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", document, re.DOTALL)
    assert len(scripts) == looker.tags.count("script") <= 1
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert "default-src 'none'; style-src 'unsafe-inline'" in document.replace("&#39;", "'")
        assert f"script-src 'sha256-{digest}'" in document.replace("&#39;", "'")
        assert not any(word in script for word in ("fetch", "XMLHttp", "import", "innerHTML", "eval"))
    for key, value in looker.attributes:
        assert not key.startswith("on") and key not in ("href", "src", "action", "srcset"), (key, value)
    styles = "".join(re.findall(r"<style>(.*?)</style>", document, re.DOTALL))
    assert "url(" not in styles and "@import" not in styles and "http" not in document.replace("http-equiv", "")
    assert looker.tags.count("h1") == 1 and "title" in looker.tags
    assert all(c == "\n" or c.isprintable() for c in document)
    return looker


def test_everything_is_on_it():
    files = compared()
    document = page("A comparison", "my-adapter", files)
    seen = check(document).seen
    assert "A comparison" in seen and "my-adapter" in seen
    for name, f in files:
        assert name in seen and f"{f.payload_bytes:,}" in seen and f"{f.overhead_bytes:,}" in seen
        for value in (f.captured, f.output_captured, *(t.captured for t in f.targets)):
            assert f"{100 * value:.2f}" in seen or f"{100 * value:.1f}" in seen, value
        for t in f.targets:
            assert t.name in seen
    assert "87.5" in seen and "81.2" in seen and "2,000" in seen  # closed, agreement, items
    assert "Do not ship yet" in seen  # the verdict: 87.5 % closed is not enough
    assert page("A comparison", "my-adapter", files) == document


@pytest.mark.parametrize("statistics", (True, False))
def test_parts_may_be_missing(statistics):
    files = [(name, replace(f, answers=None)) for name, f in compared(statistics)]
    check(page("t", "s", files))
    check(page("t", "s", files[:1]))
    lone = replace(files[0][1], targets=(replace(files[0][1].targets[0], name="head"),))
    check(page("t", "s", [("x", lone)]))
    nothing = replace(lone, targets=(replace(lone.targets[0], energy=0.0, error=0.0),))
    check(page("t", "s", [("x", nothing)]))
    worse = replace(lone, targets=(replace(lone.targets[0], energy=1.0, error=3.0),))
    assert "-200" in check(page("t", "s", [("x", worse)])).seen.replace("\u2212", "-")


HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=y>",
    "a\x1b[31m\x00b",
    "\u202egnp.lrc",
    "&amp;",
    "]]>",
    "x" * 5000,
)


@pytest.mark.parametrize("bad", HOSTILE)
def test_names_of_strangers_are_inert(bad):
    name, f = compared()[0]
    targets = (replace(f.targets[0], name=bad), *f.targets[1:])
    check(page(bad, bad, [(bad, replace(f, targets=targets, method=bad)), (name, f)]))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(max_size=30), min_size=3, max_size=3), st.text(max_size=30))
def test_any_names(names, title):
    f = compared()[0][1]
    targets = tuple(replace(t, name=n) for t, n in zip(f.targets, names, strict=True))
    check(page(title, title, [(title, replace(f, targets=targets))]))


def test_it_stays_small():
    assert len(page("t", "s", large(224, 4)).encode()) < 1_000_000
    check(page("t", "s", large(1000, 2)))


def test_the_command(tmp_path):
    out, file = tmp_path / "report.html", tmp_path / "x.lrc"
    source = str(ADAPTERS / "llama-plain")

    def run(*words):
        return CliRunner().invoke(cli, [str(w) for w in words], standalone_mode=False)

    assert run("lora-to-lowrank", source, "-o", file, "--rank", 1).exception is None
    done = run("compare", source, file, "--html", out)
    assert done.exception is None and "captured" in done.output
    seen = check(out.read_text(encoding="utf-8")).seen
    assert "x.lrc" in seen and str(tmp_path) not in out.read_text(encoding="utf-8")
    assert run("compare", source, file, "--html", out).exception.code == "E-OUT-EXISTS"
    assert run("compare", source, file, "--html", out, "--overwrite").exception is None
    assert run("compare", source, file, "--html", file, "--overwrite").exception.code == "E-OUT-PATH"


# --- verdict --------------------------------------------------------------------------------------------------------


def answered(closed: float, nbytes: int, half: float | None = 0.02, refined: bool = False) -> Fidelity:
    """A file of `nbytes` that closes so much, with an interval of this half width."""
    interval = None if half is None else (closed - half, closed + half)
    answers = Answers("KL", 900, 1 - closed, 1.0, 0.9, 0.3, interval)
    rows = tuple(TargetFidelity(f"model.layers.{n}.q_proj.weight", 8, 1 + n % 3, 1.0, 0.4) for n in range(4))
    return Fidelity(rows, "lowrank", 10**6, nbytes - 100, 100, 0, answers, is_refined=refined)


def verdict_of(*files: tuple[str, Fidelity]) -> str:
    document = page("t", "s", files)
    return re.sub(r"<[^>]*>", "", document.split('aria-label="Verdict">')[1].split("</section>")[0]).strip()


def test_the_verdict_is_the_smallest_file_that_is_surely_good_enough():
    good, better, unsure = answered(0.975, 9000), answered(0.999, 20000), answered(0.96, 5000)
    said = verdict_of(("better", better), ("good", good), ("unsure", unsure))
    assert said.startswith("Ship good") and "97.5 % (95.5 % to 99.5 %)" in said and "111 times smaller" in said
    said = verdict_of(("fit", good), ("refined", answered(0.999, 9003, refined=True)))
    assert said.startswith("Ship refined")  # three bytes are no reason to take the worse
    said = verdict_of(("unsure", unsure), ("bad", answered(0.4, 4000)))
    assert said.startswith("Do not ship") and "unsure" in said and "lrconvert refine" in said
    said = verdict_of(("refined", answered(0.6, 4000, refined=True)))
    assert said.startswith("Do not ship") and "more steps" in said and "--target-ratio" in said


def test_the_verdict_says_that_answers_were_not_measured():
    said = verdict_of(*[(name, replace(f, answers=None)) for name, f in compared()])
    assert "Answers were not measured" in said and "--base with --data" in said


# --- plots ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 400), st.floats(0, 200), st.text("abcW.é漢", max_size=24)), max_size=24),
)
def test_no_label_covers_another_or_a_mark(points):
    area = labels.Box(0, 0, 400, 200)
    made = labels.placed(points, area, 6)
    boxes = [label.box for label in made if label is not None]
    marks = [labels.Box(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    assert all(box.is_inside(area) for box in boxes)
    assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[:n])
    assert not any(box.overlaps(mark) for box in boxes for mark in marks)
    if len(points) == 1 and points[0][2]:
        assert boxes  # a lone mark has its name


def texts_of(document: str) -> list[list[labels.Box]]:
    """The boxes of the texts of each plot, by their places and the widths of letters that are as wide as each other."""
    root = ET.fromstring(re.sub(r"^<!doctype html>", "", document.strip()))
    plots = []
    for svg in root.iter("svg"):
        boxes = []
        for text in svg.iter("text"):
            width = labels.text_width(text.text or "")
            shift = {"end": width, "middle": width / 2}.get(text.get("text-anchor", ""), 0.0)
            boxes.append(labels.boxed(text.text or "", float(text.get("x")) - shift, float(text.get("y"))))
        plots.append(boxes)
    return plots


def crowded() -> str:
    """A page with all of its plots, the marks of which lie close together."""
    files = [(f"a-file-with-a-long-name-{n}.lrc", answered(0.9 + n / 200, 9000 + 3 * n)) for n in range(7)]
    names = [f"model.layers.{n}.{kind}.weight" for n in range(4) for kind in ("q_proj", "down_proj", "up_proj")]
    spectra = tuple((name, (3.0, 2.0, 1.0, 0.5)) for name in names)
    curves = tuple(Curve(f"run-{n}", ((0, 0.2), (10, 0.8 + n / 100))) for n in range(6))
    return page("t", "s", files, About(spectra=spectra, curves=curves))


def test_the_texts_of_no_plot_overlap():
    plots = texts_of(crowded())
    assert sum(map(len, plots)) > 60
    for boxes in [*plots, *texts_of(fleet_page("t", fleet()))]:
        for n, one in enumerate(boxes):
            assert not any(one.overlaps(other) for other in boxes[:n])


def test_where_the_numbers_come_from():
    about = About(
        base="org/base", data=("held-out.jsonl",), dates=("2026-01-02", "2026-01-03"), versions="lrconvert 1",
        command="lrconvert compare a b", spectra=(("h.0.q.weight", (2.0, 1.0)),), curves=(Curve("run", ((0, 0.1),)),),
    )  # fmt: skip
    seen = check(page("t", "s", compared(), about)).seen
    for text in (
        "org/base",
        "held-out.jsonl",
        "2026-01-02",
        "lrconvert 1",
        "lrconvert compare a b",
        "run: 10.0 % at 0",
    ):
        assert text in seen, text


def test_logs_of_refinements(tmp_path):
    log = tmp_path / "mine.jsonl"
    run = [
        {"event": "start", "base": 2.0, "before": 1.0, "items": 9, "settings": {}},
        {"event": "step", "step": 1, "loss": 1.0},
        {"event": "held-out", "step": 5, "distance": 0.5, "closed": 0.75},
    ]
    log.write_text("".join(f"{json.dumps(event)}\n" for event in run) + '{"event": "held')
    assert read_curves(log) == [Curve("mine", ((0, 0.5), (5, 0.75)))]
    log.write_text("".join(f"{json.dumps(event)}\n" for event in run + run))
    assert [curve.name for curve in read_curves(log)] == ["mine 1", "mine 2"]
    log.write_text("no log\n")
    with pytest.raises(DataError, match="is no log of a refinement"):
        read_curves(log)


# --- fleets ---------------------------------------------------------------------------------------------------------


def fleet() -> list[Adapter]:
    good = [Adapter(f"user-{n}", "done", "nola", 100 + n, 50.0, 0.5 + n / 200, dropped=n % 2) for n in range(90)]
    return [*good, Adapter("bad", "failed", failure="E-MISSING: bad: no weights")]


def test_a_fleet_is_told_worst_first():
    document = fleet_page("91 adapters", fleet(), "lrconvert compress all -o out")
    seen = check(document).seen
    for text in ("91 adapters", "1 failed", "E-MISSING: bad: no weights", "user-0", "lrconvert compress all -o out"):
        assert text in seen, text
    rows = re.findall(r"<bdi>(user-\d+)</bdi></th>", document)
    assert rows == [f"user-{n}" for n in range(90)]
    assert check(fleet_page("none", [])) and check(fleet_page("t", [Adapter("x", failure="no")]))


@pytest.mark.parametrize("bad", HOSTILE)
def test_names_in_a_fleet_are_inert(bad):
    check(fleet_page(bad, [Adapter(bad, method=bad, captured=0.5), Adapter(bad, failure=bad)], bad, bad))


def test_a_large_fleet_is_cut_where_a_browser_would_choke():
    rows = [Adapter(f"user-{n}", "done", "nola", 100, 50.0, n / 6000) for n in range(6000)]
    document = fleet_page("t", rows)
    assert len(document) < 3_000_000 and "The best 1,000 are left out" in document


def test_a_fleet_from_the_command_line(tmp_path):
    """A batch writes the page, and so does the comparison of its folder with that of the adapters."""
    many, out = tmp_path / "many", tmp_path / "out"
    for name in ("one", "two"):
        shutil.copytree(ADAPTERS / "llama-plain", many / name)

    def run(*words):
        return CliRunner().invoke(cli, [str(w) for w in words], standalone_mode=False)

    done = run("lora-to-lowrank", many, "-o", out, "--rank", 1, "-j", 1, "--html", tmp_path / "made.html")
    assert done.exception is None
    assert "2 adapters" in check((tmp_path / "made.html").read_text(encoding="utf-8")).seen
    (out / "two.lrc").unlink()
    done = run("compare", many, out, "--html", tmp_path / "kept.html", "--json")
    assert done.exit_code == 1 or isinstance(done.exception, click.exceptions.Exit) or done.return_value == 1
    one, two = json.loads(done.output)["adapters"]
    assert one["method"] == "lowrank" and 0 < one["captured"] < 1 and "there is no two.lrc" in two["failure"]
    seen = check((tmp_path / "kept.html").read_text(encoding="utf-8")).seen
    assert "1 failed" in seen and "there is no two.lrc" in seen
    assert isinstance(
        run("lora-to-lowrank", many / "one", "-o", tmp_path / "x.lrc", "--html", out).exception, click.UsageError
    )
