"""Interleaved range asymmetric numeral systems (Duda, 2013): integers in about their ideal number of bits.

States have 32 bits, words 16, frequencies sum to 2^16. Number i of a stream belongs to lane ``i mod lanes``; how many
lanes there are follows from how many numbers there are. A step codes one number of every lane, so numpy does it at
once. The decoder must end with every state where the encoder began and with no word left, so that a sequence of numbers
has one spelling. Normative text: ``formats/coded-v1.md``.
"""

from __future__ import annotations

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import CanonicalError
from lrconvert.lora.coded.models import TOTAL_BITS, models, slots

_START = 1 << 16  # of every state; the smallest normalized one
_NUMBERS_PER_LANE = 1 << 12
_MOST_LANES = 1 << 12


def lanes_of(count: int) -> int:
    """Return how many lanes code `count` numbers: a power of two, from 1 to 4096."""
    return min(1 << max(0, (count // _NUMBERS_PER_LANE).bit_length() - 1), _MOST_LANES) if count else 0


def encode(symbols: Array, which: Array) -> bytes:
    """Return the bytes of `symbols` (n,) under the models `which` (n,): the final states, 4 bytes each, then words of
    2 bytes, little-endian. Every symbol must have a frequency in its model."""
    count, lanes = len(symbols), lanes_of(len(symbols))
    if not count:
        return b""
    every = models()
    frequency_of = np.stack([model.frequencies for model in every])
    start_of = np.stack([model.starts for model in every])
    frequencies = frequency_of[which, symbols].astype(np.uint64)
    starts = start_of[which, symbols].astype(np.uint64)
    states = np.full(lanes, _START, np.uint64)
    words: list[Array] = []
    for first in range((count - 1) // lanes * lanes, -1, -lanes):
        f, c = frequencies[first : first + lanes], starts[first : first + lanes]
        x = states[: len(f)]
        full = x >= f << np.uint64(16)
        words.append((x[full] & np.uint64(0xFFFF)).astype("<u2")[::-1])
        x = np.where(full, x >> np.uint64(16), x)
        states[: len(f)] = (x // f << np.uint64(TOTAL_BITS)) + x % f + c
    body = np.concatenate(words)[::-1] if words else np.zeros(0, "<u2")
    return states.astype("<u4").tobytes() + body.astype("<u2").tobytes()


def decode(data: bytes, which: Array) -> tuple[Array, int]:
    """Return the symbols, uint8 (n,), of bytes that begin with what `encode` made for the models `which` (n,), and how
    many bytes that is. Raise E-CANON for bytes that it never makes."""
    count, lanes = len(which), lanes_of(len(which))
    if len(data) < 4 * lanes:
        raise CanonicalError("a coded stream is too short")
    states = np.frombuffer(data, "<u4", lanes).astype(np.uint64)
    words = np.frombuffer(data[4 * lanes : len(data) // 2 * 2], "<u2").astype(np.uint64)
    if count and (states < _START).any():
        raise CanonicalError("a coded stream begins with a state that is too small")
    every = models()
    frequency_of = np.stack([model.frequencies for model in every]).astype(np.uint64)
    start_of = np.stack([model.starts for model in every]).astype(np.uint64)
    used = np.unique(which)
    rows = np.zeros(len(every), np.intp)
    rows[used] = np.arange(len(used))
    table = np.stack([slots(int(k)) for k in used]) if count else np.zeros((0, 0), np.uint8)
    symbols, at = np.empty(count, np.uint8), 0
    low = np.uint64(0xFFFF)
    for first in range(0, count, max(lanes, 1)):
        k = which[first : first + lanes]
        x = states[: len(k)]
        slot = x & low
        s = table[rows[k], slot]
        symbols[first : first + lanes] = s
        x = frequency_of[k, s] * (x >> np.uint64(TOTAL_BITS)) + slot - start_of[k, s]
        need = x < _START
        n = int(need.sum())
        if at + n > len(words):
            raise CanonicalError("a coded stream ends before its numbers do")
        x[need] = x[need] << np.uint64(16) | words[at : at + n]
        at += n
        states[: len(k)] = x
    if (states != _START).any():
        raise CanonicalError("a coded stream does not end where its numbers do")
    return symbols, 4 * lanes + 2 * at
