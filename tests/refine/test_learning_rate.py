"""Rates: how they rise and fall, what a probe tries, and that a training with one is the same again, resumed or not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from conftest import ADAPTERS, BASES
from models import token_batches

from lrconvert import api
from lrconvert.core.errors import StatisticsError
from lrconvert.live import load_model
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.refine import checkpoint, learning_rate
from lrconvert.refine.evaluation import TeacherModel
from lrconvert.refine.learning_rate import Clip, Tried
from lrconvert.refine.losses import Batch
from lrconvert.refine.trainer import Trainer

pytestmark = pytest.mark.medium  # of models

PROBED = {"steps": 40, "eval_every": 8, "batch_tokens": 96, "layerwise": False}  # branches of two steps


@pytest.fixture(scope="module")
def lora() -> LoraAdapter:
    return api.load_lora(ADAPTERS / "llama-plain")


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model.load_model(BASES / "tiny-llama").float()


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Any]]:
    return token_batches(12, 4, 12)


@pytest.fixture(autouse=True)
def short_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_rate, "_LEAST_STEPS", 1)


def events(log: Path, kind: str) -> list[dict[str, Any]]:
    return [event for line in log.read_text().splitlines() if (event := json.loads(line))["event"] == kind]


# --- what is computed -----------------------------------------------------------------------------------------------


def test_rates_rise_and_fall() -> None:
    """From near nothing to the highest within a tenth of the way, then down to a fiftieth, never above."""
    rates = [learning_rate.rate_at(n / 300, 300) for n in range(300)]
    top = rates.index(max(rates))
    assert 0 < rates[0] < 0.03 and top in (29, 30) and 0.98 < max(rates) <= 1.02
    assert rates[:top] == sorted(rates[:top]) and rates[30:] == sorted(rates[30:], reverse=True)
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)


@pytest.mark.parametrize(
    ("best", "multiples"), [(0.05, [1.0, 0.4, 0.16]), (0.4, [1.0, 0.4, 0.16]), (1.0, [1.0, 0.4]), (9.0, [1.0, 0.4])]
)
def test_a_probe_tries_less_while_that_is_better(best: float, multiples: list[float]) -> None:
    tried: list[Tried] = []
    while (multiple := learning_rate.next_multiple(tried)) is not None:
        tried.append(Tried(multiple, abs(math.log(multiple / best))))
    assert [branch.multiple for branch in tried] == pytest.approx(multiples)
    assert learning_rate.chosen(tried) == min(multiples, key=lambda m: abs(math.log(m / best)))


def test_of_equals_the_smallest_is_chosen() -> None:
    """Where all branches fail, too."""
    assert learning_rate.chosen([Tried(m, math.inf) for m in (1.0, 0.4, 0.16)]) == 0.16


def test_a_short_training_has_no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [learning_rate.branch_steps(steps) for steps in (4, 80, 100, 300)] == [0, 0, 5, 15]


def test_gradients_are_clipped_against_those_before() -> None:
    """What is four times the median of the last steps at most stays; before there are enough to compare, all does."""
    clip = Clip()
    assert [clip.factor(norm) for norm in (1.0, 100.0, 1.0, 1.0, 1.0)] == [1.0] * 5
    assert clip.factor(4.0) == 1.0 and clip.factor(8.0) == 0.5 and clip.factor(0.0) == 1.0
    for _ in range(40):
        clip.factor(8.0)
    assert clip.factor(32.0) == 1.0 and len(clip.norms) == 16


# --- in a training --------------------------------------------------------------------------------------------------


def test_the_probe_is_counted_and_a_rate_that_is_given_is_taken(
    lora: LoraAdapter, model: Any, batches: Any, tmp_path: Path
) -> None:
    compact = api.convert(lora, "lowrank", target_ratio=4).compact
    done = api.refine(compact, lora, model, batches, log=tmp_path / "probed", **PROBED)
    assert done.steps == 40 == len(events(tmp_path / "probed", "step"))
    (chosen,) = events(tmp_path / "probed", "rate")
    assert chosen["step"] == 2 * len(chosen["tried"]) and len(chosen["tried"]) in (2, 3)
    best = min(chosen["tried"], key=lambda branch: branch["distance"])
    assert chosen["rate"] == best["multiple"]
    api.refine(compact, lora, model, batches, log=tmp_path / "given", lr=1.0, **PROBED)
    assert not events(tmp_path / "given", "rate") and len(events(tmp_path / "given", "step")) == 40


def test_branches_begin_alike(
    lora: LoraAdapter, model: Any, batches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one state, on the same batches: the first loss of all branches is the same to the bit."""
    seen: list[float] = []
    step = Trainer._step

    def watched(self: Trainer, share: float) -> float:
        seen.append(step(self, share))
        return seen[-1]

    monkeypatch.setattr(Trainer, "_step", watched)
    compact = api.convert(lora, "vblora", target_ratio=12).compact
    api.refine(compact, lora, model, batches, **{**PROBED, "hidden": 0.0})
    assert seen[0] == seen[2] and seen[1] != seen[3]


@pytest.mark.parametrize("method", ["lowrank", "sbora"])
def test_killed_anywhere_it_ends_the_same(
    method: str, lora: LoraAdapter, model: Any, batches: Any, tmp_path: Path
) -> None:
    """Within a branch, at the end of one, after the probe, and after a return to the best point; the teacher's answers
    that were kept are lost."""
    compact = api.convert(lora, method, target_ratio=4).compact
    options = {**PROBED, "checkpoint_every": 1, "eval_every": 4, "layerwise": True}
    api.refine(compact, lora, model, batches, tmp_path / "whole.lrc", log=tmp_path / "log", **options)
    again = [event["step"] + 1 for event in events(tmp_path / "log", "again")]
    for place in (2, 3, 4, 6, 7, *again[:1]):
        out, steps = tmp_path / f"{place}.lrc", 0

        def stop(share: float, text: str, place: int = place) -> None:
            nonlocal steps
            steps += text.startswith("loss")
            if steps == place:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            api.refine(compact, lora, model, batches, out, progress=stop, **options)
        api.refine(compact, lora, model, batches, out, resume=True, **options)
        assert out.read_bytes() == (tmp_path / "whole.lrc").read_bytes(), place


@pytest.mark.parametrize("method", ["lowrank", "vblora"])
def test_without_a_gain_it_returns_to_its_best(
    method: str, lora: LoraAdapter, model: Any, batches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student is then exactly what was the best, the rates are half as large, and that is what is written if
    nothing better comes."""
    back = Trainer._return
    returns: list[float] = []

    def watched(self: Trainer, why: str) -> None:
        rate = self.state.rate
        back(self, why)
        assert self.state.rate == rate / 2 and self.measured().mean == self.state.best_distance
        returns.append(self.state.best_distance)

    monkeypatch.setattr(Trainer, "_return", watched)
    compact = api.convert(lora, method, target_ratio=4).compact
    done = api.refine(compact, lora, model, batches, lr=8.0, log=tmp_path / "log", **{**PROBED, "eval_every": 2})
    assert returns and done.after.distance <= min(returns)
    assert any("no better" in event["why"] for event in events(tmp_path / "log", "again"))


@pytest.mark.parametrize("more", [{}, {"hidden": 0.0}, {"autocast": "bf16"}], ids=["hidden", "logits", "bf16"])
def test_answers_that_are_kept_change_no_byte(
    more: dict[str, Any],
    lora: LoraAdapter,
    model: Any,
    batches: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With room for all answers, for some, and for none; with room, the teacher is asked once for each batch."""
    compact = api.convert(lora, "vblora", target_ratio=12).compact
    teacher, asked, counts = TeacherModel.teacher, 0, {}

    def counted(self: TeacherModel, batch: Batch, hidden: bool, training: bool = False) -> Any:
        nonlocal asked
        asked += 1
        return teacher(self, batch, hidden, training)

    monkeypatch.setattr(TeacherModel, "teacher", counted)
    for name, limit in (("all", 1.0), ("some", 0.0002), ("none", 0.0)):
        asked, few = 0, {**PROBED, "steps": 30, "answers_gb": limit}
        api.refine(compact, lora, model, batches, tmp_path / name, lr=0.3, **few, **more)
        counts[name] = asked
    assert counts["all"] < counts["some"] < counts["none"] and counts["none"] - counts["all"] == 30 - 11
    assert (tmp_path / "all").read_bytes() == (tmp_path / "some").read_bytes() == (tmp_path / "none").read_bytes()


def test_a_checkpoint_of_another_version_is_refused(
    lora: LoraAdapter, model: Any, batches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "o.lrc.partial"
    with monkeypatch.context() as older:
        older.setattr(checkpoint, "VERSION", 1)
        checkpoint.write(path, {}, checkpoint.State())
    compact = api.convert(lora, "lowrank", target_ratio=4).compact
    with pytest.raises(StatisticsError, match=r"partial: this checkpoint was written by another version.*remove it"):
        api.refine(compact, lora, model, batches, tmp_path / "o.lrc", resume=True, **PROBED)
