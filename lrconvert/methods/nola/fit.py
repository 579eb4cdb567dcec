"""Fitting NOLA: alternating least squares on the product, in the spans of the two bases, then on their integers.

With one factor fixed the best other one in its span is a linear least squares problem. Where a Hadamard basis is whole
it has the closed form of the unconstrained problem; else conjugate gradients solve it, with the basis as an operator
and, for orthogonal vectors, the unconstrained inverse as preconditioner. What is fitted depends on the coordinates
(B G, G^-1 A): several gauges are tried for a few rounds, and the best one goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lrconvert.core.dtypes import F64, Array
from lrconvert.lora import packing, svd
from lrconvert.lora.adapter import LoraAdapter, LoraTarget
from lrconvert.lora.input_statistics import Moment
from lrconvert.methods.base import FitContext
from lrconvert.methods.nola.basis import DENSE, HADAMARD, Basis
from lrconvert.methods.nola.form import Config, bases, places, specs

_ROUNDS = 24  # alternations before quantizing, at most
_TRIAL_ROUNDS = 2  # alternations from each gauge before one is chosen
_STEPS = {HADAMARD: 6, DENSE: 12}  # of conjugate gradients per alternation; each starts from the solution before
_EIGEN_STEPS = 12  # of the power iteration that looks for a gauge
_INTEGER_ROUNDS = 6  # alternations between integer factors
_RIDGE = 1e-9  # of the trace
_SETTLED = 3e-4  # relative change of the error at which alternation stops


def fit(lora: LoraAdapter, config: Config, context: FitContext) -> dict[str, Array]:
    """Return the payload tensors of `config` that represent `lora` best."""
    targets = lora.shapes()
    *target_places, total = places(config, targets)
    bits = config.form.bits
    codes = np.zeros(total.code, np.uint32 if bits == 16 else np.uint8)
    scales, starts = np.zeros((total.number, 2)), np.zeros(total.number)
    for which, (pair, place) in enumerate(zip(lora.targets, target_places, strict=True)):
        if place.rank:
            made = bases(config.form, pair.target, place)
            fitted = _fit_target(pair, place.rank, made, config, context)
            numbers = np.concatenate([fitted.a.codes, fitted.b.codes])
            codes[place.code : place.code + len(numbers)] = numbers
            scales[place.number] = fitted.a.scale, fitted.b.scale
            starts[place.number] = fitted.start
        context.progress((which + 1) / len(targets), pair.target.name)
    tensors = {"codes": codes, "scales": packing.round_half(scales), "base_scales": packing.round_half(starts)}
    return {spec.name: tensors[spec.name] for spec in specs(config, targets)}


@dataclass(frozen=True, eq=False)
class Coded:
    """Coefficients as a file holds them: `codes` (count,), a scale, and the odd integers `numbers` (float64)."""

    codes: Array
    scale: float
    numbers: F64


@dataclass(frozen=True, eq=False)
class Fitted:
    """The coefficients of both factors, and the multiple of the seeded matrix that A begins with."""

    a: Coded
    b: Coded
    start: float


def quantize(coefficients: F64, bits: int, weights: F64) -> Coded:
    """Return the codes and the one scale of a factor."""
    codes, scales = packing.quantize_rows(coefficients[None], bits, None if len(weights) == 1 else weights)
    scale = packing.round_half(scales)
    if bits == 16:  # the codes of the scale that is stored: there are too many of them to be off by its rounding
        codes = packing.nearest_codes(coefficients[None], scale, 16)
    return Coded(codes[0], float(scale[0]), 2.0 * codes[0] + (1 - (1 << bits)))


def _fit_target(pair: LoraTarget, rank: int, made: tuple[Basis, Basis], config: Config, context: FitContext) -> Fitted:
    metric = context.metric(pair)
    factors = svd.svd(pair, metric)
    a, _ = svd.balanced(factors, rank)
    a = np.concatenate([a, np.zeros((rank - len(a), a.shape[1]))])
    problem = Problem(factors.U * factors.s, factors.Vt, metric, *made, rank, config.form.base_term)
    if not factors.s.any():
        nothing = [Coded(np.zeros(basis.count, np.uint32), 0.0, np.zeros(basis.count)) for basis in made]
        return Fitted(nothing[0], nothing[1], 0.0)
    if made[0].whole and made[1].whole:
        start = problem.along_base(a)
        return problem.integers(problem.projected_a(a, start), start, config.form.bits)
    c, start = problem.best_span(a, context.seed)
    return problem.integers(c, start, config.form.bits)


@dataclass(frozen=True, eq=False)
class Problem:
    """The update ``left @ right``, left (out, s), right (s, in) with ``right M right^T`` the identity, to be met by
    B A with A (rank, in), B (out, rank) in the spans of their bases; A may begin with a multiple of a seeded matrix."""

    left: F64
    right: F64
    metric: Moment | None
    basis_a: Basis
    basis_b: Basis
    rank: int
    base_term: bool

    @cached_property
    def total(self) -> float:
        return float(np.sum(self.left**2))

    @cached_property
    def _base(self) -> F64:
        """The seeded matrix that A may begin with, (rank, in), or zeros (rank, 1)."""
        if not self.base_term:
            return np.zeros((self.rank, 1))
        return np.asarray(self.basis_a.base_term(None), np.float64).reshape(self.rank, -1)

    def _weighed(self, a: F64) -> F64:
        """``a @ M``."""
        return a if self.metric is None else self.metric.times(a)

    def along_base(self, a: F64) -> float:
        """Return how much of the seeded matrix is in `a`, as a file can hold it."""
        square = float(np.sum(self._base**2))
        share = float(np.sum(self._base * a)) / square if square else 0.0
        return float(packing.round_half(np.array([share]))[0])

    def matrix_a(self, c: F64, start: float) -> F64:
        return np.asarray(self.basis_a.combine(c).reshape(self.rank, -1) + start * self._base, np.float64)

    def matrix_b(self, c: F64) -> F64:
        return np.asarray(self.basis_b.combine(c).reshape(-1, self.rank), np.float64)

    def products(self, a: F64, b: F64) -> tuple[float, float]:
        """Return (<update, B A>, ||B A||^2)."""
        weighed = self._weighed(a)
        cross = float(np.sum((b.T @ self.left) * (weighed @ self.right.T)))
        return cross, float(np.sum((weighed @ a.T) * (b.T @ b)))

    def error(self, a: F64, b: F64) -> float:
        cross, square = self.products(a, b)
        return self.total - 2 * cross + square

    def projected_a(self, a: F64, start: float) -> F64:
        """Return the coefficients of the projection of `a`; of a dense basis about that."""
        return _projected(self.basis_a, a - start * self._base)

    def solve_a(self, b: F64, start: float, c: F64 | None) -> F64:
        """Return the coefficients of the best A for `b`, from `c` on."""
        gram = _ridged(b.T @ b)
        inverse = np.linalg.inv(gram)
        wanted = (b.T @ self.left) @ self.right - start * (gram @ self._base)
        if self.basis_a.whole:
            return _projected(self.basis_a, inverse @ wanted)
        inner = 1.0 if self.metric is None else 1 / self.metric.squares.astype(np.float64)
        return _conjugate_gradients(
            self.basis_a,
            lambda x: gram @ self._weighed(x.reshape(self.rank, -1)),
            lambda x: (inverse @ x.reshape(self.rank, -1)) * inner,
            self._weighed(wanted),
            _projected(self.basis_a, inverse @ wanted) if c is None else c,
        )

    def solve_b(self, a: F64, c: F64 | None) -> F64:
        """Return the coefficients of the best B for `a`, from `c` on."""
        weighed = self._weighed(a)
        gram = _ridged(weighed @ a.T)
        inverse = np.linalg.inv(gram)
        wanted = self.left @ (weighed @ self.right.T).T
        if self.basis_b.whole:
            return _projected(self.basis_b, wanted @ inverse)
        return _conjugate_gradients(
            self.basis_b,
            lambda x: x.reshape(-1, self.rank) @ gram,
            lambda x: x.reshape(-1, self.rank) @ inverse,
            wanted,
            _projected(self.basis_b, wanted @ inverse) if c is None else c,
        )

    def best_span(self, a: F64, seed: int) -> tuple[F64, float]:
        """Return (coefficients of A, multiple of the seeded matrix) of the best pair in the spans, searched for from
        `a` (rank, in) on."""
        tries = []
        for gauged in self._gauges(a, seed):
            start = self.along_base(gauged)
            c = self.projected_a(gauged, start)
            tries.append((*self._alternate(c, None, start, _TRIAL_ROUNDS), start))
        _, c_a, c_b, start = min(tries, key=lambda entry: entry[0])
        _, c_a, _ = self._alternate(c_a, c_b, start, _ROUNDS - _TRIAL_ROUNDS)
        return c_a, start

    def _alternate(self, c_a: F64, c_b: F64 | None, start: float, rounds: int) -> tuple[float, F64, F64]:
        """(error, coefficients of A, of B) after so many rounds; no round raises the error, but for rounding."""
        before = np.inf
        for _ in range(rounds):
            c_b = self.solve_b(self.matrix_a(c_a, start), c_b)
            b = self.matrix_b(c_b)
            c_a = self.solve_a(b, start, c_a)
            error = self.error(self.matrix_a(c_a, start), b)
            if before - error < _SETTLED * error:
                break
            before = error
        assert c_b is not None
        return error, c_a, c_b

    def _gauges(self, a: F64, seed: int) -> Iterator[F64]:
        """Matrices with the row space of `a` to begin with: `a`; a rotation of it; the one of which the span of A's
        basis holds the largest share, by power iteration."""
        yield a
        if self.rank == 1 or self.basis_a.family == DENSE:
            return
        yield np.linalg.qr(np.random.default_rng(seed).standard_normal((self.rank, self.rank)))[0] @ a
        rows = np.linalg.qr(a.T)[0].T
        x = np.eye(self.rank)
        for _ in range(_EIGEN_STEPS):
            c = _projected(self.basis_a, x @ rows)
            x = self.basis_a.combine(c).reshape(self.rank, -1) @ rows.T
            x /= np.linalg.norm(x) or 1.0
        yield x @ rows

    def integers(self, c_a: F64, start: float, bits: int) -> Fitted:
        """From coefficients of A on: quantize one factor and solve the other for it, in turn, while that helps; keep
        the best pair. B is stretched to what keeps most, so that no pair is worse than no update."""
        c_b, best_error, best = None, np.inf, None
        for _ in range(_INTEGER_ROUNDS if bits < 16 else 1):
            coded_a = quantize(c_a, bits, self.basis_a.squares)
            a = self.matrix_a(coded_a.scale * coded_a.numbers, start)
            c_b = self.solve_b(a, c_b)
            coded_b = quantize(c_b, bits, self.basis_b.squares)
            b = self.matrix_b(coded_b.scale * coded_b.numbers)
            cross, square = self.products(a, b)
            stretch = max(cross, 0.0) / square if square else 0.0
            error = self.total - stretch * cross
            if best is not None and error >= best_error * (1 - _SETTLED):
                break
            best_error = error
            best = Fitted(coded_a, Coded(coded_b.codes, coded_b.scale * stretch, coded_b.numbers), start)
            c_a = self.solve_a(b, start, c_a)
        assert best is not None
        return best


def _projected(basis: Basis, x: F64) -> F64:
    """Coefficients of the projection of `x` on a basis; of a dense one about that."""
    return basis.project(x.reshape(-1)) / basis.squares


def _ridged(gram: F64) -> F64:
    """A little more than a Gram matrix, so that equal or zero rows do no harm."""
    mean = float(np.trace(gram)) / len(gram)
    return gram + _RIDGE * (mean or 1.0) * np.eye(len(gram))


def _conjugate_gradients(
    basis: Basis,
    weigh: Callable[[F64], F64],
    unweigh: Callable[[F64], F64],
    wanted: F64,
    c: F64,
) -> F64:
    """Coefficients nearer to those for which ``P^T W P c = P^T wanted``, from `c` on; P is the basis, `weigh` the
    product with W, `unweigh` about that with its inverse, which saves an orthogonal basis steps. No step raises the
    error."""

    def inverse(x: F64) -> F64:
        if basis.family == DENSE:  # its vectors are not orthogonal, and each product draws them
            return x / basis.squares
        return basis.project(unweigh(basis.combine(x / basis.squares)).reshape(-1)) / basis.squares

    def times(x: F64) -> F64:
        return basis.project(weigh(basis.combine(x)).reshape(-1))

    rest = basis.project((wanted - weigh(basis.combine(c)).reshape(wanted.shape)).reshape(-1))
    scaled = inverse(rest)
    direction, size = scaled, float(rest @ scaled)
    enough = 1e-5 * size  # the next round starts from here
    for _ in range(_STEPS[basis.family]):
        if size <= enough:
            break
        moved = times(direction)
        length = size / float(direction @ moved)
        c = c + length * direction
        rest = rest - length * moved
        scaled = inverse(rest)
        before, size = size, float(rest @ scaled)
        direction = scaled + size / before * direction
    return c
