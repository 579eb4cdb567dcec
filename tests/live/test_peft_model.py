"""`peft_model`: any adapter as one of PEFT's on a live model computes what our own attach does, and is PEFT's."""

from __future__ import annotations

import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import ADAPTERS, BASES

import lrconvert
from lrconvert.core.errors import ArgumentError, AttachError, DependencyError

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

UNTIED = ("tiny-llama", "llama-plain")
TIED = ("tiny-gpt2", "gpt2-conv1d")
# Bat's blocks and PEFT's are added in another order, and updates to tied weights twice.
BOUND = 2e-5
FORMS = ("lowrank", "vblora", "nola", "sbora", "bone", "alora")


def model_of(base: str) -> Any:
    config = transformers.AutoConfig.from_pretrained(BASES / base)
    return getattr(transformers, config.architectures[0]).from_pretrained(BASES / base, dtype=torch.float32).eval()


def answers(model: Any) -> Any:
    ids = torch.tensor([[5, 17, 3, 44, 8, 21], [9, 2, 31, 7, 60, 11]])
    with torch.no_grad():
        return model(input_ids=ids).logits


def assert_equal(one: Any, other: Any) -> None:
    assert (one - other).abs().max() <= BOUND * other.abs().max()


@cache
def compact(base: str, adapter: str, form: str) -> Any:
    lora = lrconvert.load_lora(ADAPTERS / adapter, base=BASES / base)
    if form == "bat":
        return lrconvert.convert(lora, form, rank=4, base=BASES / base)
    return lrconvert.convert(lora, form, target_ratio=3, base=BASES / base)


def attached_answers(base: str, adapter: Any) -> Any:
    model = model_of(base)
    before = answers(model)
    lrconvert.attach(model, adapter)
    after = answers(model)
    assert (after - before).abs().max() > 100 * BOUND * before.abs().max(), "the adapter changes nothing"
    return after


@pytest.mark.medium
@pytest.mark.parametrize(("base", "adapter"), [UNTIED, TIED])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_what_attach_does(base: str, adapter: str, form: str) -> None:
    """Outputs are those of our own attach, on tied weights as on others."""
    made = compact(base, adapter, form)
    assert_equal(answers(lrconvert.peft_model(model_of(base), made)), attached_answers(base, made))


def test_bat_is_pefts_own() -> None:
    """Updates that depend on the base's weights are computed by PEFT's MiSS."""
    made = compact(*UNTIED, "bat")
    model = lrconvert.peft_model(model_of("tiny-llama"), made)
    assert model.peft_config["default"].peft_type == "MISS"
    assert_equal(answers(model), attached_answers("tiny-llama", made))


@pytest.mark.medium
@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        ("tiny-llama", "llama-dora"),
        ("tiny-llama", "llama-lmhead"),
        ("tiny-llama", "llama-patterns"),
    ],
)
def test_parts_beside_the_factors(base: str, adapter: str) -> None:
    """Magnitudes, heads and ranks of their own are in the PEFT model: they change its answers as they do ours."""
    made = lrconvert.convert(ADAPTERS / adapter, "lowrank", base=BASES / base, target_ratio=2)
    model = lrconvert.peft_model(model_of(base), made)
    assert_equal(answers(model), attached_answers(base, made))


def test_a_lora_of_any_layout() -> None:
    """A LoRA needs no conversion: by its path or loaded, its factors are those of the file."""
    expected = attached_answers("tiny-llama", ADAPTERS / "llama-plain")
    for lora in (ADAPTERS / "llama-plain", lrconvert.load_lora(ADAPTERS / "llama-plain")):
        assert_equal(answers(lrconvert.peft_model(model_of("tiny-llama"), lora)), expected)


def test_it_is_pefts_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients flow to all factors and to nothing else, a second file is one more adapter, `set_adapter` chooses,
    `save_pretrained` and `merge_and_unload` keep the answers; no file is left anywhere."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    lora = lrconvert.load_lora(ADAPTERS / "llama-plain")
    small, large = (lrconvert.convert(lora, "lowrank", target_ratio=ratio) for ratio in (8, 2))
    lrconvert.write(small, tmp_path / "small.lrc")
    model = lrconvert.peft_model(model_of("tiny-llama"), tmp_path / "small.lrc")
    assert type(model).__name__ == "PeftModelForCausalLM" and list(scratch.iterdir()) == []
    one = answers(model)

    ids = torch.tensor([[5, 17, 3, 44]])
    model(input_ids=ids, labels=ids).loss.backward()
    taught = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert taught and all(".lora_A.default." in name or ".lora_B.default." in name for name in taught)
    model.zero_grad()

    assert lrconvert.peft_model(model, large, "second") is model and model.active_adapter == "second"
    two = answers(model)
    assert (one - two).abs().max() > BOUND
    model.set_adapter("default")
    assert torch.equal(answers(model), one)
    with pytest.raises(AttachError, match="taken"):
        lrconvert.peft_model(model, large, "second")

    model.save_pretrained(tmp_path / "saved", selected_adapters=["default"])
    again = peft.PeftModel.from_pretrained(model_of("tiny-llama"), tmp_path / "saved")
    assert_equal(answers(again), one)
    assert_equal(answers(model.merge_and_unload()), one)


IDS = [[5, 17, 3, 44, 8, 21], [9, 2, 31, 7, 60, 11]]


def trained(model: Any, rows: list[dict[str, Any]], out: Path) -> Path:
    """Two steps of transformers' Trainer; returns the folder that it saves."""
    arguments = transformers.TrainingArguments(
        **{"output_dir": str(out), "max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 2},
        **{"learning_rate": 1e-2, "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_only_model": True},
    )
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    model.eval()
    return out / "checkpoint-2"


@pytest.mark.medium
@pytest.mark.parametrize("form", [*FORMS, "bat"])
def test_trainer_trains_every_form(form: str, tmp_path: Path) -> None:
    """transformers' Trainer, whose accelerate comes with PEFT, takes the model as one of PEFT's. Two steps move numbers
    of the adapter alone. PEFT and lrconvert load what is saved, with the same answers. A second file stands beside it,
    `set_adapter` chooses one, and `merge_and_unload` leaves a plain model with these answers."""
    made = compact(*UNTIED, form)
    model = lrconvert.peft_model(model_of("tiny-llama"), made)
    before = {name: value.clone() for name, value in model.named_parameters()}
    saved = trained(model, [{"input_ids": row, "labels": row} for row in IDS] * 2, tmp_path)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all(".default" in name for name in moved)
    after = answers(model)

    assert_equal(answers(peft.PeftModel.from_pretrained(model_of("tiny-llama"), saved)), after)
    again = model_of("tiny-llama")
    lrconvert.attach(again, saved, base=BASES / "tiny-llama")
    assert_equal(answers(again), after)

    lrconvert.peft_model(model, made, "untrained")
    untrained = answers(model)
    model.set_adapter("default")
    assert torch.equal(answers(model), after) and (untrained - after).abs().max() > BOUND
    merged = model.merge_and_unload()
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert_equal(answers(merged), after)


@pytest.mark.medium
def test_trainer_trains_a_head(tmp_path: Path) -> None:
    """A classifier's head is in the model, is trained with the adapter, and is saved with it."""
    made = lrconvert.convert(ADAPTERS / "bert-classifier", "lowrank", rank=2, base=BASES / "tiny-bert")
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model = lrconvert.peft_model(load(BASES / "tiny-bert", num_labels=3), made)
    head = next(
        value for name, value in model.named_parameters() if name.endswith("classifier.modules_to_save.default.weight")
    )
    before = head.clone()
    saved = trained(model, [{"input_ids": row, "labels": n} for n, row in enumerate(IDS)] * 2, tmp_path)
    assert not torch.equal(head, before)
    again = peft.PeftModel.from_pretrained(load(BASES / "tiny-bert", num_labels=3), saved).eval()
    assert_equal(answers(again), answers(model))


@pytest.mark.parametrize(
    ("base", "kind", "adapter", "message"),
    [
        ("tiny-bert", "AutoModel", "bert-classifier", r"BertModel has no .*ForSequenceClassification.*num_labels=3"),
        ("tiny-bert", "AutoModelForSequenceClassification", "bert-classifier", r"is \[3\], \[2\] in .*num_labels=3"),
        ("tiny-llama", "AutoModel", "llama-plain", r"LlamaModel has no .*nor 13 other .*AutoModelForCausalLM"),
        ("tiny-gpt2", "AutoModelForCausalLM", "llama-plain", r"GPT2LMHeadModel has no .*the adapter's own base"),
    ],
)
def test_a_model_without_a_place_is_left_as_it_is(base: str, kind: str, adapter: str, message: str) -> None:
    """The error names the call of transformers that loads a base with all places; the model is not touched."""
    model = getattr(transformers, kind).from_pretrained(BASES / base)
    before = list(model.state_dict())
    with pytest.raises(AttachError, match=message):
        lrconvert.peft_model(model, ADAPTERS / adapter)
    assert list(model.state_dict()) == before


def test_frozen_on_demand() -> None:
    model = lrconvert.peft_model(model_of("tiny-llama"), compact(*UNTIED, "lowrank"), trainable=False)
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without PEFT the error names the extra; what is no model or no adapter is E-ARGUMENT."""
    made = compact(*UNTIED, "lowrank")
    with pytest.raises(ArgumentError, match="model is"):
        lrconvert.peft_model(BASES / "tiny-llama", made)  # type: ignore[arg-type]
    for name in ("", "a.b"):
        with pytest.raises(AttachError, match="without dots"):
            lrconvert.peft_model(model_of("tiny-llama"), made, name)
    model = model_of("tiny-llama")
    lrconvert.attach(model, made)
    with pytest.raises(AttachError, match=r"lrconvert.detach\(model\)"):
        lrconvert.peft_model(model, made)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DependencyError, match=r"E-DEPENDENCY: PEFT is not installed\. Pip install 'lrconvert\[peft\]'"):
        lrconvert.peft_model(model_of("tiny-llama"), made)
