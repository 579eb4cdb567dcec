"""The one rounding of values that float64 formulas give, where correct rounding of an exact sum is out of reach."""

from __future__ import annotations

import numpy as np

from lrconvert.core.dtypes import F64, Array, decode, round_to
from lrconvert.core.errors import MergeOverflowError
from lrconvert.merge.arithmetic.exact import MergeStats


def rounded(values: F64, stored: Array, out: Array, top: int, dtype: str) -> MergeStats:
    """Round `values` into `out` from row `top` on and say what happened."""
    codes = round_to(values, dtype)
    found = decode(codes, dtype)
    if not np.isfinite(found).all():
        row, col = np.argwhere(~np.isfinite(found))[0]
        raise MergeOverflowError(f"element [{top + row}, {col}] would be beyond the range of {dtype}")
    out[top : top + values.shape[0]] = codes
    moved = codes.view(f"u{codes.itemsize}") != stored[top : top + values.shape[0]].view(f"u{codes.itemsize}")
    errors = np.abs(values - found)
    changed = int(np.count_nonzero(moved))
    return MergeStats(0, changed, values.size - changed, float(errors.max()), float(errors.sum()))
