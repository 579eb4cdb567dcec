"""Rows of integers as bytes: symbols through the coder, low bits and rare large numbers as they are.

A row is a run of numbers that share a model. A number n of a model with shift s is the symbol ``n >> s`` and s low
bits; one whose symbol the model does not hold is the escape symbol and 32 bits (two's complement). The stream is the
coder's bytes, then all those bits in the order of the numbers, lowest bit first, the last byte filled with zeros.
Normative text: ``formats/coded-v1.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lrconvert.core.dtypes import F64, Array
from lrconvert.core.errors import CanonicalError
from lrconvert.lora.coded import rans
from lrconvert.lora.coded.models import COUNT, ESCAPE, LARGEST, models, shift_of

Rows = Sequence[tuple[int, int]]  # (model, how many numbers) of each row

WIDE = 32  # bits of a number that its model does not hold
_SHIFTS = np.array([shift_of(k) for k in range(COUNT)], np.int64)


def which_of(rows: Rows) -> Array:
    """Return the model of every number, int64 (n,)."""
    pairs = np.array(rows, np.int64).reshape(-1, 2)
    return np.repeat(pairs[:, 0], pairs[:, 1])


def bits_of(numbers: Array) -> F64:
    """Return the length in bits of each row of integers (rows, n) under each model, (rows, 64): ideal for symbols,
    exact for the rest."""
    lengths = np.empty((len(numbers), COUNT), np.float64)
    for k, model in enumerate(models()):
        symbols = _symbols(numbers, np.int64(k))
        lengths[:, k] = model.bits[symbols].sum(1) + numbers.shape[1] * model.shift + (symbols == ESCAPE).sum(1) * WIDE
    return lengths


def encode(numbers: Array, rows: Rows) -> bytes:
    """Return the bytes of integers (n,), of magnitude below 2^31, in rows."""
    which = which_of(rows)
    wide = np.asarray(numbers, np.int64)
    symbols = _symbols(wide, which)
    lengths = np.where(symbols == ESCAPE, WIDE, _SHIFTS[which])
    return rans.encode(symbols, which) + _pack(wide, lengths)


def decode(data: bytes, rows: Rows) -> Array:
    """Return the integers, int32 (n,), of bytes that `encode` made. Raise E-CANON for bytes that it never makes."""
    which = which_of(rows)
    symbols, end = rans.decode(data, which)
    escaped = symbols == ESCAPE
    low = _unpack(data[end:], np.where(escaped, WIDE, _SHIFTS[which]))
    high = (symbols.astype(np.int64) - LARGEST) << _SHIFTS[which]
    numbers = np.where(escaped, (low ^ (1 << (WIDE - 1))) - (1 << (WIDE - 1)), high + low)
    if escaped.any() and (_symbols(numbers[escaped], which[escaped]) != ESCAPE).any():
        raise CanonicalError("a coded stream escapes a number that its model holds")
    return numbers.astype(np.int32)


def _symbols(numbers: Array, which: Array | np.int64) -> Array:
    """The symbol of every number under its model, uint8."""
    high = numbers >> _SHIFTS[which]
    inside = np.abs(high) <= LARGEST
    symbols = np.where(inside, high + LARGEST, ESCAPE).astype(np.uint8)
    held = _held()[which, symbols] if symbols.size else inside
    return np.where(held, symbols, np.uint8(ESCAPE))


def _held() -> Array:
    """Whether each model holds each symbol, booleans (64, symbols)."""
    return np.stack([model.frequencies > 0 for model in models()])


def _pack(values: Array, lengths: Array) -> bytes:
    """The lowest bits of values, as many of each as `lengths` says, one after the other."""
    ends = np.cumsum(lengths)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    starts = ends - lengths
    for bit in range(int(lengths.max(initial=0))):
        there = lengths > bit
        bits[starts[there] + bit] = (values[there] >> bit) & 1
    return np.packbits(bits, bitorder="little").tobytes()


def _unpack(data: bytes, lengths: Array) -> Array:
    """Invert `_pack`: non-negative int64. Raise E-CANON for another number of bytes, or fill bits that are not zero."""
    ends = np.cumsum(lengths)
    count = int(ends[-1]) if len(ends) else 0
    if len(data) != (count + 7) // 8:
        raise CanonicalError("a coded stream does not end where its numbers do")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    if bits[count:].any():
        raise CanonicalError("the bits that fill the last byte of a coded stream are not zero")
    starts = ends - lengths
    values = np.zeros(len(lengths), np.int64)
    for bit in range(int(lengths.max(initial=0))):
        there = lengths > bit
        values[there] |= bits[starts[there] + bit].astype(np.int64) << bit
    return values
