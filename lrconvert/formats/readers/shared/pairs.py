"""What readers of plain layouts share: the parts of modules by name, a pair of factors as a target, the finished LoRA.

A pair is A (r, in) and B (out, r); of a convolution A (r, in, K, L) and B (out, r, 1, 1), or with a middle factor
(Tucker) A (r, in, 1, 1), M (r, r, K, L), B (out, r, 1, 1), whose A and M are multiplied out in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from lrconvert.core.dtypes import Stored
from lrconvert.core.errors import (
    ConfigError,
    EmptyAdapterError,
    LimitError,
    PairError,
    TensorUnknownError,
    UnsupportedLoraError,
)
from lrconvert.core.limits import MAX_RANK
from lrconvert.formats.readers.shared import kinds
from lrconvert.formats.readers.shared.weights import Weights, load_finite
from lrconvert.io.container import TensorInfo, combined_digest, tensor_digest
from lrconvert.lora.adapter import MATRIX, ExtraTensor, LoraAdapter, LoraTarget, Provenance, Target, View

Parts = dict[str, TensorInfo]  # part of a module -> tensor
_MOST_KERNEL = 9999  # what a view can spell


@dataclass(frozen=True)
class Labels:
    """How a layout calls A and B, for messages."""

    a: str
    b: str


def sort_parts(weights: Weights, split: Callable[[str], tuple[str, str] | None]) -> dict[str, Parts]:
    """{module: {part: tensor}}, sorted, by `split`: (module, part) of a tensor's name, None for a name that it does not
    know. Raises E-NOT-LORA and E-LORA-FEATURE for parts of other kinds of adapters, E-TENSOR for other names and for
    two tensors of one meaning."""
    modules: dict[str, Parts] = {}
    unknown = []
    for info in weights.tensors:
        found = split(info.name)
        if found is None:
            unknown.append(info.name)
            continue
        parts = modules.setdefault(found[0], {})
        other = parts.setdefault(found[1], info)
        if other is not info:
            raise TensorUnknownError(
                f"tensors {other.name!r} and {info.name!r} mean the same", fix="remove one of them"
            )
    if unknown:
        kinds.refuse(unknown)
        raise TensorUnknownError(
            f"tensor {unknown[0]!r:.200} has no known meaning in this layout",
            fix="remove it if it is not part of the adapter",
        )
    return dict(sorted(modules.items()))


def halves(module: str, parts: Mapping[str, TensorInfo], labels: Labels) -> tuple[TensorInfo, TensorInfo]:
    """The parts "A" and "B". Raises E-PAIR if one is missing."""
    for here, there in (("A", "B"), ("B", "A")):
        if here not in parts:
            name = {"A": labels.a, "B": labels.b}
            what = f"{module}: {name[there]} has no {name[here]}" if there in parts else f"{module}: has no factors"
            raise PairError(what, fix="the file is incomplete")
    return parts["A"], parts["B"]


def check_not_half(modules: Mapping[str, Parts], labels: Labels) -> None:
    """Raise E-PAIR if the file holds one half of every pair, E-EMPTY if it holds neither."""
    present = {part for parts in modules.values() for part in parts}
    for half, name in (("A", labels.a), ("B", labels.b)):
        other = labels.b if half == "A" else labels.a
        if half in present and not present & {"A", "B"} - {half}:
            raise PairError(
                f"the file holds {name} of {len(modules)} modules and not one {other}",
                fix="one half has no update; export both from the training",
            )
    if modules and not present & {"A", "B"}:
        first = next(iter(next(iter(modules.values())).values()))
        raise EmptyAdapterError(
            f"the file holds settings such as {first.name!r:.120}, and no matrices",
            fix="the training saved no weights; export the adapter again",
        )


def scalar(weights: Weights, info: TensorInfo) -> float:
    """The one number of a tensor. Raises E-PAIR, E-DTYPE, E-VALUE."""
    if math.prod(info.shape) != 1:
        raise PairError(f"tensor {info.name!r} is {list(info.shape)}, expected one number")
    if info.dtype in ("I64", "I32", "I16", "I8", "U8"):
        return float(weights.load(info).array.reshape(-1)[0])
    return float(load_finite(weights, info).decode().reshape(-1)[0])


def scale_of(module: str, alpha: float, rank: int) -> float:
    """alpha / r. Raises E-CONFIG if it is not finite."""
    scale = alpha / rank
    if not math.isfinite(scale):
        raise ConfigError(f"{module}: the scale alpha / r is not finite")
    return scale


# --- one pair -------------------------------------------------------------------------------------------------------


def rank_of(module: str, a: TensorInfo, b: TensorInfo, labels: Labels) -> int:
    """r of two halves that fit. Raises E-PAIR for those that do not or that look swapped, E-LIMIT."""
    shown = f"{labels.a} {list(a.shape)} and {labels.b} {list(b.shape)}"
    if min(len(a.shape), len(b.shape)) < 2 or a.shape[0] != b.shape[1]:
        if len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0]:
            raise PairError(f"{module}: {shown} look swapped", fix=f"exchange {labels.a} and {labels.b}")
        raise PairError(f"{module}: {shown} do not fit; expected (r, in) and (out, r)")
    rank = a.shape[0]
    if len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0] < rank:
        raise PairError(
            f"{module}: {shown} look swapped: the rank {rank} would be above both sides",
            fix=f"exchange {labels.a} and {labels.b}",
        )
    check_rank(module, rank)
    return rank


def check_rank(module: str, rank: int) -> None:
    """Raises E-LIMIT."""
    if rank > MAX_RANK:
        raise LimitError(f"{module}: rank {rank} is above {MAX_RANK}")


def pair(
    module: str, parts: Mapping[str, TensorInfo], scale: Callable[[int], float], weights: Weights, labels: Labels
) -> LoraTarget:
    """A linear layer or a convolution, `scale` by the rank. Raises E-PAIR, E-LORA-FEATURE, E-LIMIT, E-DTYPE,
    E-VALUE."""
    a, b = halves(module, parts, labels)
    rank = rank_of(module, a, b, labels)
    middle = parts.get("mid")
    (inner, *kernel), out = a.shape[1:], b.shape[0]
    if set(b.shape[2:]) > {1} or (kernel and len(b.shape) not in (2, len(a.shape))):
        raise PairError(f"{module}: {labels.a} {list(a.shape)} and {labels.b} {list(b.shape)} do not fit")
    stored_a, stored_b = load_finite(weights, a), load_finite(weights, b)
    if middle is not None:
        if set(kernel) != {1} or middle.shape[:2] != (rank, rank) or len(middle.shape) != len(a.shape):
            raise PairError(f"{module}: {middle.name!r} is {list(middle.shape)}, expected r, r and the kernel")
        kernel = list(middle.shape[2:])
        core = load_finite(weights, middle).decode().astype(np.float64)
        down = stored_a.decode().astype(np.float64).reshape(rank, inner)
        stored_a = Stored("F64", np.ascontiguousarray(np.einsum("pq...,qi->pi...", core, down)))
    if len(kernel) > 2:
        raise UnsupportedLoraError(
            f"{module}: {labels.a} is {list(a.shape)}, a convolution in three dimensions, which no view describes",
            fix="train it without this layer, or merge it with the tool that trained it",
        )
    if kernel and max(kernel) > _MOST_KERNEL:
        raise LimitError(f"{module}: the kernel {kernel} is above {_MOST_KERNEL}")
    view = View(f"conv:{'x'.join(map(str, kernel))}:1") if kernel else MATRIX
    return LoraTarget(
        Target(f"{module}.weight", (out, inner, *kernel), view),
        reshaped(stored_a, (rank, inner * math.prod(kernel))),
        reshaped(stored_b, (out, rank)),
        scale(rank),
    )


def reshaped(stored: Stored, shape: tuple[int, ...]) -> Stored:
    return replace(stored, array=stored.array.reshape(shape))


def turned(stored: Stored) -> Stored:
    """The transpose of a matrix, its bits unchanged."""
    return replace(stored, array=np.ascontiguousarray(stored.array.T))


def carried(name: str, info: TensorInfo, weights: Weights) -> ExtraTensor:
    """A tensor of any kind as an extra, byte for byte."""
    return ExtraTensor(name, info.dtype, info.shape, bytes(weights.read(info)))


# --- the whole ------------------------------------------------------------------------------------------------------


def finished(
    weights: Weights,
    targets: Sequence[LoraTarget],
    *,
    layout: str,
    extras: Iterable[ExtraTensor] = (),
    warnings: Sequence[str] = (),
    base_model: str = "",
    fields: Mapping[str, str] | None = None,
) -> LoraAdapter:
    """The adapter, sorted, with the digest of its source. Raises E-EMPTY without targets, E-TENSOR for two targets on
    one matrix, E-IO-CHANGED."""
    if not targets:
        raise EmptyAdapterError("the file holds no pair of factors", fix="is it an adapter that was saved empty?")
    ordered = tuple(sorted(targets, key=lambda found: found.target))
    for one, two in pairwise(ordered):
        if (one.target.name, one.target.view) == (two.target.name, two.target.view):
            raise TensorUnknownError(f"two pairs of the file mean the same parameter {one.target.name!r}")
    source = combined_digest(
        (i.name, tensor_digest(i.name, i.dtype, i.shape, [weights.read(i)])) for i in weights.tensors
    )
    weights.check_unchanged()
    idle = [t.target.name for t in ordered if t.scale == 0 or not np.any(t.b.decode()) or not np.any(t.a.decode())]
    zero = [f"{len(idle)} of {len(ordered)} targets have an all-zero update, {idle[0]} for one"] if idle else []
    return LoraAdapter(
        ordered,
        tuple(sorted(extras, key=lambda extra: (extra.name, extra.use))),
        Provenance(source, base_model, fields={"source_format": layout, **(fields or {})}),
        (*zero, *warnings),
    )
