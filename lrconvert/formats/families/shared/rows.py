"""A fused layer's update as those of the layers that are its rows, and back; exact both ways.

Rows of B are rows of the update, so that each part has its rows of B and the same A. The other way round, B's lie one
below the other where parts share A, and side by side in blocks where they do not: the ranks of parts with different A
add up. A part that is not adapted has rows of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from lrconvert.core.dtypes import Array, Stored, decode, itemsize, round_to
from lrconvert.core.errors import ExportError, UnsupportedLoraError
from lrconvert.lora.adapter import MATRIX, ExtraTensor, LoraTarget, Target, View

Rows = tuple[int, int]


def split(pair: LoraTarget, names: Sequence[str], ends: Sequence[int], keep_zeros: bool = False) -> list[LoraTarget]:
    """Return the update of a fused layer as those of its parts, whose rows end at `ends`.

    Columns of B that are zero in a part and not in another are of the other parts, and go, with their rows of A; a part
    that is left with none is not adapted, and left out unless `keep_zeros`.
    """
    starts = (0, *ends[:-1])
    if len(names) == 1:
        return [replace(pair, target=_resized(pair.target, names[0], ends[0]))]
    used = [np.any(decode(pair.b.array[start:end], pair.b.dtype) != 0, axis=0)
            for start, end in zip(starts, ends, strict=True)]  # fmt: skip
    anywhere = np.any(used, axis=0)
    parts = []
    for name, start, end, mine in zip(names, starts, ends, used, strict=True):
        kept = np.flatnonzero(mine | ~anywhere)
        if not kept.size:
            if not keep_zeros:
                continue
            kept = np.arange(pair.rank)
        a, b = pair.a, replace(pair.b, array=pair.b.array[start:end])
        if kept.size < pair.rank:
            a, b = replace(a, array=a.array[kept]), replace(b, array=b.array[:, kept])
        part = replace(pair, target=_resized(pair.target, name, end - start), a=_packed(a), b=_packed(b))
        parts.append(part)
    return parts


def fuse(pairs: Mapping[int, LoraTarget], name: str, sizes: Sequence[int]) -> LoraTarget:
    """Return the updates of parts (by their place) as that of the layer whose rows they are; `sizes` are the rows of
    every part. Raises E-EXPORT for parts whose inputs differ."""
    if len(sizes) == 1:
        return replace(pairs[0], target=_resized(pairs[0].target, name, sizes[0]))
    widths = {pair.target.shape[1:] for pair in pairs.values()}
    if len(widths) > 1:
        raise ExportError(f"{name!r:.120} is one layer there, and its parts have inputs of {sorted(widths)}")
    scale = next((pair.scale for pair in pairs.values() if pair.scale), 0.0)
    blocks: dict[tuple[str, bytes], list[int]] = {}  # parts by their A
    for place, pair in pairs.items():
        blocks.setdefault((pair.a.dtype, pair.a.array.tobytes()), []).append(place)
    firsts = [pairs[places[0]] for places in blocks.values()]
    starts = np.cumsum([0, *sizes])
    b = np.zeros((starts[-1], sum(pair.rank for pair in firsts)), np.float64)
    column = 0
    for first, places in zip(firsts, blocks.values(), strict=True):
        for place in places:
            ratio = pairs[place].scale / scale if scale else 1.0
            b[starts[place] : starts[place + 1], column : column + first.rank] = (
                pairs[place].B.astype(np.float64) * ratio
            )
        column += first.rank
    dtypes = {pair.b.dtype for pair in pairs.values()}
    a_dtypes = {pair.a.dtype for pair in firsts}
    if len(a_dtypes) == 1:
        a = replace(firsts[0].a, array=np.concatenate([pair.a.array for pair in firsts]))
    else:
        a = Stored("F64", np.concatenate([pair.A.astype(np.float64) for pair in firsts]))
    target = _resized(next(iter(pairs.values())).target, name, int(starts[-1]))
    return LoraTarget(target, a, _stored(b, dtypes.pop() if len(dtypes) == 1 else "F32"), scale)


def swapped(pair: LoraTarget) -> LoraTarget:
    """Return the update with the halves of its rows exchanged."""
    half = pair.b.array.shape[0] // 2
    return replace(pair, b=replace(pair.b, array=np.concatenate([pair.b.array[half:], pair.b.array[:half]])))


def _stored(values: Array, dtype: str) -> Stored:
    """The values in a dtype if it holds them, else in F64, which an export rounds with a note."""
    bits = round_to(values, dtype)
    return Stored(dtype, bits) if np.array_equal(decode(bits, dtype), values) else Stored("F64", values)


def _packed(stored: Stored) -> Stored:
    return replace(stored, array=np.ascontiguousarray(stored.array))


def _resized(target: Target, name: str, out: int) -> Target:
    """The target as a layer of that name with `out` rows; a convolution stays one."""
    shape = (out, *target.shape[1:]) if target.view.kind == "conv" else (out, target.in_features)
    view: View = target.view if target.view.kind == "conv" else MATRIX
    return Target(name, shape, view)


# --- tensors beside the factors, with one number for each row --------------------------------------------------------


def of_rows(extra: ExtraTensor, name: str, rows: Rows, out: int) -> ExtraTensor:
    """Return the numbers of some rows of a magnitude or a bias, under a new name. Raises E-LORA-FEATURE for magnitudes
    of inputs, which are norms over all rows."""
    if extra.use not in ("magnitude", "add"):
        what = f"{extra.name!r:.120} has a DoRA's magnitudes of inputs, over all rows of a layer that is several there"
        raise UnsupportedLoraError(what, fix="bake the DoRA into the factors before")
    size = len(extra.data) // out
    count = rows[1] - rows[0]
    shape = tuple(count if n == out else n for n in extra.shape) if extra.shape != (out,) else (count,)
    return replace(extra, name=name, shape=shape, data=extra.data[rows[0] * size : rows[1] * size])


def joined(extras: Mapping[int, ExtraTensor], name: str, sizes: Sequence[int]) -> ExtraTensor:
    """Return the numbers of all parts one after the other, zeros for parts that have none. Raises E-EXPORT for a
    magnitude that a part lacks, and for dtypes that differ."""
    first = next(iter(extras.values()))
    if len({extra.dtype for extra in extras.values()}) > 1:
        raise ExportError(f"{name!r:.120} is one tensor there, and its parts have several dtypes")
    if first.use != "add" and len(extras) < len(sizes):
        what = f"{name!r:.120} is one layer there, and only {len(extras)} of its {len(sizes)} parts have a magnitude"
        raise ExportError(what, fix="bake the DoRA into the factors first, or export to diffusers")
    data = b"".join(
        extras[n].data if n in extras else bytes(size * itemsize(first.dtype)) for n, size in enumerate(sizes)
    )
    shape = tuple(n if n == 1 else sum(sizes) for n in first.shape)
    assert math.prod(shape) * itemsize(first.dtype) == len(data)
    return replace(first, name=name, shape=shape, data=data)


def exchanged(extra: ExtraTensor) -> ExtraTensor:
    """Return the tensor with its halves exchanged."""
    half = len(extra.data) // 2
    return replace(extra, data=extra.data[half:] + extra.data[:half])
