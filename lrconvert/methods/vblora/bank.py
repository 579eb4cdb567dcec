"""Coding rows of numbers with a shared bank of short vectors: the numerics of VB-LoRA, free of any file format.

A *row* (n numbers) is cut into ``ceil(n / b)`` sub-vectors of b numbers; the last may be partly valid. A row is coded
in one or more *passes*, each scaled by one gain:

    x[t] ~ sum over passes p of gain[p] * sum_s w[p, t, s] * V[i[p, t, s]],   w >= 0, sum_s w = 1

A code takes k bank vectors. A second pass codes what the first left over, so that the passes of a row are a residual
quantizer: two passes at 1 bit per number do what 2 bits do, with the bank of 1 bit. The k - 1 smaller weights of a code
are multiples of ``1 / denominator``, a power of two.

Fitting alternates steps that never raise the weighted squared error. Codes: the nearest vector for k = 1; the best of
all pairs for k = 2 up to `PAIR_LIMIT` vectors; above that, for k > 2 and over several passes a search that keeps the
previous code where that is better. Gains and bank: least squares. Codes run in torch on any device, in chunks; sums
over sub-vectors run in scipy on the CPU, since the order of scatter-adds on a GPU is not fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lrconvert.core.dtypes import F32, F64, Array
from lrconvert.methods.vblora.subvectors import CHUNK, Mixer, beam_search, combine, encode

if TYPE_CHECKING:
    from torch import Tensor

    from lrconvert.lora.input_statistics import Moment

I64 = npt.NDArray[np.int64]

_BATCH = 1 << 21  # numbers of the rows that are coded at once, if a row has fewer
_CG_ROUNDS = 24
_SETTLED = 2e-4  # relative fall of the error below which a round was the last


# --- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """How rows are cut and coded. `counts` (R,): sub-vectors of each row; `passes` (R,): how often it is coded;
    `valid` (sub-vectors,): valid numbers in each sub-vector, None if all are full.

    Codes are ordered by row, then pass, then place in the row.
    """

    counts: I64
    passes: I64
    valid: I64 | None = None

    @classmethod
    def of(cls, sizes: I64, passes: I64, b: int) -> Rows:
        """Return rows of `sizes` numbers, cut to length b."""
        counts = -(-sizes // b)
        if not (sizes % b).any():
            return cls(counts, passes)
        valid = np.full(int(counts.sum()), b, np.int64)
        valid[np.cumsum(counts) - 1] -= counts * b - sizes
        return cls(counts, passes, valid)

    @cached_property
    def starts(self) -> I64:
        """(R + 1,): where each row begins among the sub-vectors."""
        return _ends(self.counts)

    @cached_property
    def first_pass(self) -> I64:
        """(R + 1,): number of the first pass of each row."""
        return _ends(self.passes)

    @cached_property
    def code_starts(self) -> I64:
        """(passes of all rows + 1,): where the codes of each pass begin."""
        return _ends(np.repeat(self.counts, self.passes))

    @property
    def codes(self) -> int:
        return int(self.code_starts[-1])

    def thinned(self, stride: int) -> tuple[Rows, I64]:
        """Return rows with every stride-th sub-vector (at least one), and which sub-vectors these are."""
        first = np.minimum(np.arange(len(self.counts)) % stride, self.counts - 1)
        counts = -(-(self.counts - first) // stride)
        kept = np.repeat(self.starts[:-1] + first, counts) + stride * spans(np.zeros_like(counts), counts)
        return Rows(counts, self.passes, None if self.valid is None else self.valid[kept]), kept


def _ends(lengths: I64) -> I64:
    return np.asarray(np.concatenate([[0], np.cumsum(lengths)]), np.int64)


def spans(starts: I64, lengths: I64) -> I64:
    """Return start, start + 1, ..., start + length - 1 of each span, one after the other."""
    ends = np.cumsum(lengths)
    return np.asarray(np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths))


def row_sums(values: Tensor, lengths: I64) -> F64:
    """Return the sums of consecutive runs of `values`; every length is at least 1."""
    if len(lengths) == 0:
        return np.zeros(0)
    return np.asarray(np.add.reduceat(values.cpu().numpy().astype(np.float64), _ends(lengths)[:-1]), np.float64)


def solve_scaled(gram: F64, right: F64) -> F64:
    """Return gram^-1 right for a stack of Gram matrices, with a relative ridge: dependent or zero rows do no harm."""
    scale = np.sqrt(np.maximum(np.einsum("...ii->...i", gram), 1e-200))
    system = gram / scale[..., :, None] / scale[..., None, :] + 1e-10 * np.eye(gram.shape[-1])
    return np.asarray(np.linalg.solve(system, (right / scale)[..., None])[..., 0] / scale, np.float64)


def _groups(valid: Tensor | None, b: int, n: int) -> list[tuple[Any, int]]:
    """(which sub-vectors, valid numbers): the full ones, and one group per distinct remainder."""
    import torch

    if valid is None:
        return [(slice(0, n), b)]
    return [((valid == width).nonzero()[:, 0], width) for width in torch.unique(valid).tolist()]


def _mask(x: Tensor, valid: Tensor | None) -> Tensor:
    import torch

    return x if valid is None else x * (torch.arange(x.shape[1], device=x.device) < valid[:, None])


@dataclass(eq=False)
class Coder:
    """A bank (replaced, never changed in place), and the codes of rows in it: `indices` and `weights` (codes, k),
    `gains` (passes,), all 1 unless `scaled`. `importance` (sub-vectors, b): how much the squared error of each number
    counts, besides that of its row; codes of mixtures (k > 1) do without. `exact`: see `encode`; `beam`: see
    `beam_search`. `trace`: the weighted squared error after each round of `alternate`."""

    rows: Rows
    bank: Tensor
    k: int
    denominator: int
    scaled: bool
    indices: Tensor
    weights: Tensor
    gains: F64
    importance: Tensor | None = None
    exact: bool = False
    beam: int = 8
    trace: list[float] = field(default_factory=list)
    _cuts: dict[int, tuple[Tensor, Mixer | None]] = field(default_factory=dict, repr=False)
    _cuts_of: tuple[Tensor | None, bool] = (None, False)

    @classmethod
    def new(
        cls, rows: Rows, bank: Tensor, k: int, denominator: int, scaled: bool, importance: Tensor | None = None
    ) -> Coder:
        """Return a coder whose codes are all empty."""
        import torch

        indices = torch.arange(k, device=bank.device).repeat(rows.codes, 1)
        weights = torch.zeros((rows.codes, k), dtype=bank.dtype, device=bank.device)
        passes = len(rows.code_starts) - 1
        gains = np.zeros(passes) if scaled else np.ones(passes)
        return cls(rows, bank, k, denominator, scaled, indices, weights, gains, importance)

    def tensor(self, array: Array) -> Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(array)).to(self.bank.device)

    def codes(self) -> tuple[Tensor, Tensor, Tensor, F64]:
        """Return bank and codes as they are, for `restore`."""
        return self.bank, self.indices.clone(), self.weights.clone(), self.gains.copy()

    def restore(self, kept: tuple[Tensor, Tensor, Tensor, F64]) -> None:
        self.bank, self.indices, self.weights, self.gains = kept

    def squares(self, x: Tensor, which: I64 | None = None, y: Tensor | None = None) -> Tensor:
        """Return the squared size of sub-vectors (n,), or their inner products with y, by `importance`: of all rows, or
        of the rows `which`."""
        product = x * (x if y is None else y)
        important = self.importance if which is None else self._important(which)
        return (product if important is None else product * important).sum(1)

    def _important(self, which: I64) -> Tensor | None:
        if self.importance is None:
            return None
        return self.importance[self.tensor(spans(self.rows.starts[which], self.rows.counts[which]))]

    def recode(self, which: I64, x: Tensor, *, fresh: bool = False) -> Tensor:
        """Code the rows `which` anew for the numbers x (their sub-vectors, b; invalid entries zero), and solve their
        gains. Return the numbers that they then stand for. No step raises a row's squared error.

        `fresh` ignores the present codes: each pass codes what the earlier ones left.
        """
        import torch

        coded = torch.empty_like(x)
        for batch, places in self._batches(which):
            coded[places] = self._recode(batch, x[places], fresh)
        return coded

    def _batches(self, which: I64) -> Iterator[tuple[I64, Tensor]]:
        """Rows of `which` with equally many passes, and few enough numbers that work on them is cheap in memory; and
        the places of their sub-vectors among those of all rows `which`."""
        starts = _ends(self.rows.counts[which])
        for depth in np.unique(self.rows.passes[which]):
            alike = np.flatnonzero(self.rows.passes[which] == depth)
            number = np.cumsum(self.rows.counts[which[alike]] * self.bank.shape[1]) // _BATCH
            for batch in np.split(alike, np.flatnonzero(np.diff(number)) + 1):
                yield which[batch], self.tensor(spans(starts[batch], self.rows.counts[which[batch]]))

    def _recode(self, which: I64, x: Tensor, fresh: bool) -> Tensor:
        """`recode` of rows with equally many passes."""
        valid, places, important = self._valid(which), self._places(which), self._important(which)
        if self.k == 1 and len(places) > 1 and not fresh:
            self._recode_jointly(which, x, valid, places)
            return self._decode(which)
        units = [] if fresh else [self._unit(codes, valid) for codes in places]
        for p, codes in enumerate(places):
            left = x - self._total(which, units, skip=p) if len(places) > 1 else x
            old = None if fresh else (self.indices[codes], self.weights[codes])
            if fresh and self.scaled:
                lengths = self.rows.counts[which]
                sizes = lengths * x.shape[1] if valid is None else row_sums(valid, lengths)
                power = row_sums((left * left).sum(1), lengths)
                self.gains[self.rows.first_pass[which] + p] = np.sqrt(power / sizes)
            y = left / self._spread(which, p) if self.scaled else left
            for rows, width in _groups(valid, x.shape[1], len(x)):
                before = None if old is None else (old[0][rows], old[1][rows])
                bank, mixer = self._cut(width)
                part = y[rows, :width].contiguous()
                weight = None if important is None else important[rows, :width].contiguous()
                self.indices[codes[rows]], self.weights[codes[rows]] = encode(
                    part, bank, self.k, self.denominator, before, self.exact, mixer, weight
                )
            units[p : p + 1] = [self._unit(codes, valid)]
            if self.scaled:
                self._solve_gains(which, x, units)
        return self._total(which, units)

    def _recode_jointly(self, which: I64, x: Tensor, valid: Tensor | None, places: list[Tensor]) -> None:
        """k = 1, several passes: search the codes of all passes of a sub-vector together."""
        import torch

        gains = torch.cat([self._spread(which, p) for p in range(len(places))], 1)
        old = torch.stack([self.indices[codes][:, 0] for codes in places], 1)
        new, important = torch.empty_like(old), self._important(which)
        for rows, width in _groups(valid, x.shape[1], len(x)):
            bank, _ = self._cut(width)
            weight = None if important is None else important[rows, :width].contiguous()
            new[rows] = beam_search(x[rows, :width], bank, gains[rows], old[rows], self.beam, weight)
        for p, codes in enumerate(places):
            self.indices[codes, 0] = new[:, p]
        if self.scaled:
            self._solve_gains(which, x, [self._unit(codes, valid) for codes in places])

    def decode(self, which: I64, out: Tensor) -> None:
        """Fill `out` (their sub-vectors, b) with the numbers that the codes of the rows `which` stand for."""
        for batch, places in self._batches(which):
            out[places] = self._decode(batch)

    def _decode(self, which: I64) -> Tensor:
        """The numbers that the codes of rows with equally many passes stand for."""
        valid = self._valid(which)
        return self._total(which, [self._unit(codes, valid) for codes in self._places(which)])

    def _cut(self, width: int) -> tuple[Tensor, Mixer | None]:
        """The bank for sub-vectors of `width` numbers, and its mixer; made once for each bank."""
        if self._cuts_of[0] is not self.bank or self._cuts_of[1] != self.exact:
            self._cuts_of = self.bank, self.exact
            self._cuts.clear()
        if width not in self._cuts:
            bank = self.bank[:, :width].contiguous()
            self._cuts[width] = bank, Mixer(bank, self.exact) if self.k > 1 else None
        return self._cuts[width]

    def _places(self, which: I64) -> list[Tensor]:
        """Where the codes of each pass are."""
        first, lengths = self.rows.first_pass[which], self.rows.counts[which]
        depth = int(self.rows.passes[which[0]])
        return [self.tensor(spans(self.rows.code_starts[first + p], lengths)) for p in range(depth)]

    def _valid(self, which: I64) -> Tensor | None:
        if self.rows.valid is None:
            return None
        return self.tensor(self.rows.valid[spans(self.rows.starts[which], self.rows.counts[which])])

    def _unit(self, places: Tensor, valid: Tensor | None) -> Tensor:
        """Coded sub-vectors without their gain."""
        return _mask(combine(self.bank, self.indices[places], self.weights[places]), valid)

    def _spread(self, which: I64, p: int) -> Tensor:
        """The gain of pass p at each sub-vector; a zero gain becomes tiny, so that one can divide by it."""
        gains = self.gains[self.rows.first_pass[which] + p]
        gains = np.where(np.abs(gains) < 1e-30, 1e-30, gains)
        return self.tensor(np.repeat(gains, self.rows.counts[which]).astype(np.float32))[:, None]

    def _total(self, which: I64, units: Sequence[Tensor], skip: int = -1) -> Tensor:
        import torch

        total = torch.zeros((int(self.rows.counts[which].sum()), self.bank.shape[1]), device=self.bank.device)
        for p, unit in enumerate(units):
            if p != skip:
                total.addcmul_(unit, self._spread(which, p))
        return total

    def _solve_gains(self, which: I64, x: Tensor, units: Sequence[Tensor]) -> None:
        """Least-squares gains of each row over its first passes."""
        lengths, depth = self.rows.counts[which], len(units)
        gram, right = np.zeros((len(which), depth, depth)), np.zeros((len(which), depth))
        for p in range(depth):
            right[:, p] = row_sums(self.squares(x, which, units[p]), lengths)
            for q in range(p + 1):
                gram[:, p, q] = gram[:, q, p] = row_sums(self.squares(units[p], which, units[q]), lengths)
        gains = solve_scaled(gram, right)
        for p in range(depth):
            self.gains[self.rows.first_pass[which] + p] = gains[:, p]


# --- the bank -------------------------------------------------------------------------------------------------------


def seed_bank(x: Tensor, weight: F64, h: int, rng: np.random.Generator) -> Tensor:
    """Return h sub-vectors of x (n, b), drawn by weight and squared distance to those drawn before (k-means++ in
    rounds).

    For k > 1 the bank must come to enclose the data, since weights are convex; starting with scaled-up sub-vectors (1.2
    to 3 times) was measured to be no better.
    """
    import torch

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
    import torch

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
    restarts: int = 2,
    importance: Tensor | None = None,
) -> Coder:
    """Return a bank for the sub-vectors x of `rows`, whose squared errors count `weight` (R,), with codes. `shape`:
    number of vectors, k, denominator, scaled. `importance`: see `Coder`.

    Restarts run a few rounds on one pass; the best bank goes on with all of them.
    """
    h, k, denominator, scaled = shape
    single = Rows(rows.counts, np.ones_like(rows.passes), rows.valid)
    flat = np.repeat(weight, rows.counts)
    if importance is not None:
        flat = flat * importance.mean(1).cpu().numpy()
    best: Coder | None = None
    for _ in range(restarts):
        trial = Coder.new(single, seed_bank(x, flat, h, rng), k, denominator, scaled, importance)
        alternate(trial, x, weight, 3, fresh=True)
        if best is None or trial.trace[-1] < best.trace[-1]:
            best = trial
    assert best is not None
    if int(rows.passes.max(initial=1)) > 1:
        best = Coder.new(rows, best.bank, k, denominator, scaled, importance)
        alternate(best, x, weight, rounds, fresh=True)
    else:
        alternate(best, x, weight, rounds)
    return best


# --- the update itself ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Update:
    """One target of a fit: the source ``scale * left @ right`` (left (out, r), right (r, in); any factors do),
    and where its rows are: rows ``first .. first + rank - 1`` code A, the next ``rank`` rows code the columns of B.
    `metric` gives the metric of its inputs, in which its error is measured; None for the plain norm."""

    left: Tensor
    right: Tensor
    scale: float
    first: int
    rank: int
    metric: Callable[[], Moment] | None = None

    def times_metric(self, rows: Tensor) -> Tensor:
        """Return ``rows @ M`` (k, in), float64; the rows themselves without a metric."""
        import torch

        if self.metric is None:
            return rows.double()
        return torch.from_numpy(self.metric().times(rows.cpu().numpy())).to(rows.device)


class Refit:
    """Coding measured by what it is for, the error of the update: ``sum over targets ||source - B @ A||^2``, each in
    its metric.

    With all other rows fixed, this is a constant plus a weighted squared distance of a row to a known goal, so that
    recoding row by row never raises it. Gains enter linearly and are solved per target and side.
    """

    def __init__(self, coder: Coder, updates: Sequence[Update]) -> None:
        import torch

        self.coder, self.updates = coder, [u for u in updates if u.rank]
        self.energy = 0.0
        for u in updates:
            left, right = u.left.double(), u.right.double()
            self.energy += u.scale**2 * float(((left.T @ left) * (u.times_metric(u.right) @ right.T)).sum())
        self.value = torch.empty((int(coder.rows.starts[-1]), coder.bank.shape[1]), device=coder.bank.device)
        self.goal = torch.zeros_like(self.value)
        self.weight = np.zeros(len(coder.rows.counts))
        self.refresh()

    def refresh(self) -> None:
        """Recompute what the rows mean, after a change of bank or gains."""
        self.coder.decode(np.arange(len(self.coder.rows.counts)), self.value)

    def _side(self, flat: Tensor, update: Update, side: int) -> Tensor:
        """The rows of one side of a target in a flat array: (rank, n), a view."""
        n = update.left.shape[0] if side else update.right.shape[1]
        first = update.first + side * update.rank
        begin, end = (int(self.coder.rows.starts[r]) for r in (first, first + update.rank))
        return flat[begin:end].view(update.rank, -1)[:, :n]

    def error(self) -> float:
        """Return the squared error of all targets."""
        total = self.energy
        for u in self.updates:
            a, b = self._side(self.value, u, 0), self._side(self.value, u, 1).double()
            weighed = u.times_metric(a)
            cross = ((b @ u.left.double()) * (weighed @ u.right.double().T)).sum()
            total += float(((weighed @ a.double().T) * (b @ b.T)).sum() - 2 * u.scale * cross)
        return total

    def sweep(self, side: int, *, codes: bool = True) -> None:
        """Recode all rows of one side, component by component, then solve their gains; or only the gains."""
        grams: list[F64] = []
        free: list[Tensor] = []  # B^T delta, or its mirror image
        for u in self.updates:
            other = self._side(self.value, u, 1 - side)
            near, far = (u.left, u.right) if side == 0 else (u.right.T, u.left.T)
            weighed = other.double() if side == 0 else u.times_metric(other)
            free.append((weighed @ near.double() * u.scale).float() @ far)
            grams.append((weighed @ other.double().T).cpu().numpy())
        rows = self.coder.rows
        for j in range(max((u.rank for u in self.updates), default=0) if codes else 0):
            chosen = []
            for u, gram, goal in zip(self.updates, grams, free, strict=True):
                if j >= u.rank:
                    continue
                self.weight[u.first + side * u.rank + j] = gram[j, j]
                if gram[j, j] > 1e-30:
                    chosen.append(u.first + side * u.rank + j)
                    pull = gram[j] / gram[j, j]
                    pull[j] = 0
                    others = self.coder.tensor(pull.astype(np.float32)) @ self._side(self.value, u, side)
                    self._side(self.goal, u, side)[j] = goal[j] / gram[j, j] - others
            if chosen:
                which = np.array(chosen)
                places = self.coder.tensor(spans(rows.starts[which], rows.counts[which]))
                self.value[places] = self.coder.recode(which, self.goal[places])
        if self.coder.scaled:
            self._solve_gains(side, grams, free)

    def _solve_gains(self, side: int, grams: Sequence[F64], free: Sequence[Tensor]) -> None:
        """All gains of one side of a target at once: the exact minimizer with codes and the other side fixed."""
        coder, rows = self.coder, self.coder.rows
        for u, gram, goal in zip(self.updates, grams, free, strict=True):
            first = u.first + side * u.rank
            begin, end = int(rows.first_pass[first]), int(rows.first_pass[first + u.rank])
            codes = slice(int(rows.code_starts[begin]), int(rows.code_starts[end]))
            units = combine(coder.bank, coder.indices[codes], coder.weights[codes]).view(end - begin, -1)
            units = units[:, : goal.shape[1]]
            owner = np.repeat(np.arange(u.rank), rows.passes[first : first + u.rank])
            weighed = units if side or u.metric is None else u.times_metric(units).float()
            dots = (weighed @ units.T).double().cpu().numpy()
            right = (weighed @ goal.T).double().cpu().numpy()[np.arange(len(owner)), owner]
            coder.gains[begin:end] = solve_scaled(gram[np.ix_(owner, owner)] * dots, right)
            mix = np.zeros((u.rank, len(owner)), np.float32)
            mix[owner, np.arange(len(owner))] = coder.gains[begin:end]
            self._side(self.value, u, side)[:] = coder.tensor(mix) @ units

    def improve_bank(self, before: float) -> float:
        """Solve the bank for the goals of the last sweeps by least squares, and keep it if the error of the update
        falls below `before`. Return the error."""
        old = self.coder.bank
        self.coder.bank = self.coder.tensor(solve_bank(self.coder, self.goal.cpu().numpy(), self.weight))
        self.refresh()
        after = self.error()
        if after < before:
            return after
        self.coder.bank = old
        self.refresh()
        return before
