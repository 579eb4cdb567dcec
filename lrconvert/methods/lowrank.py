"""Low rank with quantized factors: the honest baseline.

    delta_W = B @ A,   A[j] = scale_A[j] * a[j],   B[:, j] = scale_B[j] * b[j]

Rank-one components come from the SVD of the source update, largest first. Each component is stored at its own width:
``a[j]`` (in,) and ``b[j]`` (out,) are odd integers of 1, 2, 3, 4 or 8 bit with one scale per component, side and group,
or 16-bit numbers. 1 bit is sign times mean magnitude. Cutting at 16 bit is the optimal low-rank approximation
(Eckart and Young, 1936); what a byte buys is then spent jointly on rank and bits over all targets.

Stored tensors, in the order of their declaration (components: by target, then largest first):

=============  ======  ==========================================================================================
``counts``     index   (targets, levels): how many components of a target have each width of ``levels``, widest first
``half``       half    16-bit components: for each A row, then B column
``codes.<q>``  code    q-bit components: for each A row, then B column
``scales``     half    quantized components: scales of the A row's groups, then of the B column's
=============  ======  ==========================================================================================

Bits below 16 follow the sd-scripts vocabulary for choosing ranks (``sv_ratio``, ``sv_fro``, ``sv_cumulative``) and add
the global byte budget. The error of a quantized pair is fed back: with one factor quantized the other is solved again
in closed form, in turn, while that helps.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from lrconvert.core.dtypes import F32, F64, Array
from lrconvert.core.errors import CanonicalError, OptionError
from lrconvert.core.limits import MAX_DIM, MAX_RANK
from lrconvert.core.options import option
from lrconvert.io import fields
from lrconvert.lora import svd
from lrconvert.lora.adapter import LoraAdapter, LoraTarget, Target
from lrconvert.lora.packing import TensorSpec
from lrconvert.methods.base import Budget, Command, FitContext, Method, Tensors
from lrconvert.methods.shared import mixed_widths, payload
from lrconvert.methods.shared.mixed_widths import MAX_LEVELS, MixedWidths, numbers_name
from lrconvert.methods.shared.options import bits_option, check_range, within
from lrconvert.methods.shared.ranks import check_ranks
from lrconvert.methods.shared.widths import ENERGY_LOST, WIDTHS, concave_hull, groups_of, spread_scales

if TYPE_CHECKING:
    from lrconvert.lora.input_statistics import Moment

_ROUNDS = 6  # alternations of quantizing one factor and solving the other


@dataclass(frozen=True)
class LowRankOptions:
    """The options of `lora-to-lowrank`."""

    bits: str = bits_option()
    rank: int | None = option(None, "Keep this rank in every target (at most).")
    dynamic_method: str | None = option(
        None,
        "Choose ranks per target by singular values: sv_ratio (down to 1/param of the largest), sv_fro (keep this "
        "share of the Frobenius norm), sv_cumulative (of the sum).",
        choices=("sv_ratio", "sv_fro", "sv_cumulative"),
    )
    dynamic_param: float | None = option(None, "The parameter of --dynamic-method.")
    group_size: int = option(0, "Numbers that share a scale; 0: one scale per component and side.")


@dataclass(frozen=True)
class Config(MixedWidths):
    """`counts` are those of components. `group_size`: numbers per scale, 0 for whole rows (always if no row that has
    scales is longer)."""

    group_size: int = 0


@dataclass(frozen=True)
class Header:
    """The JSON part of a config."""

    levels: mixed_widths.Levels
    group_size: Annotated[int, fields.between(0, MAX_DIM)]
    max_count: mixed_widths.MaxCount


def complete(
    targets: Sequence[Target], levels: Sequence[int], counts: Sequence[Sequence[int]], group_size: int
) -> Config:
    """Return the one Config of these components: the group size is 0 if no row or column with scales is longer."""
    scaled = [any(n for q, n in zip(levels, row, strict=True) if q != 16) for row in counts]
    longest = max((max(t.matrix_shape) for t, has_scales in zip(targets, scaled, strict=True) if has_scales), default=0)
    return Config(tuple(levels), tuple(tuple(row) for row in counts), group_size if group_size < longest else 0)


def _scales_of(target: Target, group_size: int) -> int:
    """Scales of one component."""
    return sum(groups_of(length, group_size) for length in target.matrix_shape)


@lru_cache(maxsize=8)
def _starts(config: Config, targets: tuple[Target, ...]) -> tuple[tuple[dict[int, int], int], ...]:
    """For each target: where its numbers begin in the tensor of each width, and where its scales begin. The last entry
    holds the totals."""
    numbers = dict.fromkeys(config.levels, 0)
    scales = 0
    starts: list[tuple[dict[int, int], int]] = []
    for target, row in zip(targets, config.counts, strict=True):
        starts.append((dict(numbers), scales))
        for q, n in zip(config.levels, row, strict=True):
            numbers[q] += n * sum(target.matrix_shape)
            scales += n * _scales_of(target, config.group_size) if q != 16 else 0
    return (*starts, (numbers, scales))


class LowRank(Method):
    """See the module's docstring."""

    id = "lowrank"
    version = 1
    title = "low rank, quantized factors"
    commands = (Command("lora-to-lowrank", "Cut the rank and quantize the factors: the baseline of every other form."),)
    Options = LowRankOptions
    searches = ({},)
    uses = ("statistics",)
    examples = (
        {"bits": "16"},
        {"bits": "8", "group_size": 16},
        {"bits": "4", "rank": 3},
        {"bits": "3", "dynamic_method": "sv_fro", "dynamic_param": 0.95},
        {"bits": "2"},
        {"bits": "1", "group_size": 12},
        {"target_size": 2000},
    )
    default_ratio = None

    # --- what the file holds ---

    def header(self, config: Config) -> dict[str, Any]:
        return dict(fields.as_json(Header(config.levels, config.group_size, config.max_count)))

    def layout_specs(self, header: Mapping[str, Any], targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        read = fields.read(Header, header, "method.config")
        return (mixed_widths.counts_spec(targets, read.levels, read.max_count),)

    def layout(self, config: Config) -> dict[str, Array]:
        return {"counts": np.array(config.counts, np.uint32)}

    def config(self, header: Mapping[str, Any], layout: Tensors, targets: Sequence[Target]) -> Config:
        read = fields.read(Header, header, "method.config")
        counts = mixed_widths.read_counts(layout["counts"], read.max_count)
        config = complete(targets, read.levels, counts, read.group_size)
        check_ranks(targets, config.ranks)
        if config.group_size != read.group_size:
            raise CanonicalError("method.config.group_size must be 0: no row or column with scales is longer")
        return config

    def specs(self, config: Config, targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        return tuple(mixed_widths.numbers_specs(*_starts(config, tuple(targets))[-1]))

    def ranks(self, config: Config, targets: Sequence[Target]) -> Sequence[int]:
        return config.ranks

    # --- using it ---

    def expand(
        self, config: Config, targets: Sequence[Target], values: Mapping[str, Any], which: int, xp: Any
    ) -> tuple[Any, Any]:
        out, inner = targets[which].matrix_shape
        starts, scale_start = _starts(config, tuple(targets))[which]
        groups, group_size = groups_of(inner, config.group_size), config.group_size
        rows_a, rows_b = [], []
        for q, n in zip(config.levels, config.counts[which], strict=True):
            if n == 0:
                continue
            block = values[numbers_name(q)][starts[q] : starts[q] + n * (out + inner)].reshape(n, inner + out)
            a, b = block[:, :inner], block[:, inner:]
            if q != 16:
                scale_stop = scale_start + n * _scales_of(targets[which], group_size)
                scales = values["scales"][scale_start:scale_stop].reshape(n, -1)
                a = a * spread_scales(scales[:, :groups], inner, group_size)
                b = b * spread_scales(scales[:, groups:], out, group_size)
                scale_start = scale_stop
            rows_a.append(a)
            rows_b.append(b)
        if not rows_a:
            return xp.zeros((0, inner), dtype=xp.float32), xp.zeros((out, 0), dtype=xp.float32)
        return xp.concatenate(rows_a), xp.concatenate(rows_b).T

    # --- making it ---

    def plan(self, lora: LoraAdapter, options: LowRankOptions, budget: Budget | None, context: FitContext) -> Config:
        spectra = [svd.singular_values(pair, context.metric(pair)) for pair in lora.targets]
        limits = _rank_limits(spectra, options)
        if not any(limits):
            limits = [min(1, len(s)) for s in spectra]  # an all-zero adapter still makes a valid file
        if budget is None:
            q = 16 if options.bits == "auto" else int(options.bits)
            return complete(lora.shapes(), (q,), [(n,) for n in limits], options.group_size)
        search = _Search(lora.shapes(), spectra, limits, options.group_size, budget)
        if options.bits != "auto":
            return search.best((int(options.bits),))
        mixed = search.best(WIDTHS)
        return mixed if len(mixed.levels) <= MAX_LEVELS else search.best(mixed.commonest())

    def fit(self, lora: LoraAdapter, config: Config, context: FitContext) -> dict[str, Array]:
        targets = lora.shapes()
        arrays = payload.zeros(self.specs(config, targets))
        starts = _starts(config, targets)
        for which, pair in enumerate(lora.targets):
            numbers, scale_start = starts[which]
            for q, (rows, scales) in _fit_target(pair, config, which, context.metric(pair)).items():
                payload.put(arrays[numbers_name(q)], numbers[q], rows)
                if q != 16:
                    scale_start = payload.put(arrays["scales"], scale_start, scales)
            context.progress((which + 1) / len(lora.targets), pair.target.name)
        return payload.rounded(arrays)


METHOD = LowRank()


# --- ranks and widths -----------------------------------------------------------------------------------------------


def _rank_limits(spectra: Sequence[F64], options: LowRankOptions) -> list[int]:
    """Return the largest rank that the options allow in each target. Raise E-OPTION."""
    if (options.dynamic_method is None) != (options.dynamic_param is None):
        raise OptionError("--dynamic-method and --dynamic-param go together")
    check_range(options, "rank", 1)
    check_range(options, "group_size", 0)
    return [min(options.rank or MAX_RANK, _dynamic_rank(s, options), len(s)) for s in spectra]


def _dynamic_rank(s: F64, options: LowRankOptions) -> int:
    """The rank that sd-scripts' resize picks for a spectrum; at least 1."""
    param = options.dynamic_param
    if options.dynamic_method is None or param is None or not s.any():
        return len(s)
    if options.dynamic_method == "sv_ratio":
        if param < 1:
            raise OptionError(f"--dynamic-param is {param}; sv_ratio takes a number of at least 1")
        return max(1, int(np.sum(s > s[0] / param)))
    if not 0 < param <= 1:
        raise OptionError(f"--dynamic-param is {param}; {options.dynamic_method} takes a share above 0, at most 1")
    mass = np.cumsum(s * s if options.dynamic_method == "sv_fro" else s)
    wanted = mass[-1] * (param**2 if options.dynamic_method == "sv_fro" else param)
    return int(min(np.searchsorted(mass, wanted * (1 - 1e-12)) + 1, len(s)))


def _component_bits(target: Target, q: int, group_size: int) -> int:
    """Bits that one component of width q costs in the payload."""
    return sum(target.matrix_shape) * q + (16 * _scales_of(target, group_size) if q != 16 else 0)


@dataclass(frozen=True)
class _Step:
    """From one width of a component to the next: more bits, a larger share of its energy."""

    width: int
    bits: int
    share: float


def _steps(target: Target, levels: Sequence[int], group_size: int) -> list[_Step]:
    """The steps along the concave hull of kept energy against bits."""
    points = ((_component_bits(target, q, group_size), (1 - ENERGY_LOST[q]) ** 2, q) for q in sorted(levels))
    hull = concave_hull([(0, 0.0, 0), *points])
    return [_Step(two[2], two[0] - one[0], two[1] - one[1]) for one, two in pairwise(hull)]


@dataclass(frozen=True, eq=False)
class _Search:
    """Finds how many components of each width a byte budget pays for; `limits` are the largest ranks."""

    targets: Sequence[Target]
    spectra: Sequence[F64]
    limits: Sequence[int]
    group_size: int
    budget: Budget

    def best(self, levels: Sequence[int]) -> Config:
        """Return the allocation with the most payload that still fits. Raise E-BUDGET.

        The overhead depends a little on the allocation, so the payload is found by bisection on the exact file size.
        """
        low, high = 0.0, 8.0 * self.budget.limit  # `high` is out of reach: a file of only payload
        best: Config | None = None
        while high - low >= 64:
            middle = (low + high) / 2
            config = self._allocate(levels, middle)
            if not config.levels:
                low = middle
            elif self.budget.fits(config):
                best, low = config, middle
            else:
                high = middle
        return within(self.budget, self._smallest(min(levels))) if best is None else best

    def _allocate(self, levels: Sequence[int], bits: float) -> Config:
        """Greedy joint allocation: while bits last, the step (a new component, or more bits for one) that buys the most
        energy per bit. Steps of one component lie on the concave hull of its rate-energy curve, so greedy is optimal up
        to the last step; components of a target become better in order."""
        taken = [[0] * limit for limit in self.limits]  # steps of each component
        heap: list[tuple[float, int, int, int]] = []
        steps = [_steps(target, levels, self.group_size) for target in self.targets]

        def push(t: int, j: int) -> None:
            if taken[t][j] < len(steps[t]):
                step = steps[t][taken[t][j]]
                gain = -(float(self.spectra[t][j]) ** 2) * step.share / step.bits
                heapq.heappush(heap, (gain, t, j, step.bits))

        for t, limit in enumerate(self.limits):
            for j in range(limit):
                push(t, j)
        while heap:
            _, t, j, cost = heapq.heappop(heap)
            if cost <= bits and self.spectra[t][j] != 0:
                bits -= cost
                taken[t][j] += 1
                push(t, j)
        return self._config(
            [sorted((steps[t][n - 1].width for n in row if n), reverse=True) for t, row in enumerate(taken)]
        )

    def _config(self, widths: Sequence[Sequence[int]]) -> Config:
        """The Config of components of these widths, with only the levels that are used."""
        levels = tuple(q for q in WIDTHS if any(q in row for row in widths))
        return complete(self.targets, levels, [[row.count(q) for q in levels] for row in widths], self.group_size)

    def _smallest(self, q: int) -> Config:
        """One component of width q, in the target where it is cheapest; of equal ones, where it holds most."""
        possible = [t for t, limit in enumerate(self.limits) if limit]
        cheapest = min(
            possible, key=lambda t: (_component_bits(self.targets[t], q, self.group_size), -self.spectra[t][0])
        )
        return self._config([[q] if t == cheapest else [] for t in range(len(self.limits))])


# --- quantizing -----------------------------------------------------------------------------------------------------


def _quantize_all(
    rows: F64, widths: Sequence[int], group_size: int, weights: Array | None = None
) -> tuple[dict[int, tuple[Array, F32]], F64]:
    """`mixed_widths.quantize` of rows whose widths differ: stored parts by width, and all values."""
    parts, values = {}, np.empty_like(rows)
    for q, mask in mixed_widths.masks(widths).items():
        codes, scales, values[mask] = mixed_widths.quantize(rows[mask], q, group_size, weights)
        parts[q] = codes, scales
    return parts, values


def _solve(gram: F64, right: F64) -> F64:
    """gram^-1 @ right by least squares, so that equal or zero components do no harm."""
    return np.asarray(np.linalg.lstsq(gram, right, rcond=1e-9)[0], np.float64)


def _fit_target(pair: LoraTarget, config: Config, which: int, metric: Moment | None) -> dict[int, tuple[Array, F32]]:
    """{width: (numbers (n, in + out), scales (n, groups))} of one target.

    Alternates: quantize A; solve B for it (the exact minimizer) and quantize it; solve A for that; and keeps the best.
    All in the r-dimensional coordinates of the source: the dense update never appears. With a `metric` everything is
    measured in it; the scales of A see its diagonal.
    """
    widths = config.widths(which)
    rank = len(widths)
    if rank == 0:
        return {}
    factors = svd.svd(pair, metric)
    A, B = svd.balanced(factors, rank)  # (k, in), (out, k)
    full_left, full_right = factors.U * factors.s, factors.Vt  # delta = full_left @ full_right
    squares = None if metric is None else metric.squares
    total = float(np.sum(factors.s**2))
    best_error, best = np.inf, None
    stuck = 0
    for _ in range(_ROUNDS if any(q != 16 for q in widths) else 1):
        parts_a, values_a = _quantize_all(A, widths, config.group_size, squares)
        weighed = values_a if metric is None else metric.times(values_a)
        if best is not None:
            B = full_left @ _solve(weighed @ values_a.T, weighed @ full_right.T).T
        parts_b, values_b = _quantize_all(B.T, widths, config.group_size)
        cross = np.sum((values_b @ full_left) * (weighed @ full_right.T))
        error = total - 2 * float(cross) + float(np.sum((weighed @ values_a.T) * (values_b @ values_b.T)))
        if error < best_error * (1 - 1e-4):
            best_error, best, stuck = error, (parts_a, parts_b), 0
        else:
            best = best or (parts_a, parts_b)
            stuck += 1
            if stuck == 2:
                break
        A = _solve(values_b @ values_b.T, values_b @ full_left) @ full_right
    assert best is not None
    joined = {}
    for q, (codes, scales) in best[0].items():
        codes_b, scales_b = best[1][q]
        joined[q] = np.concatenate([codes, codes_b], axis=1), np.concatenate([scales, scales_b], axis=1)
    return joined
