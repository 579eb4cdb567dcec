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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrconvert.core.dtypes import F64, Array
from lrconvert.kernels import jit
from lrconvert.methods.vblora.rows import I64, Rows, ends, spans
from lrconvert.methods.vblora.subvectors import Mixer, beam_search, combine, encode

_BATCH = 1 << 21  # numbers of the rows that are coded at once, if a row has fewer


def row_sums(values: Tensor, lengths: I64) -> F64:
    """Return the sums of consecutive runs of `values`; every length is at least 1."""
    if len(lengths) == 0:
        return np.zeros(0)
    return np.asarray(np.add.reduceat(values.cpu().numpy().astype(np.float64), ends(lengths)[:-1]), np.float64)


def solve_scaled(gram: F64, right: F64) -> F64:
    """Return gram^-1 right for a stack of Gram matrices, with a relative ridge: dependent or zero rows do no harm."""
    scale = np.sqrt(np.maximum(np.einsum("...ii->...i", gram), 1e-200))
    system = gram / scale[..., :, None] / scale[..., None, :] + 1e-10 * np.eye(gram.shape[-1])
    return np.asarray(np.linalg.solve(system, (right / scale)[..., None])[..., 0] / scale, np.float64)


def _groups(valid: Tensor | None, b: int, n: int) -> list[tuple[Any, int]]:
    """(which sub-vectors, valid numbers): the full ones, and one group per distinct remainder."""
    if valid is None:
        return [(slice(0, n), b)]
    return [((valid == width).nonzero()[:, 0], width) for width in torch.unique(valid).tolist()]


def _mask(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else x * (torch.arange(x.shape[1], device=x.device) < valid[:, None])


@dataclass(eq=False)
class Coder:
    """A bank (replaced, never changed in place), and the codes of rows in it: `indices` and `weights` (codes, k),
    `gains` (passes,), all 1 unless `scaled`. `importance` (sub-vectors, b): how much the squared error of each number
    counts, besides that of its row; codes of mixtures (k > 1) do without. `exact`: see `encode`; `beam`,
    `loops`: see `beam_search`. `trace`: the weighted squared error after each round of `alternate`."""

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
    beam: int = 1
    loops: Any = None
    trace: list[float] = field(default_factory=list)
    _cuts: dict[int, tuple[Tensor, Mixer | None]] = field(default_factory=dict, repr=False)
    _cuts_of: tuple[Tensor | None, bool] = (None, False)

    @classmethod
    def new(
        cls, rows: Rows, bank: Tensor, k: int, denominator: int, scaled: bool, importance: Tensor | None = None
    ) -> Coder:
        """Return a coder whose codes are all empty."""
        indices = torch.arange(k, device=bank.device).repeat(rows.codes, 1)
        weights = torch.zeros((rows.codes, k), dtype=bank.dtype, device=bank.device)
        passes = len(rows.code_starts) - 1
        gains = np.zeros(passes) if scaled else np.ones(passes)
        return cls(rows, bank, k, denominator, scaled, indices, weights, gains, importance)

    def tensor(self, array: Array) -> Tensor:
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
        coded = torch.empty_like(x)
        for batch, places in self._batches(which):
            coded[places] = self._recode(batch, x[places], fresh)
        return coded

    def _batches(self, which: I64) -> Iterator[tuple[I64, Tensor]]:
        """Rows of `which` with equally many passes, and few enough numbers that work on them is cheap in memory; and
        the places of their sub-vectors among those of all rows `which`."""
        starts = ends(self.rows.counts[which])
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
        gains = torch.cat([self._spread(which, p) for p in range(len(places))], 1)
        old = torch.stack([self.indices[codes][:, 0] for codes in places], 1)
        new, important = torch.empty_like(old), self._important(which)
        for rows, width in _groups(valid, x.shape[1], len(x)):
            bank, _ = self._cut(width)
            weight = None if important is None else important[rows, :width].contiguous()
            new[rows] = beam_search(x[rows, :width], bank, gains[rows], old[rows], self.beam, weight, self.loops)
        for p, codes in enumerate(places):
            self.indices[codes, 0] = new[:, p]
        if self.scaled:
            self._solve_gains(which, x, [self._unit(codes, valid) for codes in places])

    def allow_loops(self, seconds: float) -> None:
        """Search with compiled loops from now on if the `seconds` that they save pay, and they have its formula."""
        if self.importance is None and self.k == 1 and self.bank.device.type == "cpu":
            self.loops = jit.load("beam", seconds)

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
        """Return the places of the codes of each pass."""
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
