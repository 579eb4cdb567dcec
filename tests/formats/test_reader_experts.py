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
    with pytest.raises(errors.ConfigError, match="alpha="):
        load(path, ReadOptions(base=base))
    with pytest.raises(errors.BaseError, match=r"number of heads.*base="):
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


# --- Unsloth's stacks -----------------------------------------------------------------------------------------------


def stack_folder(path: Path, **config: Any) -> tuple[Path, Array, Array]:
    """One stack of three experts as PEFT's target_parameters saves it: A (experts * r, in), B (out, r * experts)."""
    a, b = floats(6, 8), floats(5, 6)
    tensors = {f"{EXPERTS}.lora_A.weight": a, f"{EXPERTS}.lora_B.weight": b}
    mapping = {"base_model_class": "Qwen3MoeForCausalLM", "parent_library": "transformers.models.qwen3_moe"}
    settings = {"target_parameters": ["mlp.experts.down_proj"], "peft_version": "0.19.0", "auto_mapping": mapping}
    return folder(path, tensors, **{**settings, **config}), a, b


def test_the_columns_of_a_stack_are_ordered_as_the_configuration_says(tmp_path: Path) -> None:
    """As PEFT reads them, (out, r, experts), unless lora_B_layout says (out, experts, r), as Unsloth trained them."""
    for name, layout in (("plain", None), ("rank", "rank_major"), ("expert", "grouped_by_expert")):
        path, a, b = stack_folder(tmp_path / name, lora_B_layout=layout)
        for n, pair in enumerate(load(path).targets):
            by_expert = b.reshape(5, 3, 2)[:, n] if name == "expert" else b.reshape(5, 2, 3)[:, :, n]
            wanted = 1.5 * by_expert.astype(float) @ a[2 * n : 2 * n + 2].astype(float)
            np.testing.assert_allclose(dense(pair), wanted, rtol=1e-12)
    with pytest.raises(errors.UnsupportedLoraError, match="order of the columns"):
        load(stack_folder(tmp_path / "other", lora_B_layout="by_moonlight")[0])


@pytest.mark.parametrize("sign", ["mapping", "base"])
def test_stacks_of_unsloth_that_do_not_say_their_order_are_refused(sign: str, tmp_path: Path) -> None:
    """The advice names the field; with it the adapter is read, each value as it says."""
    mapping = {"base_model_class": "", "parent_library": "transformers.models.qwen3_moe", "unsloth_fixed": True}
    signs: dict[str, dict[str, Any]] = {
        "mapping": {"auto_mapping": mapping},
        "base": {"base_model_name_or_path": "unsloth/M"},
    }
    config = signs[sign]
    with pytest.raises(errors.UnsupportedLoraError, match=r"Unsloth.*lora_B_layout.*grouped_by_expert"):
        load(stack_folder(tmp_path / "x", **config)[0])
    for layout in ("rank_major", "grouped_by_expert"):
        assert len(load(stack_folder(tmp_path / layout, lora_B_layout=layout, **config)[0]).targets) == 3
    plain = {f"base_model.model.q.lora_{h}.weight": floats(2, 2) for h in "AB"}
    assert load(folder(tmp_path / "plain", plain, **config)).targets  # no stack, no doubt


def test_a_card_that_names_unsloth_is_a_sign_too(tmp_path: Path) -> None:
    path = stack_folder(tmp_path / "x")[0]
    assert len(load(path).targets) == 3
    (path / "README.md").write_text("---\ntags:\n- unsloth\n---\n")
    with pytest.raises(errors.UnsupportedLoraError, match=r"Unsloth.*lora_B_layout"):
        load(path)


def test_parameters_that_are_named_with_their_module_are_its_own(tmp_path: Path) -> None:
    """PEFT's "all-linear" on a mixture: bare names for the experts, the router's with its module."""
    moe = "base_model.model.model.layers.0.mlp"
    shapes = {"experts.base_layer": (8, 12), "experts": (6, 8), "gate": (8, 3)}
    tensors = {}
    for module, (inner, out) in shapes.items():
        experts = 1 if module == "gate" else 3
        tensors |= {f"{moe}.{module}.lora_A.weight": floats(2 * experts, inner)}
        tensors |= {f"{moe}.{module}.lora_B.weight": floats(out, 2 * experts)}
    lora = load(folder(tmp_path / "x", tensors, target_parameters=["down_proj", "gate_up_proj", "gate.weight"]))
    names = {pair.target.name.removeprefix("model.layers.0.mlp.") for pair in lora.targets}
    assert names == {"experts.gate_up_proj", "experts.down_proj", "gate.weight"} and len(lora.targets) == 7


# --- slices of distributed trainings --------------------------------------------------------------------------------


def test_slices_of_one_device_are_named(tmp_path: Path) -> None:
    q = "base_model.model.q.lora_{}.weight"
    with pytest.raises(errors.PairError, match=r"1 of 2 devices.*FULL_STATE_DICT"):
        load(folder(tmp_path / "fsdp", {q.format("A"): floats(1, 8), q.format("B"): floats(3, 2)}))
    with pytest.raises(errors.PairError, match=r"flat tensors.*gathered"):
        load(folder(tmp_path / "zero", {q.format("A"): floats(16), q.format("B"): floats(12)}))
    whole = folder(tmp_path / "whole", {q.format("A"): floats(2, 8), q.format("B"): floats(6, 2)})
    assert load(whole).warnings == ()
    (whole / "new_embeddings.safetensors").write_bytes(safetensors_file({"input_embeddings": floats(2, 8)}))
    assert any("new_embeddings.safetensors" in line for line in load(whole).warnings)


# --- tied heads with trained rows -----------------------------------------------------------------------------------


def test_rows_of_a_tied_head_are_those_of_the_embedding(tmp_path: Path) -> None:
    """PEFT saves them twice on a resized model, the whole matrices beside them; the configuration names one."""
    rows, whole = floats(2, 4), floats(6, 4)
    tensors = {f"base_model.model.q.lora_{h}.weight": floats(2, 2) for h in "AB"}
    for module in ("model.embed_tokens", "lm_head"):
        stem = f"base_model.model.{module}.token_adapter"
        tensors |= {f"{stem}.trainable_tokens_delta": rows, f"{stem}.base_layer.weight": whole}
    tensors["base_model.model.lm_head.token_adapter.base_layer.bias"] = bias = floats(6)
    lora = load(folder(tmp_path / "x", tensors, trainable_token_indices={"embed_tokens": [1, 4]}))
    extras = {extra.name: np.frombuffer(extra.data, "<f4").reshape(extra.shape) for extra in lora.extras}
    wanted = whole.copy()
    wanted[[1, 4]] = rows
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert np.array_equal(extras[name], wanted)
    assert np.array_equal(extras["lm_head.bias"], bias)
    other = {**tensors, "base_model.model.lm_head.token_adapter.trainable_tokens_delta": floats(2, 4)}
    with pytest.raises(errors.ConfigError, match="does not say which"):
        load(folder(tmp_path / "y", other, trainable_token_indices={"embed_tokens": [1, 4]}))


def test_new_tokens_of_a_resized_encoder_decoder_are_refused(tmp_path: Path) -> None:
    """PEFT gives them to `shared` and the head alone, and both sides hold that tensor; on a model that was not resized
    they are rows, whose place the base tells."""
    stem = "base_model.model.model.shared.token_adapter"
    tensors = {f"base_model.model.q.lora_{h}.weight": floats(2, 2) for h in "AB"}
    tensors[f"{stem}.trainable_tokens_delta"] = floats(2, 4)
    trained = {"trainable_token_indices": {"shared": [1, 4]}}
    assert {extra.use for extra in load(folder(tmp_path / "rows", tensors, **trained)).extras} == {
        "rows",
        "row_indices",
    }
    tensors[f"{stem}.base_layer.weight"] = floats(6, 4)
    with pytest.raises(errors.UnsupportedLoraError, match="embeddings of encoder and decoder"):
        load(folder(tmp_path / "resized", tensors, **trained))
