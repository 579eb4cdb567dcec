"""compressed-tensors' own decompression: ``python run_compressedtensors.py FOLDER ...`` writes what the weights of each
model folder stand for, as bf16, into ``dense.safetensors`` beside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import runner

runner.prefer(runner.library("compressedtensors"))

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file


def dense(folder: Path) -> dict[str, Any]:
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = settings["config_groups"].values()
    scheme = QuantizationScheme(**group)
    modules: dict[str, dict[str, Any]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        owner, _, leaf = name.rpartition(".")
        modules.setdefault(owner, {})[leaf] = tensor
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    return {
        f"{owner}.weight": compressor.decompress(state, scheme)["weight"].to(torch.bfloat16).contiguous()
        for owner, state in modules.items()
        if "weight_scale" in state
    }


if __name__ == "__main__":
    for word in sys.argv[1:]:
        save_file(dense(Path(word)), Path(word) / "dense.safetensors")
