"""The model under which a row of integers is shortest, by ideal lengths of its symbols."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lrconvert.core.dtypes import F64, Array
from lrconvert.lora.coded.models import COUNT, ESCAPE, LARGEST, models, shifts
from lrconvert.lora.coded.stream import WIDE

CLASSES = LARGEST + 2  # the magnitudes 0 to LARGEST, and all larger ones
_NEAR = 2  # wide models to either side of the one of the same deviation that are tried
_CHUNK = 1 << 18  # numbers that are shifted at once


def best_models(codes: Array, counts: F64 | None = None, squares: F64 | None = None) -> tuple[Array, F64]:
    """Return the model (n,) under which each row of integers (n, d) is shortest, and how many bits (n,) that is. What
    is known need not be counted: how many of a row are of each class, `counts`, and the sum of their `squares`."""
    if counts is None or squares is None:
        counts = _histograms(np.abs(codes))
        squares = np.einsum("nd,nd->n", codes, codes, dtype=np.float64)
    narrow = np.flatnonzero(shifts() == 0)
    lengths = counts @ bits_of_classes()[:, narrow]
    best, shortest = narrow[np.argmin(lengths, axis=1)], lengths.min(axis=1)
    sizes = np.sqrt(squares / codes.shape[1])
    middle = np.rint(4 * np.log2(np.maximum(sizes, 1)) + 10).astype(np.int64)
    wide = np.flatnonzero(middle > narrow[-1] - _NEAR)
    some = max(1, _CHUNK // codes.shape[1])
    for rows in (wide[first : first + some] for first in range(0, len(wide), some)):
        tried = np.clip(middle[rows, None] + np.arange(-_NEAR, _NEAR + 1), narrow[-1] + 1, COUNT - 1)
        lengths = _wide_lengths(codes[rows], tried)
        at = np.arange(len(rows)), lengths.argmin(axis=1)
        better = lengths[at] < shortest[rows]
        best[rows[better]], shortest[rows[better]] = tried[at][better], lengths[at][better]
    return best, shortest


def _wide_lengths(codes: Array, tried: Array) -> F64:
    """Return the bits of rows of integers (n, d) under the rising wide models `tried` (n, m), so few that they leave
    out one number of low bits, or two."""
    left_out = shifts()[tried]
    high = codes[:, None] >> left_out[:, [0, -1], None]
    counts = _histograms(np.where(high < 0, -1 - high, high).reshape(-1, codes.shape[1])).reshape(len(codes), 2, -1)
    of_model = counts[np.arange(len(codes))[:, None], (left_out != left_out[:, :1]).astype(np.intp)]
    lengths: F64 = np.einsum("nmc,nmc->nm", of_model, bits_of_classes().T[tried])
    return lengths


def _histograms(classes: Array) -> F64:
    """Return the count of each class 0, 1, ... LARGEST, and of any larger one, in every row (n, d)."""
    count, width = len(classes), CLASSES
    places = np.minimum(classes, CLASSES - 1) + np.arange(count, dtype=np.int64)[:, None] * width
    return np.bincount(places.reshape(-1), minlength=count * width).reshape(count, width).astype(np.float64)


@lru_cache(maxsize=1)
def bits_of_classes() -> F64:
    """Return the bits of a number of each class under every model (classes, models); one that a model does not hold is
    escaped."""
    bits = np.stack([model.bits for model in models()], axis=1)
    classes = np.concatenate([bits[LARGEST : 2 * LARGEST + 1] + shifts(), np.full((1, COUNT), np.inf)])
    return np.where(np.isfinite(classes), classes, bits[ESCAPE] + WIDE)
