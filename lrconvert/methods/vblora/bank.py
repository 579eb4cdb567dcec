"""The bank of short vectors: drawn from the data, solved by least squares, trained in turn with the codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrconvert.core.dtypes import F32, F64
from lrconvert.methods.vblora.coder import Coder, row_sums
from lrconvert.methods.vblora.rows import Rows, spans
from lrconvert.methods.vblora.subvectors import CHUNK

_CG_ROUNDS = 24
_SCORES = 128  # of all partial codes in training: banks hardly depend on them, but few vectors need some
_SETTLED = 2e-4  # relative fall of the error below which a round was the last


def seed_bank(x: Tensor, weight: F64, h: int, rng: np.random.Generator) -> Tensor:
    """Return h sub-vectors of x (n, b), drawn by weight and squared distance to those drawn before (k-means++ in
    rounds).

    For k > 1 the bank must come to enclose the data, since weights are convex; starting with scaled-up sub-vectors (1.2
    to 3 times) was measured to be no better.
    """
    distance = (x * x).sum(1)
    chosen = np.zeros(0, np.int64)
    for turn in range(min(8, h)):
        count = h * (turn + 1) // min(8, h) - len(chosen)
        mass = weight * distance.cpu().numpy().astype(np.float64)
        mass[chosen] = 0
        if np.count_nonzero(mass) < count:
            break
        new = rng.choice(len(x), count, replace=False, p=mass / mass.sum())
        chosen = np.concatenate([chosen, new])
        bank = x[torch.from_numpy(new).to(x.device)]
        step = max(1, CHUNK // count)
        for start in range(0, len(x), step):
            part = x[start : start + step]
            near = torch.addmm(-0.5 * (bank * bank).sum(1), part, bank.T).amax(1)
            nearer = ((part * part).sum(1) - 2 * near).clamp_(min=0)
            distance[start : start + step] = torch.minimum(distance[start : start + step], nearer)
    if len(chosen) < h:  # more vectors than distinct sub-vectors
        chosen = np.concatenate([chosen, rng.integers(0, len(x), h - len(chosen))])
    return x[torch.from_numpy(chosen).to(x.device)]


def solve_bank(coder: Coder, x: F32, weight: F64) -> F32:
    """Return the bank that minimizes ``sum over rows of weight * ||x - coded||^2`` with codes and gains fixed.

    Conjugate gradients on the normal equations from the present bank, each column on its own, so that unused vectors
    stay and the error never rises. Columns between two cuts of sub-vectors share one sparse Gram matrix.
    """
    import scipy.sparse

    rows, b = coder.rows, x.shape[1]
    row_of_pass = np.repeat(np.arange(len(rows.counts)), rows.passes)
    lengths = rows.counts[row_of_pass]
    where = np.repeat(spans(rows.starts[row_of_pass], lengths), coder.k)
    factor = np.repeat(coder.gains, lengths)[:, None] * coder.weights.cpu().numpy()
    index = coder.indices.cpu().numpy()
    code = scipy.sparse.csr_matrix((factor.reshape(-1), (where, index.reshape(-1))), shape=(len(x), len(coder.bank)))
    weighted = code.copy()
    counted = np.repeat(weight / max(float(weight.max()), 1e-300), rows.counts)
    if coder.importance is not None:  # of each sub-vector as a whole: one Gram matrix serves all columns
        counted = counted * coder.importance.mean(1).cpu().numpy()
    weighted.data *= np.repeat(counted, np.diff(code.indptr))
    start = coder.bank.cpu().numpy().astype(np.float64)
    goal = np.zeros_like(start)
    step = max(1, CHUNK // b)
    for begin in range(0, len(x), step):
        goal += weighted[begin : begin + step].T @ x[begin : begin + step]
    bank = np.empty_like(start)
    begin = 0
    for end in [b] if rows.valid is None else np.unique(rows.valid).tolist():
        full = slice(None) if rows.valid is None else rows.valid > begin
        bank[:, begin:end] = _descend(weighted[full].T @ code[full], goal[:, begin:end], start[:, begin:end])
        begin = end
    bank[:, begin:] = start[:, begin:]
    return bank.astype(np.float32)


def _descend(gram: Any, right: F64, start: F64) -> F64:
    """A minimizer of ``<bank, gram @ bank> - 2 <bank, right>`` for each column, by conjugate gradients from `start`;
    columns that would not fall stay."""
    bank = start.copy()
    diagonal = gram.diagonal()[:, None]
    diagonal = np.where(diagonal > 0, diagonal, np.inf)
    first = residual = right - gram @ start
    direction = residual / diagonal
    size = (residual * direction).sum(0)
    goal = 1e-9 * size
    for _ in range(_CG_ROUNDS):
        if not (size > goal).any():
            break
        image = gram @ direction
        along = (direction * image).sum(0)
        step = np.where((size > goal) & (along > 1e-6 * size), size / np.maximum(along, 1e-300), 0.0)
        bank += step * direction
        residual = residual - step * image
        scaled = residual / diagonal
        before, size = size, (residual * scaled).sum(0)
        direction = scaled + np.where(step > 0, size / np.maximum(before, 1e-300), 0.0) * direction
    moved = bank - start
    change = (moved * (gram @ moved - 2 * first)).sum(0)
    return np.where(change < 0, bank, start)


def reseed(coder: Coder, x: Tensor, value: Tensor, weight: F64) -> None:
    """Replace unused vectors by the sub-vectors that are coded worst. No code uses them, so that no error changes."""
    used = torch.zeros(len(coder.bank), dtype=torch.bool, device=coder.bank.device)
    used[coder.indices[coder.weights > 0]] = True
    dead = (~used).nonzero()[:, 0]
    if len(dead) == 0:
        return
    shares = np.repeat(weight / max(float(weight.max()), 1e-300), coder.rows.counts)
    importance = coder.tensor(shares.astype(np.float32))
    worst = (importance * coder.squares(x - value)).topk(min(len(dead), len(x))).indices
    rows = np.searchsorted(coder.rows.starts, worst.cpu().numpy(), side="right") - 1
    gains = coder.gains[coder.rows.first_pass[rows]]
    gains = np.where(np.abs(gains) > 1e-30, gains, 1.0)
    bank = coder.bank.clone()
    bank[dead[: len(worst)]] = x[worst] / coder.tensor(gains.astype(np.float32))[:, None]
    coder.bank = bank


def alternate(
    coder: Coder, x: Tensor, weight: F64, rounds: int, *, fresh: bool = False, settled: float = _SETTLED
) -> float:
    """Alternate codes, gains and bank until that brings little. Return the weighted squared error; it only falls."""
    everything, numbers = np.arange(len(coder.rows.counts)), x.cpu().numpy()
    error = before = np.inf
    for turn in range(rounds + 1):
        value = coder.recode(everything, x, fresh=fresh and turn == 0)
        error = float(row_sums(coder.squares(x - value), coder.rows.counts) @ weight)
        coder.trace.append(error)
        if turn == rounds or error > before * (1 - settled):
            break
        before = error
        coder.bank = coder.tensor(solve_bank(coder, numbers, weight))
        reseed(coder, x, value, weight)
        del value
    return error


def train_bank(
    x: Tensor,
    rows: Rows,
    weight: F64,
    shape: tuple[int, int, int, bool],
    rng: np.random.Generator,
    rounds: int,
    importance: Tensor | None = None,
) -> Coder:
    """Return a bank for the sub-vectors x of `rows`, whose squared errors count `weight` (R,), with codes. `shape`:
    number of vectors, k, denominator, scaled. `importance`: see `Coder`.

    The first rounds run on one pass; the bank then goes on with all of them.
    """
    h, k, denominator, scaled = shape
    single = Rows(rows.counts, np.ones_like(rows.passes), rows.valid)
    flat = np.repeat(weight, rows.counts)
    if importance is not None:
        flat = flat * importance.mean(1).cpu().numpy()
    coder = Coder.new(single, seed_bank(x, flat, h, rng), k, denominator, scaled, importance)
    alternate(coder, x, weight, 3, fresh=True)
    if int(rows.passes.max(initial=1)) > 1:
        coder = Coder.new(rows, coder.bank, k, denominator, scaled, importance)
        coder.beam = int(np.clip(_SCORES // h, 1, 8))
        alternate(coder, x, weight, rounds, fresh=True)
    else:
        alternate(coder, x, weight, rounds)
    return coder
