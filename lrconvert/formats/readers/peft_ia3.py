"""PEFT (IA)^3: factors ``ia3_l`` on the outputs of a layer (out, 1), or on its inputs (1, in) where the configuration
calls it feed-forward. The update is ``(l - 1) * W`` by rows, or by columns: it needs the weights of the base, and its
rank is how many factors are not 1. Paper: arXiv 2205.05638.

A LoRA exactly where these are few; else its best part, by the SVD. A bias, whose outputs are multiplied, too, gets its
own difference, as an extra tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.core.dtypes import F64, FLOATS, STORAGE, Array, Stored, decode, round_to
from lrconvert.core.errors import BaseError, LimitError, PairError, UnsupportedLoraError
from lrconvert.core.wording import spelled
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.shared import peft_kinds, products
from lrconvert.formats.readers.shared.folders import PEFT_WEIGHTS, weights_in
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import conv_view
from lrconvert.formats.readers.shared.products import Product
from lrconvert.formats.readers.shared.weights import Weights, load_finite, open_weights
from lrconvert.io.checkpoint import Checkpoint, open_checkpoint
from lrconvert.io.container import TensorInfo
from lrconvert.lora import base_names, factoring
from lrconvert.lora.adapter import MATRIX, TRANSPOSED, ExtraTensor, LoraAdapter, LoraTarget, Target
from lrconvert.lora.base_names import NameIndex, tied_source
from lrconvert.lora.base_weights import BaseWeights
from lrconvert.lora.factoring import Factored

_PART = "ia3_l"
_OWN = {"fan_in_fan_out": "fan_in_fan_out"}
_UNREAD = ("feedforward_modules", "init_ia3_weights")


def recognises(path: Path) -> bool:
    """Return whether the configuration says IA3."""
    return peft_kinds.is_of_kind(path, "IA3")


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer of the base with its factors. `on_inputs`: they are on what goes in."""

    module: str
    target: Target
    factors: F64
    on_inputs: bool


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read an (IA)^3 with the weights of its base. Raises E-BASE without one and for layers that it lacks, E-CONFIG,
    E-LORA-FEATURE, E-TENSOR, E-PAIR, E-EMPTY, E-LIMIT, E-DTYPE, E-VALUE, E-BASE-QUANT."""
    config, settings = peft_kinds.settings_of(path, "IA3", _OWN, _UNREAD)
    if options.base is None:
        what = "an (IA)^3 multiplies what layers give: as an update it is made of the weights of the base"
        raise BaseError(what, fix=f"give the base with its weights ({spelled('base', ...)})")
    with open_weights(weights_in(path, PEFT_WEIGHTS), options) as weights, open_checkpoint(options.base) as checkpoint:
        places = peft_kinds.sort(weights, (_PART,))
        index = NameIndex.of(checkpoint)
        layers = [
            _layer(module, parts[_PART], config, checkpoint, index, weights) for module, parts in places.modules.items()
        ]
        targets = list(_targets(layers, checkpoint, options.most_rank))
        biases = list(_biases(layers, index, checkpoint))
        adapter = peft_kinds.build(weights, places, targets, config, settings, biases)
    return products.with_shares(adapter, "(IA)^3")


# --- layers ---------------------------------------------------------------------------------------------------------


def _layer(
    module: str, info: TensorInfo, config: Mapping[str, Any], checkpoint: Checkpoint, index: NameIndex, weights: Weights
) -> _Layer:
    """Return one layer in the shape that the base stores. Raises E-BASE, E-PAIR, E-LORA-FEATURE, E-DTYPE, E-VALUE."""
    name = f"{module}.weight"
    stored = checkpoint.tensors.get(index.find(name) or tied_source(name, checkpoint) or "")
    if stored is None:
        raise index.missing(name)
    shape, factors = stored.shape, load_finite(weights, info).decode().astype(np.float64).reshape(-1)
    on_inputs = _on_inputs(module, info, config.get("feedforward_modules"))
    place = 1 if on_inputs else 0
    transposed = len(shape) == 2 and (shape[place] != len(factors) or bool(config.get("fan_in_fan_out")))
    if len(shape) < 2 or shape[1 - place if transposed else place] != len(factors):
        side = "inputs" if on_inputs else "outputs"
        what = f"{module}: {len(factors)} factors on {side}, and the layer is {list(shape)} in the base"
        raise BaseError(what, fix="is this the adapter's own base?", path=checkpoint.root)
    if len(shape) == 2:
        return _Layer(module, Target(name, shape, TRANSPOSED if transposed else MATRIX), factors, on_inputs)
    view = conv_view(module, "the weight", shape)
    return _Layer(module, Target(name, shape, view), _unfolded(factors, shape) if on_inputs else factors, on_inputs)


def _unfolded(factors: F64, shape: tuple[int, ...]) -> F64:
    return np.repeat(factors, math.prod(shape[2:]))


def _on_inputs(module: str, info: TensorInfo, stated: object) -> bool:
    """Return whether factors are on the inputs: those of a linear layer lie in a row then, of a convolution the
    configuration says it. Raises E-PAIR, E-LORA-FEATURE."""
    wide = [place for place, size in enumerate(info.shape) if size > 1]
    if len(wide) > 1:
        raise PairError(f"{module}: {info.name!r:.160} is {list(info.shape)}, expected one row or one column")
    if len(info.shape) == 2 and wide:
        return wide[0] == 1
    if isinstance(stated, str):
        what = f"{module}: feedforward_modules is a pattern, and the shape of the factors does not tell their side"
        raise UnsupportedLoraError(what, fix="write feedforward_modules as a list of names of modules")
    return isinstance(stated, list) and any(isinstance(name, str) and module.endswith(name) for name in stated)


# --- updates --------------------------------------------------------------------------------------------------------


def _targets(layers: Sequence[_Layer], checkpoint: Checkpoint, limit: int) -> Iterator[LoraTarget]:
    """Yield the pair of every layer. Raises E-BASE, E-ORIENT, E-BASE-QUANT, E-LIMIT."""
    layers = sorted(layers, key=lambda layer: layer.target)
    nothing = tuple(LoraTarget(layer.target, *_zeros(layer.target.matrix_shape), 1.0) for layer in layers)
    stored = base_names.resolve(LoraAdapter(nothing), checkpoint).shapes()  # whose views the base has settled
    targets = [replace(place, name=layer.target.name) for layer, place in zip(layers, stored, strict=True)]
    claimed = (replace(pair, target=target) for pair, target in zip(nothing, targets, strict=True))
    base = BaseWeights(LoraAdapter(tuple(claimed)), checkpoint)
    for layer, target in zip(layers, targets, strict=True):
        weight = base.rows(target, 0, target.out_features)
        pair = Product(_update(layer, weight, limit), (), None).target(layer.module, 1.0)
        yield replace(pair, target=target)


def _zeros(shape: tuple[int, int]) -> tuple[Stored, Stored]:
    out, inner = shape
    return Stored("F32", np.zeros((1, inner), "<f4")), Stored("F32", np.zeros((out, 1), "<f4"))


def _update(layer: _Layer, weight: Array, limit: int) -> Factored:
    """Return ``(l - 1) * W``: of each factor that is not 1 its row, or its column, of W; above `limit` the best."""
    changes = layer.factors - 1
    (which,) = np.nonzero(changes)
    if len(which) > limit:
        scaled = changes if layer.on_inputs else changes[:, None]
        return factoring.of_matrix((weight * scaled).astype(weight.dtype), limit)
    which = which if len(which) else np.zeros(1, np.intp)
    units = np.zeros((len(changes), len(which)))
    units[which, np.arange(len(which))] = changes[which]
    if layer.on_inputs:
        return Factored(units.T, weight[:, which].astype(np.float64))
    return Factored(weight[which].astype(np.float64), units)


def _biases(layers: Sequence[_Layer], index: NameIndex, checkpoint: Checkpoint) -> Iterator[ExtraTensor]:
    """Yield what is added to the bias of layers whose outputs are multiplied. Raises E-BASE, E-LIMIT."""
    for layer in layers:
        name = f"{layer.module}.bias"
        info = None if layer.on_inputs else checkpoint.tensors.get(index.find(name) or "")
        if info is None:
            continue
        if info.dtype not in FLOATS or info.shape != layer.factors.shape:
            raise BaseError(f"{name!r} is {info.dtype} {list(info.shape)} in the base", path=checkpoint.root)
        bias = decode(np.frombuffer(checkpoint.read(info), STORAGE[info.dtype]), info.dtype).astype(np.float64)
        added = round_to(bias * (layer.factors - 1), "F32")
        if not np.isfinite(added).all():
            raise LimitError(f"the change of {name!r} is beyond the range of float32")
        yield ExtraTensor(name, "F32", added.shape, added.tobytes(), "add")


READER = Reader("peft_ia3", "PEFT (IA)^3 folder", read, recognises, takes_rank=True)
