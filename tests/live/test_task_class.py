"""An adapter that brings the head of its task, on a base that was saved without one; right answers where labels are."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from click.testing import CliRunner
from conftest import ADAPTERS, BASES
from models import auto, extra, load_all, save_base, token_batches

from lrconvert import api
from lrconvert.cli import cli
from lrconvert.core.errors import PlacementError
from lrconvert.live.load_model import load_model
from lrconvert.lora.adapter import LoraAdapter

pytestmark = pytest.mark.medium
BERT, CLASSIFIER = BASES / "tiny-bert", ADAPTERS / "bert-classifier"


def labelled(folder: Path, labels: bool = True) -> Path:
    path, rng = folder / "labelled.jsonl", np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(["the", "sea", "is", "wide", "old"], 6))} for _ in range(60)]
    rows = [{**row, **({"label": int(rng.integers(3))} if labels else {})} for row in rows]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def headless(task: str, labels: int) -> tuple[LoraAdapter, Path]:
    """A LoRA with the head of a decoder that tells `labels` classes apart, and its base, which has another head."""
    lora, rng = api.load_lora(ADAPTERS / "llama-plain"), np.random.default_rng(0)
    head = extra("score.weight", rng.standard_normal((labels, 64)))
    return replace(lora, extras=(head,), provenance=replace(lora.provenance, task_type=task)), BASES / "tiny-llama"


def test_a_plain_encoder_serves_as_one_with_a_head(tmp_path: Path) -> None:
    """All that measures, and all that trains, gives what it gives on the base saved with a head, which has other
    numbers: the adapter's own take its place."""
    data, saved = labelled(tmp_path), tmp_path / "saved"
    shutil.copytree(BERT, saved)
    torch.manual_seed(1)
    auto("SequenceClassification").from_pretrained(BERT, num_labels=3).save_pretrained(saved)
    small = api.convert(CLASSIFIER, "lowrank", target_ratio=4).compact
    both = [api.compare(CLASSIFIER, small, base=base, data=data)[0] for base in (BERT, saved)]
    assert both[0] == both[1] and both[0].answers.accuracy is not None
    one, two = (api.statistics(base, data, adapter=CLASSIFIER) for base in (BERT, saved))
    assert one.tokens == two.tokens and all(
        np.array_equal(a.matrix, b.matrix)
        for a, b in zip(*[[s.load(n) for n in range(2)] for s in (one, two)], strict=True)
    )
    few = {"steps": 2, "eval_every": 1, "batch_tokens": 128}
    plain = api.convert(CLASSIFIER, "lowrank", target_ratio=4).compact
    trained = [api.refine(plain, CLASSIFIER, base, data, **few) for base in (BERT, saved)]
    assert trained[0].after == trained[1].after
    done = api.compress(CLASSIFIER, base=BERT, data=data, target_ratio=4, forms=["lowrank"], budget_minutes=0.02)
    assert done.judged is not None and done.judged.accuracy is not None


def test_accuracy_is_the_share_of_right_answers(tmp_path: Path) -> None:
    """Counted by hand, of base, LoRA and file; in the table and in JSON, with intervals; nothing without labels."""
    lora = api.load_lora(CLASSIFIER)
    small = api.convert(lora, "lowrank", bits=1, rank=1).compact
    model = auto("SequenceClassification").from_pretrained(BERT, num_labels=3).eval()
    batches = [{**batch, "labels": torch.arange(len(batch["input_ids"])) % 3} for batch in token_batches(8, 6, 9)]
    batches[0]["labels"][0] = -100
    accuracy = api.compare(lora, small, base=model, data=batches)[0].answers.accuracy
    assert accuracy is not None
    for adapter, measured in ((lora, accuracy.lora), (small, accuracy.file)):
        api.attach(model, adapter)
        with torch.no_grad():
            answers = [model(input_ids=b["input_ids"], attention_mask=b.get("attention_mask")) for b in batches]
        api.detach(model)
        right = torch.cat([a.logits.argmax(-1) == b["labels"] for a, b in zip(answers, batches, strict=True)])
        assert measured.value == pytest.approx(float(right.sum()) / (len(right) - 1))
        assert measured.low < measured.value < measured.high
    assert accuracy.change.value == pytest.approx(accuracy.file.value - accuracy.lora.value)
    api.write(small, tmp_path / "s.lrc")
    words = ["compare", CLASSIFIER, tmp_path / "s.lrc", "--base", BERT, "--data", labelled(tmp_path)]
    shown = CliRunner().invoke(cli, [*map(str, words)], catch_exceptions=False).stdout
    assert "accuracy" in shown and "loss, nats" in shown and "In brackets the 95% interval" in shown
    assert max(map(len, shown.splitlines())) <= 100 and shown.count("[") >= 11
    told = json.loads(CliRunner().invoke(cli, [*map(str, words), "--json"], catch_exceptions=False).stdout)
    answers = told["files"][0]["answers"]
    assert answers["accuracy"]["file"]["low"] <= answers["accuracy"]["file"]["value"] and answers["intervals"]
    plain = api.compare(CLASSIFIER, small, base=BERT, data=labelled(tmp_path, labels=False))[0].answers
    assert plain.accuracy is None and plain.loss is None


@pytest.mark.parametrize("labels", [2, 5])
def test_a_decoder_gets_the_class_of_the_task(labels: int) -> None:
    """With as many labels as the head has, and a token by which the end of a padded text is known."""
    lora, base = headless("SEQ_CLS", labels)
    model: Any = load_model(base, adapter=lora)
    assert type(model).__name__ == "LlamaForSequenceClassification" and model.config.num_labels == labels
    assert model.config.pad_token_id is not None
    api.attach(model, lora)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert model(ids).logits.shape == (1, labels)
    assert type(load_model(base, adapter=replace(lora, extras=()))).__name__ == "LlamaForCausalLM"
    unsaid = replace(lora, provenance=replace(lora.provenance, task_type=""))
    assert type(load_model(base, adapter=unsaid)).__name__ == "LlamaForCausalLM"  # E-PLACE says what to do


def test_what_neither_has_is_not_made_up(tmp_path: Path) -> None:
    """A pooler with random numbers is not the one that the adapter was trained on."""
    tensors = {name: value for name, value in load_all(BERT).items() if "pooler" not in name}
    base = save_base(tmp_path / "base", [tensors], json.loads((BERT / "config.json").read_text()))
    with pytest.raises(PlacementError, match=r"needs 'bert\.pooler\.dense\.bias', which the base lacks nor 1 more"):
        load_model(base, adapter=api.load_lora(CLASSIFIER))
