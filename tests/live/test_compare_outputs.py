"""What adapters do to a model's outputs, beside the plain formulas."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from conftest import ADAPTERS, BASES, dense, random_lora
from models import auto, renamed
from test_attach import snapshot
from test_statistics import inputs_of, padded

from lrconvert import api
from lrconvert.core.errors import OptionError
from lrconvert.live import attach
from lrconvert.methods import base as methods
from lrconvert.report.comparison import comparison_text

LLAMA = BASES / "tiny-llama"


def logits(model: Any, batches: list[dict[str, Any]]) -> Any:
    with torch.no_grad():
        rows = [model(**b).logits[b["attention_mask"].bool()] for b in batches]
    return torch.cat(rows).double().log_softmax(-1)


def test_answers_and_layers() -> None:
    model = auto("CausalLM").from_pretrained(LLAMA).eval()
    lora = api.load_lora(ADAPTERS / "llama-plain")
    students = [api.convert(lora, "lowrank", rank=r, bits=4).compact for r in (1, 3)]
    batches = [padded(n) for n in range(2)]
    before = snapshot(model)
    rows = api.compare(lora, students, base=model, data=batches)
    assert snapshot(model) == before
    base = logits(model, batches)
    api.attach(model, lora, name="teacher")
    teacher, inputs = logits(model, batches), inputs_of(model, batches)
    api.detach(model)
    inputs = {name.replace(".base_layer.", "."): x for name, x in inputs.items()}
    for student, fidelity in zip(students, rows, strict=True):
        api.attach(model, student, name="student")
        ours = logits(model, batches)
        api.detach(model)
        answers = fidelity.answers
        assert answers is not None and answers.items == len(base) and answers.kind == "KL"
        assert answers.distance == pytest.approx(float((teacher.exp() * (teacher - ours)).sum(-1).mean()), rel=1e-4)
        assert answers.base_distance == pytest.approx(
            float((teacher.exp() * (teacher - base)).sum(-1).mean()), rel=1e-4
        )
        assert answers.agreement == float((teacher.argmax(-1) == ours.argmax(-1)).double().mean())
        assert answers.closed == pytest.approx(1 - answers.distance / answers.base_distance)
        expanded = {t.name: b @ a for t, a, b in methods.expand_all(student)}
        for pair, row in zip(lora.targets, fidelity.targets, strict=True):
            x = inputs[pair.target.name].double().numpy()
            whole, gap = x @ dense(pair).T, x @ (dense(pair) - expanded[pair.target.name]).T
            assert row.data_energy == pytest.approx((whole**2).sum() / len(x), rel=1e-4)
            assert row.data_error == pytest.approx((gap**2).sum() / len(x), rel=1e-4)
        assert 0 < fidelity.data_captured < 1  # type: ignore[operator]
    assert rows[1].answers.closed > rows[0].answers.closed  # type: ignore[union-attr]


def test_adapters_on_the_model_stay() -> None:
    """They are a part of the base, and are there afterwards, active or not as before."""
    model = auto("CausalLM").from_pretrained(LLAMA).eval()
    lora = api.load_lora(ADAPTERS / "llama-plain")
    compact = api.convert(lora, "lowrank", rank=1).compact
    (plain,) = api.compare(lora, [compact], base=model, data=[padded()])
    api.attach(model, lora, name="own", scale=0.5)
    api.attach(model, lora, name="other")
    api.set_active(model, "own")
    (beside,) = api.compare(lora, [compact], base=model, data=[padded()])
    assert attach.active(model) == ("own",)
    assert beside.answers.base_distance != plain.answers.base_distance  # type: ignore[union-attr]
    api.set_active(model, ())
    (beside,) = api.compare(lora, [compact], base=model, data=[padded()])
    assert beside.answers == plain.answers and attach.active(model) == ()
    api.detach(model, "own")
    api.detach(model, "other")


def test_models_without_logits() -> None:
    """Hidden states are compared where there is nothing else."""
    import transformers

    model = transformers.AutoModel.from_pretrained(BASES / "tiny-bert").eval()
    shapes = [tuple(model.get_submodule(f"encoder.layer.{n}.attention.self.query").weight.shape) for n in range(2)]
    names = (f"encoder.layer.{n}.attention.self.query.weight" for n in range(2))
    lora = renamed(random_lora(shapes, rank=4, seed=3), *names)
    compact = api.convert(lora, "lowrank", rank=2).compact
    (fidelity,) = api.compare(lora, [compact], base=model, data=[padded()])
    assert (
        fidelity.answers is not None and fidelity.answers.kind == "hidden states" and fidelity.answers.agreement is None
    )
    assert 0 < fidelity.answers.distance < fidelity.answers.base_distance
    shown = comparison_text([("x", fidelity)], False)
    assert "error of hidden states" in shown


def test_base_and_data_go_together() -> None:
    lora = api.load_lora(ADAPTERS / "llama-plain")
    compact = api.convert(lora, "lowrank", rank=1).compact
    with pytest.raises(OptionError, match="base and data go together"):
        api.compare(lora, [compact], base=LLAMA)
