"""What a file does not keep is said: modules that were dropped, and what it means that little is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from html import unescape
from typing import Any

import numpy as np
import pytest
from conftest import ADAPTERS

from lrconvert import api
from lrconvert.core.dtypes import Stored
from lrconvert.formats.fidelity import fidelity
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.methods import base as methods
from lrconvert.report import html
from lrconvert.report.comparison import comparison_text, fidelity_json
from lrconvert.report.conversion import conversion_json, conversion_text


@pytest.fixture(scope="module")
def lora() -> LoraAdapter:
    return api.load_lora(ADAPTERS / "llama-plain")


@pytest.mark.parametrize("method", methods.module_names())
def test_every_converter_says_what_it_dropped(method: str, lora: LoraAdapter) -> None:
    """Whatever the form: modules of which nothing is left are counted, a low share is explained, in every report."""
    done = api.convert(lora, method, target_ratio=12)
    silent = replace(done.compact, tensors={name: np.zeros_like(a) for name, a in done.compact.tensors.items()})
    for compact, conversion in ((done.compact, done), (silent, None)):
        kept = fidelity(lora, compact) if conversion is None else conversion.fidelity
        assert kept is not None
        zero = [t.name for t, a, b in methods.expand_all(compact) if not (b @ a).any()]
        assert sorted(kept.dropped) == sorted(zero)
        dropped = [line for line in kept.notes if "modules are dropped" in line]
        assert bool(dropped) == bool(zero) and all(line.startswith(f"{len(zero)} of 14 ") for line in dropped)
        assert any("lrconvert.refine" in line for line in kept.notes) == (kept.captured < 0.5)
        shown = " ".join(comparison_text([("x.lrc", kept)], False).split())  # lines are wrapped
        page, facts = html.page("t", "s", [("x.lrc", kept)]), fidelity_json(kept)
        assert facts["dropped"] == list(kept.dropped) and facts["notes"] == list(kept.notes)
        assert all(note in shown and note in unescape(page) for note in kept.notes)
        assert page.count("<h2>Notes</h2>") == bool(kept.notes)
    assert len(fidelity(lora, silent).dropped) == 14
    assert conversion_json(done)["notes"] == list(done.notes)
    assert all(note in conversion_text("a", "b", done, False) for note in done.notes)


def test_the_worst_is_the_worst_of_what_is_kept(lora: LoraAdapter) -> None:
    done = api.convert(lora, "lowrank", target_size=3000)
    assert done.dropped and done.fidelity is not None
    text = conversion_text("a", "b", done, False)
    worst = min(t.captured for t in done.fidelity.targets if not t.is_dropped)  # type: ignore[type-var]
    assert f"worst     {worst:.4f}" in text and f"{len(done.dropped)} of 14 modules are dropped" in text
    planned = api.convert(lora, "lowrank", target_size=3000, dry_run=True)
    assert planned.dropped == done.dropped and planned.notes


def test_a_refined_file_is_not_told_to_be_refined(lora: LoraAdapter) -> None:
    compact = api.convert(lora, "bone", target_ratio=12).compact
    assert any("lrconvert.refine" in note for note in fidelity(lora, compact).notes)
    fields = {**compact.provenance.fields, "refined_steps": "12"}
    refined = replace(compact, provenance=replace(compact.provenance, fields=fields))
    assert not any("lrconvert.refine" in note for note in fidelity(lora, refined).notes)


def scaled(lora: LoraAdapter, scale: float) -> LoraAdapter:
    return replace(lora, targets=tuple(replace(pair, scale=scale) for pair in lora.targets))


def filled(lora: LoraAdapter, a: float, b: float) -> LoraAdapter:
    def full(stored: Stored, value: float) -> Stored:
        return Stored("F32", np.full(stored.shape, value, np.float32))

    return replace(lora, targets=tuple(replace(p, a=full(p.a, a), b=full(p.b, b)) for p in lora.targets))


def test_of_nothing_nothing_is_kept(lora: LoraAdapter) -> None:
    """A LoRA that changes nothing has no share to keep: none of a target, 0 of all, and it is said."""
    done = api.convert(scaled(lora, 0.0), "lowrank", target_ratio=4)
    assert done.fidelity is not None and done.fidelity.captured == 0 and not done.dropped
    assert all(t.captured is None for t in done.fidelity.targets)
    assert any("update is zero" in note for note in done.notes)
    json.dumps(conversion_json(done), allow_nan=False)
    assert "worst" not in conversion_text("a", "b", done, False)
    html.page("t", "s", [("x", done.fidelity)])


EDGES: dict[str, Any] = {
    "tiny scale": lambda lora: scaled(lora, 1e-300),
    "huge scale": lambda lora: scaled(lora, 1e300),
    "huge negative scale": lambda lora: scaled(lora, -1e308),
    "smallest scale": lambda lora: scaled(lora, 5e-324),
    "scale of 1e37": lambda lora: scaled(lora, 1e37),
    "denormal factors": lambda lora: filled(lora, 1e-45, 1e-45),
    "factors of 3e38": lambda lora: filled(lora, 3e38, 3e38),
    "factors of 1e30 and 1e-30": lambda lora: filled(lora, 1e30, 1e-30),
}


@pytest.mark.medium
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("method", methods.module_names())
def test_numbers_at_the_edge(method: str, edge: str, lora: LoraAdapter) -> None:
    """One of our errors, or figures that are true: a share that is what the file's own numbers keep."""
    few = replace(lora, targets=lora.targets[:3])
    source = EDGES[edge](few)
    try:
        done = api.convert(source, method, target_ratio=4)
    except api.LrcError as error:
        assert error.code in ("E-VALUE", "E-BUDGET")
        return
    assert done.fidelity is not None and np.isfinite(done.fidelity.captured)
    zero = {t.name for t, a, b in methods.expand_all(done.compact) if not (b @ a).any()}
    assert zero <= set(done.dropped)
    if len(zero) == len(few.targets):
        assert done.fidelity.captured == 0 and done.notes
    else:
        assert "tiny" not in edge
