"""The SVD form of a LoRA, by thin QR of its factors and the SVD of an r x r core.

(B G, G^-1 A) is the same update for every invertible G. Fits, budgets and scores work on the one form that does not
depend on the stored coordinates: ``scale * B @ A = U diag(s) Vt`` with orthonormal U (out, r), Vt (r, in). The dense
update (out, in) is never formed: for a 4096 x 4096 target of rank 16 that is some thousand times less work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lrconvert.core.dtypes import F64, Array
from lrconvert.lora.adapter import LoraTarget

if TYPE_CHECKING:
    from lrconvert.lora.input_statistics import Moment


@dataclass(frozen=True)
class Factors:
    """``U @ diag(s) @ Vt``: U (out, k), s (k,) descending, Vt (k, in), float64, k = min(r, out, in).

    In every column of U the entry of largest magnitude is positive (the first of equals), which fixes the signs.
    """

    U: F64
    s: F64
    Vt: F64


_ILL_CONDITIONED = 1e-3  # smallest diagonal of the normalized Cholesky factor that two passes still repair


def _gram_root(x: F64) -> F64 | None:
    """R (k, k) upper triangular with ``R.T @ R = x.T @ x`` for a tall x (n, k), or None if x is too ill-conditioned.

    Columns are normalized first, so that a decaying spectrum alone does not count as ill-conditioned.
    """
    gram = x.T @ x
    norms = np.sqrt(gram.diagonal())
    if not norms.all() or not np.isfinite(norms).all():
        return None
    try:
        lower = np.linalg.cholesky(gram / np.outer(norms, norms))
    except np.linalg.LinAlgError:
        return None
    return None if lower.diagonal().min(initial=1.0) < _ILL_CONDITIONED else lower.T * norms


def _householder(x: F64) -> tuple[F64, F64]:
    import scipy.linalg  # several times faster than numpy's here; needed rarely, so not loaded by every command

    q, r = scipy.linalg.qr(x, mode="economic", check_finite=False)
    return np.asarray(q, np.float64), np.asarray(r, np.float64)


def _qr(x: F64) -> tuple[F64, F64]:
    """Thin QR of a tall x (n, k): Cholesky QR in two passes (Yamamoto et al., 2015), a few matrix products instead of
    k reflections; Householder where the columns are nearly dependent."""
    first = _gram_root(x) if x.shape[0] >= x.shape[1] else None
    if first is None:
        return _householder(x)
    q = x @ np.linalg.inv(first)
    second = _gram_root(q)
    if second is None:
        return _householder(x)
    return q @ np.linalg.inv(second), second @ first


def _r_factor(x: F64) -> F64:
    """The R of a thin QR, up to the signs of its rows."""
    root = _gram_root(x) if x.shape[0] >= x.shape[1] else None
    return _householder(x)[1] if root is None else root


def svd(pair: LoraTarget, moment: Moment | None = None) -> Factors:
    """Return the SVD of ``scale * B @ A`` from its factors: two thin QRs and an SVD of r x r.

    With the `moment` M of the target's input, in the metric of the output: Vt M Vt^T is the identity, s^2 the mean
    squared size of the outputs along U, and cutting at any rank has the least mean squared error of the output.
    """
    q_out, core, r_in = _core(pair, moment)
    u, s, vt = np.linalg.svd(core)
    rank = min(len(s), r_in.shape[1])
    u, s = u[:, :rank], s[:rank]
    left = q_out @ u
    if moment is None:
        right = vt[:rank] @ r_in
    else:
        used = s > 1e-14 * s.max(initial=0.0)
        right = np.where(used, 1 / np.where(used, s, 1), 0)[:, None] * (u.T @ r_in)
    peak = np.argmax(np.abs(left), axis=0)
    sign = np.where(left[peak, np.arange(rank)] < 0, -1.0, 1.0)
    return Factors(left * sign, s, right * sign[:, None])


def _core(pair: LoraTarget, moment: Moment | None) -> tuple[F64, F64, F64]:
    """(Q (out, k), core, R): Q orthonormal; without a moment R (k, in) is orthonormal too and the update is
    ``Q @ core @ R``; with one it is ``Q @ R``, and ``core @ core^T = R M R^T``."""
    q_out, r_out = _qr(pair.B.astype(np.float64))
    if moment is None:
        q_in, r_in = _qr(pair.A.T.astype(np.float64))
        return q_out, pair.scale * (r_out @ r_in.T), q_in.T
    left = pair.scale * r_out
    return q_out, left @ _root(moment.gram(pair.A)), left @ pair.A.astype(np.float64)


def _root(gram: F64) -> F64:
    """Z with ``Z @ Z^T = gram`` for a symmetric matrix without negative eigenvalues, but for rounding."""
    values, vectors = np.linalg.eigh(gram)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)), np.float64)


def singular_values(pair: LoraTarget, moment: Moment | None = None) -> F64:
    """Return the singular values of ``scale * B @ A``, descending, without forming U and Vt; see `svd`."""
    r_out = _r_factor(pair.B.astype(np.float64))
    right = _r_factor(pair.A.T.astype(np.float64)).T if moment is None else _root(moment.gram(pair.A))
    return np.asarray(np.linalg.svd(pair.scale * (r_out @ right), compute_uv=False), np.float64)


def energy_rank(s: F64, share: float) -> int:
    """Return the smallest rank whose squared singular values hold `share` of the total; 0 for an all-zero update."""
    total = np.cumsum(s * s)
    if len(s) == 0 or total[-1] == 0.0:
        return 0
    return int(min(np.searchsorted(total, share * total[-1] * (1 - 1e-12)) + 1, len(s)))


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
    slices = [slice(start, start + _COLUMNS) for start in range(0, width, _COLUMNS)]
    grams = (x @ x.T for x in map(part, slices))
    return np.asarray(sum(grams), np.float64)


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
