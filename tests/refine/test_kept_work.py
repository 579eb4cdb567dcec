"""A compression by answers that is broken off: what was measured is kept, and the end is the same, to the last bit."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ADAPTERS, BASES

from lrconvert import api
from lrconvert.cli import cli
from lrconvert.convert import compress as ranking
from lrconvert.core.errors import BudgetError, OptionError, OutputExistsError, StatisticsError
from lrconvert.refine import kept_values, kept_work, self_generated_data, successive_halving
from lrconvert.refine.kept_work import KeptWork
from lrconvert.report.compression import compression_json

LLAMA, LORA = BASES / "tiny-llama", ADAPTERS / "llama-plain"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps, and states of trainings that are kept at every chance."""
    monkeypatch.setattr(successive_halving, "STEPS", 3)
    monkeypatch.setattr(successive_halving, "_OFTEN", 2)
    monkeypatch.setattr(kept_work, "EVERY", 0.0)


def words(folder: Path, seed: int = 0) -> Path:
    path, rng = folder / f"words-{seed}.jsonl", np.random.default_rng(seed)
    rows = [{"text": " ".join(rng.choice(["the", "sea", "is", "wide", "and", "old"], 10))} for _ in range(80)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def asked(folder: Path, **more: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {"base": LLAMA, "data": words(folder), "forms": ["lowrank", "bone"], "steps": 5}
    return {**plain, "batch_tokens": 256, **({} if "max_loss" in more else {"target_ratio": 12}), **more}


class Stop(KeyboardInterrupt):
    """Ctrl-C."""


def broken(out: Path, at: int, given: dict[str, Any], resume: bool = False) -> int:
    """Compress, and stop when something is to be kept for the time number `at`; returns how often something was."""
    times, write = 0, KeptWork._write

    def count(self: KeptWork) -> None:
        nonlocal times
        times += 1
        if times == at:
            raise Stop
        write(self)

    with pytest.MonkeyPatch.context() as patch, suppress(Stop):
        patch.setattr(KeptWork, "_write", count)
        api.compress(LORA, out=out, resume=resume, **given)
    return times


def shown(done: api.Compression) -> str:
    return json.dumps(compression_json(done), sort_keys=True)


@pytest.mark.medium
@pytest.mark.parametrize("more", [{}, {"max_loss": 0.4, "forms": ["lowrank"]}], ids=["rounds", "bisection"])
def test_what_was_broken_off_ends_as_without_a_pause(tmp_path: Path, more: dict[str, Any]) -> None:
    """Broken off again and again at sampled moments, each time a little later: the file is the same bytes, and all
    numbers of the report are; nothing else is left."""
    given = asked(tmp_path, **more)
    plain, out = tmp_path / "plain.lrc", tmp_path / "out.lrc"
    whole = api.compress(LORA, out=plain, **given)
    kept = out.with_name("out.lrc.partial")
    sizes = []
    for at in (4, 8):  # each goes on
        assert broken(out, at, given, resume=bool(sizes)) == at
        assert kept.exists() and not out.exists()
        sizes.append(len(KeptWork.opened(kept, _about(kept), api.load_lora(LORA))._pieces))
    assert sizes == sorted(sizes) and sizes[0] >= 3
    resumed = api.compress(LORA, out=out, resume=True, **given)
    assert out.read_bytes() == plain.read_bytes() and shown(resumed) == shown(whole)
    assert repr(resumed.verdict) == repr(whole.verdict)
    assert {p.name for p in tmp_path.iterdir()} == {"plain.lrc", "out.lrc", given["data"].name}


def _about(kept: Path) -> dict[str, str]:
    from lrconvert.lora import statistics_file

    about: dict[str, str] = statistics_file.read_partial(kept, key=kept_work.KEY)[0]["about"]
    return about


@pytest.mark.medium
def test_what_is_kept_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits above all. And a training goes on where it was, not where it began."""
    given, out = asked(tmp_path, forms=["lowrank"], steps=20), tmp_path / "out.lrc"
    total = broken(out, 0, given)
    out.unlink()
    assert broken(out, total - 3, given) == total - 3
    fits: list[str] = []
    monkeypatch.setattr(ranking, "convert_prepared", lambda *a, **k: fits.append("again"))
    seen: list[int] = []
    train = successive_halving.RefineRun.run

    def count(self: Any, progress: Any) -> Any:
        state = None if self.store is None else self.store.read(self._about())
        seen.append(-1 if state is None else state.step)
        return train(self, progress)

    monkeypatch.setattr(successive_halving.RefineRun, "run", count)
    api.compress(LORA, out=out, resume=True, **given)
    assert not fits and len(seen) == 1 and seen[0] > 3


@pytest.mark.medium
def test_unfinished_work_of_something_else_is_refused(tmp_path: Path) -> None:
    """By what is another; without `resume` it is neither used nor overwritten; nothing of it is changed."""
    given, out = asked(tmp_path, forms=["lowrank"]), tmp_path / "out.lrc"
    broken(out, 3, given)
    kept = out.with_name("out.lrc.partial")
    before = kept.read_bytes()
    assert api.recover(out).unfinished == (kept.name,)
    with pytest.raises(OutputExistsError, match=r"unfinished work.*resume=True"):
        api.compress(LORA, out=out, **given)
    other = api.load_lora(LORA)
    pairs = (replace(other.targets[0], scale=2 * other.targets[0].scale), *other.targets[1:])
    for lora, change, what in (
        (LORA, {"target_ratio": 9}, "target_ratio"),
        (LORA, {"steps": 6}, "steps"),
        (LORA, {"seed": 1}, "seed"),
        (LORA, {"data": words(tmp_path, 1)}, "data"),
        (replace(other, targets=pairs), {}, "LoRA"),
        (LORA, {"rank_by": "fit", "data": None}, "ranking by answers"),
    ):
        with pytest.raises(StatisticsError, match=f"unfinished work.* {what}"):
            api.compress(lora, out=out, resume=True, **{**given, **change})
    assert kept.read_bytes() == before
    kept.write_bytes(before[:-3])
    with pytest.raises(api.LrcError, match=r"out\.lrc\.partial"):
        api.compress(LORA, out=out, resume=True, **given)


@pytest.mark.medium
def test_a_loss_that_cannot_be_had_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="no size is surely within"):
        api.compress(LORA, out=tmp_path / "x.lrc", **asked(tmp_path, max_loss=1e-9, forms=["bone"], steps=0))
    assert [p.suffix for p in tmp_path.iterdir()] == [".jsonl"]


def test_where_there_is_nothing_to_go_on_with(tmp_path: Path) -> None:
    """In Python it needs an output; a batch goes on by itself; the command starts anew without anything."""
    with pytest.raises(OptionError, match="out="):
        api.compress(LORA, target_ratio=12, resume=True)
    with pytest.raises(OptionError, match="batch passes by"):
        api.compress_many([LORA], tmp_path / "many", resume=True)
    words_ = ["compress", LORA, "-o", tmp_path / "x.lrc", "--target-ratio", 12, "--methods", "lowrank", "--resume"]
    assert CliRunner().invoke(cli, [*map(str, words_)], catch_exceptions=False).exit_code == 0
    with pytest.raises(api.LrcError, match="also the input"):
        api.compress(LORA, out=LORA / "adapter_model.safetensors", overwrite=True)


@pytest.mark.medium
def test_texts_of_its_own_go_on_where_they_were(tmp_path: Path) -> None:
    """The same texts as without a pause, from the state of the random numbers."""
    from lrconvert.live.load_model import load_model, load_tokenizer

    model, tokenizer = load_model(LLAMA), load_tokenizer(LLAMA)
    size: dict[str, Any] = {"length": 8, "tokens": 160, "batch_tokens": 16, "seed": 0}
    whole = self_generated_data.sample(model, tokenizer, progress=lambda s, t: None, **size)
    lora = api.load_lora(LORA)
    work = KeptWork.opened(tmp_path / "x.partial", {}, lora)

    def stop(share: float, text: str) -> None:
        if share > 0.5:
            raise Stop

    with pytest.raises(Stop):
        self_generated_data.sample(model, tokenizer, progress=stop, store=work.under_way("texts"), **size)
    again, calls = KeptWork.opened(tmp_path / "x.partial", {}, lora), []
    store = again.under_way("texts")
    rest = self_generated_data.sample(model, tokenizer, progress=lambda s, t: calls.append(s), store=store, **size)
    assert rest == whole and calls[0] > 0.4


def test_values_come_back_to_the_last_bit() -> None:
    """Of all kinds that are kept; what is of no known kind is refused, and so is a text that names another one."""
    done = api.compress(LORA, target_ratio=12, forms=["lowrank", "nola"])
    for value in (*done.candidates, BudgetError("no", fix="so", smallest=3), (1.1, None, {"a": float("inf")}, b"")):
        blobs: dict[str, bytes] = {}
        again = kept_values.of_text(kept_values.text_of(value, blobs), blobs)
        if isinstance(value, BudgetError):
            assert (str(again), again.smallest) == (str(value), 3)
        elif isinstance(value, tuple):
            assert again == value
        else:
            one, two = (b"".join(_encoded(c)) for c in (value, again))
            assert one == two and again.conversion.fidelity == value.conversion.fidelity
    with pytest.raises(TypeError):
        kept_values.text_of(object(), {})
    with pytest.raises(KeyError):
        kept_values.of_text('{"kind": "Path", "fields": {}}', {})


def _encoded(candidate: Any) -> Any:
    from lrconvert.formats.lrc import file

    return file.encode(candidate.conversion.compact)
