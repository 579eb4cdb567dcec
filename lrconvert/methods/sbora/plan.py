"""Where bytes go: how many lines each target gets, of which variant, and how wide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import numpy as np

from lrconvert.core.dtypes import F64
from lrconvert.core.limits import MAX_RANK
from lrconvert.core.options import option
from lrconvert.lora import packing, svd
from lrconvert.lora.adapter import LoraAdapter, LoraTarget
from lrconvert.lora.input_statistics import Moment
from lrconvert.methods.base import Budget, FitContext
from lrconvert.methods.sbora.columns import Columns, column_energies, largest, row_energies
from lrconvert.methods.sbora.form import Config, settled, sizes
from lrconvert.methods.shared.options import bits_option, check_range, within
from lrconvert.methods.shared.widths import ENERGY_LOST, WIDTHS, concave_hull

_ABSORBED = 0.4  # share of that loss which columns under a metric take over from one another, as measured
_BY_ROWS = {"fa": (False,), "fb": (True,), "auto": (False, True)}


@dataclass(frozen=True)
class SBoRAOptions:
    """The options of `lora-to-sbora`."""

    variant: str = option(
        "auto",
        "fa: input columns, fb: output rows, auto: the better one for each target.",
        choices=("auto", "fa", "fb"),
    )
    bits: str = bits_option()
    rank: int | None = option(
        None, "Columns or rows of every target, under a size at most; as many as the LoRA's rank if neither is given."
    )


def make_plan(lora: LoraAdapter, options: SBoRAOptions, budget: Budget | None, context: FitContext) -> Config:
    """Return the Config that `options` and `budget` lead to; see `Method.plan`."""
    check_range(options, "rank", 1)
    if budget is None:
        return _of_rank(lora, options, context)
    return Planner(lora, options, budget, context).best()


def _of_rank(lora: LoraAdapter, options: SBoRAOptions, context: FitContext) -> Config:
    """The rank that was asked for, or that of the LoRA, in every target; `auto` takes what captures more."""
    counts, by_rows = [], []
    for pair in lora.targets:
        rank = min(options.rank or pair.rank, MAX_RANK)
        kept = options.variant == "fb"
        if options.variant == "auto":
            curves = _curves(pair, replace(options, rank=rank), context.metric(pair), rank)
            kept = max(curves, key=lambda c: (float(c.gains.sum()), -c.length)).by_rows
        counts.append((min(rank, sizes(pair.target, kept)[0]),))
        by_rows.append(kept)
    return settled((16 if options.bits == "auto" else int(options.bits),), counts, by_rows)


# --- what lines are worth -------------------------------------------------------------------------------------------


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


def _curves(pair: LoraTarget, options: SBoRAOptions, metric: Moment | None, count: int) -> list[Curve]:
    """The curves of the variants that the options allow; of columns under a metric, the first `count` lines."""
    factors = svd.svd(pair, metric)
    curves = []
    for by_rows in _BY_ROWS[options.variant]:
        places, length = sizes(pair.target, by_rows)
        limit = min(places, options.rank or MAX_RANK, MAX_RANK)
        if by_rows or metric is None:
            energies = row_energies(factors) if by_rows else column_energies(factors)
            curves.append(Curve(by_rows, length, limit, energies[largest(energies, limit)]))
        else:
            curves.append(Curve(by_rows, length, limit, np.zeros(0), 1 - _ABSORBED, []))
            curves[-1].extend(factors, metric, max(count, 1))
    return curves


# --- budgets --------------------------------------------------------------------------------------------------------


class Planner:
    """Spends a byte budget on lines of all targets: the step (a new line, or more bits for one) that captures the most
    per bit comes first. All curves are concave, so the steps that cost less than a common price are the best use of
    their bytes, and among variants the one whose steps are worth most at that price."""

    def __init__(self, lora: LoraAdapter, options: SBoRAOptions, budget: Budget, context: FitContext) -> None:
        self.lora, self.budget, self.context = lora, budget, context
        self.widths: tuple[int, ...] = WIDTHS if options.bits == "auto" else (int(options.bits),)
        forms = [sizes(target, by_rows) for target in lora.shapes() for by_rows in _BY_ROWS[options.variant]]
        self.index_bits = packing.index_bits(max(places for places, _ in forms))
        # Somewhat more columns than the same number everywhere would be; `_extend` adds them where more are worth it.
        typical = 2 if options.bits == "auto" else int(options.bits)
        even = 8 * budget.limit / (typical * sum(length for _, length in forms) / len(_BY_ROWS[options.variant]))
        self.curves = [_curves(pair, options, context.metric(pair), 4 + int(1.25 * even)) for pair in lora.targets]

    def best(self) -> Config:
        """Return the config that captures most by what planning assumes. Raise E-BUDGET."""
        while self._extend(self._price(self.widths)[0]):
            pass
        filled = self._fill(self.widths)
        if filled is None:
            return within(self.budget, self._smallest())
        levels = filled[1].commonest()
        fills = [self._fill(widths) for n in range(1, len(levels) + 1) for widths in combinations(levels, n)]
        return max((fill for fill in fills if fill is not None), key=lambda fill: fill[0], default=filled)[1]

    def _extend(self, price: float) -> bool:
        """Find more columns where a curve ends before the price is reached; return whether any curve did."""
        extended = False
        for pair, curves in zip(self.lora.targets, self.curves, strict=True):
            for curve in curves:
                least = price / curve.steps(self.widths, self.index_bits)[0].rate
                if curve.chosen is not None and curve.gains[-1] >= least:
                    metric = self.context.metric(pair)
                    assert metric is not None
                    curve.extend(svd.svd(pair, metric), metric, 2 * len(curve.gains) + 8, least)
                    extended = True
        return extended

    def _price(self, widths: Sequence[int]) -> tuple[float, list[Curve]]:
        """The least price, within 0.1 %, at which all that is worth it fits, and the variants there."""
        high = max(
            float(curve.gains[0]) * curve.steps(widths, self.index_bits)[0].rate
            for curves in self.curves
            for curve in curves
        )
        if high == 0:
            return 0.0, [curves[0] for curves in self.curves]
        low = high / 4
        while low > high * 1e-30 and self._fits(self._at(widths, low)[1]):
            high, low = low, low / 4
        while high > low * 1.001:
            middle = (high * low) ** 0.5
            if not low < middle < high:  # the product of tiny energies is 0
                middle = high**0.5 * low**0.5
            if self._fits(self._at(widths, middle)[1]):
                high = middle
            else:
                low = middle
        return high, self._at(widths, high)[0]

    def _fits(self, config: Config) -> bool:
        return not config.levels or self.budget.fits(config)

    def _at(self, widths: Sequence[int], price: float) -> tuple[list[Curve], Config]:
        """The best variants and lines at a price."""
        chosen, taken = [], []
        for curves in self.curves:
            worths = [self._worth(curve, widths, price) for curve in curves]
            which = max(range(len(curves)), key=lambda n: worths[n][0])
            chosen.append(curves[which])
            taken.append(worths[which][1])
        return chosen, self._config(chosen, widths, taken)

    def _worth(self, curve: Curve, widths: Sequence[int], price: float) -> tuple[float, list[int]]:
        """Return the energy that a curve captures beyond its price, and how many lines take each step."""
        worth, taken = 0.0, []
        for step in curve.steps(widths, self.index_bits):
            n = int(np.searchsorted(-curve.gains, -price / step.rate, side="left"))
            worth += float(curve.gains[:n].sum()) * step.share - price * step.bits * n
            taken.append(n)
        return worth, taken

    def _config(self, curves: Sequence[Curve], widths: Sequence[int], taken: Sequence[Sequence[int]]) -> Config:
        """The Config of how many lines take each step; only with the levels that are used."""
        rows = []
        for curve, numbers in zip(curves, taken, strict=True):
            steps = curve.steps(widths, self.index_bits)
            rows.append({step.width: n - m for step, n, m in zip(steps, numbers, [*numbers[1:], 0], strict=True)})
        levels = tuple(q for q in WIDTHS if any(row.get(q) for row in rows))
        return settled(levels, [[row.get(q, 0) for q in levels] for row in rows], [c.by_rows for c in curves])

    def _fill(self, widths: Sequence[int]) -> tuple[float, Config] | None:
        """With the variants of the best price: as many steps, best first, as fit; what they capture, and the Config.
        None if not one fits."""
        curves = self._price(widths)[1]
        steps = [(t, s, step) for t, c in enumerate(curves) for s, step in enumerate(c.steps(widths, self.index_bits))]
        rate = np.concatenate([curves[t].gains * step.rate for t, _, step in steps])
        share = np.concatenate([curves[t].gains * step.share for t, _, step in steps])
        owner = np.repeat(np.arange(len(steps)), [len(curves[t].gains) for t, _, _ in steps])
        order = np.argsort(-rate, kind="stable")[: int(np.sum(rate > 0))]

        def config(count: int) -> Config:
            taken: list[list[int]] = [[] for _ in curves]
            for (t, _, _), n in zip(steps, np.bincount(owner[order[:count]], minlength=len(steps)), strict=True):
                taken[t].append(int(n))
            return self._config(curves, widths, taken)

        low, high = 0, len(order)
        while low < high:
            middle = (low + high + 1) // 2
            if self.budget.fits(config(middle)):
                low = middle
            else:
                high = middle - 1
        return (float(share[order[:low]].sum()), config(low)) if low else None

    def _smallest(self) -> Config:
        """One line at the least width, in the target where it is cheapest; of equal ones, where it holds most."""
        all_curves = [(t, curve) for t, curves in enumerate(self.curves) for curve in curves]
        which, kept = min(all_curves, key=lambda entry: (entry[1].length, -float(entry[1].gains[0])))
        counts = [(int(t == which),) for t in range(len(self.curves))]
        return settled((min(self.widths),), counts, [kept.by_rows] * len(counts))
