"""ALoRA that trains between its rounds: components that change places, budgets, and never worse than without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from click.testing import CliRunner
from conftest import ADAPTERS, BASES, dense, random_lora
from models import answers_on, bert_classifier, held_out, token_batches
from test_attach import snapshot
from test_trainable import same_payload

from lrconvert import api
from lrconvert.cli import cli
from lrconvert.convert import ablation
from lrconvert.convert.rank_allocation import Components, Cut
from lrconvert.core.errors import BudgetError, OptionError
from lrconvert.formats.lrc import file
from lrconvert.live import load_model
from lrconvert.live.collect_statistics import collect
from lrconvert.lora import svd
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.methods import base as methods
from lrconvert.methods.base import FitContext
from lrconvert.refine import (
    data,
    rank_exchange,
)
from lrconvert.refine.rank_training import Rounds

LLAMA = BASES / "tiny-llama"
WIDTHS = ("16", "4", "1")
TRAIN = {"steps": 12, "eval_every": 3, "batch_tokens": 96, "lr": 0.3}


@pytest.fixture(scope="module")
def lora() -> LoraAdapter:
    return api.load_lora(ADAPTERS / "llama-plain")


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model.load_model(LLAMA).float()


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Any]]:
    return token_batches(12, 4, 12)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "weighted"])
def context(request: Any, model: Any, batches: Any) -> FitContext:
    return FitContext(statistics=collect(model, batches) if request.param else None)


def deltas(compact: CompactAdapter) -> list[np.ndarray]:
    return [b.astype(np.float64) @ a for _, a, b in methods.expand_all(compact)]


# --- components -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WIDTHS)
def test_components_are_rows_of_the_payload(lora: LoraAdapter, bits: str) -> None:
    """Any of them, in any number, are the same ones of the expansion."""
    compact = api.convert(lora, "lowrank", bits=bits, dynamic_method="sv_fro", dynamic_param=0.9).compact
    rows = rank_exchange.split(compact)
    assert same_payload(rank_exchange.joined(compact, rows), compact)
    masks = [np.arange(len(next(iter(target.values())))) % 3 != n % 3 for n, target in enumerate(rows)]
    picked = [{name: array[keep] for name, array in target.items()} for target, keep in zip(rows, masks, strict=True)]
    smaller = rank_exchange.joined(compact, picked)
    assert file.sizes(smaller).payload < file.sizes(compact).payload
    for (_, a, b), (_, whole_a, whole_b), keep in zip(
        methods.expand_all(smaller), methods.expand_all(compact), masks, strict=True
    ):
        assert np.array_equal(a, whole_a[keep]) and np.array_equal(b, whole_b[:, keep])


def test_what_is_lacking_is_the_best_correction(lora: LoraAdapter, context: FitContext) -> None:
    for pair, a, b in (
        (p, a, b) for p, (_, a, b) in zip(lora.targets, methods.expand_all(_small(lora, "2")), strict=True)
    ):
        metric = context.metric(pair)
        root = np.eye(pair.target.in_features)
        if metric is not None:
            values, vectors = np.linalg.eigh(metric.gram(root.astype(np.float32)))
            root = vectors * np.sqrt(np.maximum(values, 0))
        rest = dense(pair) - b.astype(np.float64) @ a
        more_a, more_b = rank_exchange.lacking(pair, a, b, metric, 2)
        best = np.linalg.svd(rest @ root, compute_uv=False)
        left = np.linalg.norm((rest - more_b @ more_a) @ root) ** 2
        assert left == pytest.approx(float((best[2:] ** 2).sum()), rel=1e-4)
        own_a, own_b = svd.balanced(svd.svd(pair, metric))
        assert len(rank_exchange.lacking(pair, own_a, own_b, metric, 2)[0]) == 0  # nothing but rounding
    full = random_lora([(6, 4)], rank=4).targets[0]
    assert len(rank_exchange.lacking(full, np.zeros((4, 4)), np.zeros((6, 4)), None, 2)[0]) == 0  # no rank is left
    assert len(rank_exchange.lacking(full, np.zeros((3, 4)), np.zeros((6, 3)), None, 2)[0]) == 1


def _small(lora: LoraAdapter, bits: str) -> CompactAdapter:
    return api.convert(lora, "lowrank", bits=bits, rank=2).compact


def test_who_goes_and_who_comes() -> None:
    """Random scores and costs: the budget is met; who comes is better than all who went; no module does both."""
    rng = np.random.default_rng(0)
    arrivals, targets = 0, random_lora([(8, 8), (16, 8), (24, 16), (8, 40)], rank=4).shapes()
    for turn in range(200):
        owner = np.repeat(np.arange(4), 4)
        place, present = np.tile(np.arange(4), 4), np.tile([True, True, True, False], 4)
        cost = np.array([16.0 * sum(t.matrix_shape) for t in targets])[owner]
        parts = Components(owner, place, rng.random(16), cost)
        scores, known = rng.standard_normal(16) * cost, rng.random(16) < 0.8
        limit = float(cost[present].sum())
        share = float(rng.choice([0.1, 0.3, 1.0]))
        cut = Cut(parts, targets, 16, None, _Payload(limit, cost)) if turn % 2 else Cut(parts, targets, 16, 12, None)
        kept = rank_exchange.exchanged(cut, present, known, scores, share)
        new, gone = kept & ~present, present & ~kept
        amounts = cut.amounts
        assert amounts[kept].sum() <= amounts[present].sum() and cut.meets(kept)
        most = max(share * amounts[present].sum(), amounts[present].max())
        assert amounts[gone].sum() <= most and known[new | gone].all()
        assert not {*owner[new]} & {*owner[gone]}
        if gone.any():
            assert new.any() and (scores / cost)[gone].max() < (scores / cost)[new].max()
        arrivals += int(new.sum())
    assert arrivals > 50


class _Payload:
    """A budget of bits of payload alone."""

    def __init__(self, limit: float, cost: np.ndarray) -> None:
        self.limit, self.cost = limit, cost.reshape(4, 4)[:, 0]

    def fits(self, config: Any) -> bool:
        return float((np.array(config.ranks) * self.cost).sum()) <= self.limit


@pytest.mark.parametrize("bits", WIDTHS)
def test_what_stays_keeps_its_bits_and_what_comes_is_damped(lora: LoraAdapter, bits: str, context: FitContext) -> None:
    compact = _small(lora, bits)
    offer = rank_exchange.offer(compact, lora, context)
    before = deltas(compact)
    kept, parts = offer.present.copy(), offer.parts
    assert [(parts.owner == t).sum() for t in range(len(before))] == [3] * len(before)
    loses, gains = 0, 1
    kept[(parts.owner == loses) & (parts.place == 1)] = False
    kept[(parts.owner == gains) & (parts.place == 2)] = True
    changed = rank_exchange.applied(compact, offer, kept, 0.25, context)
    assert changed.config.ranks == (1, 3, *(2 for _ in before[2:]))
    assert file.check(changed) is None
    old, new = rank_exchange.split(compact), rank_exchange.split(changed)
    for t in range(2, len(before)):
        assert all(np.array_equal(old[t][name], new[t][name]) for name in old[t])
    if bits != "16":
        assert all(np.array_equal(old[loses][name][:1], new[loses][name]) for name in old[loses])
    assert all(np.array_equal(old[gains][name], new[gains][name][:2]) for name in old[gains])
    after = deltas(changed)
    one = offer.lora.targets[loses]
    goal = np.outer(one.B[:, 0], one.A[0])
    assert np.abs(after[loses] - goal).max() <= 2e-3 * np.abs(goal).max()
    one = offer.lora.targets[gains]
    goal = 0.25 * np.outer(one.B[:, 2], one.A[2])
    share = float((goal * (after[gains] - before[gains])).sum()) / float((goal**2).sum())
    least = {"16": 0.995, "4": 0.95, "1": 0.25}[bits]  # signs hold (2 / pi)^2 of a Gaussian outer product
    assert least < share < 2 - least


def test_a_module_without_components_may_get_one(lora: LoraAdapter, context: FitContext) -> None:
    for bits in ("16", "2"):
        small = _small(lora, bits)
        rows = rank_exchange.split(small)
        bare = rank_exchange.joined(small, [{n: a[:0] for n, a in rows[0].items()}, *rows[1:]])
        offer = rank_exchange.offer(bare, lora, context)
        changed = rank_exchange.applied(bare, offer, offer.present | (offer.parts.owner == 0), 1.0, context)
        assert changed.config.ranks == (1, *small.config.ranks[1:])


# --- the verb -------------------------------------------------------------------------------------------------------


def retrained(lora: LoraAdapter, model: Any, batches: Any, **options: Any) -> Any:
    defaults = {"rounds": 1, "exact": 3, "retrain": TRAIN, "target_ratio": 6.0}
    return api.allocate(lora, base=model, data=batches, **{**defaults, **options})


@pytest.fixture
def seen(monkeypatch: Any) -> Iterator[dict[str, list[Any]]]:
    """What was exchanged, and what components were scored on. Who goes on after an exchange begins with its outcome."""
    calls: dict[str, list[Any]] = {"applied": [], "scored": []}
    applied, on_trial = rank_exchange.applied, ablation.on_trial

    def spy(*arguments: Any) -> CompactAdapter:
        calls["applied"].append(applied(*arguments))
        return calls["applied"][-1]

    def on(model: Any, lora: Any, batches: Any) -> Any:
        calls["scored"] += batches
        return on_trial(model, lora, batches)

    onward = Rounds._onward

    def goes_on(self: Rounds, trainer: Any, compact: Any, changed: Any, *arguments: Any) -> Any:
        new = onward(self, trainer, compact, changed, *arguments)
        assert same_payload(new.student.compact(), changed) and new.best is not trainer.best
        return new

    monkeypatch.setattr(Rounds, "_onward", goes_on)
    monkeypatch.setattr(rank_exchange, "applied", spy)
    monkeypatch.setattr(ablation, "on_trial", on)
    yield calls


@pytest.mark.medium
@pytest.mark.parametrize("bits", ["16", "2"])
def test_budgets_are_met_in_every_round(
    bits: str, lora: LoraAdapter, model: Any, batches: Any, seen: Any, tmp_path: Path
) -> None:
    before = snapshot(model)
    size = 9000 if bits == "16" else 3500
    options = {"target_ratio": None, "target_size": size, "bits": bits}
    done = retrained(lora, model, batches, **options)
    assert snapshot(model) == before
    assert done.moves and len(done.moves) == len(seen["applied"])
    assert [m.step for m in done.moves] == sorted({m.step for m in done.moves}) and done.moves[-1].step <= 6
    for compact in (*seen["applied"], done.compact):
        assert size - 900 < file.sizes(compact).adapter <= size
    assert api.write(done.compact, tmp_path / "x.lrc") == done.sizes and api.validate(tmp_path / "x.lrc").ok
    assert {m.after for m in done.modules} == {*done.compact.config.ranks}
    # Held-out data is neither scored nor trained on; what is told is what the file does on it.
    held = held_out(batches)
    assert seen["scored"] and not any(torch.equal(b["input_ids"], h["input_ids"]) for b in seen["scored"] for h in held)
    written = api.read(tmp_path / "x.lrc")
    answers = answers_on(held, model, lora, written)
    assert answers.distance == pytest.approx(done.training.after.distance, rel=1e-5)
    assert done.training.after.distance < done.training.before.distance < done.training.after.base_distance
    fields = written.provenance.fields
    assert fields["refined_steps"] == str(done.training.best_step) and "refined_teacher" not in fields
    # The same again has the same bytes.
    again = retrained(lora, model, batches, **options)
    assert b"".join(file.encode(again.compact)) == b"".join(file.encode(done.compact)) and again.moves == done.moves


def test_a_budget_of_ranks(lora: LoraAdapter, model: Any, batches: Any, seen: Any) -> None:
    done = retrained(lora, model, batches, target_ratio=None, total_rank=11)
    assert [sum(c.config.ranks) for c in (*seen["applied"], done.compact)] == [11] * (1 + len(seen["applied"]))
    assert seen["applied"]


def test_without_moves_it_is_an_allocation_and_then_refine(lora: LoraAdapter, model: Any, batches: Any) -> None:
    done = retrained(lora, model, batches, moves=0, target_ratio=None, total_rank=11)
    train = data.split(data.Pool("decoder", model_inputs=tuple(batches)), 0).train
    scored = [train.model_inputs[which[0]] for which in train.plan(0, 0, 96)]
    first = api.allocate(lora, total_rank=11, rounds=1, exact=3, base=model, data=scored)
    then = api.refine(first.compact, lora, model, batches, **TRAIN)
    assert not done.moves and same_payload(done.compact, then.compact)
    assert (done.training.before, done.training.after) == (then.before, then.after)


@pytest.mark.medium
@pytest.mark.parametrize("bits", ["16", "2"])
def test_a_pause_in_which_nothing_moves_leaves_no_trace(
    bits: str, lora: LoraAdapter, model: Any, batches: Any, monkeypatch: Any
) -> None:
    """A new student, on the model anew, goes on to the last bit as the old one would have."""

    def paused(self: Rounds, trainer: Any) -> Any:
        compact = trainer.student.compact()
        offer = rank_exchange.offer(compact, self.teacher, self.context)
        return self._onward(trainer, compact, compact, offer, offer.present)

    monkeypatch.setattr(Rounds, "_moved", paused)
    options = {"target_ratio": None, "total_rank": 11, "bits": bits}
    pausing, straight = (retrained(lora, model, batches, moves=moves, **options) for moves in (3, 0))
    assert same_payload(pausing.compact, straight.compact) and pausing.training.after == straight.training.after


@pytest.mark.medium
def test_never_worse_than_the_first_allocation(lora: LoraAdapter, model: Any, batches: Any) -> None:
    """Training that only does harm: the first allocation comes back."""
    wild = {**TRAIN, "lr": 300.0, "layerwise": False, "hidden": 0.0}
    done = retrained(lora, model, batches, retrain=wild, total_rank=11, target_ratio=None)
    first = retrained(lora, model, batches, retrain={**TRAIN, "steps": 1}, moves=0, total_rank=11, target_ratio=None)
    assert not done.training.improved and done.training.after == done.training.before == first.training.before
    assert sum(done.compact.config.ranks) == 11


def test_the_best_of_all_rounds_is_kept(lora: LoraAdapter, model: Any, batches: Any, monkeypatch: Any) -> None:
    """An exchange that ruins the adapter is undone, other ranks or not."""
    applied = rank_exchange.applied

    def ruined(*arguments: Any) -> CompactAdapter:
        changed = applied(*arguments)
        wild = {name: array * np.float32(64) for name, array in changed.tensors.items()}
        return replace(changed, tensors=wild)

    monkeypatch.setattr(rank_exchange, "applied", ruined)
    slow = {**TRAIN, "lr": 1e-3}
    done = retrained(lora, model, batches, retrain=slow, moves=1)
    (move,) = done.moves
    assert move.after > 2 * move.before and done.training.best_step <= move.step
    answers = answers_on(held_out(batches), model, lora, done.compact)
    assert answers.distance == pytest.approx(done.training.after.distance, rel=1e-5)
    assert answers.distance <= move.before * (1 + 1e-6)


def test_heads_train_through_the_rounds() -> None:
    """A classifier's head, in training, comes along where ranks move."""
    lora, model, batches = bert_classifier()
    before = snapshot(model)
    done = retrained(lora, model, batches, retrain={**TRAIN, "train_heads": True}, total_rank=4, target_ratio=None)
    assert snapshot(model) == before and done.moves and sum(done.compact.config.ranks) == 4
    first = api.allocate(lora, total_rank=4).compact
    assert done.training.improved and done.compact.extras != first.extras
    answers = answers_on(held_out(batches, "encoder"), model, lora, done.compact)
    assert answers.distance == pytest.approx(done.training.after.distance, rel=1e-4)


def test_options_that_cannot_be(lora: LoraAdapter, model: Any, batches: Any) -> None:
    for options, message in (
        ({"base": None}, "training needs the base"),
        ({"dry_run": True}, "known only after training"),
        ({"moves": -1}, "--moves is -1"),
        ({"retrain": {"step": 3}}, "retrain has no option 'step'"),
        ({"retrain": {"steps": 0}}, "--steps is 0"),
        ({"total_rank": 3}, "give one of"),
    ):
        with pytest.raises(OptionError, match=message):
            plain = {"rounds": 1, "exact": 3, "retrain": TRAIN, "target_ratio": 6.0, "base": model, "data": batches}
            api.allocate(lora, **{**plain, **options})
    before = snapshot(model)
    with pytest.raises(BudgetError):
        retrained(lora, model, batches, target_ratio=None, target_size=300)
    assert snapshot(model) == before


@pytest.mark.medium
def test_the_command(tmp_path: Path) -> None:
    rows = [json.dumps({"text": "the words of a text " * (n % 5 + 1) + str(n)}) for n in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    words = [
        "lora-to-alora",
        ADAPTERS / "llama-plain",
        "--target-ratio",
        6,
        "--base",
        LLAMA,
        "--data",
        tmp_path / "texts.jsonl",
    ]
    words += ["--rounds", 1, "--exact", 2, "--train-steps", 6, "--moves", 2, "--device", "cpu"]

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
    assert "first allocation -> trained   6 steps" in shown and "components exchanged: " in shown
    for move in training["moves"]:
        assert f"{move['came']} for {move['went']} after step {move['step']}" in shown
    other = json.loads(invoke("-o", tmp_path / "z.lrc", "--json", "--seed", 1))
    assert (
        other["training"]["data"] == training["data"]
        and (tmp_path / "z.lrc").read_bytes() != (tmp_path / "x.lrc").read_bytes()
    )
