"""Undo codes: what of a block of weights a merge lost, in few bytes. Normative text: ``formats/undo-v1.md``.

Subtracting is not an inverse: in half precision some 7 % of the weights come back wrong, nearly all by one unit in the
last place. So the correctly rounded ``M - update`` serves as a prediction of the base's W, and the record holds how
many representable numbers lie between the two: two bits each, most of them zero, and a Huffman code over those (3.5 %
of the bytes in bf16). Where there is no exact prediction, the XOR of the bit patterns is held.
"""

from __future__ import annotations

import zlib

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import UndoError
from lrconvert.merge.arithmetic.rounding import bits

_ONE, _MINUS_ONE, _ESCAPE = 1, 2, 3
_LENGTHS = np.dtype("<u8")


def encode_residual(base: Array, predicted: Array) -> bytes:
    """Return the code that turns `predicted` into `base`: flat arrays of stored bits of one dtype."""
    index = np.flatnonzero(bits(base) != bits(predicted))
    steps = (_ordered(base[index]) - _ordered(predicted[index])).view(_signed(base))
    symbols = np.zeros(-(-base.size // 4) * 4, np.uint8)
    symbols[index] = np.select([steps == 1, steps == -1], [_ONE, _MINUS_ONE], _ESCAPE)
    far = steps[np.abs(steps) != 1]
    short = np.clip(far, -127, 127).astype(np.int8)
    short[short != far] = -128
    parts = [_deflate(_pack(symbols)), _deflate(short.tobytes()), _deflate(far[short == -128].tobytes())]
    return np.array([len(part) for part in parts], _LENGTHS).tobytes() + b"".join(parts)


def decode_residual(data: bytes, predicted: Array) -> Array:
    """Return the bits that `encode_residual` was given as `base`. Raises E-UNDO for data that no encoder wrote."""
    head = 3 * _LENGTHS.itemsize
    lengths = [int(n) for n in np.frombuffer(data[:head].ljust(head, b"\0"), _LENGTHS)]
    if head + sum(lengths) != len(data):
        raise UndoError("the lengths of a residual do not add up")
    cuts = [head, head + lengths[0], head + lengths[0] + lengths[1], len(data)]
    symbols = _unpack(_inflate(data[cuts[0] : cuts[1]], -(-predicted.size // 4)))[: predicted.size]
    index = np.flatnonzero(symbols)
    kinds = symbols[index]
    escapes = int(np.count_nonzero(kinds == _ESCAPE))
    far = np.frombuffer(_inflate(data[cuts[1] : cuts[2]], escapes), np.int8).astype(_signed(predicted))
    wide = far == -128
    count = int(np.count_nonzero(wide))
    far[wide] = np.frombuffer(_inflate(data[cuts[2] : cuts[3]], count * far.itemsize), far.dtype)
    steps = np.select([kinds == _ONE, kinds == _MINUS_ONE], [1, -1], 0).astype(far.dtype)
    steps[kinds == _ESCAPE] = far
    out = predicted.copy()
    out[index] = _unordered(_ordered(predicted[index]) + steps.view(_unsigned(predicted))).view(predicted.dtype)
    return out


def encode_xor(base: Array, present: Array) -> bytes:
    """Return the XOR of two flat arrays of stored bits, byte planes apart, deflated."""
    return _deflate(_planes(bits(base) ^ bits(present)))


def decode_xor(data: bytes, present: Array) -> Array:
    """Return the bits that `encode_xor` was given as `base`. Raises E-UNDO."""
    size = present.dtype.itemsize
    planes = np.frombuffer(_inflate(data, present.size * size), np.uint8).reshape(size, -1)
    mask = np.ascontiguousarray(planes.T).view(_unsigned(present)).reshape(-1)
    return (bits(present) ^ mask).view(present.dtype)


def encode_bytes(data: bytes | bytearray) -> bytes:
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
    top = np.array(1 << (8 * stored.dtype.itemsize - 1), codes.dtype)
    return np.where(codes & top, ~codes, codes | top)


def _unordered(order: Array) -> Array:
    top = np.array(1 << (8 * order.dtype.itemsize - 1), order.dtype)
    return np.where(order & top, order ^ top, ~order)


def _pack(symbols: Array) -> bytes:
    """Return four two-bit symbols a byte, the first lowest."""
    quads = symbols.reshape(-1, 4)
    packed: Array = quads[:, 0] | (quads[:, 1] << 2) | (quads[:, 2] << 4) | (quads[:, 3] << 6)
    return packed.tobytes()


def _unpack(data: bytes) -> Array:
    packed = np.frombuffer(data, np.uint8)
    return ((packed[:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3).reshape(-1)


def _planes(codes: Array) -> bytes:
    return np.ascontiguousarray(codes.view(np.uint8).reshape(-1, codes.dtype.itemsize).T).tobytes()


def _deflate(data: bytes) -> bytes:
    """Compress by raw deflate without the search for repeats: there are none, and it is twice as fast."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
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
