"""The energy that lines of every target capture, one curve for each target and variant, and all steps of all curves.

Searches over a price look at every curve: numpy does that for all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lrconvert.core.dtypes import F64, Array
from lrconvert.lora import svd
from lrconvert.lora.input_statistics import Moment
from lrconvert.methods.sbora.columns import Columns
from lrconvert.methods.sbora.form import Config, settled
from lrconvert.methods.shared.widths import ENERGY_LOST, WIDTHS, concave_hull


@dataclass
class Curve:
    """The energy that each further line of a target captures, of at most `limit`, never more than the line before it.

    `chosen`: the columns so far if more could be found, None if `gains` are all there are. `lost`: the share of a
    line's energy that each width loses; `length`: numbers of a line.
    """

    by_rows: bool
    length: int
    limit: int
    gains: F64
    lost: float = 1.0
    chosen: list[int] | None = None

    def extend(self, factors: svd.Factors, metric: Moment, count: int, least: float = 0.0) -> None:
        """Find columns until there are `count`, or one adds less than `least`."""
        assert self.chosen is not None
        columns = Columns(factors, metric)
        if self.chosen:
            columns.resume(self.chosen)
        gains = self.gains.tolist()
        while len(gains) < min(count, self.limit) and (not gains or gains[-1] >= least):
            gains.append(columns.grow())
        self.gains = np.minimum.accumulate(gains)
        self.chosen = columns.chosen if len(gains) < self.limit and gains[-1] > 0 else None

    def steps(self, widths: Iterable[int], index_bits: int) -> list[Step]:
        """Return the steps from width to width along the concave hull of a line's kept energy against bits."""
        points = (
            (self.length * q + index_bits + (16 if q != 16 else 0), 1 - self.lost * ENERGY_LOST[q], q)
            for q in sorted(widths)
        )
        hull = concave_hull([(0, 0.0, 0), *points])
        return [Step(two[2], two[0] - one[0], two[1] - one[1]) for one, two in pairwise(hull)]


@dataclass(frozen=True)
class Step:
    """From one width of a line to the next: more bits, a larger share of its energy."""

    width: int
    bits: int
    share: float

    @property
    def rate(self) -> float:
        return self.share / self.bits


class AllSteps:
    """The steps of all curves, `curves` (targets, variants) in rows, between some `widths`.

    Curves are numbered by target, then variant. Arrays over them are (curves,), those over their steps
    (curves, steps); a curve with fewer steps than others has some of rate 0. ``taken`` (..., steps) are how many lines
    take each step.
    """

    def __init__(self, curves: Sequence[Sequence[Curve]], widths: Sequence[int], index_bits: int) -> None:
        flat = [curve for row in curves for curve in row]
        self._shape = len(curves), len(curves[0])
        self._by_rows = np.array([curve.by_rows for curve in flat])
        self._lengths = np.array([curve.length for curve in flat], np.int64)
        counts = np.array([len(curve.gains) for curve in flat], np.int64)
        self._starts = np.cumsum(counts) - counts
        self._counts = counts
        self._gains = np.concatenate([curve.gains for curve in flat])
        self._sums = np.concatenate([part for curve in flat for part in ([0.0], np.cumsum(curve.gains))])
        kinds = {(curve.length, curve.lost): curve for curve in flat}
        steps = {kind: curve.steps(widths, index_bits) for kind, curve in kinds.items()}
        most = max(map(len, steps.values()))
        rows = {
            kind: [(s.rate, s.share, s.bits, WIDTHS.index(s.width)) for s in own]
            + [(0.0, 0.0, 0, 0)] * (most - len(own))
            for kind, own in steps.items()
        }
        table = np.array([rows[curve.length, curve.lost] for curve in flat], np.float64)
        self._rate, self._share, self._bits = table[..., 0], table[..., 1], table[..., 2]
        self._width = table[..., 3].astype(np.int64)

    def first_variants(self) -> Array:
        """Return the number of each target's first curve."""
        return np.arange(self._shape[0]) * self._shape[1]

    def highest(self) -> float:
        """Return the price above which no step is worth it."""
        return float((self._gains[self._starts] * self._rate[:, 0]).max())

    def above(self, price: float) -> Array:
        """Return how many lines of every curve are worth more than a price at each step (curves, steps): of falling
        gains those above a least one, found by halving."""
        with np.errstate(divide="ignore", invalid="ignore"):
            least = np.where(self._rate > 0, price / self._rate, np.inf)
        low = np.zeros(least.shape, np.int64)
        high = np.broadcast_to(self._counts[:, None], least.shape).copy()
        last = len(self._gains) - 1
        for _ in range(int(self._counts.max()).bit_length()):
            middle = (low + high) // 2
            larger = self._gains[np.minimum(self._starts[:, None] + middle, last)] > least
            open_ = low < high
            low = np.where(open_ & larger, middle + 1, low)
            high = np.where(open_ & ~larger, middle, high)
        return low

    def captured(self, which: Array, taken: Array) -> F64:
        """Return the energy (curves, steps) that the steps of the curves `which` capture."""
        begins = (self._starts + np.arange(len(self._starts)))[which, None]  # a sum more than gains in every curve
        return np.asarray(self._sums[begins + taken] * self._share[which], np.float64)

    def at(self, price: float) -> tuple[Array, Array]:
        """Return the best curve of every target at a price (targets,), and how many lines take each of its steps."""
        taken = self.above(price)
        worth = self.captured(np.arange(len(taken)), taken) - price * self._bits * taken
        best = np.argmax(worth.sum(axis=1).reshape(self._shape), axis=1)
        chosen = self.first_variants() + best
        return chosen, taken[chosen]

    def between(self, chosen: Array, top: float, bottom: float) -> tuple[Array, Array, F64]:
        """Return the single steps of the curves `chosen` that are worth at most `top`, but more than `bottom`, best
        first, of equals by target, step and line: the place in `chosen`, the step, and the energy captured."""
        first, end = self.above(top)[chosen], self.above(bottom)[chosen]
        counts = (end - first).reshape(-1)
        rows, which = (np.repeat(x.reshape(-1), counts) for x in np.indices(first.shape))
        lines = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - first.reshape(-1), counts)
        gains = self._gains[self._starts[chosen][rows] + lines]
        order = np.argsort(-gains * self._rate[chosen][rows, which], kind="stable")
        energy = gains * self._share[chosen][rows, which]
        return rows[order], which[order], np.asarray(energy[order], np.float64)

    def _by_width(self, chosen: Array, taken: Array) -> Array:
        """The number of lines (targets, WIDTHS) of each width."""
        lines = np.zeros((len(chosen), len(WIDTHS)), np.int64)
        ending = taken - np.pad(taken[:, 1:], ((0, 0), (0, 1)))
        np.add.at(lines, (np.arange(len(chosen))[:, None], self._width[chosen]), ending)
        return lines

    def payload(self, chosen: Array, taken: Array) -> int:
        """Return the bits of numbers and scales of these lines: fewer than their file has."""
        bits = np.array(WIDTHS) * self._lengths[chosen, None] + np.where(np.array(WIDTHS) == 16, 0, 16)
        return int((self._by_width(chosen, taken) * bits).sum())

    def config(self, chosen: Array, taken: Array) -> Config:
        """Return the Config of these lines, only with the levels that are used."""
        lines = self._by_width(chosen, taken)
        used = [n for n in range(len(WIDTHS)) if lines[:, n].any()]
        levels = [WIDTHS[n] for n in used]
        return settled(levels, lines[:, used].tolist(), self._by_rows[chosen].tolist())
