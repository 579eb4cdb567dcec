"""Bases of which only the configuration is there: adapters of other widths are refused, not taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrconvert import api
from lrconvert.core.dtypes import Stored
from lrconvert.core.errors import BaseError
from lrconvert.lora.adapter import LoraAdapter, LoraTarget, Target

UNET: dict[str, Any] = {"_class_name": "UNet2DConditionModel", "block_out_channels": [32, 64], "layers_per_block": 1}
UNET |= {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
UNET |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def lora_of(name: str, out: int, inner: int) -> LoraAdapter:
    a, b = np.ones((2, inner), np.float32), np.ones((out, 2), np.float32)
    return LoraAdapter((LoraTarget(Target(name, (out, inner)), Stored("F32", a), Stored("F32", b), 1.0),))


@pytest.mark.parametrize("prefix", ("unet.", ""))
def test_a_unet_of_another_width_is_another_model(tmp_path: Path, prefix: str) -> None:
    """An SD1.5 LoRA (contexts of 768) does not go into SD2 (1024), whether the pipeline is given or the UNet."""
    base = tmp_path / "base"
    folder = base / "unet" if prefix else base
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(UNET | {"cross_attention_dim": 48}))
    if prefix:
        (base / "model_index.json").write_text("{}")
    api.convert(lora_of(prefix + KEY, 32, 48), "lowrank", bits=12, base=base)
    with pytest.raises(BaseError, match=rf"{KEY}' is \[32, 40\] \(out, in\) in the adapter, \[32, 48\] by the config"):
        api.convert(lora_of(prefix + KEY, 32, 40), "lowrank", bits=12, base=base)


def test_a_class_of_another_width_is_another_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = "model.layers.0.mlp.up_proj.weight"
    api.convert(lora_of(name, 24, 16), "lowrank", bits=12, base=tmp_path)
    with pytest.raises(BaseError, match=r"\[24, 18\] \(out, in\) in the adapter, \[24, 16\] by the configuration"):
        api.convert(lora_of(name, 24, 18), "lowrank", bits=12, base=tmp_path)
    api.convert(lora_of("something.else.weight", 3, 5), "lowrank", bits=12, base=tmp_path)
