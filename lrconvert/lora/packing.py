"""Declared tensors as bytes and as numbers: bit-packing, 16-bit payload, scale search.

Five kinds of payload (normative text: ``formats/lrconvert-v1.md``, "Payload"; ``formats/coded-v1.md``):

``code``   q-bit codes c of a real tensor that is scaled elsewhere; the number is the odd integer ``2c + 1 - 2^q``
           (1 bit: a sign). q is 1, 2, 3, 4 or 8.
``index``  unsigned integers below `limit`, in ``ceil(log2 limit)`` bits (at least 1).
``half``   fp16 times one power of two per tensor: finer than bf16, and no range to fall out of.
``single`` float32, for what comes from elsewhere and must not change.
``coded``  integers q of rows with a model each, entropy-coded; the number is ``16 q - sign(q)``, sixteenths of a step.

Codes and indices are packed without gaps, least significant bit first, and the bits that fill the last byte are zero.
In memory they are plain numpy arrays: ``uint8`` codes, ``uint32`` indices, ``float32`` halves and singles, ``int32``
coded integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lrconvert.core.dtypes import F32, F64, Array
from lrconvert.core.errors import CanonicalError, IndexRangeError, ShapeError, ValueRangeError
from lrconvert.lora.coded import stream

CODE_BITS = (1, 2, 3, 4, 8)
EXPONENT_RANGE = (-96, 96)  # keeps every half an exact float32, subnormals included
_CHUNK = 1 << 20  # values packed at once; a multiple of 8, so that chunks meet at byte borders
_CACHED = 1 << 16  # values that stay in a cache between two operations

Kind = Literal["code", "index", "half", "single", "coded"]
_DTYPES: dict[Kind, str] = {"code": "U8", "index": "U8", "half": "F16", "single": "F32", "coded": "U8"}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a method stores. `bits` counts for codes, `limit` (exclusive) for indices; `rows` and `length`,
    the bytes of the stream, for coded integers."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    bits: int = 16
    limit: int = 0
    rows: stream.Rows = ()
    length: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bits of one stored value."""
        return index_bits(self.limit) if self.kind == "index" else self.bits

    @property
    def nbytes(self) -> int:
        if self.kind == "coded":
            return self.length
        return (self.numel * self.width + 7) // 8

    @property
    def dtype(self) -> str:
        """Safetensors dtype in the file."""
        return _DTYPES[self.kind]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return (self.nbytes,) if self.dtype == "U8" else (self.numel,)


def code(name: str, shape: tuple[int, ...], bits: int) -> TensorSpec:
    return TensorSpec(name, "code", shape, bits=bits)


def index(name: str, shape: tuple[int, ...], limit: int) -> TensorSpec:
    return TensorSpec(name, "index", shape, limit=limit)


def half(name: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, "half", shape)


def single(name: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, "single", shape, bits=32)


def coded(name: str, rows: stream.Rows, length: int) -> TensorSpec:
    return TensorSpec(name, "coded", (sum(n for _, n in rows),), rows=rows, length=length)


def index_bits(limit: int) -> int:
    """Return the bits of an index below `limit`: ceil(log2 limit), at least 1."""
    return max(1, (limit - 1).bit_length())


# --- bits -----------------------------------------------------------------------------------------------------------


def pack_bits(values: Array, bits: int) -> Array:
    """Return unsigned integers (any shape, below 2^bits) as bytes, uint8 (ceil(n bits / 8),), lowest bit first."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if bits == 8:
        return flat.astype(np.uint8)
    shifts = np.arange(bits, dtype=np.uint32)
    packed = [
        np.packbits(
            ((flat[start : start + _CHUNK, None].astype(np.uint32) >> shifts) & 1).astype(np.uint8), bitorder="little"
        )
        for start in range(0, flat.size, _CHUNK)
    ]
    return np.concatenate(packed) if packed else np.zeros(0, np.uint8)


def unpack_bits(data: Array, bits: int, count: int) -> Array:
    """Invert `pack_bits`: return `count` values, uint8 up to 8 bits, else uint32. Raises E-CANON on set fill bits."""
    dtype = np.uint8 if bits <= 8 else np.uint32
    fill = data.size * 8 - count * bits
    if fill and int(data[-1]) >> (8 - fill):
        raise CanonicalError("the bits that fill the last byte of a packed tensor are not zero")
    if bits == 8:
        return data[:count].astype(np.uint8)
    weights = (1 << np.arange(bits, dtype=np.uint32)).astype(np.float32 if bits <= 24 else np.float64)
    out = np.empty(count, dtype)
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        chunk = np.unpackbits(
            data[start * bits // 8 : (stop * bits + 7) // 8], bitorder="little", count=(stop - start) * bits
        )
        out[start:stop] = chunk.reshape(-1, bits).astype(weights.dtype) @ weights
    return out


# --- sixteen bits ---------------------------------------------------------------------------------------------------


def half_exponent(values: Array) -> int:
    """Return the power of two e for which ``values / 2^e`` uses fp16's range best: the largest magnitude, once rounded
    to 11 bits, lies in [2^14, 2^15). 0 for all-zero values."""
    largest = float(np.max(np.abs(values), initial=0.0))
    if largest == 0.0:
        return 0
    mantissa, exponent = math.frexp(largest)
    if round(mantissa * 2048) == 2048:
        exponent += 1
    return min(max(exponent - 15, EXPONENT_RANGE[0]), EXPONENT_RANGE[1])


def encode_half(values: Array) -> tuple[Array, int]:
    """Return (fp16 array, exponent) nearest to `values`; the exponent is 0 if all of them become zero.

    Raises E-VALUE for NaN, infinity or a magnitude that rounds to 2^112 or more.
    """
    if not np.isfinite(values).all():
        raise ValueRangeError("a 16-bit payload value is NaN or infinite")
    exponent = half_exponent(values)
    with np.errstate(over="ignore", under="ignore"):
        stored = np.ldexp(np.asarray(values, np.float64), -exponent).astype("<f2")
    if not np.isfinite(stored).all():
        raise ValueRangeError("a 16-bit payload value is too large")
    if not stored.any():
        exponent = 0
    return stored + np.float16(0), exponent  # -0 becomes +0: one spelling of zero


def decode_half(stored: Array, exponent: int) -> F32:
    """Return fp16 times 2^exponent as float32; exact."""
    return np.ldexp(stored.astype(np.float32), np.int32(exponent)).astype(np.float32)


def round_half(values: Array) -> F32:
    """Return `values` as a ``half`` tensor will hold them. Idempotent."""
    return decode_half(*encode_half(values))


# --- encoding by spec -----------------------------------------------------------------------------------------------


def encode(spec: TensorSpec, array: Array) -> tuple[Array, int]:
    """Return (stored array, exponent) of an in-memory tensor; the exponent is 0 except for halves.

    Raises E-SHAPE if the array is not of the declared shape, E-INDEX or E-VALUE if it holds what `decode` would not
    give back.
    """
    if array.shape != spec.shape:
        raise ShapeError(f"tensor {spec.name} has shape {list(array.shape)}, its method declares {list(spec.shape)}")
    if spec.kind == "half":
        stored, exponent = encode_half(array)
        if not np.array_equal(decode_half(stored, exponent), array):
            what = f"tensor {spec.name} holds numbers that 16 bits cannot"
            raise ValueRangeError(what, fix="round them with packing.round_half")
        return stored.reshape(-1), exponent
    if spec.kind == "single":
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise ValueRangeError(f"tensor {spec.name} is {array.dtype} or holds NaN or infinity; float32 is stored")
        return (array + np.float32(0)).reshape(-1), 0  # -0 becomes +0: one spelling of zero
    if spec.kind == "coded":
        if array.dtype != np.int32:
            raise ValueRangeError(f"tensor {spec.name} is {array.dtype}; int32 is stored")
        data = np.frombuffer(stream.encode(array, spec.rows), np.uint8)
        if data.size != spec.length:
            raise ShapeError(f"tensor {spec.name} takes {data.size} bytes, its method declares {spec.length}")
        return data, 0
    limit = spec.limit if spec.kind == "index" else 1 << spec.bits
    if array.dtype.kind != "u":
        raise IndexRangeError(f"tensor {spec.name} is {array.dtype}; unsigned integers are stored")
    if array.size and int(array.max()) >= limit:
        raise IndexRangeError(f"tensor {spec.name} holds {int(array.max())}; values below {limit} are allowed")
    return pack_bits(array, spec.width), 0


def decode(spec: TensorSpec, stored: Array, exponent: int) -> Array:
    """Invert `encode`. Raise E-CANON, E-INDEX or E-VALUE on contents that `encode` never writes."""
    if spec.dtype != "U8":
        if not np.isfinite(stored).all():
            raise ValueRangeError(f"tensor {spec.name} holds NaN or infinity")
        if np.any((stored == 0) & np.signbit(stored)):
            raise CanonicalError(f"tensor {spec.name} holds a negative zero")
        if spec.kind == "single":
            return stored.astype(np.float32).reshape(spec.shape)
        values = decode_half(stored, exponent).reshape(spec.shape)
        if half_exponent(values) != exponent:
            raise CanonicalError(f"tensor {spec.name} does not use the exponent that its values call for")
        return values
    if spec.kind == "coded":
        return stream.decode(stored.tobytes(), spec.rows)
    values = unpack_bits(stored, spec.width, spec.numel).reshape(spec.shape)
    if spec.kind == "index":
        values = values.astype(np.uint32)
        if values.size and int(values.max()) >= spec.limit:
            raise IndexRangeError(
                f"tensor {spec.name} holds {int(values.max())}; values below {spec.limit} are allowed"
            )
    return values


def code_values(codes: Array, bits: int) -> F32:
    """Return the odd integers of codes, ``2c + 1 - 2^bits``, float32; exact."""
    return codes.astype(np.float32) * np.float32(2) + np.float32(1 - (1 << bits))


def odd_integers(codes: Array, bits: int) -> Array:
    """Return the same in the narrowest integers, int8 or int16: a form of one bit is large when it is widened."""
    kind: Any = np.int8 if bits < 8 else np.int16
    twice = np.left_shift(codes.astype(kind), 1)
    return np.asarray(twice + kind(1 - (1 << bits)))  # where the first wraps, the second wraps back


def coded_values(integers: Array) -> F32:
    """Return the numbers of coded integers in sixteenths of a step, ``16 q - sign(q)``, float32; exact below 2^20. What
    was rounded to q lies nearer to zero in the mean."""
    values = integers.astype(np.float32, order="C")
    flat = values.reshape(-1)
    for start in range(0, flat.size, _CACHED):
        part = flat[start : start + _CACHED]
        signs = np.clip(part, -1, 1)
        part *= np.float32(16)
        part -= signs
    return values


@dataclass(frozen=True, eq=False)
class CodedNumbers:
    """The `coded_values` of integers (n,), made of a slice of them when it is taken: all at once leave the cache."""

    integers: Array

    def __getitem__(self, part: slice) -> F32:
        return coded_values(self.integers[part])


# --- choosing scales ------------------------------------------------------------------------------------------------


def quantize_rows(rows: Array, bits: int, weights: Array | None = None) -> tuple[Array, F32]:
    """Return codes and scales that minimize the squared error of each row: ``row ~ scale * (2c + 1 - 2^bits)``.

    `rows` is (n, d); returns uint8 codes (n, d), at 16 bits uint32, and float32 scales (n,). `weights`, (d,) or (n, d),
    say how much the squared error of each number counts. One bit has the closed form (the mean magnitude); more bits
    take the best of a grid of clipping points, polished by alternating codes and scale; at 16 bits the largest
    magnitude sets the scale. A zero row gets scale 0.
    """
    if bits == 16:
        wide = np.asarray(rows, np.float64)
        scales = (np.abs(wide).max(axis=1) / 65535).astype(np.float32)
        return nearest_codes(wide, scales, bits), scales
    x = np.asarray(rows, np.float32)
    w = np.broadcast_to(np.float32(1) if weights is None else np.asarray(weights, np.float32), x.shape)
    if bits == 1:
        total = np.maximum(w.sum(axis=1, dtype=np.float64), 1e-300)
        return (x > 0).astype(np.uint8), (_dots(w, np.abs(x)) / total).astype(np.float32)
    levels = 1 << bits
    peak = np.abs(x).max(axis=1)
    energy = _dots(w * x, x)

    def codes_for(scale: F32) -> Array:
        safe = np.where(scale > 0, scale, 1).astype(np.float32)
        c = np.floor(x / (2 * safe[:, None]) + levels // 2)
        return np.asarray(np.clip(c, 0, levels - 1, out=c))

    def solve(scale: F32) -> tuple[F32, Array]:
        """Least-squares scale for the codes of `scale`, and the squared error it reaches."""
        q = codes_for(scale) * 2 + np.float32(1 - levels)
        weighted = q if weights is None else w * q
        dot, square = _dots(x, weighted), np.maximum(_dots(q, weighted), 1e-300)
        return (dot / square).astype(np.float32), energy - dot * dot / square

    grid = np.array([1.0, 0.9, 0.8] if bits == 8 else [1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3], np.float32)
    best = (peak / (levels - 1)).astype(np.float32)
    best_error = np.full(len(x), np.inf)
    for clip in grid:
        scale = (peak * clip / (levels - 1)).astype(np.float32)
        for _ in range(3):
            scale, error = solve(scale)
            better = error < best_error
            best = np.where(better, scale, best)
            best_error = np.where(better, error, best_error)
    best = np.where(peak > 0, np.maximum(best, 0), 0).astype(np.float32)
    return codes_for(best).astype(np.uint8), best


def nearest_codes(rows: Array, scales: Array, bits: int) -> Array:
    """Return the codes c of rows (n, d) for scales (n,): ``row ~ scale * (2c + 1 - 2^bits)``; uint8, at 16 bits
    uint32."""
    safe = np.where(scales > 0, scales, 1).astype(np.float64)
    levels = 1 << bits
    codes = np.clip(np.floor(rows / (2 * safe[:, None]) + levels // 2), 0, levels - 1)
    return codes.astype(np.uint8 if bits <= 8 else np.uint32)


def _dots(x: Array, y: Array) -> F64:
    """Row-wise inner products in float64."""
    return np.asarray(np.einsum("nd,nd->n", x, y, dtype=np.float64), np.float64)
