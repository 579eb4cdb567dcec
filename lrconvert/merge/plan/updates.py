"""The updates of stored parameters by adapters: pieces of matrices, whose factors are made when their turn comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import numpy as np

from lrconvert.core.dtypes import F64, STORAGE, Array, decode
from lrconvert.io.fields import Key, Whole
from lrconvert.lora.adapter import CompactAdapter, ExtraTensor, LoraAdapter, Target
from lrconvert.merge.arithmetic.exact import Term, Update
from lrconvert.merge.signed_json import HexFloat
from lrconvert.methods import base as methods

Adapter = LoraAdapter | CompactAdapter


@dataclass(frozen=True)
class Scaled:
    """An adapter of a merge. Its update is multiplied by `scale`; `name` is how the user calls it."""

    adapter: Adapter
    scale: float = 1.0
    name: str = ""


@dataclass(frozen=True)
class Piece:
    """An update of `rows` (start, stop) of a stored parameter seen as a matrix with `cols` columns: a term of a sum.

    It is `scale` times target number `which` of adapter number `adapter` (for a `bias`: its extra tensor of that
    number), of which rows `part` count (all: None), transposed where the parameter is stored so. The fields are those
    that the record of a merge holds.
    """

    rows: tuple[Whole, Whole]
    cols: Whole
    adapter: Whole
    which: Whole
    scale: HexFloat
    transposed: Annotated[bool, Key("turned")] = False
    bias: bool = False
    part: tuple[Whole, Whole] | None = None

    @property
    def start(self) -> int:
        return self.rows[0]

    @property
    def stop(self) -> int:
        return self.rows[1]


@dataclass(frozen=True)
class NonlinearPiece(Piece):
    """An update that is no term of a sum, so that nothing else may be added to its rows: DoRA's with its `magnitude`,
    or without one an update that depends on the base."""

    magnitude: ExtraTensor | None = None


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
        """True if updates depend on the base: they are no terms then, see `update_on`."""
        return methods.needs_base(self.adapter)

    def update_on(self, piece: Piece) -> Callable[[F64, int], F64]:
        """Return the function from rows (n, m) of the base, seen as (out, in), and the number of the first to the same
        rows of an update that depends on the base."""
        assert isinstance(self.adapter, CompactAdapter)
        method, config, targets = methods.get(self.adapter.method), self.adapter.config, self.adapter.targets
        factors = method.expand(config, targets, self._values, piece.which, np)
        above = piece.part[0] if piece.part else 0

        def update(weight: F64, first: int) -> F64:
            rows: F64 = method.rows_on(config, targets, piece.which, factors, weight, above + first)
            return rows

        return update

    def step_of(self, piece: Piece) -> int:
        """Return how many columns of the base an update that depends on it needs together."""
        assert isinstance(self.adapter, CompactAdapter)
        ranks = methods.get(self.adapter.method).ranks(self.adapter.config, self.adapter.targets)
        return max(1, ranks[piece.which])

    def term(self, piece: Piece) -> Term:
        """Return the update of a piece, in the orientation in which it is stored."""
        if piece.bias:
            return Term(piece.scale, np.ones((1, 1), np.float32), decoded(self.adapter.extras[piece.which])[None])
        if isinstance(self.adapter, LoraAdapter):
            pair = self.adapter.targets[piece.which]
            scale, a, b = piece.scale * pair.scale, pair.A, pair.B
        else:
            method, scale = methods.get(self.adapter.method), piece.scale
            a, b = method.expand(self.adapter.config, self.adapter.targets, self._values, piece.which, np)
        if piece.part is not None:
            b = b[slice(*piece.part)]
        return Term(scale, a.T, b.T) if piece.transposed else Term(scale, b, a)


def decoded(extra: ExtraTensor) -> Array:
    """Return the numbers of a tensor in one dimension, as float32 or float64."""
    return decode(np.frombuffer(extra.data, STORAGE[extra.dtype]), extra.dtype)


def segment(pieces: Sequence[Piece], start: int, stop: int, sources: Sequence[Source]) -> Update | None:
    """Return the sum of all updates of the rows `start` to `stop`, between which no piece begins or ends, or None."""
    terms = []
    for piece in pieces:
        if piece.start <= start and stop <= piece.stop:
            term = sources[piece.adapter].term(piece)
            terms.append(replace(term, left=term.left[start - piece.start : stop - piece.start]))
    return Update(terms) if terms else None


def cuts(pieces: Sequence[Piece], rows: int) -> list[int]:
    """Return the rows at which the set of updates may change, with both ends."""
    return sorted({0, rows, *(p.start for p in pieces), *(p.stop for p in pieces)})


def extent(target: Target) -> tuple[int, int, int]:
    """Return (first row, end of rows, columns) of a target in its parameter, seen as the matrix (-1, columns) of its
    rows; a stack of experts is one tall matrix."""
    shape, kind = target.shape, target.view.kind
    if kind in ("expert", "expert_transposed"):
        expert = int(target.view.text.split(":")[1])
        return expert * shape[1], (expert + 1) * shape[1], shape[2]
    if kind == "rows":
        start, stop = target.view.text.split(":")[1:]
        return int(start), int(stop), shape[1]
    return 0, shape[0], int(np.prod(shape[1:]))


def is_transposed(target: Target) -> bool:
    """Return whether a target is stored (in, out)."""
    return target.view.kind in ("transposed", "expert_transposed")


def targets_of(adapter: Adapter) -> tuple[Target, ...]:
    """Return the parameters that an adapter changes."""
    return adapter.shapes() if isinstance(adapter, LoraAdapter) else adapter.targets
