"""Seeded bases: numbers that a file names by a seed and a label, and that are the same bits everywhere.

Normative text and known answers: ``formats/prng-v1.md``, ``formats/kat/prng-v1.json``. A `Stream` holds up to 2^32
bases; a basis is a sequence of 32-bit words, or of the numbers that one of the `MAPS` makes of them. An element is
computed from its position alone: every range of elements, of any bases, can be drawn by itself and in any order.

`words`, `numerators` and `values` compute with numpy, `tensor` with torch on any device. Each returns an array of shape
(bases, count) and needs, besides it, a scratch space that does not grow with it. Nothing here uses a generator of
numpy or torch, and nothing is rounded.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from lrconvert.errors import CanonicalError, LimitError, OptionError, ValueRangeError
from lrconvert.limits import OWN
from lrconvert.prng import philox

if TYPE_CHECKING:
    import torch

__all__ = [
    "MAPS",
    "Stream",
    "ValueMap",
    "check_size",
    "numerators",
    "parse_seed",
    "tensor",
    "value_map",
    "values",
    "words",
]

DOMAIN = b"lrconvert/basis/v1\0"
SEEDS = 1 << 64
BASES = 1 << 32  # of a stream
BLOCKS = 1 << 32  # of a basis
_TILE_BLOCKS = 1 << 14  # computed at once: six arrays of 128 KiB, the fastest size by measurement
_TILE_ELEMENTS = 1 << 18  # mapped at once: 1 MiB of float32

Bases = Sequence[int] | npt.NDArray[np.integer[Any]]
Float = Literal["float32", "float64"]


@dataclass(frozen=True)
class ValueMap:
    """How words become numbers: lane i of a word is the code ``c = (word >> shifts[i]) mod 2^bits``, its numerator the
    odd integer ``2c + 1 - 2^bits``, its value the numerator times `unit`, a power of two: exact in float32."""

    name: str
    bits: int
    shifts: tuple[int, ...]
    unit: float

    @property
    def lanes(self) -> int:
        """Elements of a block, which has four words."""
        return 4 * len(self.shifts)

    @property
    def offset(self) -> int:
        """The numerator of code 0, the smallest one."""
        return 1 - (1 << self.bits)

    @property
    def variance(self) -> float:
        """The mean square of the values, whose mean is 0: for methods that fold ``variance ** -0.5`` into scales."""
        return ((1 << 2 * self.bits) - 1) / 3 * self.unit**2


MAPS = {
    "u8": ValueMap("u8", 8, (0, 8, 16, 24), 2.0**-8),
    "u24": ValueMap("u24", 24, (8,), 2.0**-24),
    "sign": ValueMap("sign", 1, tuple(range(32)), 1.0),
}


@dataclass(frozen=True)
class Stream:
    """The bases of one seed and label. Raises E-OPTION or E-LIMIT on a seed or label that the format does not have."""

    seed: int
    label: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", _whole("the seed", self.seed, SEEDS - 1))
        if not isinstance(self.label, str) or not self.label:
            raise OptionError("the label of a stream is empty or no text")
        try:
            size = len(self.label.encode())
        except UnicodeEncodeError:
            raise OptionError(f"the label {self.label!r:.80} is no Unicode text: it has a lone surrogate") from None
        if size > OWN.string_bytes:
            raise LimitError(f"the label of a stream has {size} bytes; at most {OWN.string_bytes} are allowed")

    @property
    def key(self) -> tuple[int, int]:
        """The two key words: the low and the high half of the seed."""
        return self.seed & philox.MASK, self.seed >> 32

    @cached_property
    def sid(self) -> int:
        """The stream id: 64 bits made of the label."""
        return int.from_bytes(hashlib.sha256(DOMAIN + self.label.encode()).digest()[:8], "little")


def parse_seed(text: str) -> int:
    """The seed that a file spells in decimal. Raises E-CANON on any other spelling, E-VALUE beyond 64 bits."""
    if not (text.isascii() and text.isdigit()) or (text[0] == "0" and text != "0"):
        raise CanonicalError(f"{text!r:.40} is not the decimal spelling of a seed")
    if len(text) > len(str(SEEDS)) or int(text) >= SEEDS:
        raise ValueRangeError(f"the seed {text:.40} does not fit 64 bits")
    return int(text)


def value_map(name: str) -> ValueMap:
    """The map of this name. Raises E-OPTION."""
    if name not in MAPS:
        raise OptionError(f"there is no value map {name!r:.40}", fix=f"known: {', '.join(MAPS)}")
    return MAPS[name]


def check_size(name: str, numel: int, bases: int) -> None:
    """Raises E-LIMIT if a basis of `numel` elements, or a stream of so many bases, goes beyond what has a counter."""
    _whole("the number of elements of a basis", numel, value_map(name).lanes * BLOCKS)
    _whole("the number of bases", bases, BASES)


def words(stream: Stream, bases: Bases, start: int, count: int) -> philox.U32:
    """Words `start` to ``start + count`` of each basis: uint32 (len(bases), count).

    `bases` holds the indices of bases, a range or any sequence. Raises E-LIMIT beyond the last basis or word, E-OPTION
    on what is no range.
    """
    chosen, start, count = _asked(bases, start, count, 4)
    out = np.empty((len(chosen), count), np.uint32)
    for tile in philox.tiles(len(chosen), start, count, 4, _TILE_BLOCKS):
        found = philox.words(stream.key, stream.sid, chosen[tile.rows], tile.first, tile.blocks)
        out[tile.rows, tile.out] = found.reshape(len(found), -1)[:, tile.lanes]
    return out


def numerators(stream: Stream, name: str, bases: Bases, start: int, count: int) -> npt.NDArray[np.int32]:
    """As `values`, without the unit: odd integers, int32 (len(bases), count)."""
    return _mapped(stream, value_map(name), bases, start, count, np.dtype(np.int32), 1)


def values(
    stream: Stream, name: str, bases: Bases, start: int, count: int, dtype: Float = "float32"
) -> npt.NDArray[Any]:
    """Elements `start` to ``start + count`` of each basis under the map `name`: `dtype` (len(bases), count).

    The elements of a basis are numbered row by row, the last dimension fastest. `bases` holds indices of bases, a range
    or any sequence. The numbers are the same in both dtypes. Raises E-LIMIT beyond the last basis or element, E-OPTION
    on an unknown map or dtype and on what is no range.
    """
    kind = value_map(name)
    return _mapped(stream, kind, bases, start, count, np.dtype(_checked(dtype)), kind.unit)


def tensor(
    stream: Stream,
    name: str,
    bases: Bases,
    start: int,
    count: int,
    *,
    device: str | torch.device = "cpu",
    dtype: Float = "float32",
) -> torch.Tensor:
    """The same numbers as `values`, computed by torch on `device`, with the Triton kernel where that works."""
    import torch

    from lrconvert.prng import torch_philox

    kind, place = value_map(name), torch.device(device)
    chosen, start, count = _asked(bases, start, count, kind.lanes)
    asked = stream, kind, chosen, start, count, place, getattr(torch, _checked(dtype))
    if place.type == "cuda":
        from lrconvert.prng import triton_philox

        if triton_philox.available(place):
            return triton_philox.values(*asked)
    return torch_philox.values(*asked)


def _mapped(
    stream: Stream, kind: ValueMap, bases: Bases, start: int, count: int, dtype: np.dtype[Any], unit: float
) -> npt.NDArray[Any]:
    """(2c + 1 - 2^bits) * unit in `dtype`. Product and sum are exact, so neither their order nor FMA matters."""
    chosen, start, count = _asked(bases, start, count, kind.lanes)
    step, offset = dtype.type(2 * unit), dtype.type(kind.offset * unit)
    out = np.empty((len(chosen), count), dtype)
    size = max(1, min(_TILE_BLOCKS, _TILE_ELEMENTS // kind.lanes))
    for tile in philox.tiles(len(chosen), start, count, kind.lanes, size):
        found = philox.words(stream.key, stream.sid, chosen[tile.rows], tile.first, tile.blocks)
        piece = out[tile.rows, tile.out]
        piece[...] = philox.codes(found, kind.bits)[:, tile.lanes]
        piece *= step
        piece += offset
    return out


def _asked(bases: Bases, start: int, count: int, lanes: int) -> tuple[philox.U32, int, int]:
    """The indices of the bases as uint32, and the range of elements, all checked against the limits."""
    start = _whole("the first element", start, lanes * BLOCKS)
    count = _whole("the number of elements", count, lanes * BLOCKS)
    _whole("the end of the elements", start + count, lanes * BLOCKS)
    if isinstance(bases, range):  # without a look at each index
        for end in (*bases[:1], *bases[-1:]):
            _whole("a basis index", end, BASES - 1)
        return np.arange(bases.start, bases.stop, bases.step).astype(np.uint32), start, count
    return np.array([_whole("a basis index", k, BASES - 1) for k in bases], np.uint32), start, count


def _whole(what: str, number: int, largest: int) -> int:
    """`number` as an int in [0, largest]. Raises E-OPTION below, E-LIMIT above."""
    try:
        whole = operator.index(number)
    except TypeError:
        raise OptionError(f"{what} is {number!r:.40}, no integer") from None
    if whole < 0:
        raise OptionError(f"{what} is negative: {whole}")
    if whole > largest:
        raise LimitError(f"{what} is {whole}; at most {largest} is allowed")
    return whole


def _checked(dtype: str) -> str:
    if dtype not in ("float32", "float64"):
        raise OptionError(f"seeded values are float32 or float64, not {dtype!r:.40}")
    return dtype
