"""DoRA's weights: ``magnitude / ||W + s B A|| * (W + s B A)`` in a stated order of float64 operations. The norms run
along the inputs; in LyCORIS' other form along the outputs and, of a convolution, along the places of its kernel.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024. The result is not a sum of W and a low-rank matrix, so
correct rounding of the exact value is out of reach; instead every operation is one of IEEE 754 (+, *, /, square root)
in an order that ``formats/merge-v1.md`` fixes, so that every machine writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from lrconvert.core.dtypes import F64, Array, decode
from lrconvert.core.errors import ValueRangeError
from lrconvert.merge.arithmetic.exact import Term
from lrconvert.merge.arithmetic.rounding import rounded
from lrconvert.merge.arithmetic.stats import MergeStats

LANES = 64  # partial sums of a squared norm: element i is added to number i mod 64
_TILE = 1 << 16  # elements that are computed at a time: they stay in the cache


def merge_rows(stored: Array, dtype: str, term: Term, magnitude: F64) -> tuple[Array, MergeStats]:
    """Return the merged rows as stored bits, and what happened: `stored` (n, in), their `term`, `magnitude` (n,)."""
    out = np.empty_like(stored)
    stats = MergeStats(elements=stored.size)
    for top, v in _tiles(stored, dtype, term):
        factor = magnitude[top : top + v.shape[0]] / _norms(v.T)
        stats += rounded(v * factor[:, None], stored, out, top, dtype)
    return out, stats


def column_norms(blocks: Iterable[tuple[int, Array]], dtype: str, term: Term, places: int = 1) -> F64:
    """Return the norms (cols / places,) of a parameter's columns as it is stored, `places` beside each other taken
    together, read as `blocks` of (first row, stored rows)."""
    lanes = np.zeros((LANES, term.right.shape[1]))
    for first, stored in blocks:
        part = Term(term.scale, term.left[first : first + stored.shape[0]], term.right)
        for top, v in _tiles(stored, dtype, part):
            for i, row in enumerate(v):
                lanes[(first + top + i) % LANES] += row * row
    squares = _folded(lanes).reshape(-1, places)
    total = squares[:, 0].copy()
    for place in range(1, places):
        total += squares[:, place]
    norms: F64 = np.sqrt(total)
    return norms


def merge_columns(stored: Array, dtype: str, term: Term, factor: F64) -> tuple[Array, MergeStats]:
    """Return the merged rows as stored bits, and what happened: `stored` (n, cols), `factor` (cols,) magnitudes over
    norms."""
    out = np.empty_like(stored)
    stats = MergeStats(elements=stored.size)
    for top, v in _tiles(stored, dtype, term):
        stats += rounded(v * factor, stored, out, top, dtype)
    return out, stats


def checked_factor(magnitude: F64, norms: F64) -> F64:
    """Return ``magnitude / norms``. Raises E-VALUE where a norm is zero or not finite."""
    if not (np.isfinite(norms).all() and norms.all()):
        raise ValueRangeError(
            "a row or column of W + B A has a norm of zero or beyond float64, DoRA is not defined there",
            fix="is this the base that the adapter was trained on? else train without this layer",
        )
    return magnitude / norms


def _tiles(stored: Array, dtype: str, term: Term) -> Iterator[tuple[int, F64]]:
    """Return (first row, ``W + s * (left_1 right_1 + left_2 right_2 + ...)``) of a few rows each, added from left to
    right."""
    height = max(1, _TILE // stored.shape[1])
    right = term.right.astype(np.float64)
    for top in range(0, stored.shape[0], height):
        left = term.left[top : top + height].astype(np.float64)
        total = left[:, :1] * right[0]
        part = np.empty_like(total)
        for j in range(1, right.shape[0]):
            np.multiply(left[:, j : j + 1], right[j], out=part)
            total += part
        total *= term.scale
        total += decode(stored[top : top + height], dtype)
        yield top, total


def _norms(columns: F64) -> F64:
    """Norms (n,) of the columns of an array (in, n)."""
    whole = -(-columns.shape[0] // LANES) * LANES
    lanes = np.zeros((LANES, columns.shape[1]))
    for start in range(0, whole, LANES):
        part = columns[start : start + LANES]
        lanes[: part.shape[0]] += part * part
    norms = np.sqrt(_folded(lanes))
    checked_factor(norms, norms)
    return norms


def _folded(lanes: F64) -> F64:
    """The sum of the lanes: halves are added to each other until one is left."""
    while lanes.shape[0] > 1:
        half = lanes.shape[0] // 2
        lanes = lanes[:half] + lanes[half:]
    total: F64 = lanes[0]
    return total
