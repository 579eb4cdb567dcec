"""Interleaved range asymmetric numeral systems (Duda, 2013): symbols in about their ideal number of bits.

States have 32 bits, words 16, frequencies sum to 2^16. Symbol i of a stream belongs to lane ``i mod lanes``; how many
lanes there are follows from how many symbols each model has. A step codes one symbol of every lane, so numpy does it at
once. The decoder must end with every state where the encoder began and with no word left, so that a sequence of symbols
has one spelling. Normative text: ``formats/coded-v1.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import CanonicalError
from lrconvert.kernels import jit
from lrconvert.lora.coded.models import COUNT, LARGEST, SYMBOLS, TOTAL, TOTAL_BITS, models

_START = 1 << 16  # of every state; the smallest normalized one
_SYMBOLS_PER_LANE = 1 << 16  # what a lane costs, three bytes, is then little beside what it codes,
_OTHERS_PER_LANE = 1 << 11  # whether its symbols are nearly all zero or not
_MOST_LANES = 1 << 12
_FEW_LANES = 16  # up to so many, plain integers are faster than arrays
_CHUNK = 1 << 18  # symbols that are looked up at once
_SAVED = 1.5e-8  # seconds that a compiled loop saves for each symbol
_ENDS_EARLY = "a coded tensor ends before its numbers do"


@dataclass(frozen=True)
class Runs:
    """Runs of symbols that share a model: `models`, uint8 (r,), and the symbols of each, `lengths`, int64 (r,)."""

    models: Array
    lengths: Array

    @cached_property
    def which(self) -> Array:
        """The model of every symbol, uint8 (n,)."""
        return np.repeat(self.models, self.lengths)

    @cached_property
    def counts(self) -> list[int]:
        """The number of symbols under each model."""
        counts = np.zeros(COUNT, np.int64)
        np.add.at(counts, self.models, self.lengths)
        return [int(n) for n in counts]

    @cached_property
    def total(self) -> int:
        return sum(self.counts)

    @cached_property
    def lanes(self) -> int:
        """How many lanes code them: a power of two, from 1 to 4096; 0 for none. It is the largest with 2^16 symbols, or
        2^11 that the models expect not to be zero, for each lane."""
        others = sum(n * other for n, other in zip(self.counts, _others(), strict=True) if n)
        wanted = max(self.total // _SYMBOLS_PER_LANE, others // (_OTHERS_PER_LANE * TOTAL), 1)
        return min(1 << wanted.bit_length() - 1, _MOST_LANES) if self.total else 0


# --- to bytes -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _others() -> list[int]:
    """The frequency of what is not zero, of every model."""
    return [TOTAL - int(model.frequencies[LARGEST]) for model in models()]


@lru_cache(maxsize=1)
def _coding() -> tuple[Array, Array]:
    """Frequencies and starts, uint32 (64 * 64,), of symbol s of model k at ``64 k + s``."""
    return (
        np.concatenate([model.frequencies for model in models()]),
        np.concatenate([model.starts for model in models()]),
    )


def keys(symbols: Array, which: Array) -> Array:
    """Return ``64 k + s``, uint16, of symbols under their models: where they stand in tables of all models."""
    return np.asarray(np.uint16(SYMBOLS) * which + symbols)


def encode(symbols: Array, runs: Runs) -> bytes:
    """Return the bytes of `symbols`, uint8 (n,), in `runs`: the final states, 4 bytes each, and words of 2 bytes,
    little-endian. Every symbol must have a frequency in its model."""
    lanes, which = runs.lanes, runs.which
    if not lanes:
        return b""
    loops = jit.load("rans", _SAVED * len(symbols), exact=True)
    if loops is None:
        states, words = (_encode_singly if lanes <= _FEW_LANES else _encode_at_once)(symbols, which, lanes)
        words = words[::-1]
    else:
        states = np.full(lanes, _START, np.uint32)
        room = np.empty(len(symbols), np.uint16)
        words = room[loops.encode(symbols, which, *_coding(), states, room) :]
    return states.astype("<u4").tobytes() + words.astype("<u2").tobytes()


def _encode_at_once(symbols: Array, which: Array, lanes: int) -> tuple[Array, Array]:
    """The final states, and the words from the last on."""
    all_frequencies, all_starts = _coding()
    states = np.full(lanes, _START, np.uint32)
    words: list[Array] = [np.zeros(0, np.uint32)]
    for first in range((len(symbols) - 1) // _CHUNK * _CHUNK, -1, -_CHUNK):
        key = keys(symbols[first : first + _CHUNK], which[first : first + _CHUNK])
        frequencies, starts = all_frequencies[key], all_starts[key]
        for at in range((len(key) - 1) // lanes * lanes, -1, -lanes):
            f = frequencies[at : at + lanes]
            x = states[: len(f)]
            full = np.flatnonzero(x >> TOTAL_BITS >= f)
            if full.size:
                words.append(x[full[::-1]] & 0xFFFF)
                x[full] >>= 16
            x += x // f * (TOTAL - f) + starts[at : at + lanes]
    return states, np.concatenate(words)


def _encode_singly(symbols: Array, which: Array, lanes: int) -> tuple[Array, Array]:
    """The same, symbol by symbol."""
    all_frequencies, all_starts = (table.tolist() for table in _coding())
    states = [_START] * lanes
    words: list[int] = []
    for first in range((len(symbols) - 1) // _CHUNK * _CHUNK, -1, -_CHUNK):
        key = keys(symbols[first : first + _CHUNK], which[first : first + _CHUNK]).tolist()
        for at in range(len(key) - 1, -1, -1):
            f, x = all_frequencies[key[at]], states[at % lanes]
            if x >> TOTAL_BITS >= f:
                words.append(x & 0xFFFF)
                x >>= 16
            states[at % lanes] = x + x // f * (TOTAL - f) + all_starts[key[at]]
    return np.array(states, np.uint32), np.array(words, np.uint32)


# --- from bytes -----------------------------------------------------------------------------------------------------


def decode(data: bytes, runs: Runs) -> tuple[Array, int]:
    """Return the symbols, uint8 (n,), of bytes that begin with what `encode` made of symbols in `runs`, and how many
    bytes that is. Raise E-CANON for bytes that it never makes."""
    lanes = runs.lanes
    if len(data) < 4 * lanes:
        raise CanonicalError(_ENDS_EARLY)
    states = np.frombuffer(data, "<u4", lanes).astype(np.uint32)
    words = np.frombuffer(data, "<u2", (len(data) - 4 * lanes) // 2, 4 * lanes)
    if (states < _START).any():
        raise CanonicalError("a coded tensor begins with a state that is too small")
    symbols = np.empty(runs.total, np.uint8)
    taken, loops = 0, jit.load("rans", _SAVED * runs.total, exact=True)
    if lanes and loops is not None:
        tops, slot_symbols, _ = _tables(runs.counts)
        ends = np.cumsum(runs.lengths)
        taken = loops.decode(words, (runs.models, ends, tops), slot_symbols, _packed(), states, symbols)
        if taken < 0:
            raise CanonicalError(_ENDS_EARLY)
    elif lanes:
        decode_lanes = _decode_singly if lanes <= _FEW_LANES else _decode_at_once
        states, taken = decode_lanes(states, words, runs, symbols)
    if (states != _START).any():
        raise CanonicalError("a coded tensor does not end where its numbers do")
    return symbols, 4 * lanes + 2 * taken


@lru_cache(maxsize=1)
def _packed() -> Array:
    """Of every symbol of every model ``frequency 2^16 + start``, uint32 (64 * 64,)."""
    frequencies, starts = _coding()
    return np.asarray(frequencies << 16 | starts)


@lru_cache(maxsize=COUNT)
def _slots(k: int) -> tuple[Array, Array]:
    """Of the 2^16 slots of model k their symbols, uint8, and ``frequency 2^16 + slot - start``, uint32."""
    model = models()[k]
    symbols = np.repeat(np.arange(SYMBOLS, dtype=np.uint8), model.frequencies)
    return symbols, (model.frequencies[symbols] << 16) + np.arange(TOTAL, dtype=np.uint32) - model.starts[symbols]


def _tables(counts: list[int]) -> tuple[Array, Array, Array]:
    """The first slot of each model, int64 (64,), and the symbols and steps of all slots, of used models."""
    used = np.flatnonzero(counts)
    tops = np.zeros(COUNT, np.int64)
    tops[used] = np.arange(len(used)) << TOTAL_BITS
    symbols, steps = (np.concatenate(parts) for parts in zip(*(_slots(int(k)) for k in used), strict=True))
    return tops, symbols, steps


def _decode_at_once(states: Array, words: Array, runs: Runs, symbols: Array) -> tuple[Array, int]:
    """The first states and how many words are taken; fills `symbols`."""
    lanes, taken, which = len(states), 0, runs.which
    tops, slot_symbols, steps = _tables(runs.counts)
    for first in range(0, len(which), _CHUNK):
        slots = tops[which[first : first + _CHUNK]]
        for at in range(0, len(slots), lanes):
            slot = slots[at : at + lanes]
            x = states[: len(slot)]
            slot += x & 0xFFFF
            step = steps[slot]
            x >>= TOTAL_BITS
            x *= step >> 16
            x += step & 0xFFFF
            low = np.flatnonzero(x < _START)
            if low.size:
                more = words[taken : taken + low.size]
                if more.size < low.size:
                    raise CanonicalError(_ENDS_EARLY)
                x[low] = x[low] << 16 | more
                taken += low.size
        symbols[first : first + _CHUNK] = slot_symbols[slots]
    return states, taken


def _decode_singly(states: Array, words: Array, runs: Runs, symbols: Array) -> tuple[Array, int]:
    """The same, symbol by symbol."""
    current, lanes, taken, which = states.tolist(), len(states), 0, runs.which
    views = [tuple(table.data for table in _slots(k)) if n else () for k, n in enumerate(runs.counts)]
    more = words.astype(np.uint16).data
    for first in range(0, len(which), _CHUNK):
        chunk: list[int] = []
        for at, k in enumerate(which[first : first + _CHUNK].tolist()):
            x = current[at % lanes]
            slot_symbols, steps = views[k]
            slot = x & 0xFFFF
            step = steps[slot]
            chunk.append(slot_symbols[slot])
            x = (step >> 16) * (x >> TOTAL_BITS) + (step & 0xFFFF)
            if x < _START:
                if taken == len(more):
                    raise CanonicalError(_ENDS_EARLY)
                x = x << 16 | more[taken]
                taken += 1
            current[at % lanes] = x
        symbols[first : first + _CHUNK] = chunk
    return np.array(current, np.uint32), taken
