"""Rounding of values that float64 formulas give, where correct rounding of an exact sum is out of reach."""

from __future__ import annotations

import numpy as np

from lrconvert.core.dtypes import F64, Array, decode, round_to
from lrconvert.core.errors import MergeOverflowError
from lrconvert.merge.arithmetic.stats import MergeStats


def bits(stored: Array) -> Array:
    """Return the bits of numbers as unsigned integers: -0 and +0 differ, and NaN equals itself."""
    return stored.view(f"u{stored.dtype.itemsize}")


def rounded(values: F64, stored: Array, out: Array, top: int, dtype: str) -> MergeStats:
    """Round `values` into `out` from row `top` on, and return what happened to these rows of `stored`."""
    codes = round_to(values, dtype)
    results = decode(codes, dtype)
    if not np.isfinite(results).all():
        row, col = np.argwhere(~np.isfinite(results))[0]
        raise MergeOverflowError(f"element [{top + row}, {col}] would be beyond the range of {dtype}")
    rows = slice(top, top + values.shape[0])
    out[rows] = codes
    changed = int(np.count_nonzero(bits(codes) != bits(stored[rows])))
    errors = np.abs(values - results)
    return MergeStats(0, changed, values.size - changed, float(errors.max()), float(errors.sum()))
