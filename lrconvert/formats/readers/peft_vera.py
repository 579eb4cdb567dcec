"""PEFT VeRA: two random matrices that all layers share, ``base_model.vera_A`` (r, widest in) and ``vera_B`` (widest
out, r), and two vectors of each layer, ``vera_lambda_b`` (out,) and ``vera_lambda_d`` (r,). The update is
``diag(b) @ B @ diag(d) @ A`` with the first rows of B and columns of A: a LoRA of rank r. Paper: arXiv 2310.11454.

The file does not say how many inputs a layer has, the base does (its config.json is enough).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lrconvert.core.dtypes import F64, Stored
from lrconvert.core.errors import BaseError, PairError
from lrconvert.core.wording import spelled
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.shared import naming, peft_kinds, products
from lrconvert.formats.readers.shared.folders import PEFT_WEIGHTS, weights_in
from lrconvert.formats.readers.shared.naming import Component
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.products import Product
from lrconvert.formats.readers.shared.weights import Weights, load_finite, open_weights
from lrconvert.io.container import TensorInfo
from lrconvert.lora import factoring
from lrconvert.lora.adapter import LoraAdapter, LoraTarget

_A, _B, _OUT, _INNER = "vera_A", "vera_B", "vera_lambda_b", "vera_lambda_d"
_OWN = {"r": "r", "fan_in_fan_out": "fan_in_fan_out"}
_UNREAD = ("d_initial", "projection_prng_key", "save_projection", "vera_dropout")


def recognises(path: Path) -> bool:
    """Return whether the configuration says VERA."""
    return peft_kinds.is_of_kind(path, "VERA")


@dataclass
class _Shared:
    """The two matrices of all layers, float64; and their first columns for layers of each width, made once."""

    a: F64
    b: F64
    columns: dict[int, Stored] = field(default_factory=dict)


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read a VeRA. Raises E-BASE without a base that says how wide the layers are, E-PAIR if the shared matrices were
    not saved or do not fit, E-CONFIG, E-LORA-FEATURE, E-TENSOR, E-EMPTY, E-LIMIT, E-DTYPE, E-VALUE."""
    config, settings = peft_kinds.settings_of(path, "VERA", _OWN, _UNREAD)
    with open_weights(weights_in(path, PEFT_WEIGHTS), options) as weights:
        places = peft_kinds.sort(weights, (_OUT, _INNER), (_A, _B))
        shared = _shared(places.whole, weights)
        component = naming.base_component(options)
        if component is None:
            what = "the file does not say how many inputs its layers have"
            raise BaseError(what, fix=f"give the base ({spelled('base', ...)}; its config.json is enough)")
        targets = [
            peft_kinds.turned(_pair(module, parts, shared, component, options, weights), settings.transposed)
            for module, parts in places.modules.items()
        ]
        adapter = peft_kinds.build(weights, places, targets, config, settings)
    return products.with_shares(adapter, "VeRA")


def _shared(whole: Mapping[str, TensorInfo], weights: Weights) -> _Shared:
    """Return vera_A and vera_B. Raises E-PAIR, E-DTYPE, E-VALUE."""
    for name in (_A, _B):
        if name not in whole:
            what = f"the shared matrix {name} is not in the file: PEFT would draw it again, from a seed"
            raise PairError(what, fix="load it with PEFT and save it with save_projection=True in its configuration")
    a, b = (load_finite(weights, whole[name]).decode().astype(np.float64) for name in (_A, _B))
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise PairError(f"{_A} {list(a.shape)} and {_B} {list(b.shape)} do not fit; (r, in) and (out, r)")
    return _Shared(a, b)


def _pair(
    module: str,
    parts: Mapping[str, TensorInfo],
    shared: _Shared,
    component: Component,
    options: ReadOptions,
    weights: Weights,
) -> LoraTarget:
    """Return one layer (out, in). Raises E-PAIR, E-BASE, E-LIMIT, E-DTYPE, E-VALUE."""
    for part in (_OUT, _INNER):
        if part not in parts:
            raise PairError(f"{module}: has no {part}", fix="the file is incomplete")
    out, rank = (load_finite(weights, parts[part]).decode().astype(np.float64).reshape(-1) for part in (_OUT, _INNER))
    inner = _inputs(module, len(out), component)
    if len(rank) > shared.a.shape[0] or len(out) > shared.b.shape[0] or inner > shared.a.shape[1]:
        what = f"{module}: a layer of {len(out)} outputs, {inner} inputs and rank {len(rank)} does not fit"
        raise PairError(f"{what} {_A} {list(shared.a.shape)} and {_B} {list(shared.b.shape)}")
    if len(rank) != shared.a.shape[0]:
        what = f"{module}: {_INNER} has {len(rank)} numbers, the shared matrices are of rank {shared.a.shape[0]}"
        raise PairError(what, fix="is the file of one adapter?")
    b = out[:, None] * shared.b[: len(out)] * rank
    pair = Product(factoring.of_product(b, shared.a[:, :inner], options.most_rank), (), None).target(module, 1.0)
    if pair.rank != len(rank):
        return pair
    columns = shared.columns.setdefault(inner, pair.a)  # one array for all layers of a width
    return LoraTarget(pair.target, columns, pair.b, pair.scale, pair.lost)


def _inputs(module: str, out: int, component: Component) -> int:
    """Return how many inputs a layer with `out` outputs has in the base. Raises E-BASE."""
    shape = component.shapes.get(f"{component.dotted(module)}.weight")
    if shape is None or len(shape) != 2 or out not in shape:
        shown = "of no known shape" if shape is None else f"{list(shape)}"
        raise BaseError(f"{module}: has {out} outputs, its weight in the base is {shown}", path=component.root)
    return shape[1] if shape[0] == out else shape[0]


READER = Reader("peft_vera", "PEFT VeRA folder", read, recognises, takes_rank=True)
