"""Paired bootstrap intervals of shares: both sums of a share are over the same texts, drawn again together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lrconvert.core.dtypes import F64

SAMPLES = 1000


def draws(texts: int) -> F64:
    """Return how often each text is in each sample, (samples, texts). The same for equal counts, so that what is
    measured of several adapters is paired."""
    return np.random.default_rng(0).multinomial(texts, np.full(texts, 1 / texts), SAMPLES).astype(np.float64)


def interval(value: Callable[[F64], F64], texts: int) -> tuple[float, float, float]:
    """Return a value and its 95 % interval, of the samples where it is finite; zeros if it is nowhere. `value` takes
    weights of texts (samples, texts) and gives (samples,)."""
    values = np.concatenate([value(np.ones((1, texts))), value(draws(texts))])
    samples = values[1:][np.isfinite(values[1:])]
    if not len(samples) or not np.isfinite(values[0]):
        return 0.0, 0.0, 0.0
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(values[0]), float(low), float(high)


def share(over: F64, under: F64, *, one_minus: bool = False) -> tuple[float, float, float]:
    """Return the sum of `over` (texts,) as a share of that of `under`, or what is missing to 1, with its interval."""

    def value(weights: F64) -> F64:
        with np.errstate(divide="ignore", invalid="ignore"):
            shares: F64 = (weights @ over) / (weights @ under)
        return 1 - shares if one_minus else shares

    return interval(value, len(over))
