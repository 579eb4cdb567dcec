"""Seeded bases: numbers that a file names by a seed and a label, and that are the same bits everywhere.

Normative text and known answers: ``formats/prng-v1.md``, ``formats/kat/prng-v1.json``. A `Stream` holds up to 2^32
bases; a basis is a sequence of 32-bit words, or of the numbers that one of the `MAPS` makes of them. An element is
computed from its position alone: every range of elements, of any bases, can be drawn by itself and in any order.

`words`, `numerators` and `values` compute with numpy, `tensor` with torch on any device. Each returns an array of shape
(bases, count) and needs, besides it, a scratch space that does not grow with it. Nothing here uses a generator of
numpy or torch, and nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from lrconvert.core.errors import CanonicalError, OptionError, ValueRangeError
from lrconvert.lora.prng import philox
from lrconvert.lora.prng.streams import BASES, BLOCKS, MAPS, SEEDS, Stream, ValueMap, whole

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

_TILE_BLOCKS = 1 << 14  # computed at once: six arrays of 128 KiB, the fastest size by measurement
_TILE_ELEMENTS = 1 << 18  # mapped at once: 1 MiB of float32

Bases = Sequence[int] | npt.NDArray[np.integer[Any]]
Float = Literal["float32", "float64"]


def parse_seed(text: str) -> int:
    """Return the seed that a file spells in decimal. Raises E-CANON on any other spelling, E-VALUE beyond 64 bits."""
    if not (text.isascii() and text.isdigit()) or (text[0] == "0" and text != "0"):
        raise CanonicalError(f"{text!r:.40} is not the decimal spelling of a seed")
    if len(text) > len(str(SEEDS)) or int(text) >= SEEDS:
        raise ValueRangeError(f"the seed {text:.40} does not fit 64 bits")
    return int(text)


def value_map(name: str) -> ValueMap:
    """Return the map of this name. Raise E-OPTION."""
    if name not in MAPS:
        raise OptionError(f"there is no value map {name!r:.40}", fix=f"known: {', '.join(MAPS)}")
    return MAPS[name]


def check_size(name: str, numel: int, bases: int) -> None:
    """Raise E-LIMIT if a basis of `numel` elements, or a stream of so many bases, goes beyond what has a counter."""
    whole("the number of elements of a basis", numel, value_map(name).lanes * BLOCKS)
    whole("the number of bases", bases, BASES)


def words(stream: Stream, bases: Bases, start: int, count: int) -> philox.U32:
    """Return words `start` to ``start + count`` of each basis: uint32 (len(bases), count).

    `bases` holds the indices of bases, a range or any sequence. Raises E-LIMIT beyond the last basis or word, E-OPTION
    on what is no range.
    """
    chosen, start, count = _checked_range(bases, start, count, 4)
    out = np.empty((len(chosen), count), np.uint32)
    for tile in philox.tiles(len(chosen), start, count, 4, _TILE_BLOCKS):
        block = philox.words(stream.key, stream.sid, chosen[tile.rows], tile.first, tile.blocks)
        out[tile.rows, tile.out] = block.reshape(len(block), -1)[:, tile.lanes]
    return out


def numerators(stream: Stream, name: str, bases: Bases, start: int, count: int) -> npt.NDArray[np.int32]:
    """Return `values` without the unit: odd integers, int32 (len(bases), count)."""
    return _mapped(stream, value_map(name), bases, start, count, np.dtype(np.int32), 1)


def values(
    stream: Stream, name: str, bases: Bases, start: int, count: int, dtype: Float = "float32"
) -> npt.NDArray[Any]:
    """Return elements `start` to ``start + count`` of each basis under the map `name`: `dtype` (len(bases), count).

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
    """Return the same numbers as `values`, computed by torch on `device`."""
    import torch

    from lrconvert.lora.prng import torch_philox

    kind, place = value_map(name), torch.device(device)
    chosen, start, count = _checked_range(bases, start, count, kind.lanes)
    return torch_philox.values(stream, kind, chosen, start, count, place, getattr(torch, _checked(dtype)))


def _mapped(
    stream: Stream, kind: ValueMap, bases: Bases, start: int, count: int, dtype: np.dtype[Any], unit: float
) -> npt.NDArray[Any]:
    """(2c + 1 - 2^bits) * unit in `dtype`. Product and sum are exact, so neither their order nor FMA matters."""
    chosen, start, count = _checked_range(bases, start, count, kind.lanes)
    step, offset = dtype.type(2 * unit), dtype.type(kind.offset * unit)
    out = np.empty((len(chosen), count), dtype)
    size = max(1, min(_TILE_BLOCKS, _TILE_ELEMENTS // kind.lanes))
    for tile in philox.tiles(len(chosen), start, count, kind.lanes, size):
        block = philox.words(stream.key, stream.sid, chosen[tile.rows], tile.first, tile.blocks)
        piece = out[tile.rows, tile.out]
        piece[...] = philox.codes(block, kind.bits)[:, tile.lanes]
        piece *= step
        piece += offset
    return out


def _checked_range(bases: Bases, start: int, count: int, lanes: int) -> tuple[philox.U32, int, int]:
    """The indices of the bases as uint32, and the range of elements, all checked against the limits."""
    start = whole("the first element", start, lanes * BLOCKS)
    count = whole("the number of elements", count, lanes * BLOCKS)
    whole("the end of the elements", start + count, lanes * BLOCKS)
    if isinstance(bases, range):  # without a look at each index
        for end in (*bases[:1], *bases[-1:]):
            whole("a basis index", end, BASES - 1)
        return np.arange(bases.start, bases.stop, bases.step).astype(np.uint32), start, count
    return np.array([whole("a basis index", k, BASES - 1) for k in bases], np.uint32), start, count


def _checked(dtype: str) -> str:
    if dtype not in ("float32", "float64"):
        raise OptionError(f"seeded values are float32 or float64, not {dtype!r:.40}")
    return dtype
