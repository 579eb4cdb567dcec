"""Correctly rounded ``W + sum of scale * left @ right``: the arithmetic of a merge, without any I/O.

Every element becomes the value of its dtype that is nearest (ties to even) to the exact real result, so the bytes do
not depend on the machine, the BLAS or its threads. Three stages, each taking what the one before cannot decide:

1. *Filter.* ``p = W + L @ R`` in float64, where the columns of L and rows of R are those of all terms and L has the
   scales multiplied in. With u = 2^-53 and k columns, in whatever order and with or without fused operations (what this
   asks of a product: `lrconvert.merge.arithmetic.workspace.multiply`),

       |p - exact| <= g * sum_j |L_oj| |R_ji| + u |p|,   g = (k + 2) u / (1 - (k + 2) u)

   (one rounding for the scale, one for the product, at most k - 1 for the sum: Higham, "Accuracy and Stability of
   Numerical Algorithms", 3.1). The sum is at most `bound`, the smaller of ``max_o ||L_o|| max_i ||R_i||`` and
   ``sum_j max_o |L_oj| max_i |R_ji|``: one number per block. An element is decided if no rounding boundary (midpoint of
   two neighbours) is nearby:

   - to 16-bit dtypes: f = p rounded to float32. |f| >= tau = 2^26 g bound makes the error of p less than 1/4 + 2^-29
     units in the last place of f, so the exact result is less than one unit from f: boundaries lie on the float32 grid,
     and if neither f nor a neighbour of f is one, f rounds as the exact result does.
   - to float32: |p| >= tau = 2^55 g bound / K makes the error of p at most K / 4 + 1 units in the last place of p, and
     p must be more than K units from a boundary.

   Elements smaller than tau, subnormal or out of range, and those near a boundary get a closer look: with the bound of
   their own row and column they are decided if p - e and p + e round to the same value. Hardly any are left.
2. *Compensated.* The sum again, with error-free transformations (TwoSum, TwoProduct) and two levels of error terms:
   ``exact = high + low + lost``, where |lost| has a computed bound that is zero whenever nothing was lost. Exact ties
   are decided here: `low` says on which side of the float64 `high` the result lies, or that it is `high`.
3. *Rational.* What still is open is computed in rational numbers.

Zero signs: where the exact result equals W, W keeps its bits (also -0); a result that is exactly zero otherwise is +0;
one that underflows keeps the sign of the exact result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from lrconvert.core.dtypes import F64, FLOATS, STORAGE, Array, Index, decode, round_to
from lrconvert.core.errors import DtypeError, LimitError, LrcError, MergeOverflowError, ShapeError, ValueRangeError
from lrconvert.core.limits import MAX_RATIONAL
from lrconvert.merge.arithmetic.error_free import Sum, certain, product_error, to_odd, two_sum
from lrconvert.merge.arithmetic.filter import FilterBlock, Filtered, gamma, run
from lrconvert.merge.arithmetic.rational import FORMATS, round_fraction, sign_bit
from lrconvert.merge.arithmetic.rounding import bits
from lrconvert.merge.arithmetic.stats import MergeStats
from lrconvert.merge.arithmetic.workspace import BLOCK, WIDTH, Mask, Workspace

_U = 2.0**-53
_FACTOR = 1 << 20  # float64 numbers of one factor of a block
_KEPT = 1 << 21  # numbers of right factors that are kept in float64 between blocks
_GATHER = 1 << 14  # elements of one pass of the stages that look at few
_AT_ONCE = 8  # such passes before it is counted what needed rational numbers

# Products of factors and scales within these powers of two neither overflow nor lose bits to underflow in float64.
_FACTOR_RANGE = (2.0**-400, 2.0**400)
_SCALE_RANGE = (2.0**-100, 2.0**100)


# --- what goes in and what comes out --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """``scale * left @ right``: `left` (rows, r), `right` (r, cols), float32 or float64."""

    scale: float
    left: Array
    right: Array


# --- the update -----------------------------------------------------------------------------------------------------


class Update:
    """The exact real matrix ``sum of scale * left @ right``, (rows, cols), ready to be added to stored weights.

    Raises E-SHAPE if the terms differ in shape and E-VALUE for numbers that are not finite or so large or small that
    their products leave float64 (factors beyond 2^400, scales beyond 2^100, either way).
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        if not terms:
            raise ShapeError("an update needs at least one term")
        self.shape = (terms[0].left.shape[0], terms[0].right.shape[1])
        for term in terms:
            _check_term(term, self.shape)
        kept = [t for t in terms if t.scale != 0 and t.left.any() and t.right.any()]
        self.terms = tuple(kept)
        self._live_rows, self._live_cols = np.zeros(self.shape[0], np.bool_), np.zeros(self.shape[1], np.bool_)
        for term in kept:
            self._live_rows |= term.left.any(axis=1)
            self._live_cols |= term.right.any(axis=0)
        self._wide = any(t.left.dtype == np.float64 or t.right.dtype == np.float64 for t in kept)
        self._negated: Update | None = None
        self._columns: dict[tuple[int, int], F64] = {}

    @property
    def is_zero(self) -> bool:
        """True if a look at the factors shows that the update is zero everywhere."""
        return not self.terms

    def add(
        self, stored: Array, dtype: str, first_row: int = 0, workspace: Workspace | None = None, *, measure: bool = True
    ) -> tuple[Array, MergeStats]:
        """Return (stored bits of ``W + update`` correctly rounded, what happened) for rows of W from `first_row` on.

        `stored` (n, cols) has the storage type of `dtype`: F32, F16, BF16 or F64. Without `measure` only `elements`,
        `recomputed` and `rational` are counted. Raises E-VALUE if an element that is not finite would change and
        E-OVERFLOW if a result is beyond the range of `dtype`; both name the element.
        """
        out, _, stats = self._add(stored, dtype, first_row, workspace, measure=measure, predict=False)
        return out, stats

    def add_and_predict(
        self, stored: Array, dtype: str, first_row: int = 0, workspace: Workspace | None = None
    ) -> tuple[Array, Array | None, MergeStats]:
        """Return what `add` does and, second, what the negated update makes of the result: an unmerge starts from that.

        The product is computed once for both. None in its place if a difference is beyond the range of `dtype`, or
        needs more rational arithmetic than is done.
        """
        return self._add(stored, dtype, first_row, workspace, measure=True, predict=True)

    def _add(
        self, stored: Array, dtype: str, first_row: int, workspace: Workspace | None, *, measure: bool, predict: bool
    ) -> tuple[Array, Array | None, MergeStats]:
        if dtype not in FLOATS or stored.dtype != STORAGE[dtype]:
            raise DtypeError(f"weights of dtype {dtype} stored as {stored.dtype} cannot take an update")
        if stored.ndim != 2 or stored.shape[1] != self.shape[1] or first_row + stored.shape[0] > self.shape[0]:
            raise ShapeError(f"rows of shape {list(stored.shape)} do not fit an update of shape {list(self.shape)}")
        rows = _chosen(self._live_rows[first_row : first_row + stored.shape[0]])
        cols = _chosen(self._live_cols)
        is_whole = (rows.size, cols.size) == stored.shape
        if workspace is None:
            workspace = Workspace(threads=1)
        out = workspace.pool.take(stored.shape, stored.dtype)
        guess = workspace.pool.take(stored.shape, stored.dtype) if predict else None
        if not is_whole:
            out[:] = stored
            if guess is not None:
                guess[:] = stored
        window = (slice(0, 0), slice(0, 0)) if not rows.size or not cols.size else _window(rows, cols)
        job = _Job(self, stored[window], out[window], None if guess is None else guess[window], dtype, workspace)
        stats, is_predicted = job.run(first_row + rows, cols, measure)
        if not isinstance(window[0], slice):  # what it shows is a copy
            out[window] = job.out
            if guess is not None:
                guess[window] = job.guess
        return out, guess if is_predicted else None, replace(stats, elements=stored.size)

    def columns(self, live: Index, first: int, width: int) -> F64:
        """Return the right factors in the columns from place `first` of `live` on; kept unless they are large."""
        columns = self._columns.get((first, width))
        if columns is None:
            columns = _right(self, live[first : first + width])
            if columns.shape[0] * live.size <= _KEPT:
                self._columns[first, width] = columns
        return columns

    def negated(self) -> Update:
        """Return the update that takes this one out again."""
        if self._negated is None:
            self._negated = Update([replace(t, scale=-t.scale) for t in self.terms]) if self.terms else self
        return self._negated

    def window(self, first_row: int, count: int) -> tuple[Any, Any] | None:
        """Return the index of the elements that `add` may change in `count` rows from `first_row` on; None if there are
        none. A function of the factors alone."""
        rows, cols = _chosen(self._live_rows[first_row : first_row + count]), _chosen(self._live_cols)
        return _window(rows, cols) if rows.size and cols.size else None

    def exact(self, row: int, col: int) -> Fraction:
        """Return one element of the update, as the rational number it is."""
        total = Fraction(0)
        for t in self.terms:
            pairs = zip(t.left[row].tolist(), t.right[:, col].tolist(), strict=True)
            total += Fraction(t.scale) * sum((Fraction(a) * Fraction(b) for a, b in pairs if a and b), Fraction(0))
        return total


def _check_term(term: Term, shape: tuple[int, int]) -> None:
    left, right = term.left, term.right
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0] or (left.shape[0], right.shape[1]) != shape:
        raise ShapeError(f"factors {list(left.shape)} and {list(right.shape)} do not give an update of {list(shape)}")
    for values, limits, what in (
        (np.asarray(term.scale), _SCALE_RANGE, "the scale"),
        (left, _FACTOR_RANGE, "a factor"),
        (right, _FACTOR_RANGE, "a factor"),
    ):
        if not np.isfinite(values).all():
            raise ValueRangeError(f"{what} is NaN or infinite")
        if values.dtype == np.float64:
            sizes = np.abs(values)
            if ((sizes != 0) & ((sizes < limits[0]) | (sizes > limits[1]))).any():
                raise ValueRangeError(f"{what} is beyond {limits[0]:g} to {limits[1]:g} in size")


def _chosen(live: Mask) -> Index:
    """Positions of the rows or columns to compute: the live ones, or all if hardly any is dead (that is faster)."""
    count = int(live.sum())
    return np.arange(live.size) if 0 < live.size - count < live.size // 8 else np.flatnonzero(live)


def _window(rows: Index, cols: Index) -> tuple[Any, Any]:
    """Return the index of these rows and columns of a matrix: slices where that is possible, as they are faster."""
    if rows[-1] - rows[0] == rows.size - 1 and cols[-1] - cols[0] == cols.size - 1:
        return slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)
    return rows[:, None], cols


# --- the three stages -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """An update of some stored weights: what it gives goes to `out`, and what its opposite makes of that to `guess`."""

    update: Update
    stored: Array
    out: Array
    guess: Array | None
    dtype: str
    workspace: Workspace

    def run(self, rows: Index, cols: Index, measure: bool) -> tuple[MergeStats, bool]:
        """Compute everything; `rows` and `cols` are its places in the update. Returns what happened, and whether all of
        `guess` was computed."""
        if not self.stored.size:
            return MergeStats(), True
        first = self._filter(rows, cols, measure)
        stats = first.stats + self._open(self.update, rows, cols).decide(self.stored, self.out, first.open)
        if measure:
            place = np.divmod(first.open, cols.size)
            changed = first.stats.changed + int(np.count_nonzero(bits(self.out[place]) != bits(self.stored[place])))
            stats = replace(stats, changed=changed, unmoved=self.stored.size - changed - stats.unmoved)
        else:
            stats = MergeStats(recomputed=stats.recomputed, rational=stats.rational)
        if self.guess is not None:
            try:
                self._open(self.update.negated(), rows, cols).decide(self.out, self.guess, first.open_guess)
            except (MergeOverflowError, LimitError):  # at the very end of the range
                return stats, False
        return stats, True

    def _open(self, update: Update, rows: Index, cols: Index) -> _Open:
        return _Open(update, self.dtype, rows, cols, self.workspace)

    def _filter(self, rows: Index, cols: Index, measure: bool) -> Filtered:
        """Fill `out` and `guess` block by block; what is open has its place in the whole."""
        if self.dtype == "F64":  # p has no digits to spare: everything is compensated
            everything = np.arange(self.stored.size)
            return Filtered(MergeStats(), everything, everything)
        rank = sum(t.left.shape[1] for t in self.update.terms)
        width = max(1, min(WIDTH, cols.size, _FACTOR // max(1, rank)))
        height = max(1, min(BLOCK // width, _FACTOR // max(1, rank)))

        def filtered(place: tuple[int, int]) -> Filtered:
            part = slice(place[0], place[0] + height)
            left, right = _left(self.update, rows[part]), self.update.columns(cols, place[1], width)
            guess = None if self.guess is None else self.guess[part]
            block = FilterBlock(left, right, self.dtype, self.stored[part], self.out[part], guess, place[1])
            done = run(block, self.workspace, measure)

            def whole(index: Index) -> Index:
                row, col = np.divmod(index, right.shape[1])
                flat: Index = (row + place[0]) * cols.size + (col + place[1])
                return flat

            return Filtered(done.stats, whole(done.open), whole(done.open_guess))

        places = [(r, c) for r in range(0, rows.size, height) for c in range(0, cols.size, width)]
        parts = self.workspace.map(filtered, places)
        return Filtered(
            sum((part.stats for part in parts), MergeStats()),
            np.concatenate([part.open for part in parts]),
            np.concatenate([part.open_guess for part in parts]),
        )


def _left(update: Update, rows: Index) -> F64:
    """Return those rows of the left factors of all terms, with the scales multiplied in."""
    return np.concatenate([t.left[rows].astype(np.float64) * t.scale for t in update.terms], axis=1)


def _right(update: Update, cols: Index) -> F64:
    """Return those columns of the right factors of all terms."""
    return np.concatenate([t.right[:, cols] for t in update.terms]).astype(np.float64)


@dataclass(frozen=True)
class _Open:
    """The elements that the filter left open; `rows` and `cols` are the places in the update.

    In the statistics `unmoved` counts those that a zero update did not move.
    """

    update: Update
    dtype: str
    rows: Index
    cols: Index
    workspace: Workspace

    def decide(self, base: Array, goal: Array, index: Index) -> MergeStats:
        """Write the elements `index` of `goal`; return what happened to them. Raises E-VALUE, E-OVERFLOW, E-LIMIT."""
        stats = MergeStats()
        rank = max(1, sum(t.left.shape[1] for t in self.update.terms))
        step = max(1, min(_GATHER, _FACTOR // rank))
        chunks = [index[start : start + step] for start in range(0, index.size, step)]
        for first in range(0, len(chunks), _AT_ONCE):
            parts = self.workspace.map(lambda chunk: self._decided(base, goal, chunk), chunks[first : first + _AT_ONCE])
            stats = sum(parts, stats)
            if stats.rational > MAX_RATIONAL:
                raise LimitError(f"more than {MAX_RATIONAL} elements need rational arithmetic to be rounded")
        return stats

    def _decided(self, base: Array, goal: Array, index: Index) -> MergeStats:
        stats = MergeStats()
        if self.dtype != "F64":
            stats, index = self._interval(base, goal, index)
        return stats + self._compensate(base, goal, index) if index.size else stats

    def _interval(self, base: Array, goal: Array, index: Index) -> tuple[MergeStats, Index]:
        """Decide those of the elements `index` whose own error bound keeps p on one side of every boundary. Returns
        what happened to them, and which are left."""
        place = np.divmod(index, self.cols.size)
        stored = base[place]
        left, right = _left(self.update, self.rows[place[0]]), _right(self.update, self.cols[place[1]])
        change = np.einsum("nk,kn->n", left, right)
        slack = gamma(left.shape[1]) * np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=0)
        with np.errstate(over="ignore", invalid="ignore"):
            p = decode(stored, self.dtype) + change
            e = slack + np.abs(p) * (4 * _U)
            below, above = p - e, p + e
            codes, other = round_to(below, self.dtype), round_to(above, self.dtype)
            values = decode(codes, self.dtype)
            sure = (bits(codes) == bits(other)) & np.isfinite(values) & ((below > 0) | (above < 0))
            sure &= (change == 0) | (np.abs(change) > slack)  # otherwise it may be zero all the same
            errors = np.abs(p - values)[sure]
        codes = np.where(sure, codes, stored)
        goal[place] = codes
        still = sure & (change == 0) & (bits(codes) == bits(stored))
        stats = MergeStats(
            unmoved=int(np.count_nonzero(still)),
            max_error=float(errors.max(initial=0.0)),
            sum_error=float(errors.sum()),
        )
        return stats, index[~sure]

    # --- stage 2 ---

    def _compensate(self, base: Array, goal: Array, index: Index) -> MergeStats:
        """Decide the elements `index` of the block, write them to `goal` and say what happened to them."""
        place = np.divmod(index, self.cols.size)
        rows, cols = self.rows[place[0]], self.cols[place[1]]
        stored = base[place]
        w = decode(stored, self.dtype).astype(np.float64)
        with np.errstate(all="ignore"):
            total = self._sum(rows, cols)
            change = two_sum(total.high, total.low)
            no_change = (change[0] == 0) & (total.lost == 0)
            some_change = np.abs(change[0]) > total.lost  # for the counts: what is within `lost` of zero counts as zero
            total.add(w)
            high, low = two_sum(total.high, total.low)
            lost = total.lost * (1 + 2.0**-20)  # the bound was itself added up with rounding
            sure = no_change | certain(high, low, lost, self.dtype)
            # Whether W moves at all must be certain too where W is infinite or NaN: those are left to stage 3.
            sure &= no_change | np.isfinite(w)
            result = high if self.dtype == "F64" else to_odd(high, low)
            codes = round_to(result, self.dtype)
            error = np.abs((high - decode(codes, self.dtype)) + low)
        keep = no_change | ((high == w) & (low == 0) & (lost == 0))
        codes = np.where(keep, stored, codes)
        error[keep] = 0
        overflow = sure & ~keep & ~np.isfinite(decode(codes, self.dtype))
        if overflow.any():
            raise _overflow(self.dtype, rows[overflow][0], cols[overflow][0])
        unmoved = some_change & (bits(codes) == bits(stored))
        unclear = np.flatnonzero(~sure)
        for i in unclear:
            codes[i], error[i], unmoved[i] = self._rational(stored[i], float(w[i]), int(rows[i]), int(cols[i]))
        goal[place] = codes
        return MergeStats(
            unmoved=int(np.count_nonzero(~unmoved & (bits(codes) == bits(stored)))),
            max_error=float(error.max(initial=0.0)),
            sum_error=float(error.sum()),
            recomputed=index.size,
            rational=unclear.size,
        )

    def _sum(self, rows: Index, cols: Index) -> Sum:
        """The update at (rows[n], cols[n])."""
        total = Sum(rows.size)
        for term in self.update.terms:
            part = Sum(rows.size)
            for j in range(term.left.shape[1]):
                a = term.left[rows, j].astype(np.float64)
                b = term.right[j, cols].astype(np.float64)
                product = a * b
                part.add(product)
                if self.update._wide:  # the product of two float32 is exact
                    part.add(product_error(a, b, product))
            total.add_scaled(part, term.scale)
        return total

    # --- stage 3 ---

    def _rational(self, stored: Any, w: float, row: int, col: int) -> tuple[Any, float, bool]:
        """(stored bits, rounding error, whether a nonzero update changed nothing) of one element."""
        change = self.update.exact(row, col)
        if change == 0:
            return stored, 0.0, False
        if not np.isfinite(w):
            raise ValueRangeError(f"element [{row}, {col}] is {w} and would be changed", fix="the base is damaged")
        exact = Fraction(w) + change
        if exact == Fraction(w):
            return stored, 0.0, True
        code = round_fraction(exact, self.dtype)
        if code & ~sign_bit(self.dtype) >= FORMATS[self.dtype][2]:
            raise _overflow(self.dtype, row, col)
        kind = STORAGE[self.dtype]
        element = np.array([code], f"<u{kind.itemsize}").view(kind)
        error = abs(exact - Fraction(float(decode(element, self.dtype)[0])))
        return element[0], float(error), element[0].tobytes() == stored.tobytes()


def _overflow(dtype: str, row: int, col: int) -> LrcError:
    return MergeOverflowError(
        f"element [{row}, {col}] would be beyond the range of {dtype}",
        fix="merge into a base of a wider dtype, or check the adapter's scale",
    )
