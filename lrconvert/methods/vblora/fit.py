"""From an allocation to tensors: a bank trained on the rows of the SVD, then all codes refitted to the update."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lrconvert.core.dtypes import F64, Array
from lrconvert.core.limits import MAX_DIM
from lrconvert.lora import packing, svd
from lrconvert.lora.adapter import LoraAdapter, LoraTarget
from lrconvert.lora.input_statistics import Moment
from lrconvert.methods.base import FitContext
from lrconvert.methods.vblora.bank import train_bank
from lrconvert.methods.vblora.coder import Coder
from lrconvert.methods.vblora.form import Config, Form, canonical_codes, coded_rows
from lrconvert.methods.vblora.refit import Refit, Update

_ROUNDS = 6  # alternations of codes and bank on the training sample
_SAMPLE = 1 << 14  # sub-vectors the bank is trained on, or 32 per vector if that is more
_SWEEPS = (3, 12)  # alternations of A, B and bank on the update itself: at most as many as `_WORK` allows
_SETTLED = 1e-3  # relative fall of the error below which a sweep was the last
_NARROW = 2  # partial codes kept in the sweeps: the bank hardly depends on them
_WIDE = (4, 20)  # and in the last two, which decide the codes: as many as `_WORK` allows
_WORK = 5e8  # scores of a wide sweep, and of all narrow ones
_SAVED = 3e-9  # seconds that compiled loops save for a score


@dataclass(frozen=True)
class Components:
    """The largest components of an update, ``U @ diag(s) @ Vt`` with rows of Vt (k, in) and columns of U (out, k) of
    length 1; `squares` (k,): the square of each row of Vt in the metric of the fit."""

    U: F64
    s: F64
    Vt: F64
    squares: F64


class Problem:
    """The problem of a fit: the rows to code as sub-vectors `x` (n, b), scaled to mean square 1 if there are gains;
    what a squared error of each row costs in the update (`weight`), and under statistics of each number (`importance`);
    and the sources (`updates`)."""

    def __init__(
        self, lora: LoraAdapter, config: Config, context: FitContext, factors: Sequence[Components] | None = None
    ) -> None:
        self.form, self.rows = config.form, coded_rows(config, lora.shapes())
        b, gains, device = self.form.vector_length, self.form.gains, context.device
        x = np.zeros((int(self.rows.starts[-1]), b), np.float32)
        self.weight = np.zeros(len(self.rows.counts))
        self.scale = np.ones(len(self.rows.counts))  # what a row of x must be multiplied with
        self.updates: list[Update] = []
        importance = None if context.statistics is None else np.ones_like(x)
        row = 0
        for which, (pair, rank) in enumerate(zip(lora.targets, config.ranks, strict=True)):
            left, right = _tensor(pair.B, device), _tensor(pair.A, device)
            metric = None if context.statistics is None else partial(_metric, pair, context)
            self.updates.append(Update(left, right, pair.scale, row, rank, metric))
            if rank == 0:
                continue
            top = top_components(pair, rank, context) if factors is None else factors[which]
            s = top.s[:rank]
            costs = np.ones(len(s)), top.squares[:rank]
            for n, side in enumerate((top.Vt[:rank], top.U[:, :rank].T)):
                length = side.shape[1]
                span = slice(int(self.rows.starts[row]), int(self.rows.starts[row + rank]))
                sub_vectors = x[span].reshape(rank, -1)
                sub_vectors[: len(s), :length] = side * (np.sqrt(length) if gains else np.sqrt(s)[:, None])
                used = slice(row, row + len(s))
                self.weight[used] = costs[n] * (s * s / length if gains else s)
                self.scale[used] = np.sqrt(s / length) if gains else 1.0
                if importance is not None and metric is not None and n == 0:
                    importance[span].reshape(rank, -1)[:, :length] = metric().squares
                row += rank
        self.importance = None if importance is None else torch.from_numpy(importance).to(device)
        self.x = torch.from_numpy(x).to(device)

    def train(self, seed: int, rounds: int, sample: int = MAX_DIM) -> tuple[Coder, Tensor]:
        """Return a bank for at most about `sample` sub-vectors, with their codes; and these sub-vectors."""
        form = self.form
        rows, x, importance = self.rows, self.x, self.importance
        if len(x) > 2 * sample:
            rows, kept = rows.thinned(len(x) // sample)
            places = _tensor(kept, str(x.device))
            x, importance = x[places], None if importance is None else importance[places]
        shape = (form.num_vectors, form.top_k, form.denominator, form.gains)
        return train_bank(x, rows, self.weight, shape, np.random.default_rng(seed), rounds, importance), x

    def refit(self, coder: Coder) -> Refit:
        """Return the refit of the codes of all rows, at the size that the update needs."""
        if coder.scaled:
            coder.gains *= np.repeat(self.scale, self.rows.passes)
        return Refit(coder, self.updates)


def top_components(pair: LoraTarget, rank: int, context: FitContext) -> Components:
    """Return the largest `rank` components of a target."""
    if rank == 0:
        out, inner = pair.target.matrix_shape
        return Components(np.zeros((out, 0)), np.zeros(0), np.zeros((0, inner)), np.zeros(0))
    whole = svd.svd(pair, context.metric(pair))
    U, s, Vt = whole.U[:, :rank].copy(), whole.s[:rank], whole.Vt[:rank].copy()
    if context.statistics is None:
        return Components(U, s, Vt, np.ones(len(s)))
    lengths = np.maximum(np.linalg.norm(Vt, axis=1), 1e-300)
    return Components(U, s * lengths, Vt / lengths[:, None], lengths**-2)


def _metric(pair: LoraTarget, context: FitContext) -> Moment:
    metric = context.metric(pair)
    assert metric is not None  # it is needed under statistics only
    return metric


def _tensor(array: Array, device: str) -> Tensor:
    """As float32 (integers as they are), without a copy where that can be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a read-only array is only read
        kind = np.float32 if array.dtype.kind == "f" else array.dtype
        return torch.from_numpy(np.ascontiguousarray(array, kind)).to(device)


def fit(lora: LoraAdapter, config: Config, context: FitContext) -> dict[str, Array]:
    """Return the payload tensors: train a bank on the rows of the SVD (a sample if there are many), code all rows, and
    refit codes, gains and bank on the update itself; the last sweep runs on the bank as it will be stored."""
    form = config.form
    problem = Problem(lora, config, context)
    context.progress(0.1, "training the bank")
    coder, x = problem.train(context.seed, _ROUNDS, max(_SAMPLE, 32 * form.num_vectors))
    if len(x) < len(problem.x):
        shape = form.top_k, form.denominator, form.gains
        coder = Coder.new(problem.rows, coder.bank, *shape, problem.importance)
        coder.recode(np.arange(len(problem.rows.counts)), problem.x, fresh=True)
    refit = problem.refit(coder)
    del problem, x
    context.progress(0.4, "refitting")
    scores = float(coder.rows.codes * form.num_vectors)
    wide, sweeps = int(np.clip(_WORK / scores, *_WIDE)), int(np.clip(_WORK / scores, *_SWEEPS))
    coder.allow_loops(_SAVED * scores * (2 * wide + 3 * _NARROW))
    coder.beam = _NARROW
    error = refit.error()
    for turn in range(sweeps):
        before, error = error, _sweep(refit, error)
        context.progress(0.4 + 0.4 * (turn + 1) / sweeps, "refitting")
        if error > before * (1 - _SETTLED):
            break
    coder.beam = wide
    _sweep(refit, error)
    tensors = _store_bank(coder, form)
    coder.exact = True
    refit.refresh()
    stored, kept = refit.error(), coder.codes()
    refit.sweep(0)
    refit.sweep(1)
    if refit.error() > stored:
        coder.restore(kept)
    return {**tensors, **_store_codes(coder, form)}


def _sweep(refit: Refit, before: float) -> float:
    """Recode both sides and solve the bank, unless that raises the error `before`. Return the error."""
    kept = refit.coder.codes()
    refit.sweep(0)
    refit.sweep(1)
    error = refit.improve_bank(refit.error())
    if error > before:  # codes see only the diagonal of a metric
        refit.coder.restore(kept)
        refit.refresh()
    return min(error, before)


def _store_bank(coder: Coder, form: Form) -> dict[str, Array]:
    """The bank as stored; from now on the coder works with these very numbers."""
    bank = coder.bank.cpu().numpy()
    if form.bits == 16:
        stored = packing.round_half(bank)
        coder.bank = coder.tensor(stored)
        return {"bank": stored}
    codes, scales = packing.quantize_rows(bank, form.bits)
    scales = packing.round_half(scales)
    coder.bank = coder.tensor(packing.code_values(codes, form.bits) * scales[:, None])
    return {"bank": codes, "scales": scales}


def _store_codes(coder: Coder, form: Form) -> dict[str, Array]:
    indices = coder.indices.cpu().numpy()
    tensors: dict[str, Array] = {}
    if form.top_k > 1:
        units = np.rint(coder.weights.cpu().numpy() * form.denominator).astype(np.int64)
        indices, units = canonical_codes(indices, units)
        tensors["weights"] = units[:, 1:].astype(np.uint32)
    tensors["indices"] = indices.astype(np.uint32)
    if form.gains:
        tensors["gains"] = packing.round_half(coder.gains)
    return tensors
