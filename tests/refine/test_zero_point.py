"""The zero point of every measurement: the base with the heads that both sides carry, and without updates.

An adapter that carries a trained head and does nothing else is worth nothing: a head that is already there closes no
distance.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conftest import ADAPTERS, BASES
from models import bert_classifier, held_out, token_batches

from lrconvert import api
from lrconvert.convert import ablation
from lrconvert.live import load_model, zero_point
from lrconvert.lora.adapter import CompactAdapter, ExtraTensor, LoraAdapter
from lrconvert.report import html
from lrconvert.report.comparison import comparison_text, fidelity_json

pytestmark = pytest.mark.medium


def without_updates(compact: CompactAdapter) -> CompactAdapter:
    return replace(compact, tensors={name: np.zeros_like(array) for name, array in compact.tensors.items()})


def with_rows() -> tuple[LoraAdapter, Any, list[dict[str, Any]]]:
    """A decoder's LoRA with trained tokens."""
    lora, model = api.load_lora(ADAPTERS / "llama-plain"), cast(Any, load_model.load_model(BASES / "tiny-llama"))
    values = np.random.default_rng(0).standard_normal((3, model.config.hidden_size)).astype("<f4")
    name = "model.embed_tokens.weight"
    extras = (
        ExtraTensor(name, "I64", (3,), np.array([2, 5, 9], "<i8").tobytes(), "row_indices"),
        ExtraTensor(name, "F32", values.shape, values.tobytes(), "rows"),
    )
    return replace(lora, extras=extras), model.float(), token_batches(8, 6, 9)


def install(model: Any, lora: LoraAdapter) -> None:
    """Put heads and rows into the model itself, by hand."""
    parameters = dict(model.named_parameters())
    rows = {e.name: np.frombuffer(e.data, "<i8").copy() for e in lora.extras if e.use == "row_indices"}
    with torch.no_grad():
        for extra in lora.extras:
            if extra.use == "row_indices":
                continue
            value = torch.from_numpy(np.frombuffer(extra.data, "<f4").reshape(extra.shape).copy())
            if extra.use == "rows":
                parameters[extra.name][rows[extra.name]] = value
            else:
                parameters[extra.name].copy_(value)


def distance(model: Any, lora: LoraAdapter, batches: Any) -> float:
    """KL of the model with only the heads of `lora` from it with all of `lora`, by plain formulas."""
    api.attach(model, lora)
    goal = _logs(model, batches)
    api.detach(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    install(model, lora)
    near = _logs(model, batches)
    model.load_state_dict(before)
    return float((goal.exp() * (goal - near)).sum(-1).mean())


def _logs(model: Any, batches: Any) -> Any:
    with torch.no_grad():
        logits = [model(**batch).logits for batch in batches]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in logits]).double().log_softmax(-1)


@pytest.fixture(params=["head", "rows"])
def case(request: Any) -> Any:
    return bert_classifier() if request.param == "head" else with_rows()


def test_an_update_of_nothing_closes_nothing(case: Any) -> None:
    """`compare` and `refine`: 0, of the distance between the head alone and the LoRA with it."""
    lora, model, batches = case
    compact = without_updates(api.convert(lora, "lowrank", rank=1).compact)
    (row,) = api.compare(lora, [compact], base=model, data=batches)
    assert row.answers is not None and row.answers.closed == pytest.approx(0, abs=1e-6) and not row.warnings
    assert row.answers.agreement == row.answers.base_agreement
    assert row.answers.base_distance == pytest.approx(distance(model, lora, batches), rel=1e-4)
    done = api.refine(compact, lora, model, batches, end_to_end=False, layerwise=True)
    assert done.before.closed == pytest.approx(0, abs=1e-6)
    kind = "encoder" if "attention_mask" in batches[0] and hasattr(model, "classifier") else "decoder"
    held = held_out(batches, kind)
    assert done.before.base_distance == pytest.approx(distance(model, lora, held), rel=1e-4)


def test_training_of_ranks_and_ablation(case: Any) -> None:
    lora, model, batches = case
    options: dict[str, Any] = {"rounds": 1, "exact": 1, "retrain": {"steps": 2, "eval_every": 1}}
    done: Any = api.allocate(
        lora, base=model, data=batches, total_rank=4, include=["layer[.s]*0?.*(query|q_proj)"], **options
    )
    kind = "encoder" if hasattr(model, "classifier") else "decoder"
    held = held_out(batches, kind)
    assert done.training.before.base_distance == pytest.approx(distance(model, lora, held), rel=1e-4)
    components = sum(pair.rank for pair in lora.targets)
    with ablation.on_trial(model, lora, batches) as trial:
        closed, items = trial.score(np.zeros(components, bool)), trial.items
    install(model, lora)
    with ablation.on_trial(model, replace(lora, extras=()), batches) as trial:
        assert trial.items == items
        if kind == "decoder":  # an encoder's answers without labels are those of the LoRA, which has lost its head
            assert trial.score(np.zeros(components, bool)) == pytest.approx(closed, rel=1e-5)


def test_compress_ranks_from_the_same_zero_point(tmp_path: Path) -> None:
    lora, model, _ = bert_classifier()
    model.save_pretrained(tmp_path / "base")
    load_model.load_tokenizer(BASES / "tiny-bert").save_pretrained(tmp_path / "base")
    texts = [{"text": "a word " * (n % 5 + 1) + str(n)} for n in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    done = api.compress(
        lora, base=tmp_path / "base", data=(tmp_path / "texts.jsonl",), forms=("lowrank",), target_size=4000
    )
    before = next(c.before for c in done.candidates if c.before is not None)
    compact = without_updates(done.chosen.compact)
    measured = api.refine(
        compact, lora, tmp_path / "base", tmp_path / "texts.jsonl", end_to_end=False, batch_tokens=1024
    ).before
    assert measured.closed == pytest.approx(0, abs=1e-6)
    assert before.base_distance == pytest.approx(measured.base_distance, rel=1e-5)


def test_sides_that_differ_are_named() -> None:
    """A file without the head, with another or with a narrower one: the first two are said, the last is the same."""
    lora, model, batches = bert_classifier()
    whole = api.convert(lora, "lowrank", rank=1).compact
    bare = replace(whole, extras=())
    other = replace(whole, extras=tuple(replace(e, data=bytes(len(e.data))) for e in whole.extras))
    narrow = api.convert(lora, "lowrank", rank=1, extra_dtype="BF16").compact
    rows = api.compare(lora, [whole, bare, other, narrow], base=model, data=batches)
    assert [bool(row.warnings) for row in rows] == [False, True, True, False]
    assert "'classifier.bias', 'classifier.weight', which the file lacks" in rows[1].warnings[0]
    assert "other values than the LoRA's" in rows[2].warnings[0]
    assert rows[0].answers.base_distance == rows[3].answers.base_distance  # type: ignore[union-attr]
    assert rows[1].answers.base_distance != rows[0].answers.base_distance  # type: ignore[union-attr]
    (backwards,) = zero_point.differences(replace(lora, extras=()), whole)
    assert "which the LoRA lacks" in backwards
    named = [(f"{n}.lrc", row) for n, row in enumerate(rows)]
    assert comparison_text(named, False).count("(no update)") == 3
    assert fidelity_json(rows[1])["warnings"] == list(rows[1].warnings)
    assert "which the file lacks" in html.page("x", "y", named)


def test_a_head_without_updates_is_no_gain_to_learn() -> None:
    lora, model, batches = bert_classifier()
    still = replace(lora, targets=tuple(replace(pair, scale=0.0) for pair in lora.targets))
    compact = api.convert(lora, "lowrank", rank=1).compact
    with pytest.raises(api.LrcError, match="change no answer"):
        api.refine(compact, still, model, batches, end_to_end=False)
