"""Updates that depend on the base's weights: ``W + s * update(W)``, in a stated order of float64 operations.

Such an update is no product of factors whose exact sum could be rounded correctly. As for DoRA, every operation is one
of IEEE 754 in an order that the method's page and ``formats/merge-v1.md`` fix, so that every machine writes the same
bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lrconvert.core.dtypes import F64, Array, decode
from lrconvert.merge.arithmetic.rounding import rounded
from lrconvert.merge.arithmetic.stats import MergeStats

_TILE = 1 << 16  # elements that are computed at a time: they stay in the cache

# (rows of W (n, m), number of the first) -> the same rows of the update, float64
UpdateOf = Callable[[F64, int], F64]


def merge_rows(stored: Array, dtype: str, update_of: UpdateOf, scale: float, first: int) -> tuple[Array, MergeStats]:
    """Return the merged rows as stored bits, and what happened: `stored` (n, in), row `first` of the target and on."""
    out = np.empty_like(stored)
    stats = MergeStats(elements=stored.size)
    height = max(1, _TILE // stored.shape[1])
    for top in range(0, stored.shape[0], height):
        weight = decode(stored[top : top + height], dtype).astype(np.float64)
        stats += rounded(update_of(weight, first + top) * scale + weight, stored, out, top, dtype)
    return out, stats


def merge_columns(
    stored: Array, dtype: str, update_of: UpdateOf, scale: float, within: slice
) -> tuple[Array, MergeStats]:
    """Do the same for a parameter stored (in, out): rows `within` of `stored`, which holds whole blocks of inputs."""
    weight = decode(stored, dtype).astype(np.float64)
    update = update_of(np.ascontiguousarray(weight.T), 0).T
    values = (update * scale + weight)[within]
    present = stored[within]
    out = np.empty_like(present)
    return out, MergeStats(elements=present.size) + rounded(values, present, out, 0, dtype)
