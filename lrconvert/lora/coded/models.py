"""Sixty-four integer models of quantized numbers, one for each scale of a row.

Model k is for numbers of standard deviation ``2^((k - 10) / 4)`` quantizer steps: seven parts of a Gaussian, three of a
Laplace distribution of that deviation, over the cells of a quantizer with a dead zone of 0.6 steps to either side. The
frequencies are data (``models.txt``), not computed: every machine decodes with the same integers. Normative text:
``formats/coded-v1.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import numpy as np

from lrconvert.core.dtypes import Array

COUNT = 64
TOTAL_BITS = 16
TOTAL = 1 << TOTAL_BITS
LARGEST = 31  # the largest magnitude of a symbol; beyond it the escape symbol stands
SYMBOLS = 2 * LARGEST + 2
ESCAPE = SYMBOLS - 1


@dataclass(frozen=True)
class Model:
    """One model. `shift`: low bits of a number that are stored as they are. `frequencies` (64,) of the symbols
    ``h + 31`` for h from -31 to 31, and of the escape, which sum to 2^16; `starts` their running sums."""

    shift: int
    frequencies: Array
    starts: Array

    @property
    def bits(self) -> Array:
        """Return the ideal length of every symbol in bits, float64, infinite for those that never occur."""
        with np.errstate(divide="ignore"):
            return TOTAL_BITS - np.log2(self.frequencies.astype(np.float64))


def shift_of(k: int) -> int:
    """Return how many low bits the model k leaves out: none up to a deviation of 4 steps."""
    return max(0, -((18 - k) // 4))


@lru_cache(maxsize=1)
def models() -> tuple[Model, ...]:
    """Return all models."""
    text = resources.files("lrconvert.lora.coded").joinpath("models.txt").read_text("ascii")
    return tuple(_model(k, [int(n) for n in line.split()]) for k, line in enumerate(text.splitlines()))


def _model(k: int, half: list[int]) -> Model:
    """The model of a line of frequencies of h = 0, 1, 2, ...: without a shift those of -h are the same, with one those
    of -1 - h."""
    shift, frequencies = shift_of(k), np.zeros(SYMBOLS, np.uint32)
    for h, n in enumerate(half):
        frequencies[LARGEST + h] = n
        mirrored = LARGEST - h if shift == 0 else LARGEST - 1 - h
        if mirrored >= 0:
            frequencies[mirrored] = n
    frequencies[ESCAPE] = TOTAL - int(frequencies[:ESCAPE].sum())
    starts = np.concatenate([[0], np.cumsum(frequencies)]).astype(np.uint32)
    return Model(shift, frequencies, starts[:-1])


@lru_cache(maxsize=1)
def shifts() -> Array:
    """Return the low bits that every model leaves out, int32 (64,)."""
    return np.array([model.shift for model in models()], np.int32)
