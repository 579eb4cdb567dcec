"""Second moments of what flows into layers: the metric in which an update's error is the error of a layer's output.

For an input x of a layer, ``M = E[x x^T]`` (in, in), and the mean squared change of the output by an error E (out, in)
of the weight is ``tr(E M E^T)``. Narrow inputs keep M itself; wide ones a sketch of rank m and the exact diagonal:
``M ~ R^T R + diag(d - diag(R^T R))`` with R (m, in), which never exceeds M; embeddings, whose inputs are unit vectors,
the diagonal alone. `live.statistics` collects them, `statistics_file` stores them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lrconvert.core.dtypes import F32, F64, Array
from lrconvert.core.errors import StatisticsError
from lrconvert.lora.adapter import Target
from lrconvert.lora.base_names import NameIndex


@dataclass(frozen=True, eq=False)
class Moment:
    """The mean of x x^T over `tokens` inputs x (n,). Either `matrix` (n, n), or `diagonal` (n,) with the `rows` (m, n)
    of a sketch, m from 0. All float32; `times` computes in float64."""

    tokens: int
    matrix: F32 | None = None
    diagonal: F32 | None = None
    rows: F32 | None = None

    @property
    def width(self) -> int:
        return len(self.squares)

    @property
    def squares(self) -> F32:
        """The diagonal of M (n,): the mean square of every input."""
        if self.matrix is not None:
            return np.ascontiguousarray(self.matrix.diagonal())
        assert self.diagonal is not None
        return self.diagonal

    @cached_property
    def rest(self) -> F64:
        """The part of the diagonal beyond the sketch (n,), not negative."""
        squares = self.squares.astype(np.float64)
        if self.rows is None:
            return squares
        sketch = np.einsum("mn,mn->n", self.rows, self.rows, dtype=np.float64)
        return np.asarray(np.maximum(squares - sketch, 0), np.float64)

    def times(self, x: Array) -> F64:
        """Return ``x @ M`` for x (k, n), float64."""
        wide = np.asarray(x, np.float64)
        if self.matrix is not None:
            return wide @ self._factor
        product: F64 = wide * self.rest
        if self.rows is not None and len(self.rows):
            product += (wide @ self._factor.T) @ self._factor
        return product

    @cached_property
    def _factor(self) -> F64:
        """`matrix` or `rows` in float64, for many small products."""
        factor = self.matrix if self.matrix is not None else self.rows
        assert factor is not None
        return factor.astype(np.float64)

    def gram(self, x: Array) -> F64:
        """Return ``x @ M @ x^T`` (k, k) for x (k, n), float64, symmetric."""
        product = self.times(x) @ np.asarray(x, np.float64).T
        return (product + product.T) / 2

    def damped(self) -> Moment:
        """Return ``M + m I`` for the mean square m of an input: half the size of what is measured comes from the
        weights."""
        more = np.float32(self.squares.mean(dtype=np.float64) or 1.0)
        if self.matrix is not None:
            return replace(self, matrix=self.matrix + more * np.eye(self.width, dtype=np.float32))
        return replace(self, diagonal=self.squares + more)

    def scaled(self, factor: float) -> Moment:
        """Return ``factor * M``."""
        if self.matrix is not None:
            return replace(self, matrix=self.matrix * np.float32(factor))
        rows = None if self.rows is None else self.rows * np.float32(factor**0.5)
        return replace(self, diagonal=self.squares * np.float32(factor), rows=rows)


@dataclass(frozen=True)
class Input:
    """One input of a model: the parameters that it is multiplied with (the first one names it), the entry of the stack
    if they are stacks of experts, its width, and how many tokens were seen."""

    names: tuple[str, ...]
    expert: int | None
    width: int
    tokens: int


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """The moments of a model's inputs; `load(n)` gives that of ``inputs[n]``, which may lie on a disk.

    `content` is the digest of the base they are of (empty if it was never read), `data` what it read: sha256 of
    the model's inputs; `tokens` of them. `families` are the model types of the base: they settle renamed modules.
    """

    inputs: tuple[Input, ...]
    load: Callable[[int], Moment]
    content: str = ""
    data: str = ""
    tokens: int = 0
    families: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<InputStatistics: {len(self.inputs)} inputs, {self.tokens:,} tokens>"

    @cached_property
    def _places(self) -> Mapping[tuple[str, int | None], int]:
        return {(name, entry.expert): n for n, entry in enumerate(self.inputs) for name in entry.names}

    @cached_property
    def _index(self) -> NameIndex:
        return NameIndex({name for entry in self.inputs for name in entry.names}, self.families)

    def unknown(self, targets: Sequence[Target]) -> tuple[str, ...]:
        """Return the names of those targets whose layer was not measured. Raises E-STATS if none was."""
        names = tuple(target.name for target in targets if self._index.find(target.name) is None)
        if targets and len(names) == len(targets):
            raise StatisticsError(
                f"the statistics have no input of {names[0]!r}, nor of any other target",
                fix="collect them from the adapter's own base, with data that uses these layers",
            )
        return names

    def of(self, target: Target) -> Moment | None:
        """Return the moment of the input of a target; None if its layer was not measured. An expert that no token was
        sent to has the mean squares of its siblings. Raises E-STATS if the input has another width."""
        name = self._index.find(target.name)
        if name is None:
            return None
        expert = int(target.view.text.rpartition(":")[2]) if target.view.kind.startswith("expert") else None
        place = self._places.get((name, expert))
        moment = self.load(place) if place is not None else self._of_siblings(name)
        if moment.width != target.in_features:
            what = f"the input of {target.name!r} has {moment.width} numbers in the statistics"
            raise StatisticsError(
                f"{what}, {target.in_features} in the adapter", fix="collect them from the adapter's own base"
            )
        return moment

    def _of_siblings(self, name: str) -> Moment:
        places = [n for (other, _), n in self._places.items() if other == name]
        tokens = np.array([self.inputs[n].tokens for n in places], np.float64)
        squares = [self.load(n).squares.astype(np.float64) for n in places]
        mean = np.average(squares, axis=0, weights=tokens)
        return Moment(0, diagonal=mean.astype(np.float32))
