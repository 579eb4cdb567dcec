"""Bat: the block of Bone, and what the base's own blocks make of it.

With W and delta cut into r x r blocks, i along outputs and j along inputs, ``delta_ij = (W_ij + I) D_i``: the part
``D_i`` is Bone's, whose D (r, out) holds the transposed D_i side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lrconvert.core.dtypes import Array


def blocks_of(block: Any) -> Any:
    """Return the D_i (out / r, r, r) of D (r, out)."""
    rank, out = block.shape
    return block.T.reshape(out // rank, rank, rank)


def rows_on(block: Array, weight: Array, first: int) -> Array:
    """Return rows `first` and on of the update (n, m) on the same rows of the base `weight` (n, m); m a multiple of r.

    ``D[c, o] + W[o, j r] D[c, i r] + W[o, j r + 1] D[c, i r + 1] + ...`` at row o of block i and column j r + c, each
    product rounded and added from left to right, in the dtype of `weight`.
    """
    rank = len(block)
    rows = np.arange(first, first + len(weight))
    own = blocks_of(block).astype(weight.dtype)[rows // rank]  # (n, k, c)
    update = np.empty_like(weight)
    inputs = [np.ascontiguousarray(weight[:, k::rank]) for k in range(rank)]
    product = np.empty_like(inputs[0])
    for c in range(rank):
        total = np.empty_like(inputs[0])
        total[:] = block[c, rows, None]
        for k in range(rank):
            np.multiply(inputs[k], own[:, k, c, None], out=product)
            total += product
        update[:, c::rank] = total
    return update


def products_on(block: Any, weight: Any, first: int) -> Any:
    """Return the same by matrix products, on torch tensors with whole blocks of rows; gradients pass."""
    rank = len(block)
    own = blocks_of(block)[first // rank : (first + len(weight)) // rank]
    mixed = weight.reshape(len(own), -1, rank) @ own  # rows of block i by input block, times D_i
    return (mixed.reshape(len(own), rank, -1, rank) + own[:, :, None, :]).reshape(weight.shape)
