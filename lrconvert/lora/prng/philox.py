"""Philox4x32-10 on numpy: the reference that every other implementation is compared with.

Everything here is integers, and nothing is checked. A word of the state is kept in 64 bits, so that the product of two
32-bit numbers is exact. Work is cut into tiles that stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Key = tuple[int, int]

M0, M1 = 0xD2511F53, 0xCD9E8D57  # multipliers of words 0 and 2
W0, W1 = 0x9E3779B9, 0xBB67AE85  # what the key words grow by between rounds
ROUNDS = 10
MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Tile:
    """A part of a (bases, elements) array: blocks `first` to ``first + blocks`` of the bases `rows`. Of their elements,
    `lanes` go to the columns `out` of the array."""

    rows: slice
    first: int
    blocks: int
    lanes: slice
    out: slice


def tiles(bases: int, start: int, count: int, lanes: int, size: int) -> Iterator[Tile]:
    """Cut elements `start` to ``start + count`` of so many bases, at `lanes` elements a block, into tiles of at most
    `size` blocks."""
    if not bases or not count:
        return
    begin, end = start // lanes, (start + count - 1) // lanes + 1
    wide = min(end - begin, size)
    high = min(bases, max(1, size // wide))
    for top in range(0, bases, high):
        for first in range(begin, end, wide):
            blocks = min(wide, end - first)
            low, stop = max(start, first * lanes), min(start + count, (first + blocks) * lanes)
            yield Tile(
                rows=slice(top, min(top + high, bases)),
                first=first,
                blocks=blocks,
                lanes=slice(low - first * lanes, stop - first * lanes),
                out=slice(low - start, stop - start),
            )


def round_keys(key: Key) -> tuple[Key, ...]:
    """Return the keys of the ten rounds."""
    return tuple(((key[0] + n * W0) & MASK, (key[1] + n * W1) & MASK) for n in range(ROUNDS))


def block(counters: npt.ArrayLike, key: Key) -> U32:
    """Return the uint32 words (n, 4) of counters (n, 4) below 2^32 and two key words: the block function."""
    state = np.array(counters, np.uint64).T.copy()
    return _rounds(state, key).T.astype(np.uint32)


def words(key: Key, sid: int, bases: U32, first: int, blocks: int) -> U32:
    """Return the words of blocks `first` to ``first + blocks`` of every basis in `bases`: uint32 (len(bases), blocks,
    4)."""
    state = np.empty((4, len(bases), blocks), np.uint64)
    state[0] = np.arange(first, first + blocks, dtype=np.uint64)
    state[1] = bases[:, None]
    state[2] = sid & MASK
    state[3] = sid >> 32
    return np.ascontiguousarray(np.moveaxis(_rounds(state, key), 0, -1), np.uint32)


def codes(words: U32, bits: int) -> npt.NDArray[Any]:
    """Return the codes of words (n, blocks, 4), in the order of the elements: uint8 or uint32 (n, blocks * lanes).

    `bits` 8: the bytes, 1: the bits, both from the least significant on; 24: the upper 24 bits.
    """
    if bits == 24:
        return words.reshape(len(words), -1) >> np.uint32(8)
    octets: U8 = words.astype(np.dtype("<u4"), copy=False).reshape(len(words), -1).view(np.uint8)
    return octets if bits == 8 else np.unpackbits(octets, axis=1, bitorder="little")


def _rounds(x: U64, key: Key) -> U64:
    """Ten rounds on the state (4, ...), in place."""
    mask, half = np.uint64(MASK), np.uint64(32)
    p, q = np.empty_like(x[0]), np.empty_like(x[0])
    for k0, k1 in round_keys(key):
        np.multiply(x[0], np.uint64(M0), out=p)
        np.multiply(x[2], np.uint64(M1), out=q)
        np.right_shift(q, half, out=x[0])
        x[0] ^= x[1]
        x[0] ^= np.uint64(k0)
        np.right_shift(p, half, out=x[2])
        x[2] ^= x[3]
        x[2] ^= np.uint64(k1)
        np.bitwise_and(q, mask, out=x[1])
        np.bitwise_and(p, mask, out=x[3])
    return x
