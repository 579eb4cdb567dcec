"""What the verdict rests on: answers text by text, on texts that chose nothing; the search for the smallest file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ADAPTERS, BASES

from lrconvert import api
from lrconvert.convert.compress import Candidate, Compression
from lrconvert.convert.verdict import Interval, Judged, LossBound, Scores
from lrconvert.core.errors import BudgetError, DataError
from lrconvert.live import attach
from lrconvert.refine import judging, smallest_file, successive_halving
from lrconvert.refine.attached_student import NAME
from lrconvert.refine.evaluation import TEACHER, ZERO
from lrconvert.refine.session import open_session
from lrconvert.refine.settings import RunOptions, Settings

LLAMA, LORA = BASES / "tiny-llama", ADAPTERS / "llama-plain"
NOTHING = Interval(0.0, 0.0, 0.0)


def words(folder: Path, count: int = 60) -> Path:
    path = folder / "words.jsonl"
    rng = np.random.default_rng(0)
    texts = [
        " ".join(rng.choice(["the", "sea", "is", "wide", "and", "old"], rng.integers(4, 14))) for _ in range(count)
    ]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


# --- texts one by one -----------------------------------------------------------------------------------------------


def test_sums_of_texts_are_those_of_all(tmp_path: Path) -> None:
    """Added up they are what refinement measures; each text's are those of the text alone; the loss is torch's."""
    lora = api.load_lora(LORA)
    compact = api.convert(lora, "lowrank", bits=3, rank=2).compact
    settings = Settings(batch_tokens=64)
    with open_session(LLAMA, lora, words(tmp_path), settings, RunOptions(), progress=lambda s, t: None) as session:
        pool, model = session.split.held_out, session.teacher_model.model
        with attach.temporarily(model, {NAME: compact}), torch.no_grad():
            sums, _ = judging._sums(session, pool, 64)
            whole = session.evaluator.sums((NAME,))
            one = judging._sums(session, pool.subset([0]), 64)[0][NAME]
            session.teacher_model.activate(NAME)
            batch = pool.batch([0])
            logits = model(**batch.inputs).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits.float(), batch.inputs["input_ids"][0, 1:], reduction="sum")
        assert sums[NAME].of("items").sum() == whole.items and len(sums[NAME].of("items")) == len(pool)
        assert sums[NAME].of("distance").sum() == pytest.approx(whole.distance, rel=1e-5)
        assert sums[NAME].of("agreed").sum() == whole.agreed and not sums[TEACHER].of("distance").any()
        sizes = [len(example.ids) for example in pool.examples]
        which = int(np.flatnonzero(np.isclose(sums[NAME].of("loss"), one.of("loss")[0], rtol=1e-4))[0])
        assert sorted(sums[ZERO].of("items")) == sorted(sizes) and sums[NAME].of("items")[which] == sizes[0]
        assert one.of("loss")[0] == pytest.approx(float(loss), rel=1e-4)
        judged = judging.judge(session, pool, compact, 64, is_fresh=True)
        teacher = judging.judge(session, pool, lora, 64, is_fresh=True, by_lora=True)
    assert judged.closed.low <= judged.closed.value <= judged.closed.high < 1
    assert judged.closed.value == pytest.approx(1 - whole.mean / session.base_distance.mean, rel=1e-4)
    assert judged.loss is not None and judged.accuracy is None
    assert judged.loss.change.value == pytest.approx(judged.loss.file.value - judged.loss.lora.value, abs=1e-9)
    assert teacher.closed.value == pytest.approx(1, abs=1e-5) and teacher.loss is None  # it wrote the texts


def test_what_is_set_aside_is_neither_trained_on_nor_chosen_by(tmp_path: Path) -> None:
    """Equal texts stay on one side; of few texts no more than a fifth goes, of two nothing."""
    lora = api.load_lora(LORA)
    for count, most in ((60, 20), (2, 0)):
        data = words(tmp_path, count)
        data.write_text(data.read_text() + "\n" + data.read_text())
        with open_session(LLAMA, lora, data, Settings(), RunOptions(), progress=lambda s, t: None) as session:
            kept, fresh = judging.set_aside(session, 0)
            again = judging.set_aside(session, 0)[1]
        before = {e.ids for e in session.split.train.examples}
        if not most:
            assert fresh is None and kept is session
            continue
        assert fresh is not None and again is not None and fresh.digest() == again.digest()
        apart = {e.ids for e in fresh.examples}
        assert 0 < len(fresh) <= most and apart | {e.ids for e in kept.split.train.examples} == before
        assert not apart & {e.ids for e in (*kept.split.train.examples, *kept.split.held_out.examples)}


def test_classes_give_accuracy() -> None:
    """Of a classifier: the share of right first choices, by hand."""
    transformers = pytest.importorskip("transformers")
    lora = api.load_lora(ADAPTERS / "bert-classifier")
    config = transformers.AutoConfig.from_pretrained(BASES / "tiny-bert", num_labels=3)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    draw = torch.Generator().manual_seed(0)
    data = [
        {"input_ids": torch.randint(3, 90, (4, 6), generator=draw), "labels": torch.randint(3, (4,), generator=draw)}
        for _ in range(8)
    ]
    with open_session(model, lora, data, Settings(), RunOptions(), progress=lambda s, t: None) as session:
        pool = session.split.train
        judged = judging.judge(session, pool, lora, 64, is_fresh=True)
        session.teacher_model.activate(TEACHER)
        with torch.no_grad():
            right = [
                session.teacher_model.model(b["input_ids"]).logits.argmax(-1) == b["labels"] for b in pool.model_inputs
            ]
    assert judged.accuracy is not None and judged.texts == judged.items == 4 * len(pool)
    assert judged.accuracy.file.value == pytest.approx(float(torch.cat(right).double().mean()))
    assert judged.accuracy.change == NOTHING


# --- the smallest file ----------------------------------------------------------------------------------------------


def judged_at(nbytes: int, needed: int, classes: bool) -> Judged:
    """Answers that a file of `needed` bytes just brings within 10 %, surely."""
    lost = 0.1 * needed / nbytes
    closed = Interval(1.01 - lost, 1 - lost, 1.02 - lost)
    scores = Scores(NOTHING, NOTHING, NOTHING, Interval(0.01 - lost, -lost, 0.02))
    return Judged("KL", 40, 400, NOTHING, NOTHING, closed, accuracy=scores if classes else None)


class Sized(Candidate):
    """A candidate of `steps` bytes."""

    @property
    def nbytes(self) -> int:
        return self.steps


def search(
    monkeypatch: pytest.MonkeyPatch, needed: int, bound: LossBound, classes: bool = True, end: float = float("inf")
) -> tuple[Compression, list[int]]:
    """Search among files of 700 to 90,000 bytes."""
    tried: list[int] = []

    def sized(candidate: Candidate, nbytes: int) -> Candidate:
        tried.append(nbytes)
        made = None if nbytes < 700 else candidate.conversion
        return replace(candidate, steps=min(nbytes, 90_000), conversion=made)

    def measured(self: Any, candidate: Candidate) -> Any:
        return smallest_file._Trial(candidate, judged_at(candidate.nbytes, needed, classes))

    monkeypatch.setattr(smallest_file.Search, "_measured", measured)
    session: Any = SimpleNamespace(split=SimpleNamespace(held_out=None))
    conversion: Any = object()
    fitted = Compression((Sized("lowrank", {}, conversion, steps=5000), Sized("nola", {}, None)), 0)
    run = smallest_file.Search(session, bound, 64, sized, end)
    return run.run(fitted, 100_000, lambda share, text: None), tried


@pytest.mark.parametrize("needed", [100, 1200, 4999, 5000, 33_333, 89_000])
@pytest.mark.parametrize("bound", [LossBound(0.1), LossBound(accuracy=0.1), LossBound(0.1, 0.1)])
def test_the_search_finds_the_smallest_size_that_does(
    monkeypatch: pytest.MonkeyPatch, needed: int, bound: LossBound
) -> None:
    """To a twentieth, never below it, with a handful of fits; of a form that is never too small its smallest."""
    done, tried = search(monkeypatch, needed, bound)
    smallest = max(needed, 700)
    assert smallest <= done.candidates[0].nbytes <= 1.06 * smallest + 1 and len(tried) <= 12
    assert done.candidates[0].after is not None and done.winner == 0


def test_a_bound_that_cannot_be_met_names_what_can(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        BudgetError, match=r"lowrank leaves 9\.\d% \(8\.\d% to 10\.\d%\) of the KL open at 90,000 bytes"
    ):
        search(monkeypatch, 95_000, LossBound(0.1))
    with pytest.raises(BudgetError, match=r"loses 9\.\d% \(-2\.0% to 10\.\d%\) of accuracy"):
        search(monkeypatch, 95_000, LossBound(accuracy=0.1))
    with pytest.raises(DataError, match="accuracy needs texts with classes"):
        search(monkeypatch, 1200, LossBound(accuracy=0.1), classes=False)


def test_a_search_out_of_time_keeps_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    done, tried = search(monkeypatch, 1200, LossBound(0.1), end=0.0)
    assert not tried and done.candidates[0].nbytes == 5000 and "budget_minutes" in done.left_out[0]


@pytest.mark.medium
def test_compress_within_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller loss takes a larger file, and the winner is measured on texts that the search did not see."""
    lora, data = api.load_lora(LORA), words(tmp_path, 120)
    sizes = []
    for asked, loss in (("60%", 0.6), (0.3, 0.3)):
        done = api.compress(lora, base=LLAMA, data=data, forms=["lowrank", "bone"], batch_tokens=256, max_loss=asked)
        judged, winner = done.judged, done.candidates[done.winner]
        assert judged is not None and judged.is_fresh and judged.texts == 20 and done.bound == LossBound(loss)
        assert winner.after is not None and winner.after.closed >= 1 - loss and winner.steps == 0
        assert done.verdict.ship == (judged.closed.value >= 1 - loss)
        sizes.append(done.chosen.sizes.adapter)
    assert sizes[0] < sizes[1]


@pytest.mark.medium
def test_rounds_are_cut_where_they_would_take_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is said; with time enough nothing is."""
    asked: dict[str, Any] = {"base": LLAMA, "data": words(tmp_path), "forms": ["lowrank"], "target_ratio": 8}
    monkeypatch.setattr(successive_halving, "STEPS", 3)
    assert not api.compress(LORA, batch_tokens=64, **asked).left_out
    monkeypatch.setattr(successive_halving, "MINUTES", 1e-6)
    rushed = api.compress(LORA, batch_tokens=64, **asked)
    assert len(rushed.left_out) == 2 and all("budget_minutes" in line for line in rushed.left_out)
