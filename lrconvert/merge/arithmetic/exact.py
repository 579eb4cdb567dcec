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

from lrconvert.core.dtypes import F32, F64, FLOATS, STORAGE, U32, Array, Index, decode, f16_half_up, f16_small, round_to
from lrconvert.core.errors import DtypeError, LimitError, LrcError, MergeOverflowError, ShapeError, ValueRangeError
from lrconvert.core.limits import MAX_RATIONAL
from lrconvert.merge.arithmetic.error_free import Sum, certain, product_error, to_odd, two_sum
from lrconvert.merge.arithmetic.rounding import bits
from lrconvert.merge.arithmetic.stats import MergeStats
from lrconvert.merge.arithmetic.workspace import TILE, Mask, Workspace

_U = 2.0**-53
_K = 1 << 18  # float32 filter: units in the last place of float64 around a boundary that are not decided at once
_WIDTH = 1 << 11  # columns of a block
_BLOCK = 1 << 21  # elements of a block
_FACTOR = 1 << 20  # float64 numbers of one factor of a block
_GATHER = 1 << 14  # elements of one pass of the compensated stage

# Products of factors and scales within these powers of two neither overflow nor lose bits to underflow in float64.
_FACTOR_RANGE = (2.0**-400, 2.0**400)
_SCALE_RANGE = (2.0**-100, 2.0**100)

# (bits of the mantissa, smallest exponent of a normal number, code of infinity)
_FORMATS = {
    "F64": (52, -1022, 0x7FF << 52),
    "F32": (23, -126, 0xFF << 23),
    "F16": (10, -14, 0x1F << 10),
    "BF16": (7, -126, 0xFF << 7),
}


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

    @property
    def is_zero(self) -> bool:
        """True if a look at the factors shows that the update is zero everywhere."""
        return not self.terms

    @property
    def _rank(self) -> int:
        return sum(t.left.shape[1] for t in self.terms)

    def add(
        self, stored: Array, dtype: str, first_row: int = 0, workspace: Workspace | None = None
    ) -> tuple[Array, MergeStats]:
        """Return (stored bits of ``W + update`` correctly rounded, what happened) for rows of W from `first_row` on.

        `stored` (n, cols) has the storage type of `dtype`: F32, F16, BF16 or F64. Raises E-VALUE if an element that is
        not finite would change and E-OVERFLOW if a result is beyond the range of `dtype`; both name the element.
        """
        if dtype not in FLOATS or stored.dtype != STORAGE[dtype]:
            raise DtypeError(f"weights of dtype {dtype} stored as {stored.dtype} cannot take an update")
        if stored.ndim != 2 or stored.shape[1] != self.shape[1] or first_row + stored.shape[0] > self.shape[0]:
            raise ShapeError(f"rows of shape {list(stored.shape)} do not fit an update of shape {list(self.shape)}")
        rows = _chosen(self._live_rows[first_row : first_row + stored.shape[0]])
        cols = _chosen(self._live_cols)
        out = np.empty_like(stored) if (rows.size, cols.size) == stored.shape else stored.copy()
        if workspace is None:
            workspace = Workspace(threads=1)
        width = max(1, min(_WIDTH, cols.size, _FACTOR // max(1, self._rank)))
        height = max(1, min(_BLOCK // width, _FACTOR // max(1, self._rank)))
        blocks = [
            _Block(self, stored, out, dtype, first_row, rows[r : r + height], cols[c : c + width], workspace)
            for r in range(0, rows.size, height)
            for c in range(0, cols.size, width)
        ]
        return out, sum(workspace.map(_Block.run, blocks), MergeStats(elements=stored.size))

    def negated(self) -> Update:
        """Return the update that takes this one out again."""
        return Update([replace(t, scale=-t.scale) for t in self.terms]) if self.terms else self

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


# --- one block ------------------------------------------------------------------------------------------------------


@dataclass
class _Block:
    """Some `rows` and `cols` of an update, with where to read and write: rows of `stored` and `out`, row 0 of which is
    row `first_row` of the update."""

    update: Update
    stored: Array
    out: Array
    dtype: str
    first_row: int
    rows: Index
    cols: Index
    workspace: Workspace

    def __post_init__(self) -> None:
        self.buffers = self.workspace.buffers
        self.window = _window(self.rows, self.cols)
        self.rows = self.first_row + self.rows

    def run(self) -> MergeStats:
        flat, goal = self.stored[self.window].reshape(-1), self.out[self.window]
        codes = goal.reshape(-1)  # what the window shows of `out`, if it shows whole rows, else a copy
        if self.dtype == "F64":  # p has no digits to spare: everything is compensated
            stats, open_ = MergeStats(), np.arange(flat.size)
        else:
            stats, open_ = self._filter(flat, codes)
        for start in range(0, open_.size, _GATHER):
            stats += self._compensate(flat, codes, open_[start : start + _GATHER])
            if stats.rational > MAX_RATIONAL:
                raise LimitError(f"more than {MAX_RATIONAL} elements need rational arithmetic to be rounded")
        if not np.shares_memory(codes, self.out):
            self.out[self.window] = codes.reshape(goal.shape)
        return stats

    # --- stage 1 ---

    def _filter(self, flat: Array, out: Array) -> tuple[MergeStats, Index]:
        """Fill `out` and return what happened to the elements that are decided, and which are not."""
        terms, width = self.update.terms, self.cols.size
        left = np.concatenate([t.left[self.rows].astype(np.float64) * t.scale for t in terms], axis=1)
        right = np.concatenate([t.right[:, self.cols] for t in terms]).astype(np.float64)
        tau, noise = self._thresholds(left, right)
        decided = self._decided(tau)
        narrow = self._to_single if self.dtype == "F32" else self._to_half
        height = max(1, TILE // width)
        stats, parts = [], []
        with np.errstate(over="ignore", invalid="ignore"):
            for top in range(0, self.rows.size, height):
                start = top * width
                sums = self.buffers.sums[: min(height, self.rows.size - top) * width]
                self.workspace.multiply(left[top : top + height], right, sums.reshape(-1, width))
                piece = slice(start, start + sums.size)
                nonzero, doubtful = self._effects(sums, noise)
                open_ = narrow(flat[piece], sums, out[piece], *decided)
                if doubtful.size:
                    open_ = np.union1d(open_, doubtful)
                doubt = np.isin(open_, doubtful) if doubtful.size else np.zeros(open_.size, np.bool_)
                parts.append((open_ + start, self.buffers.double[open_], nonzero[open_], doubt))
                stats.append(self._measure(flat[piece], out[piece], nonzero, open_))
        index, p, nonzero, doubt = (np.concatenate(group) for group in zip(*parts, strict=True))
        bound = np.linalg.norm(left, axis=1)[index // width] * np.linalg.norm(right, axis=0)[index % width]
        slack = _gamma(left.shape[1]) * bound
        decided_now, sure = self._interval(flat, out, index, p, slack, nonzero, ~doubt)
        return sum(stats, decided_now), index[~sure]

    def _thresholds(self, left: F64, right: F64) -> tuple[float, float]:
        """tau of the module's docstring (results smaller than this are not decided at once), and the largest error of
        the sums."""
        norms = np.linalg.norm(left, axis=1).max() * np.linalg.norm(right, axis=0).max()
        sums = np.abs(left).max(axis=0) @ np.abs(right).max(axis=1)
        noise = float(_gamma(left.shape[1]) * min(norms, sums))
        return noise * (2.0**55 / _K if self.dtype == "F32" else 2.0**26), noise

    def _decided(self, tau: float) -> tuple[Any, Any]:
        """(bits of the least |f| or |p| that is decided at once, how many follow before one rounds to infinity)."""
        if self.dtype == "F32":
            top, low = _bits64(2.0**128 - 2.0**103), _bits64(max(tau, 2.0**-125))
            return min(low, top), top - min(low, top)
        first = np.uint32(0x477FF000 if self.dtype == "F16" else 0x7F7F8000)
        least = min(_bits32(max(tau, 2.0**-126)), first)
        return least, first - least

    def _effects(self, sums: F64, noise: float) -> tuple[Mask, Index]:
        """Return where the update is not zero, and where it may be although its float64 is not: terms cancel there."""
        nonzero = self.buffers.nonzero[: sums.size]
        sizes = np.abs(sums, out=self.buffers.double[: sums.size])
        if sizes.min() > noise:  # as in nearly every tile
            nonzero.fill(True)
            return nonzero, np.empty(0, np.intp)
        np.not_equal(sums, 0, out=nonzero)
        small = np.less_equal(sizes, noise, out=self.buffers.flag[: sums.size])
        return nonzero, np.flatnonzero(np.logical_and(small, nonzero, out=small))

    def _to_half(self, w: Array, delta: F64, codes: Array, least: np.uint32, count: np.uint32) -> Index:
        """Write ``w + delta`` as 16-bit `codes` and return which are undecided; leaves p and f in the workspace."""
        work, n = self.buffers, w.size
        p, f, word, code = work.double[:n], work.single[:n], work.word[:n], work.value[:n].view(np.uint32)
        far, near = work.flag[:n], work.other_flag[:n]
        np.copyto(p, _decode_half(w, self.dtype, work.value[:n]))
        np.add(delta, p, out=p)
        np.copyto(f, p, casting="same_kind")
        pattern = f.view(np.uint32)
        np.bitwise_and(pattern, np.uint32(0x7FFFFFFF), out=word)
        np.subtract(word, least, out=word)
        np.greater_equal(word, count, out=far)
        drop = np.uint32(13 if self.dtype == "F16" else 16)  # mantissa bits that go
        half = np.uint32(1) << (drop - np.uint32(1))
        np.add(pattern, half + np.uint32(1), out=word)
        if self.dtype == "BF16":  # rounded half up; half - 1 goes up as well, but it is undecided
            np.copyto(codes, np.right_shift(word, drop, out=code), casting="unsafe")
        np.bitwise_and(word, half + half - np.uint32(1), out=word)  # half - 1, half and half + 1 are now 0, 1 and 2
        np.less_equal(word, np.uint32(2), out=near)
        np.logical_or(far, near, out=far)
        if self.dtype == "F16":
            _to_f16(f, codes, word, far)
        return _where(far)

    def _to_single(self, w: Array, delta: F64, codes: Array, least: np.uint64, count: np.uint64) -> Index:
        """Write ``w + delta`` as float32 `codes` and return which are undecided; leaves p in the workspace."""
        work, n = self.buffers, w.size
        p, word, far, near = work.double[:n], work.long[:n], work.flag[:n], work.other_flag[:n]
        np.copyto(p, w)
        np.add(p, delta, out=p)
        np.copyto(codes, p, casting="same_kind")
        pattern = p.view(np.uint64)
        np.bitwise_and(pattern, np.uint64(2**63 - 1), out=word)
        np.subtract(word, least, out=word)
        np.greater_equal(word, count, out=far)
        np.add(pattern, np.uint64(2**28 + _K), out=word)
        np.bitwise_and(word, np.uint64(2**29 - 1), out=word)
        np.less_equal(word, np.uint64(2 * _K), out=near)
        np.logical_or(far, near, out=far)
        return _where(far)

    def _measure(self, w: Array, codes: Array, nonzero: Mask, open_: Index) -> MergeStats:
        """Return what happened to a tile, its elements `open_` left out; uses up p and f."""
        work, n = self.buffers, w.size
        moved = np.not_equal(bits(codes), bits(w), out=work.flag[:n])
        moved[open_] = nonzero[open_] = False
        unmoved = np.greater(nonzero, moved, out=work.other_flag[:n])
        if self.dtype == "F32":
            errors: Array = np.subtract(work.double[:n], codes, out=work.double[:n])
        else:
            value = _decode_half(codes, self.dtype, work.value[:n])
            errors = np.subtract(work.single[:n], value, out=value)
        np.abs(errors, out=errors)
        errors[open_] = 0
        return MergeStats(
            changed=int(np.count_nonzero(moved)),
            unmoved=int(np.count_nonzero(unmoved)),
            max_error=float(errors.max()),
            sum_error=float(errors.sum()),  # numpy adds pairwise: float32 is good for an estimate
        )

    def _interval(
        self, flat: Array, out: Array, index: Index, p: F64, slack: F64, nonzero: Mask, candidates: Mask
    ) -> tuple[MergeStats, Mask]:
        """Decide those of the elements `index` whose own error bound keeps p on one side of every boundary (`slack` is
        the part of it that comes from the sum). Returns what happened to them, and which they are."""
        stored = flat[index]
        with np.errstate(over="ignore", invalid="ignore"):
            e = slack + np.abs(p) * (4 * _U)
            below, above = p - e, p + e
            codes, other = round_to(below, self.dtype), round_to(above, self.dtype)
            values = decode(codes, self.dtype)
            sure = candidates & (bits(codes) == bits(other)) & np.isfinite(values) & ((below > 0) | (above < 0))
            errors = np.abs(p - values)[sure]
        out[index[sure]] = codes[sure]
        moved = bits(codes) != bits(stored)
        stats = MergeStats(
            changed=int(np.count_nonzero(moved & sure)),
            unmoved=int(np.count_nonzero(nonzero & ~moved & sure)),
            max_error=float(errors.max(initial=0.0)),
            sum_error=float(errors.sum()),
        )
        return stats, sure

    # --- stage 2 ---

    def _compensate(self, flat: Array, out: Array, index: Index) -> MergeStats:
        """Decide the elements `index` of the block, write them to `out` and say what happened to them."""
        rows, cols = self.rows[index // self.cols.size], self.cols[index % self.cols.size]
        stored = flat[index]
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
        out[index] = codes
        return MergeStats(
            changed=int(np.count_nonzero(bits(codes) != bits(stored))),
            unmoved=int(np.count_nonzero(unmoved)),
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
        if code & ~_sign_bit(self.dtype) >= _FORMATS[self.dtype][2]:
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


# --- stage 1: small things ------------------------------------------------------------------------------------------

_F16_VALUES: F32 = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def _decode_half(w: Array, dtype: str, out: F32) -> F32:
    if dtype == "F16":
        return np.take(_F16_VALUES, w.view(np.uint16), out=out, mode="wrap")
    word = out.view(np.uint32)
    np.copyto(word, w)
    np.left_shift(word, np.uint32(16), out=word)
    return out


def _to_f16(f: F32, codes: Array, word: U32, undecided: Mask) -> None:
    """fp16 codes of `f`, rounding half up; subnormal ones that are near a boundary are added to `undecided`."""
    pattern, out = f.view(np.uint32), codes.view(np.uint16)
    small = f16_half_up(f, out, word)
    if small.size:
        near = pattern[small]
        around = np.where(near << np.uint32(1) == 0, near | np.uint32(1), near)
        out[small] = f16_small(around + np.uint32(1))
        undecided[small] |= out[small] != f16_small(around - np.uint32(1))


def _where(mask: Mask) -> Index:
    """Positions of the few True of a mask that begins a buffer: eight at a time."""
    whole = mask.size // 8 * 8
    hot = np.flatnonzero(mask[:whole].view(np.uint64) != 0)
    near = (hot[:, None] * 8 + np.arange(8)).reshape(-1)
    candidates = np.concatenate((near, np.arange(whole, mask.size)))
    return candidates[mask[candidates]]


def _gamma(terms: int) -> float:
    """g of the module's docstring for sums of that many products, with room for the rounding of norms."""
    k = terms + 2
    return k * _U / (1 - k * _U) * (1 + 2.0**-30)


def _bits32(x: float) -> np.uint32:
    """The bits of the float32 next above `x` > 0, or of infinity."""
    with np.errstate(over="ignore"):
        return np.uint32(np.nextafter(np.float32(x), np.float32(np.inf)).view(np.uint32))


def _bits64(x: float) -> np.uint64:
    return np.uint64(np.float64(x).view(np.uint64))


# --- stage 3: rational numbers --------------------------------------------------------------------------------------


def _sign_bit(dtype: str) -> int:
    return 1 << (8 * STORAGE[dtype].itemsize - 1)


def round_fraction(x: Fraction, dtype: str) -> int:
    """Return the bits, as an integer, of the value of `dtype` nearest to `x`, ties to even; or infinity."""
    mantissa, smallest, infinity = _FORMATS[dtype]
    sign = _sign_bit(dtype) if x < 0 else 0
    x = abs(x)
    if x == 0:
        return 0
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    if x < Fraction(2) ** exponent:
        exponent -= 1
    exponent = max(exponent, smallest)
    units = round(x / Fraction(2) ** (exponent - mantissa))  # Python rounds fractions half to even
    # A normal number's units include its leading one, which is the lowest bit of the exponent field.
    code = ((exponent - smallest) << mantissa) + units
    return sign | min(code, infinity)
