"""Rows of latents in a flat tensor, rounded and counted, and what a step of their numbers costs; `methods/lowrank/rate`
has the same in numpy and torch. Integers, counts and sums of squares are the same; slopes differ in the last place."""

from __future__ import annotations

import numpy as np

from lrconvert.core.dtypes import F32, F64, Array
from lrconvert.kernels.jit import compiled


@compiled()
def round_flat(flat: F32, bounds: Array, limits: F32, counts: F64, squares: F64) -> Array:
    """Return the integers, int32 (N,), of rows of `flat` (N,) between `bounds` (n, 2), where `limits` are two numbers:

        c <- sign(x) floor(min(|x| + limits[0], limits[1]))

    Fills `counts` (n, m) with how many of a row have ``min(|c|, m - 1)`` of 0, 1, ..., and `squares` (n,) with the sum
    of ``c c``.
    """
    codes = np.zeros(len(flat), np.int32)
    last = counts.shape[1] - 1
    tallies = np.empty(last + 1, np.int64)
    offset, most = limits
    for i in range(len(bounds)):
        total = 0.0
        for j in range(bounds[i, 0], bounds[i, 1]):
            size = np.int32(min(abs(flat[j]) + offset, most))
            codes[j] = -size if flat[j] < 0 else size
        tallies[:] = 0
        for j in range(bounds[i, 0], bounds[i, 1]):
            size = abs(codes[j])
            total += np.float64(size) * np.float64(size)
            tallies[min(size, last)] += 1
        counts[i] = tallies
        squares[i] = total
    return codes


@compiled()
def slopes_flat(flat: F32, bounds: Array, models: Array, more: F32, units: F32, limits: F32) -> F32:
    """Return what a step more of each number of `flat` (N,) costs, with the number's sign, float32 (N,), for rows
    between `bounds` (n, 2) under `models` (n,), where `more` (models, m) is what the next class costs, `units`
    (models,) are classes in a step, and `limits` are four numbers:

        place <- |x| / limits[0] if |x| < limits[0], else |x| - limits[1]
        cost <- more[model, min(floor(place unit), m - 1)] unit, and the row's share of limits[3]

    which falls on the numbers of at least limits[2], or on all where there is none.
    """
    slopes = np.zeros(len(flat), np.float32)
    edge, offset, least, side = limits
    last = more.shape[1] - 1
    for i in range(len(bounds)):
        costs, unit = more[models[i]], units[models[i]]
        kept = 0
        for j in range(bounds[i, 0], bounds[i, 1]):
            kept += abs(flat[j]) >= least
        share = side / np.float32(max(kept, 1))
        for j in range(bounds[i, 0], bounds[i, 1]):
            size = abs(flat[j])
            place = size / edge if size < edge else size - offset
            cost = costs[np.int32(min(place * unit, np.float32(last)))] * unit
            if kept == 0 or size >= least:
                cost += share
            slopes[j] = cost if flat[j] > 0 else -cost
            if flat[j] == 0:
                slopes[j] = 0
    return slopes
