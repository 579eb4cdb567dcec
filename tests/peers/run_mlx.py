"""mlx-lm's own load_adapters on the CPU: ``python run_mlx.py BASE < folders.json``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import runner

LIB = runner.library("mlx")
BASE = runner.base()
sys.path.insert(0, str(LIB))

import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model


def load(folder: Path, base: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    model, _ = load_model(Path(options.get("base", BASE)))
    load_adapters(model, str(folder))
    factors: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tree_flatten(model.parameters()):
        module, _, leaf = name.rpartition(".")
        if leaf in ("lora_a", "lora_b"):
            factors.setdefault(module, {})[leaf] = np.array(value)
    scales = {name: module.scale for name, module in model.named_modules() if hasattr(module, "lora_a")}
    norms = {name: runner.norm(scales[name], ab["lora_b"].T, ab["lora_a"].T) for name, ab in factors.items()}
    if "out" in options:  # what is added to each weight, (out, in)
        deltas = {name: scales[name] * (ab["lora_b"].T @ ab["lora_a"].T) for name, ab in factors.items()}
        np.savez(options["out"], **deltas)
    return {"norms": {name: value for name, value in norms.items() if value}}


if __name__ == "__main__":
    runner.serve(load)
