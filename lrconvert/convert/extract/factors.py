"""The best factors of a difference, by randomized subspace iteration, and the ranks that a request leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lrconvert.convert.extract.difference import Difference
from lrconvert.convert.extract.options import ExtractOptions
from lrconvert.core.dtypes import F64, Array, itemsize
from lrconvert.core.errors import BudgetError
from lrconvert.lora import prng

_ROWS = 512  # of a matrix that are widened at a time
FIRST_RANK = 32  # that is tried where a share says how many are needed


class Matrix(Protocol):
    """A matrix that is multiplied, and perhaps never whole in memory."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> Any: ...

    def times(self, right: Array) -> Array:
        """Return ``D @ right``."""

    def transposed_times(self, left: Array) -> Array:
        """Return ``D^T @ left``."""


class Dense:
    """A matrix in memory."""

    def __init__(self, values: Array) -> None:
        self.values, self.shape, self.dtype = values, (int(values.shape[0]), int(values.shape[1])), values.dtype

    def times(self, right: Array) -> Array:
        """Return ``D @ right``."""
        return np.asarray(self.values @ right)

    def transposed_times(self, left: Array) -> Array:
        """Return ``D^T @ left``."""
        return np.asarray(self.values.T @ left)

    def residual(self, left: Array, right: Array) -> tuple[float, float]:
        """Return (||D - left @ right||^2, ||D||^2)."""
        error, energy = 0.0, 0.0
        for top in range(0, self.shape[0], _ROWS):
            part = self.values[top : top + _ROWS].astype(np.float64)
            rest = part - left[top : top + _ROWS].astype(np.float64) @ right.astype(np.float64)
            error, energy = error + float(np.vdot(rest, rest)), energy + float(np.vdot(part, part))
        return error, energy


@dataclass(frozen=True, eq=False)
class Cut:
    """``left @ right`` is near a difference: left (rows, k) and right (k, columns), each component with the root of its
    singular value, largest first; `spectrum` are these and the next ones that the subspace holds."""

    left: Array
    right: Array
    spectrum: F64

    @property
    def s(self) -> F64:
        """The singular values (k,) of the components."""
        return self.spectrum[: self.right.shape[0]]

    @property
    def numbers(self) -> int:
        """Numbers of the two factors, for each component."""
        return int(self.left.shape[0] + self.right.shape[1])


def best_cut(difference: Difference, label: str, energy: float, options: ExtractOptions) -> Cut:
    """Return the cut of a difference of that `energy`, to the largest rank that is asked for, or to as many components
    as hold the share that is."""
    shorter = min(difference.shape)
    if options.most is not None:
        return cut(difference, label, min(options.most, shorter), options)
    assert options.min_captured is not None
    rank = FIRST_RANK
    while True:
        parts = cut(difference, label, min(rank, shorter), options)
        if rank >= shorter or float(np.sum(parts.s**2)) >= options.min_captured * energy:
            return parts
        rank *= 2


def cut(difference: Matrix, label: str, rank: int, options: ExtractOptions) -> Cut:
    """Return nearly the best cut to a `rank` (Halko, Martinsson and Tropp, "Finding structure with randomness", 2011).

    It begins with signs from the seeded streams, alike on every machine; then come D and its transpose in turns, each
    product made orthonormal.
    """
    rows, columns = difference.shape
    width = min(rank + options.oversampling, rows, columns)
    stream = prng.Stream(options.seed, f"extract/{label}")
    right = prng.values(stream, "sign", range(width), 0, columns).T.astype(difference.dtype)
    for _ in range(options.iterations):
        left = _orthonormal(difference.times(right))
        right = _orthonormal(difference.transposed_times(left))
    left, core = _qr(difference.times(right))
    u, s, vt = np.linalg.svd(core.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:rank])
    kept = (u[:, :rank] * root).astype(difference.dtype), (root[:, None] * vt[:rank]).astype(difference.dtype)
    return Cut(left @ kept[0], kept[1] @ right.T, s)


def _orthonormal(x: Array) -> Array:
    return _qr(x)[0]


def _qr(x: Array) -> tuple[Array, Array]:
    import scipy.linalg  # in the precision of its argument, which numpy's has not

    q, r = scipy.linalg.qr(x, mode="economic", overwrite_a=True, check_finite=False)
    return np.asarray(q), np.asarray(r)


def ranks(cuts: Sequence[Cut], energy: float, options: ExtractOptions) -> list[int]:
    """Return the rank of each cut: all of it, or the components of all modules with most energy for each number of
    their factors, as many as hold the share of `energy` that is asked for or fit the bytes. Raises E-BUDGET."""
    if options.min_captured is None and options.target_size is None:
        return [len(cut.s) for cut in cuts]
    if not cuts:
        return []
    owners = np.concatenate([np.full(len(cut.s), n) for n, cut in enumerate(cuts)])
    energies = np.concatenate([cut.s**2 for cut in cuts])
    numbers = np.array([cut.numbers for cut in cuts])[owners]
    order = np.argsort(-energies / numbers, kind="stable")
    if options.min_captured is not None:
        held = np.cumsum(energies[order])
        wanted = options.min_captured * energy
        count = int(np.searchsorted(held, wanted * (1 - 1e-9))) + 1
        if count > len(order) and held[-1] < wanted * (1 - 1e-6):
            what = f"rank {options.rank} of every module holds {held[-1] / energy:.1%} of the difference's energy"
            raise BudgetError(f"{what}, less than the {options.min_captured:.1%} asked for", fix="allow a larger rank")
    else:
        assert options.target_size is not None
        nbytes = np.cumsum(numbers[order] * itemsize(options.dtype))
        count = int(np.searchsorted(nbytes, options.target_size, side="right"))
        if not count:
            smallest = int(nbytes[0])
            raise BudgetError(
                f"{options.target_size:,} bytes hold no component; the first one takes {smallest:,}",
                smallest=smallest,
            )
    return list(map(int, np.bincount(owners[order[:count]], minlength=len(cuts))))
