"""The SVD form of a LoRA, by thin QR of its factors and the SVD of an r x r core.

(B G, G^-1 A) is the same update for every invertible G. Fits, budgets and scores work on the one form that does not
depend on the stored coordinates: ``scale * B @ A = U diag(s) Vt`` with orthonormal U (out, r), Vt (r, in). The dense
update (out, in) is never formed: for a 4096 x 4096 target of rank 16 that is some thousand times less work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lrconvert.core.dtypes import F64, Array, Stored, decode
from lrconvert.lora.adapter import LoraTarget

if TYPE_CHECKING:
    from lrconvert.lora.input_statistics import Moment


@dataclass(frozen=True)
class Factors:
    """``U @ diag(s) @ Vt``: U (out, k), s (k,) descending, Vt (k, in), float64, k = min(r, out, in).

    In every column of U the entry of largest magnitude is positive (the first of equals), which fixes the signs. Those
    of several targets have an axis more, in front.
    """

    U: F64
    s: F64
    Vt: F64

    def of(self, which: int) -> Factors:
        """Return those of one of several targets."""
        return Factors(self.U[which], self.s[which], self.Vt[which])


_ILL_CONDITIONED = 1e-3  # smallest diagonal of the normalized Cholesky factor that two passes still repair
_AT_ONCE = 1 << 17  # numbers of factors of equal shapes that are looked at together
_MULTIPLICATIONS = 1 << 18  # OpenBLAS does as many on one thread; above, threads wait longer than they compute
_LEAST_COLUMNS = 64


def _parts(length: int, size: int) -> list[slice]:
    """Cut a `length`, into parts so small that each has its products with `size` numbers made on one thread."""
    width = max(_LEAST_COLUMNS, _MULTIPLICATIONS // max(size, 1))
    return [slice(start, start + width) for start in range(0, length, width)]


def products(left: F64, right: F64) -> F64:
    """Return ``left @ right^T`` (..., j, k) of wide left (..., j, m) and right (..., k, m)."""
    total = np.zeros((*left.shape[:-1], right.shape[-2]))
    for part in _parts(left.shape[-1], left.shape[-2] * right.shape[-2]):
        columns = left[..., part]
        other = columns.copy() if right is left else right[..., part]  # numpy's way for squares is slower
        total += columns @ other.mT
    return total


def product(matrix: F64, rows: F64) -> F64:
    """Return ``matrix @ rows`` (..., j, m) of matrix (..., j, k) and wide rows (..., k, m)."""
    result = np.empty((*matrix.shape[:-1], rows.shape[-1]))
    for part in _parts(rows.shape[-1], matrix.shape[-2] * matrix.shape[-1]):
        np.matmul(matrix, rows[..., part], out=result[..., part])
    return result


def _gram(rows: F64, matrix: F64 | None = None) -> F64:
    """``x @ x^T`` (..., k, k) of x = rows (..., k, m), or ``matrix @ rows``."""
    if matrix is None:
        return products(rows, rows)
    total = np.zeros((*rows.shape[:-1], rows.shape[-2]))
    for part in _parts(rows.shape[-1], rows.shape[-2] ** 2):
        turned = matrix @ rows[..., part]
        total += turned @ turned.mT
    return total


def _roots(gram: F64) -> tuple[F64, Array]:
    """R (n, k, k) upper triangular with ``R^T R = gram``, and for which of n it is of use (n,): the others are too
    ill-conditioned. What is normalized first, so that a decaying spectrum alone does not count as that."""
    norms = np.sqrt(gram.diagonal(axis1=-2, axis2=-1))
    good = np.asarray(((norms > 0) & np.isfinite(norms)).all(axis=-1))
    norms = np.where(good[:, None], norms, 1.0)
    unit = np.eye(gram.shape[-1])
    normalized = np.where(good[:, None, None], gram / (norms[:, :, None] * norms[:, None, :]), unit)
    try:
        lower = np.linalg.cholesky(normalized)
    except np.linalg.LinAlgError:
        if len(gram) > 1:  # one alone is at fault
            parts = [_roots(gram[n : n + 1]) for n in range(len(gram))]
            return np.concatenate([root for root, _ in parts]), np.concatenate([mark for _, mark in parts])
        lower, good = unit[None], np.zeros(1, bool)
    good &= lower.diagonal(axis1=-2, axis2=-1).min(axis=-1, initial=1.0) >= _ILL_CONDITIONED
    return lower.mT * norms[:, None, :], good


def _inverse(roots: F64) -> F64:
    """The transposed inverse of each R (n, k, k)."""
    return np.asarray(np.linalg.inv(roots).mT, np.float64)


def _householder(x: F64) -> tuple[F64, F64]:
    import scipy.linalg  # several times faster than numpy's here; needed rarely, so not loaded by every command

    q, r = scipy.linalg.qr(x, mode="economic", check_finite=False)
    return np.asarray(q, np.float64), np.asarray(r, np.float64)


@dataclass(frozen=True, eq=False)
class _Thin:
    """A thin QR of rows (n, k, m), j = min(k, m): those of ``turn @ inner @ basis`` are orthonormal (n, j, m), and R^T
    (n, k, j), of `root` R, times them is what was decomposed. The `basis` are the rows themselves, but for those of
    `reflected` (n,) the result of reflections. It may be left out, and made again: the rest is small."""

    basis: F64 | None
    inner: F64
    turn: F64
    root: F64
    reflected: Array

    def basis_of(self, rows: F64) -> F64:
        """Return the basis of the rows that were decomposed; they are overwritten."""
        if rows.shape[2] < rows.shape[1]:
            return np.stack([_householder(one.T)[0].T for one in rows])
        for n in np.flatnonzero(self.reflected):
            rows[n] = _householder(rows[n].T)[0].T
        return rows

    def times(self, matrix: F64, basis: F64 | None = None) -> F64:
        """Return ``matrix @ orthonormal rows``, (n, i, m) for matrix (n, i, j); of a `basis` that was left out, or that
        has other columns: sums of the first ones. Products with all rows are made a few columns at a time: a pass over
        memory costs more."""
        basis = self.basis if basis is None else basis
        assert basis is not None
        turned = matrix @ self.turn
        product = np.empty((*turned.shape[:-1], basis.shape[-1]))
        for part in _parts(basis.shape[-1], basis.shape[-2] ** 2):
            np.matmul(turned, self.inner @ basis[..., part], out=product[..., part])
        return product


def _thin(rows: F64) -> _Thin:
    """The thin QR of rows (n, k, m), which are overwritten: Cholesky QR in two passes (Yamamoto et al., 2015), a few
    matrix products instead of k reflections; Householder where rows are nearly dependent."""
    count, k, m = rows.shape
    if m < k:
        pairs = [_householder(one.T) for one in rows]
        q, r = (np.stack(side) for side in zip(*pairs, strict=True))
        unit = np.broadcast_to(np.eye(m), (count, m, m))
        return _Thin(q.mT, unit, unit, r, np.ones(count, bool))
    first, good = _roots(_gram(rows))
    inner = _inverse(first)
    second, better = _roots(_gram(rows, inner))
    turn, root = _inverse(second), second @ first
    reflected = ~(good & better)
    for n in np.flatnonzero(reflected):
        q, root[n] = _householder(rows[n].T)
        rows[n], inner[n], turn[n] = q.T, np.eye(k), np.eye(k)
    return _Thin(rows, inner, turn, root, reflected)


def factors_of(pairs: Sequence[LoraTarget]) -> tuple[F64, F64]:
    """Return A (n, r, in) and B^T (n, r, out), float64, of targets of equal shapes and ranks, without the scale."""
    a = np.stack([pair.A for pair in pairs], dtype=np.float64)
    b = np.stack([pair.B for pair in pairs], dtype=np.float64)
    return a, b.mT


def stacks(pairs: Sequence[LoraTarget]) -> Iterator[list[int]]:
    """Yield the numbers of targets that can be looked at together: of equal shapes and ranks, some at a time."""
    alike: dict[tuple[tuple[int, int], int], list[int]] = {}
    for n, pair in enumerate(pairs):
        alike.setdefault((pair.target.matrix_shape, pair.rank), []).append(n)
    for (shape, rank), numbers in alike.items():
        count = max(1, _AT_ONCE // max(rank * sum(shape), 1))
        yield from (numbers[n : n + count] for n in range(0, len(numbers), count))


def svd(pair: LoraTarget, moment: Moment | None = None) -> Factors:
    """Return the SVD of ``scale * B @ A`` from its factors: two thin QRs and an SVD of r x r.

    With the `moment` M of the target's input, in the metric of the output: Vt M Vt^T is the identity, s^2 the mean
    squared size of the outputs along U, and cutting at any rank has the least mean squared error of the output.
    """
    if moment is None:
        return svds([pair]).of(0)
    a, b = factors_of([pair])
    thin = _thin(b)
    left = pair.scale * thin.root[0]
    u, s, _ = np.linalg.svd(left @ _root(moment.gram(pair.A)))
    rank = min(len(s), pair.target.in_features)
    u, s = u[:, :rank], s[:rank]
    used = s > 1e-14 * s.max(initial=0.0)
    right = np.where(used, 1 / np.where(used, s, 1), 0)[:, None] * (u.T @ (left @ a[0]))
    rows = thin.times(u.T[None])[0]
    sign = _signs(rows)
    rows *= sign
    right *= sign
    return Factors(rows.T, s, right)


def svds(pairs: Sequence[LoraTarget]) -> Factors:
    """Return the same of targets of equal shapes and ranks (`stacks`), in the plain norm, with an axis more: U (n, out,
    k), s (n, k), Vt (n, k, in). Each has the bits that it has alone."""
    whole, rows = _decomposed(pairs)
    return Factors(rows.mT, whole.s, whole.a.times(whole.right))


@dataclass(frozen=True, eq=False)
class Decomposition:
    """`svds` of some targets without the singular vectors, which are made of the targets when they are asked for: s (n,
    k), and what is left (n, k, j) and right (n, k, j) of thin QRs of B^T and A."""

    s: F64
    left: F64
    right: F64
    a: _Thin
    b: _Thin

    @classmethod
    def of(cls, pairs: Sequence[LoraTarget]) -> Decomposition:
        """Decompose targets of equal shapes and ranks."""
        whole, _ = _decomposed(pairs)
        return replace(whole, a=replace(whole.a, basis=None), b=replace(whole.b, basis=None))

    def vectors(
        self, pairs: Sequence[LoraTarget], columns: Callable[[F64, str], F64] = lambda rows, role: rows
    ) -> tuple[F64, F64]:
        """Return Vt (n, k, in) and U^T (n, k, out), equal to those of `svds`; or what `columns`, linear, makes of rows
        (n, k, length) and the role, "A" or "B"."""
        a, b = factors_of(pairs)
        one, two = columns(self.a.basis_of(a), "A"), columns(self.b.basis_of(b), "B")
        return self.a.times(self.right, one), self.b.times(self.left, two)


def _decomposed(pairs: Sequence[LoraTarget]) -> tuple[Decomposition, F64]:
    """The decomposition with its bases, and U^T, whose signs are needed."""
    one, two = map(_thin, factors_of(pairs))
    scales = np.array([pair.scale for pair in pairs], np.float64)[:, None, None]
    u, s, vt = np.linalg.svd(scales * (two.root @ one.root.mT), full_matrices=False)
    rows = two.times(u.mT)
    sign = _signs(rows)
    rows *= sign
    return Decomposition(s, u.mT * sign, vt * sign, one, two), rows


def _signs(rows: F64) -> F64:
    """The sign (..., k, 1) of the entry of largest magnitude of rows (..., k, m), the first of equals."""
    peak = np.argmax(np.abs(rows), axis=-1, keepdims=True)
    return np.where(np.take_along_axis(rows, peak, axis=-1) < 0, -1.0, 1.0)


def _root(gram: F64) -> F64:
    """Z with ``Z @ Z^T = gram`` for a symmetric matrix without negative eigenvalues, but for rounding."""
    values, vectors = np.linalg.eigh(gram)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)), np.float64)


def r_factors(rows: F64) -> F64:
    """Return the R (n, j, k) of thin QRs of rows^T, rows (n, k, m), j = min(k, m), up to the signs of their rows."""
    return _r_factors(lambda part: rows[..., part], *rows.shape[1:])


def _r_factors(rows: Callable[[slice], F64], k: int, m: int) -> F64:
    """The same of rows (n, k, m) that are made when they are needed, some columns at a time, for the cache."""
    every = slice(None)
    if m < k:
        return np.stack([_householder(one.T)[1] for one in rows(every)])
    gram = sum(products(columns, columns) for columns in map(rows, _parts(m, k * k)))
    roots, good = _roots(np.asarray(gram))
    for n in np.flatnonzero(~good):
        roots[n] = _householder(rows(every)[n].T)[1]
    return roots


def _rows_of(pairs: Sequence[LoraTarget], name: str) -> tuple[Callable[[slice], F64], int, int]:
    """A function that gives columns of the rows of A or B^T (n, r, m), float64, and r and m."""
    stored: list[Stored] = [getattr(pair, name) for pair in pairs]
    arrays = [one.array.T if name == "b" else one.array for one in stored]

    def columns(part: slice) -> F64:
        return np.stack(
            [decode(x[:, part], one.dtype) for x, one in zip(arrays, stored, strict=True)], dtype=np.float64
        )

    return columns, *arrays[0].shape


def spectra(pairs: Sequence[LoraTarget]) -> list[F64]:
    """Return the `singular_values` of every target in the plain norm."""
    values: dict[int, F64] = {}
    for numbers in stacks(pairs):
        alike = [pairs[n] for n in numbers]
        a, b = (_r_factors(*_rows_of(alike, name)) for name in "ab")
        scales = np.array([pair.scale for pair in alike], np.float64)[:, None, None]
        values |= zip(numbers, np.linalg.svd(scales * (b @ a.mT), compute_uv=False), strict=True)
    return [values[n] for n in range(len(pairs))]


def singular_values(pair: LoraTarget, moment: Moment | None = None) -> F64:
    """Return the singular values of ``scale * B @ A``, descending, without forming U and Vt; see `svd`."""
    if moment is None:
        return spectra([pair])[0]
    root = _r_factors(*_rows_of([pair], "b"))[0]
    return np.asarray(np.linalg.svd(pair.scale * (root @ _root(moment.gram(pair.A))), compute_uv=False), np.float64)


def energy_ranks(s: F64, shares: Sequence[float]) -> list[int]:
    """Return the smallest ranks whose squared singular values hold these `shares` of the total; 0 for an all-zero
    update."""
    total = np.cumsum(s * s)
    if len(s) == 0 or total[-1] == 0.0:
        return [0] * len(shares)
    ranks = np.searchsorted(total, np.array(shares) * total[-1] * (1 - 1e-12)) + 1
    return list(map(int, np.minimum(ranks, len(s))))


def balanced(factors: Factors, rank: int | None = None) -> tuple[F64, F64]:
    """Return (A (k, in), B (out, k)) with ``B @ A`` the update cut to `rank`; the singular values split as square
    roots."""
    k = len(factors.s) if rank is None else min(rank, len(factors.s))
    root = np.sqrt(factors.s[:k])
    return root[:, None] * factors.Vt[:k], factors.U[:, :k] * root


_COLUMNS = 2048  # of a stack of factors that are in memory as float64 at a time


def distance(pair: LoraTarget, a: Array, b: Array, moment: Moment | None = None) -> tuple[float, float]:
    """Return (||delta - b @ a||^2, ||delta||^2) for delta = scale * B @ A; `a` (k, in), `b` (out, k). In the Frobenius
    norm, or with the `moment` M of the input as mean squares of the output: tr(E M E^T).

    By Gram matrices of the stacked factors; where the two agree so closely that this would be a difference of large
    numbers, by thin QRs of the stacks, whose core holds the difference itself.
    """
    own_a, own_b = pair.A, pair.scale * pair.B.astype(np.float64)

    def left(rows: slice) -> F64:
        return np.concatenate([own_b[rows], -b[rows].astype(np.float64)], axis=1)

    def right(columns: slice) -> F64:
        return np.concatenate([own_a[:, columns].astype(np.float64), a[:, columns].astype(np.float64)], axis=0)

    # Some forms have factors many times their own size: they are widened a part at a time.
    gram = _summed(right, pair.target.in_features) if moment is None else moment.gram(right(slice(None)))
    products = _summed(lambda rows: left(rows).T, pair.target.out_features) * gram
    error, energy = float(products.sum()), float(products[: pair.rank, : pair.rank].sum())
    if error < 1e-6 * energy:
        root = _householder(right(slice(None)).T)[1].T if moment is None else _root(gram)
        error = float(np.sum((_householder(left(slice(None)))[1] @ root) ** 2))
    return error, energy


def _summed(part: Callable[[slice], F64], width: int) -> F64:
    """``x @ x^T`` of a wide x (k, width), of which `part` gives some columns."""
    slices = (slice(start, start + _COLUMNS) for start in range(0, width, _COLUMNS))
    return np.asarray(sum(map(_gram, map(part, slices))), np.float64)


def fit_metric(pair: LoraTarget, moment: Moment | None) -> Moment:
    """Return the metric in which fits measure the error of a target, from the `moment` M of its input: the identity,
    which leaves the plain norm, if that was not measured.

    ``(M + m I) / sqrt(m e)`` with the mean square m of an input and the update's energy e in that numerator. What
    flows into layers differs by orders of magnitude, and so do updates, so that the plain sum of the output errors is
    that of a few layers; weighing a target by the root of its energy was measured to come nearest to the LoRA's own
    answers, and M alone to forget what little data never shows. It is no law (docs/statistics.md): where a base and
    data are at hand, the answers choose between this metric and the plain norm.
    """
    if moment is None:
        from lrconvert.lora.input_statistics import Moment

        moment = Moment(0, diagonal=np.ones(pair.target.in_features, np.float32))
    whole = moment.damped()
    out, inner = pair.target.matrix_shape
    energy = distance(pair, np.zeros((0, inner)), np.zeros((out, 0)), whole)[1]
    mean = float(moment.squares.mean(dtype=np.float64)) or 1.0
    return whole.scaled((mean * energy) ** -0.5) if energy > 0 else whole.scaled(1 / mean)
