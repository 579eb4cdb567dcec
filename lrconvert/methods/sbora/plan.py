"""Where bytes go: how many lines each target gets, of which variant, and how wide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.limits import MAX_RANK
from lrconvert.core.options import option
from lrconvert.lora import packing, svd
from lrconvert.lora.adapter import LoraAdapter, LoraTarget
from lrconvert.lora.input_statistics import Moment
from lrconvert.methods.base import Budget, FitContext
from lrconvert.methods.sbora.columns import both_sides, largest, line_energies, row_energies
from lrconvert.methods.sbora.curves import AllSteps, Curve
from lrconvert.methods.sbora.form import Config, settled, sizes
from lrconvert.methods.shared.options import bits_option, check_range, within
from lrconvert.methods.shared.widths import WIDTHS

_ABSORBED = 0.4  # share of that loss which columns under a metric take over from one another, as measured
_WINDOW = 0.99  # of a price: the steps below it that may still fit
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
    ranks = [min(options.rank or pair.rank, MAX_RANK) for pair in lora.targets]
    every = _all_curves(lora, options, context, ranks, ranks) if options.variant == "auto" else None
    for n, (pair, rank) in enumerate(zip(lora.targets, ranks, strict=True)):
        kept = options.variant == "fb"
        if every is not None:
            kept = max(every[n], key=lambda c: (float(c.gains.sum()), -c.length)).by_rows
        counts.append((min(rank, sizes(pair.target, kept)[0]),))
        by_rows.append(kept)
    return settled((16 if options.bits == "auto" else int(options.bits),), counts, by_rows)


# --- what lines are worth -------------------------------------------------------------------------------------------


def _all_curves(
    lora: LoraAdapter, options: SBoRAOptions, context: FitContext, limits: Sequence[int], counts: Sequence[int]
) -> list[list[Curve]]:
    """The curves of every target of the variants that the options allow, of at most `limits` lines; of columns under a
    metric, the first `counts` lines."""
    curves: list[list[Curve]] = [[] for _ in lora.targets]
    variants = _BY_ROWS[options.variant]
    for numbers in svd.stacks(lora.targets):
        pairs = [lora.targets[n] for n in numbers]
        if context.metric(pairs[0]) is None:
            sides = both_sides(pairs)
            for by_rows in variants:
                sorted_energies = -np.sort(-line_energies(*sides[by_rows]), axis=1)
                for n, energies in zip(numbers, sorted_energies, strict=True):
                    places, length = sizes(lora.targets[n].target, by_rows)
                    limit = min(places, limits[n])
                    curves[n].append(Curve(by_rows, length, limit, energies[:limit]))
            continue
        for n, pair in zip(numbers, pairs, strict=True):
            metric = context.metric(pair)
            assert metric is not None
            curves[n] = _curves_under(pair, metric, variants, limits[n], counts[n])
    return curves


def _curves_under(pair: LoraTarget, metric: Moment, variants: Sequence[bool], most: int, count: int) -> list[Curve]:
    """The same of one target under a metric."""
    factors = svd.svd(pair, metric)
    curves = []
    for by_rows in variants:
        places, length = sizes(pair.target, by_rows)
        limit = min(places, most)
        if by_rows:
            energies = row_energies(factors)
            curves.append(Curve(True, length, limit, energies[largest(energies, limit)]))
        else:
            curves.append(Curve(False, length, limit, np.zeros(0), 1 - _ABSORBED, []))
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
        limits, counts = ([number] * len(lora.targets) for number in (options.rank or MAX_RANK, 4 + int(1.25 * even)))
        self.curves = _all_curves(lora, options, context, np.minimum(limits, MAX_RANK).tolist(), counts)

    def best(self) -> Config:
        """Return the config that captures most by what planning assumes. Raise E-BUDGET."""
        steps = self._steps(self.widths)
        while self._extend(self._price(steps)[0]):
            steps = self._steps(self.widths)
        filled = self._fill(steps)
        if filled is None:
            return within(self.budget, self._smallest())
        levels = filled[1].commonest()
        every = [widths for n in range(1, len(levels) + 1) for widths in combinations(levels, n)]
        fills = [self._fill(self._steps(widths)) for widths in every]
        return max((fill for fill in fills if fill is not None), key=lambda fill: fill[0], default=filled)[1]

    def _steps(self, widths: Sequence[int]) -> AllSteps:
        return AllSteps(self.curves, widths, self.index_bits)

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

    def _price(self, steps: AllSteps) -> tuple[float, Array]:
        """The least price, within 0.1 %, at which all that is worth it fits, and the curves (targets,) of the variants
        there."""
        high = steps.highest()
        if high == 0:
            return 0.0, steps.first_variants()
        low = high / 4
        while low > high * 1e-30 and self._fits(steps, *steps.at(low)):
            high, low = low, low / 4
        while high > low * 1.001:
            middle = (high * low) ** 0.5
            if not low < middle < high:  # the product of tiny energies is 0
                middle = high**0.5 * low**0.5
            if self._fits(steps, *steps.at(middle)):
                high = middle
            else:
                low = middle
        return high, steps.at(high)[0]

    def _fits(self, steps: AllSteps, chosen: Array, taken: Array) -> bool:
        """True if these lines fit; without a look at the file if their numbers alone are too many."""
        if steps.payload(chosen, taken) > 8 * self.budget.limit:
            return False
        return not taken.any() or self.budget.fits(steps.config(chosen, taken))

    def _fill(self, steps: AllSteps) -> tuple[float, Config] | None:
        """With the variants of the best price: as many steps, best first, as fit; what they capture, and the Config.
        None if not one fits. Those that are worth more than the price are taken, and some that are worth a little
        less; should more of those fit than are looked at, or should the price be wrong, all steps are."""
        price, chosen = self._price(steps)
        for top, bottom in ((price, price * _WINDOW), (np.inf, 0.0)):
            base = steps.above(top)[chosen]
            rows, which, energy = steps.between(chosen, top, bottom)

            def taken(count: int, base: Array = base, rows: Array = rows, which: Array = which) -> Array:
                more = base.copy()
                np.add.at(more, (rows[:count], which[:count]), 1)
                return more

            low, high = 0, len(rows)
            if np.isfinite(top) and (not self._fits(steps, chosen, base) or self._fits(steps, chosen, taken(high))):
                continue
            while low < high:
                middle = (low + high + 1) // 2
                if self._fits(steps, chosen, taken(middle)):
                    low = middle
                else:
                    high = middle - 1
            lines = taken(low)
            kept = float(steps.captured(chosen, base).sum()) + float(energy[:low].sum())
            return (kept, steps.config(chosen, lines)) if lines.any() else None
        return None

    def _smallest(self) -> Config:
        """One line at the least width, in the target where it is cheapest; of equal ones, where it holds most."""
        all_curves = [(t, curve) for t, curves in enumerate(self.curves) for curve in curves]
        which, kept = min(all_curves, key=lambda entry: (entry[1].length, -float(entry[1].gains[0])))
        counts = [(int(t == which),) for t in range(len(self.curves))]
        return settled((min(self.widths),), counts, [kept.by_rows] * len(counts))
