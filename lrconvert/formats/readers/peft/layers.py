"""Read the parts of one adapted module as targets and extra tensors: linear layers, convolutions, embeddings, slices.

A and B keep their stored bits; only their shapes change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from lrconvert.core.dtypes import STORAGE, Stored
from lrconvert.core.errors import ConfigError, PairError, UnsupportedLoraError
from lrconvert.formats.readers.peft.config import Settings
from lrconvert.formats.readers.peft.names import TITLES, Part
from lrconvert.formats.readers.shared import pairs
from lrconvert.formats.readers.shared.folders import CONFIG_NAME
from lrconvert.formats.readers.shared.pairs import (
    Labels,
    check_rank,
    conv_view,
    read_magnitude,
    reshape,
    scaled_bias,
)
from lrconvert.formats.readers.shared.weights import Weights, load_finite
from lrconvert.io.container import TensorInfo
from lrconvert.lora.adapter import MATRIX, TRANSPOSED, ExtraTensor, LoraTarget, Target, View

Parts = Mapping[Part, TensorInfo]

# The one module of transformers' Conv1D families that PEFT 0.2 adapted in slices.
_CONV1D_FUSED = "c_attn"
_LABELS = Labels("lora_A", "lora_B")


def read_module(
    module: str, parts: Parts, settings: Settings, weights: Weights
) -> tuple[list[LoraTarget], list[ExtraTensor]]:
    """Return (targets, extra tensors) of an adapted module. Raises E-PAIR, E-CONFIG, E-LORA-FEATURE, E-LIMIT,
    E-VALUE."""
    if parts.keys() & {"embedding_A", "embedding_B"}:
        pair = _embedding(module, parts, settings, weights)
    else:
        a, b = halves(module, parts, "A", "B")
        if settings.enable_lora:
            _expected(module, parts, "bias", "lora_bias", False)
            _expected(module, parts, "magnitude", "use_dora", False)
            return list(_fused(module, a, b, settings, weights)), []
        read = _linear if len(a.shape) == len(b.shape) == 2 else _convolution
        pair = read(module, a, b, settings, weights)
    extras = []
    bias = _expected(module, parts, "bias", "lora_bias", settings.lora_bias)
    if bias is not None:
        extras.append(scaled_bias(bias, pair, weights))
    magnitude = _expected(module, parts, "magnitude", "use_dora", settings.dora)
    if magnitude is not None:
        extras.append(read_magnitude(magnitude, pair, weights))
    return [pair], extras


# --- the two halves -------------------------------------------------------------------------------------------------


def halves(module: str, parts: Parts, first: Part, second: Part) -> tuple[TensorInfo, TensorInfo]:
    """Return both halves of a pair. Raises E-PAIR if one is missing, or parts of a pair of another kind are there."""
    for half, partner in ((first, second), (second, first)):
        if half not in parts:
            other = next((part for part in (partner, *sorted(parts)) if part in parts), partner)
            raise PairError(f"{module}: {TITLES[other]} has no {TITLES[half]}", fix="the file is incomplete")
    stray = sorted(set(parts) - {first, second, "bias", "magnitude"})
    if stray:
        raise PairError(f"{module}: has {TITLES[first]} and {TITLES[stray[0]]}", fix="the file mixes two adapters")
    return parts[first], parts[second]


def misfit(module: str, a: TensorInfo, b: TensorInfo, settings: Settings) -> PairError:
    """Return the error for two halves that do not fit each other."""
    if _swapped(module, a, b, settings):
        return pairs.turned_pair(module, a, b, _LABELS)
    return pairs.misfit(module, a, b, _LABELS)


def _swapped(module: str, a: TensorInfo, b: TensorInfo, settings: Settings) -> bool:
    """Return whether the halves have each other's shapes: (out, r) and (r, in), for the rank of the configuration."""
    rank = settings.ranks.value(module)
    return len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0] == rank != a.shape[0]


# --- layers ---------------------------------------------------------------------------------------------------------


def _linear(module: str, a: TensorInfo, b: TensorInfo, settings: Settings, weights: Weights) -> LoraTarget:
    (rank, inner), (out, other) = a.shape, b.shape
    if rank != other or _swapped(module, a, b, settings):
        raise misfit(module, a, b, settings)
    check_rank(module, rank)
    scale = settings.scale(module, rank)
    if settings.transposed:  # what the configuration claims; the base settles it
        target = Target(f"{module}.weight", (inner, out), TRANSPOSED)
    else:
        target = Target(f"{module}.weight", (out, inner), MATRIX)
    return LoraTarget(target, load_finite(weights, a), load_finite(weights, b), scale)


def _convolution(module: str, a: TensorInfo, b: TensorInfo, settings: Settings, weights: Weights) -> LoraTarget:
    """Read A (r, in, K, L) and B (out, r, 1, 1): first a convolution to r channels, then one of a single pixel."""
    if len(a.shape) != len(b.shape) or len(a.shape) < 3 or set(b.shape[2:]) != {1}:
        raise misfit(module, a, b, settings)
    (rank, inner, *kernel), (out, channels) = a.shape, b.shape[:2]
    if channels != rank and rank % channels == 0:
        raise UnsupportedLoraError(
            f"{module}: lora_B has {channels} of {rank} channels, a convolution in groups: PEFT's update of it reads "
            "all input channels in every group, which its weight cannot hold",
            fix="train it without this layer; PEFT cannot merge it either",
        )
    if channels != rank:
        raise misfit(module, a, b, settings)
    view = conv_view(module, "lora_A", a.shape)
    check_rank(module, rank)
    scale = settings.scale(module, rank)
    unfolded = reshape(load_finite(weights, a), (rank, math.prod(a.shape[1:])))
    target = Target(f"{module}.weight", (out, inner, *kernel), view)
    return LoraTarget(target, unfolded, reshape(load_finite(weights, b), (out, rank)), scale)


def _embedding(module: str, parts: Parts, settings: Settings, weights: Weights) -> LoraTarget:
    """Read A (r, tokens) and B (features, r) of a weight (tokens, features)."""
    a, b = halves(module, parts, "embedding_A", "embedding_B")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise misfit(module, a, b, settings)
    (rank, tokens), features = a.shape, b.shape[0]
    check_rank(module, rank)
    target = Target(f"{module}.weight", (tokens, features), TRANSPOSED)
    scale = settings.scale(module, rank)
    return LoraTarget(target, load_finite(weights, a), load_finite(weights, b), scale)


# --- slices of a fused layer (PEFT 0.2) -----------------------------------------------------------------------------


def _fused(module: str, a: TensorInfo, b: TensorInfo, settings: Settings, weights: Weights) -> Iterator[LoraTarget]:
    """Yield one target per adapted slice and group of PEFT 0.2's MergedLinear.

    The output is cut into equal slices (q, k, v), some of which are adapted. The rows of these, one after the other,
    are B, a convolution in groups: (rows, c, 1), where group g reads rows g * c to (g + 1) * c of A; loralib stores it
    as (rows, c). A slice of a transposed weight has no view: one target of the whole, with zeros in the rest of B.
    """
    enabled = settings.enable_lora
    if len(b.shape) == 2 and a.shape[0] == sum(enabled) * b.shape[1] > b.shape[1]:
        b = replace(b, shape=(*b.shape, 1))
    if len(a.shape) != 2 or len(b.shape) != 3 or b.shape[2] != 1 or a.shape[0] % b.shape[1]:
        raise PairError(
            f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit; "
            "with enable_lora, (r * slices, in) and (rows, r, 1) are expected"
        )
    (total, inner), (rows, channels) = a.shape, b.shape[:2]
    slices, groups = sum(enabled), total // channels
    if total % slices or rows % slices or rows % groups:
        raise PairError(f"{module}: lora_B has {rows} rows and {groups} groups, which {slices} slices do not divide")
    check_rank(module, total)
    scale = settings.scale(module, total // slices)
    size, out = rows // slices, rows // slices * len(enabled)
    starts = [which * size for which, on in enumerate(enabled) if on]
    stored_a, stored_b = load_finite(weights, a), reshape(load_finite(weights, b), (rows, channels))
    pieces = [  # (rows of B, first row in the weight, rows of A)
        (slice(start, stop), starts[start // size] + start % size, slice(group * channels, (group + 1) * channels))
        for start, stop, group in _pieces(rows, size, rows // groups)
    ]
    if settings.transposed and module.rpartition(".")[2] == _CONV1D_FUSED:
        whole = np.zeros((out, total), STORAGE[stored_b.dtype])
        for taken, first, used in pieces:
            whole[first : first + taken.stop - taken.start, used] = stored_b.array[taken]
        target = Target(f"{module}.weight", (inner, out), TRANSPOSED)
        yield LoraTarget(target, stored_a, Stored(stored_b.dtype, whole), scale)
        return
    for taken, first, used in pieces:
        view = View(f"rows:{first}:{first + taken.stop - taken.start}")
        yield LoraTarget(
            Target(f"{module}.weight", (out, inner), view),
            Stored(stored_a.dtype, stored_a.array[used]),
            Stored(stored_b.dtype, stored_b.array[taken]),
            scale,
        )


def _pieces(rows: int, size: int, group: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, number of the group) of the longest runs that leave neither a slice nor a group."""
    start = 0
    while start < rows:
        stop = min((start // size + 1) * size, (start // group + 1) * group)
        yield start, stop, start // group
        start = stop


def _expected(module: str, parts: Parts, part: Part, field: str, wanted: bool) -> TensorInfo | None:
    """Return the tensor of a part that the configuration announces. Raises E-PAIR or E-CONFIG if only one has it."""
    info = parts.get(part)
    if info is None and wanted:
        raise PairError(f"{module}: {field} is set, but there is no {TITLES[part]}", fix="the file is incomplete")
    if info is not None and not wanted:
        what = f"the file holds {info.name!r}, but {field} is not set"
        raise ConfigError(what, fix=f"set {field} to true in {CONFIG_NAME}")
    return info
