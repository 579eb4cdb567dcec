"""Merges against other people's programs: axolotl and diffusers merge the same, mergekit takes ours apart. PEFT, which
the tests depend on, is in test_merge.py. A peer without an environment is skipped by name: tests/peers/README.md."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ADAPTERS, BASES
from models import cast_base, config_of, load_all, one_target
from peers import oracle
from safetensors.torch import load_file

import lrconvert
from lrconvert.io import pipeline
from lrconvert.lora.adapter import LoraAdapter, Target, View

pytestmark = pytest.mark.slow

UNIT = {"F32": 2.0**-24, "BF16": 2.0**-9}  # half of the distance from 1 to the next number


def values(folder: Path) -> dict[str, np.ndarray]:
    return {name: stored.decode().astype(np.float64) for name, stored in load_all(folder).items()}


def test_axolotl_merges_the_same(tmp_path):
    oracle.needed("axolotl")
    cases = dict.fromkeys(("plain", "rslora", "patterns", "lmhead", "dora"), ("tiny-llama", UNIT["F32"]))
    cases["bf16"] = ("tiny-llama", UNIT["BF16"])  # it multiplies factors of bf16 in bf16
    cases["tied-bf16"] = ("tiny-llama-bf16", UNIT["BF16"])
    jobs = [(BASES / base, ADAPTERS / f"llama-{name}", tmp_path / name) for name, (base, _) in cases.items()]
    oracle.run("axolotl", *(word for job in jobs for word in job))
    for (base, adapter, theirs), (_, unit) in zip(jobs, cases.values(), strict=True):
        ours = tmp_path / "ours" / adapter.name
        ours.parent.mkdir(exist_ok=True)
        lrconvert.merge(base, adapter, ours)
        before, mine, other = map(values, (base, ours, theirs))
        assert mine.keys() == other.keys() and config_of(ours) == config_of(theirs)
        for name, merged in mine.items():
            assert np.abs(merged - other[name]).max() <= 4 * unit * np.abs(merged).max(), (adapter.name, name)
            assert np.array_equal(merged, before[name]) == np.array_equal(other[name], before[name])


def test_mergekit_extracts_our_update(tmp_path):
    oracle.needed("mergekit")
    cases = {name: ADAPTERS / f"llama-{name}" for name in ("plain", "rslora", "patterns", "lmhead")}
    jobs = []
    for dtype in UNIT:
        base = cast_base(BASES / "tiny-llama", tmp_path / f"base-{dtype}", dtype)
        for name, adapter in cases.items():
            merged = tmp_path / f"{name}-{dtype}"
            lrconvert.merge(base, adapter, merged)
            jobs.append((base, merged, tmp_path / f"{name}-{dtype}-extracted", 12 if name == "patterns" else 8))
    oracle.run("mergekit", *(word for job in jobs for word in job))
    for dtype in UNIT:
        for name, adapter in cases.items():
            compare(adapter, tmp_path / f"{name}-{dtype}", tmp_path / f"{name}-{dtype}-extracted", UNIT[dtype])


def compare(adapter: Path, merged: Path, extracted: Path, unit: float) -> None:
    """Rounding adds a matrix of full rank to the update; what is left when that is cut to the update's rank is off by
    twice its norm at most (Eckart and Young). mergekit rounds the difference of the weights and both factors, too."""
    stored = load_file(extracted / "adapter_model.safetensors")
    config = json.loads((extracted / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] and config["r"] == config["lora_alpha"]  # scales are 1
    updates = {pair.target.name: pair.scale * pair.B @ pair.A for pair in lrconvert.load_lora(adapter).targets}
    for name, weights in values(merged).items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in stored:
            assert "norm" in name or "embed" in name
            continue
        a, b = (stored[f"{module}.lora_{half}.weight"].double().numpy() for half in "AB")
        wanted = updates.pop(name, np.zeros(weights.shape))
        allowed = 2 * unit * np.linalg.norm(weights) + (4 * unit + 1e-5) * np.linalg.norm(wanted)
        assert np.linalg.norm(b @ a - wanted) <= allowed, (merged.name, name)
        assert allowed < 0.1 * np.linalg.norm(wanted) or not wanted.any()
    assert not updates


# --- diffusers ------------------------------------------------------------------------------------------------------

UNET_BLOCK = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
PIPELINES = {
    "sd": {
        f"{UNET_BLOCK}.attn1.to_q.weight": (64, 64),
        f"{UNET_BLOCK}.ff.net.0.proj.weight": (512, 64),
        "unet.down_blocks.0.resnets.0.conv1.weight": (32, 32, 3, 3),
        "text_encoder.encoder.layers.1.self_attn.v_proj.weight": (32, 32),
        "text_encoder.encoder.layers.0.mlp.fc1.weight": (48, 32),
    },
    "sdxl": {
        f"{UNET_BLOCK}.attn1.to_q.weight": (64, 64),
        f"{UNET_BLOCK}.attn2.to_k.weight": (64, 64),
        "unet.mid_block.attentions.0.transformer_blocks.1.attn1.to_v.weight": (96, 96),
    },
    "flux": {
        "transformer.transformer_blocks.0.attn.to_q.weight": (32, 32),
        "transformer.single_transformer_blocks.0.attn.to_k.weight": (32, 32),
    },
}
SAVED = {"sd": {"variant": "fp16"}, "sdxl": {"shard": "1MB"}, "flux": {}}


def components(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    return {name: values(folder / name) for name in pipeline.models(folder)}


def test_diffusers_fuses_the_same(tmp_path):
    """Every model of a pipeline, in files of every kind: what diffusers fuses, which computes in float32 here, is ours
    to the last place, and it loads what we write as it is."""
    oracle.needed("diffusers")
    jobs = [(tmp_path / name, {"save": name, **SAVED[name]}) for name in PIPELINES]
    assert all(answer["outcome"] == "loads" for answer in oracle.ask("diffusers", jobs))
    jobs, ours = [], {}
    for name, shapes in PIPELINES.items():
        targets = [Target(n, s, View("conv:3x3:1" if len(s) == 4 else "matrix")) for n, s in sorted(shapes.items())]
        lora = LoraAdapter(tuple(one_target(t, scale=0.05, seed=n) for n, t in enumerate(targets)))
        exported = tmp_path / f"{name}-lora"
        lrconvert.export(lora, exported, "diffusers")
        (file,) = exported.glob("*.safetensors")
        ours[name] = tmp_path / f"{name}-ours"
        lrconvert.merge(tmp_path / name, file, ours[name])
        assert lrconvert.verify(ours[name], tmp_path / name, file).ok
        how = {"save": name, "variant": SAVED[name].get("variant")}
        jobs += [(tmp_path / f"{name}-theirs", {**how, "fuse": str(tmp_path / name), "file": str(file)})]
        jobs += [(tmp_path / f"{name}-again", {**how, "fuse": str(ours[name])})]
    assert not [answer["why"] for answer in oracle.ask("diffusers", jobs) if "why" in answer]
    for name, shapes in PIPELINES.items():
        before, mine, other, again = (
            components(folder)
            for folder in (tmp_path / name, ours[name], tmp_path / f"{name}-theirs", tmp_path / f"{name}-again")
        )
        assert mine.keys() == before.keys() == other.keys()
        changed = set()
        for part, tensors in mine.items():
            for tensor, merged in tensors.items():
                assert np.array_equal(merged, again[part][tensor])
                assert np.abs(merged - other[part][tensor]).max() <= 2.0**-11 * np.abs(merged).max(), (part, tensor)
                if not np.array_equal(merged, before[part][tensor]):
                    changed.add(f"{part}.{tensor}")
        assert changed == set(shapes)
