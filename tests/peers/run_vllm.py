"""vLLM's own PEFTHelper and LoRAModel on adapters: ``python run_vllm.py BASE < folders.json``. No engine, no GPU.

What the engine passes in (the limit on ranks, the modules of the model) is that of a Llama with default settings.
"""

from __future__ import annotations

import logging
import types
from pathlib import Path
from typing import Any

import runner
import standin

LIB = runner.library("vllm")
standin.install(
    "vllm",
    LIB,
    ["vllm.lora.peft_helper", "vllm.lora.lora_model", "vllm.lora.lora_weights", "vllm.lora.utils"],
    {"vllm.utils.torch_utils": {"PIN_MEMORY": False}},
)
logging.disable(logging.WARNING)

from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

# LlamaForCausalLM: linear layers by their unpacked names, embedding_modules.
EXPECTED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}


def modules(base: dict[str, Any]) -> set[str]:
    """Names of what can be adapted in the model, before packing."""
    parents = {"mlp": ("gate_proj", "up_proj", "down_proj"), "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj")}
    layers = [f"model.layers.{n}" for n in range(base["num_hidden_layers"])]
    inside = {f"{layer}.{parent}.{name}" for layer in layers for parent, names in parents.items() for name in names}
    return inside | {"model.embed_tokens", "lm_head"}


def load(folder: Path, base: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    helper = PEFTHelper.from_local_dir(str(folder), base["max_position_embeddings"])
    helper.validate_legal(types.SimpleNamespace(max_lora_rank=options.get("max_lora_rank", 16)))
    model = LoRAModel.from_local_checkpoint(
        str(folder), EXPECTED, helper, device="cpu", model_vocab_size=base["vocab_size"], lora_model_id=1
    )
    norms = {}
    for name, layer in model.loras.items():
        # PackedLoRALayerWeights.pack and set_lora need both.
        if layer.lora_a is None or layer.lora_b is None:
            raise AssertionError(f"{name} has one factor")
        if name in modules(base):  # LoRAModelManager.activate_adapter asks for these names, and for no other
            norms[name] = runner.norm(layer.scaling, layer.lora_b, layer.lora_a)
    return {"norms": {name: value for name, value in norms.items() if value}, "saved": sorted(model.modules_to_save)}


if __name__ == "__main__":
    runner.serve(load)
