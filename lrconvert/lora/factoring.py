"""Updates of other kinds than ``B @ A`` as the factors of a LoRA: exact where their rank allows, else their best part.

Products element by element (LoHa) and of Kronecker (LoKr) have factors that follow from those of their halves; their
dense update is formed only where it is no larger. What is above the `limit` of a rank is cut by the SVD, and the energy
of what was cut is known: it is orthogonal to what is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from lrconvert.core.dtypes import F64, Array, Stored
from lrconvert.lora import svd
from lrconvert.lora.adapter import LoraTarget, Target
from lrconvert.lora.svd import Factors

_NEGLIGIBLE = 1e-15  # of the energy: below the rounding of factors in float32
_OVERSAMPLING = 10
_ITERATIONS = 4  # of the subspace: spectra of whole weights decay slowly
_SMALL = 512  # a matrix of no more rows or columns than this is decomposed as a whole

Half: TypeAlias = "F64 | tuple[F64, F64]"
"""A matrix (out, in), or its factors B (out, r) and A (r, in)."""


@dataclass(frozen=True, eq=False)
class Factored:
    """``b @ a`` with a (r, in) and b (out, r), float64; `lost` is the squared norm of what it lacks."""

    a: F64
    b: F64
    lost: float = 0.0


def of_product(b: F64, a: F64, limit: int) -> Factored:
    """Return ``b @ a`` with factors of at most `limit` components: as they are if there are no more, else cut."""
    if a.shape[0] <= limit:
        return Factored(a, b)
    factors = decomposed((b, a), limit)
    return _cut(factors, limit, float(np.sum(np.square(factors.s))))


def of_hadamard(one: tuple[F64, F64], other: tuple[F64, F64], limit: int) -> Factored:
    """Return ``(b1 @ a1) * (b2 @ a2)``, element by element, of pairs (b (out, r), a (r, in)): a product of r1 * r2
    components, row by row and column by column products of the halves (Khatri and Rao)."""
    (b1, a1), (b2, a2) = one, other
    rank, (out, inner) = b1.shape[1] * b2.shape[1], (b1.shape[0], a1.shape[1])
    if rank > limit and rank * (out + inner) >= out * inner:
        return of_matrix((b1 @ a1) * (b2 @ a2), limit)
    b = (b1[:, :, None] * b2[:, None, :]).reshape(out, rank)
    a = (a1[:, None, :] * a2[None, :, :]).reshape(rank, inner)
    return of_product(b, a, limit)


def of_kronecker(one: Half, other: Half, limit: int) -> Factored:
    """Return the Kronecker product of two matrices, by the products of their singular values."""
    left, right = decomposed(one, limit), decomposed(other, limit)
    energy = _energy(one) * _energy(other)
    values = np.multiply.outer(left.s, right.s).reshape(-1)
    order = np.argsort(-values, kind="stable")[: max(1, limit)]
    i, j = np.divmod(order, len(right.s))
    u = (left.U[:, None, i] * right.U[None, :, j]).reshape(-1, len(order))
    vt = (left.Vt[i, :, None] * right.Vt[j, None, :]).reshape(len(order), -1)
    return _cut(Factors(u, values[order], vt), limit, energy)


def of_matrix(update: Array, limit: int) -> Factored:
    """Return a dense update (out, in) with factors of at most `limit` components."""
    return _cut(decomposed(update, limit), limit, _energy(update))


def decomposed(matrix: Half | Array, limit: int) -> Factors:
    """Return the SVD of a matrix, or of a product: all of it where that is small or known by its factors, else the
    first `limit` components, by subspace iteration from a fixed start (Halko, Martinsson and Tropp, 2011)."""
    if isinstance(matrix, tuple):
        b, a = matrix
        if a.shape[0] < min(b.shape[0], a.shape[1]):
            return svd.svd(_pair(b, a))
        matrix = b @ a
    if min(matrix.shape) <= max(_SMALL, limit):
        small = matrix.astype(np.float64)
        identity = np.eye(min(small.shape))
        wide = small.shape[0] <= small.shape[1]
        return svd.svd(_pair(identity, small) if wide else _pair(small, identity))
    return _dominant(matrix, limit)


def _dominant(matrix: Array, rank: int) -> Factors:
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], width)).astype(matrix.dtype)
    basis = np.linalg.qr(matrix @ start)[0]
    for _ in range(_ITERATIONS):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    return svd.svd(_pair(basis.astype(np.float64), (basis.T @ matrix).astype(np.float64)))


def _pair(b: F64, a: F64) -> LoraTarget:
    return LoraTarget(Target("", (b.shape[0], a.shape[1])), Stored("F64", a), Stored("F64", b), 1.0)


def _energy(matrix: Half | Array) -> float:
    if isinstance(matrix, tuple):
        b, a = matrix
        return float(np.sum((b.T @ b) * (a @ a.T)))
    return float(np.sum(np.square(matrix, dtype=np.float64)))


def _cut(factors: Factors, limit: int, energy: float) -> Factored:
    """Return the first components, at least one and at most `limit`; those that no number would show are left out."""
    squares = np.square(factors.s)
    tails = np.append(np.cumsum(squares[::-1])[::-1], 0.0)  # energy from component k on
    needed = int(np.searchsorted(-tails, -_NEGLIGIBLE * tails[0])) if tails[0] > 0 else 1
    rank = max(1, min(needed, limit, len(factors.s)))
    a, b = svd.balanced(factors, rank)
    lost = max(0.0, energy - float(squares[:rank].sum()))
    return Factored(a, b, lost if lost > _NEGLIGIBLE * 100 * energy else 0.0)
