"""The HTML page of a comparison: everything is on it, nothing outside is, and strangers' names are inert."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import ADAPTERS, random_lora
from hypothesis import given, settings
from hypothesis import strategies as st
from test_input_statistics import statistics_for

from lrconvert import api
from lrconvert.cli import cli
from lrconvert.formats.fidelity import Answers, Fidelity, TargetFidelity
from lrconvert.report.html import page

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
    """What holds of every page: well-formed, self-contained, inert."""
    ET.fromstring(re.sub(r"^<!doctype html>", "", document.strip(), flags=re.IGNORECASE))
    looker = Looker(document)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form"} & set(looker.tags)
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
