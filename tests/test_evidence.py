"""The harness behind docs/evidence.md: its numbers by hand, its keys, and that what was stopped goes on."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BASES, ROOT

_NAMES = ("accuracy", "cells", "chat", "encoder_evidence", "evidence", "forms", "intervals", "teachers")
_TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
_WORDS = (
    "the cat sat on the big red mat",
    "a dog ran in the sun",
    "she saw the little bird",
    "we went to the old house",
)


@pytest.fixture(scope="module")
def evidence() -> Iterator[Any]:
    """The script as a module; its short names are gone afterwards."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import evidence as module

        yield module
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in [name for name in sys.modules if name.split(".")[0] in _NAMES]:
            del sys.modules[name]


# --- metrics --------------------------------------------------------------------------------------------------------


def test_bleu_is_the_formula(evidence: Any) -> None:
    """Clipped counts of every order, the nearest reference's length, and the penalty of what is too short."""
    from chat import metrics

    (row,) = metrics.bleu_counts(["The the the cat sat"], [["the cat sat down now ok", "a cat sat"]])
    assert row.tolist() == [3, 2, 1, 0, 5, 4, 3, 2, 5, 6]
    full = metrics.bleu_counts(["a b c d e", "x"], [["a b c d e"], ["x y"]])
    expected = math.exp(1 - 7 / 6)  # every n-gram is right; 6 words for 7
    assert metrics.score_of(full.sum(0, keepdims=True)) == pytest.approx([expected])
    assert metrics.score_of(row[None]) == [0.0]


def test_shares_and_intervals_by_hand(evidence: Any) -> None:
    """KL closed, agreement and gain of four texts of one item each; a value that all texts share has no width."""
    from chat import metrics

    texts, ones = np.arange(4), np.ones((4, 1))

    def answers(kl: float, first: list[int], right: list[int]) -> Any:
        return metrics.Answers(np.full(4, kl), np.array(first), texts, np.hstack([np.array(right)[:, None], ones]))

    base, goal = answers(2.0, [9, 9, 9, 3], [0, 0, 0, 0]), answers(0.0, [0, 1, 2, 3], [1, 1, 1, 1])
    row = metrics.measured(base, goal, answers(0.5, [0, 1, 2, 9], [1, 1, 1, 0]))
    assert row["closed"] == [0.75, 0.75, 0.75]
    assert row["agreement"][0] == 0.75 and row["base_agreement"] == 0.25
    assert row["gain"][0] == 0.75 and row["gain"][1] < 0.75 < row["gain"][2]
    assert row["scores"] == [0.0, 1.0, 0.75] and row["items"] == row["texts"] == 4


def test_the_form_of_an_answer(evidence: Any) -> None:
    from chat.tasks import is_in_form

    assert is_in_form("4 and 5 is 4+5=<<4+5=9>>9.\n#### 9")
    assert not is_in_form("4+5=<<4+5=9>>9.\n#### nine") and not is_in_form("#### 9") and not is_in_form("9\n#### 9")


def test_rounding_of_peers(evidence: Any) -> None:
    """Levels are even and hold zero; bits are codes and a step for every group."""
    from chat.peers import components

    row = np.array([-1.0, -0.4, 0.0, 0.6, 2.0, 5.0])
    assert components.nearest(row, 2, 5) == pytest.approx([-1, 0, 0, 1, 2, 5], abs=1e-3)
    assert components.nearest_bits(6, 2, 5) == 6 * 2 + 2 * 18 and components.signs_bits(6, 5) == 6 + 2 * 16
    assert components.signs(np.array([1.0, -3.0, 5.0]), 2).tolist() == [2, -2, 5]


# --- cells ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(evidence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run of the task sst2 with made up reviews, on a tiny model."""
    import cells
    from chat import loras

    data = tmp_path / "assets" / "data" / "sst2"
    data.mkdir(parents=True)
    lines = [f"{words} and {n} more of them\t{n % 2}" for n in range(8) for words in _WORDS]
    (data / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines]))
    (data / "test.tsv").write_text("\n".join(["sentence\tlabel", *(f"{words}\t1" for words in _WORDS)]))
    shutil.copytree(BASES / "tiny-llama", tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": _TEMPLATE}))
    monkeypatch.setattr(cells, "ASSETS", tmp_path / "assets")
    monkeypatch.setattr(cells, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(loras, "KEPT_EVERY", 2)
    monkeypatch.setattr(loras, "WARMUP", 1)
    monkeypatch.setattr(loras.train, "__kwdefaults__", {"rank": 4, "steps": 4, "seed": 0})
    return evidence.Run(tmp_path / "base", tmp_path / "kept", held=4, steps=32, batch_tokens=256)


def _sst2(evidence: Any, run: Any, **other: Any) -> Any:
    setting = next(s for s in evidence.settings(run) if s.task == "sst2" and s.mode == "refit")
    return replace(setting, **other)


def test_keys_change_with_what_changes_numbers(evidence: Any, run: Any) -> None:
    """Every field of a setting is in its key; lines of other keys, or of other commits, do not count as done."""
    setting = _sst2(evidence, run)
    others = [replace(setting, **{name: 7}) for name in vars(setting)]
    assert len({setting.key, *(other.key for other in others)}) == len(vars(setting)) + 1
    older = {setting.cell: {"key": replace(setting, code="0").key}}
    assert list(evidence.missing(iter([setting]), older, "", any_commit=False)) == [setting]
    assert not list(evidence.missing(iter([setting]), older, "", any_commit=True))
    assert not list(evidence.missing(iter([setting]), {setting.cell: {"key": setting.key}}, "", any_commit=False))
    assert not list(evidence.missing(iter([setting]), {}, "no such cell", any_commit=False))


def test_cells_have_names_of_their_own(evidence: Any, run: Any) -> None:
    wanted = list(evidence.settings(run))
    assert len({s.cell for s in wanted}) == len(wanted) == len({s.key for s in wanted})
    assert {s.task for s in wanted} == set(evidence.ORDER) and {s.share for s in wanted} == set(evidence.SHARES)


@pytest.mark.medium
def test_training_goes_on_where_it_was_stopped(evidence: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA whose training was stopped after a checkpoint is that of one that was not, bit by bit."""
    from chat import loras

    whole = evidence.teacher_of(run, "sst2").adapter / "adapter_model.safetensors"
    stopped, real = replace(run, folder=run.folder.with_name("stopped")), loras.inputs_of
    calls = iter([False, False, False, True])

    def failing(*given: Any) -> Any:
        if next(calls, False):
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(loras, "inputs_of", failing)
    with pytest.raises(KeyboardInterrupt):
        evidence.teacher_of(stopped, "sst2")
    monkeypatch.setattr(loras, "inputs_of", real)
    again = evidence.teacher_of(stopped, "sst2").adapter / "adapter_model.safetensors"
    assert again.read_bytes() == whole.read_bytes()


@pytest.mark.medium
def test_every_form_and_peer_is_measured_within_its_bytes(evidence: Any, run: Any) -> None:
    """A tiny model through all of the harness: files and peers keep to their share, and the page shows every cell."""
    from chat.page import page

    done = {}
    for form, mode in [
        *((form, "refit") for form in ("lowrank", *evidence.PEERS[:5])),
        *((form, "refined") for form in ("vblora", *evidence.TRAINED_PEERS)),
    ]:
        setting = _sst2(evidence, run, form=form, mode=mode, share=40.0)
        row = evidence.measured(run, setting)
        assert "share" in row, (form, row)
        assert row["share"] <= 40 and row["items"] >= 8 and row["closed"][0] <= 1, form
        done[setting.cell] = {**row, "setting": vars(setting), "commit": setting.code, "machine": "none"}
    assert done["sst2, 40%, SVD at int4, refit"]["closed"][0] > 0.5
    text = page(done)
    titles = [f"| 40 %, {s.form}, {s.mode}" for s in (evidence.Setting(**row["setting"]) for row in done.values())]
    assert all(title in text for title in titles) and text.count("Not run.") == 5


def test_the_page_says_which_rows_are_of_which_lora(evidence: Any, run: Any) -> None:
    """Rows of two trainings of one LoRA are told apart, and each training has its own figures."""
    from chat.page import page

    common = {"bytes": 9, "bits_per_component": 1.0, "agreement": [0.9], "texts": 7, "items": 70, "closed": [0.9] * 3}
    common |= {"gain": [1.0] * 3, "scores": [0.1, 0.5, 0.4], "base_agreement": 0.5, "commit": "none", "machine": "none"}
    done = {}
    for share, lora, kl in ((1.6, "one", 0.25), (0.8, "one", 0.25), (0.4, "two", 0.75)):
        setting = replace(_sst2(evidence, run, share=share), lora=lora)
        done[setting.cell] = {**common, "base_kl": kl, "setting": vars(setting)}
    text = page(done)
    assert "KL is 0.250 nats" in text and text.count("LoRA 2, another training") == 1
    assert "| 0.4 %, lowrank, refit, LoRA 2 |" in text and "| 1.6 %, lowrank, refit |" in text
    second = next(line for line in text.splitlines() if line.startswith("LoRA 2"))
    assert "KL is 0.750 nats" in second


def test_the_page_is_that_of_the_results(evidence: Any) -> None:
    assert (ROOT / "docs" / "evidence.md").read_text() == evidence.rendered()
