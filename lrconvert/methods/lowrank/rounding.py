"""The rounding of scaled singular vectors with one step: coded integers, models and bits, and what they capture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lrconvert.core.dtypes import F32, F64, Array
from lrconvert.kernels import jit
from lrconvert.lora.coded.choice import CLASSES, best_models
from lrconvert.lora.coded.stream import LARGEST_INTEGER
from lrconvert.lora.packing import coded_values
from lrconvert.methods.lowrank.components import DEAD_ZONE, AnyComponents, Components

SIDE_BITS = 28  # of a component beside its numbers: a gain and two models
_SAVED = 5e-8  # seconds that a compiled loop saves in a plan, which rounds all numbers a few times, for each


@dataclass(frozen=True, eq=False)
class Rounded:
    """The outcome of a step for `Components`: for every component the share of its energy that is left (n,), bits (n,)
    without those beside its numbers, and models (n, 2) of A and B."""

    share: F64
    bits: F64
    models: Array

    def only(self, places: Array) -> Rounded:
        """Return those of some components."""
        return Rounded(self.share[places], self.bits[places], self.models[places])


def integers(rows: Array, step: float) -> Array:
    """Return the coded integers of rows, int32: ``sign(x) floor(|x| / step + 1 - dead zone)``."""
    sizes = np.abs(rows) * np.float32(1 / step) + np.float32(1 - DEAD_ZONE)
    whole: Array = np.minimum(sizes, np.float32(LARGEST_INTEGER)).astype(np.int32)
    return np.where(rows < 0, -whole, whole)


def round_all(parts: AnyComponents, step: float, *, exact: bool = False) -> Rounded:
    """Return what `step` makes of components. `exact`: shares, which compiled loops sum in another order, do not count,
    so that loops that were loaded before may be taken."""
    count = len(parts.energy)
    share, bits, models = np.ones(count), np.zeros(count), np.zeros((count, 2), np.int64)
    loops = jit.load("rounding", _SAVED * parts.stored, exact=exact)

    def fill(places: Array, block: Components) -> None:
        for number, sides in enumerate(block.sides):
            for side in (part for whole in sides for part in whole.slices()):
                kept, best, length = _rounded(side.rows, step) if loops is None else _rounded_by(loops, side.rows, step)
                which = places[side.places]
                share[which] *= kept
                bits[which] += length * side.every
                models[which, number] = best

    parts.each(fill)
    return Rounded(share, bits, models)


def _rounded(rows: F32, step: float) -> tuple[F64, Array, F64]:
    """Return what each row keeps of its direction, its model, and its bits."""
    codes = integers(rows, step)
    values = coded_values(codes)
    dots = np.einsum("nd,nd->n", values, rows, dtype=np.float64)
    sizes = [np.einsum("nd,nd->n", x, x, dtype=np.float64) for x in (values, rows)]
    return _share(dots, sizes[0] * sizes[1]), *best_models(codes)


def _rounded_by(loops: Any, rows: F32, step: float) -> tuple[F64, Array, F64]:
    """The same by compiled `loops`."""
    counts, sums = np.empty((len(rows), CLASSES), np.int64), np.empty((len(rows), 4))
    limits = np.array([1 / step, 1 - DEAD_ZONE, LARGEST_INTEGER], np.float32)
    codes = np.empty(rows.shape, np.int32)
    loops.round_rows(rows, limits, counts, sums, codes, np.empty((4, CLASSES), np.int64))
    dots, sizes, squares, whole = sums.T
    return _share(dots, sizes * squares), *best_models(codes, counts.astype(np.float64), whole)


def _share(dots: F64, product: F64) -> F64:
    return np.divide(dots**2, product, out=np.zeros_like(dots), where=product > 0)
