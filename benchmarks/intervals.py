"""Paired bootstrap intervals, `lrconvert.live.intervals`, rounded for tables."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lrconvert.live import intervals


def interval(value: Callable[[np.ndarray], np.ndarray], texts: int) -> list[float]:
    """Return a value and its 95 % interval."""
    return [round(x, 4) for x in intervals.interval(value, texts)]


def share(over: np.ndarray, under: np.ndarray, *, one_minus: bool = False) -> list[float]:
    """Return the sum of `over` (texts,) as a share of that of `under`, or what is missing to 1, with its interval."""
    return [round(x, 4) for x in intervals.share(over, under, one_minus=one_minus)]
