"""Rows of numbers rounded with one step, and what is counted; `methods/lowrank/rounding` and `lora/coded/choice`
have the same in numpy. Integers and counts are the same; sums of float64 differ in their order."""

from __future__ import annotations

import numpy as np

from lrconvert.core.dtypes import F32, F64, Array
from lrconvert.kernels.jit import compiled
from lrconvert.kernels.machine_code import Signature

LOOPS = {"round_rows": Signature(("f4 2", "f4 1", "i8 2", "f8 2", "i4 2", "i8 2"))}
_TALLIES = 4  # counters of one class, taken in turn: a counter that was just written must not be waited for


@compiled(reassociate=True)
def round_rows(rows: F32, limits: F32, counts: Array, sums: F64, codes: Array, tallies: Array) -> None:
    """Fill `codes`, int32 (n, d), with the integers of `rows` (n, d), where `limits` are three numbers:

        c <- sign(x) floor(min(|x| limits[0] + limits[1], limits[2]))

    Fills `counts`, int64 (n, m), with how many of a row have
    ``min(|c|, m - 1)`` of 0, 1, ..., and `sums` (n, 4) with those of ``x y``, ``y y``, ``x x`` and ``c c``, for
    ``y = 16 c - sign(c)``. `tallies`, int64 (4, m), are scratch.
    """
    n, d = rows.shape
    last = counts.shape[1] - 1
    factor, offset, most = limits[0], limits[1], limits[2]
    for i in range(n):
        xy = yy = xx = cc = 0.0
        row, code = rows[i], codes[i]
        for j in range(d):
            x = row[j]
            size = np.int32(min(abs(x) * factor + offset, most))
            q = -size if x < 0 else size
            code[j] = q
            y = np.float64(16 * q + (np.int32(q < 0) - np.int32(q > 0)))
            xy += np.float64(x) * y
            yy += y * y
            xx += np.float64(x) * np.float64(x)
            cc += np.float64(q) * np.float64(q)
        sums[i, 0], sums[i, 1], sums[i, 2], sums[i, 3] = xy, yy, xx, cc
        for t in range(_TALLIES):
            for m in range(last + 1):
                tallies[t, m] = 0
        for j in range(d):
            tallies[j % _TALLIES, min(abs(code[j]), last)] += 1
        for m in range(last + 1):
            counts[i, m] = tallies[0, m] + tallies[1, m] + tallies[2, m] + tallies[3, m]
