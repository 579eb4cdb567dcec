"""Coding rows of numbers with a shared bank of short vectors: the numerics of VB-LoRA, free of any file format.

A *row* (n numbers) is cut into ``ceil(n / b)`` sub-vectors of b numbers; the last may be partly valid. A row is coded in
one or more *passes*, each scaled by one gain:

    x[row, t] ~ sum over passes p of gain[p] * sum_s w[p, t, s] * V[i[p, t, s]],   w >= 0, sum_s w = 1

One code takes k bank vectors. Pass 2 codes what pass 1 left over, so the passes of a row are a residual quantizer: two
passes at 1 bit per number act like 2 bits, with the bank of 1 bit. The k - 1 smaller weights are multiples of
``1 / denominator``, a power of two.

Fitting alternates two steps that never raise the weighted squared error: codes (exact nearest vector for k = 1; exact
pair for k = 2 up to `PAIR_LIMIT` vectors; beyond that, and for k > 2, a search that keeps the previous code when that
is better), and least squares for the bank and the gains. Codes run in torch on any device, in chunks; sums over
sub-vectors run in scipy on the CPU, because scatter-adds on a GPU depend on thread order.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lrconvert.dtypes import F32, F64, Array

if TYPE_CHECKING:
    from torch import Tensor

I64 = npt.NDArray[np.int64]

PAIR_LIMIT = 512  # vectors up to which k = 2 searches all pairs
_CHUNK = 1 << 22  # numbers in one block of scores (16 MB in float32)
_NEAR = 4  # k = 2 above PAIR_LIMIT: how many near vectors are tried as the heavier one, each with all partners
BEAM = 6  # partial codes kept by the search over passes
_CG_ROUNDS = 24


# --- codes ----------------------------------------------------------------------------------------------------------


def encode(
    x: Tensor, bank: Tensor, k: int, denominator: int, previous: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The codes of sub-vectors x (n, b): indices (n, k) and weights (n, k), multiples of 1 / denominator, heaviest first.

    Never worse than `previous`, codes of the same kind. Indices of one code are distinct.
    """
    import torch

    indices = torch.empty((len(x), k), dtype=torch.int64, device=x.device)
    weights = torch.empty((len(x), k), dtype=x.dtype, device=x.device)
    step = max(1, _CHUNK // max(len(bank), 1))
    squares = (bank * bank).sum(1)
    pairs = _Pairs(bank, squares) if k >= 2 else None
    for start in range(0, len(x), step):
        part = slice(start, min(start + step, len(x)))
        if pairs is None:
            indices[part, 0] = torch.addmm(-0.5 * squares, x[part], bank.T).argmax(1)
            weights[part] = 1
            continue
        old = None if previous is None else (previous[0][part], previous[1][part])
        indices[part], weights[part] = pairs.encode(x[part], k, denominator, old)
    return indices, weights


def beam_search(x: Tensor, bank: Tensor, gains: Tensor, previous: Tensor) -> Tensor:
    """Indices (n, passes) with sum_p gains[:, p] * bank[index p] near x (n, b); never worse than `previous`.

    Keeps the `BEAM` best partial sums after each pass. Greedy residual coding is this with a beam of one, and has a
    third more error at three passes.
    """
    import torch

    n, depth = previous.shape
    h = len(bank)
    squares = (bank * bank).sum(1)
    result = previous.clone()
    step = max(1, _CHUNK // (BEAM * h))
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        left, gain = x[part][:, None, :], gains[part]
        error = (x[part] * x[part]).sum(1, keepdim=True)
        codes = torch.zeros((len(left), 1, 0), dtype=torch.int64, device=x.device)
        for p in range(depth):
            g = gain[:, p, None, None]
            scores = torch.matmul(left, bank.T).mul_(-2 * g).add_(g * g * squares).add_(error[:, :, None]).flatten(1)
            if p == depth - 1:
                error, best = scores.min(1, keepdim=True)
            else:
                error, best = scores.topk(min(BEAM, scores.shape[1]), dim=1, largest=False)
            parent, code = best // h, best % h
            codes = torch.cat([codes.gather(1, parent[:, :, None].expand(-1, -1, p)), code[:, :, None]], 2)
            left = left.gather(1, parent[:, :, None].expand(-1, -1, x.shape[1])) - g * bank[code]
        old = x[part] - (gain[:, :, None] * bank[previous[part]]).sum(1)
        better = (left[:, 0] * left[:, 0]).sum(1) < (old * old).sum(1)
        result[part] = torch.where(better[:, None], codes[:, 0], previous[part])
    return result


class _Pairs:
    """Codes of two and more vectors, from Gram matrices.

    With e_p = ||x - v_p||^2 and D = ||v_p - v_q||^2, the best point between v_p and v_q has the weight
    w = (D + e_p - e_q) / 2D on v_q and the squared error e_p - w^2 D. So for the heavier vector p the best partner
    maximizes y = w sqrt(D), clipped to 0 <= w <= 1: one multiply-add per pair.
    """

    def __init__(self, bank: Tensor, squares: Tensor) -> None:
        self.bank, self.squares = bank, squares
        self.gram = bank @ bank.T

    def distances(self, x: Tensor) -> Tensor:
        """(n, h) squared distances."""
        import torch

        return torch.addmm(self.squares, x, self.bank.T, alpha=-2).add_((x * x).sum(1, keepdim=True)).clamp_(min=0)

    def encode(
        self, x: Tensor, k: int, denominator: int, previous: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        import torch

        e = self.distances(x)
        p, q = self.all_pairs(e) if len(self.bank) <= PAIR_LIMIT else self.near_pairs(e, previous)
        indices = torch.stack([p, q], 1)
        for _ in range(k - 2):
            weights = self.simplex(x, indices)
            indices = torch.cat([indices, self.next_vertex(x, indices, weights)[:, None]], 1)
        weights = self.simplex(x, indices)
        indices, weights = _round_weights(indices, weights, denominator)
        if previous is None:
            return indices, weights
        better = self.error(x, indices, weights) < self.error(x, *previous)
        return torch.where(better[:, None], indices, previous[0]), torch.where(better[:, None], weights, previous[1])

    def error(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return (x - combine(self.bank, indices, weights)).square_().sum(1)

    def all_pairs(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """The best pair of all for each row of e (n, h); exact."""
        import torch

        n, h = e.shape
        d = (self.squares[:, None] + self.squares - 2 * self.gram).clamp_(min=0)
        root = d.sqrt()
        slope = torch.where(d > 0, 0.5 / root, torch.zeros_like(d))
        best, first = torch.full((n,), float("inf"), device=e.device), torch.zeros(n, dtype=torch.int64, device=e.device)
        for p in range(h - 1):
            y = torch.addcmul(0.5 * root[p, p + 1 :], e[:, p, None] - e[:, p + 1 :], slope[p, p + 1 :])
            y = torch.minimum(y.clamp_(min=0), root[p, p + 1 :]).amax(1)
            error = e[:, p] - y * y
            better = error < best
            best = torch.where(better, error, best)
            first = torch.where(better, p, first)
        return first, self.partner(e, first, later=True)

    def near_pairs(self, e: Tensor, previous: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """The best pair with one vector among the nearest (and the previous pair's heavier one)."""
        import torch

        near = e.topk(_NEAR, dim=1, largest=False).indices
        if previous is not None:
            near = torch.cat([near, previous[0][:, :1]], 1)
        best = torch.full((len(e),), float("inf"), device=e.device)
        pair = torch.zeros((2, len(e)), dtype=torch.int64, device=e.device)
        for p in near.T:
            q = self.partner(e, p)
            error = self.pair_error(e, p, q)
            better = error < best
            best = torch.where(better, error, best)
            pair = torch.where(better, torch.stack([p, q]), pair)
        return pair[0], pair[1]

    def pair_error(self, e: Tensor, p: Tensor, q: Tensor) -> Tensor:
        import torch

        d = self.squares[p] + self.squares[q] - 2 * self.gram[p, q]
        at_p, at_q = e.gather(1, p[:, None])[:, 0], e.gather(1, q[:, None])[:, 0]
        w = torch.where(d > 0, (d + at_p - at_q) / (2 * d), torch.zeros_like(d)).clamp(0, 1)
        return at_p * (1 - w) + at_q * w - w * (1 - w) * d

    def partner(self, e: Tensor, p: Tensor, later: bool = False) -> Tensor:
        """The best q for each p (n,), not p itself; with `later`, q > p."""
        import torch

        d = (self.gram[p] * -2).add_(self.squares).add_(self.squares[p, None]).clamp_(min=0)
        root = d.sqrt()
        y = (d.add_(e.gather(1, p[:, None])).sub_(e)).div_(root).mul_(0.5)
        y = torch.minimum(torch.nan_to_num_(y, nan=0.0, posinf=0.0, neginf=0.0).clamp_(min=0), root)
        if later:
            y[torch.arange(y.shape[1], device=e.device) <= p[:, None]] = -1
        else:
            y.scatter_(1, p[:, None], -1)
        return y.argmax(1)

    def next_vertex(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The vector, not yet in the code, towards which a line search from the current point gains most."""
        import torch

        point = combine(self.bank, indices, weights)
        left = x - point
        size = (point * point).sum(1, keepdim=True)
        slope = left @ self.bank.T - (left * point).sum(1, keepdim=True)  # <x - u, v - u>
        d = (self.squares + size - 2 * (point @ self.bank.T)).clamp_(min=1e-30)
        t = (slope / d).clamp_(0, 1)
        gain = t * (2 * slope - t * d)
        return gain.scatter_(1, indices, -1.0).argmax(1)

    def simplex(self, x: Tensor, indices: Tensor) -> Tensor:
        """Weights (n, k), nonnegative with sum 1, that bring the chosen vectors nearest to x.

        For two vectors a clipped projection. For more an active-set solve: the equality-constrained least squares,
        dropping negative weights until none is left.
        """
        import torch

        chosen = self.bank[indices]  # (n, k, b)
        if indices.shape[1] == 2:
            line = chosen[:, 1] - chosen[:, 0]
            w = ((x - chosen[:, 0]) * line).sum(1) / (line * line).sum(1).clamp(min=1e-30)
            w = w.clamp(0, 1)
            return torch.stack([1 - w, w], 1)
        k = indices.shape[1]
        gram = (chosen @ chosen.transpose(1, 2)).double()
        right = (chosen @ x[:, :, None])[:, :, 0].double()
        scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
        gram, right = gram / scale[:, None, None], right / scale[:, None]
        active = torch.ones_like(right, dtype=torch.bool)
        eye = torch.eye(k, dtype=gram.dtype, device=x.device)
        weights = right
        for _ in range(k):
            both = (active[:, :, None] & active[:, None, :]).to(gram.dtype)
            system = gram * both + eye * (~active)[:, None, :].to(gram.dtype) + 1e-9 * eye
            ones = active.to(gram.dtype)
            solved = torch.linalg.solve(system, torch.stack([right * ones, ones], 2))
            free, shift = solved[:, :, 0], solved[:, :, 1]
            weights = free + shift * ((1 - free.sum(1)) / shift.sum(1).clamp(min=1e-30))[:, None]
            negative = active & (weights < 0)
            if not bool(negative.any()):
                break
            active &= ~negative
        weights = weights.clamp(min=0)
        return (weights / weights.sum(1, keepdim=True).clamp(min=1e-30)).to(x.dtype)


def combine(bank: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """sum_s weights[:, s] * bank[indices[:, s]] (n, b)."""
    if indices.shape[1] == 1:
        return bank[indices[:, 0]]
    point = bank[indices[:, 0]] * weights[:, :1]
    for s in range(1, indices.shape[1]):
        point.addcmul_(bank[indices[:, s]], weights[:, s, None])
    return point


def _round_weights(indices: Tensor, weights: Tensor, denominator: int) -> tuple[Tensor, Tensor]:
    """Heaviest first; the others rounded to multiples of 1 / denominator below 1/2; the first takes the rest."""
    order = weights.argsort(dim=1, descending=True, stable=True)
    indices, weights = indices.gather(1, order), weights.gather(1, order)
    units = (weights[:, 1:] * denominator).round_().clamp_(max=denominator // 2 - 1)
    for s in range(units.shape[1]):  # rounding must not lift a weight above the first
        while True:
            first = denominator - units.sum(1)
            over = units[:, s] > first
            if not bool(over.any()):
                break
            units[:, s] -= over.to(units.dtype)
    weights = weights.clone()
    weights[:, 1:] = units / denominator
    weights[:, 0] = 1 - weights[:, 1:].sum(1)
    return indices, weights


# --- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """How rows are cut and coded. `counts` (R,): sub-vectors of each row; `passes` (R,): how often it is coded;
    `valid` (M,): valid numbers in each sub-vector of all rows, None if all are full.

    Codes are ordered by row, then pass, then place in the row.
    """

    counts: I64
    passes: I64
    valid: I64 | None = None

    @cached_property
    def starts(self) -> I64:
        """(R + 1,): where each row begins among the sub-vectors."""
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)

    @cached_property
    def first_pass(self) -> I64:
        """(R + 1,): number of the first pass of each row."""
        return np.concatenate([[0], np.cumsum(self.passes)]).astype(np.int64)

    @cached_property
    def code_starts(self) -> I64:
        """(P + 1,): where the codes of each pass begin."""
        return np.concatenate([[0], np.cumsum(np.repeat(self.counts, self.passes))]).astype(np.int64)

    @property
    def codes(self) -> int:
        return int(self.code_starts[-1])


def spans(starts: I64, lengths: I64) -> I64:
    """start, start + 1, ..., start + length - 1 of each span, one after the other."""
    ends = np.cumsum(lengths)
    steps = np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.int64)
    return steps + np.repeat(starts - (ends - lengths), lengths)


def row_sums(values: Tensor, lengths: I64) -> F64:
    """Sums of consecutive runs of `values` (one number per sub-vector); every length is at least 1."""
    if len(lengths) == 0:
        return np.zeros(0)
    numbers = values.cpu().numpy().astype(np.float64)
    sums: F64 = np.add.reduceat(numbers, np.concatenate([[0], np.cumsum(lengths)[:-1]]))
    return sums


@dataclass(eq=False)
class Coder:
    """A bank and the codes of rows in it. `indices`, `weights` (codes, k); `gains` (passes,), fixed at 1 without
    `scaled`."""

    rows: Rows
    bank: Tensor
    k: int
    denominator: int
    scaled: bool
    indices: Tensor
    weights: Tensor
    gains: F64
    trace: list[float] = field(default_factory=list)

    @classmethod
    def new(cls, rows: Rows, bank: Tensor, k: int, denominator: int, scaled: bool) -> Coder:
        import torch

        indices = torch.arange(k, device=bank.device).repeat(rows.codes, 1)
        weights = torch.zeros((rows.codes, k), dtype=bank.dtype, device=bank.device)
        weights[:, 0] = 1
        gains = np.zeros(len(rows.code_starts) - 1) if scaled else np.ones(len(rows.code_starts) - 1)
        return cls(rows, bank, k, denominator, scaled, indices, weights, gains)

    def tensor(self, array: Array) -> Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(array)).to(self.bank.device)

    def unit(self, places: Tensor) -> Tensor:
        """The coded sub-vectors at `places`, without gains."""
        return combine(self.bank, self.indices[places], self.weights[places])

    def recode(self, rows: I64, x: Tensor, *, fresh: bool = False, rounds: int = 1) -> Tensor:
        """Code `rows` anew for the numbers x (their sub-vectors, b; invalid entries zero). Returns what they then stand
        for. One pass after the other with the rest fixed, then the gains; no step raises a row's squared error.

        `fresh` ignores the present codes: each pass then codes what the earlier ones left.
        """
        import torch

        if len(rows) == 0:
            return torch.zeros_like(x)
        found = torch.empty_like(x)
        lengths = self.rows.counts[rows]
        ends = np.cumsum(lengths)
        for depth in np.unique(self.rows.passes[rows]):
            which = np.flatnonzero(self.rows.passes[rows] == depth)
            if len(which) == len(rows):
                return self._recode(rows, x, int(depth), fresh, rounds)
            here = self.tensor(spans(ends[which] - lengths[which], lengths[which]))
            found[here] = self._recode(rows[which], x[here], int(depth), fresh, rounds)
        return found

    def _recode(self, rows: I64, x: Tensor, depth: int, fresh: bool, rounds: int) -> Tensor:
        """`recode` of rows that all have `depth` passes."""
        valid, places = self.valid(rows), self._places(rows, depth)
        if fresh:
            for at in places:
                self.weights[at] = 0
        for _ in range(rounds):
            if self.k == 1 and depth > 1 and not fresh:
                self._recode_jointly(rows, x, valid, places)
                continue
            for p, at in enumerate(places):
                units = [_mask(self.unit(other), valid) for other in places]
                left = x - self._total(rows, units, skip=p)
                if fresh and self.scaled:
                    self.gains[self.rows.first_pass[rows] + p] = _root_mean_square(left, valid, self.rows.counts[rows])
                y = left / self._spread(rows, p) if self.scaled else left
                old = None if fresh else (self.indices[at], self.weights[at])
                self.indices[at], self.weights[at] = self._encode(y, valid, old)
                units[p] = _mask(self.unit(at), valid)
                if self.scaled:
                    self._solve_gains(rows, x, units[: p + 1] if fresh else units)
            fresh = False
        return self.stands_for(rows)

    def _recode_jointly(self, rows: I64, x: Tensor, valid: Tensor | None, places: list[Tensor]) -> None:
        """k = 1, several passes: a beam search over the codes of all passes of a sub-vector, then the gains."""
        import torch

        gains = torch.cat([self._spread(rows, p) for p in range(len(places))], 1)
        old = torch.stack([self.indices[at][:, 0] for at in places], 1)
        new = torch.empty_like(old)
        for here, width in _groups(valid, x.shape[1], len(x)):
            bank = self.bank[:, :width].contiguous()
            new[here] = beam_search(x[here, :width], bank, gains[here], old[here])
        for p, at in enumerate(places):
            self.indices[at, 0], self.weights[at] = new[:, p], 1
        if self.scaled:
            self._solve_gains(rows, x, [_mask(self.unit(at), valid) for at in places])

    def _places(self, rows: I64, depth: int) -> list[Tensor]:
        """Where the codes of each pass of `rows` are."""
        first, lengths = self.rows.first_pass[rows], self.rows.counts[rows]
        return [self.tensor(spans(self.rows.code_starts[first + p], lengths)) for p in range(depth)]

    def stands_for(self, rows: I64) -> Tensor:
        """The numbers (their sub-vectors, b) that the codes of `rows`, all with the same number of passes, mean."""
        valid = self.valid(rows)
        units = [_mask(self.unit(at), valid) for at in self._places(rows, int(self.rows.passes[rows[0]]))]
        return self._total(rows, units)

    def valid(self, rows: I64) -> Tensor | None:
        if self.rows.valid is None:
            return None
        return self.tensor(self.rows.valid[spans(self.rows.starts[rows], self.rows.counts[rows])])

    def _spread(self, rows: I64, which: int) -> Tensor:
        """The gain of pass `which` at each sub-vector of `rows`; a zero gain becomes tiny."""
        gains = self.gains[self.rows.first_pass[rows] + which]
        gains = np.where(np.abs(gains) < 1e-30, 1e-30, gains)
        return self.tensor(np.repeat(gains, self.rows.counts[rows]).astype(np.float32))[:, None]

    def _total(self, rows: I64, units: list[Tensor], skip: int = -1) -> Tensor:
        import torch

        total = torch.zeros((int(self.rows.counts[rows].sum()), self.bank.shape[1]), device=self.bank.device)
        for p, unit in enumerate(units):
            if p != skip:
                total.addcmul_(unit, self._spread(rows, p))
        return total

    def _encode(
        self, y: Tensor, valid: Tensor | None, old: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        import torch

        indices = torch.empty((len(y), self.k), dtype=torch.int64, device=y.device)
        weights = torch.empty((len(y), self.k), dtype=y.dtype, device=y.device)
        for here, width in _groups(valid, y.shape[1], len(y)):
            before = None if old is None else (old[0][here], old[1][here])
            part, bank = y[here, :width].contiguous(), self.bank[:, :width].contiguous()
            indices[here], weights[here] = encode(part, bank, self.k, self.denominator, before)
        return indices, weights

    def _solve_gains(self, rows: I64, x: Tensor, units: list[Tensor]) -> None:
        """Least-squares gains of each row over its first passes."""
        lengths = self.rows.counts[rows]
        depth = len(units)
        gram, right = np.zeros((len(rows), depth, depth)), np.zeros((len(rows), depth))
        for p in range(depth):
            right[:, p] = row_sums((x * units[p]).sum(1), lengths)
            for q in range(p + 1):
                gram[:, p, q] = gram[:, q, p] = row_sums((units[p] * units[q]).sum(1), lengths)
        solved = solve_scaled(gram, right)
        for p in range(depth):
            self.gains[self.rows.first_pass[rows] + p] = solved[:, p]


def solve_scaled(gram: F64, right: F64) -> F64:
    """gram^-1 right for a stack of small Gram matrices, with a relative ridge: dependent or zero rows do no harm."""
    scale = np.sqrt(np.maximum(np.einsum("...ii->...i", gram), 1e-200))
    system = gram / scale[..., :, None] / scale[..., None, :] + 1e-9 * np.eye(gram.shape[-1])
    solved: F64 = np.linalg.solve(system, (right / scale)[..., None])[..., 0] / scale
    return solved


def _groups(valid: Tensor | None, b: int, n: int) -> list[tuple[Any, int]]:
    """(which sub-vectors, valid numbers): all full ones, and one group per distinct remainder."""
    import torch

    if valid is None:
        return [(slice(0, n), b)]
    return [((valid == width).nonzero()[:, 0], width) for width in torch.unique(valid).tolist()]


def _mask(x: Tensor, valid: Tensor | None) -> Tensor:
    import torch

    return x if valid is None else x * (torch.arange(x.shape[1], device=x.device) < valid[:, None])


def _root_mean_square(x: Tensor, valid: Tensor | None, lengths: I64) -> F64:
    sizes = lengths * x.shape[1] if valid is None else row_sums(valid, lengths)
    root: F64 = np.sqrt(row_sums((x * x).sum(1), lengths) / sizes)
    return root


# --- the bank -------------------------------------------------------------------------------------------------------


def solve_bank(coder: Coder, x: F32, weight: F64) -> F32:
    """The bank that minimizes sum_row weight * ||x - coded||^2 for the present codes and gains (rows, b of float32).

    Conjugate gradients on the normal equations, from the present bank, each column on its own: no h x h matrix, one
    step when the codes are plain (the weighted mean), and the error never rises. Unused vectors stay.
    """
    import scipy.sparse

    rows, k = coder.rows, coder.k
    passes = np.repeat(np.arange(len(rows.counts)), rows.passes)  # row of each pass
    lengths = rows.counts[passes]
    where = np.repeat(spans(rows.starts[passes], lengths), k)
    factor = np.repeat(coder.gains, lengths)[:, None] * coder.weights.cpu().numpy()
    h = len(coder.bank)
    code = scipy.sparse.csr_matrix(
        (factor.reshape(-1).astype(np.float32), (where, coder.indices.cpu().numpy().reshape(-1))), shape=(len(x), h)
    )
    back = code.T.tocsr()
    importance = np.repeat(weight / weight.max(), rows.counts).astype(np.float32)[:, None]
    if rows.valid is not None:
        importance = importance * (np.arange(x.shape[1]) < rows.valid[:, None])

    def gradient(bank: F32) -> F64:
        left: F64 = (back @ (importance * (x - code @ bank))).astype(np.float64)
        return left

    bank = coder.bank.cpu().numpy().astype(np.float64)
    diagonal = back.multiply(back) @ np.broadcast_to(importance, x.shape)
    diagonal = np.where(diagonal > 0, diagonal, np.inf)
    residual = gradient(bank.astype(np.float32))
    z = residual / diagonal
    direction, size = z, (residual * z).sum(0)
    begin = size.max(initial=0.0)
    for _ in range(_CG_ROUNDS):
        if not size.max() > 1e-12 * begin:
            break
        image = (back @ (importance * (code @ direction.astype(np.float32)))).astype(np.float64)
        along = (direction * image).sum(0)
        step = np.where(along > 0, size / np.maximum(along, 1e-300), 0.0)
        bank = bank + step * direction
        residual = residual - step * image
        z = residual / diagonal
        size, before = (residual * z).sum(0), size
        direction = z + np.where(before > 0, size / np.maximum(before, 1e-300), 0.0) * direction
    return bank.astype(np.float32)


def seed_bank(x: Tensor, weight: F64, h: int, rng: np.random.Generator, spread: float) -> Tensor:
    """h sub-vectors of x (n, b), drawn by weight and squared distance to those drawn before (k-means++ in rounds),
    times `spread`: weights of a code are convex, so that for k > 1 the bank must enclose the data."""
    import torch

    distance = (x * x).sum(1)
    chosen = np.zeros(0, np.int64)
    rounds = min(8, h)
    for turn in range(rounds):
        count = h * (turn + 1) // rounds - len(chosen)
        mass = weight * distance.cpu().numpy().astype(np.float64) + 1e-12 * weight.max()
        mass[chosen] = 0
        live = int((mass > 0).sum())
        if live < count:
            break
        new = rng.choice(len(x), count, replace=False, p=mass / mass.sum())
        chosen = np.concatenate([chosen, new])
        bank = x[torch.from_numpy(new).to(x.device)]
        step = max(1, _CHUNK // max(count, 1))
        for start in range(0, len(x), step):
            part = x[start : start + step]
            near = torch.addmm(-0.5 * (bank * bank).sum(1), part, bank.T).amax(1)
            there = ((part * part).sum(1) - 2 * near).clamp_(min=0)
            distance[start : start + step] = torch.minimum(distance[start : start + step], there)
    if len(chosen) < h:  # fewer sub-vectors than vectors: the rest are shrunken copies, which no code needs
        more = rng.integers(0, len(x), h - len(chosen))
        chosen = np.concatenate([chosen, more])
    return x[torch.from_numpy(chosen).to(x.device)] * spread


def train_bank(
    x: Tensor, rows: Rows, weight: F64, h: int, k: int, denominator: int, scaled: bool,
    rng: np.random.Generator, rounds: int, restarts: int = 2,
) -> Coder:  # fmt: skip
    """A bank for the sub-vectors x (sum of counts, b) of `rows`, whose squared errors count `weight` (R,), with codes.

    Restarts run a few rounds on the first pass alone; the best one goes on with all passes.
    """
    spread = 1.0 if k == 1 else 1.4
    single = replace(rows, passes=np.ones_like(rows.passes))
    flat = np.repeat(weight, rows.counts)
    everything = np.arange(len(rows.counts))
    numbers = x.cpu().numpy()
    best: tuple[float, Coder] | None = None
    for _ in range(restarts):
        start = Coder.new(single, seed_bank(x, flat, h, rng, spread), k, denominator, scaled)
        error = alternate(start, x, numbers, weight, everything, 3, rng, fresh=True)
        if best is None or error < best[0]:
            best = error, start
    assert best is not None
    coder = best[1]
    if rows.passes.max(initial=1) > 1:
        coder = Coder.new(rows, coder.bank, k, denominator, scaled)
        alternate(coder, x, numbers, weight, everything, rounds, rng, fresh=True)
    else:
        alternate(coder, x, numbers, weight, everything, rounds, rng, fresh=False)
    return coder


def alternate(
    coder: Coder, x: Tensor, numbers: F32, weight: F64, everything: I64, rounds: int, rng: np.random.Generator, fresh: bool
) -> float:
    """Rounds of codes, gains and bank; returns the weighted squared error, which no round raises."""
    error, before = np.inf, np.inf
    for turn in range(rounds + 1):
        value = coder.recode(everything, x, fresh=fresh and turn == 0)
        error = float(row_sums((x - value).square_().sum(1), coder.rows.counts) @ weight)
        coder.trace.append(error)
        if turn == rounds or error > before * (1 - 2e-4):
            break
        before = error
        coder.bank = coder.tensor(solve_bank(coder, numbers, weight))
        reseed(coder, x, value, weight)
    return error


def reseed(coder: Coder, x: Tensor, value: Tensor, weight: F64) -> None:
    """Unused vectors become the sub-vectors that are coded worst. No code uses them, so that no error changes."""
    import torch

    used = torch.zeros(len(coder.bank), dtype=torch.bool, device=coder.bank.device)
    used[coder.indices[coder.weights > 0]] = True
    dead = (~used).nonzero()[:, 0]
    if len(dead) == 0:
        return
    flat = coder.tensor(np.repeat(weight / weight.max(), coder.rows.counts).astype(np.float32))
    worst = (flat * (x - value).square_().sum(1)).topk(min(len(dead), len(x))).indices
    rows = np.searchsorted(coder.rows.starts, worst.cpu().numpy(), side="right") - 1
    gains = coder.gains[coder.rows.first_pass[rows]]
    gains = np.where(np.abs(gains) > 1e-30, gains, 1.0)
    coder.bank[dead[: len(worst)]] = x[worst] / coder.tensor(gains.astype(np.float32))[:, None]


# --- the update itself ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Update:
    """One target of a fit: the source ``left @ right`` (left (out, r) carries the singular values, right (r, in)), and
    where its rows are: rows ``first .. first + rank - 1`` code A, the next ``rank`` rows code the columns of B."""

    left: Tensor
    right: Tensor
    first: int
    rank: int


class Refit:
    """Coding measured by what it is for, the error of the update: ``sum over targets ||left @ right - B @ A||^2``.

    With all other rows fixed, this is a constant plus a weighted squared distance of a row to a known goal, so that
    recoding row by row never raises it. Gains enter linearly and are solved per target and side.
    """

    def __init__(self, coder: Coder, updates: list[Update]) -> None:
        import torch

        self.coder, self.updates = coder, [u for u in updates if u.rank]
        self.energy = sum(float((u.left.double().square().sum(0) * u.right.double().square().sum(1)).sum())
                          for u in updates)  # fmt: skip
        b = coder.bank.shape[1]
        self.value = torch.zeros((int(coder.rows.starts[-1]), b), device=coder.bank.device)
        self.goal = torch.zeros_like(self.value)
        self.weight = np.zeros(len(coder.rows.counts))
        self.refresh()

    def refresh(self) -> None:
        """Recompute what the rows mean, after a change of bank or gains."""
        rows = self.coder.rows
        for depth in np.unique(rows.passes):
            which = np.flatnonzero(rows.passes == depth)
            here = self.coder.tensor(spans(rows.starts[which], rows.counts[which]))
            self.value[here] = self.coder.stands_for(which)

    def side(self, flat: Tensor, update: Update, side: int) -> Tensor:
        """The rows of one side of a target in a flat array: (rank, n), a view."""
        n = update.left.shape[0] if side else update.right.shape[1]
        first = update.first + side * update.rank
        begin, end = (int(self.coder.rows.starts[r]) for r in (first, first + update.rank))
        return flat[begin:end].view(update.rank, -1)[:, :n]

    def error(self) -> float:
        """The squared error of all targets."""
        total = self.energy
        for u in self.updates:
            a, b = self.side(self.value, u, 0).double(), self.side(self.value, u, 1).double()
            cross = ((b @ u.left.double()) * (a @ u.right.double().T)).sum()
            total += float(((a @ a.T) * (b @ b.T)).sum() - 2 * cross)
        return total

    def sweep(self, side: int) -> None:
        """Recode all rows of one side, component by component, then solve their gains."""
        import torch

        grams: list[F64] = []
        free: list[Tensor] = []  # the goal if there were no other components
        for u in self.updates:
            other = self.side(self.value, u, 1 - side).double()
            near, far = (u.left, u.right) if side == 0 else (u.right.T, u.left.T)
            free.append(((other @ near.double()) @ far.double()).float())
            grams.append((other @ other.T).cpu().numpy())
        rows = self.coder.rows
        for j in range(max((u.rank for u in self.updates), default=0)):
            chosen = []
            for u, gram, goal in zip(self.updates, grams, free, strict=True):
                if j >= u.rank:
                    continue
                row = u.first + side * u.rank + j
                self.weight[row] = gram[j, j]
                if gram[j, j] <= 1e-30:
                    continue
                chosen.append(row)
                pull = gram[j] / gram[j, j]
                pull[j] = 0
                others = self.coder.tensor(pull.astype(np.float32)) @ self.side(self.value, u, side)
                self.side(self.goal, u, side)[j] = goal[j] / gram[j, j] - others
            if chosen:
                which = np.array(chosen)
                here = self.coder.tensor(spans(rows.starts[which], rows.counts[which]))
                self.value[here] = self.coder.recode(which, self.goal[here])
        if self.coder.scaled:
            self._solve_gains(side, grams, free)

    def _solve_gains(self, side: int, grams: list[F64], free: list[Tensor]) -> None:
        """All gains of one side of a target at once: the exact minimizer with the codes and the other side fixed."""
        import torch

        coder, rows = self.coder, self.coder.rows
        for u, gram, goal in zip(self.updates, grams, free, strict=True):
            first = u.first + side * u.rank
            passes = rows.passes[first : first + u.rank]
            begin, end = rows.first_pass[first], rows.first_pass[first + u.rank]
            codes = slice(int(rows.code_starts[begin]), int(rows.code_starts[end]))
            units = combine(coder.bank, coder.indices[codes], coder.weights[codes])
            units = units.view(int(end - begin), -1)[:, : goal.shape[1]]
            owner = np.repeat(np.arange(u.rank), passes)
            dots = (units @ units.T).double().cpu().numpy()
            right = (units * goal[self.coder.tensor(owner)]).sum(1).double().cpu().numpy()
            gains = solve_scaled(gram[np.ix_(owner, owner)] * dots, right)
            coder.gains[begin:end] = gains
            scaled = units * coder.tensor(gains.astype(np.float32))[:, None]
            value = torch.zeros((u.rank, units.shape[1]), device=units.device)
            value.index_add_(0, coder.tensor(owner), scaled)
            self.side(self.value, u, side)[:] = value

    def improve_bank(self, before: float) -> float:
        """A least-squares bank for the goals of the last sweeps, kept if the error of the update falls."""
        old, value = self.coder.bank, self.value.clone()
        self.coder.bank = self.coder.tensor(solve_bank(self.coder, self.goal.cpu().numpy(), self.weight))
        self.refresh()
        after = self.error()
        if after < before:
            return after
        self.coder.bank, self.value = old, value
        return before
