"""ALoRA with training: a first allocation that is trained within its budget, components that move, and never worse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from click.testing import CliRunner
from conftest import ADAPTERS, BASES
from models import answers_on, bert_classifier, held_out, token_batches
from test_attach import snapshot
from test_trainable import same_payload

from lrconvert import api
from lrconvert.cli import cli
from lrconvert.convert import ablation
from lrconvert.core.errors import BudgetError, OptionError
from lrconvert.formats.lrc import file
from lrconvert.live import load_model
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.refine import data

LLAMA = BASES / "tiny-llama"
TRAIN = {"steps": 12, "eval_every": 3, "batch_tokens": 96, "lr": 0.3}
SIZE = 4000


@pytest.fixture(scope="module")
def lora() -> LoraAdapter:
    return api.load_lora(ADAPTERS / "llama-plain")


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model.load_model(LLAMA).float()


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Any]]:
    return token_batches(12, 4, 12)


def retrained(lora: LoraAdapter, model: Any, batches: Any, **options: Any) -> Any:
    defaults = {"rounds": 1, "exact": 3, "retrain": TRAIN, "target_size": SIZE}
    return api.allocate(lora, base=model, data=batches, **{**defaults, **options})


@pytest.mark.medium
def test_the_budget_is_met_in_every_round(
    lora: LoraAdapter, model: Any, batches: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    """Held-out data is neither scored nor trained on; what is told is what the file does on it; twice the same file."""
    scored, on_trial = [], ablation.on_trial
    spy = lambda m, whole, rows, *rest: (scored.extend(rows), on_trial(m, whole, rows, *rest))[1]  # noqa: E731
    monkeypatch.setattr(ablation, "on_trial", spy)
    before = snapshot(model)
    done = retrained(lora, model, batches)
    assert snapshot(model) == before
    held = held_out(batches)
    assert scored and not any(torch.equal(b["input_ids"], h["input_ids"]) for b in scored for h in held)
    assert [r.step for r in done.rounds] == [0, 3, 6, 9, 12]
    for now in done.rounds:
        assert 0.95 * SIZE < now.nbytes <= SIZE and sum(now.components.values()) > 0
    assert api.write(done.compact, tmp_path / "x.lrc") == done.sizes and api.validate(tmp_path / "x.lrc").ok
    assert 0.98 * SIZE < (tmp_path / "x.lrc").stat().st_size <= SIZE
    written = api.read(tmp_path / "x.lrc")
    assert sorted(m.after for m in done.modules) == sorted(written.config.counts)
    answers = answers_on(held, model, lora, written)
    assert answers.distance == pytest.approx(done.training.after.distance, rel=1e-5)
    assert done.training.after.distance < done.training.before.distance < done.training.after.base_distance
    assert written.provenance.fields["refined_steps"] == str(done.training.best_step)
    again = retrained(lora, model, batches)
    assert b"".join(file.encode(again.compact)) == b"".join(file.encode(done.compact)) and again.rounds == done.rounds


@pytest.mark.medium
def test_it_is_an_allocation_and_then_refine(lora: LoraAdapter, model: Any, batches: Any) -> None:
    done = retrained(lora, model, batches)
    train = data.split(data.Pool("decoder", model_inputs=tuple(batches)), 0).train
    on = [train.model_inputs[which[0]] for which in train.plan(0, 0, 96)]
    first = api.allocate(lora, target_size=SIZE, rounds=1, exact=3, base=model, data=on)
    then = api.refine(first.compact, lora, model, batches, **TRAIN)
    assert same_payload(done.compact, then.compact)
    assert (done.training.before, done.training.after) == (then.before, then.after)


@pytest.mark.medium
def test_never_worse_than_the_first_allocation(lora: LoraAdapter, model: Any, batches: Any) -> None:
    """Training that only does harm: the first allocation comes back."""
    wild = {**TRAIN, "lr": 300.0, "layerwise": False, "hidden": 0.0}
    done = retrained(lora, model, batches, retrain=wild)
    assert not done.training.improved and done.training.after == done.training.before
    assert dict(done.rounds[0].components) == {
        kind: sum(m.after for m in done.modules if m.kind == kind) for kind in {m.kind for m in done.modules}
    }


def test_heads_train_along() -> None:
    lora, model, batches = bert_classifier()
    before = snapshot(model)
    done = retrained(lora, model, batches, retrain={**TRAIN, "train_heads": True}, total_rank=4, target_size=None)
    assert snapshot(model) == before and done.rounds
    first = api.allocate(lora, total_rank=4).compact
    assert done.training.improved and done.compact.extras != first.extras
    answers = answers_on(held_out(batches, "encoder"), model, lora, done.compact)
    assert answers.distance == pytest.approx(done.training.after.distance, rel=1e-4)


def test_options_that_cannot_be(lora: LoraAdapter, model: Any, batches: Any) -> None:
    for options, message in (
        ({"base": None}, "training needs the base"),
        ({"dry_run": True}, "known only after training"),
        ({"moves": 1}, "allocate has no option 'moves'"),
        ({"retrain": {"step": 3}}, "retrain has no option 'step'"),
        ({"retrain": {"steps": 0}}, "steps is 0"),
        ({"total_rank": 3}, "give one of"),
    ):
        with pytest.raises(OptionError, match=message):
            plain = {"rounds": 1, "exact": 3, "retrain": TRAIN, "target_ratio": 6.0, "base": model, "data": batches}
            api.allocate(lora, **{**plain, **options})
    before = snapshot(model)
    with pytest.raises(BudgetError):
        retrained(lora, model, batches, target_size=300)
    assert snapshot(model) == before


@pytest.mark.medium
def test_the_command(tmp_path: Path) -> None:
    rows = [json.dumps({"text": "the words of a text " * (n % 5 + 1) + str(n)}) for n in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    words = ["lora-to-alora", ADAPTERS / "llama-plain", "--target-size", SIZE, "--base", LLAMA]
    words += ["--data", tmp_path / "texts.jsonl", "--rounds", 1, "--exact", 2, "--train-steps", 6, "--device", "cpu"]

    def invoke(*more: Any) -> str:
        done = CliRunner().invoke(cli, [str(w) for w in (*words, *more)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    shown = invoke("-o", tmp_path / "x.lrc")
    fields = json.loads(invoke("-o", tmp_path / "y.lrc", "--json"))
    assert (tmp_path / "x.lrc").read_bytes() == (tmp_path / "y.lrc").read_bytes()
    assert fields["bytes"]["total"] == (tmp_path / "x.lrc").stat().st_size
    training = fields["training"]
    assert training["after"]["distance"] <= training["before"]["distance"] and training["steps"] == 6
    assert "first allocation -> trained   6 steps" in shown and "components after so many steps" in shown
    assert [r["step"] for r in training["rounds"]] == [0, 6]
    for kind, count in training["rounds"][-1]["components"].items():
        row = next(line.split() for line in shown.splitlines()[::-1] if line.startswith(kind.split("*.")[1][:-7]))
        assert row[2] == str(count)
    other = json.loads(invoke("-o", tmp_path / "z.lrc", "--json", "--seed", 1))
    assert (
        other["training"]["data"] == training["data"]
        and (tmp_path / "z.lrc").read_bytes() != (tmp_path / "x.lrc").read_bytes()
    )
