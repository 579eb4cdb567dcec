"""The fit of a block: sums over residue classes, a small solve, and quantizing with the error fed back."""

from __future__ import annotations

import numpy as np

from lrconvert.core.dtypes import F32, F64, Array
from lrconvert.lora import packing, svd
from lrconvert.lora.adapter import LoraTarget
from lrconvert.lora.input_statistics import Moment
from lrconvert.methods.bone.form import Config
from lrconvert.methods.shared.widths import groups_of

_SWEEPS = 2  # times that every row is quantized again for the others


def tiling(rank: int, width: int) -> Array:
    """Return T (rank, width) of booleans: which numbers of a side each row of a block stands for."""
    return np.asarray(np.arange(width) % max(rank, 1) == np.arange(rank)[:, None])


# --- sums over residue classes --------------------------------------------------------------------------------------


def fold(x: F64, rank: int) -> F64:
    """Return (..., rank) for x (..., n): columns added up by their number modulo `rank`."""
    n = x.shape[-1]
    if n % rank:
        padded = np.zeros((*x.shape[:-1], n + -n % rank))
        padded[..., :n] = x
        x = padded
    return np.asarray(x.reshape(*x.shape[:-1], x.shape[-1] // rank, rank).sum(axis=-2))


def counts(rank: int, width: int) -> F64:
    """Return how many of `width` numbers each residue class modulo `rank` has, (rank,)."""
    return np.bincount(np.arange(width) % rank, minlength=rank).astype(np.float64)


class Classes:
    """``right M T^T`` (k, r) and ``T M T^T`` (r, r) of one target at many r, largest first: sums at a multiple of r
    serve for r, so that the moment, which may be wide, is read a few times only. Without a moment of any stack of
    targets, (..., k, r)."""

    def __init__(self, right: F64, metric: Moment | None) -> None:
        self._metric, self._width = metric, right.shape[-1]
        self._weighed = right if metric is None else metric.times(right)
        self._sums: dict[int, tuple[F64, ...]] = {}

    def at(self, rank: int) -> tuple[F64, F64]:
        """Return (``right M T^T``, ``T M T^T``); without a moment the second is its diagonal alone (r,)."""
        parts = self._parts(rank)
        if self._metric is None:
            return parts[0], counts(rank, self._width)
        if self._metric.matrix is not None:
            return parts[0], parts[1]
        return parts[0], parts[2].T @ parts[2] + np.diag(parts[1][0])

    def _parts(self, rank: int) -> tuple[F64, ...]:
        above = min((r for r in self._sums if r % rank == 0), default=0)
        parts = self._sums[above] if above else self._whole()
        square = self._metric is not None and self._metric.matrix is not None
        folded = (fold(parts[0], rank), *(fold(part, rank) for part in parts[1:]))
        if square:
            folded = folded[0], fold(folded[1].T, rank)
        self._sums[rank] = folded
        return folded

    def _whole(self) -> tuple[F64, ...]:
        metric = self._metric
        if metric is None:
            return (self._weighed,)
        if metric.matrix is not None:
            return self._weighed, metric.matrix.astype(np.float64)
        rows = np.zeros((0, self._width)) if metric.rows is None else metric.rows.astype(np.float64)
        return self._weighed, metric.rest[None], rows


def factors(pair: LoraTarget) -> tuple[F64, F64]:
    """Return (left (out, k), right (k, in)), whose product is the update."""
    return pair.scale * pair.B.astype(np.float64), pair.A.astype(np.float64)


def upper_root(gram: F64) -> F64:
    """Return U upper triangular with ``U U^T = gram``, positive definite: U[k, k]^2 is what of an error in row k is
    left when the rows after it make up for it. Of each of (..., r, r)."""
    return np.asarray(np.linalg.cholesky(gram[..., ::-1, ::-1])[..., ::-1, ::-1], np.float64)


def per_class(classes: tuple[F64, F64]) -> F64:
    """Return ``right M T^T (T M T^T)^-1`` (k, r), the second factor of the best D^T."""
    products, gram = classes
    return products / gram if gram.ndim == 1 else np.asarray(np.linalg.solve(gram, products.T).T, np.float64)


# --- fitting --------------------------------------------------------------------------------------------------------


def fit_target(pair: LoraTarget, config: Config, which: int, metric: Moment | None) -> tuple[Array, F32]:
    """Return (codes or numbers (r, columns), scales (r, groups)) of one target."""
    left, right = factors(pair)
    rank = config.ranks[which]
    if config.turned[which]:
        block = svd.product((fold(left.T, rank) / counts(rank, len(left))).T, right)
        return _quantized_along(block, config, metric)
    columns = config.columns(which, pair.target)
    classes = Classes(right, metric).at(rank)
    means = fold(left.T, columns) * (columns / len(left))  # of the outputs that share a column: mini has several
    block = svd.product(per_class(classes).T, means)
    if config.bits >= 16 or metric is None:
        return coded(block, config)[:2]
    return _quantized_together(block, classes[1], config)


def coded(rows: F64, config: Config, weights: Array | None = None) -> tuple[Array, F32, F64]:
    """Return (codes or numbers (n, d), scales (n, groups), the numbers they stand for); `weights` (d,) say how much
    each column counts."""
    n, d = rows.shape
    if config.bits >= 16:
        numbers = rows.astype(np.float32)
        return numbers, np.zeros((n, 0), np.float32), numbers.astype(np.float64)
    groups, size = groups_of(d, config.group_size), config.group_size or d
    fill = groups * size - d
    padded = np.pad(rows, ((0, 0), (0, fill)), mode="edge")  # so that the fill does not pull the last scale down
    if weights is not None or fill:
        each = np.pad(np.ones(d) if weights is None else weights, (0, fill), constant_values=1e-30)
        weights = np.tile(each.reshape(groups, size), (n, 1))
    codes, scales = packing.quantize_rows(padded.reshape(n * groups, size), config.bits, weights)
    scales = scales.reshape(n, groups)
    units = packing.code_values(codes, config.bits).reshape(n, groups, size)
    values = (units * scales[:, :, None]).astype(np.float64)
    return codes.reshape(n, -1)[:, :d], scales, values.reshape(n, -1)[:, :d]


def _quantized_together(block: F64, gram: F64, config: Config) -> tuple[Array, F32]:
    """A block whose rows share an error: ``tr(E^T gram E)`` of E = values - block (r, columns).

    Row by row, the rows after it making up for what it lost (GPTQ, arXiv 2210.17323); then every row once more for what
    all others lost, while that is better.
    """
    rank = len(block)
    inverse = np.linalg.inv(upper_root(gram))
    want = block.copy()
    parts = []
    for k in range(rank):
        parts.append(coded(want[k : k + 1], config))
        lost = (want[k] - parts[k][2][0]) / inverse[k, k]
        want[k + 1 :] -= np.outer(inverse[k, k + 1 :], lost)
    errors = np.concatenate([part[2] for part in parts]) - block
    for _ in range(_SWEEPS):
        for k in range(rank):
            target = block[k] + errors[k] - gram[k] @ errors / gram[k, k]
            again = coded(target[None], config)
            if np.sum((again[2][0] - target) ** 2) < np.sum((block[k] + errors[k] - target) ** 2):
                parts[k], errors[k] = again, again[2][0] - block[k]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _quantized_along(block: F64, config: Config, metric: Moment | None) -> tuple[Array, F32]:
    """A block whose columns are inputs: its rows apart, the squares of the inputs as weights, then the best scale of
    each row for its codes under the whole moment."""
    codes, scales, _ = coded(block, config, None if metric is None else metric.squares)
    if metric is None or config.bits >= 16 or config.group_size:
        return codes, scales
    units = packing.code_values(codes, config.bits).astype(np.float64)
    weighed = metric.times(units)
    square = np.maximum(np.sum(weighed * units, axis=1), 1e-300)
    return codes, np.maximum(np.sum(weighed * block, axis=1) / square, 0).astype(np.float32)[:, None]
