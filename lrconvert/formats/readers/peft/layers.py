"""The parts of one adapted module as targets and extra tensors: linear layers, convolutions, embeddings, fused slices.

A and B keep their stored bits; only their shapes change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lrconvert.core.dtypes import STORAGE, Stored, round_to
from lrconvert.core.errors import ConfigError, LimitError, PairError, UnsupportedLoraError
from lrconvert.core.limits import MAX_RANK
from lrconvert.formats.readers.base import CONFIG_NAME
from lrconvert.formats.readers.peft.config import Settings
from lrconvert.formats.readers.peft.names import Part, title
from lrconvert.formats.readers.shared.weights import Weights, load_finite
from lrconvert.io.container import TensorInfo
from lrconvert.lora.adapter import MATRIX, TRANSPOSED, ExtraTensor, LoraTarget, Target, Use, View

Parts = Mapping[Part, TensorInfo]

_MOST_KERNEL = 9999  # what a view can spell
# The one module of transformers' Conv1D families that PEFT 0.2 adapted in slices.
_CONV1D_FUSED = "c_attn"


@dataclass(frozen=True)
class Converted:
    """What one module gives."""

    targets: tuple[LoraTarget, ...]
    extras: tuple[ExtraTensor, ...] = ()


def read_module(module: str, parts: Parts, settings: Settings, weights: Weights) -> Converted:
    """The targets and extra tensors of an adapted module. Raises E-PAIR, E-CONFIG, E-LORA-FEATURE, E-LIMIT, E-VALUE."""
    if parts.keys() & {"embedding_A", "embedding_B"}:
        pair = _embedding(module, parts, settings, weights)
    else:
        a, b = halves(module, parts, "A", "B")
        if settings.enable_lora:
            _expected(module, parts, "bias", "lora_bias", False)
            _expected(module, parts, "magnitude", "use_dora", False)
            return Converted(tuple(_fused(module, a, b, settings, weights)))
        read = _linear if len(a.shape) == len(b.shape) == 2 else _convolution
        pair = read(module, a, b, settings, weights)
    extras = (*_bias(module, parts, pair, settings, weights), *_magnitude(module, parts, pair, settings, weights))
    return Converted((pair,), extras)


# --- the two halves -------------------------------------------------------------------------------------------------


def halves(module: str, parts: Parts, first: Part, second: Part) -> tuple[TensorInfo, TensorInfo]:
    """Both halves of a pair, and nothing that belongs to a pair of another kind. Raises E-PAIR."""
    for here, there in ((first, second), (second, first)):
        if here not in parts:
            other = next((part for part in (there, *sorted(parts)) if part in parts), there)
            raise PairError(f"{module}: {title(other)} has no {title(here)}", fix="the file is incomplete")
    stray = sorted(set(parts) - {first, second, "bias", "magnitude"})
    if stray:
        raise PairError(f"{module}: has {title(first)} and {title(stray[0])}", fix="the file mixes two adapters")
    return parts[first], parts[second]


def misfit(module: str, a: TensorInfo, b: TensorInfo, settings: Settings) -> PairError:
    """The error for two halves that do not fit each other."""
    shown = f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"
    if _swapped(module, a, b, settings):
        return PairError(f"{module}: {shown} look swapped", fix="rename lora_A to lora_B and lora_B to lora_A")
    return PairError(f"{module}: {shown} do not fit; expected (r, in) and (out, r)")


def _swapped(module: str, a: TensorInfo, b: TensorInfo, settings: Settings) -> bool:
    """Whether the halves have each other's shapes: (out, r) and (r, in), for the rank that the configuration says."""
    rank = settings.ranks.value(module)
    return len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0] == rank != a.shape[0]


def check_rank(module: str, rank: int) -> None:
    if rank > MAX_RANK:
        raise LimitError(f"{module}: rank {rank} is above {MAX_RANK}")


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
    """A (r, in, K, L) and B (out, r, 1, 1): first a convolution to r channels, then one of a single pixel."""
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
    if len(kernel) > 2:
        raise UnsupportedLoraError(
            f"{module}: lora_A is {list(a.shape)}, a convolution in three dimensions, which no view describes",
            fix="train it without this layer, or merge it with PEFT",
        )
    check_rank(module, rank)
    if max(kernel) > _MOST_KERNEL:
        raise LimitError(f"{module}: the kernel {kernel} is above {_MOST_KERNEL}")
    view = View(f"conv:{'x'.join(map(str, kernel))}:1")
    target = Target(f"{module}.weight", (out, inner, *kernel), view)
    scale = settings.scale(module, rank)
    unfolded = _shaped(load_finite(weights, a), (rank, inner * math.prod(kernel)))
    return LoraTarget(target, unfolded, _shaped(load_finite(weights, b), (out, rank)), scale)


def _embedding(module: str, parts: Parts, settings: Settings, weights: Weights) -> LoraTarget:
    """A (r, tokens) and B (features, r) of a weight (tokens, features)."""
    a, b = halves(module, parts, "embedding_A", "embedding_B")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise misfit(module, a, b, settings)
    (rank, tokens), features = a.shape, b.shape[0]
    check_rank(module, rank)
    target = Target(f"{module}.weight", (tokens, features), TRANSPOSED)
    scale = settings.scale(module, rank)
    return LoraTarget(target, load_finite(weights, a), load_finite(weights, b), scale)


def _shaped(stored: Stored, shape: tuple[int, ...]) -> Stored:
    return replace(stored, array=stored.array.reshape(shape))


# --- slices of a fused layer (PEFT 0.2) -----------------------------------------------------------------------------


def _fused(module: str, a: TensorInfo, b: TensorInfo, settings: Settings, weights: Weights) -> Iterator[LoraTarget]:
    """PEFT 0.2's MergedLinear: the output is cut into equal slices (q, k, v), some of which are adapted. The rows of
    these, one after the other, are B, a convolution in groups: (rows, c, 1), where group g reads rows g * c to
    (g + 1) * c of A.

    Gives one target per adapted slice and group. A slice of a transposed weight has no view: one target of the whole,
    with zeros in the rest of B.
    """
    enabled = settings.enable_lora
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
    stored_a, stored_b = load_finite(weights, a), _shaped(load_finite(weights, b), (rows, channels))
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
    """(start, stop, number of the group) of the longest runs that leave neither a slice nor a group."""
    start = 0
    while start < rows:
        stop = min((start // size + 1) * size, (start // group + 1) * group)
        yield start, stop, start // group
        start = stop


# --- bias and magnitude ---------------------------------------------------------------------------------------------


def _bias(module: str, parts: Parts, pair: LoraTarget, settings: Settings, weights: Weights) -> Iterator[ExtraTensor]:
    """The bias of lora_B with the scale folded in, in float32, rounded once."""
    info = _expected(module, parts, "bias", "lora_bias", settings.lora_bias)
    if info is None:
        return
    _check_size(module, info, pair)
    scaled = load_finite(weights, info).decode().astype(np.float64) * pair.scale
    rounded = round_to(scaled, "F32")
    if not np.isfinite(rounded).all():
        raise LimitError(f"{module}: the bias of lora_B times the scale is beyond the range of float32")
    yield ExtraTensor(f"{module}.bias", "F32", (scaled.size,), rounded.tobytes(), "add")


def _magnitude(
    module: str, parts: Parts, pair: LoraTarget, settings: Settings, weights: Weights
) -> Iterator[ExtraTensor]:
    info = _expected(module, parts, "magnitude", "use_dora", settings.dora)
    if info is not None:
        _check_size(module, info, pair)
        yield carried(f"{module}.weight", info, weights, "magnitude")


def _expected(module: str, parts: Parts, part: Part, field: str, wanted: bool) -> TensorInfo | None:
    """The tensor of a part that the configuration announces. Raises E-PAIR or E-CONFIG if only one of them has it."""
    info = parts.get(part)
    if info is None and wanted:
        raise PairError(f"{module}: {field} is set, but there is no {title(part)}", fix="the file is incomplete")
    if info is not None and not wanted:
        raise ConfigError(
            f"tensor {info.name!r} is there, but {field} is not set", fix=f"set {field} to true in {CONFIG_NAME}"
        )
    return info


def _check_size(module: str, info: TensorInfo, pair: LoraTarget) -> None:
    out = pair.target.out_features
    if math.prod(info.shape) != out:
        raise PairError(f"{module}: {info.name!r} is {list(info.shape)}, the module has {out} outputs")


def carried(name: str, info: TensorInfo, weights: Weights, use: Use) -> ExtraTensor:
    """A tensor of finite numbers as an extra, with its stored bits."""
    stored = load_finite(weights, info)
    return ExtraTensor(name, stored.dtype, stored.shape, stored.array.tobytes(), use)


def sort_extras(extras: Sequence[ExtraTensor]) -> tuple[ExtraTensor, ...]:
    return tuple(sorted(extras, key=lambda extra: (extra.name, extra.use)))
