"""The verdict: ship or do not, by rules that hold at their bounds; what is printed ends with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import ADAPTERS, random_lora

from lrconvert import api
from lrconvert.cli import cli
from lrconvert.convert import compress as ranking
from lrconvert.convert.verdict import CLOSED, FEWEST, KEPT, Interval, Judged, LossBound, Scores, from_answers
from lrconvert.core.notices import Notice
from lrconvert.methods import base as methods
from lrconvert.report.compression import compression_json, compression_text

POINT = Interval(0.0, 0.0, 0.0)
SURE = Interval(CLOSED + 0.02, CLOSED, CLOSED + 0.03)
GOOD = Judged("KL", FEWEST, 900, POINT, POINT, SURE, SURE, SURE)


def accuracy(value: float, low: float, high: float) -> Scores:
    return Scores(POINT, POINT, POINT, Interval(value, low, high))


@pytest.mark.parametrize(
    ("change", "ship", "said"),
    [
        ({}, True, "closes 97.0%"),
        ({"texts": FEWEST - 1}, False, "more data"),
        ({"closed": Interval(CLOSED + 0.02, CLOSED - 0.001, 1.0)}, False, "too wide an interval"),
        ({"closed": Interval(CLOSED - 0.05, 0.8, CLOSED - 0.01)}, False, "95% is asked for"),
        ({"accuracy": accuracy(-0.02, -0.03, -0.001)}, False, "accuracy is lost"),
        ({"accuracy": accuracy(-0.02, -0.05, 0.01)}, True, "accuracy -2.0 points [-5.0, +1.0]"),
        ({"accuracy": accuracy(-0.005, -0.009, -0.001)}, True, "accuracy -0.5 points"),
    ],
)
def test_answers_decide(change: dict[str, Any], ship: bool, said: str) -> None:
    """The lower end of what is closed counts; a loss of accuracy does that is no chance and more than a point."""
    verdict = from_answers(replace(GOOD, **change), None, 50.0)
    assert verdict.ship is ship and said in f"{verdict.because}; {verdict.advice}"
    assert bool(verdict.advice) is not ship


@pytest.mark.parametrize(
    ("bound", "ship"),
    [
        (LossBound(0.04), True),
        (LossBound(0.02), False),
        (LossBound(0.04, 0.03), True),
        (LossBound(0.04, 0.01), False),
        (LossBound(accuracy=0.02), True),
    ],
)
def test_what_was_asked_for_decides(bound: LossBound, ship: bool) -> None:
    """On texts that chose nothing the mean is to be within the bound; the search has asked for the whole interval."""
    judged = replace(GOOD, accuracy=accuracy(-0.02, -0.04, 0.0))
    assert from_answers(judged, bound, 50.0).ship is ship
    assert not bound.is_met(judged, surely=True) or bound == LossBound(0.04)
    assert not LossBound(0.04, 0.02).is_met(GOOD, surely=False)  # no accuracy was measured


@pytest.mark.parametrize("ratio", [4.0, 15.0])
def test_without_answers_the_weights_decide(ratio: float) -> None:
    """Enough of the weights, of a form for which that was measured; and that no answer was measured is said."""
    lora = random_lora([(96, 64), (64, 96), (40, 72)], rank=6, seed=1)
    for form in ("lowrank", "sbora"):
        done = api.compress(lora, target_ratio=ratio, forms=[form])
        kept = done.nearest.fidelity.captured
        assert done.verdict.ship == (form == "lowrank" and kept >= KEPT)
        shown = compression_text("my-lora", "out/small.lrc", done)
        last = " ".join(shown[shown.index("\nverdict") :].split())
        begins = f"verdict {'ship' if done.verdict.ship else 'do not ship'} small.lrc: "
        assert last.startswith(begins) and last.endswith("Only weights were compared, no answers")
        assert done.verdict.ship or "; try " in last
        for fact in ("form      ", "bits", "size      ", "captured  ", "not tried ", "would add --base and --data"):
            assert fact in shown
        assert max(map(len, shown.splitlines())) <= 100
        facts = compression_json(done)
        assert facts["verdict"]["ship"] == done.verdict.ship and facts["not_tried"] and facts["judged"] is None
        json.dumps(facts, allow_nan=False)


def test_a_lora_that_changes_nothing_is_not_shipped() -> None:
    lora = random_lora([(96, 64)], rank=2, seed=1)
    pairs = tuple(replace(pair, scale=0.0) for pair in lora.targets)
    done = api.compress(replace(lora, targets=pairs), target_size=2000, forms=["lowrank"])
    assert not done.verdict.ship and "is zero" in done.verdict.because


def test_what_does_not_fit_into_the_time_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what fits take, not by a clock: the same adapter has the same forms tried. Forms that are named are tried."""
    lora = random_lora([(96, 64), (64, 96)], rank=4, seed=1)
    monkeypatch.setattr(ranking, "_MINUTES", lora.numel / 1e6 * 0.3 / 60)  # all but VB-LoRA fit into it
    done = api.compress(lora, target_size=2000)
    assert (
        "vblora" not in {c.method for c in done.candidates} and len(done.candidates) == len(methods.module_names()) - 1
    )
    assert [line.partition(" ")[0] for line in done.left_out] == ["vblora"]
    assert "vblora (about" in compression_text("x", "y", done)
    assert not api.compress(lora, target_size=2000, forms=["vblora"]).left_out
    rushed = api.compress(lora, target_size=2000, budget_minutes=1e-9)
    assert [c.method for c in rushed.candidates] == ["lowrank"] and len(rushed.left_out) == 4


def test_long_fits_begin_with_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a line of its own; and forms that take longer are more of the progress."""
    lora, heard = random_lora([(96, 64), (64, 96)], rank=4, seed=1), list[tuple[float, str]]()
    monkeypatch.setattr(ranking, "_WORTH_SAYING", 0.0)
    forms = ["lowrank", "bone"]
    api.compress(lora, target_size=2000, forms=forms, progress=lambda share, text: heard.append((share, text)))
    assert isinstance(heard[0][1], Notice) and heard[0][1].startswith("2 forms are fitted, about ")
    shares = [max(share for share, text in heard if text.startswith(form)) for form in forms]
    costs = [methods.get(form).fit_seconds for form in forms]
    assert shares[0] <= 0.8 * costs[0] / sum(costs) + 1e-9 < shares[1] <= 0.8 + 1e-9
    heard.clear()
    monkeypatch.setattr(ranking, "_WORTH_SAYING", 10.0)
    api.compress(lora, target_size=2000, forms=forms, progress=lambda share, text: heard.append((share, text)))
    assert not any(isinstance(text, Notice) for _, text in heard)


def test_the_command_ends_with_the_verdict(tmp_path: Path) -> None:
    words = [
        "compress",
        ADAPTERS / "llama-plain",
        "-o",
        tmp_path / "x.lrc",
        "--target-ratio",
        10,
        "--methods",
        "lowrank",
    ]
    shown = CliRunner().invoke(cli, [*map(str, words)], catch_exceptions=False).output
    assert " ".join(shown.split("\n\n")[-1].split()).startswith(
        "verdict ship x.lrc: 10 times smaller, because it keeps 8"
    )
    told = CliRunner().invoke(cli, [*map(str, words), "--overwrite", "--json"], catch_exceptions=False).output
    assert json.loads(told)["verdict"]["ship"] is True
