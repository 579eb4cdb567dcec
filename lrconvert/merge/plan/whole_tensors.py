"""Whole tensors of adapters: gathered, cast, and compared with those of a base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from lrconvert.core.dtypes import STORAGE, decode, round_to
from lrconvert.core.errors import PlacementError
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.io.container import TensorInfo
from lrconvert.lora.adapter import MAGNITUDES, ExtraTensor, LoraAdapter, LoraTarget
from lrconvert.merge.plan.updates import Adapter, decoded

_COMPARE_BYTES = 1 << 22


def is_zero(pair: LoraTarget) -> bool:
    """Return whether a look at the factors shows that the update is zero."""
    return pair.scale == 0 or not pair.A.any() or not pair.B.any()


def updated(adapter: Adapter) -> Iterable[str]:
    """Return the names of the targets whose update is not seen to be zero."""
    if isinstance(adapter, LoraAdapter):
        return (pair.target.name for pair in adapter.targets if not is_zero(pair))
    return (target.name for target in adapter.targets)


def whole(adapter: Adapter) -> list[ExtraTensor]:
    """Return the extras that are whole tensors; the others are parts of an update."""
    return [extra for extra in adapter.extras if extra.use == "replace"]


def gather(adapters: Sequence[Adapter]) -> list[ExtraTensor]:
    """Return all whole tensors. Raises E-PLACE if two adapters bring different tensors of one name."""
    extras: dict[str, ExtraTensor] = {}
    for extra in (e for adapter in adapters for e in whole(adapter)):
        other = extras.setdefault(extra.name, extra)
        if not same_tensor(other, extra):
            raise no_place(extra, "two adapters bring different ones", "merge one of them")
    return list(extras.values())


def no_place(extra: ExtraTensor, why: str, fix: str = "") -> PlacementError:
    """Return the error of a tensor that the merged model has no place for."""
    names = {"replace": "tensor", "add": "bias", **dict.fromkeys(MAGNITUDES, "magnitude of")}
    what = names.get(extra.use, "rows of")
    return PlacementError(f"the adapter's {what} {extra.name!r} has no place: {why}", fix=fix)


def cast(extra: ExtraTensor, dtype: str) -> ExtraTensor:
    """Return the tensor in another float dtype, as a model of that dtype loads it."""
    if extra.dtype == dtype:
        return extra
    return replace(extra, dtype=dtype, data=round_to(decoded(extra), dtype).tobytes())


def same_values(extra: ExtraTensor, info: TensorInfo, checkpoint: Checkpoint) -> bool:
    """Return whether an extra holds the numbers of a stored float tensor of its shape, in whatever dtype."""
    values, kind = decoded(extra), STORAGE[info.dtype]
    step = _COMPARE_BYTES // kind.itemsize
    for start in range(0, values.size, step):
        part = values[start : start + step]
        data = checkpoint.read(info, start * kind.itemsize, part.size * kind.itemsize)
        if not np.array_equal(part, decode(np.frombuffer(data, kind), info.dtype)):
            return False
    return True


def same_tensor(one: ExtraTensor, other: ExtraTensor) -> bool:
    return (one.dtype, one.shape, one.data) == (other.dtype, other.shape, other.data)


def same_bytes(extra: ExtraTensor, other: TensorInfo | ExtraTensor, checkpoint: Checkpoint) -> bool:
    if isinstance(other, ExtraTensor):
        return same_tensor(extra, other)
    return (extra.dtype, extra.shape) == (other.dtype, other.shape) and all(
        extra.data[start : start + _COMPARE_BYTES]
        == checkpoint.read(other, start, min(_COMPARE_BYTES, other.nbytes - start))
        for start in range(0, other.nbytes, _COMPARE_BYTES)
    )
