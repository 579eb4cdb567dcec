"""Bat: the block of Bone, and what the base's own blocks make of it.

With W and delta cut into r x r blocks, i along outputs and j along inputs, ``delta_ij = (W_ij + I) D_i``: the part
``D_i`` is Bone's, whose D (r, out) holds the transposed D_i side by side. Block i of the outputs depends on nothing but
D_i, so that each is a least-squares problem of its own in r x r unknowns, and the base passes through once, a few rows
at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lrconvert.adapter import LoraTarget
from lrconvert.base_weights import BLOCK, BaseWeights
from lrconvert.dtypes import F64, Array
from lrconvert.methods.bone.fit import Classes, factors
from lrconvert.moments import Moment

_TOLERANCE = 1e-5  # of the gradient beside the first one, where iterations end: the error is its square from the least
_ROUNDS = 200  # that nothing needs: W_ij is small beside I, for which the preconditioner is the inverse
_WIDE = 1 << 22  # elements at a time under a metric, which costs a product with all of its rows each time
_RIDGE = 1e-10  # of the mean diagonal, for blocks that some base makes singular


def blocks_of(block: Any) -> Any:
    """The D_i (out / r, r, r) of D (r, out)."""
    rank, out = block.shape
    return block.T.reshape(out // rank, rank, rank)


# --- what it means --------------------------------------------------------------------------------------------------


def rows_on(block: Array, weight: Array, first: int) -> Array:
    """Rows `first` and on of the update (n, m) on the same rows of the base `weight` (n, m); m a multiple of r.

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
    """The same by matrix products, on torch tensors with whole blocks of rows; gradients pass."""
    rank = len(block)
    own = blocks_of(block)[first // rank : (first + len(weight)) // rank]
    mixed = weight.reshape(len(own), -1, rank) @ own  # rows of block i by input block, times D_i
    return (mixed.reshape(len(own), rank, -1, rank) + own[:, :, None, :]).reshape(weight.shape)


# --- fitting --------------------------------------------------------------------------------------------------------


def fit_block(pair: LoraTarget, rank: int, metric: Moment | None, base: BaseWeights) -> tuple[F64, F64 | None]:
    """(the D (r, out) with the least error; under a metric Bone's T M T^T (r, r), by which its rows share it)."""
    left, right = factors(pair)
    gram = None if metric is None else Classes(right, metric).at(rank)[1]
    weighed = right if metric is None else metric.times(right)
    found = np.empty((rank, len(left)))
    for top, rows in base.blocks(pair.target, rank, BLOCK if metric is None else _WIDE):
        stop = top + len(rows)
        system = _System(rows.astype(np.float64), rank, metric, gram)
        found[:, top:stop] = system.solve(left[top:stop] @ weighed).reshape(-1, rank).T
    return found, gram


class _System:
    """The normal equations of some output blocks: ``sum_jl M_ij^T M_il D_i Sigma_lj`` with M_ij = W_ij + I."""

    def __init__(self, weight: F64, rank: int, metric: Moment | None, gram: F64 | None) -> None:
        self._rank, self._blocks = rank, len(weight) // rank
        parts = weight.reshape(self._blocks, rank, -1, rank)
        k = np.arange(rank)
        parts[:, k, :, k] += 1
        self._seen = parts.reshape(self._blocks, -1, rank)  # (blocks, rows and input blocks, r)
        square = self._turned(self._seen)
        ridge = _RIDGE * np.trace(square, axis1=1, axis2=2)[:, None, None] / rank + 1e-300
        self._square = square + ridge * np.eye(rank)
        self._metric, self._gram = metric, gram

    def _turned(self, x: F64) -> F64:
        found: F64 = self._seen.transpose(0, 2, 1) @ x
        return found

    def solve(self, weighed: F64) -> F64:
        """D_i (blocks, r, r) for rows of the update times the metric (blocks * r, in)."""
        goal = self._turned(weighed.reshape(self._seen.shape))
        if self._gram is None or self._metric is None:
            return np.asarray(np.linalg.solve(self._square, goal), np.float64)
        return self._conjugate_gradients(goal, self._metric, self._gram)

    def _conjugate_gradients(self, goal: F64, metric: Moment, gram: F64) -> F64:
        """Every block with steps of its own. The preconditioner takes sum_jl M_ij^T M_il Sigma_lj for the product of
        its two halves, which it is where the W_ij are small."""
        mean = self._square * (self._rank / self._seen.shape[1])
        inputs = gram + _RIDGE * np.trace(gram) / self._rank * np.eye(self._rank)

        def precondition(x: F64) -> F64:
            half = np.linalg.solve(mean, x)
            found: F64 = np.linalg.solve(inputs, half.transpose(0, 2, 1)).transpose(0, 2, 1)
            return found

        def dots(x: F64, y: F64) -> F64:
            found: F64 = (x * y).sum(axis=(1, 2))[:, None, None]
            return found

        def ratio(over: F64, under: F64) -> F64:
            return np.divide(over, under, out=np.zeros_like(over), where=under > 0)

        found, left = np.zeros_like(goal), goal.copy()
        step = near = precondition(left)
        size = first = dots(left, near)
        for _ in range(_ROUNDS):
            if (size <= _TOLERANCE**2 * first).all():
                break
            update = (self._seen @ step).reshape(self._blocks * self._rank, -1)
            image = self._turned(metric.times(update).reshape(self._seen.shape))
            length = ratio(size, dots(step, image))
            found += length * step
            left -= length * image
            near = precondition(left)
            size, before = dots(left, near), size
            step = near + ratio(size, before) * step
        return found
