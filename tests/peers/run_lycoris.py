"""LyCORIS itself writes adapters of its kinds: ``python run_lycoris.py BASE < folders.json``. Each folder becomes
``lycoris.safetensors``, by its own `save_weights`, and a ``base`` with the little model that it is for; what each layer
adds to its weight when it is trained and used is written to ``deltas.npz``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import runner

LIB = runner.library("lycoris")
runner.prefer(LIB)

import numpy as np
import torch
from lycoris import create_lycoris
from lycoris.wrapper import PRESET
from safetensors.torch import save_file


class Block(torch.nn.Module):
    """A linear layer, one without a bias, convolutions of one pixel and of nine, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = torch.nn.Linear(12, 16)
        self.to_k = torch.nn.Linear(12, 8, bias=False)
        self.proj_in = torch.nn.Conv2d(8, 12, 1)
        self.conv = torch.nn.Conv2d(6, 8, 3)
        self.norm = torch.nn.LayerNorm(12)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mid_block = Block()


def load(folder: Path, base: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(options["seed"])
    model = Model()
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "config.json").write_text("{}")
    save_file(model.state_dict(), folder / "base" / "model.safetensors")
    PRESET["block"] = {"target_module": ["Block"]}
    network = create_lycoris(model, 1.0, preset="block", **options["network"])
    network.apply_to()
    deltas: dict[str, Any] = {}
    with torch.no_grad():
        for module in network.loras:
            for value in module.parameters():
                value.add_(torch.randn(value.shape) * 0.3)
        for module in network.loras:
            name = module.lora_name.removeprefix("lycoris_").replace("mid_block_", "mid_block.")
            if hasattr(module, "w_norm"):
                deltas |= {f"{name}.weight": module.w_norm, f"{name}.bias": module.b_norm}
            elif module.name == "full":
                deltas[f"{name}.weight"] = module.weight - module._org_weight[0]
                if module.bias is not None:
                    deltas[f"{name}.bias"] = module.bias - module.org_bias[0]
            elif module.name == "locon" and module.wd:
                deltas[f"{name}.weight"] = module.get_merged_weight()[0] - module.org_weight
            elif module.name == "locon":
                deltas[f"{name}.weight"] = module.make_weight() * module.scale
            else:
                deltas[f"{name}.weight"] = module.get_weight(module.shape) * module.scalar
    np.savez(folder / "deltas.npz", **{name: value.detach().double().numpy() for name, value in deltas.items()})
    network.save_weights(str(folder / "lycoris.safetensors"), torch.float32, {})
    return {}


if __name__ == "__main__":
    runner.serve(load)
