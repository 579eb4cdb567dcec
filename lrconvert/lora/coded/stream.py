"""Rows of integers as bytes: symbols through the coder, low bits and rare large numbers as they are.

A row is a run of numbers that share a model. A number n of a model with shift s is the symbol ``n >> s`` and s low
bits; one whose symbol the model does not hold is the escape symbol and 21 bits (two's complement). The stream is the
coder's bytes, then all those bits in the order of the numbers, lowest bit first, the last byte filled with zeros.
Normative text: ``formats/coded-v1.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import CanonicalError, LimitError, ValueRangeError
from lrconvert.core.limits import MAX_CODED
from lrconvert.lora.coded import rans
from lrconvert.lora.coded.models import ESCAPE, LARGEST, SYMBOLS, models, shifts

Rows = Sequence[tuple[int, int]]  # (model, how many numbers) of each row

WIDE = 21  # bits of a number that its model does not hold
LARGEST_INTEGER = (1 << WIDE - 1) - 1  # in magnitude: sixteen times as much is exact in float32
_MOST_PER_BYTE = 4096  # numbers; the likeliest symbol takes a 300th of a bit and no stream has so many
_CHUNK = 1 << 16  # numbers that are worked on at once
_BEYOND = "a coded tensor does not end where its numbers do"


def runs_of(rows: Rows) -> rans.Runs:
    """Return the runs of symbols of these rows."""
    pairs = np.array(rows, np.int64).reshape(-1, 2)
    return rans.Runs(pairs[:, 0].astype(np.uint8), pairs[:, 1].copy())


def check_count(rows: Rows, nbytes: int | None = None) -> None:
    """Raise E-LIMIT for more numbers than a tensor may have, or than `nbytes` can hold. Nothing is allocated."""
    count = sum(n for _, n in rows)
    if count > MAX_CODED:
        raise LimitError(f"a coded tensor of {count} numbers; {MAX_CODED} are allowed")
    if nbytes is not None and count > nbytes * _MOST_PER_BYTE:
        raise LimitError(f"a coded tensor of {count} numbers in {nbytes} bytes; {_MOST_PER_BYTE} a byte are allowed")


def encode(numbers: Array, rows: Rows) -> bytes:
    """Return the bytes of integers (n,) of magnitude below 2^20 in rows. Raise E-LIMIT for more of them than a file may
    hold, E-VALUE for a larger magnitude."""
    check_count(rows)
    largest = max(int(numbers.max(initial=0)), -int(numbers.min(initial=0)))
    if largest > LARGEST_INTEGER:
        raise ValueRangeError(f"a coded integer has the magnitude {largest}; at most {LARGEST_INTEGER} is stored")
    runs = runs_of(rows)
    which, symbols = runs.which, np.empty(runs.total, np.uint8)
    packed, bits = [], np.zeros(0, np.uint8)
    for first in range(0, len(which), _CHUNK):
        part = slice(first, first + _CHUNK)
        symbols[part] = _symbols(numbers[part], which[part])
        bits = np.concatenate([bits, _low_bits(numbers[part], _low_lengths(symbols[part], which[part]))])
        whole = bits.size // 8 * 8
        packed.append(np.packbits(bits[:whole], bitorder="little"))
        bits = bits[whole:]
    packed.append(np.packbits(bits, bitorder="little"))
    return rans.encode(symbols, runs) + np.concatenate(packed).tobytes()


def decode(data: bytes, rows: Rows) -> Array:
    """Return the integers, int32 (n,), of bytes that `encode` made. Raise E-LIMIT, before anything is allocated, for
    more numbers than a file or these bytes may hold, E-CANON and E-VALUE for bytes that `encode` never makes."""
    check_count(rows, len(data))
    runs = runs_of(rows)
    symbols, end = rans.decode(data, runs)
    rest, at = np.frombuffer(data, np.uint8, len(data) - end, end), 0
    numbers = np.empty(runs.total, np.int32)
    has_shift = bool(shifts()[runs.models].any())
    for first in range(0, runs.total, _CHUNK):
        part = slice(first, first + _CHUNK)
        if not has_shift and int(symbols[part].max()) < ESCAPE:
            np.subtract(symbols[part], LARGEST, out=numbers[part], dtype=np.int32)
            continue
        which = runs.which[part]
        lengths = _low_lengths(symbols[part], which)
        until = at + int(lengths.sum(dtype=np.int64))
        if until > 8 * rest.size:
            raise CanonicalError(_BEYOND)
        bits = np.unpackbits(rest[at // 8 : (until + 7) // 8], bitorder="little")[at % 8 :]
        numbers[part] = _numbers(symbols[part], which, _low_values(bits[: until - at], lengths))
        at = until
    if (at + 7) // 8 != rest.size:
        raise CanonicalError(_BEYOND)
    if at % 8 and rest[-1] >> at % 8:
        raise CanonicalError("the bits that fill the last byte of a coded tensor are not zero")
    return numbers


# --- symbols --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _symbol_tables() -> tuple[Array, Array]:
    """At `rans.keys`: whether a model holds a symbol, and how many bits beside it the number has, uint8."""
    held = np.concatenate([model.frequencies > 0 for model in models()])
    lengths = np.repeat(shifts().astype(np.uint8), SYMBOLS)
    lengths[ESCAPE::SYMBOLS] = WIDE
    return held, lengths


def _symbols(numbers: Array, which: Array) -> Array:
    """The symbol of every number under its model, uint8."""
    high = numbers >> shifts()[which]
    symbols = np.where(np.abs(high) <= LARGEST, high + LARGEST, ESCAPE).astype(np.uint8)
    held, _ = _symbol_tables()
    return np.where(held[rans.keys(symbols, which)], symbols, np.uint8(ESCAPE))


def _numbers(symbols: Array, which: Array, low: Array) -> Array:
    """The numbers, int32, of symbols and of the bits beside them. Raise E-CANON for a number that is escaped without
    need, E-VALUE for one out of range."""
    numbers = np.asarray((symbols.astype(np.int32) - LARGEST << shifts()[which]) + low)
    escaped = np.flatnonzero(symbols == ESCAPE)
    if escaped.size:
        sign = 1 << WIDE - 1
        wide = (low[escaped] ^ sign) - sign
        if int(wide.min()) < -LARGEST_INTEGER:
            raise ValueRangeError(f"a coded integer has the magnitude {sign}; at most {LARGEST_INTEGER} is stored")
        if (_symbols(wide, which[escaped]) != ESCAPE).any():
            raise CanonicalError("a coded tensor escapes a number that its model holds")
        numbers[escaped] = wide
    return numbers


# --- what is stored as it is ----------------------------------------------------------------------------------------


def _low_lengths(symbols: Array, which: Array) -> Array:
    """Return the bits of each number beside its symbol, uint8."""
    return np.asarray(_symbol_tables()[1][rans.keys(symbols, which)])


def _low_bits(numbers: Array, lengths: Array) -> Array:
    """The lowest bits of numbers, as many of each as `lengths` says, one after the other, uint8."""
    longer = np.flatnonzero(lengths)
    counts = lengths[longer].astype(np.int64)
    places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.asarray(np.repeat(numbers[longer], counts) >> places & 1, np.uint8)


def _low_values(bits: Array, lengths: Array) -> Array:
    """Invert `_low_bits`: non-negative int32, 0 where there are no bits."""
    values = np.zeros(len(lengths), np.int32)
    longer = np.flatnonzero(lengths)
    if longer.size:
        counts = lengths[longer].astype(np.int64)
        starts = np.cumsum(counts) - counts
        places = np.arange(bits.size, dtype=np.int32) - np.repeat(starts, counts).astype(np.int32)
        values[longer] = np.add.reduceat(bits.astype(np.int32) << places, starts)
    return values
