"""The step that a byte budget pays for, and the components it keeps: exact rounding, after a search on a sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lrconvert.core.dtypes import F64, Array
from lrconvert.core.errors import OptionError
from lrconvert.core.limits import MAX_RANK
from lrconvert.core.options import option
from lrconvert.core.wording import spelled
from lrconvert.lora import svd
from lrconvert.lora.adapter import LoraAdapter, Target
from lrconvert.lora.coded import stream
from lrconvert.methods.base import Budget, FitContext
from lrconvert.methods.lowrank.components import AnyComponents, Components, components
from lrconvert.methods.lowrank.coordinates import PLAIN, Coordinates
from lrconvert.methods.lowrank.form import Config, Quantizer, starts
from lrconvert.methods.lowrank.rounding import SIDE_BITS, Rounded, integers, round_all
from lrconvert.methods.shared.options import check_range, within

DEFAULT_BITS, MOST_BITS = 12.0, 15.0
_SAMPLE = 100_000  # numbers that the search looks at
_PASSES = 8
_PRICE = 0.05  # of a bit, in squared steps: what a component captures must be worth its bits
_COARSE = 1.4  # between the steps that are tried first
_PASSED = 0.7  # of the most that is captured: steps that capture less are past the best
_ROOM = 1 / 400  # of a budget that may stay unused
_CODER = 1.001  # bytes over the ideal number of bits
_STEP_ERROR = 1 / 256


@dataclass(frozen=True)
class LowRankOptions:
    """The options of `lora-to-lowrank`."""

    bits: float | None = option(
        None,
        f"Average bits per number of the factors, above 0, at most {MOST_BITS:g}; without it and without a size "
        f"{DEFAULT_BITS:g}.",
        least=0,
    )
    rank: int | None = option(None, "Keep this rank in every target (at most).")
    dynamic_method: str | None = option(
        None,
        "Limit ranks per target by singular values: sv_ratio (down to 1/param of the largest), sv_fro (keep this "
        "share of the Frobenius norm), sv_cumulative (of the sum).",
        choices=("sv_ratio", "sv_fro", "sv_cumulative"),
    )
    dynamic_param: float | None = option(None, "The parameter of --dynamic-method.")


def make_plan(
    lora: LoraAdapter,
    options: LowRankOptions,
    budget: Budget | None,
    context: FitContext,
    coordinates: Coordinates = PLAIN,
) -> Config:
    """Return the Config that options and a budget lead to. Raises E-BUDGET, E-OPTION."""
    if options.bits is not None and budget is not None:
        raise OptionError(f"{spelled('bits')} and a size both say how fine numbers are", fix="give one of them")
    if options.bits is not None and not 0 < options.bits <= MOST_BITS:
        raise OptionError(f"{spelled('bits')} is {options.bits:g}; above 0, at most {MOST_BITS:g} is allowed")
    ranks = _rank_limits(lora, options, context)
    search = _Search(lora.shapes(), components(lora, ranks, context, coordinates))
    if budget is None:
        return search.at_bits(DEFAULT_BITS if options.bits is None else options.bits)
    return search.within(budget)


def chosen(parts: AnyComponents, rounded: Rounded, bits: float) -> Array:
    """Return the components (n,) that capture most in some `bits`: those with most energy per bit, while they fit."""
    worth, cost = parts.energy * rounded.share, rounded.bits + SIDE_BITS
    order = np.argsort(-worth / cost, kind="stable")
    order = order[worth[order] > 0]
    fitting = int(np.searchsorted(np.cumsum(cost[order]), bits, side="right"))
    places, left = list(order[:fitting]), bits - float(cost[order[:fitting]].sum())
    for place in order[fitting:]:  # smaller ones may still fit
        if cost[place] <= left:
            places.append(place)
            left -= float(cost[place])
    return np.sort(np.array(places, np.int64))


@dataclass(frozen=True, eq=False)
class _Search:
    """The search for the step of an adapter's components."""

    targets: tuple[Target, ...]
    parts: AnyComponents

    def at_bits(self, bits: float) -> Config:
        """Return the Config at an average of `bits` for the numbers of all components."""
        sample = self.parts.sampled(_SAMPLE)
        step = _bisect(lambda step: float(round_all(sample, step).bits.sum()), bits * self.parts.numel, *sample.steps())
        rounded = round_all(self.parts, step)
        places = np.flatnonzero(self.parts.energy * rounded.share > _PRICE * step**2 * (rounded.bits + SIDE_BITS))
        if not places.size:
            return self._smallest()
        return self._exact(self._config(rounded.only(places), places, step), self.parts.only(places))

    def within(self, budget: Budget) -> Config:
        """Return the Config of the best file within a budget. Raise E-BUDGET.

        The step is the one at which the components that fit capture most; then, with these components, the finest one.
        A budget with room for more than the default bits of all numbers is not used up.
        """
        best = within(budget, self._smallest())
        if self.parts.numel * DEFAULT_BITS / 8 <= budget.limit and budget.fits(finest := self.at_bits(DEFAULT_BITS)):
            return finest
        room = 8.0 * (budget.limit - budget.size(best) + best.length) + SIDE_BITS
        step = self._best_step(room)
        places = chosen(self.parts, round_all(self.parts, step), room)
        parts = self.parts.only(places)
        low, high = step / 4, step * 4
        slope = -parts.numel / 16  # of the bytes over the step's logarithm, before two steps tell
        last: tuple[float, int] | None = None
        for _ in range(_PASSES if places.size else 0):
            config = self._config(round_all(parts, step, exact=True), places, step)
            size = budget.size(config)
            if size <= budget.limit:
                config = replace(config, length=self._length(config, self._codes(parts, step)))
                size = budget.size(config)
            if size <= budget.limit and config.length >= best.length:
                best = config
            if budget.limit * (1 - _ROOM) - 4 <= size <= budget.limit:
                break
            low, high = (step, high) if size > budget.limit else (low, step)
            if last is not None and last[1] != config.length:
                slope = (config.length - last[1]) / math.log(step / last[0])
            last = step, config.length
            missing = budget.limit * (1 - _ROOM / 2) - size
            wanted = step * math.exp(max(-1.0, min(1.0, missing / slope)))
            step = wanted if low < wanted < high else math.sqrt(low * high)
        assert best.quantizer is not None
        return best if best.quantizer.codes is not None else self._exact(best, parts)

    def _best_step(self, bits: float) -> float:
        """The step at which the components that fit in `bits` capture most, on a sample."""
        sample = self.parts.sampled(_SAMPLE)
        finest, step = sample.steps()
        captured: dict[float, float] = {}

        def try_step(step: float) -> bool:
            """Note what a step captures; true if all components fit at it, or if it is not far past the best."""
            rounded = round_all(sample, step)
            captured[step] = float((sample.energy * rounded.share)[chosen(sample, rounded, bits)].sum())
            return bool(rounded.bits.sum() < bits) or captured[step] > _PASSED * max(captured.values())

        while step > finest and try_step(step):
            step /= _COARSE
        best = max(captured, key=lambda step: captured[step])
        for power in (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75):
            try_step(best * _COARSE**power)
        return max(captured, key=lambda step: captured[step])

    def _smallest(self) -> Config:
        """The Config of one component, the one with most energy per number, at the coarsest step at which it pays."""
        lengths = np.array([sum(target.matrix_shape) for target in self.targets], np.float64)
        place = int(np.argmax(self.parts.energy / lengths[self.parts.owners]))
        one = self.parts.only(np.array([place]))
        low, high = one.sampled(one.numel).steps()

        def unpaid(step: float) -> bool:
            rounded = round_all(one, step)
            return bool((one.energy * rounded.share < _PRICE * step**2 * (rounded.bits + SIDE_BITS)).any())

        step = 1 / _bisect(lambda inverse: unpaid(1 / inverse), 0, 1 / high, 1 / low)
        return self._exact(self._config(round_all(one, step), np.array([place]), step), one)

    def _config(self, rounded: Rounded, places: Array, step: float) -> Config:
        """The Config of the components `places`, all those of `rounded`, with about the length that their bits lead
        to."""
        owners = self.parts.owners[places]
        counts = np.bincount(owners, minlength=len(self.targets))
        numbers = np.split(places - np.searchsorted(self.parts.owners, owners), np.cumsum(counts)[:-1])
        quantizer = Quantizer(step, tuple(tuple(row.tolist()) for row in numbers))
        length = math.ceil(float(rounded.bits.sum()) / 8 * _CODER) + 4
        return Config(tuple(counts.tolist()), tuple(map(tuple, rounded.models.tolist())), length, quantizer)

    def _exact(self, config: Config, parts: AnyComponents) -> Config:
        """The Config of `parts` with the coded integers, and their length."""
        assert config.quantizer is not None
        codes = self._codes(parts, config.quantizer.step)
        quantizer = replace(config.quantizer, codes=codes)
        return replace(config, length=self._length(config, codes), quantizer=quantizer)

    def _length(self, config: Config, codes: Array) -> int:
        return len(stream.encode(codes, starts(config, self.targets).rows))

    def _codes(self, parts: AnyComponents, step: float) -> Array:
        """The coded integers of components in the order of a file: the A row, then the B row of each."""
        lengths = np.array([target.matrix_shape for target in self.targets], np.int64)[parts.owners]
        stops = np.cumsum(lengths.sum(axis=1))
        codes = np.empty(stops[-1], np.int32)
        firsts = np.stack([stops - lengths.sum(axis=1), stops - lengths[:, 0]], axis=1)

        def fill(places: Array, block: Components) -> None:
            for which, sides in enumerate(block.sides):
                for side in (part for whole in sides for part in whole.slices()):
                    numbers = integers(side.rows, step)
                    for first, row in zip(firsts[places[side.places], which].tolist(), numbers, strict=True):
                        codes[first : first + len(row)] = row

        parts.each(fill)
        return codes


def _bisect(falling: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Return about the smallest step between `low` and `high` at which a falling function is at most `wanted`."""
    while high / low > 1 + _STEP_ERROR:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if falling(middle) <= wanted else (middle, high)
    return high


# --- limits of ranks ------------------------------------------------------------------------------------------------


def _rank_limits(lora: LoraAdapter, options: LowRankOptions, context: FitContext) -> list[int]:
    """Return the largest rank that the options allow in each target. Raise E-OPTION."""
    if (options.dynamic_method is None) != (options.dynamic_param is None):
        raise OptionError(f"{spelled('dynamic_method')} and {spelled('dynamic_param')} go together")
    check_range(options, "rank", 1)
    most = options.rank or MAX_RANK
    if options.dynamic_method is None:
        return [most] * len(lora.targets)
    if context.metric(lora.targets[0]) is None:
        spectra = svd.spectra(lora.targets)
    else:
        spectra = [svd.singular_values(pair, context.metric(pair)) for pair in lora.targets]
    return [min(most, _dynamic_rank(s, options)) for s in spectra]


def _dynamic_rank(s: F64, options: LowRankOptions) -> int:
    """The rank that sd-scripts' resize picks for a spectrum; at least 1."""
    param = options.dynamic_param
    if options.dynamic_method is None or param is None or not s.any():
        return len(s)
    if options.dynamic_method == "sv_ratio":
        if param < 1:
            raise OptionError(f"{spelled('dynamic_param')} is {param}; sv_ratio takes a number of at least 1")
        return max(1, int(np.sum(s > s[0] / param)))
    if not 0 < param <= 1:
        raise OptionError(
            f"{spelled('dynamic_param')} is {param}; {options.dynamic_method} takes a share above 0, at most 1"
        )
    mass = np.cumsum(s * s if options.dynamic_method == "sv_fro" else s)
    wanted = mass[-1] * (param**2 if options.dynamic_method == "sv_fro" else param)
    return int(min(np.searchsorted(mass, wanted * (1 - 1e-12)) + 1, len(s)))
