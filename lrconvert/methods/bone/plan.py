"""Which block each target gets: options, what blocks of every rank would keep, and the search under a budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from lrconvert.core.errors import OptionError
from lrconvert.core.limits import MAX_RANK
from lrconvert.core.options import option
from lrconvert.core.wording import spelled
from lrconvert.lora import svd
from lrconvert.lora.adapter import MAGNITUDES, LoraAdapter, LoraTarget, Target
from lrconvert.lora.base_weights import BaseWeights
from lrconvert.lora.input_statistics import Moment
from lrconvert.methods.base import Budget, FitContext
from lrconvert.methods.bone import bat_fit
from lrconvert.methods.bone.fit import Classes, counts, factors, fold, per_class, upper_root
from lrconvert.methods.bone.form import Config, complete
from lrconvert.methods.shared.options import bits_option, check_range, within
from lrconvert.methods.shared.widths import ENERGY_LOST, WIDTHS, concave_hull, groups_of

DEFAULT_RANK = 64  # PEFT's
_AT_ONCE = 1 << 20  # numbers of factors of equal shapes that are looked at together
_MOST = 1024  # the largest rank that a search tries: each costs its cube; --rank may be larger


@dataclass(frozen=True)
class BoneOptions:
    """The options of `lora-to-bone` and `lora-to-bat`."""

    variant: str = option(
        "bone",
        "bone: one number per output and row of the block. mini: the block repeats along outputs too. bat: the "
        "block is multiplied with the base's own; needs --base.",
        choices=("bone", "mini", "bat"),
    )
    rank: int | None = option(
        None,
        "Rows of every block (at most the width that it repeats along). Default: chosen per target by the size "
        "asked for; 64 without one.",
    )
    mini_rank: int | None = option(
        None, "Columns of every block of --variant mini; divides every output width. Default: chosen."
    )
    shard: str = option(
        "in",
        "Side along which blocks repeat: in (as in MiSS; what statistics help), out, or auto (per target, by what "
        "a bit buys).",
        choices=("in", "out", "auto"),
    )
    bits: str = bits_option(auto="the best")
    group_size: int = option(0, "Numbers that share a scale; 0: one scale per row.")
    peft_compatible: bool = option(False, "Only what PEFT's MiSS can express: shards along inputs, one rank for all.")


# --- planning -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    """One block that a target may have: the energy that it keeps, and `noise`: what it loses of that, per share of a
    row's energy that quantizing loses."""

    rank: int
    turned: bool
    columns: int
    kept: float
    noise: float

    def value(self, bits: int) -> float:
        return self.kept - ENERGY_LOST[bits] * self.noise

    def cost(self, bits: int, group_size: int) -> int:
        scales = 16 * groups_of(self.columns, group_size) if bits < 16 else 0
        return self.rank * (self.columns * bits + scales)


def _points_in(
    pairs: Sequence[LoraTarget], metric: Moment | None, ranks: Sequence[int], columns: Sequence[int]
) -> list[list[_Point]]:
    """Blocks along inputs of targets with factors of equal shapes, of one target under a metric: for each rank and
    number of columns. No update is formed: all is in the k-dimensional coordinates of the source."""
    stacked = [np.stack(side) for side in zip(*map(factors, pairs), strict=True)]
    left, right = stacked if metric is None else [side[0] for side in stacked]
    classes = Classes(right, metric)
    squares = {}
    for width in columns:
        folded = fold(left.mT, width)
        squares[width] = svd.products(folded, folded) * (width / left.shape[-2])
    points: list[list[_Point]] = [[] for _ in pairs]
    for rank in sorted(ranks, reverse=True):
        products, gram = classes.at(rank)
        fitted = per_class((products, gram))
        alone = gram if metric is None else upper_root(gram).diagonal() ** 2
        kept, noise = svd.products(fitted, products), svd.products(fitted * alone, fitted)
        for width, square in squares.items():
            values = ((square * part).reshape(len(pairs), -1).sum(axis=1).tolist() for part in (kept, noise))
            for own, one, two in zip(points, *values, strict=True):
                own.append(_Point(rank, False, width, one, two))
    return points


def _points_out(pair: LoraTarget, metric: Moment | None, ranks: Sequence[int]) -> Iterator[_Point]:
    """Blocks along outputs."""
    left, right = factors(pair)
    energies = svd.products(right if metric is None else metric.times(right), right)
    squares = energies if metric is None else svd.products(right, right)
    mean = 1.0 if metric is None else float(metric.squares.mean(dtype=np.float64))
    for rank in ranks:
        folded = fold(left.T, rank)
        square = svd.products(folded / counts(rank, len(left)), folded)
        kept, noise = float(np.sum(square * energies)), mean * float(np.sum(square * squares))
        yield _Point(rank, True, right.shape[1], kept, noise)


def _grid(most: int, fine: int = _MOST) -> list[int]:
    """Ranks up to `most`: 1 to 7, then 4, 5, 6 and 7 times powers of two, so that sums serve several of them; above
    `fine` powers of two alone, since a rank costs its cube."""
    ranks = {base << n for base in (1, 2, 3, 4, 5, 6, 7) for n in range(most.bit_length())}
    return sorted(r for r in ranks if r <= most and (r <= fine or r & (r - 1) == 0))


def _divisors(number: int, most: int) -> list[int]:
    return [r for r in range(1, min(number, most) + 1) if number % r == 0]


def _hull(points: Sequence[_Point], bits: int, group_size: int) -> list[tuple[int, float, _Point | None]]:
    """[(bits, value, block)] along the concave hull, from no block at all."""
    rising = sorted(((p.cost(bits, group_size), p.value(bits), p) for p in points), key=lambda point: point[:2])
    first: tuple[int, float, _Point | None] = (0, 0.0, None)
    return concave_hull([first, *rising])


def needed(base: BaseWeights | None) -> BaseWeights:
    """Return the base's weights. Raise E-OPTION without them."""
    if base is None:
        raise OptionError(
            "the updates of Bat depend on the weights of the base", fix=f"give it with {spelled('base', ...)}"
        )
    return base


Choice = list["_Point | None"]  # a block, or none, of each target


class Plan:
    """The search for the configuration that keeps most."""

    def __init__(self, lora: LoraAdapter, options: BoneOptions, budget: Budget | None, context: FitContext) -> None:
        self.lora, self.options, self.budget, self.context = lora, options, budget, context
        self.targets = lora.shapes()
        self.outputs = sum(target.out_features for target in self.targets)
        self.mini, self.bat = options.variant == "mini", options.variant == "bat"
        self._check()
        auto = WIDTHS if budget is not None else WIDTHS[:1]
        self.widths = auto if options.bits == "auto" else (int(options.bits),)
        self.mini_ranks = self._mini_ranks()
        sides = {"in": (False,), "out": (True,), "auto": (False, True)}[options.shard]
        self.sides = (False,) if self.mini or self.bat or options.peft_compatible else sides

    def _check(self) -> None:
        """Raise E-OPTION on options that are out of range or contradict each other."""
        options = self.options
        check_range(options, "rank", 1, MAX_RANK)
        check_range(options, "group_size", 0)
        if options.mini_rank is not None and not self.mini:
            raise OptionError(f"{spelled('mini_rank')} is of {spelled('variant', 'mini')}")
        if options.shard == "out" and (self.mini or self.bat or options.peft_compatible):
            others = [spelled("variant", "mini"), spelled("variant", "bat"), spelled("peft_compatible", True)]
            raise OptionError(f"shards along outputs contradict {others[0]}, {others[1]} and {others[2]}")
        if not self.bat:
            return
        needed(self.context.base)
        if any(extra.use in MAGNITUDES for extra in self.lora.extras):
            raise OptionError(
                "Bat cannot carry DoRA's magnitudes along", fix=f"bake them with {spelled('bake_dora', ...)}"
            )
        if options.rank is not None:
            for target in self.targets:
                if math.gcd(*target.matrix_shape) % options.rank:
                    shape = target.matrix_shape
                    what = f"{spelled('rank')} is {options.rank}, which does not divide {target.name!r} {shape}"
                    raise OptionError(what, fix="Bat cuts both sides into blocks; leave it out, or take another")

    def _mini_ranks(self) -> list[int]:
        """Return the numbers of columns to try; [0] unless the variant is mini. Raise E-OPTION."""
        if not self.mini:
            return [0]
        common = math.gcd(*(target.out_features for target in self.targets))
        mini_rank = self.options.mini_rank
        if mini_rank is None:
            return [common] if self.budget is None else _divisors(common, common)
        if mini_rank < 1 or common % mini_rank:
            raise OptionError(
                f"{spelled('mini_rank')} is {mini_rank}; {common} or a divisor of it divides the outputs of all targets"
            )
        return [mini_rank]

    def best(self) -> Config:
        """Return the config that keeps most of those that fit. Raise E-BUDGET."""
        options, budget = self.options, self.budget
        if budget is None or options.rank is not None or options.peft_compatible:
            candidates = list(self._uniform())
        else:
            points = self._all_points(list(map(self._ranks, self.lora.targets)))
            candidates = [c for bits in self.widths for m in self.mini_ranks for c in self._spread(points, bits, m)]
            candidates += [(0.0, config) for config in self._smallest(points)]
        for _, config in sorted(candidates, key=lambda candidate: -candidate[0]):
            if budget is None or budget.fits(config):
                return config
        assert budget is not None
        return within(budget, min((config for _, config in candidates), key=budget.size))

    # --- what is possible ---

    def _ranks(self, pair: LoraTarget) -> dict[bool, list[int]]:
        """The ranks to try along each side: none whose block is larger than the budget, or than the LoRA itself."""
        assert self.budget is not None
        out, inner = pair.target.matrix_shape
        most = min(8 * self.budget.limit, 16 * pair.rank * (out + inner))
        affordable = 8 * self.budget.limit / (min(self.widths) * self.outputs)
        ranks = {}
        for side in self.sides:
            tiled, other = (out, inner) if side else (inner, out)
            columns = min(self.mini_ranks) or other
            cap = max(1, min(tiled, _MOST, most // (columns * min(self.widths))))
            fine = max(32, int(4 * affordable))
            ranks[side] = _divisors(math.gcd(out, inner), min(cap, fine)) if self.bat else _grid(cap, fine)
        return ranks

    def _all_points(self, ranks: Sequence[Mapping[bool, Sequence[int]]]) -> list[list[_Point]]:
        """The blocks that each target may have, at its `ranks`; in the plain norm of some of equal shapes at once."""
        if self.bat or self.context.statistics is not None:
            return [self._points([pair], own)[0] for pair, own in zip(self.lora.targets, ranks, strict=True)]
        alike: dict[tuple[Any, ...], list[int]] = {}
        for t, (pair, own) in enumerate(zip(self.lora.targets, ranks, strict=True)):
            alike.setdefault((pair.target.matrix_shape, pair.rank, *map(tuple, own.values())), []).append(t)
        points: dict[int, list[_Point]] = {}
        for (shape, rank, *_), places in alike.items():
            count = max(1, _AT_ONCE // (rank * sum(shape)))
            for group in (places[n : n + count] for n in range(0, len(places), count)):
                points |= zip(group, self._points([self.lora.targets[t] for t in group], ranks[group[0]]), strict=True)
        return [points[t] for t in range(len(ranks))]

    def _points(self, pairs: Sequence[LoraTarget], ranks: Mapping[bool, Sequence[int]]) -> list[list[_Point]]:
        """The same of targets of equal shapes and ranks; of one alone with a base or a metric."""
        pair, metric = pairs[0], self.context.metric(pairs[0])
        if self.bat:
            base, out = needed(self.context.base), pair.target.out_features
            return [[_Point(rank, False, out, *bat_fit.worth(pair, rank, metric, base)) for rank in ranks[False]]]
        columns = self.mini_ranks if self.mini else [pair.target.out_features]
        along_inputs = _points_in(pairs, metric, ranks.get(False, ()), columns)
        along_outputs = (_points_out(pair, metric, ranks.get(True, ())) for pair in pairs)
        return [[*one, *two] for one, two in zip(along_inputs, along_outputs, strict=True)]

    def _config(self, choice: Choice, bits: int, mini_rank: int) -> Config:
        ranks = [point.rank if point else 0 for point in choice]
        return self._complete(ranks, [point is not None and point.turned for point in choice], bits, mini_rank)

    def _complete(self, ranks: Sequence[int], turned: Sequence[bool], bits: int, mini_rank: int) -> Config:
        group = self.options.group_size
        return complete(self.targets, ranks, turned, bits=bits, mini_rank=mini_rank, group_size=group, bat=self.bat)

    # --- one rank for all ---

    def _uniform_ranks(self) -> list[int]:
        """The ranks to try for all targets at once."""
        common = math.gcd(*(n for t in self.targets for n in t.matrix_shape))
        widest = min(t.out_features if self.sides == (True,) else t.in_features for t in self.targets)
        if self.options.rank is not None or self.budget is None:
            rank = self.options.rank or (_divisors(common, DEFAULT_RANK)[-1] if self.bat else DEFAULT_RANK)
            return [min(rank, widest) if self.options.peft_compatible else rank]
        most = max(1, min(widest, _MOST, 8 * self.budget.limit // (min(self.widths) * len(self.targets))))
        return _divisors(common, most) if self.bat else _grid(most)

    def _uniform(self) -> Iterator[tuple[float, Config]]:
        """(value, config) of every width, number of columns and rank to try that may fit, the smallest rank always."""
        ranks = self._uniform_ranks()
        if self.budget is None and len(self.sides) == 1:  # nothing to choose
            same = [min(ranks[0], t.out_features if self.sides[0] else t.in_features) for t in self.targets]
            yield 0.0, self._complete(same, [self.sides[0]] * len(same), self.widths[0], self.mini_ranks[0])
            return
        possible = []
        for target in self.targets:
            sizes = {True: target.out_features, False: target.in_features}
            possible.append({side: sorted({min(r, sizes[side]) for r in ranks}) for side in self.sides})
        points = [{(p.rank, p.turned, p.columns): p for p in own} for own in self._all_points(possible)]
        for bits in self.widths:
            for mini_rank in self.mini_ranks:
                for rank in ranks:
                    choice = [
                        self._point_of(own, t, rank, bits, mini_rank)
                        for t, own in zip(self.targets, points, strict=True)
                    ]
                    payload = sum(point.cost(bits, self.options.group_size) for point in choice)
                    if self.budget is not None and payload > 8 * self.budget.limit and rank != ranks[0]:
                        break
                    config = self._config(list(choice), bits, mini_rank)
                    yield sum(point.value(bits) for point in choice), config

    def _point_of(
        self, points: Mapping[tuple[int, bool, int], _Point], target: Target, rank: int, bits: int, mini_rank: int
    ) -> _Point:
        """The block of a rank, along the side where a bit buys more."""
        out, inner = target.matrix_shape
        keys = {True: (min(rank, out), True, inner), False: (min(rank, inner), False, mini_rank or out)}
        blocks = [points[keys[side]] for side in self.sides]
        return max(blocks, key=lambda p: p.value(bits) / p.cost(bits, self.options.group_size))

    # --- ranks by what a bit buys ---

    def _spread(self, points: Sequence[Sequence[_Point]], bits: int, mini_rank: int) -> Iterator[tuple[float, Config]]:
        """(value, config) of the allocation with the most payload that fits, if there is one.

        Steps along the concave hulls, best first; the overhead depends a little on what is chosen, so the payload
        shrinks by what the file is too large, until it fits.
        """
        assert self.budget is not None
        fitting = [[p for p in own if not mini_rank or p.columns == mini_rank] for own in points]
        hulls = [_hull(own, bits, self.options.group_size) for own in fitting]
        steps = sorted(
            (-(two[1] - one[1]) / (two[0] - one[0]), t, n)
            for t, hull in enumerate(hulls)
            for n, (one, two) in enumerate(pairwise(hull), 1)
        )
        payload = 8 * self.budget.limit
        while payload > 0:
            reached, left, value = [0] * len(hulls), payload, 0.0
            for _, t, n in steps:
                cost = hulls[t][n][0] - hulls[t][n - 1][0]
                if reached[t] == n - 1 and cost <= left:
                    reached[t], left = n, left - cost
                    value += hulls[t][n][1] - hulls[t][n - 1][1]
            if not any(reached):
                return
            config = self._config([hull[n][2] for hull, n in zip(hulls, reached, strict=True)], bits, mini_rank)
            over = self.budget.size(config) - self.budget.limit
            if over <= 0:
                yield value, config
                return
            payload -= left + 8 * over

    def _smallest(self, points: Sequence[Sequence[_Point]]) -> Iterator[Config]:
        """A block of one row in one target: at each width, where it is cheapest; of equal ones, where it keeps most."""
        flat = [(t, point) for t, own in enumerate(points) for point in own]
        group = self.options.group_size
        kinds = {(point.rank, point.columns): point for _, point in flat}
        for bits in self.widths:
            costs = {kind: point.cost(bits, group) for kind, point in kinds.items()}
            least = min(costs.values())
            cheapest = {kind for kind, cost in costs.items() if cost == least}
            which, point = max(
                (entry for entry in flat if (entry[1].rank, entry[1].columns) in cheapest), key=lambda e: e[1].kept
            )
            choice: Choice = [point if t == which else None for t in range(len(points))]
            yield self._config(choice, bits, point.columns if self.mini else 0)
