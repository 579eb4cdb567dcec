"""loralib's own layers on a bare state dict: ``python run_loralib.py BASE < folders.json``. ``options["layers"]`` gives
the kind and shape of each; what a file adds to each weight is written to the .npz of ``options["out"]``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import runner

LIB = runner.library("loralib")
runner.prefer(LIB)

import loralib
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file


def load(folder: Path, base: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    stored = load_file(folder / "lora.safetensors")
    with safe_open(folder / "lora.safetensors", "pt") as opened:
        alpha = int(opened.metadata()["lora_alpha"])
    updates = {}
    for name, (kind, out, inner) in options["layers"].items():
        own = {key.rpartition(".")[2]: value for key, value in stored.items() if key.startswith(f"{name}.lora_")}
        rank = own["lora_A"].shape[0]
        if kind == "embedding":
            layer = loralib.Embedding(inner, out, r=rank, lora_alpha=alpha)
        else:
            transposed = kind == "transposed"
            layer = loralib.Linear(inner, out, r=rank, lora_alpha=alpha, fan_in_fan_out=transposed)
        missing, unexpected = layer.load_state_dict(own, strict=False)
        if unexpected or any("lora" in key for key in missing):
            raise ValueError(f"{name}: {missing} {unexpected}")
        before = layer.weight.detach().double().clone()
        layer.weight.data.zero_()
        layer.eval()  # merges
        updates[name] = layer.weight.detach().double().numpy()
        assert before.shape == torch.Size(updates[name].shape)
    np.savez(options["out"], **updates)
    return {}


if __name__ == "__main__":
    runner.serve(load)
