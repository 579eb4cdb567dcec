"""What adapters add to stored parameters: pieces of matrices, whose factors are made when their turn comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from lrconvert.core.dtypes import F64, STORAGE, Array, decode
from lrconvert.lora.adapter import CompactAdapter, ExtraTensor, LoraAdapter, Target
from lrconvert.merge.arithmetic.exact import Term, Update
from lrconvert.methods import base as methods

Adapter = LoraAdapter | CompactAdapter


@dataclass(frozen=True)
class Scaled:
    """An adapter of a merge. Its update is multiplied by `scale`; `name` is how the user calls it."""

    adapter: Adapter
    scale: float = 1.0
    name: str = ""


@dataclass(frozen=True)
class Origin:
    """Where the factors of a piece come from, in words that a record can hold.

    Target number `which` of adapter number `adapter` (or, for a bias, its extra tensor of that number), of which
    rows `rows` count (all: None); `turned` if the parameter is stored transposed; times `scale`.
    """

    adapter: int
    which: int
    scale: float
    turned: bool = False
    bias: bool = False
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Piece:
    """An update of rows `start` to `stop` of a stored parameter seen as a matrix with `cols` columns. DoRA's has a
    `magnitude`; `is_based` where it depends on the base. Neither is a term of a sum."""

    start: int
    stop: int
    cols: int
    origin: Origin
    magnitude: ExtraTensor | None = None
    is_based: bool = False

    @property
    def is_alone(self) -> bool:
        """Whether nothing else may be added to the same rows."""
        return self.is_based or self.magnitude is not None


class Source:
    """The factors of one adapter by number, made on demand."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    @cached_property
    def _values(self) -> Mapping[str, Any]:
        assert isinstance(self.adapter, CompactAdapter)
        return methods.values(methods.get(self.adapter.method), self.adapter)

    @property
    def needs_base(self) -> bool:
        """Whether updates depend on the base: they are no terms then, see `update_on`."""
        return methods.needs_base(self.adapter)

    def update_on(self, origin: Origin) -> Callable[[F64, int], F64]:
        """From rows (n, m) of the base, seen as (out, in), and the number of the first to the same rows of the update
        that `origin` names."""
        assert isinstance(self.adapter, CompactAdapter)
        method, config, targets = methods.get(self.adapter.method), self.adapter.config, self.adapter.targets
        factors = method.expand(config, targets, self._values, origin.which, np)
        above = origin.rows[0] if origin.rows else 0

        def update(weight: F64, first: int) -> F64:
            found: F64 = method.rows_on(config, targets, origin.which, factors, weight, above + first)
            return found

        return update

    def step_of(self, origin: Origin) -> int:
        """Columns of the base that an update needs together."""
        assert isinstance(self.adapter, CompactAdapter)
        ranks = methods.get(self.adapter.method).ranks(self.adapter.config, self.adapter.targets)
        return max(1, ranks[origin.which])

    def term(self, origin: Origin) -> Term:
        """The update that `origin` names, in the orientation in which it is stored."""
        if origin.bias:
            values = _values(self.adapter.extras[origin.which]).reshape(1, -1)
            return Term(origin.scale, np.ones((1, 1), np.float32), values)
        if isinstance(self.adapter, LoraAdapter):
            pair = self.adapter.targets[origin.which]
            scale, a, b = origin.scale * pair.scale, pair.A, pair.B
        else:
            method, scale = methods.get(self.adapter.method), origin.scale
            a, b = method.expand(self.adapter.config, self.adapter.targets, self._values, origin.which, np)
        if origin.rows is not None:
            b = b[origin.rows[0] : origin.rows[1]]
        return Term(scale, a.T, b.T) if origin.turned else Term(scale, b, a)


def _values(extra: ExtraTensor) -> Array:
    return decode(np.frombuffer(extra.data, STORAGE[extra.dtype]), extra.dtype)


def segment(pieces: Sequence[Piece], start: int, stop: int, sources: Sequence[Source]) -> Update | None:
    """The sum of all updates of the rows `start` to `stop`, which no piece begins or ends between; None if none."""
    terms = []
    for piece in pieces:
        if piece.start <= start and stop <= piece.stop:
            term = sources[piece.origin.adapter].term(piece.origin)
            terms.append(replace(term, left=term.left[start - piece.start : stop - piece.start]))
    return Update(terms) if terms else None


def cuts(pieces: Sequence[Piece], rows: int) -> list[int]:
    """Where the set of updates may change, with both ends."""
    return sorted({0, rows, *(p.start for p in pieces), *(p.stop for p in pieces)})


def extent(target: Target) -> tuple[int, int, int]:
    """(first row, end of rows, columns) of a target in its parameter, seen as the matrix (-1, columns) of its rows; a
    stack of experts is one tall matrix."""
    shape, kind = target.shape, target.view.kind
    if kind in ("expert", "expert_transposed"):
        which = int(target.view.text.split(":")[1])
        return which * shape[1], (which + 1) * shape[1], shape[2]
    if kind == "rows":
        start, stop = target.view.text.split(":")[1:]
        return int(start), int(stop), shape[1]
    return 0, shape[0], int(np.prod(shape[1:]))


def is_turned(target: Target) -> bool:
    return target.view.kind in ("transposed", "expert_transposed")


def targets_of(adapter: Adapter) -> tuple[Target, ...]:
    return adapter.shapes() if isinstance(adapter, LoraAdapter) else adapter.targets
