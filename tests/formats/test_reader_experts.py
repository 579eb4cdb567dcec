"""Experts in trainers' files (Tinker, SkyRL), and torchtune's own, held against what their own code computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import dense
from test_base_names import make_base

from lrconvert.core import errors
from lrconvert.core.dtypes import Array
from lrconvert.formats.readers.base import load
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.testing.layouts import safetensors_file
from lrconvert.testing.raw_files import spelled

EXPERTS = "base_model.model.model.layers.0.mlp.experts"
RNG = np.random.default_rng(5)


def floats(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def folder(path: Path, tensors: dict[str, Array], **config: Any) -> Path:
    path.mkdir()
    path.joinpath("adapter_model.safetensors").write_bytes(safetensors_file(tensors))
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": "all-linear", **config}
    path.joinpath("adapter_config.json").write_bytes(spelled(settings))
    return path


@pytest.mark.parametrize("shared", ["A", "B", ""])
def test_tinkers_experts(shared: str, tmp_path: Path) -> None:
    """As tinker-cookbook merges them: expert by expert, a factor of first dimension 1 is that of all."""
    tensors, wanted = {}, {}
    for leaf, ours, out, inner in (("w1", "gate_proj", 6, 8), ("w3", "up_proj", 6, 8), ("w2", "down_proj", 8, 6)):
        a, b = floats(1 if shared == "A" else 3, 2, inner), floats(1 if shared == "B" else 3, out, 2)
        tensors |= {f"{EXPERTS}.{leaf}.lora_A.weight": a, f"{EXPERTS}.{leaf}.lora_B.weight": b}
        for n in range(3):
            one_a, one_b = a[0 if shared == "A" else n], b[0 if shared == "B" else n]
            wanted[f"model.layers.0.mlp.experts.{n}.{ours}.weight"] = 1.5 * one_b.astype(float) @ one_a.astype(float)
    head = {
        f"base_model.model.model.unembed_tokens.lora_{h}.weight": floats(*s) for h, s in (("A", (2, 8)), ("B", (9, 2)))
    }
    lora = load(folder(tmp_path / "x", {**tensors, **head}))
    updates = {pair.target.name: dense(pair) for pair in lora.targets}
    assert updates.keys() == {*wanted, "lm_head.weight"}
    for name, update in wanted.items():
        np.testing.assert_allclose(updates[name], update, rtol=1e-12)
    gpt = {name.replace(".self_attn", ".attn"): value for name, value in tensors.items()}
    gpt |= {f"base_model.model.model.layers.0.attn.q_proj.lora_{h}.weight": floats(2, 2) for h in "AB"}
    with pytest.raises(errors.UnsupportedLoraError, match=r"gpt-oss.*tinker-cookbook"):
        load(folder(tmp_path / "gpt", gpt))
    odd = {**tensors, f"{EXPERTS}.w1.lora_A.weight": floats(2, 2, 8)}
    with pytest.raises(errors.PairError):
        load(folder(tmp_path / "odd", odd))
    with pytest.raises(errors.PairError, match="rank 2"):
        load(folder(tmp_path / "rank", tensors, r=4))


def test_stacks_as_the_model_holds_them(tmp_path: Path) -> None:
    tensors = {}
    for leaf, out, inner in (("gate_up_proj", 12, 8), ("down_proj", 8, 6)):
        tensors |= {f"{EXPERTS}.{leaf}.lora_A.weight": floats(3, 2, inner)}
        tensors |= {f"{EXPERTS}.{leaf}.lora_B.weight": floats(3, out, 2)}
    lora = load(folder(tmp_path / "x", tensors))
    places = [(pair.target.name, pair.target.shape, pair.target.view.text) for pair in lora.targets]
    down, up = "model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"
    wanted = [(down, (3, 8, 6), f"expert:{n}") for n in range(3)] + [(up, (3, 12, 8), f"expert:{n}") for n in range(3)]
    assert places == wanted
    a, b = (tensors[f"{EXPERTS}.down_proj.lora_{h}.weight"][1].astype(float) for h in "AB")
    np.testing.assert_allclose(dense(lora.targets[1]), 1.5 * b @ a, rtol=1e-12)


def test_skyrls_experts(tmp_path: Path) -> None:
    """One by one, without PEFT's prefix and without the last word, beside layers that have both."""
    a, b = floats(2, 8), floats(6, 2)
    names = {"lora_A": a, "lora_B": b}
    tensors = {f"model.layers.0.mlp.experts.7.gate_proj.{half}": value for half, value in names.items()}
    tensors |= {f"base_model.model.model.layers.0.self_attn.q_proj.{half}.weight": v for half, v in names.items()}
    lora = load(folder(tmp_path / "x", tensors))
    assert [pair.target.name for pair in lora.targets] == [
        "model.layers.0.mlp.experts.7.gate_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    ]  # fmt: skip
    assert lora.targets[0].a == lora.targets[1].a
    assert any("do not begin with" in line for line in lora.warnings)
    stray = {**tensors, "model.norm.weight": floats(8)}
    with pytest.raises(errors.TensorUnknownError, match="does not begin with"):
        load(folder(tmp_path / "y", stray))


# --- torchtune ------------------------------------------------------------------------------------------------------

LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
SHAPES = {f"model.layers.0.self_attn.{n}_proj.weight": (m, 16) for n, m in (("q", 32), ("k", 16), ("v", 16), ("o", 16))}


def in_pairs(b: Array, heads: int) -> Array:
    """Rows as torchtune has them to rows as transformers has them, by the formula of its own export for PEFT."""
    rows, rank = b.shape
    half = rows // heads // 2
    return b.reshape(heads, half, 2, rank).transpose(0, 2, 1, 3).reshape(rows, rank)


def test_torchtunes_own_file(tmp_path: Path) -> None:
    """Names and rows are those of torchtune's export for PEFT; alpha stands in its configuration, or is given."""
    factors = {n: (floats(2, 16), floats(m, 2)) for n, m in (("q_proj", 32), ("k_proj", 16), ("output_proj", 16))}
    tensors = {}
    for name, (a, b) in factors.items():
        tensors |= {f"layers.0.attn.{name}.lora_a.weight": a, f"layers.0.attn.{name}.lora_b.weight": b}
    (tmp_path / "adapter_0.safetensors").write_bytes(safetensors_file(tensors))
    path = tmp_path / "adapter_0.safetensors"
    shapes = {name: (SHAPES[name][0], 16) for name in SHAPES}
    base = make_base(tmp_path / "base", shapes, LLAMA)
    with pytest.raises(errors.ConfigError, match="--alpha"):
        load(path, ReadOptions(base=base))
    with pytest.raises(errors.BaseError, match=r"number of heads.*--base"):
        load(path, ReadOptions(alpha=3.0))
    lora = load(path, ReadOptions(base=base, alpha=3.0))
    wanted = {
        "q_proj": in_pairs(factors["q_proj"][1], 4),
        "k_proj": in_pairs(factors["k_proj"][1], 2),
        "o_proj": factors["output_proj"][1],
    }
    stem = "model.layers.0.self_attn."
    assert {pair.target.name for pair in lora.targets} == {f"{stem}{name}.weight" for name in wanted}
    for pair in lora.targets:
        leaf = pair.target.name.split(".")[-2]
        assert np.array_equal(pair.B, wanted[leaf]) and pair.scale == 1.5
    plain = make_base(tmp_path / "qwen", shapes, {**LLAMA, "model_type": "qwen2"})
    kept = {pair.target.name: pair.B for pair in load(path, ReadOptions(base=plain, alpha=3.0)).targets}
    assert np.array_equal(kept[f"{stem}q_proj.weight"], factors["q_proj"][1])
    other = make_base(tmp_path / "other", shapes, {**LLAMA, "model_type": "phi3"})
    with pytest.raises(errors.BaseError, match=r"not known here.*PEFT"):
        load(path, ReadOptions(base=other, alpha=3.0))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 5, "use_dora": True}))
    lora = load(path, ReadOptions(base=base))
    assert {pair.scale for pair in lora.targets} == {2.5} and any("use_dora" in line for line in lora.warnings)
    with pytest.raises(errors.OptionError):
        load(path, ReadOptions(base=base, alpha=3.0))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 5}))
    with pytest.raises(errors.PairError, match="states 4"):
        load(path, ReadOptions(base=base))
