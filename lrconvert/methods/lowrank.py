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
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from lrconvert.core.dtypes import F32, F64, Array
from lrconvert.core.errors import (
    BudgetError,
    CanonicalError,
    JsonSyntaxError,
    LimitError,
    MissingFieldError,
    OptionError,
    UnknownFieldError,
)
from lrconvert.core.limits import MAX_DIM, MAX_RANK
from lrconvert.lora import packing, svd
from lrconvert.lora.adapter import LoraAdapter, LoraTarget, Target
from lrconvert.lora.input_statistics import Moment
from lrconvert.lora.packing import TensorSpec
from lrconvert.methods.base import Budget, Command, FitContext, Method, Tensors

WIDTHS = (16, 8, 4, 3, 2, 1)
# Share of the energy of a Gaussian row that is lost at each width (uniform quantizer, best scale): what planning
# assumes before anything is quantized.
_LOST = {16: 0.0, 8: 1.2e-4, 4: 0.0115, 3: 0.0374, 2: 0.119, 1: 0.363}
_MAX_LEVELS = 3  # widths in one file: each costs a tensor's header and digest, a fourth buys next to nothing
_ROUNDS = 6  # alternations of quantizing one factor and solving the other


@dataclass(frozen=True)
class LowRankOptions:
    """What a user may ask for."""

    bits: str = field(
        default="auto",
        metadata={
            "help": "Bits per number: 16, 8, 4, 3, 2, 1, or auto (16 without a size; under a size, the best mix).",
            "choices": ("auto", "16", "8", "4", "3", "2", "1"),
        },
    )
    rank: int | None = field(default=None, metadata={"help": "Keep this rank in every target (at most)."})
    dynamic_method: str | None = field(
        default=None,
        metadata={
            "help": "Choose ranks per target by singular values: sv_ratio (down to 1/param of the largest), "
            "sv_fro (keep this share of the Frobenius norm), sv_cumulative (of the sum).",
            "choices": ("sv_ratio", "sv_fro", "sv_cumulative"),
        },
    )
    dynamic_param: float | None = field(default=None, metadata={"help": "The parameter of --dynamic-method."})
    group_size: int = field(
        default=0, metadata={"help": "Numbers that share a scale; 0: one scale per component and side."}
    )


@dataclass(frozen=True)
class Config:
    """`levels`: widths in use, widest first. `counts[t][l]`: components of target t at width levels[l].
    `group_size`: numbers per scale, 0 for whole rows (always if no row that has scales is longer)."""

    levels: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    group_size: int = 0

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sum(row) for row in self.counts)

    def widths(self, which: int) -> tuple[int, ...]:
        """The width of each component of a target, largest component first."""
        return tuple(q for q, n in zip(self.levels, self.counts[which], strict=True) for _ in range(n))


def _group_size(wanted: int, targets: Sequence[Target], levels: Sequence[int], counts: Sequence[Sequence[int]]) -> int:
    """`wanted`, or 0 if no row or column with scales is longer than that: one spelling of the same thing."""
    scaled = [any(n for q, n in zip(levels, row, strict=True) if q != 16) for row in counts]
    longest = max((max(t.matrix_shape) for t, some in zip(targets, scaled, strict=True) if some), default=0)
    return wanted if wanted < longest else 0


def _groups(length: int, group_size: int) -> int:
    return -(-length // group_size) if group_size else 1


@lru_cache(maxsize=8)
def _starts(config: Config, targets: tuple[Target, ...]) -> tuple[tuple[dict[int, int], int], ...]:
    """For each target: where its numbers begin in the tensor of each width, and where its scales begin. The last entry
    holds the totals."""
    at = dict.fromkeys(config.levels, 0)
    scales = 0
    starts: list[tuple[dict[int, int], int]] = []
    for target, row in zip(targets, config.counts, strict=True):
        starts.append((dict(at), scales))
        out, inner = target.matrix_shape
        for q, n in zip(config.levels, row, strict=True):
            at[q] += n * (out + inner)
            if q != 16:
                scales += n * (_groups(out, config.group_size) + _groups(inner, config.group_size))
    return (*starts, (at, scales))


class LowRank(Method):
    """See the module's docstring."""

    id = "lowrank"
    version = 1
    title = "low rank, quantized factors"
    commands = (Command("lora-to-lowrank", "Cut the rank and quantize the factors: the baseline of every other form."),)
    Options = LowRankOptions
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
        most = max((n for row in config.counts for n in row), default=0)
        return {"levels": list(config.levels), "group_size": config.group_size, "max_count": most}

    def layout_specs(self, header: Mapping[str, Any], targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        if set(header) != {"levels", "group_size", "max_count"}:
            wrong = sorted(set(header) ^ {"levels", "group_size", "max_count"})[0]
            raise (UnknownFieldError if wrong in header else MissingFieldError)(f"method.config: field {wrong!r}")
        levels, most, group = header["levels"], header["max_count"], header["group_size"]
        known = isinstance(levels, list) and all(type(q) is int for q in levels)
        if not known or not levels or levels != [q for q in WIDTHS if q in levels]:
            raise JsonSyntaxError(
                f"method.config.levels is {levels!r:.60}; widths of {WIDTHS}, widest first, are allowed"
            )
        if type(most) is not int or not 1 <= most <= MAX_RANK:
            raise LimitError(f"method.config.max_count is {most!r:.40}; 1 to {MAX_RANK} are allowed")
        if type(group) is not int or not 0 <= group <= MAX_DIM:
            raise LimitError(f"method.config.group_size is {group!r:.40}")
        return (packing.index("counts", (len(targets), len(levels)), most + 1),)

    def layout(self, config: Config) -> dict[str, Array]:
        return {"counts": np.array(config.counts, np.uint32)}

    def config(self, header: Mapping[str, Any], layout: Tensors, targets: Sequence[Target]) -> Config:
        counts = layout["counts"]
        if int(counts.max()) != header["max_count"] or not counts.any(axis=0).all():
            raise LimitError("method.config names a width that no component has, or max_count is not the largest count")
        rows = tuple(tuple(int(n) for n in row) for row in counts)
        config = Config(tuple(header["levels"]), rows, header["group_size"])
        for target, rank in zip(targets, config.ranks, strict=True):
            if rank > min(target.matrix_shape):
                raise LimitError(f"target {target.name!r} has rank {rank}, more than its shape {target.matrix_shape}")
        if config.group_size != _group_size(config.group_size, targets, config.levels, rows):
            raise CanonicalError("method.config.group_size must be 0: no row or column with scales is longer")
        return config

    def specs(self, config: Config, targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        totals, scales = _starts(config, tuple(targets))[-1]
        found = [
            packing.half("half", (n,)) if q == 16 else packing.code(f"codes.{q}", (n,), q)
            for q, n in totals.items()
            if n
        ]
        return (*found, *([packing.half("scales", (scales,))] if scales else []))

    def ranks(self, config: Config, targets: Sequence[Target]) -> Sequence[int]:
        return config.ranks

    # --- using it ---

    def expand(
        self, config: Config, targets: Sequence[Target], values: Mapping[str, Any], which: int, xp: Any
    ) -> tuple[Any, Any]:
        out, inner = targets[which].matrix_shape
        starts, scale_at = _starts(config, tuple(targets))[which]
        rows_a, rows_b = [], []
        for q, n in zip(config.levels, config.counts[which], strict=True):
            if n == 0:
                continue
            name = "half" if q == 16 else f"codes.{q}"
            block = values[name][starts[q] : starts[q] + n * (out + inner)].reshape(n, inner + out)
            a, b = block[:, :inner], block[:, inner:]
            if q != 16:
                groups_a, groups_b = _groups(inner, config.group_size), _groups(out, config.group_size)
                scales = values["scales"][scale_at : scale_at + n * (groups_a + groups_b)].reshape(
                    n, groups_a + groups_b
                )
                scale_at += n * (groups_a + groups_b)
                a = a * _spread(scales[:, :groups_a], inner, config.group_size, xp)
                b = b * _spread(scales[:, groups_a:], out, config.group_size, xp)
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
            counts = tuple((n,) for n in limits)
            return Config((q,), counts, _group_size(options.group_size, lora.shapes(), (q,), counts))
        if options.bits != "auto":
            return _fill(lora, spectra, limits, (int(options.bits),), options, budget)
        mixed = _fill(lora, spectra, limits, WIDTHS, options, budget)
        if len(mixed.levels) <= _MAX_LEVELS:
            return mixed
        used = np.array(mixed.counts).sum(axis=0)
        kept = sorted(np.argsort(-used, kind="stable")[:_MAX_LEVELS])
        return _fill(lora, spectra, limits, [mixed.levels[i] for i in kept], options, budget)

    def fit(self, lora: LoraAdapter, config: Config, context: FitContext) -> dict[str, Array]:
        targets = lora.shapes()
        arrays = {
            spec.name: np.empty(spec.shape, np.uint8 if spec.kind == "code" else np.float32)
            for spec in self.specs(config, targets)
        }
        starts = _starts(config, targets)
        for which, pair in enumerate(lora.targets):
            at, scale_at = starts[which]
            for q, (rows, scales) in _fit_target(pair, config, which, context.metric(pair)).items():
                name = "half" if q == 16 else f"codes.{q}"
                arrays[name][at[q] : at[q] + rows.size] = rows.reshape(-1)
                if q != 16:
                    arrays["scales"][scale_at : scale_at + scales.size] = scales.reshape(-1)
                    scale_at += scales.size
            context.progress((which + 1) / len(lora.targets), pair.target.name)
        return {name: packing.round_half(a) if a.dtype == np.float32 else a for name, a in arrays.items()}


METHOD = LowRank()


# --- ranks and widths -----------------------------------------------------------------------------------------------


def _rank_limits(spectra: Sequence[F64], options: LowRankOptions) -> list[int]:
    """The largest rank that the options allow in each target. Raises E-OPTION."""
    if (options.dynamic_method is None) != (options.dynamic_param is None):
        raise OptionError("--dynamic-method and --dynamic-param go together")
    if options.rank is not None and options.rank < 1:
        raise OptionError(f"--rank is {options.rank}; it must be at least 1")
    if options.group_size < 0:
        raise OptionError(f"--group-size is {options.group_size}; it must not be negative")
    cap = options.rank or MAX_RANK
    return [min(cap, _dynamic_rank(s, options), len(s)) for s in spectra]


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
    out, inner = target.matrix_shape
    scales = 0 if q == 16 else _groups(out, group_size) + _groups(inner, group_size)
    return (out + inner) * q + 16 * scales


def _allocate(
    lora: LoraAdapter,
    spectra: Sequence[F64],
    limits: Sequence[int],
    levels: Sequence[int],
    group_size: int,
    bits: float,
) -> Config:
    """Greedy joint allocation: while bits last, the step (a new component, or more bits for one) that buys the most
    energy per bit. Steps of one component lie on the concave hull of its rate-energy curve, so greedy is optimal up to
    the last step; components of a target become better in order."""
    chosen = [[0] * limit for limit in limits]  # index into `hulls` + 1
    heap: list[tuple[float, int, int, int]] = []
    hulls = [_hull(pair.target, levels, group_size) for pair in lora.targets]

    def push(t: int, j: int) -> None:
        step = chosen[t][j]
        if step < len(hulls[t]):
            cost, gain = hulls[t][step][1], hulls[t][step][2]
            heapq.heappush(heap, (-(float(spectra[t][j]) ** 2) * gain / cost, t, j, step))

    for t, limit in enumerate(limits):
        for j in range(limit):
            push(t, j)
    left = bits
    while heap:
        _, t, j, step = heapq.heappop(heap)
        cost = hulls[t][step][1]
        if cost > left or spectra[t][j] == 0:
            continue
        left -= cost
        chosen[t][j] += 1
        push(t, j)
    widths = [sorted((hulls[t][n - 1][0] for n in row if n), reverse=True) for t, row in enumerate(chosen)]
    return _config_of(lora.shapes(), widths, group_size)


def _config_of(targets: Sequence[Target], widths: Sequence[Sequence[int]], group_size: int) -> Config:
    """A Config with only the levels that are used."""
    levels = tuple(q for q in WIDTHS if any(q in row for row in widths))
    counts = tuple(tuple(sum(w == q for w in row) for q in levels) for row in widths)
    return Config(levels, counts, _group_size(group_size, targets, levels, counts))


def _hull(target: Target, levels: Sequence[int], group_size: int) -> list[tuple[int, int, float]]:
    """[(width, extra bits, extra share of energy)] along the concave hull of kept energy against bits."""
    points = [(0, 0, 0.0)] + [(q, _component_bits(target, q, group_size), (1 - _LOST[q]) ** 2) for q in sorted(levels)]
    hull = [points[0]]
    for point in points[1:]:
        while len(hull) > 1 and (point[2] - hull[-1][2]) * (hull[-1][1] - hull[-2][1]) >= (
            hull[-1][2] - hull[-2][2]
        ) * (point[1] - hull[-1][1]):
            hull.pop()
        hull.append(point)
    return [(two[0], two[1] - one[1], two[2] - one[2]) for one, two in pairwise(hull)]


def _fill(
    lora: LoraAdapter,
    spectra: Sequence[F64],
    limits: Sequence[int],
    levels: Sequence[int],
    options: LowRankOptions,
    budget: Budget,
) -> Config:
    """The allocation with the most payload that still fits the budget. Raises E-BUDGET.

    The overhead depends a little on the allocation, so the payload is found by bisection on the exact file size.
    """
    low, high = 0.0, 8.0 * budget.limit  # `high` is out of reach: a file of only payload
    best: Config | None = None
    while high - low >= 64:
        middle = (low + high) / 2
        config = _allocate(lora, spectra, limits, levels, options.group_size, middle)
        if not config.levels:
            low = middle
        elif budget.fits(config):
            best, low = config, middle
        else:
            high = middle
    if best is None:
        smallest = _smallest(lora, spectra, limits, levels, options.group_size)
        if budget.fits(smallest):
            return smallest
        raise BudgetError(
            f"{budget.limit} bytes cannot be reached; the smallest possible file has {budget.size(smallest)} bytes"
        )
    return best


def _smallest(
    lora: LoraAdapter, spectra: Sequence[F64], limits: Sequence[int], levels: Sequence[int], group_size: int
) -> Config:
    """One component at the least width, in the target where it is cheapest; of equal ones, where it holds most."""
    q = min(levels)
    costs = [
        _component_bits(p.target, q, group_size) if n else 1 << 62 for p, n in zip(lora.targets, limits, strict=True)
    ]
    cheapest = min(range(len(costs)), key=lambda t: (costs[t], -spectra[t][0] if limits[t] else 0.0))
    return _config_of(lora.shapes(), [[q] if t == cheapest else [] for t in range(len(limits))], group_size)


# --- quantizing -----------------------------------------------------------------------------------------------------


def _spread(scales: Any, length: int, group_size: int, xp: Any) -> Any:
    """(n, groups) scales to (n, length), or (n, 1) if there is one group."""
    if scales.shape[1] == 1:
        return scales
    which = xp.arange(length) // group_size
    return scales[:, which]


def _quantize(rows: F64, q: int, group_size: int, weights: Array | None) -> tuple[Array, F32, F64]:
    """(codes or numbers (n, d), scales (n, groups), the numbers they stand for) of rows at width q; `weights` (d,) say
    how much each column counts."""
    n, d = rows.shape
    if q == 16:
        numbers = rows.astype(np.float32)
        return numbers, np.zeros((n, 0), np.float32), numbers.astype(np.float64)
    groups = _groups(d, group_size)
    size = group_size or d
    padded = np.zeros((n, groups * size))
    padded[:, :d] = rows
    if groups * size != d:  # repeat the row's end, so that the fill does not pull the last scale down
        padded[:, d:] = padded[:, d - 1 : d]
    if weights is not None:
        fill = np.pad(weights, (0, groups * size - d), constant_values=1e-30)
        weights = np.tile(fill.reshape(groups, size), (n, 1))
    codes, scales = packing.quantize_rows(padded.reshape(n * groups, size), q, weights)
    codes, scales = codes.reshape(n, -1)[:, :d], scales.reshape(n, groups)
    values = packing.code_values(codes, q).astype(np.float64) * _spread(scales, d, size, np)
    return codes, scales, values


def _quantize_all(
    rows: F64, widths: Sequence[int], group_size: int, weights: Array | None = None
) -> tuple[dict[int, tuple[Array, F32]], F64]:
    """`_quantize` of rows whose widths differ: stored parts by width, and all values."""
    parts, values = {}, np.empty_like(rows)
    for q in dict.fromkeys(widths):
        mask = np.array(widths) == q
        codes, scales, values[mask] = _quantize(rows[mask], q, group_size, weights)
        parts[q] = (codes, scales)
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
        seen = values_a if metric is None else metric.times(values_a)
        if best is not None:
            B = full_left @ _solve(seen @ values_a.T, seen @ full_right.T).T
        parts_b, values_b = _quantize_all(B.T, widths, config.group_size)
        cross = np.sum((values_b @ full_left) * (seen @ full_right.T))
        error = total - 2 * float(cross) + float(np.sum((seen @ values_a.T) * (values_b @ values_b.T)))
        if error < best_error * (1 - 1e-4):
            best_error, best, stuck = error, (parts_a, parts_b), 0
        else:
            best = best or (parts_a, parts_b)
            stuck += 1
            if stuck == 2:
                break
        A = _solve(values_b @ values_b.T, values_b @ full_left) @ full_right
    assert best is not None
    parts_a, parts_b = best
    return {
        q: (
            np.concatenate([parts_a[q][0], parts_b[q][0]], axis=1),
            np.concatenate([parts_a[q][1], parts_b[q][1]], axis=1),
        )
        for q in parts_a
    }
