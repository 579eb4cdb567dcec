"""SGLang's own LoRAConfig, LoRAAdapter and LoRAMemoryPool on adapters: ``python run_sglang.py BASE < folders.json``.

No engine, no GPU: the pool is filled on the CPU for a stand-in of a Llama, and its buffers are read back.
"""

from __future__ import annotations

import logging
import types
from pathlib import Path
from typing import Any

import runner
import standin
import torch

LIB = runner.library("sglang")
PARALLEL = types.SimpleNamespace(
    tp_size=1, tp_rank=0, attn_tp_size=1, moe_ep_size=1, moe_ep_rank=0, moe_tp_size=1, moe_tp_rank=0,
    attn_dp_enabled=False, dcp_replicate_q_proj=False, pp_group=types.SimpleNamespace(is_last_rank=True),
)  # fmt: skip


class FusedMoE:
    """No layer of the stand-in is one."""


class BaseLayerWithLoRA(torch.nn.Module):
    """A wrapped layer with tensor parallelism 1: slices are the whole."""

    def slice_lora_a_weights(self, weights: torch.Tensor) -> torch.Tensor:
        return weights

    slice_lora_b_weights = slice_lora_a_weights


class FusedMoEWithLoRA(BaseLayerWithLoRA):
    """No layer of the stand-in is one."""


standin.install(
    "sglang",
    LIB,
    [
        "sglang.srt.lora.lora",
        "sglang.srt.lora.lora_config",
        "sglang.srt.lora.lora_manager",
        "sglang.srt.lora.mem_pool",
        "sglang.srt.lora.utils",
        "sglang.srt.layers.utils",
        "sglang.srt.layers.utils.common",
    ],
    {
        "sglang.srt.runtime_context": {"get_parallel": lambda: PARALLEL},
        "sglang.srt.utils": {"is_pin_memory_available": lambda: False},
        "sglang.srt.layers.moe.fused_moe_triton.layer": {"FusedMoE": FusedMoE},
        "sglang.srt.lora.layers": {
            "BaseLayerWithLoRA": BaseLayerWithLoRA,
            "FusedMoEWithLoRA": FusedMoEWithLoRA,
            "unwrap_lora_layer": lambda module: module,
        },
    },
)
logging.disable(logging.WARNING)

from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.lora.mem_pool import LoRAMemoryPool
from sglang.srt.lora.utils import get_normalized_target_modules

EMBEDDINGS = {"embed_tokens", "lm_head"}
LAYERS = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}


class Model(torch.nn.Module):
    """What the pool asks of a model."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.weight = torch.nn.Parameter(torch.zeros(1))


def load(folder: Path, base: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    hf = types.SimpleNamespace(**base)
    config = LoRAConfig(str(folder), base_vocab_size=hf.vocab_size)
    manager = types.SimpleNamespace(attn_dp_enabled=False, lora_refs={}, num_pinned_loras=0, max_loras_per_batch=4)
    limit = options.get("max_lora_rank", config.r)
    model = Model(hf)
    targets = get_normalized_target_modules(config.target_modules)
    targets = set(LAYERS) | EMBEDDINGS if "all" in targets else targets
    pool = LoRAMemoryPool(
        base_hf_config=hf, max_loras_per_batch=2, dtype=torch.float32, max_lora_rank=limit, target_modules=targets,
        base_model=model, eviction_policy="lru", lora_added_tokens_size=0,
    )  # fmt: skip
    manager.memory_pool = pool
    LoRAManager.validate_new_adapter(manager, config, types.SimpleNamespace(lora_name="x", lora_path="", pinned=False))
    adapter = LoRAAdapter("x", config, hf, None, None)
    adapter.initialize_weights_from_tensors(runner.tensors(folder))
    wrapped = [
        {f"model.layers.{n}.{parent}.{name}": BaseLayerWithLoRA() for name, parent in LAYERS.items() if name in targets}
        for n in range(hf.num_hidden_layers)
    ]
    pool.load_lora_weight_to_buffer("x", 0, adapter, wrapped, BaseLayerWithLoRA(), BaseLayerWithLoRA())
    return {"norms": _norms(pool, adapter, hf, config.r)}


def _norms(pool: Any, adapter: Any, hf: Any, rank: int) -> dict[str, float]:
    heads = hf.head_dim * hf.num_attention_heads, hf.head_dim * hf.num_key_value_heads
    parts = {
        "qkv_proj": [("q_proj", heads[0]), ("k_proj", heads[1]), ("v_proj", heads[1])],
        "gate_up_proj": [("gate_proj", hf.intermediate_size), ("up_proj", hf.intermediate_size)],
    }
    norms = {}
    for target, parent in LAYERS.items():
        for layer in range(hf.num_hidden_layers if target in pool.A_buffer else 0):
            a, b = pool.A_buffer[target][layer][0], pool.B_buffer[target][layer][0]
            row = 0
            for n, (name, height) in enumerate(parts.get(target, [(target, b.shape[0])])):
                norm = runner.norm(adapter.scaling, b[row : row + height, :rank], a[n * rank : (n + 1) * rank])
                row += height
                norms[f"model.layers.{layer}.{parent}.{name}"] = norm
    for name, (a_buffer, b_buffer) in {
        "model.embed_tokens": (pool.embedding_A_buffer, pool.embedding_B_buffer),
        "lm_head": (pool.lm_head_A_buffer, pool.lm_head_B_buffer),
    }.items():
        leaf = name.rpartition(".")[2]
        if leaf in a_buffer:
            norms[name] = runner.norm(adapter.scaling, b_buffer[leaf][0, :, :rank], a_buffer[leaf][0, :rank])
    return {name: value for name, value in norms.items() if value}


if __name__ == "__main__":
    runner.serve(load)
