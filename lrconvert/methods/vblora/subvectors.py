"""Coding single sub-vectors with a bank of vectors: the nearest one, convex mixtures of k, sums over passes.

All in torch on any device, in chunks of scores that stay in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PAIR_LIMIT = 512  # vectors up to which k = 2 searches all pairs
_LANES = 16  # a multiple of which the compiled search looks at
CHUNK = 1 << 20  # numbers in one block of scores; more falls out of the cache
_NEAR = 4  # k = 2 in training and above PAIR_LIMIT: near vectors that are tried as the heavier one, with all partners
_GRAM_LIMIT = 4096  # vectors up to which all their mutual distances are kept (64 MB)


def encode(
    x: Tensor,
    bank: Tensor,
    k: int,
    denominator: int,
    previous: tuple[Tensor, Tensor] | None = None,
    exact: bool = True,
    mixer: Mixer | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the codes of sub-vectors x (n, b): indices (n, k), distinct, and weights (n, k), multiples of 1 /
    denominator.

    Never worse than `previous`. `exact` asks for the best of all pairs (k = 2, up to `PAIR_LIMIT` vectors; up to the
    rounding of the weight). `mixer`: a ready ``Mixer(bank, exact)``. `weight` (n, b): how much the squared
    error of each number counts; for k = 1 alone.
    """
    indices = torch.empty((len(x), k), dtype=torch.int64, device=x.device)
    weights = torch.ones((len(x), k), dtype=x.dtype, device=x.device)
    half_squares = -0.5 * (bank * bank).sum(1)
    if k > 1 and mixer is None:
        mixer = Mixer(bank, exact)
    step = max(1, CHUNK // len(bank))
    for start in range(0, len(x), step):
        part = slice(start, min(start + step, len(x)))
        if mixer is None and weight is not None:
            scores = (x[part] * weight[part]) @ bank.T
            indices[part, 0] = scores.sub_(weight[part] @ (0.5 * bank * bank).T).argmax(1)
        elif mixer is None:
            indices[part, 0] = torch.addmm(half_squares, x[part], bank.T).argmax(1)
        else:
            old = None if previous is None else (previous[0][part], previous[1][part])
            indices[part], weights[part] = mixer.encode(x[part], k, denominator, old)
    return indices, weights


def combine(bank: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return ``sum_s weights[:, s] * bank[indices[:, s]]``, (n, b)."""
    if indices.shape[1] == 1:
        return bank[indices[:, 0]]
    point = bank[indices[:, 0]] * weights[:, :1]
    for s in range(1, indices.shape[1]):
        point.addcmul_(bank[indices[:, s]], weights[:, s, None])
    return point


class Mixer:
    """Codes of two and more vectors, from distances alone.

    With e_p = ||x - v_p||^2 and D = ||v_p - v_q||^2, the best point between v_p and v_q puts the weight
    w = (D + e_p - e_q) / 2D on v_q and has the squared error e_p - w^2 D. So for a given p the best partner maximizes
    y = w sqrt(D), clipped to 0 <= w <= 1, or twice that: a few operations per pair, and no sub-vector is touched again.
    """

    def __init__(self, bank: Tensor, exact: bool) -> None:
        self.bank = bank
        self.squares = (bank * bank).sum(1)
        self.exact = exact and len(bank) <= PAIR_LIMIT
        self.roots = self._roots(bank, self.squares) if len(bank) <= _GRAM_LIMIT else None

    def _roots(self, vectors: Tensor, squares: Tensor) -> Tensor:
        """(n, h) distances between `vectors` and the bank, positive so that one can divide by them."""
        distances = torch.addmm(self.squares, vectors, self.bank.T, alpha=-2).add_(squares[:, None])
        return distances.clamp_(min=1e-36).sqrt_()

    def encode(
        self, x: Tensor, k: int, denominator: int, previous: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return codes of k vectors for sub-vectors x (n, b), no worse than `previous`; see `encode`."""
        e = torch.addmm(self.squares, x, self.bank.T, alpha=-2).add_((x * x).sum(1, keepdim=True)).clamp_(min=0)
        indices = torch.stack(self._best_pair(e) if self.exact else self._near_pair(e, previous), 1)
        for _ in range(k - 2):
            weights = self._simplex(x, indices)
            indices = torch.cat([indices, self._next_vector(x, indices, weights)[:, None]], 1)
        indices, weights = round_weights(indices, self._simplex(x, indices), denominator)
        if previous is None:
            return indices, weights
        better = (self._error(x, indices, weights) < self._error(x, *previous))[:, None]
        return torch.where(better, indices, previous[0]), torch.where(better, weights, previous[1])

    def _error(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return (x - combine(self.bank, indices, weights)).square_().sum(1)

    def _best_pair(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """The best of all pairs for each row of e (n, h)."""
        assert self.roots is not None
        best = torch.full((len(e),), float("inf"), device=e.device)
        first = torch.zeros(len(e), dtype=torch.int64, device=e.device)
        for p in range(len(self.bank) - 1):
            own, root = e[:, p], self.roots[p, p + 1 :]
            twice = torch.addcdiv(root, own[:, None] - e[:, p + 1 :], root).clamp_(min=0)
            y = 0.5 * torch.minimum(twice, 2 * root).amax(1)
            error = own - y * y
            better = error < best
            best = torch.where(better, error, best)
            first = torch.where(better, p, first)
        return first, self._partner(e, first, later=True)[0]

    def _near_pair(self, e: Tensor, previous: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """The best pair with one of the nearest vectors, or with the heavier one of the previous code."""
        near = e.topk(min(_NEAR, e.shape[1]), dim=1, largest=False).indices
        if previous is not None:
            near = torch.cat([near, previous[0][:, :1]], 1)
        best = torch.full((len(e),), float("inf"), device=e.device)
        first, second = torch.zeros_like(near[:, 0]), torch.zeros_like(near[:, 0])
        for p in near.T:
            q, y = self._partner(e, p)
            error = e.gather(1, p[:, None])[:, 0] - y * y
            better = error < best
            best = torch.where(better, error, best)
            first, second = torch.where(better, p, first), torch.where(better, q, second)
        return first, second

    def _partner(self, e: Tensor, p: Tensor, later: bool = False) -> tuple[Tensor, Tensor]:
        """The best q for each p (n,), other than p, and its y; with `later`, q > p."""
        root = self._roots(self.bank[p], self.squares[p]) if self.roots is None else self.roots[p]
        twice = torch.addcdiv(root, e.gather(1, p[:, None]) - e, root).clamp_(min=0)
        twice = torch.minimum(twice, root.mul_(2), out=twice)
        if later:
            twice[torch.arange(twice.shape[1], device=e.device) <= p[:, None]] = -1
        else:
            twice.scatter_(1, p[:, None], -1.0)
        best = twice.max(1)
        return best.indices, 0.5 * best.values.clamp(min=0)

    def _next_vector(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The vector outside the code towards which a line search from the coded point gains most (Frank-Wolfe)."""
        point = combine(self.bank, indices, weights)
        left = x - point
        slope = left @ self.bank.T - (left * point).sum(1, keepdim=True)
        d = (self.squares + (point * point).sum(1, keepdim=True) - 2 * (point @ self.bank.T)).clamp_(min=1e-30)
        t = (slope / d).clamp_(0, 1)
        return (t * (2 * slope - t * d)).scatter_(1, indices, -1.0).argmax(1)

    def _simplex(self, x: Tensor, indices: Tensor) -> Tensor:
        """Weights, nonnegative with sum 1, that bring the chosen vectors nearest to x: for two a clipped projection,
        for more least squares on the hyperplane, dropping negative weights until none is left."""
        chosen = self.bank[indices]  # (n, k, b)
        k = indices.shape[1]
        if k == 2:
            line = chosen[:, 1] - chosen[:, 0]
            w = ((x - chosen[:, 0]) * line).sum(1) / (line * line).sum(1).clamp(min=1e-30)
            w = w.clamp(0, 1)
            return torch.stack([1 - w, w], 1)
        gram = (chosen @ chosen.transpose(1, 2)).double()
        right = (chosen @ x[:, :, None])[:, :, 0].double()
        scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
        gram, right = gram / scale[:, None, None], right / scale[:, None]
        eye = torch.eye(k, dtype=gram.dtype, device=x.device)
        active = torch.ones_like(right)
        weights = right
        for _ in range(k):
            system = gram * active[:, :, None] * active[:, None, :] + eye * (1 - active)[:, None, :] + 1e-9 * eye
            solved = torch.linalg.solve(system, torch.stack([right * active, active], 2))
            free, shift = solved[:, :, 0], solved[:, :, 1]
            weights = free + shift * ((1 - free.sum(1)) / shift.sum(1).clamp(min=1e-30))[:, None]
            negative = (active > 0) & (weights < 0)
            if not bool(negative.any()):
                break
            active = active * ~negative
        weights = weights.clamp(min=0)
        return (weights / weights.sum(1, keepdim=True).clamp(min=1e-30)).to(x.dtype)


def round_weights(indices: Tensor, weights: Tensor, denominator: int) -> tuple[Tensor, Tensor]:
    """Return the codes with the heaviest vector first; the other weights as multiples of 1 / denominator below 1/2,
    none above the first, which takes the rest."""
    order = weights.argsort(dim=1, descending=True, stable=True)
    indices, weights = indices.gather(1, order), weights.gather(1, order)
    units = (weights[:, 1:] * denominator).round_().clamp_(max=denominator // 2 - 1)
    while True:
        over = units > denominator - units.sum(1, keepdim=True)
        if not bool(over.any()):
            break
        units -= over.to(units.dtype)
    weights[:, 1:] = units / denominator
    weights[:, 0] = 1 - weights[:, 1:].sum(1)
    return indices, weights


def beam_search(
    x: Tensor,
    bank: Tensor,
    gains: Tensor,
    previous: Tensor,
    beam: int,
    weight: Tensor | None = None,
    loops: Any = None,
) -> Tensor:
    """Return indices (n, passes) with sum_p gains[:, p] * bank[index p] near x (n, b); never worse than `previous`.
    `weight` (n, b): how much the squared error of each number counts. `loops`: compiled ones (`kernels/beam`), which do
    without a weight.

    Keeps the `beam` best partial sums after each pass. Coding greedily, pass after pass, has up to half more error.
    """
    result = previous.clone()
    step = max(1, CHUNK // (len(bank) if loops else beam * len(bank)))
    for start in range(0, len(x), step):
        part = slice(start, min(start + step, len(x)))
        counted = None if weight is None else weight[part]
        if loops is None:
            codes = _best_sums(x[part], bank, gains[part], beam, counted)
        else:
            codes = _best_sums_by(loops, x[part], bank, gains[part], beam)
        new, old = (x[part] - (gains[part][:, :, None] * bank[c]).sum(1) for c in (codes, previous[part]))
        better = _size(new, counted) < _size(old, counted)
        result[part] = torch.where(better[:, None], codes, previous[part])
    return result


def _best_sums(x: Tensor, bank: Tensor, gains: Tensor, beam: int, counted: Tensor | None) -> Tensor:
    """The codes (n, passes) of a beam search."""
    h, depth = len(bank), gains.shape[1]
    left = x[:, None, :]
    squares = bank * bank
    error = _size(x, counted)[:, None]
    codes = torch.zeros((len(x), 1, 0), dtype=torch.int64, device=x.device)
    # scores are error - 2 g <left, v> + g^2 <v, v>: one product with the bank, widened by the two other terms
    sizes = squares.sum(1, keepdim=True)
    own = torch.zeros_like(sizes) if counted is not None else sizes  # with weights they are each sub-vector's own
    wider = torch.cat([bank, own, torch.ones_like(sizes)], 1).T.contiguous()
    for p in range(depth):
        g = gains[:, p, None, None]
        weighed = left if counted is None else left * counted[:, None, :]
        terms = torch.cat([weighed * (-2 * g), (g * g).expand(-1, left.shape[1], -1), error[:, :, None]], 2)
        scores = torch.matmul(terms, wider)
        if counted is not None:
            scores += g * g * (counted @ squares.T)[:, None, :]
        scores = scores.flatten(1)
        if p == depth - 1 or beam == 1:
            error, best = scores.min(1, keepdim=True)
        else:
            error, best = scores.topk(min(beam, scores.shape[1]), dim=1, largest=False, sorted=False)
        parent, code = best // h, best % h
        codes = torch.cat([codes.gather(1, parent[:, :, None].expand(-1, -1, p)), code[:, :, None]], 2)
        left = left.gather(1, parent[:, :, None].expand(-1, -1, x.shape[1])) - g * bank[code]
    return codes[:, 0]


def _best_sums_by(loops: Any, x: Tensor, bank: Tensor, gains: Tensor, beam: int) -> Tensor:
    """The same by compiled `loops`, on the products of vectors alone."""
    codes = torch.empty(gains.shape, dtype=torch.int64)
    h, depth = len(bank), gains.shape[1]
    width = -(-h // _LANES) * _LANES
    gram = bank @ bank.T
    table = torch.zeros((h + 1, width))
    table[:h, :h] = gram
    table[h] = torch.inf
    table[h, :h] = gram.diagonal()
    scratch = (
        torch.zeros((2, beam + 1, width)),
        torch.empty((2, beam)),
        torch.zeros((2, depth, beam), dtype=torch.int64),
    )
    numbers = (x @ bank.T, (x * x).sum(1), table, gains.contiguous(), codes, *scratch)
    loops.search(*(part.numpy() for part in numbers))
    return codes


def _size(x: Tensor, weight: Tensor | None) -> Tensor:
    """The squared length of the rows of x (n, b), each number weighted."""
    return (x * x if weight is None else x * x * weight).sum(1)
