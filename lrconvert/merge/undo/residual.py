"""Undo codes: what of a block of weights a merge lost, in few bytes. Normative text: ``formats/undo-v1.md``.

Subtracting is not an inverse: in half precision some 7 % of the weights come back wrong, nearly all by one unit in the
last place. So the correctly rounded ``M - update`` serves as a prediction P of the base's W, and the record holds how
many representable numbers lie between the two. Rounding M has moved the sum by at most half a unit of M: where numbers
lie no denser around P than around M, this is half a unit of P, too, and W is P. So only the others are coded, where the
exponent of P is below that of M: a tenth of the weights, or a hundredth if the update is small, at two bits each with a
Huffman code over those. Ties and powers of two make a few exceptions, whose positions are listed. Where there is no
exact prediction, the XOR of the bit patterns is held.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import UndoError
from lrconvert.io.durable import Buffer
from lrconvert.merge.arithmetic.rounding import bits
from lrconvert.merge.undo.record import RESIDUAL, UNCERTAIN

_ESCAPE = 3  # of two bits; the others are these steps
_STEPS = np.array([0, 1, -1, 0], np.int8)
_LENGTHS = np.dtype("<u8")
_POSITIONS = np.dtype("<u4")
_CHUNK = 1 << 16  # elements that are compared at a time: they stay in the cache of a core
_MOST_STRAYS = 32  # one in so many: more cost more than a code of all elements
_EXPONENTS = {"<u2": 0x7F80, "<f2": 0x7C00, "<f4": 0xFF << 23, "<f8": 0x7FF << 52}


def encode(base: Array, predicted: Array, merged: Array, loops: Any = None) -> tuple[bytes, int]:
    """Return the code that turns `predicted` into `base`, and its mode, see `encode_uncertain`.

    `loops`, if not None, are `lrconvert.kernels.merging`, which give the same bytes.
    """
    data = encode_uncertain(base, predicted, merged, loops)
    return (encode_residual(base, predicted), RESIDUAL) if data is None else (data, UNCERTAIN)


def decode(data: bytes, mode: int, predicted: Array, merged: Array, loops: Any = None) -> Array:
    """Return the bits that `encode` was given as `base`; they may be `predicted`, changed. Raises E-UNDO for data that
    no encoder wrote."""
    return decode_residual(data, predicted) if mode == RESIDUAL else decode_uncertain(data, predicted, merged, loops)


def encode_uncertain(base: Array, predicted: Array, merged: Array, loops: Any = None) -> bytes | None:
    """Return the code that turns `predicted` into `base` with the help of `merged`, which both lead to: flat arrays of
    stored bits of one dtype. None if it would be longer than that of `encode_residual`."""
    if loops is not None and _suit(base, predicted, merged):
        chosen, stray = _compare_compiled(base, predicted, merged, loops)
    else:
        chosen, stray = _compare(base, predicted, merged)
    if stray.size > base.size // _MOST_STRAYS:
        return None
    positions = _deflate(np.diff(stray, prepend=0).astype(_POSITIONS).tobytes(), zlib.Z_DEFAULT_STRATEGY)
    head = np.array([stray.size, len(positions)], _LENGTHS).tobytes()
    return head + positions + _encode_steps(np.concatenate((chosen, _steps(base[stray], predicted[stray]))))


def _compare(base: Array, predicted: Array, merged: Array) -> tuple[Array, Array]:
    """Return the steps of what is uncertain, and the positions of all else that `predicted` misses, or of too many."""
    chosen: list[Array] = []
    strays: list[Array] = []
    compare = _Comparison(predicted.dtype)
    for start in range(0, base.size, _CHUNK):
        own, guess = base[start : start + _CHUNK], predicted[start : start + _CHUNK]
        uncertain = compare.uncertain(guess, merged[start : start + _CHUNK])
        index = np.flatnonzero(uncertain)
        chosen.append(_steps(own[index], guess[index]))
        stray = compare.strays(own, guess, uncertain)
        if stray.any():
            strays.append(np.flatnonzero(stray) + start)
    nothing = np.empty(0, np.intp)
    return np.concatenate(chosen) if chosen else _steps(base, predicted), np.concatenate((nothing, *strays))


def _compare_compiled(base: Array, predicted: Array, merged: Array, loops: Any) -> tuple[Array, Array]:
    steps, strays = np.empty(base.size + 1, np.uint16), np.empty(base.size // _MOST_STRAYS + 1, np.uint32)
    chosen, stray = loops.compare(*map(bits, (base, predicted, merged)), _mask(base), steps, strays, _scratch(3))
    return steps[:chosen], strays[:stray].astype(np.intp)


def _scratch(rows: int) -> Array:
    """Scratch of compiled loops for the places that they look at together: in the cache of a core."""
    return np.empty((rows, 1 << 11), np.uint16)


def _suit(*sides: Array) -> bool:
    """Return whether the compiled loops take these arrays."""
    return all(side.itemsize == 2 and side.flags.carray for side in sides)


def decode_uncertain(data: bytes, predicted: Array, merged: Array, loops: Any = None) -> Array:
    """Change `predicted` to the bits that `encode_uncertain` was given as `base`, and return it. Raises E-UNDO for data
    that no encoder wrote."""
    head = 2 * _LENGTHS.itemsize
    count, length = (int(n) for n in np.frombuffer(data[:head].ljust(head, b"\0"), _LENGTHS))
    if count > predicted.size or head + length > len(data):
        raise UndoError("the exceptions of a residual are more than its block has")
    steps = np.frombuffer(_inflate(data[head : head + length], count * _POSITIONS.itemsize), _POSITIONS)
    stray = np.cumsum(steps, dtype=np.int64)
    is_inside = not count or (steps[1:].all() and stray[-1] < predicted.size)
    if not is_inside or _Comparison(predicted.dtype, count).uncertain(predicted[stray], merged[stray]).any():
        raise UndoError("the exceptions of a residual do not lie where some may be")
    if loops is not None and _suit(predicted, merged):
        return _restore_compiled(data[head + length :], predicted, merged, stray, loops)
    chunks = [slice(start, start + _CHUNK) for start in range(0, predicted.size, _CHUNK)]
    compare = _Comparison(predicted.dtype)
    places = [np.flatnonzero(compare.uncertain(predicted[chunk], merged[chunk])) for chunk in chunks]
    guesses = [predicted[chunk][index] for chunk, index in zip(chunks, places, strict=True)]
    restored = decode_residual(data[head + length :], np.concatenate((*guesses, predicted[stray])))
    end = 0
    for chunk, index in zip(chunks, places, strict=True):
        predicted[chunk][index] = restored[end : end + index.size]
        end += index.size
    predicted[stray] = restored[end:]
    return predicted


def _restore_compiled(data: bytes, predicted: Array, merged: Array, stray: Array, loops: Any) -> Array:
    guess, goal, mask = bits(predicted), bits(merged), _mask(predicted)
    count = loops.count_lower(guess, goal, mask)
    steps = _decode_steps(data, count + stray.size, guess.dtype)
    restored = _unordered(_ordered(guess[stray]) + steps[count:])
    loops.restore(guess, goal, mask, np.append(steps, guess.dtype.type(0)), _scratch(2))
    guess[stray] = restored
    return predicted


def _mask(stored: Array) -> Any:
    """Return the bits of the exponent."""
    return _unsigned(stored).type(_EXPONENTS[stored.dtype.str])


class _Comparison:
    """Compares up to `size` stored bits at a time in buffers of its own."""

    def __init__(self, kind: np.dtype[Any], size: int = _CHUNK) -> None:
        unsigned = np.dtype(f"<u{kind.itemsize}")
        self.mask = _mask(np.empty(0, kind))
        self.one, self.other = np.empty(size, unsigned), np.empty(size, unsigned)
        self.flag, self.differ = np.empty(size, np.bool_), np.empty(size, np.bool_)

    def uncertain(self, predicted: Array, merged: Array) -> Array:
        """Return where the exponent of `predicted` is below that of `merged`, until the next call."""
        n = predicted.size
        one = np.bitwise_and(bits(predicted), self.mask, out=self.one[:n])
        other = np.bitwise_and(bits(merged), self.mask, out=self.other[:n])
        lower: Array = np.less(one, other, out=self.flag[:n])
        return lower

    def strays(self, base: Array, predicted: Array, uncertain: Array) -> Array:
        """Return where `base` is not `predicted` although that is not uncertain, until the next call."""
        differ = np.not_equal(bits(base), bits(predicted), out=self.differ[: base.size])
        return np.greater(differ, uncertain, out=differ)


def encode_residual(base: Array, predicted: Array) -> bytes:
    """Return the code that turns `predicted` into `base`: flat arrays of stored bits of one dtype."""
    return _encode_steps(_steps(base, predicted))


def _steps(base: Array, predicted: Array) -> Array:
    """Return how many numbers there are from `predicted` to `base`, modulo the size of the dtype."""
    steps: Array = _ordered(base) - _ordered(predicted)
    return steps


def _encode_steps(steps: Array) -> bytes:
    signed = steps.view(_signed(steps))
    symbols = np.zeros(-(-steps.size // 4) * 4, np.uint8)
    used = symbols[: steps.size]
    np.copyto(used, steps & steps.dtype.type(3), casting="unsafe")
    used -= used >> 1  # -1 is 3 in two bits
    escaped = np.flatnonzero(steps + steps.dtype.type(1) > 2)
    used[escaped] = _ESCAPE
    far = signed[escaped]
    short = np.clip(far, -127, 127).astype(np.int8)
    short[short != far] = -128
    parts = [_deflate(_pack(symbols)), _deflate(short.tobytes()), _deflate(far[short == -128].tobytes())]
    return np.array([len(part) for part in parts], _LENGTHS).tobytes() + b"".join(parts)


def decode_residual(data: bytes, predicted: Array) -> Array:
    """Return the bits that `encode_residual` was given as `base`. Raises E-UNDO for data that no encoder wrote."""
    steps = _decode_steps(data, predicted.size, _unsigned(predicted))
    return _unordered(_ordered(predicted) + steps).view(predicted.dtype)


def _decode_steps(data: bytes, count: int, kind: np.dtype[Any]) -> Array:
    """Return so many steps, unsigned. Raises E-UNDO."""
    head = 3 * _LENGTHS.itemsize
    lengths = [int(n) for n in np.frombuffer(data[:head].ljust(head, b"\0"), _LENGTHS)]
    if head + sum(lengths) != len(data):
        raise UndoError("the lengths of a residual do not add up")
    cuts = [head, head + lengths[0], head + lengths[0] + lengths[1], len(data)]
    symbols = _unpack(_inflate(data[cuts[0] : cuts[1]], -(-count // 4)))[:count]
    escaped = np.flatnonzero(symbols == _ESCAPE)
    far = np.frombuffer(_inflate(data[cuts[1] : cuts[2]], escaped.size), np.int8).astype(f"<i{kind.itemsize}")
    wide = far == -128
    far[wide] = np.frombuffer(_inflate(data[cuts[2] : cuts[3]], int(np.count_nonzero(wide)) * far.itemsize), far.dtype)
    steps = _STEPS[symbols].astype(far.dtype)
    steps[escaped] = far
    return steps.view(kind)


def encode_xor(base: Array, present: Array) -> bytes:
    """Return the XOR of two flat arrays of stored bits, byte planes apart, deflated."""
    return _deflate(_planes(bits(base) ^ bits(present)))


def decode_xor(data: bytes, present: Array) -> Array:
    """Return the bits that `encode_xor` was given as `base`. Raises E-UNDO."""
    size = present.dtype.itemsize
    planes = np.frombuffer(_inflate(data, present.size * size), np.uint8).reshape(size, -1)
    mask = np.ascontiguousarray(planes.T).view(_unsigned(present)).reshape(-1)
    return (bits(present) ^ mask).view(present.dtype)


def encode_bytes(data: Buffer) -> bytes:
    """Return the code that holds bytes."""
    return zlib.compress(data, 1)


def decode_bytes(data: bytes, nbytes: int) -> bytes:
    """Return the bytes that `encode_bytes` was given. Raises E-UNDO."""
    return _inflate(data, nbytes, wrapped=True)


# --- small things ---------------------------------------------------------------------------------------------------


def _unsigned(stored: Array) -> np.dtype[np.unsignedinteger]:
    return np.dtype(f"<u{stored.dtype.itemsize}")


def _signed(stored: Array) -> np.dtype[np.signedinteger]:
    return np.dtype(f"<i{stored.dtype.itemsize}")


def _ordered(stored: Array) -> Array:
    """Return the bits as integers in the order of the numbers: neighbours differ by one, -0 and +0 too."""
    codes = bits(stored)
    order: Array = codes ^ (_spread_sign(codes) | _top(codes))
    return order


def _unordered(order: Array) -> Array:
    codes: Array = order ^ (~_spread_sign(order) | _top(order))
    return codes


def _top(codes: Array) -> Any:
    """Return the highest bit, in the type of `codes`."""
    return codes.dtype.type(1 << (8 * codes.itemsize - 1))


def _spread_sign(codes: Array) -> Array:
    """Return all bits set where the highest one is."""
    signs: Array = codes.view(_signed(codes)) >> (8 * codes.itemsize - 1)
    return signs.view(codes.dtype)


def _pack(symbols: Array) -> bytes:
    """Return four two-bit symbols a byte, the first lowest."""
    quads = symbols.view("<u4")
    packed: Array = quads | quads >> 6 | quads >> 12 | quads >> 18
    return packed.astype(np.uint8).tobytes()


def _unpack(data: bytes) -> Array:
    packed = np.frombuffer(data, np.uint8).astype("<u4")
    quads: Array = (packed | packed << 6 | packed << 12 | packed << 18) & np.uint32(0x03030303)
    return quads.view(np.uint8)


def _planes(codes: Array) -> bytes:
    return np.ascontiguousarray(codes.view(np.uint8).reshape(-1, codes.dtype.itemsize).T).tobytes()


def _deflate(data: bytes, strategy: int = zlib.Z_HUFFMAN_ONLY) -> bytes:
    """Compress by raw deflate, as a rule without the search for repeats: there are none, and it is twice as fast."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -15, 9, strategy)
    return packer.compress(data) + packer.flush()


def _inflate(data: bytes, nbytes: int, *, wrapped: bool = False) -> bytes:
    """Return exactly `nbytes`, never more in memory. Raises E-UNDO."""
    unpacker = zlib.decompressobj(15 if wrapped else -15)
    try:
        out = unpacker.decompress(data, nbytes + 1)
    except zlib.error as error:
        raise UndoError(f"compressed data of the record is damaged: {error}") from None
    if len(out) != nbytes or not unpacker.eof or unpacker.unused_data:
        raise UndoError("compressed data of the record has another length than its block")
    return out
