"""Targets under PEFT's names and in its shapes; the reader of these is `lrconvert.formats.readers.peft`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import ExportError
from lrconvert.formats.exporters.shared.peft import is_embedding
from lrconvert.formats.exporters.shared.plain import Pair, module_of, unfolded
from lrconvert.formats.readers.peft.experts import ORDER
from lrconvert.formats.readers.peft.names import BASE_LAYER, PREFIX
from lrconvert.lora.adapter import Adapter, Target

_EXPERTS = ("expert", "expert_transposed")


@dataclass(frozen=True)
class Layer:
    """One adapted module (`name`), or parameter of one, of PEFT. `factors` are A and B by their names in the file, all
    of one `rank`. Layers stored (in, out), Conv1D, are "transposed"; embeddings always are and are not called so."""

    name: str
    kind: Literal["linear", "transposed", "embedding", "parameter"]
    rank: int
    factors: dict[str, Array]


def is_parameter(adapter: Adapter, target: Target) -> bool:
    """Return True for what PEFT adapts as a parameter: a stack of experts, what the source named so, and whatever is no
    module's weight."""
    listed = [n for n in adapter.provenance.fields.get("target_parameters", "").split(",") if n]
    alone = not target.name.endswith(".weight") or any(f".{target.name}".endswith(f".{n}") for n in listed)
    return target.view.kind in _EXPERTS or (target.view.kind == "matrix" and alone)


def adapted_layers(adapter: Adapter, pairs: Iterable[Pair], rank: Callable[[int], int]) -> list[Layer]:
    """Return every target with its factors as PEFT stores them, padded with zeros to ``rank(their own rank)``.

    Raises E-EXPORT for slices of fused layers and convolutions in groups.
    """
    layers: list[Layer] = []
    parameters: dict[str, list[Pair]] = {}
    for pair in pairs:
        if is_parameter(adapter, pair.target):
            parameters.setdefault(pair.target.name, []).append(pair)
        else:
            layers.append(_layer(pair.padded(rank(pair.rank)), is_embedding(adapter, pair.target)))
    return [*layers, *_wrapped(parameters, rank)]


def _layer(pair: Pair, embedding: bool) -> Layer:
    module = module_of(pair.target, "PEFT")
    if embedding:
        stem = f"{PREFIX}{module}.lora_embedding_"
        return Layer(module, "embedding", pair.rank, {f"{stem}A": pair.a, f"{stem}B": pair.b})
    a, b = unfolded(pair, "PEFT")
    kind: Literal["linear", "transposed"] = "transposed" if pair.target.view.kind == "transposed" else "linear"
    return Layer(module, kind, pair.rank, _named(module, a, b))


def _named(module: str, a: Array, b: Array) -> dict[str, Array]:
    return {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}


# --- parameters -----------------------------------------------------------------------------------------------------


def _wrapped(parameters: Mapping[str, Sequence[Pair]], rank: Callable[[int], int]) -> list[Layer]:
    """Return parameters with the wrappers that PEFT puts around their modules: the first is innermost. Raises E-EXPORT
    if their order is unknown."""
    roots: dict[str, list[str]] = {}
    for name in parameters:
        roots.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    layers = []
    for root, leaves in sorted(roots.items()):
        if len(leaves) > 1 and not set(leaves) <= set(ORDER):
            raise ExportError(f"the order in which PEFT wraps {', '.join(leaves)} of {root!r} is not known")
        leaves.sort(key=ORDER.index if len(leaves) > 1 else str)
        for depth, leaf in zip(reversed(range(len(leaves))), leaves, strict=True):
            name = f"{root}.{leaf}"
            a, b, common = _stacked(parameters[name], rank)
            layers.append(Layer(name, "parameter", common, _named(root + BASE_LAYER * depth, a, b)))
    return layers


def _stacked(pairs: Sequence[Pair], rank: Callable[[int], int]) -> tuple[Array, Array, int]:
    """Return A (experts * r, in), B (out, experts * r) and r. Expert i has rows i * r to (i + 1) * r of A, and columns
    i, i + experts, ... of B; experts without an update have zeros."""
    target = pairs[0].target
    common = rank(max(pair.rank for pair in pairs))
    if target.view.kind not in _EXPERTS:
        whole = pairs[0].padded(common)
        return whole.a, whole.b, common
    experts, (out, inner) = target.shape[0], target.matrix_shape
    a, b = np.zeros((experts, common, inner), np.float32), np.zeros((out, common, experts), np.float32)
    for pair in pairs:
        expert = int(pair.target.view.text.rpartition(":")[2])
        a[expert, : pair.rank], b[:, : pair.rank, expert] = pair.a, pair.b
    return a.reshape(-1, inner), b.reshape(out, -1), common
