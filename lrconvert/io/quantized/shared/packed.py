"""Integers of few bits as one stream of bits in words of 32: number i has the bits from i * bits on, low ones first."""

from __future__ import annotations

import numpy as np

from lrconvert.core.dtypes import Array

BITS = (2, 3, 4, 8)


def words(first: int, stop: int, bits: int) -> range:
    """Return the words that hold the numbers from `first` to `stop`."""
    return range(first * bits // 32, -(-stop * bits // 32))


def unpacked(stored: Array, first: int, count: int, bits: int) -> Array:
    """Return numbers `first` and following of every column as uint32; `stored` are the `words` of these, down each
    column."""
    columns = stored.view(np.uint32)
    places = np.arange(first, first + count) * bits - first * bits // 32 * 32
    word, shift = places // 32, (places % 32).astype(np.uint32)
    numbers = columns[word] >> shift[:, None]
    split = np.flatnonzero(shift + bits > 32)  # over the end of a word
    if split.size:
        numbers[split] |= columns[word[split] + 1] << (32 - shift[split])[:, None]
    numbers &= np.uint32((1 << bits) - 1)
    return numbers
