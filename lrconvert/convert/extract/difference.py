"""What one tensor of a fine-tuned model has more than the base's: read in row blocks, measured, multiplied.

Nothing larger than a block is needed in memory; a difference of up to `HELD` numbers is kept all the same, as reading
it anew for every product takes longer than the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from lrconvert.core.dtypes import F64, STORAGE, Array, decode
from lrconvert.core.errors import ValueRangeError
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.io.container import TensorInfo

HELD = 1 << 26  # numbers of a difference that are kept in memory, 256 MiB
BLOCK = 1 << 22  # numbers that are read at a time
_PART = 1 << 18  # numbers that are measured at a time: they stay in the cache
_PRECISE = 1 << 20  # numbers of a difference that is small enough to compute in float64
_SAMPLE = 1 << 22  # numbers by which rounding is told
_MOST_MOVED = 0.5
_MANTISSAS = {"BF16": 7, "F16": 10, "F32": 23}


@dataclass(frozen=True, eq=False)
class Binades:
    """Counts of numbers by the exponent (256,) of the fine-tuned model's: how many are in rows that
    changed, how many of them `moved`, and the `energy` of their difference. `bits` are those of a mantissa."""

    bits: int
    count: F64
    moved: F64
    energy: F64

    def rounding(self) -> float:
        """Return about what share of the energy is that of rounding alone.

        An update is taken for normal numbers of one size t, whatever the weights are. A binade in which most moved
        gives t by its energy, another one by the share p that moved: p = P(|N(0, t)| > step / 2). The error is then
        that of a uniform number, step^2 / 12, but at most t^2: an update far below the step is lost whole.
        """
        steps = 2.0 ** (np.arange(256) - 127.0 - self.bits)
        sizes = np.zeros(256)
        for e in np.flatnonzero(self.moved):
            share = float(self.moved[e] / self.count[e])
            if share > _MOST_MOVED:
                sizes[e] = max(self.energy[e] / self.count[e] - steps[e] ** 2 / 12, 0.0)
            else:
                sizes[e] = (0.5 * steps[e] / NormalDist().inv_cdf(1 - share / 2)) ** 2
        total = float(self.energy.sum())
        if not total:
            return 0.0
        size = float(np.average(sizes, weights=self.moved))
        return min(1.0, float(np.sum(self.count * np.minimum(steps**2 / 12, size))) / total)


@dataclass(frozen=True)
class Measures:
    """Measures of a difference D = W - W0: `energy` is the sum of all squares, `moved` counts the numbers that differ,
    `rows` are those in which some do, and `rounding` about how much of `energy` is that of rounding W to its dtype."""

    energy: float
    moved: int
    rows: tuple[int, ...]
    rounding: float


class Difference:
    """The numbers of `tuned` minus those of `base`, both of one shape, from number `first` on seen as a matrix of
    `shape` (rows, columns). Valid while both checkpoints are open."""

    def __init__(
        self,
        tuned: tuple[Checkpoint, TensorInfo],
        base: tuple[Checkpoint, TensorInfo],
        first: int,
        shape: tuple[int, int],
    ) -> None:
        self._tuned, self._base, self._first, self.shape = tuned, base, first, shape
        self._held: Array | None = None
        wide = "F64" in (tuned[1].dtype, base[1].dtype) or math.prod(shape) <= _PRECISE
        self.dtype: Any = np.dtype(np.float64 if wide else np.float32)

    def blocks(self) -> Iterator[tuple[int, Array]]:
        """Yield (first row, rows of the difference) from the top."""
        if self._held is not None:
            yield 0, self._held
            return
        for top, _, difference in self._read():
            yield top, difference

    def measure(self) -> Measures:
        """Return the measures, and keep the difference in memory where it is small enough. Raises E-VALUE for NaN and
        infinity."""
        rows, columns = self.shape
        held = np.empty(self.shape, self.dtype) if rows * columns <= HELD else None
        energy, moved, changed = 0.0, 0, []
        binades = np.zeros((3, 256))
        stride = max(1, rows * columns // _SAMPLE)  # of rows that say how numbers were rounded
        for top, tuned, difference in self._read():
            if held is not None:
                held[top : top + len(difference)] = difference
            height = max(1, _PART // columns)
            for start in range(0, len(difference), height):
                part = difference[start : start + height]
                if not part.any():
                    continue
                wide = part.astype(np.float64, copy=False)
                energy += float(np.vdot(wide, wide))
                differs = part != 0
                moved += int(np.count_nonzero(differs))
                changed += (top + start + np.flatnonzero(differs.any(axis=1))).tolist()
                _add_binades(binades, tuned[start : start + height], part, stride)
        if not math.isfinite(energy):
            name, path = self._tuned[1].name, self._tuned[0].root
            raise ValueRangeError(
                f"{name!r} holds NaN or infinity, or the base's does", fix="use an earlier checkpoint", path=path
            )
        self._held = held if moved else None
        bits = _MANTISSAS.get(self._tuned[1].dtype)
        rounding = 0.0 if bits is None else Binades(bits, *binades).rounding()
        return Measures(energy, moved, tuple(changed), rounding * energy)

    def release(self) -> None:
        """Forget what is kept in memory."""
        self._held = None

    def times(self, right: Array) -> Array:
        """Return ``D @ right`` (rows, k) for right (columns, k)."""
        out = np.empty((self.shape[0], right.shape[1]), self.dtype)
        for top, block in self.blocks():
            np.matmul(block, right, out=out[top : top + len(block)])
        return out

    def transposed_times(self, left: Array) -> Array:
        """Return ``D^T @ left`` (columns, k) for left (rows, k)."""
        out = np.zeros((self.shape[1], left.shape[1]), self.dtype)
        for top, block in self.blocks():
            out += block.T @ left[top : top + len(block)]
        return out

    def residual(self, left: Array, right: Array) -> tuple[float, float]:
        """Return (||D - left @ right||^2, ||D||^2) for left (rows, k), right (k, columns): of the difference itself,
        number by number."""
        error, energy = 0.0, 0.0
        right = right.astype(self.dtype, copy=False)
        height = max(1, _PART // self.shape[1])
        for top, block in self.blocks():
            for start in range(0, len(block), height):
                part = block[start : start + height]
                rows = left[top + start : top + start + len(part)].astype(self.dtype, copy=False)
                wide = part.astype(np.float64, copy=False)
                energy += float(np.vdot(wide, wide))
                rest = (part - rows @ right).astype(np.float64, copy=False)
                error += float(np.vdot(rest, rest))
        return error, energy

    def _read(self) -> Iterator[tuple[int, Array, Array]]:
        """Yield (first row, the fine-tuned model's rows, their difference from the base's)."""
        rows, columns = self.shape
        height = max(1, BLOCK // columns)
        for top in range(0, rows, height):
            count = min(height, rows - top)
            codes, others = (self._codes(side, top * columns, count * columns) for side in (self._tuned, self._base))
            one, other = self._tuned[1].dtype, self._base[1].dtype
            tuned = decode(codes, one).reshape(count, columns)
            if one == other and np.array_equal(codes, others):
                yield top, tuned, np.zeros((count, columns), self.dtype)
                continue
            wide = np.float64 if "F64" in (one, other) else self.dtype
            with np.errstate(invalid="ignore", over="ignore"):
                difference = tuned.astype(wide, copy=False) - decode(others, other).reshape(count, columns)
            yield top, tuned, difference.astype(self.dtype, copy=False)

    def _codes(self, side: tuple[Checkpoint, TensorInfo], first: int, count: int) -> Array:
        checkpoint, info = side
        kind = STORAGE[info.dtype]
        data = checkpoint.read(info, (self._first + first) * kind.itemsize, count * kind.itemsize)
        return np.frombuffer(data, kind)


def _add_binades(binades: F64, values: Array, difference: Array, stride: int) -> None:
    """Add to counts, moved numbers and energies (3, 256), by the exponents of some `values`, those of their
    `difference`."""
    rows = np.flatnonzero(difference.any(axis=1))[::stride]
    exponents = (values[rows].astype(np.float32).view(np.uint32) >> np.uint32(23) & np.uint32(0xFF)).reshape(-1)
    squares = difference[rows].astype(np.float64).reshape(-1) ** 2
    binades[0] += np.bincount(exponents, minlength=256)
    binades[1] += np.bincount(exponents[squares > 0], minlength=256)
    binades[2] += np.bincount(exponents, squares, minlength=256)
