"""Which columns or rows of an update to keep, from its factors; the dense update never appears."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lrconvert.core.dtypes import F64, Array
from lrconvert.lora import svd
from lrconvert.lora.adapter import LoraTarget
from lrconvert.lora.input_statistics import Moment
from lrconvert.lora.svd import Factors

_SWAP_PASSES = 3
_BLOCK = 64  # chosen columns whose exchanges are weighed at once


def row_energies(factors: Factors) -> F64:
    """Return the energy of each output row (out,), in the metric of the factors."""
    return np.asarray(np.sum((factors.U * factors.s) ** 2, axis=1), np.float64)


def line_energies(lines: F64, others: F64) -> F64:
    """Return the energies (n, places) of the input columns of n updates, in the plain norm, of A (n, r, in) as `lines`
    and B^T (n, r, out) as `others`, or of the output rows of B^T and A: with the thin QR ``B = Q R`` column i of ``B @
    A`` is as long as that of ``R @ A``."""
    parts = svd.product(svd.r_factors(others), lines)
    return np.asarray(np.einsum("nkp,nkp->np", parts, parts), np.float64)


def both_sides(pairs: Sequence[LoraTarget]) -> dict[bool, tuple[F64, F64]]:
    """Return the arguments of `line_energies` of targets of equal shapes and ranks, by whether lines are rows."""
    a, b = svd.factors_of(pairs)
    b *= np.array([pair.scale for pair in pairs], np.float64)[:, None, None]
    return {True: (b, a), False: (a, b)}


def largest(energies: F64, count: int) -> Array:
    """Return the places of the `count` largest, largest first; of equals the first."""
    if 0 < count < len(energies):
        at_least = np.flatnonzero(energies >= np.partition(energies, -count)[-count])
        return np.asarray(at_least[np.argsort(-energies[at_least], kind="stable")[:count]])
    return np.argsort(-energies, kind="stable")[:count]


def metric_rows(metric: Moment, which: Sequence[int]) -> F64:
    """Return the rows `which` of M, (len(which), in)."""
    columns = list(which)
    if metric.matrix is not None:
        return metric.matrix[columns].astype(np.float64)
    if metric.rows is None or not len(metric.rows):
        rows = np.zeros((len(columns), metric.width))
    else:
        rows = (metric.rows[:, columns].T @ metric.rows).astype(np.float64)
    rows[np.arange(len(columns)), columns] += metric.rest[columns]
    return rows


class Columns:
    """Columns of delta = U diag(s) Vt chosen one after another under a metric M.

    `chosen` are S. With the rows of `basis` (r, in), C, ``C^T C = M[:, S] M[S, S]^-1 M[S, :]``; what S leaves of M has
    the diagonal `left` (in,), and `core` (k, in) is ``diag(s) Vt`` times that rest: U @ core is what column j of
    delta M still has to tell. `parts` (k, r) are the shares of C's rows in what is captured: ``sum(parts**2)``.
    """

    def __init__(self, factors: Factors, metric: Moment) -> None:
        self.metric = metric
        self.core = factors.s[:, None] * metric.times(factors.Vt)
        self.left = metric.squares.astype(np.float64)
        self.floor = 1e-9 * self.left  # below it a column is a combination of chosen ones, but for rounding
        self.chosen: list[int] = []
        self._basis = np.zeros((8, self.core.shape[1]))
        self.parts = np.zeros((len(self.core), 0))

    @property
    def basis(self) -> F64:
        return self._basis[: len(self.chosen)]

    def _scores(self, core_squares: F64, left: F64) -> F64:
        """Return the gain of each column that is not chosen."""
        independent = left > self.floor
        return np.where(independent, core_squares / np.where(independent, left, 1), 0)

    def _squares(self) -> F64:
        return np.asarray(np.einsum("kn,kn->n", self.core, self.core), np.float64)

    def grow(self) -> float:
        """Choose the column that adds most; return what it adds. If none adds anything, the first that is left."""
        scores = self._scores(self._squares(), self.left)
        scores[self.chosen] = -1
        best = int(np.argmax(scores))
        self._add(best)
        return max(float(scores[best]), 0.0)

    def resume(self, chosen: Sequence[int]) -> None:
        """Choose the columns `chosen` in this order, at once."""
        rows = metric_rows(self.metric, chosen)
        factor = np.linalg.cholesky(rows[:, list(chosen)])
        self._basis = np.linalg.solve(factor, rows)
        self.parts = np.linalg.solve(factor, self.core[:, list(chosen)].T).T
        self.chosen = list(chosen)
        self.core -= self.parts @ self._basis
        self.left = np.maximum(self.left - np.einsum("rn,rn->n", self._basis, self._basis), 0)

    def _add(self, column: int) -> None:
        count = len(self.chosen)
        if count == len(self._basis):
            self._basis = np.concatenate([self._basis, np.zeros_like(self._basis)])
        root = np.sqrt(max(self.left[column], self.floor[column], 1e-300))
        row = (metric_rows(self.metric, [column])[0] - self._basis[:count, column] @ self._basis[:count]) / root
        part = self.core[:, column] / root
        self._basis[count] = row
        self.parts = np.concatenate([self.parts, part[:, None]], axis=1)
        self.core -= part[:, None] * row
        self.left = np.maximum(self.left - row * row, 0)
        self.chosen.append(column)

    def improve(self) -> None:
        """Exchange a chosen column for another while that captures more, a bounded number of times."""
        count = len(self.chosen)
        if count == self.core.shape[1]:
            return
        inverse = np.asarray(np.linalg.inv(self.basis[:, self.chosen]), np.float64)
        squares = self._squares()
        for _ in range(_SWAP_PASSES):
            blocks = [np.arange(count)[n : n + _BLOCK] for n in range(0, count, _BLOCK)]
            gains = np.concatenate([self._exchanges(block, inverse, squares)[1] for block in blocks])
            hopeful = np.argsort(-gains, kind="stable")[: int(np.sum(gains > 0))]
            for place in hopeful:  # one exchange changes what the next is worth
                (column,), (gain,) = self._exchanges(np.array([place]), inverse, squares)
                if gain > 0:
                    self._exchange(int(place), int(column), inverse)
                    squares = self._squares()
            if not len(hopeful):
                break

    def _exchanges(self, places: Array, inverse: F64, squares: F64) -> tuple[Array, F64]:
        """For each of several chosen columns the one to have in its place, and what that would add; not above 0 if
        nothing, but for rounding."""
        directions = _directions(inverse[places])
        rows, parts = directions @ self.basis, directions @ self.parts.T
        losses = np.sum(parts**2, axis=1)
        freed = squares + rows * (2 * (parts @ self.core) + rows * losses[:, None])
        scores = self._scores(freed, self.left + rows * rows)
        scores[:, self.chosen] = -1
        best = np.argmax(scores, axis=1)
        return best, scores[np.arange(len(places)), best] - losses * (1 + 1e-6)

    def _exchange(self, place: int, column: int, inverse: F64) -> None:
        """Put `column` in the place of another; the `inverse` of C[:, S] is brought along."""
        mirror = _directions(inverse[place : place + 1])[0]
        mirror[-1] -= 1  # the reflection that takes u to the last unit vector
        weight = 2 / max(float(mirror @ mirror), 1e-300) if mirror.any() else 0.0
        basis = self.basis
        basis -= weight * np.outer(mirror, mirror @ basis)
        self.parts -= weight * np.outer(self.parts @ mirror, mirror)
        inverse -= weight * np.outer(inverse @ mirror, mirror)
        self.core += self.parts[:, -1:] * basis[-1]
        self.left += basis[-1] ** 2
        self.chosen.pop(place)
        last = self.parts.shape[1] - 1
        self.parts = self.parts[:, :last]
        self._add(column)
        self.chosen.insert(place, self.chosen.pop())
        root = self.basis[-1, column]
        inverse[:, -1] = -(inverse[:, :-1] @ self.basis[:-1, column]) / root
        inverse[place] = 0
        inverse[place, -1] = 1 / root


def _directions(inverse: F64) -> F64:
    """Return the directions that C no longer spans without a chosen column: unit vectors (n, r), from rows of the
    inverse of C[:, S]."""
    return np.asarray(inverse / np.linalg.norm(inverse, axis=1, keepdims=True), np.float64)


def best_columns(factors: Factors, count: int, metric: Moment) -> list[int]:
    """Return `count` columns that together capture much; those worth most when they were chosen come first."""
    if count >= metric.width:
        return list(range(metric.width))
    columns = Columns(factors, metric)
    for _ in range(count):
        columns.grow()
    columns.improve()
    return columns.chosen
