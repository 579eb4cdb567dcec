"""Tiny models with real PEFT LoRAs, made on the spot, and the same change of the model from what our reader gives.

`merged` writes the meaning of views and of extra tensors out once more, in torch and apart from the package.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import dense
from torch import nn

from lrconvert.lora.adapter import LoraAdapter, LoraTarget

Maker = Callable[[], nn.Module]


class Net(nn.Module):
    """Every kind of layer that PEFT adapts, in one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.conv1 = nn.Conv1d(6, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 8, 1)
        self.conv2 = nn.Conv2d(8, 10, (3, 2), stride=(1, 2))
        self.lin = nn.Linear(10, 7)
        self.head = nn.Linear(7, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(self.emb(x).transpose(1, 2)).tanh()
        h = self.conv2(self.point(h.reshape(len(x), 8, 4, 4)).tanh()).tanh()
        return self.head(self.lin(h.flatten(2).transpose(1, 2)).tanh())


class Film(nn.Module):
    """Convolutions in three dimensions, one of single places, as models of films have them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, 8, (1, 2, 2), stride=(1, 2, 2))
        self.mix = nn.Conv3d(8, 5, (3, 1, 2), padding=(1, 0, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(self.patch(x).tanh()).flatten(2)


class Experts(nn.Module):
    """A stack of experts that is stored (experts, in, out) and says so to PEFT, and one that is (experts, out, in)."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.gate_up_proj = nn.Parameter(torch.randn((3, 6, 10) if is_transposed else (3, 10, 6)))
        self.down_proj = nn.Parameter(torch.randn((3, 5, 6) if is_transposed else (3, 6, 5)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turn = (lambda w: w) if self.is_transposed else (lambda w: w.transpose(1, 2))
        up, gate = torch.matmul(x[None], turn(self.gate_up_proj)).chunk(2, -1)
        return torch.matmul(up * gate.sigmoid(), turn(self.down_proj)).sum(0)


class Mixture(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.experts = Experts(is_transposed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(self.lin(x))


def seeded(make: Maker) -> Maker:
    """The same model at every call."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return build


def transformer(name: str, **fields: Any) -> Maker:
    """A one-layer model of a transformers family, by the name of its class; `fields` go into its configuration."""

    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, name)
        common = {
            **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "head_dim": 8},
        }
        return kind(kind.config_class(**{**common, **fields}))

    return seeded(build)


def train(
    make: Maker, folder: Path, *, disturb: float = 0.3, save: dict[str, Any] | None = None, **config: Any
) -> None:
    """Save a LoRA with `config` on a new model to `folder`, all that is trainable moved away from its start."""
    import peft

    model = peft.get_peft_model(make(), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += disturb * torch.randn_like(parameter)
    model.save_pretrained(str(folder), **(save or {}))


def peft_model(make: Maker, folder: Path) -> nn.Module:
    import peft

    return peft.PeftModel.from_pretrained(make(), str(folder)).eval()


def their_deltas(model: nn.Module) -> dict[str, np.ndarray]:
    """PEFT's own update of every parameter that it adapts."""
    deltas = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            module = name.removeprefix("base_model.model.")
            while module.endswith(".base_layer"):
                module = module.removesuffix(".base_layer")
            leaf = getattr(layer, "parameter_name", "weight")
            deltas[f"{module}.{leaf}"] = layer.get_delta_weight("default").detach().double().numpy()
    return deltas


# --- the same from what we read -------------------------------------------------------------------------------------


def stored_delta(pair: LoraTarget) -> np.ndarray:
    """The update in the layout of its parameter, zero elsewhere."""
    delta, shape, kind = dense(pair), pair.target.shape, pair.target.view.kind
    if kind == "transposed":
        return delta.T
    if kind in ("matrix", "conv"):
        return delta.reshape(shape)
    whole = np.zeros(shape)
    words = pair.target.view.text.split(":")
    if kind == "rows":
        whole[int(words[1]) : int(words[2])] = delta
    else:
        whole[int(words[1])] = delta.T if kind == "expert_transposed" else delta
    return whole


def deltas(lora: LoraAdapter) -> dict[str, np.ndarray]:
    """The whole update of every parameter."""
    sums: dict[str, np.ndarray] = {}
    for pair in lora.targets:
        sums[pair.target.name] = sums.get(pair.target.name, 0) + stored_delta(pair)
    return sums


def merged(lora: LoraAdapter, model: nn.Module) -> nn.Module:
    """The model with the adapter in its weights."""
    uses: dict[str, dict[str, Any]] = {}
    for extra in lora.extras:
        shape = extra.shape
        dtype = {"F32": np.float32, "F64": np.float64, "I64": np.int64}[extra.dtype]
        uses.setdefault(extra.use, {})[extra.name] = torch.from_numpy(
            np.frombuffer(extra.data, dtype).reshape(shape).copy()
        )
    with torch.no_grad():
        for name, value in uses.get("rows", {}).items():
            model.get_parameter(name)[uses["row_indices"][name]] = value  # in place: tied weights share it
        for name, value in uses.get("replace", {}).items():
            if ".base_layer." in name:
                model.get_parameter(name.replace(".base_layer.", ".")).copy_(value)
            else:
                _set(model, name, value)
        for name, delta in deltas(lora).items():
            weight = model.get_parameter(name).double() + torch.from_numpy(delta)
            if name in uses.get("magnitude", {}):
                weight = _scaled(weight, uses["magnitude"][name], lora, name)
            _set(model, name, weight.float())
        for name, value in uses.get("add", {}).items():
            _set(model, name, model.get_parameter(name) + value)
    return model


def _scaled(weight: torch.Tensor, magnitude: torch.Tensor, lora: LoraAdapter, name: str) -> torch.Tensor:
    """DoRA: every output of the sum is scaled to its magnitude."""
    (pair,) = [pair for pair in lora.targets if pair.target.name == name]
    turned = pair.target.view.kind == "transposed"
    matrix = (weight.T if turned else weight).flatten(1)
    matrix = matrix * (magnitude.reshape(-1).double() / matrix.norm(dim=1))[:, None]
    return matrix.T if turned else matrix.reshape(weight.shape)


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a tensor in place of a parameter, which unties it from others that share it."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))


def outputs(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(inputs)
    return (output.logits if hasattr(output, "logits") else output).double()


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative to the norm of theirs."""
    return float((ours - theirs).norm() / theirs.norm())
