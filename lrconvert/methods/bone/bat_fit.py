"""The fit of a Bat: a least-squares problem for each block of outputs, and quantizing with the error fed back.

Block i of the outputs depends on nothing but D_i, so that each is a problem of its own in r x r unknowns, and the base
passes through once, a few rows at a time.
"""

from __future__ import annotations

import numpy as np

from lrconvert.core.dtypes import F32, F64, Array
from lrconvert.lora import packing
from lrconvert.lora.adapter import LoraTarget
from lrconvert.lora.base_weights import BLOCK, BaseWeights
from lrconvert.lora.input_statistics import Moment
from lrconvert.methods.bone.bat import blocks_of
from lrconvert.methods.bone.fit import Classes, coded, counts, factors, upper_root
from lrconvert.methods.bone.form import Config

_TOLERANCE = 1e-5  # of the gradient beside the first one, where iterations end: the error is its square from the least
_ROUNDS = 200  # that nothing needs: W_ij is small beside I, for which the preconditioner is the inverse
_WIDE = 1 << 22  # elements at a time under a metric, which costs a product with all of its rows each time
_RIDGE = 1e-10  # of the mean diagonal, for blocks that some base makes singular


def fit_block(
    pair: LoraTarget, config: Config, which: int, metric: Moment | None, base: BaseWeights
) -> tuple[Array, F32]:
    """Return (codes or numbers (r, out), scales (r, groups)) of the D with the least error."""
    rank, out = config.ranks[which], pair.target.out_features
    problem = _Problem(pair, rank, metric)
    block, squares = np.empty((rank, out)), np.empty((out // rank, rank, rank))
    for top, rows in base.blocks(pair.target, rank, BLOCK if metric is None else _WIDE):
        stop = top + len(rows)
        d, squares[top // rank : stop // rank], _ = problem.solve(top, rows)
        block[:, top:stop] = d.reshape(-1, rank).T
    if config.bits >= 16:
        return coded(block, config)[:2]
    return _quantized(block, squares, problem.gram, config)


def worth(pair: LoraTarget, rank: int, metric: Moment | None, base: BaseWeights) -> tuple[float, float]:
    """Return (the energy that a Bat of this rank keeps, what it loses of that per share of a row's energy that
    quantizing loses), from a few of the output blocks."""
    out, inner = pair.target.matrix_shape
    height = min(out, max(1, BLOCK // (inner * rank)) * rank)
    top = (out - height) // 2 // rank * rank
    problem = _Problem(pair, rank, metric)
    d, squares, kept = problem.solve(top, base.rows(pair.target, top, top + height))
    rows, columns = (np.diagonal(upper_root(x), axis1=-2, axis2=-1) ** 2 for x in (squares, problem.gram))
    alone = rows[:, :, None] * columns  # what of an error in a number is left when those after it make up for it
    sizes = np.mean(np.square(d), axis=(0, 1))
    return kept * out / height, float(np.sum(alone * sizes)) * out / height


class _Problem:
    """One target at one rank. `gram` is T M T^T (r, r) of Bone over the number of input blocks, so that the error of a
    D_i by e is nearly ``tr(square_i e gram e^T)``."""

    def __init__(self, pair: LoraTarget, rank: int, metric: Moment | None) -> None:
        self._left, right = factors(pair)
        self._rank, self._metric = rank, metric
        blocks = pair.target.in_features // rank
        whole = np.diag(counts(rank, pair.target.in_features)) if metric is None else Classes(right, metric).at(rank)[1]
        self.gram = whole / blocks + _RIDGE * np.trace(whole) / (blocks * rank) * np.eye(rank)
        self._weighed = right if metric is None else metric.times(right)

    def solve(self, top: int, rows: Array) -> tuple[F64, F64, float]:
        """Return (D_i, sum_j M_ij^T M_ij, both (blocks, r, r), the energy kept) for rows of the base from `top` on."""
        system = _System(rows.astype(np.float64), self._rank, self._metric, self.gram)
        return system.solve(self._left[top : top + len(rows)] @ self._weighed)


def _quantized(block: F64, squares: F64, gram: F64, config: Config) -> tuple[Array, F32]:
    """D (r, out) of few bits: number by number, those after it in its D_i making up for what it lost (GPTQ, arXiv
    2210.17323, the second moments being a Kronecker product); then the best scales for these codes."""
    rank, out = block.shape
    along = np.linalg.inv(upper_root(squares))  # (blocks, k, k')
    across = np.linalg.inv(upper_root(gram))  # (c, c')
    weights = (1 / np.diagonal(along, axis1=1, axis2=2) ** 2).reshape(out)
    size = config.group_size or out
    want = blocks_of(block).copy()  # (blocks, k, c)
    codes, scales = [], []
    for c in range(rank):
        _, steps, _ = coded(want[:, :, c].reshape(1, out), config, weights)
        each = np.repeat(steps[0], size)[:out].reshape(-1, rank)
        row, now, lost = np.empty((len(want), rank), np.uint8), want[:, :, c].copy(), np.empty((len(want), rank))
        for k in range(rank):
            row[:, k] = packing.nearest_codes(now[:, k, None], each[:, k], config.bits)[:, 0]
            value = packing.code_values(row[:, k], config.bits) * each[:, k].astype(np.float64)
            lost[:, k] = (now[:, k] - value) / along[:, k, k]
            now[:, k:] -= lost[:, k, None] * along[:, k, k:]
        passed = (lost[:, None, :] @ along)[:, 0, :] / across[c, c]  # on to the same rows of later columns
        want[:, :, c + 1 :] -= passed[:, :, None] * across[c, c + 1 :]
        codes.append(row.reshape(out))
        scales.append(steps[0])
    chosen, units = np.array(codes), packing.code_values(np.array(codes), config.bits)
    if config.group_size:
        return chosen, np.array(scales)
    return chosen, _best_scales(blocks_of(block), blocks_of(units.astype(np.float64)), squares, gram)


def _best_scales(wanted: F64, units: F64, squares: F64, gram: F64) -> F32:
    """The scale of each column c (r, 1) for which ``sum_i tr(square_i e_i gram e_i^T)`` is least, e_i what `units`
    (blocks, k, c) times the scales lack of `wanted`."""
    weighed = squares @ units
    system = np.einsum("ikc,ikd->cd", units, weighed) * gram
    goal = np.einsum("ikc,ikd->cd", weighed, wanted) * gram
    ridge = _RIDGE * np.trace(system) / len(gram) + 1e-300
    scales = np.linalg.solve(system + ridge * np.eye(len(gram)), goal.sum(axis=1))
    return np.asarray(scales[:, None], np.float32)


class _System:
    """The normal equations of some output blocks: ``sum_jl M_ij^T M_il D_i Sigma_lj`` with M_ij = W_ij + I."""

    def __init__(self, weight: F64, rank: int, metric: Moment | None, gram: F64) -> None:
        self._rank, self._blocks = rank, len(weight) // rank
        parts = weight.reshape(self._blocks, rank, -1, rank)
        k = np.arange(rank)
        parts[:, k, :, k] += 1
        self._mixed = parts.reshape(self._blocks, -1, rank)  # (blocks, rows and input blocks, r)
        square = self._transposed_times(self._mixed)
        ridge = _RIDGE * np.trace(square, axis1=1, axis2=2)[:, None, None] / rank + 1e-300
        self._square = square + ridge * np.eye(rank)
        self._metric, self._gram = metric, gram

    def _transposed_times(self, x: F64) -> F64:
        return np.asarray(self._mixed.transpose(0, 2, 1) @ x, np.float64)

    def solve(self, weighed: F64) -> tuple[F64, F64, float]:
        """Return (the D_i (blocks, r, r), their sum_j M_ij^T M_ij, the energy that they keep) for rows of the update
        times the metric (blocks * r, in)."""
        goal = self._transposed_times(weighed.reshape(self._mixed.shape))
        if self._metric is None:
            solution = np.asarray(np.linalg.solve(self._square, goal), np.float64)
        else:
            solution = self._conjugate_gradients(goal, self._metric)
        return solution, self._square, float(np.vdot(goal, solution))

    def _conjugate_gradients(self, goal: F64, metric: Moment) -> F64:
        """Every block with steps of its own. The preconditioner takes sum_jl M_ij^T M_il Sigma_lj for the product of
        its two halves, which it is where the W_ij are small."""
        outer, inner = np.linalg.inv(self._square), np.linalg.inv(self._gram)

        def precondition(x: F64) -> F64:
            return np.asarray(outer @ x @ inner, np.float64)

        def dots(x: F64, y: F64) -> F64:
            return np.asarray((x * y).sum(axis=(1, 2))[:, None, None], np.float64)

        def ratio(over: F64, under: F64) -> F64:
            return np.divide(over, under, out=np.zeros_like(over), where=under > 0)

        solution, left = np.zeros_like(goal), goal.copy()
        step = near = precondition(left)
        size = first = dots(left, near)
        for _ in range(_ROUNDS):
            if (size <= _TOLERANCE**2 * first).all():
                break
            update = (self._mixed @ step).reshape(self._blocks * self._rank, -1)
            image = self._transposed_times(metric.times(update).reshape(self._mixed.shape))
            length = ratio(size, dots(step, image))
            solution += length * step
            left -= length * image
            near = precondition(left)
            size, before = dots(left, near), size
            step = near + ratio(size, before) * step
        return solution
