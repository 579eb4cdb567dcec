"""The steps that readers of plain layouts share: parts of modules by name, a pair as a target, the finished LoRA.

A pair is A (r, in) and B (out, r); of a convolution A (r, in, K, L) and B (out, r, 1, 1), in one dimension or three
likewise, or with a middle factor
(Tucker) A (r, in, 1, 1), M (r, r, K, L), B (out, r, 1, 1), whose A and M are multiplied out in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np

from lrconvert.core.dtypes import STORAGE, Stored, decode, round_to
from lrconvert.core.errors import (
    ConfigError,
    EmptyAdapterError,
    LimitError,
    PairError,
    TensorUnknownError,
    UnsupportedLoraError,
    ValueRangeError,
)
from lrconvert.core.limits import MAX_RANK
from lrconvert.formats.readers.shared import bundled, kinds
from lrconvert.formats.readers.shared.notes import notes_of
from lrconvert.formats.readers.shared.weights import Weights, load_finite, load_finite_extra, source_digest
from lrconvert.io.container import TensorInfo
from lrconvert.lora.adapter import MAGNITUDES, MATRIX, ExtraTensor, LoraAdapter, LoraTarget, Provenance, Target, View

Parts = Mapping[str, TensorInfo]  # part of a module -> tensor
Key = TypeVar("Key", bound=str)
INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")
_SMALLEST, _LARGEST = (float(getattr(np.finfo(np.float32), name)) for name in ("smallest_normal", "max"))
_MOST_KERNEL = 9999  # what a view can spell


@dataclass(frozen=True)
class Labels:
    """The names that a layout gives A and B, for messages."""

    a: str
    b: str


def sort_parts(weights: Weights, split: Callable[[str], tuple[str, str] | None]) -> dict[str, dict[str, TensorInfo]]:
    """Return {module: {part: tensor}}, sorted, by `split`: (module, part) of a tensor's name, None for a name that it
    does not know. Raises E-NOT-LORA and E-LORA-FEATURE for parts of other kinds of adapters, E-TENSOR for other names
    and for two tensors of one meaning."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    unknown = []
    for info in weights.tensors:
        if bundled.is_bundled(info.name):
            continue  # `build_adapter` carries it along
        place = split(info.name)
        if place is None:
            unknown.append(info.name)
        else:
            put_once(modules.setdefault(place[0], {}), place[1], info)
    if unknown:
        kinds.refuse(unknown)
        what = f"tensor {unknown[0]!r:.200} has no known meaning in this layout"
        raise TensorUnknownError(what, fix="remove it if it is not part of the adapter")
    return dict(sorted(modules.items()))


def put_once(parts: dict[Key, TensorInfo], part: Key, info: TensorInfo) -> None:
    """Add a tensor to `parts`. Raises E-TENSOR if another one has its place."""
    other = parts.setdefault(part, info)
    if other is not info:
        raise TensorUnknownError(f"tensors {other.name!r} and {info.name!r} mean the same", fix="remove one of them")


def halves(module: str, parts: Parts, labels: Labels) -> tuple[TensorInfo, TensorInfo]:
    """Return the parts "A" and "B". Raises E-PAIR if one is missing."""
    names = {"A": labels.a, "B": labels.b}
    for half, other in (("A", "B"), ("B", "A")):
        if half not in parts:
            what = f"{names[other]} has no {names[half]}" if other in parts else "has no factors"
            raise PairError(f"{module}: {what}", fix="the file is incomplete")
    return parts["A"], parts["B"]


def check_both_halves(modules: Mapping[str, Parts], labels: Labels) -> None:
    """Raise E-PAIR if the file holds one half of every pair, E-EMPTY if it holds neither."""
    present = {part for parts in modules.values() for part in parts} & {"A", "B"}
    if len(present) == 1:
        name, other = (labels.a, labels.b) if present == {"A"} else (labels.b, labels.a)
        what = f"the file holds {name} of {len(modules)} modules and not one {other}"
        raise PairError(what, fix="one half has no update; export both from the training")
    if modules and not present:
        raise kinds.no_matrices([info.name for parts in modules.values() for info in parts.values()])


def stated_alpha(weights: Weights, info: TensorInfo) -> float:
    """Return the alpha that a tensor of any dtype states, of no dimension or of one number. Raises E-PAIR, E-DTYPE,
    E-VALUE for NaN and infinity, E-CONFIG for zero."""
    if math.prod(info.shape) != 1:
        what = f"tensor {info.name!r} is {list(info.shape)}; an alpha is one number"
        raise PairError(what, fix="has the file another tensor of that name? Else save the adapter again")
    floats = None if info.dtype in INTEGERS else weights.load_floats(info)
    alpha = float((weights.load(info).array if floats is None else floats.decode()).reshape(-1)[0])
    if not math.isfinite(alpha):
        what = f"tensor {info.name!r} is {alpha}: no alpha, so the scale alpha / r is not known"
        raise ValueRangeError(what, fix="write the alpha of the training into the file")
    if alpha == 0:
        raise ConfigError(
            f"tensor {info.name!r} is 0, which programs read in two ways: sd-scripts and LyCORIS as no alpha (a scale "
            "of 1), ComfyUI and diffusers as an update of zero",
            fix="write the alpha that was meant into the file, r for a scale of 1",
        )
    return alpha


def scale_of(module: str, alpha: float, rank: float) -> float:
    """Return alpha / r. Raises E-CONFIG if it is beyond the range of float32."""
    try:
        return check_scale(module, alpha / rank, is_zero=alpha == 0)
    except OverflowError:  # an integer beyond the range of floats
        raise ConfigError(f"{module}: the scale alpha / r is not finite") from None


def check_scale(module: str, scale: float, *, is_zero: bool) -> float:
    """Return a scale that float32, in which adapters are computed, holds with all its digits. Raises E-CONFIG."""
    if not math.isfinite(scale):
        raise ConfigError(f"{module}: the scale alpha / r is not finite")
    if not is_zero and not _SMALLEST <= abs(scale) <= _LARGEST:
        fix = "correct alpha: real ones lie between 0.001 and 10000"
        raise ConfigError(f"{module}: the scale alpha / r is {scale:g}, beyond the range of float32", fix=fix)
    return scale


# --- one pair -------------------------------------------------------------------------------------------------------


def rank_of(module: str, a: TensorInfo, b: TensorInfo, labels: Labels) -> int:
    """Return r of two halves that fit. Raises E-PAIR for those that do not or that are turned or exchanged, E-LIMIT."""
    turned = len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0]  # they fit the other way round
    fits = min(len(a.shape), len(b.shape)) >= 2 and a.shape[0] == b.shape[1]
    rank = a.shape[0] if a.shape else 0
    if turned and (not fits or b.shape[0] < rank):
        raise turned_pair(module, a, b, labels)
    if not fits:
        raise misfit(module, a, b, labels)
    check_rank(module, rank)
    return rank


def misfit(module: str, a: TensorInfo, b: TensorInfo, labels: Labels) -> PairError:
    """Return the error for halves that do not fit each other, with what it may come from."""
    shown = f"{module}: {labels.a} {list(a.shape)} and {labels.b} {list(b.shape)} do not fit"
    gathered = (
        "save it again with the full state gathered (accelerate, FSDP: FULL_STATE_DICT; DeepSpeed: zero_to_fp32.py)"
    )
    if 1 in (len(a.shape), len(b.shape)):
        what = f"{shown}: flat tensors are slices that one device of a distributed training held"
        return PairError(what, fix=gathered)
    if len(a.shape) == len(b.shape) == 2 and a.shape[0] < b.shape[1] and b.shape[1] % a.shape[0] == 0:
        share = b.shape[1] // a.shape[0]
        what = f"{shown}: rows for 1 of {share} devices, as a sharded training leaves them that is saved on one of them"
        return PairError(what, fix=gathered)
    return PairError(f"{shown}; expected (r, in) and (out, r)", fix="is the file of one adapter, written by one tool?")


def turned_pair(module: str, a: TensorInfo, b: TensorInfo, labels: Labels) -> PairError:
    """Return the error for halves that fit each other the other way round. Shapes cannot tell which of two mistakes it
    is, and on a square layer the wrong remedy gives the transposed update."""
    return PairError(
        f"{module}: {labels.a} {list(a.shape)} and {labels.b} {list(b.shape)} are transposed or swapped",
        fix=f"if the model computes x @ {labels.a} @ {labels.b}, transpose both; only if it adds {labels.a} @ "
        f"{labels.b} to a weight (out, in), exchange their names",
    )


def check_rank(module: str, rank: int) -> None:
    """Raise E-LIMIT for a rank above the largest."""
    if rank > MAX_RANK:
        raise LimitError(f"{module}: rank {rank} is above {MAX_RANK}")


def conv_view(module: str, label: str, shape: Sequence[int]) -> View:
    """Return the view of a convolution whose A, called `label`, has this shape (r, in, K, L, M), with one place of a
    kernel to three. Raises E-LORA-FEATURE for more, E-LIMIT for a kernel that a view cannot spell."""
    kernel = list(shape[2:])
    if len(kernel) > 3:
        what = f"{module}: {label} is {list(shape)}, a convolution in {len(kernel)} dimensions, which no view describes"
        raise UnsupportedLoraError(what, fix="train it without this layer, or merge it with the tool that trained it")
    if max(kernel) > _MOST_KERNEL:
        raise LimitError(f"{module}: the kernel {kernel} is above {_MOST_KERNEL}")
    return View(f"conv:{'x'.join(map(str, kernel))}:1")


def read_pair(module: str, parts: Parts, scale: Callable[[int], float], weights: Weights, labels: Labels) -> LoraTarget:
    """Return a linear layer or a convolution as a target, `scale` by the rank. Raises E-PAIR, E-LORA-FEATURE, E-LIMIT,
    E-DTYPE, E-VALUE."""
    a, b = halves(module, parts, labels)
    rank = rank_of(module, a, b, labels)
    middle = parts.get("mid")
    (inner, *kernel), out = a.shape[1:], b.shape[0]
    if set(b.shape[2:]) - {1} or (kernel and len(b.shape) not in (2, len(a.shape))):
        raise PairError(f"{module}: {labels.a} {list(a.shape)} and {labels.b} {list(b.shape)} do not fit")
    stored_a, stored_b = load_finite(weights, a), load_finite(weights, b)
    if middle is not None:
        if set(kernel) != {1} or middle.shape[:2] != (rank, rank) or len(middle.shape) != len(a.shape):
            raise PairError(f"{module}: {middle.name!r} is {list(middle.shape)}, expected r, r and the kernel")
        kernel = list(middle.shape[2:])
        core = load_finite(weights, middle).decode().astype(np.float64)
        down = stored_a.decode().astype(np.float64).reshape(rank, inner)
        stored_a = Stored("F64", np.ascontiguousarray(np.einsum("pq...,qi->pi...", core, down)))
    view = conv_view(module, labels.a, (rank, inner, *kernel)) if kernel else MATRIX
    return LoraTarget(
        Target(f"{module}.weight", (out, inner, *kernel), view),
        reshape(stored_a, (rank, inner * math.prod(kernel))),
        reshape(stored_b, (out, rank)),
        scale(rank),
        weights.lost.get(b.name, 0.0),
    )


def read_experts(name: str, a: Stored, b: Stored, scale: float) -> Iterator[LoraTarget]:
    """Yield a target for each expert of a stack: A (experts, r, in) and B (experts, out, r)."""
    experts, out, _ = b.shape
    for number in range(experts):
        one_a, one_b = (Stored(half.dtype, np.ascontiguousarray(half.array[number])) for half in (a, b))
        yield LoraTarget(Target(name, (experts, out, a.shape[2]), View(f"expert:{number}")), one_a, one_b, scale)


def reshape(stored: Stored, shape: tuple[int, ...]) -> Stored:
    return replace(stored, array=stored.array.reshape(shape))


def transpose(stored: Stored) -> Stored:
    """Return the transpose of a matrix, its bits unchanged."""
    return replace(stored, array=np.ascontiguousarray(stored.array.T))


# --- what goes with a pair ------------------------------------------------------------------------------------------


def check_outputs(info: TensorInfo, pair: LoraTarget) -> None:
    """Raise E-PAIR if a magnitude or a bias has not one number for each output of the module."""
    out = pair.target.out_features
    if math.prod(info.shape) != out:
        raise PairError(f"{pair.target.name}: {info.name!r} is {list(info.shape)}, the module has {out} outputs")


def read_magnitude(info: TensorInfo, pair: LoraTarget, weights: Weights) -> ExtraTensor:
    """Return DoRA's magnitudes of a module as PEFT stores them: (out,), or with dimensions of one around. Raises
    E-PAIR, E-DTYPE, E-VALUE."""
    check_outputs(info, pair)
    extra = load_finite_extra(pair.target.name, info, weights, "magnitude")
    return extra if len(info.shape) <= 4 else replace(extra, shape=(pair.target.out_features,))


def dora_scales(parts: Parts, pair: LoraTarget, weights: Weights) -> list[ExtraTensor]:
    """Return the magnitudes of a module in LyCORIS' form, if it has any. Raises what `read_dora_scale` raises."""
    return [read_dora_scale(parts["dora_scale"], pair, weights)] if "dora_scale" in parts else []


def read_dora_scale(info: TensorInfo, pair: LoraTarget, weights: Weights) -> ExtraTensor:
    """Return DoRA's magnitudes as LyCORIS stores them, flat: (out, 1, ...) are norms along the inputs (`wd_on_output`),
    (1, in, ...) along the outputs and the kernel. Raises E-PAIR, E-DTYPE, E-VALUE."""
    out, channels, count = pair.target.out_features, pair.target.channels, math.prod(info.shape)
    flat = len(info.shape) < 2
    by_output = count == out and (flat or info.shape[0] == out)
    by_input = count == channels and (flat or info.shape[1] == channels)
    if flat and by_output and by_input and count > 1:
        raise PairError(
            f"{info.name!r} has one dimension of {count}, and the layer has as many inputs as outputs: nothing says "
            "whose magnitudes they are",
            fix=f"reshape it to [{out}, 1] if they are of the outputs, to [1, {channels}] if of the inputs",
        )
    if not (by_output or by_input):
        what = f"{info.name!r} is {list(info.shape)}, the layer has {out} outputs and {channels} inputs"
        raise PairError(what, fix="a DoRA of LyCORIS has [outputs, 1, ...] or [1, inputs, ...]; is the file whole?")
    extra = load_finite_extra(pair.target.name, info, weights, "magnitude" if by_output else "input_magnitude")
    return replace(extra, shape=(count,))


def scaled_bias(info: TensorInfo, pair: LoraTarget, weights: Weights) -> ExtraTensor:
    """Return the bias of lora_B with the scale folded in, in float32, rounded once. Raises E-PAIR, E-LIMIT, E-DTYPE,
    E-VALUE."""
    check_outputs(info, pair)
    scaled = round_to(load_finite(weights, info).decode().astype(np.float64).reshape(-1) * pair.scale, "F32")
    if not np.isfinite(scaled).all():
        raise LimitError(f"{info.name!r} times the scale is beyond the range of float32")
    name = f"{pair.target.name.removesuffix('.weight')}.bias"
    return ExtraTensor(name, "F32", (scaled.size,), scaled.tobytes(), "add")


DIFFERENCES = {"diff": "weight", "diff_b": "bias"}
"""Names of whole differences: the parameter that each is added to."""


def is_pair(parts: Parts) -> bool:
    """Return whether a module has factors, or has nothing but settings; not whole differences alone."""
    return bool(parts.keys() & {"A", "B"}) or not parts.keys() & DIFFERENCES.keys()


def differences(name: str, parts: Parts, weights: Weights) -> Iterator[ExtraTensor]:
    """Yield the whole differences of a module, which the base calls `name`. Raises E-DTYPE, E-VALUE."""
    for part, parameter in DIFFERENCES.items():
        if part in parts:
            yield load_finite_extra(f"{name}.{parameter}", parts[part], weights, "add")


# --- the whole ------------------------------------------------------------------------------------------------------


def build_adapter(
    weights: Weights,
    targets: Sequence[LoraTarget],
    *,
    layout: str,
    extras: Iterable[ExtraTensor] = (),
    warnings: Sequence[str] = (),
    base_model: str = "",
    used: Collection[str] = (),
    fields: Mapping[str, str] | None = None,
) -> LoraAdapter:
    """Return the adapter, sorted, with the digest of its source and notes on that (`fields`), and a warning of what the
    file states beside its tensors but for the `used` settings. Raises E-EMPTY without targets, E-TENSOR for two targets
    on one matrix, E-IO-CHANGED."""
    if not targets:
        raise EmptyAdapterError("the file holds no pair of factors", fix="is it an adapter that was saved empty?")
    ordered = tuple(sorted(targets, key=lambda pair: pair.target))
    for one, two in pairwise(ordered):
        if (one.target.name, one.target.view) == (two.target.name, two.target.view):
            raise TensorUnknownError(f"two pairs of the file mean the same parameter {one.target.name!r}")
    embeddings = bundled.extras(weights)
    source = Provenance(source_digest(weights), base_model, fields={"source_format": layout, **(fields or {})})
    every = sort_extras([*extras, *embeddings])
    said = (*all_zero(ordered), *notes_of(weights, used), *warnings, *bundled.notes(embeddings), *_negative(every))
    return LoraAdapter(ordered, every, source, said)


def sort_extras(extras: Iterable[ExtraTensor]) -> tuple[ExtraTensor, ...]:
    return tuple(sorted(extras, key=lambda extra: (extra.name, extra.use)))


def _negative(extras: Iterable[ExtraTensor]) -> list[str]:
    """Return the warning, if any, of magnitudes below zero: the first DoRAs of LyCORIS stored means."""
    scaled = [extra for extra in extras if extra.use in MAGNITUDES]
    below = [e.name for e in scaled if (decode(np.frombuffer(e.data, STORAGE[e.dtype]), e.dtype) < 0).any()]
    if not below:
        return []
    return [
        f"{len(below)} modules have DoRA magnitudes below zero, {below[0]} for one: they are taken for norms, as "
        "LyCORIS stores them since 2.0; releases before it stored means, and then the update is another"
    ]


def all_zero(targets: Sequence[LoraTarget]) -> list[str]:
    """Return the warning, if any, of targets that have no update."""
    zero = [t.target.name for t in targets if t.scale == 0 or t.b.is_zero() or t.a.is_zero()]
    return [f"{len(zero)} of {len(targets)} targets have an all-zero update, {zero[0]} for one"] if zero else []
