"""The values of touched tensors in blocks of rows: what is written, or what a verification compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from lrconvert.core.dtypes import F64, STORAGE, Array
from lrconvert.core.errors import LimitError, LrcError
from lrconvert.core.limits import BLOCK_BYTES, MAX_RATIONAL
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.io.container import TensorInfo
from lrconvert.lora.adapter import ExtraTensor
from lrconvert.merge.arithmetic import base_dependent, dora
from lrconvert.merge.arithmetic.exact import Term, Update
from lrconvert.merge.arithmetic.rounding import bits
from lrconvert.merge.arithmetic.stats import MergeStats
from lrconvert.merge.arithmetic.workspace import Pool, Workspace, loops_for
from lrconvert.merge.plan.plan import Output, Plan, Rows
from lrconvert.merge.plan.updates import NonlinearPiece, Piece, cuts, decoded, segment


@dataclass(frozen=True)
class _Changed:
    """Rows of the output and what happened; `update` is what was added, and `predicted` what is left without it."""

    after: Array
    stats: MergeStats
    update: Update | None = None
    predicted: Array | None = None


# (stored rows, number of the first) -> what becomes of them
_Change = Callable[[Array, int], _Changed]


@dataclass(frozen=True)
class Block:
    """Rows from `first` on of a tensor seen as a matrix: stored bits `before` (in the base; None if it has none) and
    `after`. `update` is what was added, its row `row` to the first of these; None where `after` is no sum. `predicted`
    is what an unmerge makes of `after` before it looks at the undo code; None if it has no prediction."""

    first: int
    before: Array | None
    after: Array
    update: Update | None
    row: int
    stats: MergeStats
    predicted: Array | None = None


class Computer:
    """Computes the touched tensors of a plan: with `predict` also what an unmerge will start from, and with `measure`
    what happened to the weights."""

    def __init__(self, plan: Plan, workspace: Workspace, *, predict: bool = False, measure: bool = True) -> None:
        self.plan, self.workspace = plan, workspace
        self.predict, self.measure = predict, measure
        self.rational = 0

    def blocks(self, output: Output) -> Iterator[Block]:
        """Return the blocks of a touched tensor in order of rows. Raises E-VALUE, E-OVERFLOW, E-LIMIT."""
        cols = output.pieces[0].cols if output.pieces else output.shape[-1]
        rows = int(np.prod(output.shape)) // cols
        height = rows_per_block(cols)
        segments = list(pairwise(cuts(output.pieces, rows)))
        tops = [(top, min(height, stop - top)) for start, stop in segments for top in range(start, stop, height)]
        with ThreadPoolExecutor(1) as reader:  # reads a block while the one before it is computed
            ahead = (reader.submit(self._read, output, top, count, cols) for top, count in tops)
            coming = next(ahead)
            for start, stop in segments:
                add = self._named_step(output, self._adder, output, start, stop, cols)
                for top in range(start, stop, height):
                    present, coming = coming.result(), next(ahead, coming)
                    changed = self._named_step(output, add, present, top)
                    self._bound(changed.stats, output)
                    before: Array | None = present
                    if output.data is not None:
                        count = present.shape[0]
                        before = None if output.base is None else self._stored(output.base, top, count, cols)
                    update, predicted = changed.update, changed.predicted
                    yield Block(top, before, changed.after, update, top - start, changed.stats, predicted)

    def _named_step(self, output: Output, step: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `step` gives; its errors name the tensor."""
        try:
            return step(*arguments)
        except LrcError as error:
            raise self._named(error, output) from None

    def _adder(self, output: Output, start: int, stop: int, cols: int) -> _Change:
        """Return what is done to the rows `start` to `stop`."""
        if output.rows is not None:
            return _putting(output.rows)
        for piece in output.pieces:
            if isinstance(piece, NonlinearPiece) and piece.start <= start and stop <= piece.stop:
                if piece.magnitude is None:
                    return self._base_dependent(output, piece)
                return self._dora(output, piece, piece.magnitude, start, stop)
        update = segment(output.pieces, start, stop, self.plan.sources)
        return _keep if update is None else self._adding(update, output.dtype, start)

    def _adding(self, update: Update, dtype: str, start: int) -> _Change:
        def change(present: Array, top: int) -> _Changed:
            if self.predict and not update.is_zero:
                after, predicted, stats = update.add_and_predict(present, dtype, top - start, self.workspace)
                return _Changed(after, stats, update, predicted)
            after, stats = update.add(present, dtype, top - start, self.workspace, measure=self.measure)
            return _Changed(after, stats, update)

        return change

    def _dora(self, output: Output, piece: Piece, extra: ExtraTensor, start: int, stop: int) -> _Change:
        whole = self.plan.sources[piece.adapter].term(piece)
        magnitude = decoded(extra).astype(np.float64)
        if piece.transposed == (extra.use == "input_magnitude"):  # one for each stored row
            rows = slice(start - piece.start, stop - piece.start)
            term = replace(whole, left=whole.left[rows])
            return _scaling(dora.merge_rows, output.dtype, start, term, magnitude[rows])
        places = piece.cols // magnitude.size
        height = rows_per_block(piece.cols)

        def blocks() -> Iterator[tuple[int, Array]]:
            for top in range(start, stop, height):
                yield top - start, self._read(output, top, min(height, stop - top), piece.cols)

        norms = dora.column_norms(blocks(), output.dtype, whole, places)
        factor = np.repeat(dora.checked_factor(magnitude, norms), places)
        return _scaling(dora.merge_columns, output.dtype, start, whole, factor)

    def _base_dependent(self, output: Output, piece: Piece) -> _Change:
        source = self.plan.sources[piece.adapter]
        update_of = source.update_on(piece)

        def by_rows(present: Array, top: int) -> _Changed:
            first = top - piece.start
            return _Changed(*base_dependent.merge_rows(present, output.dtype, update_of, piece.scale, first))

        def by_columns(present: Array, top: int) -> _Changed:
            step, above = source.step_of(piece), piece.start
            first = above + (top - above) // step * step
            last = above + -(-(top + len(present) - above) // step) * step
            whole = self._read(output, first, last - first, piece.cols)
            within = slice(top - first, top - first + len(present))
            return _Changed(*base_dependent.merge_columns(whole, output.dtype, update_of, piece.scale, within))

        return by_columns if piece.transposed else by_rows

    def _read(self, output: Output, first: int, count: int, cols: int) -> Array:
        """Return stored rows of what the tensor starts from."""
        if output.data is None:
            assert output.source is not None
            return self._stored(output.source, first, count, cols)
        kind = STORAGE[output.dtype]
        return np.frombuffer(output.data, kind, count * cols, first * cols * kind.itemsize).reshape(count, cols)

    def _stored(self, info: TensorInfo, first: int, count: int, cols: int) -> Array:
        return read_rows(self.plan.checkpoint, info, first, count, cols, self.workspace.pool)

    def _bound(self, stats: MergeStats, output: Output) -> None:
        self.rational += stats.rational
        if self.rational > MAX_RATIONAL:
            raise self._named(LimitError(f"more than {MAX_RATIONAL} elements need rational arithmetic"), output)

    def _named(self, error: LrcError, output: Output) -> LrcError:
        error.what = f"tensor {output.name!r}: {error.what}"
        return error.at(self.plan.checkpoint.root)


def workspace_for(work: str, planned: Plan) -> Workspace:
    """Return what a plan is computed with, for a `work` of `loops_for`."""
    return Workspace(loops=loops_for(work, sum(o.nbytes // 2 for o in planned.touched if o.dtype == "BF16")))


def rows_per_block(cols: int) -> int:
    """Return how many rows of a matrix of that width are read and computed at a time."""
    return max(1, BLOCK_BYTES // (8 * cols))


def read_rows(checkpoint: Checkpoint, info: TensorInfo, first: int, count: int, cols: int, pool: Pool) -> Array:
    """Return rows of a stored tensor seen as a matrix with `cols` columns, with the bits of the file."""
    kind = STORAGE[info.dtype]
    rows = pool.take((count, cols), kind)
    checkpoint.read_into(info, first * cols * kind.itemsize, rows.reshape(-1).view(np.uint8).data)
    return rows


# --- what can happen to rows ----------------------------------------------------------------------------------------


def _keep(present: Array, top: int) -> _Changed:
    return _Changed(present, MergeStats(elements=present.size))


def _putting(rows: Rows) -> _Change:
    def change(present: Array, top: int) -> _Changed:
        first, last = np.searchsorted(rows.index, [top, top + present.shape[0]])
        after = present.copy()
        after[rows.index[first:last] - top] = rows.values[first:last]
        changed = int(np.count_nonzero(bits(after) != bits(present)))
        return _Changed(after, MergeStats(elements=present.size, changed=changed))

    return change


def _scaling(
    merge: Callable[[Array, str, Term, F64], tuple[Array, MergeStats]], dtype: str, start: int, term: Term, by: F64
) -> _Change:
    """DoRA: `by` are the magnitudes of these rows, or a factor for every column."""
    rowwise = merge is dora.merge_rows

    def change(present: Array, top: int) -> _Changed:
        rows = slice(top - start, top - start + present.shape[0])
        part = replace(term, left=term.left[rows])
        return _Changed(*merge(present, dtype, part, by[rows] if rowwise else by))

    return change
