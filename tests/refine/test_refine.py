"""Refinement: what is trained is what is written; never worse than the input; the same again, resumed or not."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from click.testing import CliRunner
from conftest import ADAPTERS, BASES, random_lora
from models import answers_on, bert_classifier, held_out, renamed, token_batches
from test_attach import snapshot
from test_trainable import same_payload

import lrconvert
from lrconvert import api
from lrconvert.cli import cli
from lrconvert.core.errors import (
    BaseError,
    BudgetError,
    DataError,
    FingerprintError,
    LrcError,
    OptionError,
    OutputExistsError,
    StatisticsError,
)
from lrconvert.formats.lrc import budgets, file
from lrconvert.live import load_model, texts
from lrconvert.live.answers import Outputs
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.methods import base as methods
from lrconvert.refine import data, evaluation, losses, self_generated_data
from lrconvert.refine.evaluation import ZERO, TeacherModel
from lrconvert.refine.rate import budget_of
from lrconvert.refine.session import open_session
from lrconvert.refine.settings import RunOptions, Settings
from lrconvert.refine.trainer import Trainer

pytestmark = pytest.mark.medium  # all of them work on models, disks or processes

LLAMA, LORA = BASES / "tiny-llama", ADAPTERS / "llama-plain"
FEW = {"steps": 4, "eval_every": 2, "batch_tokens": 96}


@pytest.fixture(scope="module")
def lora() -> LoraAdapter:
    return api.load_lora(LORA)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model.load_model(LLAMA).float()


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Any]]:
    return token_batches(12, 4, 12)


@pytest.fixture(scope="module")
def small(lora: LoraAdapter) -> CompactAdapter:
    return api.convert(lora, "lowrank", bits=2, rank=3).compact


# --- losses ---------------------------------------------------------------------------------------------------------


def test_the_largest_logits_stand_for_all() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = (Outputs(torch.randn(5, 64, generator=draw) * 3, True) for _ in range(2))
    whole = losses.distance(losses.goal(one, 2.0, top_k=64), other, 2.0)
    p, q = ((o.rows / 2).log_softmax(-1) for o in (one, other))
    assert torch.isclose(whole, (p.exp() * (p - q)).sum(-1).mean() * 4, rtol=1e-5)
    part = losses.distance(losses.goal(one, 2.0, top_k=24), other, 2.0)
    assert 0 < part <= whole * (1 + 1e-5)  # what is compared as one cannot be farther apart
    assert losses.distance(losses.goal(one, 2.0, top_k=24), one, 2.0).abs() < 1e-5


def test_hidden_states_count_as_shares_of_the_change() -> None:
    a, b = torch.zeros(3, 4), torch.ones(3, 4)
    goal = losses.Goal((a, a))
    student = Outputs(a, True, (b, b))
    assert float(losses.hidden_error(goal, student, (4.0, 0.0))) == 1.0
    assert float(losses.hidden_error(goal, student, (8.0, 4.0))) == 0.75


# --- data -----------------------------------------------------------------------------------------------------------


def test_only_the_completion_counts(tmp_path: Path) -> None:
    tokenizer = load_model.load_tokenizer(LLAMA)
    rows = [texts.Text(" and so on", prompt="the words"), texts.Text("all of it")]
    pool = data.tokenized(rows, tokenizer, "decoder", 64, 0, {})
    examples = pool.examples
    prompted = pool.batch([0])
    assert "labels" not in prompted.inputs and prompted.scored is not None and prompted.labels is not None
    ids, prompt = examples[0].ids, examples[0].prompt
    assert 0 < prompt < len(ids)
    assert prompted.scored[0].tolist() == [prompt - 1 <= n < len(ids) - 1 for n in range(len(ids))]
    assert prompted.labels[0][prompted.scored[0]].tolist() == list(ids[prompt:])
    assert pool.batch([1]).scored is None and pool.batch([1]).weight == len(examples[1].ids)


def test_a_model_in_bf16_computes_layers_again(lora: LoraAdapter, small: CompactAdapter) -> None:
    """Attention in float32 would not be so on the way back, which refuses other dtypes."""
    model = load_model.load_model(LLAMA).bfloat16()
    few = {"steps": 1, "eval_every": 1, "layerwise": False, "gradient_checkpointing": True}
    assert api.refine(small, lora, model, token_batches(4, 2, 8), **few).steps == 1


def test_what_is_measured_is_what_the_model_answers(lora: LoraAdapter) -> None:
    """Training may compute the attention of a model in bf16 in float32; held-out answers are those of the model."""
    model = load_model.load_model(LLAMA).bfloat16()
    quiet = {"progress": lambda share, text: None}
    with open_session(model, lora, token_batches(4, 2, 8), Settings(), RunOptions(), **quiet) as session:
        teacher, (batch, *_) = session.teacher_model, session.evaluator.batches
        rows = {training: teacher.teacher(batch, False, training).rows for training in (False, True)}
        with torch.no_grad():
            logits = losses.masked_rows(
                model(**batch.inputs).logits, (batch.scored, batch.inputs.get("attention_mask"))
            )
    assert torch.equal(rows[False], logits) and not torch.equal(rows[True], logits)


def test_words_are_computed_for_the_places_that_count(model: Any) -> None:
    """The output layer sees no other place, and answers and gradients are those of a pass over all of them."""
    ids = torch.randint(0, model.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    scored = torch.zeros(3, 9, dtype=torch.bool)
    scored[0, 7:], scored[2, 4] = True, True
    batch, head = losses.Batch({"input_ids": ids}, scored, by_place=True), model.get_output_embeddings()
    seen: list[Any] = []
    hook = head.register_forward_hook(lambda module, arguments, output: seen.append(output.shape[:-1]))
    own = losses.outputs(model, batch, hidden=True)
    everything = model(**batch.inputs, output_hidden_states=True)
    hook.remove()
    assert seen == [(1, 3), (3, 9)] and not head._forward_pre_hooks
    torch.testing.assert_close(own.rows, everything.logits[scored])
    torch.testing.assert_close(own.hidden[-1], everything.hidden_states[-1][scored])
    gradients = [
        torch.autograd.grad(rows.square().sum(), head.weight)[0] for rows in (own.rows, everything.logits[scored])
    ]
    torch.testing.assert_close(*gradients)


def test_an_epoch_is_every_text_once() -> None:
    draw = np.random.default_rng(0)
    rows = tuple(data.Example(tuple(range(n))) for n in draw.integers(2, 30, 200))
    pool = data.Pool("decoder", rows)
    plans = [pool.plan(3, epoch, 64) for epoch in (0, 1)]
    assert plans[0] != plans[1] and plans[0] == pool.plan(3, 0, 64)
    for plan in plans:
        assert sorted(n for batch in plan for n in batch) == list(range(200))
        assert all(len(b) == 1 or len(b) * max(len(rows[n].ids) for n in b) <= 64 for b in plan)
        padded = sum(len(b) * max(len(rows[n].ids) for n in b) for b in plan)
        assert padded < 1.2 * sum(len(r.ids) for r in rows)


def test_equal_texts_stay_on_one_side() -> None:
    rows = tuple(data.Example((n % 20, 1, 2)) for n in range(100))
    parts = data.split(data.Pool("decoder", rows), 0)
    train, held = ({e.ids for e in pool.examples} for pool in (parts.train, parts.held_out))
    assert held and train and not train & held
    assert len(parts.train) + len(parts.held_out) == 100
    with pytest.raises(DataError, match=r"a\.jsonl: holds one text 5 times.*at least two different ones"):
        data.split(data.Pool("decoder", rows[:1] * 5), 0, Path("a.jsonl"))


def test_labels_are_classes() -> None:
    tokenizer = load_model.load_tokenizer(BASES / "tiny-bert")
    rows = [texts.Text("one", label="sad"), texts.Text("other", label="1"), texts.Text("third", label="unheard")]
    pool = data.tokenized(rows, tokenizer, "encoder", 16, 0, {"happy": 0, "sad": 1})
    assert [e.label for e in pool.examples] == [1, 1, None]
    labels = pool.batch([0, 1, 2]).labels
    assert labels is not None and labels.tolist() == [1, 1, -100]


def test_a_batch_in_parts() -> None:
    batch = losses.Batch({"input_ids": torch.arange(20).reshape(5, 4), "use": True}, torch.ones(5, 4, dtype=torch.bool))
    parts = batch.parts(2)
    assert [p.rows for p in parts] == [2, 3] and all(p.inputs["use"] is True for p in parts)
    assert torch.equal(torch.cat([p.inputs["input_ids"] for p in parts]), batch.inputs["input_ids"])
    assert batch.parts(1) == [batch] and len(batch.parts(99)) == 5


def test_a_teacher_writes(model: Any) -> None:
    tokenizer = load_model.load_tokenizer(LLAMA)

    def write(seed: int) -> list[data.Example]:
        return self_generated_data.sample(
            model, tokenizer, length=16, tokens=300, batch_tokens=128, seed=seed, progress=lambda share, text: None
        )

    examples = write(0)
    assert examples == write(0) != write(1)
    assert len(set(examples)) == len(examples) and sum(len(e.ids) for e in examples) >= 150
    assert all(e.ids[0] == tokenizer.bos_token_id and 1 < len(e.ids) <= 16 for e in examples)
    assert all(tokenizer.eos_token_id not in e.ids[:-1] for e in examples)


# --- the verb -------------------------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize("method", methods.module_names())
def test_never_worse_and_written_as_measured(
    method: str, lora: LoraAdapter, model: Any, batches: Any, tmp_path: Path
) -> None:
    compact = api.convert(lora, method, target_ratio=12).compact
    before = snapshot(model)
    done = api.refine(compact, lora, model, batches, tmp_path / "out.lrc", **FEW | {"steps": 30})
    assert snapshot(model) == before
    assert done.improved and done.after.distance < done.before.distance < done.after.base_distance
    written = api.read(tmp_path / "out.lrc")
    assert same_payload(written, done.compact) and not same_payload(written, compact)
    limit = budgets.stated(compact)
    assert limit is not None and file.sizes(written).adapter <= limit
    if method in ("lowrank", "nola"):  # their numbers are coded
        assert budget_of(compact).size(written.config) >= 0.99 * limit
    else:
        assert file.sizes(written).payload == file.sizes(compact).payload
    for adapter, reported in ((compact, done.before), (written, done.after)):
        answers = answers_on(held_out(batches), model, lora, adapter)
        assert answers.distance == pytest.approx(reported.distance, rel=1e-5)
        assert answers.agreement == reported.agreement
    fields = written.provenance.fields
    assert fields["refined_steps"] == str(done.best_step)
    assert float(fields["captured"]) == pytest.approx(api.compare(lora, [written])[0].captured, abs=1e-4)
    assert not list(tmp_path.glob("*.partial"))
    # The size that was asked for holds, with the note of the refinement; what of that had no room is named.
    assert done.ratio >= 12 and file.sizes(written) == done.sizes
    missing = [n for n in ("after", "before", "layerwise", "seed", "data") if f"refined_{n}" not in fields]
    assert [line for line in done.warnings if "does not record" in line] == [
        f"the file does not record {', '.join(missing)} of its refinement: "
        f"no room in the {lora.half_bytes // 12:,} bytes asked for"
    ]
    again = api.refine(written, lora, model, batches, **FEW)
    assert again.ratio >= 12


def test_the_smallest_size_holds_too(lora: LoraAdapter, model: Any, batches: Any) -> None:
    """Where a budget has no room for any note, none is written."""
    with pytest.raises(BudgetError) as refused:
        api.convert(lora, "lowrank", target_size=100)
    smallest = int(re.findall(r"has (\d+) bytes", str(refused.value))[0])
    compact = api.convert(lora, "lowrank", target_size=smallest).compact
    assert file.sizes(compact).adapter <= smallest
    done = api.refine(compact, lora, model, batches, end_to_end=False)
    assert done.sizes.adapter <= smallest and any("does not record steps, after" in line for line in done.warnings)


def test_the_note_is_whole_without_a_budget(lora: LoraAdapter, model: Any, small: CompactAdapter, batches: Any) -> None:
    """And it names a teacher that is not the source."""
    done = api.refine(small, lora, model, batches, **FEW)
    fields = done.compact.provenance.fields
    assert fields["refined_data"] == done.data and fields["refined_seed"] == "0" and fields["refined_layerwise"]
    assert f"{done.after.distance:.6g} of" in fields["refined_after"] and "refined_before" in fields
    assert "refined_teacher" not in fields and not done.warnings
    other = replace(lora, provenance=replace(lora.provenance, source="0" * 64))
    named = api.refine(small, other, model, batches, end_to_end=False).compact.provenance.fields
    assert named["refined_teacher"] == "0" * 64


def test_updates_that_depend_on_the_base(lora: LoraAdapter, model: Any, batches: Any) -> None:
    """Bat: through its own product with the weights; its fit needs their folder, training does not."""
    compact = api.convert(lora, "bone", variant="bat", base=LLAMA, target_ratio=12).compact
    on_disk = api.refine(compact, lora, LLAMA, batches, **FEW)
    assert on_disk.improved and not same_payload(on_disk.compact, compact)
    captured = api.compare(lora, [on_disk.compact], base=LLAMA)[0].captured
    assert float(on_disk.compact.provenance.fields["captured"]) == pytest.approx(max(captured, 0), abs=1e-4)
    live = api.refine(compact, lora, model, batches, **FEW)
    assert live.improved and not live.layerwise and "captured" not in live.compact.provenance.fields
    for done in (on_disk, live):
        answers = answers_on(held_out(batches), model, lora, done.compact)
        assert answers.distance == pytest.approx(done.after.distance, rel=1e-5)


@pytest.mark.parametrize("method", ["lowrank", pytest.param("vblora", marks=pytest.mark.slow)])
def test_the_same_again_and_resumed(method: str, lora: LoraAdapter, model: Any, batches: Any, tmp_path: Path) -> None:
    compact = api.convert(lora, method, target_ratio={"lowrank": 4, "vblora": 12}[method]).compact
    out = [tmp_path / f"{n}.lrc" for n in range(3)]
    many = {**FEW, "steps": 7, "checkpoint_every": 3, "lr": 0.3}
    for path in out[:2]:
        done = api.refine(compact, lora, model, batches, path, **many)
    assert done.best_step > 3 and out[0].read_bytes() == out[1].read_bytes()
    steps = 0

    def stop(share: float, text: str) -> None:
        nonlocal steps
        steps += text.startswith("loss")
        if steps == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.refine(compact, lora, model, batches, out[2], progress=stop, **many)
    partial = tmp_path / f"{out[2].name}.partial"
    assert partial.exists() and not out[2].exists()
    with pytest.raises(OutputExistsError, match="unfinished refinement"):
        api.refine(compact, lora, model, batches, out[2], **many)
    with pytest.raises(StatisticsError, match="other options"):
        api.refine(compact, lora, model, batches, out[2], resume=True, **{**many, "lr": 0.5})
    spelled = {**many, "steps": 7.0, "hidden": 1, "temperature": 1}  # the same options
    done = api.refine(compact, lora, model, batches, out[2], resume=True, **spelled)
    assert done.steps == 7 and out[2].read_bytes() == out[0].read_bytes()
    assert not partial.exists()


def test_without_a_gain_the_input_comes_back(lora: LoraAdapter, model: Any, batches: Any, tmp_path: Path) -> None:
    exact = api.convert(lora, "lowrank", bits=12).compact
    done = api.refine(exact, lora, model, batches, tmp_path / "o.lrc", layerwise=False, lr=30.0, **FEW)
    assert not done.improved and done.before == done.after
    written = api.read(tmp_path / "o.lrc")
    assert same_payload(written, exact) and written.provenance.fields["refined_steps"] == "0"


def test_either_stage_alone(lora: LoraAdapter, model: Any, batches: Any) -> None:
    plain = api.convert(lora, "lowrank", bits=1, rank=2).compact
    first = api.refine(plain, lora, model, batches, end_to_end=False)
    assert first.steps == 0 and first.after.distance <= first.before.distance
    second = api.refine(plain, lora, model, batches, layerwise=False, lr=0.3, **FEW)
    assert not second.layerwise and second.improved and second.best_step


def test_batches_that_do_not_fit_are_cut(
    lora: LoraAdapter, model: Any, small: Any, batches: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    whole = api.refine(small, lora, model, batches, layerwise=False, **FEW)
    answers = TeacherModel.answers

    def full(self: TeacherModel, batch: losses.Batch, hidden: bool, training: bool = False) -> Outputs:
        if torch.is_grad_enabled() and batch.rows > 1:
            raise torch.OutOfMemoryError("injected")
        return answers(self, batch, hidden, training)

    monkeypatch.setattr(TeacherModel, "answers", full)
    log = tmp_path / "log"
    cut = api.refine(small, lora, model, batches, layerwise=False, log=log, **FEW)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [e["parts"] for e in events if e["event"] == "smaller"] == [2, 4]
    assert cut.after.distance == pytest.approx(whole.after.distance, rel=0.05)
    assert whole.warnings == () and "in up to 4 parts" in cut.warnings[-1]

    def always(self: TeacherModel, batch: losses.Batch, hidden: bool, training: bool = False) -> Outputs:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("injected")
        return answers(self, batch, hidden, training)

    monkeypatch.setattr(TeacherModel, "answers", always)
    with pytest.raises(OptionError, match="does not fit"):
        api.refine(small, lora, model, batches, layerwise=False, **FEW)


def test_what_is_no_number_is_skipped(
    lora: LoraAdapter, model: Any, small: Any, batches: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    loss = Trainer._loss

    def broken(self: Trainer, batch: losses.Batch, goal: losses.Goal) -> Any:
        return loss(self, batch, goal) * (float("nan") if self.state.step in bad else 1.0)

    monkeypatch.setattr(Trainer, "_loss", broken)
    bad: Any = {1}
    log = tmp_path / "log"
    done = api.refine(small, lora, model, batches, log=log, **FEW)
    assert done.improved and sum('"skipped"' in line for line in log.read_text().splitlines()) == 1
    bad = range(1000)
    done = api.refine(small, lora, model, batches, layerwise=False, log=log, lr=1.0, **{**FEW, "steps": 100})
    assert not done.improved and done.steps == 20 and '"again"' in log.read_text()  # four times five steps


def test_far_off_it_begins_again_from_the_best(lora: LoraAdapter, model: Any, batches: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    small = api.convert(lora, "nola", target_ratio=12).compact
    done = api.refine(small, lora, model, batches, log=log, lr=1e4, hidden=0.0, **{**FEW, "eval_every": 1})
    assert any("and was restarted from the best" in line for line in done.warnings)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [e["rate"] for e in events if e["event"] == "again"][:2] == [5e3, 2.5e3]


def test_early_stopping_and_time(lora: LoraAdapter, model: Any, batches: Any) -> None:
    exact = api.convert(lora, "lowrank", bits=12).compact
    stopped = api.refine(exact, lora, model, batches, lr=10.0, patience=1, **{**FEW, "steps": 50})
    assert stopped.steps < 50
    timed = api.refine(exact, lora, model, batches, minutes=1e-9, **FEW)
    assert timed.steps <= 1


def test_the_teacher_answers_held_out_data_once(
    lora: LoraAdapter, model: Any, batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a session measures the base; what the teacher answered for that is kept for all later measurements."""
    asked: list[Any] = []
    plain = TeacherModel.teacher

    def counting(self: Any, batch: Any, hidden: bool, training: bool = False) -> Any:
        asked.append(batch)
        return plain(self, batch, hidden, training)

    monkeypatch.setattr(TeacherModel, "teacher", counting)
    settings = Settings(hidden=1.0)
    with open_session(model, lora, batches, settings, RunOptions(), progress=lambda share, text: None) as session:
        assert len(asked) == len(session.evaluator.batches) > 0
        again = session.evaluator.sums((ZERO,))
        assert len(asked) == len(session.evaluator.batches)
        assert again.distance == session.base_distance.distance and again.hidden == []


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_answers_to_held_out_data_are_kept_up_to_some_bytes(
    dtype: torch.dtype, lora: LoraAdapter, batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are kept in the model's own dtype: half as wide takes half as much."""
    model, settings, kept = load_model.load_model(LLAMA).to(dtype), Settings(hidden=0.0), []
    numbers = 4 * 12 * 100  # one batch of four texts of 12 tokens, each with 100 words to choose from
    for limit in (numbers * dtype.itemsize, numbers * dtype.itemsize - 1):
        monkeypatch.setattr(evaluation, "_CACHED", limit)
        with open_session(model, lora, batches, settings, RunOptions(), progress=lambda share, text: None) as session:
            kept.append(len(session.evaluator._cache))
    assert kept == [1, 0]


def test_the_tasks_own_loss(lora: LoraAdapter, model: Any, small: Any, batches: Any) -> None:
    slow = {**FEW, "layerwise": False, "lr": 0.3}
    without, with_task = (api.refine(small, lora, model, batches, task_loss=w, **slow) for w in (0.0, 0.5))
    assert without.best_step and with_task.best_step
    assert not same_payload(with_task.compact, without.compact)


def test_gradient_checkpointing_computes_the_same(lora: LoraAdapter, model: Any, small: Any, batches: Any) -> None:
    before = snapshot(model)
    plain, saving = (
        api.refine(small, lora, model, batches, layerwise=False, gradient_checkpointing=on, **FEW)
        for on in (False, True)
    )
    assert saving.after.distance == pytest.approx(plain.after.distance, rel=1e-3)
    assert snapshot(model) == before


# --- other models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["vit-plain", "bert-classifier"])
def test_models_that_read_something_else(case: str) -> None:
    """Images; and an encoder that gives hidden states, with a trained head that stays as it is, or is trained."""
    if case == "vit-plain":
        lora, model = api.load_lora(ADAPTERS / case), load_model.load_model(BASES / "tiny-vit")
        shape = (4, model.config.num_channels, model.config.image_size, model.config.image_size)
        draw = torch.Generator().manual_seed(0)
        batches = [{"pixel_values": torch.randn(shape, generator=draw)} for _ in range(8)]
    else:
        lora, model, batches = bert_classifier()
    compact = api.convert(lora, "lowrank", bits=4, rank=1).compact
    done = api.refine(compact, lora, model, batches, **FEW)
    assert done.after.distance <= done.before.distance
    assert done.compact.extras == compact.extras
    if lora.extras:
        before = snapshot(model)
        trained = api.refine(compact, lora, model, batches, train_heads=True, layerwise=False, lr=0.3, **FEW)
        assert trained.before == done.before and trained.improved and trained.compact.extras != compact.extras
        assert snapshot(model) == before
        answers = answers_on(held_out(batches, "encoder"), model, lora, trained.compact)
        assert answers.distance == pytest.approx(trained.after.distance, rel=1e-4)


def test_hidden_states_where_there_are_no_logits(tmp_path: Path) -> None:
    lora = replace(api.load_lora(ADAPTERS / "bert-classifier"), extras=())
    compact = api.convert(lora, "lowrank", bits=4).compact
    rows = [json.dumps({"text": "a word " * (n % 5 + 1) + str(n)}) for n in range(60)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    done = api.refine(compact, lora, BASES / "tiny-bert", tmp_path / "texts.jsonl", lr=0.3, **FEW)
    assert done.improved and done.before.kind == "hidden states" and done.before.agreement is None


def test_another_teacher_is_named(lora: LoraAdapter, model: Any, small: CompactAdapter, batches: Any) -> None:
    other = replace(lora, provenance=replace(lora.provenance, source="0" * 64))
    done = api.refine(small, other, model, batches, end_to_end=False)
    assert any("not the LoRA" in line for line in done.warnings)
    assert not api.refine(small, lora, model, batches, end_to_end=False).warnings


def test_an_encoder_decoder() -> None:
    import transformers

    config = transformers.T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    names = ("encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.block.0.layer.0.SelfAttention.v.weight")
    lora = renamed(random_lora([(16, 16), (16, 16)]), *names)
    lora = replace(lora, targets=tuple(sorted(lora.targets, key=lambda p: p.target)))
    draw = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(1, 60, (3, 7), generator=draw),
            "labels": torch.randint(1, 60, (3, 5), generator=draw),
        }
        for _ in range(6)
    ]
    compact = api.convert(lora, "lowrank", bits=4).compact
    done = api.refine(compact, lora, model, batches, **FEW)
    assert done.improved and done.before.items == 15


# --- refusals -------------------------------------------------------------------------------------------------------


def test_refusals(lora: LoraAdapter, model: Any, small: Any, batches: Any, tmp_path: Path) -> None:
    def refused(kind: type[LrcError], words: str, *arguments: Any, **named: Any) -> None:
        before = snapshot(model)
        with pytest.raises(kind, match=words):
            api.refine(*arguments, **named)
        assert snapshot(model) == before

    for name, value in (
        ("steps", 0),
        ("lr", 0.0),
        ("temperature", float("nan")),
        ("autocast", "fp8"),
        ("hidden", -1.0),
    ):
        refused(OptionError, name.replace("_", "-"), small, lora, model, batches, **{name: value})
    refused(OptionError, "no option 'step'", small, lora, model, batches, step=3)
    refused(OptionError, "both stages", small, lora, model, batches, layerwise=False, end_to_end=False)
    refused(DataError, "empty", small, lora, model, [])
    refused(BaseError, "not one of the teacher's", small, replace(lora, targets=lora.targets[:1]), model, batches)
    refused(OptionError, "4 bit", small, lora, model, batches, load_in_4bit=True)
    zero = replace(lora, targets=tuple(replace(pair, scale=0.0) for pair in lora.targets))
    refused(DataError, "nothing to learn", small, zero, model, batches)
    (tmp_path / "exists.lrc").write_bytes(b"x")
    refused(OutputExistsError, "exists", small, lora, model, batches, tmp_path / "exists.lrc")
    other = replace(small, base=replace(small.base, content="0" * 64))
    refused(FingerprintError, "other contents", other, lora, LLAMA, batches)
    bert = api.load_lora(ADAPTERS / "bert-classifier")
    compact = api.convert(bert, "lowrank", bits=2).compact
    refused(DataError, "cannot write", compact, replace(bert, extras=()), BASES / "tiny-bert")
    unlabelled = tmp_path / "texts.jsonl"
    unlabelled.write_text("\n".join(json.dumps({"text": f"text {n}"}) for n in range(9)))
    labels = {"task_loss": 1.0}
    refused(DataError, "needs labels", compact, replace(bert, extras=()), BASES / "tiny-bert", unlabelled, **labels)
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("\n".join(json.dumps({"text": f"text {n}", "label": ["0", "sad"][n == 5]}) for n in range(9)))
    words = r"foreign\.jsonl: the label 'sad' is no class of the model, which knows LABEL_0, LABEL_1.*label2id"
    refused(DataError, words, compact, replace(bert, extras=()), BASES / "tiny-bert", foreign, **labels)
    foreign.write_text(json.dumps({"text": "only one"}))
    words = r"foreign\.jsonl: holds one text, and"
    refused(DataError, words, compact, replace(bert, extras=()), BASES / "tiny-bert", foreign)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_without_data(small: CompactAdapter, tmp_path: Path) -> None:
    api.write(small, tmp_path / "in.lrc")
    words = ["refine", tmp_path / "in.lrc", "--base", LLAMA, "--teacher", LORA, "-o", tmp_path / "out.lrc"]
    few = ["--steps", 3, "--own-tokens", 600, "--length", 16, "--batch-tokens", 64]
    done = CliRunner().invoke(cli, [str(w) for w in (*words, *few, "--log", tmp_path / "log")])
    assert done.exit_code == 0, done.output
    assert "before" in done.output and "closed" in done.output and "held-out items" in done.output
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1])["event"] == "end"
    assert api.validate(tmp_path / "out.lrc").ok


def test_strict_exits_with_one_without_a_gain(lora: LoraAdapter, tmp_path: Path) -> None:
    api.write(api.convert(lora, "lowrank", bits=12).compact, tmp_path / "in.lrc")
    (tmp_path / "t.txt").write_text("\n".join(f"words of line {n}" for n in range(40)))
    words = ["refine", tmp_path / "in.lrc", "--base", LLAMA, "--teacher", LORA, "--data", tmp_path / "t.txt"]
    few = ["--steps", 2, "--lr", 30, "--no-layerwise", "--length", 24, "--json"]
    for more, code in (([], 0), (["--strict"], 1)):
        done = CliRunner().invoke(cli, [str(w) for w in (*words, *few, *more, "-o", tmp_path / f"{code}.lrc")])
        assert done.exit_code == code, done.output
        assert json.loads(done.stdout)["improved"] is False and (tmp_path / f"{code}.lrc").exists()


# --- other machines -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_base_in_four_bit(lora: LoraAdapter, small: CompactAdapter, batches: Any) -> None:
    """The refinement sees the quantized base, for its teacher too, and its backward pass."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    done = api.refine(small, lora, LLAMA, batches, load_in_4bit=True, **FEW)
    plain = api.refine(small, lora, LLAMA, batches, **FEW)
    assert done.improved and done.before.base_distance != plain.before.base_distance
    assert done.before.base_distance == pytest.approx(plain.before.base_distance, rel=0.5)


def test_bf16(lora: LoraAdapter, model: Any, small: CompactAdapter, batches: Any) -> None:
    done = api.refine(small, lora, model, batches, autocast="bf16", **FEW)
    plain = api.refine(small, lora, model, batches, **FEW)
    assert done.improved and done.after.distance == pytest.approx(plain.after.distance, rel=0.2)


_PROCESS = """
import sys, torch
sys.path[:0] = {paths!r}
from lrconvert import api
from lrconvert.live import load_model as live
draw = torch.Generator().manual_seed(0)
batches = [{{"input_ids": torch.randint(3, 100, (4, 12), generator=draw)}} for _ in range(12)]
lora = api.load_lora({lora!r})
compact = api.convert(lora, "lowrank", bits=12, rank=2).compact
done = api.refine(compact, lora, {base!r}, batches, sys.argv[1], steps=3, eval_every=3, accumulate=int(sys.argv[2]))
print("MEASURED", done.before.distance, done.after.distance)
"""


@pytest.mark.slow
def test_two_processes_refine_as_one(tmp_path: Path) -> None:
    """As torchrun starts them: the same numbers as one process that accumulates, up to the order of sums."""
    script = tmp_path / "process.py"
    roots = [str(Path(lrconvert.__file__).parent.parent)]
    script.write_text(_PROCESS.format(paths=roots, lora=str(LORA), base=str(LLAMA)))

    def start(out: Path, accumulate: int, **environment: str) -> subprocess.Popen[str]:
        words = [sys.executable, str(script), str(out), str(accumulate)]
        return subprocess.Popen(
            words, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [{"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(2)]
    started = [start(tmp_path / "two.lrc", 1, **place, **rank) for rank in ranks]
    started.append(start(tmp_path / "one.lrc", 2))
    distances = []
    for process in started:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        distances.append([float(word) for word in out.split("MEASURED")[1].split()])
    assert distances[0] == distances[1] == pytest.approx(distances[2], rel=1e-3)

    def update(compact: CompactAdapter) -> np.ndarray:
        return np.concatenate([(b @ a).reshape(-1) for _, a, b in methods.expand_all(compact)])

    one, two = (update(api.read(tmp_path / f"{name}.lrc")) for name in ("one", "two"))
    start_at = update(api.convert(api.load_lora(LORA), "lowrank", bits=12, rank=2).compact)
    assert np.linalg.norm(one - two) < 0.02 * np.linalg.norm(one - start_at)
