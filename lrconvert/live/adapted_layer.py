"""Layers and parameters of a live model that compute with updates, through factors and never as a dense update."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lrconvert.live.attached_adapter import Update
from lrconvert.live.layer_inputs import CONVOLUTIONS
from lrconvert.lora.adapter import Target


@dataclass(eq=False)
class ActiveAdapters:
    """The names of the adapters that a model computes with, shared by all its layers."""

    names: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Trained token rows of an embedding, or of an output layer that is tied to it."""

    name: str
    index: Tensor  # (n,), rising
    values: Tensor  # (n, features)

    def looked_up(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """Return the rows `y` that an embedding found for the tokens `x`, with the trained rows, times `scale`."""
        index, values = self.index.to(x.device), self.values.to(device=y.device, dtype=y.dtype) * scale
        place = torch.searchsorted(index, x).clamp(max=index.numel() - 1)
        return torch.where((index[place] == x)[..., None], values[place], y)

    def multiplied(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output `y` of a linear layer for its input `x`, with the trained rows."""
        index, values = self.index.to(y.device), self.values.to(device=y.device, dtype=y.dtype)
        own = None if bias is None else bias[index].to(y.dtype)
        return y.index_copy(-1, index, F.linear(x.to(y.dtype), values, own))

    def placed(self, weight: Tensor) -> Tensor:
        """Return the weight with the trained rows."""
        return weight.index_copy(0, self.index.to(weight.device), self.values.to(weight))


class AdaptedLayer(nn.Module):
    """A layer with the updates of the active adapters. Attributes that it lacks are those of the layer itself
    (`in_features`, ...); its `weight` has the trained rows, for those who use it without the layer."""

    def __init__(self, layer: nn.Module, active: ActiveAdapters) -> None:
        super().__init__()
        self.base_layer = layer
        self.updates: list[Update] = []
        self.rows: list[TokenRows] = []
        self.active = active
        self.scale = lookup_scale(layer)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer: Any = super().__getattr__("base_layer")
            return self._weight(layer) if name == "weight" else getattr(layer, name)

    def _weight(self, layer: nn.Module) -> Any:
        weight: Any = layer.weight
        for rows in self._active_rows():
            weight = rows.placed(weight)
        return weight

    def _active_rows(self) -> list[TokenRows]:
        return [rows for rows in self.rows if rows.name in self.active.names]

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Any:
        own = y = self._with_rows(x, arguments, named)  # as in PEFT, updates are added to the trained rows
        for update in self.updates:
            if update.name in self.active.names:
                change = self._change(update, x, own)  # a tensor of its own: the wider of the two takes the sum
                y = change.add_(y) if torch.promote_types(change.dtype, y.dtype) == change.dtype else y + change
        return y.to(own.dtype)  # rounded once, after all was added

    def _with_rows(self, x: Tensor, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Return the output of the layer itself, with the trained rows of the active adapters."""
        rows = self._active_rows()
        if rows and self.scale is None and not isinstance(self.base_layer, nn.Linear):
            # A layer that does more than to look up or multiply: let it do so with the other rows.
            weight = {"weight": self._weight(self.base_layer)}
            return functional_call(self.base_layer, weight, (x, *arguments), dict(named))
        y = self.base_layer(x, *arguments, **named)
        bias: Any = getattr(self.base_layer, "bias", None)
        for trained in rows:
            y = trained.multiplied(x, y, bias) if self.scale is None else trained.looked_up(x, y, self.scale)
        return y

    def _change(self, update: Update, x: Tensor, own: Tensor) -> Tensor:
        """Return the change that an update makes to the output `own` of the layer itself."""
        if update.source.needs_base:
            dense = dense_update(update, self._dense_weight())
            change = self._scaled(_product(self.base_layer, update.target, x, dense))
        else:
            change = self._through_factors(update, x, own)
        if update.bias is not None:
            change = change + _per_output(self.base_layer, update.bias).to(change.dtype) * update.source.scale
        return change

    def _through_factors(self, update: Update, x: Tensor, own: Tensor) -> Tensor:
        a, b = update.source.factors(update.which)
        scale = update.source.factor_of(update.which)
        if update.input_magnitude is not None:
            factor = _per_input(self.base_layer, _input_factor(self._dense_weight(), update, a, b))
            plain = self._without_bias(self.base_layer((x * (factor - 1)).to(x.dtype)))
            return _slice_of(plain, update.target) + _product(self.base_layer, update.target, x * factor, a, b, scale)
        change = self._scaled(_product(self.base_layer, update.target, x, a, b, scale))
        if update.magnitude is None:
            return change
        factor = _among_outputs(_dora_factor(self._dense_weight(), update, a, b), update.target, 1.0)
        factor = _per_output(self.base_layer, factor).to(change.dtype)
        return (factor - 1) * self._without_bias(own).to(change.dtype) + factor * change

    def _without_bias(self, own: Tensor) -> Tensor:
        bias: Any = getattr(self.base_layer, "bias", None)
        return own if bias is None else own - _per_output(self.base_layer, bias)

    def _dense_weight(self) -> Tensor:
        """The layer's weight, dequantized and with the trained rows."""
        weight = dense_weight(self.base_layer)
        for rows in self._active_rows():
            weight = rows.placed(weight)
        return weight

    def _scaled(self, change: Tensor) -> Tensor:
        return change if self.scale in (None, 1.0) else change * self.scale


def lookup_scale(layer: nn.Module) -> float | None:
    """Return what an embedding multiplies the row of each token with: its own pass is asked, with other rows. None if
    it does anything else, as norms or another choice of rows; PEFT adds updates to the output of such a one as they
    are."""
    if not isinstance(layer, nn.Embedding):
        return None
    if type(layer).forward is nn.Embedding.forward:
        return 1.0
    weight = layer.weight
    rows = 1 + torch.arange(len(weight), device=weight.device)[:, None] % 3
    tokens = torch.arange(min(3, len(weight)), device=weight.device)[None]
    try:
        with torch.no_grad():
            found = functional_call(layer, {"weight": rows.to(weight.dtype).expand_as(weight)}, (tokens,)).double()
    except Exception:  # whatever a layer of a stranger's raises for an input that it does not take
        return None
    scale = float(found.flatten()[0])
    wanted = (scale * rows[: tokens.numel()].double()).expand_as(found[0])
    is_scale = scale != 0 and found[0].shape == weight[: len(wanted)].shape and torch.allclose(found[0], wanted, 1e-2)
    return scale if is_scale else None


# --- products -------------------------------------------------------------------------------------------------------


def _product(
    layer: nn.Module, target: Target, x: Tensor, a: Tensor, b: Tensor | None = None, factor: float = 1.0
) -> Tensor:
    """``factor B @ A``, or a dense update `a` (out, in) alone, applied to the input of `layer`."""
    if isinstance(layer, nn.Embedding):
        table = a.T
        if target.view.kind == "matrix":  # (tokens, features): rows of B are looked up
            table, b = (a, None) if b is None else (b, a.T)
        inner = F.embedding(x, table, layer.padding_idx, layer.max_norm, layer.norm_type, False)
        return inner if b is None else _times(inner, factor) @ b.T
    x = x.to(a.dtype)
    if isinstance(layer, CONVOLUTIONS):
        kernel = layer.weight.shape[2:]
        inner = layer._conv_forward(x, a.reshape(a.shape[0], -1, *kernel), None)
        outer = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
        return inner if b is None else outer(_times(inner, factor), b.reshape(*b.shape, *(1 for _ in kernel)))
    inner = F.linear(x, a)
    return _among_outputs(inner if b is None else F.linear(_times(inner, factor), b), target)


def _times(inner: Tensor, factor: float) -> Tensor:
    """The few numbers between A and B times the scale of an update, which the many outputs would be multiplied with."""
    return inner if factor == 1 else inner * factor


def _among_outputs(change: Tensor, target: Target, others: float = 0.0) -> Tensor:
    """Spread the outputs of a target over all those of its layer: a slice of a fused one has a part of them."""
    if target.view.kind != "rows":
        return change
    start, stop = (int(n) for n in target.view.text.split(":")[1:])
    return F.pad(change, (start, target.shape[0] - stop), value=others)


def _slice_of(outputs: Tensor, target: Target) -> Tensor:
    """The outputs of a layer, zero beside those of its target."""
    if target.view.kind != "rows":
        return outputs
    start, stop = (int(n) for n in target.view.text.split(":")[1:])
    return _among_outputs(outputs[..., start:stop], target)


def _per_output(layer: nn.Module, values: Tensor) -> Tensor:
    """One value per output, so that it spreads over the outputs of `layer`."""
    if isinstance(layer, CONVOLUTIONS):
        return values.reshape(-1, *(1 for _ in layer.weight.shape[2:]))
    return values


def _per_input(layer: nn.Module, values: Tensor) -> Tensor:
    """One value per input, so that it spreads over the inputs of `layer`; those of a group are as those of another."""
    if isinstance(layer, CONVOLUTIONS):
        return values.repeat(layer.groups).reshape(-1, *(1 for _ in layer.weight.shape[2:]))
    return values


def _dora_factor(weight: Tensor, update: Update, a: Tensor, b: Tensor) -> Tensor:
    """magnitude / ||W + s B A|| along in, (out,), by Gram matrices: no dense sum is formed."""
    matrix = _matrix(weight, update.target).to(a.dtype)
    scale = update.source.factor_of(update.which)
    cross = ((matrix @ a.T) * b).sum(1)
    square = matrix.square().sum(1) + 2 * scale * cross + scale * scale * ((b @ (a @ a.T)) * b).sum(1)
    assert update.magnitude is not None
    return update.magnitude.to(a.dtype) / square.sqrt()


def _input_factor(weight: Tensor, update: Update, a: Tensor, b: Tensor) -> Tensor:
    """magnitude / ||W + s B A|| along out and the places of a kernel, (channels,), by Gram matrices."""
    matrix = _matrix(weight, update.target).to(a.dtype)
    scale = update.source.factor_of(update.which)
    cross = ((b.T @ matrix) * a).sum(0)
    square = matrix.square().sum(0) + 2 * scale * cross + scale * scale * (((b.T @ b) @ a) * a).sum(0)
    assert update.input_magnitude is not None
    return update.input_magnitude.to(a.dtype) / square.reshape(update.target.channels, -1).sum(1).sqrt()


# --- dense weights and updates --------------------------------------------------------------------------------------


def dense_weight(layer: nn.Module) -> Tensor:
    """Return the weight of a layer; of a 4-bit or 8-bit layer of bitsandbytes, dequantized."""
    weight: Any = layer.weight
    state: Any = getattr(weight, "quant_state", None)
    if state is not None:
        functional: Any = importlib.import_module("bitsandbytes.functional")  # it made the layer, so it is there
        weight = functional.dequantize_4bit(weight.data, state)
    elif weight.dtype == torch.int8:
        quantized: Any = layer
        weight = weight.data * quantized.state.SCB[:, None] / 127
    dense: Tensor = weight
    return dense


def dense_update(update: Update, weight: Tensor) -> Tensor:
    """Return an update (out, in) of the base's parameter `weight`, as it is stored."""
    if update.source.needs_base:
        dense = update.source.update_on(update.which, _matrix(weight, update.target).float())
    else:
        a, b = update.source.factors(update.which)
        dense = b @ a
    return dense * update.source.factor_of(update.which)


def _matrix(weight: Tensor, target: Target) -> Tensor:
    """The matrix (out, in) that a target is in its parameter."""
    kind, _, rest = target.view.text.partition(":")
    if kind.startswith("expert"):
        weight = weight[int(rest)]
    if kind.endswith("transposed"):
        return weight.T
    if kind == "rows":
        start, stop = (int(n) for n in rest.split(":"))
        return weight[start:stop]
    return weight.flatten(1)
