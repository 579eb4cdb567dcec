"""Merges against other people's programs: axolotl merges the same, mergekit takes ours apart. PEFT, which the tests
depend on, is in test_merge.py. A peer without an environment is skipped by name: see tests/peers/README.md."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ADAPTERS, BASES
from models import cast_base, config_of, load_all
from peers import oracle
from safetensors.torch import load_file

import lrconvert

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
