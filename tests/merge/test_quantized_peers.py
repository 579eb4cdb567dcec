"""Quantized bases against the code that loads them: transformers' own dequantization, and compressed-tensors'."""

from __future__ import annotations

import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ADAPTERS, BASES
from models import auto, load_clean, logits, peft_merged
from peers import oracle
from quantized_bases import METHODS, Made, base_of, fp4_experts, fp8, fp8_experts, gpt_oss

from lrconvert.api import load_lora, merge, verify
from lrconvert.merge.quantized_base import open_base

torch = pytest.importorskip("torch")


def ours(base: Path) -> dict[str, np.ndarray]:
    with open_base(base, dequantize=True) as checkpoint:
        return {
            name: np.frombuffer(checkpoint.read(info), "<u2").reshape(info.shape)
            for name, info in checkpoint.tensors.items()
            if info.dtype == "BF16"
        }


def bits(tensor: Any) -> np.ndarray:
    values: np.ndarray = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
    return values


# transformers takes scales for equal parts of a weight: blocks have to divide it.
EVEN: dict[str, Callable[[], Made]] = {
    "blocks": lambda: fp8((32, 48)),
    "E5M2, bf16 scales": lambda: fp8((32, 48), dtype="F8_E5M2", scales="BF16"),
    "one scale": lambda: fp8(block=None),
    "powers of two": METHODS["fp8, powers of two"],
    "equal parts": METHODS["fp8, equal parts"],
    "experts": fp8_experts,
    "experts of four bits": lambda: fp4_experts((32, 48)),
}


@pytest.mark.parametrize("kind", EVEN)
def test_fp8_as_transformers_computes(kind: str, tmp_path: Path) -> None:
    """Bit for bit."""
    import safetensors
    from safetensors.torch import load_file
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    if len(signature(Fp8Dequantize._dequantize_one).parameters) < 4:
        pytest.skip("this transformers dequantizes FP8 in another way")
    made = EVEN[kind]()
    base = base_of(tmp_path / "base", made)
    try:
        stored = load_file(base / "model.safetensors")
    except safetensors.SafetensorError:
        pytest.skip("this safetensors does not know the dtype of the scales")
    values = ours(base)
    for name in made.values:
        names = (f"{name}_scale_inv", f"{name.removesuffix('.weight')}.scale")
        scale = next(stored[each] for each in names if each in stored)
        goal = Fp8Dequantize(None)._dequantize_one(stored[name], scale, torch.bfloat16)
        assert np.array_equal(values[name], bits(goal)), name


def test_mxfp4_as_transformers_computes(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    made = gpt_oss()
    base = base_of(tmp_path / "base", made)
    stored, values = load_file(base / "model.safetensors"), ours(base)
    for name in made.values:
        goal = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert np.array_equal(values[name], bits(goal)), name


def test_as_compressedtensors_computes(tmp_path: Path) -> None:
    """Bit for bit, every format that it writes."""
    oracle.needed("compressedtensors")
    from safetensors.torch import load_file

    kinds = [kind for kind in METHODS if kind.startswith("compressed")]
    bases = [base_of(tmp_path / str(n), METHODS[kind]()) for n, kind in enumerate(kinds)]
    oracle.run("compressedtensors", *bases)
    for kind, base in zip(kinds, bases, strict=True):
        goal = load_file(base / "dense.safetensors")
        (base / "dense.safetensors").unlink()
        values = ours(base)
        assert goal.keys() == values.keys()
        for name, tensor in goal.items():
            assert np.array_equal(values[name], bits(tensor)), kind


# --- whole models ---------------------------------------------------------------------------------------------------


def fp8_model(folder: Path) -> Path:
    """The fixture Llama in blocks of FP8, in several files."""
    from safetensors.torch import save_file

    model = auto("CausalLM").from_pretrained(BASES / "tiny-llama", dtype=torch.bfloat16)
    tensors = {}
    for name, value in model.state_dict().items():
        tensors[name] = value.contiguous()
        if not name.endswith("proj.weight"):
            continue
        rows, cols = value.shape[0] // 16, value.shape[1] // 16
        blocks = value.float().reshape(rows, 16, cols, 16)
        scale = blocks.abs().amax((1, 3)) / 448
        tensors[name] = (blocks / scale[:, None, :, None]).reshape(value.shape).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    names = list(tensors)
    folder.mkdir()
    places = {name: f"model-{n % 2 + 1:05}-of-00002.safetensors" for n, name in enumerate(names)}
    for place in set(places.values()):
        own = {name: tensors[name] for name in names if places[name] == place}
        save_file(own, folder / place, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    write_config(folder, model.config.to_dict(), settings)
    return folder


def gpt_oss_model(folder: Path) -> Path:
    """A tiny gpt-oss, its experts of four bits."""
    from safetensors.torch import save_file
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = GptOssConfig(vocab_size=128, max_position_embeddings=128, pad_token_id=0, **sizes, **heads)
    model = GptOssForCausalLM(config).to(torch.bfloat16)
    tensors = {}
    for name, value in model.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = value.contiguous()
            continue
        experts, inputs, out = value.shape
        blocks = torch.randint(0, 256, (experts, out, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_blocks"] = blocks
        tensors[f"{name}_scales"] = torch.randint(119, 122, blocks.shape[:3], dtype=torch.uint8)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
    write_config(folder, config.to_dict() | {"architectures": ["GptOssForCausalLM"]}, settings)
    return folder


def write_config(folder: Path, config: dict[str, Any], settings: dict[str, Any]) -> None:
    config |= {"quantization_config": settings, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str))


def adapter_on(base: Path, folder: Path) -> Path:
    """A PEFT adapter of attention and of the experts of gpt-oss, fused and of three dimensions."""
    import peft

    torch.manual_seed(1)
    model = auto("CausalLM").from_pretrained(base, dtype=torch.bfloat16)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False
    )
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_whole_models(kind: str, tmp_path: Path) -> None:
    """What transformers makes of the base is what we merge into, bit for bit; the merged model is an ordinary one, and
    answers as the base with the LoRA does, which PEFT merges in bf16."""
    base = (fp8_model if kind == "fp8" else gpt_oss_model)(tmp_path / "base")
    adapter = ADAPTERS / "llama-plain" if kind == "fp8" else adapter_on(base, tmp_path / "lora")
    theirs = auto("CausalLM").from_pretrained(base, dtype=torch.bfloat16)
    state, values = theirs.state_dict(), ours(base)
    assert values.keys() - state.keys() <= {"lm_head.weight"}
    assert all(np.array_equal(values[name], bits(tensor)) for name, tensor in state.items() if name in values)
    merge(base, [load_lora(adapter)], tmp_path / "out", dequantize=True)
    assert verify(tmp_path / "out", base, [load_lora(adapter)], dequantize=True).ok
    merged = load_clean("CausalLM", tmp_path / "out")
    assert merged.dtype == torch.bfloat16 and not hasattr(merged.config, "quantization_config")
    goal = peft_merged("CausalLM", base, adapter)
    for name, tensor in goal.state_dict().items():
        mine = merged.state_dict()[name].float()
        unit = 2.0**-7 * tensor.float().abs().max()
        assert (mine - tensor.float()).abs().max() <= unit, name
    answers, wanted, before = logits(merged), logits(goal), logits(theirs)
    assert (answers - wanted).norm() <= 0.1 * (wanted - before).norm()
