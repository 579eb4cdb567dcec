"""Coding refitted to the update itself: the error of ``B @ A``, not that of its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lrconvert.core.dtypes import F64
from lrconvert.lora.input_statistics import Moment
from lrconvert.methods.vblora.bank import solve_bank
from lrconvert.methods.vblora.coder import Coder, solve_scaled
from lrconvert.methods.vblora.rows import spans
from lrconvert.methods.vblora.subvectors import combine

_LARGEST_GAIN = 2.0**111  # what a half holds


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
            gains = solve_scaled(gram[np.ix_(owner, owner)] * dots, right)
            coder.gains[begin:end] = np.clip(gains, -_LARGEST_GAIN, _LARGEST_GAIN)
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
