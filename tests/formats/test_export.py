"""What is exported is loaded by the real PEFT, with equal logits."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ADAPTERS, BASES, asset, random_lora

from lrconvert import api
from lrconvert.core import errors
from lrconvert.formats import fidelity
from lrconvert.formats.exporters import base as exporters
from lrconvert.formats.exporters.shared.peft_extras import saved_modules
from lrconvert.lora.adapter import ExtraTensor, Target, View
from lrconvert.methods import base as methods


def load_in_peft(base: str, folder, model_class: str = "AutoModelForCausalLM", **extra):
    """The PEFT model of an exported folder; fails on any missing or unexpected key."""
    import peft
    import torch
    import transformers

    model = getattr(transformers, model_class).from_pretrained(BASES / base, dtype=torch.float32, **extra)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        loaded = peft.PeftModel.from_pretrained(model, folder).eval()
    stored = peft.utils.load_peft_weights(str(folder), device="cpu")
    state = peft.get_peft_model_state_dict(loaded)
    assert set(stored) == set(state), set(stored) ^ set(state)
    return loaded


def logits(model, seed=0):
    import torch

    ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids).logits.double().numpy()


def dense_reference(base: str, compact, model_class="AutoModelForCausalLM", **extra):
    """A model with the expanded update added to its weights in fp32: our own answer."""
    import torch
    import transformers

    model = getattr(transformers, model_class).from_pretrained(BASES / base, dtype=torch.float32, **extra).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for target, a, b in methods.expand_all(compact):
            delta = torch.from_numpy(b.astype(np.float64) @ a)
            parameters[target.name] += (delta.T if target.view.kind == "transposed" else delta).float()
        for extra_tensor in compact.extras:
            value = np.frombuffer(extra_tensor.data, np.float32).reshape(extra_tensor.shape)
            parameters[extra_tensor.name].copy_(torch.from_numpy(value.copy()))
    return model


CASES = [
    ("llama-plain", "tiny-llama", "AutoModelForCausalLM", {}),
    ("llama-patterns", "tiny-llama", "AutoModelForCausalLM", {}),
    ("gpt2-conv1d", "tiny-gpt2", "AutoModelForCausalLM", {}),
    ("bert-classifier", "tiny-bert", "AutoModelForSequenceClassification", {"num_labels": 3}),
]


@pytest.mark.parametrize("keep_ranks", [False, True])
@pytest.mark.parametrize(("adapter", "base", "model_class", "extra"), CASES)
def test_peft_lora_has_our_logits(adapter, base, model_class, extra, keep_ranks, tmp_path):
    lora = api.load_lora(ADAPTERS / adapter)
    compact = api.convert(lora, "lowrank", bits=3).compact
    api.export(compact, tmp_path / "out", to="peft-lora", keep_ranks=keep_ranks, source=lora)
    theirs = logits(load_in_peft(base, tmp_path / "out", model_class, **extra))
    ours = logits(dense_reference(base, compact, model_class, **extra))
    assert np.abs(theirs - ours).max() <= 1e-5 * np.abs(ours).max()


VBLORA = [{"top_k": 1}, {"top_k": 2, "bits": 8}, {"top_k": 3, "num_vectors": 300, "vector_length": 16}]


@pytest.mark.parametrize("options", VBLORA, ids=lambda o: f"k{o['top_k']}")
@pytest.mark.parametrize(("adapter", "base"), [("llama-plain", "tiny-llama"), ("gpt2-conv1d", "tiny-gpt2")])
def test_peft_vblora_has_our_logits(adapter, base, options, tmp_path):
    settings = {"peft_compatible": True, "rank": 2, "num_vectors": 64, "vector_length": 8, **options}
    compact = api.convert(api.load_lora(ADAPTERS / adapter), "vblora", **settings).compact
    api.export(compact, tmp_path / "out", to="peft-vblora")
    theirs = logits(load_in_peft(base, tmp_path / "out"))
    ours = logits(dense_reference(base, compact))
    assert np.abs(theirs - ours).max() <= 1e-5 * np.abs(ours).max()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"vector_length": 8, "num_vectors": 16}, "gains"),
        ({"vector_length": 7, "num_vectors": 16, "gain": "off"}, "cut sub-vectors"),
        ({"vector_length": 8, "num_vectors": 16, "passes": 2}, "several passes"),
    ],
)
def test_what_peft_cannot_express_is_refused_by_name(options, reason, tmp_path):
    compact = api.convert(random_lora(), "vblora", **options).compact
    with pytest.raises(errors.ExportError, match=reason):
        api.export(compact, tmp_path / "out", to="peft-vblora")
    with pytest.raises(errors.ExportError, match="not vblora"):
        api.export(api.convert(random_lora(), "lowrank", bits=4).compact, tmp_path / "out", to="peft-vblora")
    assert list(tmp_path.iterdir()) == []


def test_lossless_export_gives_the_sources_logits(tmp_path):
    compact = api.convert(api.load_lora(ADAPTERS / "llama-plain"), "lowrank", bits=14).compact
    api.export(compact, tmp_path / "out", to="peft-lora")
    ours = logits(load_in_peft("tiny-llama", tmp_path / "out"))
    theirs = logits(load_in_peft("tiny-llama", ADAPTERS / "llama-plain"))
    assert np.abs(theirs - ours).max() <= 1e-3 * np.abs(theirs).max()


def test_one_rank_for_every_server(tmp_path):
    """No pattern, alpha = r: a server that ignores patterns and rsLoRA computes the same."""
    compact = api.convert(api.load_lora(ADAPTERS / "llama-patterns"), "lowrank", bits=8).compact
    api.export(compact, tmp_path / "out", to="peft-lora")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    again = api.load_lora(tmp_path / "out")
    assert {p.rank for p in again.targets} == {config["r"]} and {p.scale for p in again.targets} == {1.0}
    assert fidelity.fidelity(again, compact).captured > 1 - 1e-10


def test_pruned_modules_are_left_out(tmp_path):
    lora = api.load_lora(ADAPTERS / "llama-plain")
    compact = api.convert(lora, "lowrank", target_ratio=20).compact
    kept = [t.name for t, r in zip(compact.targets, compact.config.counts, strict=True) if r]
    assert 0 < len(kept) < len(compact.targets)
    fused = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
    groups = [[above, group] for n in kept for above, _, leaf in [n.removesuffix(".weight").rpartition(".")]
              for group in fused if leaf in group]  # fmt: skip
    beside = {f"{above}.{leaf}" for above, group in groups for leaf in group}
    api.export(compact, tmp_path / "out", to="peft-lora")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {n.removesuffix(".weight") for n in kept} | beside
    load_in_peft("tiny-llama", tmp_path / "out")


def test_task_base_and_card(tmp_path):
    lora = api.load_lora(ADAPTERS / "bert-classifier")
    compact = api.convert(lora, "lowrank", bits=4).compact
    api.export(compact, tmp_path / "out", to="peft-lora", source=lora, command="lrconvert export x")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["base_model_name_or_path"] == lora.provenance.base_model
    assert config["modules_to_save"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "lrconvert export x" in card
    assert all(f"`{p.target.name}`" in card for p in lora.targets)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_narrow_factors(dtype, tmp_path):
    lora = api.load_lora(ADAPTERS / "llama-plain")
    compact = api.convert(lora, "lowrank", bits=14).compact
    api.export(compact, tmp_path / "out", to="peft-lora", dtype=dtype)
    again = api.load_lora(tmp_path / "out")
    assert {p.a.dtype for p in again.targets} == {dtype}
    assert fidelity.fidelity(again, compact).captured > (1 - 1e-6 if dtype == "F16" else 1 - 1e-4)


def test_unknown_layout_and_nothing_left_behind(tmp_path):
    compact = api.convert(random_lora(), "lowrank", bits=4).compact
    with pytest.raises(errors.ExportError, match="peft-lora"):
        api.export(compact, tmp_path / "out", to="onnx")
    odd = random_lora()
    first = replace(odd.targets[0], target=Target("layers.0.proj.weight", (48, 16), View("rows:0:24")))
    sliced = api.convert(replace(odd, targets=(first,)), "lowrank", bits=4).compact
    with pytest.raises(errors.ExportError, match="rows:0:24"):
        api.export(sliced, tmp_path / "out", to="peft-lora")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["peft-lora", "peft-miss", "raw"])
def test_only_what_an_export_wrote_is_replaced(to, tmp_path):
    """``overwrite`` replaces the folder of an export, of whichever layout, and no folder with anything else in it."""
    lora = random_lora()
    form = {"peft-miss": "bone"}.get(to, "lowrank")
    compact = api.convert(
        lora, form, **({"rank": 2} if form == "bone" else {"bits": 12} if form == "lowrank" else {})
    ).compact
    out, mine = tmp_path / "out", tmp_path / "mine"
    api.export(compact, out, to=to)
    api.export(compact, out, to=to, overwrite=True)
    before = sorted(path.name for path in out.iterdir())
    for name, make in (
        ("notes.txt", Path.touch),
        ("checkpoints", Path.mkdir),
        ("data.json", lambda p: p.symlink_to(out)),
    ):
        make(out / name)
        with pytest.raises(errors.OutputPathError, match=re.escape(name)):
            api.export(compact, out, to=to, overwrite=True)
        assert sorted(path.name for path in out.iterdir()) == sorted([*before, name])
        (out / name).rmdir() if name == "checkpoints" else (out / name).unlink()
    mine.mkdir()
    (mine / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(errors.OutputPathError, match="no export wrote it"):
        api.export(compact, mine, to=to, overwrite=True)
    assert (mine / "model.safetensors").read_bytes() == b"mine"


def test_extras_without_a_listed_module_are_saved_by_their_own():
    lora = random_lora()
    extras = (
        ExtraTensor("head.dense.weight", "F32", (1,), b"\0" * 4),
        ExtraTensor("head.out.bias", "F32", (1,), b"\0" * 4),
    )
    compact = api.convert(replace(lora, extras=extras), "lowrank", bits=4).compact
    assert saved_modules(compact, compact.extras) == ["head.dense", "head.out"]
    listed = replace(compact, provenance=replace(compact.provenance, fields={"modules_to_save": "head,score"}))
    assert saved_modules(listed, listed.extras) == ["head", "score"]


def test_every_exporter_has_an_id_and_a_title_for_one_line_of_help():
    for name in exporters.ids():
        exporter = exporters.get(name)
        assert exporter.id == name and 0 < len(exporter.title) <= 70 and not exporter.title.endswith(".")


def test_real_adapter_survives_the_round_trip(tmp_path):
    lora = api.load_lora(asset("adapters/gemma3_270m_svg_adapter"))
    compact = api.convert(lora, "lowrank", target_ratio=10).compact
    api.export(compact, tmp_path / "out", to="peft-lora")
    assert fidelity.fidelity(api.load_lora(tmp_path / "out"), compact).captured > 1 - 1e-10
