"""The rate in training: coded bytes within their budget at every step, components that die and grow, exact files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conftest import ADAPTERS, BASES, dense, random_lora
from models import token_batches

from lrconvert import api
from lrconvert.formats.lrc import budgets, file
from lrconvert.live import load_model
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.methods import base as methods
from lrconvert.methods.lowrank import rate
from lrconvert.methods.lowrank.student import LowRankStudent
from lrconvert.refine.rate import budget_of

SHAPES = [(48, 32), (32, 80), (48, 32)]


FORMS = pytest.mark.parametrize("form", ["lowrank", "nola"])  # one student, rows as they are or on seeded bases


def made(form: str = "lowrank", **options: Any) -> tuple[LoraAdapter, CompactAdapter]:
    lora = random_lora(SHAPES, rank=6, decay=0.7)
    return lora, api.convert(lora, form, **options).compact


def student_of(lora: LoraAdapter, compact: CompactAdapter) -> LowRankStudent:
    student = methods.get(compact.method).student(compact)
    assert isinstance(student, LowRankStudent)
    student.warm_start_latents(lora.targets)
    student.keep_within(budget_of(compact))
    return student


def updates(student: LowRankStudent, training: bool) -> list[Any]:
    values = student.values(training)
    return [b @ a for a, b in (student.factors(values, n) for n in range(len(student.blocks)))]


@pytest.mark.medium
@pytest.mark.parametrize(
    ("form", "size"), [("lowrank", 1600), ("lowrank", 3000), ("lowrank", 8000), ("nola", 1600), ("nola", 8000)]
)
def test_coded_bytes_stay_within_two_percent_throughout(form: str, size: int, tmp_path: Path) -> None:
    """From the first step to the last, at rates far too high too; and what is written fills its budget."""
    lora, model = api.load_lora(ADAPTERS / "llama-plain"), load_model.load_model(BASES / "tiny-llama").float()
    compact = api.convert(lora, form, target_size=size).compact
    for lr in (1.0, 8.0):
        log, out = tmp_path / f"{lr}.log", tmp_path / f"{lr}.lrc"
        few = {"steps": 25, "eval_every": 5, "batch_tokens": 96, "layerwise": False, "lr": lr, "log": log}
        done = api.refine(compact, lora, model, token_batches(12, 4, 12), out, **few)
        events = [json.loads(line) for line in log.read_text().splitlines()]
        shares = [event["bits"] / event["of"] for event in events if event["event"] == "step"]
        assert len(shares) == 25 and 0.98 <= min(shares) <= max(shares) <= 1.02
        assert max(shares) - min(shares) > 1e-4  # something moved
        written = api.read(out)
        assert out.stat().st_size <= size == budgets.stated(written)
        assert not done.improved or budget_of(compact).size(written.config) >= 0.99 * size
    assert done.best_step == 0 or done.after.distance < done.before.distance


@FORMS
@pytest.mark.parametrize("options", [{"target_size": 900}, {"target_size": 1500}, {"bits": 8}])
def test_settled_files_are_within_their_budget_and_fill_it(form: str, options: dict[str, Any]) -> None:
    """Wherever latents have gone to; a file that is within its budget already is not touched."""
    lora, compact = made(form, **options)
    budget, draw = budget_of(compact), torch.Generator().manual_seed(0)
    student = student_of(lora, compact)
    student.settle()
    assert same(student.compact(), compact)
    for factor in (0.4, 0.9, 1.0, 1.5, 4.0):
        with torch.no_grad():
            student.latents *= factor
            student.latents += 0.1 * torch.randn(student.latents.shape, generator=draw)
        student.settle()
        settled = student.compact()
        assert 0.99 * budget.limit <= budget.size(settled.config) <= budget.limit
        assert len(b"".join(file.encode(settled))) == file.sizes(settled).total


def same(one: CompactAdapter, other: CompactAdapter) -> bool:
    return one.config == other.config and all(np.array_equal(one.tensors[k], other.tensors[k]) for k in one.tensors)


@FORMS
def test_the_model_trains_on_the_update_of_the_file(form: str) -> None:
    """With components that are no part of the file: they are there for gradients alone."""
    lora, compact = made(form, target_size=900)
    student = student_of(lora, compact)
    for _ in range(2):
        pairs = list(
            zip(updates(student, True), updates(student, False), methods.expand_all(student.compact()), strict=True)
        )
        for training, stored, (_, a, b) in pairs:
            assert torch.allclose(
                training, stored, atol=1e-6 * float(stored.detach().abs().max() + 1)
            ) and np.array_equal(stored.detach().numpy(), b @ a)
        with torch.no_grad():
            student.latents += 0.4 * torch.randn(student.latents.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(sum(update.square().sum() for update in updates(student, True)), student.latents)
    assert gradients[0].isfinite().all()


@FORMS
def test_components_die_and_grow_across_modules(form: str) -> None:
    """A file that was made of one LoRA learns another, whose energy lies in other modules: so do its components."""
    lora = random_lora(SHAPES, rank=6, decay=0.7)
    quiet = [
        replace(pair, scale=pair.scale * factor) for pair, factor in zip(lora.targets, (1.0, 1.0, 1e-4), strict=True)
    ]
    compact = api.convert(replace(lora, targets=tuple(quiet)), form, target_size=900).compact
    assert compact.config.counts[0] > 0 and compact.config.counts[2] == 0
    other = [
        replace(pair, scale=pair.scale * factor) for pair, factor in zip(lora.targets, (1e-4, 1.0, 1.0), strict=True)
    ]
    goals = [torch.from_numpy(dense(pair)).float() for pair in other]
    student = student_of(replace(lora, targets=tuple(other)), compact)
    energy, budget = sum(float(goal.square().sum()) for goal in goals), budget_of(compact)
    optimizer = torch.optim.Adam(student.groups(), betas=(0.9, 0.99), eps=1e-12)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        error = sum((update - goal).square().sum() for update, goal in zip(updates(student, True), goals, strict=True))
        (error / energy + student.own_loss()).backward()
        optimizer.step()
        student.clamp_latents()
        student.stepped()
        losses.append(float(error) / energy)
    student.settle()
    trained = student.compact()
    assert losses[-1] < 0.7 * losses[0] and trained.config.counts[0] < compact.config.counts[0]
    assert trained.config.counts[2] > 0 and budget.size(trained.config) <= budget.limit


@FORMS
def test_latents_begin_nearer_to_the_lora_than_what_is_stored(form: str) -> None:
    lora, compact = made(form, bits=2)
    student = student_of(lora, compact)

    def error(numbers: Any) -> float:
        values = {**student.values(), "numbers": numbers}
        pairs = [student.factors(values, n) for n in range(len(student.blocks))]
        return sum(
            float(((b @ a).detach() - torch.from_numpy(dense(pair))).square().sum())
            for (a, b), pair in zip(pairs, lora.targets, strict=True)
        )

    latents = student.latents.detach() * student.unit_latents
    stored = rate.numbers_of(latents)
    assert error(stored + 0.2 * (16 * latents - stored)) < error(stored)


def test_slopes_are_those_of_the_bits() -> None:
    """A whole step more costs about what coding says, row by row, and pulls towards zero everywhere."""
    lora, compact = made(bits=3)
    student = student_of(lora, compact)
    x = (student.latents * student.unit_latents).detach()
    slopes = rate.slopes(student.rows, x, student.models)
    assert bool((slopes * x >= 0).all())
    before = rate.coded(student.rows, x.numpy()).bits.sum()
    larger = x + x.sign() * (x.abs() > 1)  # what is not zero, one step larger
    after = rate.coded(student.rows, larger.numpy()).bits.sum()
    predicted = float((slopes * (larger - x)).sum())
    assert after - before == pytest.approx(predicted, rel=0.5) and predicted > 0


@FORMS
def test_an_adapter_of_zeros_stays_a_file(form: str) -> None:
    lora, compact = made(form, bits=4, rank=1)
    zeros = {name: np.zeros_like(tensor) for name, tensor in compact.tensors.items()}
    nothing = replace(compact, tensors=zeros)
    nothing = student_of(lora, nothing).compact()
    assert sum(nothing.config.counts) == 1 and not nothing.tensors["codes"].any()
    student = student_of(lora, nothing)
    student.stepped()
    student.settle()
    assert bool(student.latents.isfinite().all()) and same(student.compact(), nothing)
    list(file.encode(nothing))
