"""Updates that float32, in which adapters are computed, cannot hold."""

from __future__ import annotations

import numpy as np

from lrconvert.core.errors import ValueRangeError
from lrconvert.lora.adapter import LoraAdapter

_LARGEST = float(np.finfo(np.float32).max)


def check(lora: LoraAdapter) -> None:
    """Raise E-VALUE if an update may have numbers beyond float32: no fit could hold them, and no base."""
    for pair in lora.targets:
        bound = abs(pair.scale) * pair.rank
        for factor in (pair.A, pair.B):  # one after the other: their product alone may be beyond float64
            bound *= float(np.max(np.abs(factor), initial=0.0))
        if not bound <= _LARGEST:
            what = f"{pair.target.name}: the update may reach {bound:.3g}, beyond the range of float32"
            raise ValueRangeError(what, fix="the training diverged, or alpha is wrong; use an earlier checkpoint")
