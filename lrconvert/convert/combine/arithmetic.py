"""What becomes of the numbers of several tensors: weighted sums, pruning, TIES, DARE, as PEFT computes them.

TIES: Yadav et al., "TIES-Merging: resolving interference when merging models", 2023. DARE: Yu et al., "Language models
are super Mario", 2024. PEFT weighs after pruning and after the election of signs; so it is here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lrconvert.convert.combine.options import CombineOptions
from lrconvert.core.dtypes import Array
from lrconvert.lora import prng

_CODES = 1 << 24  # of a seeded word that draws a mask


def combined(
    tensors: Sequence[Array], weights: Sequence[float], options: CombineOptions, labels: Sequence[str]
) -> Array:
    """Return one tensor of several of equal shapes and dtypes, in their dtype. `labels` name the streams of the masks,
    one for each tensor."""
    kind = options.mode.removesuffix("_svd")
    if kind in ("magnitude_prune", "ties"):
        assert options.density is not None
        tensors = [largest(tensor, options.density) for tensor in tensors]
    elif kind in ("dare_linear", "dare_ties"):
        assert options.density is not None
        tensors = [
            dropped(tensor, options.density, prng.Stream(options.seed, label))
            for tensor, label in zip(tensors, labels, strict=True)
        ]
    if kind in ("ties", "dare_ties"):
        return _disjoint(tensors, weights, _majority(tensors, options.sign))
    return _weighted(tensors, weights)


def largest(tensor: Array, density: float) -> Array:
    """Return `tensor` with all but the share `density` of its numbers, those of largest magnitude, set to zero; of
    equal ones the first are kept."""
    if density >= 1:
        return tensor
    count = int(density * tensor.size)
    if not count:
        return np.zeros_like(tensor)
    sizes = np.abs(tensor).reshape(-1)
    least = np.partition(sizes, sizes.size - count)[sizes.size - count]
    keep = sizes > least
    equal = np.flatnonzero(sizes == least)
    keep[equal[: count - int(np.count_nonzero(keep))]] = True
    return np.asarray(tensor * keep.reshape(tensor.shape))


def dropped(tensor: Array, density: float, stream: prng.Stream) -> Array:
    """Return `tensor` with every number kept with probability `density`, then divided by it, and zero otherwise.

    Number i of the tensor, row by row, is kept if the upper 24 bits of word i of the stream's first basis are below
    2^24 times the density.
    """
    if density >= 1:
        return tensor
    codes = prng.words(stream, range(1), 0, tensor.size)[0] >> np.uint32(8)
    keep = codes < np.uint32(round(density * _CODES))
    return np.asarray(tensor * keep.reshape(tensor.shape) / tensor.dtype.type(density))


def _weighted(tensors: Sequence[Array], weights: Sequence[float]) -> Array:
    total = np.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total += tensor * tensor.dtype.type(weight)
    return total


def _majority(tensors: Sequence[Array], how: str) -> Array:
    """The elected sign of each number, 1 where the votes are even."""
    votes = np.zeros_like(tensors[0])
    for tensor in tensors:
        votes += tensor if how == "total" else np.sign(tensor)
    return np.where(votes >= 0, 1, -1).astype(np.int8)


def _disjoint(tensors: Sequence[Array], weights: Sequence[float], sign: Array) -> Array:
    """The mean of the weighted numbers that have the elected sign, over those that have it."""
    total, count = np.zeros_like(tensors[0]), np.zeros(sign.shape, np.int32)
    for tensor, weight in zip(tensors, weights, strict=True):
        agrees = np.sign(tensor) == sign
        total += np.where(agrees, tensor * tensor.dtype.type(weight), 0)
        count += agrees
    return np.asarray(total / np.maximum(count, 1).astype(total.dtype))
