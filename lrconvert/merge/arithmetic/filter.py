"""The first stage of `exact`: float64 sums of a block of weights, and where these decide how a result rounds.

The proof is in the docstring of `lrconvert.merge.arithmetic.exact`. Everything is done tile by tile in buffers that
stay in the cache of a core, and for two results at once: ``M = W + U``, and the ``M - U`` that an unmerge starts from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lrconvert.core.dtypes import F32, F64, Array, Index, f16_half_up, f16_small
from lrconvert.merge.arithmetic.rounding import bits
from lrconvert.merge.arithmetic.stats import MergeStats
from lrconvert.merge.arithmetic.workspace import TILE, Buffers, Mask, Workspace

_U = 2.0**-53
_K = 1 << 18  # to float32: units in the last place of float64 around a boundary that are not decided at once
_NONE: Index = np.empty(0, np.intp)


@dataclass(frozen=True)
class Filtered:
    """The outcome of the filter for a block: in `stats`, of what is not open, `unmoved` counts the elements with a zero
    update. `open` and `open_guess` are the flat positions that it has not decided, of results and of predictions."""

    stats: MergeStats
    open: Index
    open_guess: Index


@dataclass(frozen=True)
class FilterBlock:
    """The factors of an update, (rows, k) and (k, width), with the scales multiplied in, and rows of whole matrices:
    `stored` and what is filled, `out`, and `guess` if there is one, in the columns from `first` on."""

    left: F64
    right: F64
    dtype: str
    stored: Array
    out: Array
    guess: Array | None = None
    first: int = 0

    @property
    def sides(self) -> tuple[Array, Array, Array | None]:
        """`stored`, `out` and `guess` in the columns of this block."""
        part = slice(self.first, self.first + self.right.shape[1])
        guess = None if self.guess is None else self.guess[:, part]
        return self.stored[:, part], self.out[:, part], guess

    @property
    def noise(self) -> float:
        """A bound of the error of every sum."""
        return gamma(self.left.shape[1]) * largest_sum(self.left, self.right)

    @property
    def suits_loops(self) -> bool:
        """True where the compiled loops take it."""
        return self.dtype == "BF16" and self.stored.flags.carray and self.out.flags.carray


def run(block: FilterBlock, work: Workspace, measure: bool) -> Filtered:
    """Fill `out` with the sums of `stored` and ``left @ right``, and `guess` with the differences of `out` and that.

    Open elements have any bits.
    """
    if work.loops is not None and block.suits_loops:
        return _run_loops(block, work, measure)
    stored, out, guess = block.sides
    rows, width = stored.shape
    noise, buffers = block.noise, work.buffers
    open_ = buffers.open[: stored.size].reshape(rows, width)
    open_guess = buffers.open_guess[: stored.size].reshape(rows, width)
    kinds: dict[str, type[_Single] | type[_Half]] = {"F32": _Single, "F16": _F16, "BF16": _BF16}
    kind = kinds[block.dtype]
    tile = kind(buffers, (min(rows, max(1, TILE // width)), width), noise)
    stats = MergeStats()
    with np.errstate(over="ignore", invalid="ignore"):
        for top in range(0, rows, tile.height):
            part = slice(top, min(rows, top + tile.height))
            if part.stop - top < tile.height:
                tile = kind(buffers, (part.stop - top, width), noise)
            work.multiply(block.left[part], block.right, tile.sums)
            codes, undecided = out[part], open_[part]
            clear = not measure or tile.find_small()
            tile.add(stored[part], codes, undecided)
            if measure:
                zeros = 0 if clear else tile.open_doubtful(undecided)
                changed = tile.count_changed(stored[part], codes, undecided)
                largest, total = tile.errors(codes, undecided)
                stats += MergeStats(changed=changed, unmoved=zeros, max_error=largest, sum_error=total)
            if guess is not None:
                tile.take_out(codes, guess[part], open_guess[part], is_decoded=measure)
    index = _where(open_.reshape(-1))
    if guess is None:
        return Filtered(stats, index, _NONE)
    np.logical_or(open_guess, open_, out=open_guess)
    return Filtered(stats, index, _where(open_guess.reshape(-1)))


def _run_loops(block: FilterBlock, work: Workspace, measure: bool) -> Filtered:
    """Do the same with the compiled loops, to BF16."""
    rows, width = block.left.shape[0], block.right.shape[1]
    noise, buffers, stored, out = block.noise, work.buffers, bits(block.stored), bits(block.out)
    guess = out[:0] if block.guess is None else bits(block.guess)
    height = max(1, TILE // width)
    limits, errors = _bf16_limits(noise), np.array([noise if measure else -1.0, 0.0, 0.0])
    places = buffers.long.view(np.uint32).reshape(2, -1)
    scratch = buffers.single[:width], buffers.open[: 2 * width].reshape(2, width)
    opened, guessed = [_NONE], [_NONE]
    changed = zeros = 0
    for top in range(0, rows, height):
        part = slice(top, min(rows, top + height))
        sums = buffers.sums[: (part.stop - top) * width].reshape(-1, width)
        work.multiply(block.left[part], block.right, sums)
        counts = work.loops.add(
            stored[part], block.first, sums, limits, (out[part], guess[part]), places, errors, scratch
        )
        for where, count, kept in zip(places, counts, (opened, guessed), strict=False):
            if count:
                kept.append(where[:count].astype(np.intp) + top * width)
        changed, zeros = changed + counts[2], zeros + counts[3]
    index = np.concatenate(opened)
    stats = MergeStats(changed=changed, unmoved=zeros, max_error=float(errors[1]), sum_error=float(errors[2]))
    open_guess = _NONE if block.guess is None else np.sort(np.concatenate((index, *guessed)))
    return Filtered(stats if measure else MergeStats(), index, open_guess)


class _Tile:
    """The buffers of some rows, and what is done to them: p = W + the sums, rounded to codes, and where p does not
    decide that. `noise` bounds the error of every sum."""

    def __init__(self, buffers: Buffers, shape: tuple[int, int], noise: float) -> None:
        def shaped(buffer: Array) -> Array:
            return buffer[: shape[0] * shape[1]].reshape(shape)

        self.height, self.noise = shape[0], noise
        self.sums, self.double = shaped(buffers.sums), shaped(buffers.double)
        self.single, self.value = shaped(buffers.single), shaped(buffers.value)
        self.flag, self.zero, self.doubtful = map(shaped, (buffers.flag, buffers.zero, buffers.doubtful))
        # p is not needed any more when these are
        halves = buffers.double.view(np.uint32)[: 2 * self.sums.size].reshape(2, -1)
        self.word = halves[0].reshape(shape)
        quarters = halves[1].view(np.uint16).reshape(2, -1)
        self.short, self.code = quarters[0].reshape(shape), quarters[1].reshape(shape)

    def find_small(self) -> bool:
        """Return whether the update is certainly nowhere zero, as in nearly every tile. Otherwise mark where its
        float64 is, and where it may be although that is not: terms cancel there."""
        sizes = np.abs(self.sums, out=self.double)
        if sizes.min() > self.noise:
            return True
        np.equal(sizes, 0, out=self.zero)
        np.less_equal(sizes, self.noise, out=self.doubtful)
        np.not_equal(self.doubtful, self.zero, out=self.doubtful)
        return False

    def open_doubtful(self, open_: Mask) -> int:
        """Leave open what `find_small` marked as doubtful. Returns how many of the others it marked as zero."""
        np.logical_or(open_, self.doubtful, out=open_)
        return int(np.count_nonzero(np.greater(self.zero, open_, out=self.zero)))

    def count_changed(self, stored: Array, codes: Array, open_: Mask) -> int:
        """Return how many elements that are not open have other bits than before."""
        np.not_equal(bits(stored), bits(codes), out=self.flag)
        return int(np.count_nonzero(np.greater(self.flag, open_, out=self.flag)))


class _Half(_Tile):
    """To 16 bits: f, p rounded to float32, is in `single` after `add`."""

    def add(self, stored: Array, codes: Array, open_: Mask) -> None:
        np.add(self.decode(stored), self.sums, out=self.single, casting="same_kind")
        self.round(codes, open_)

    def take_out(self, merged: Array, codes: Array, open_: Mask, *, is_decoded: bool) -> None:
        """Do the same for the difference."""
        value = self.value if is_decoded else self.decode(merged)
        np.subtract(value, self.sums, out=self.single, casting="same_kind")
        self.round(codes, open_)

    def errors(self, codes: Array, open_: Mask) -> tuple[float, float]:
        """Return the largest rounding error and their sum, open elements left out; uses up f and decodes `codes`."""
        f = np.subtract(self.single, self.decode(codes), out=self.single)
        np.abs(f, out=f)
        np.copyto(f, np.float32(0), where=open_)
        return float(f.max()), float(f.sum())  # numpy adds pairwise: float32 is good for an estimate

    def decode(self, codes: Array) -> F32:
        raise NotImplementedError

    def round(self, codes: Array, open_: Mask) -> None:
        raise NotImplementedError


class _BF16(_Half):
    def __init__(self, buffers: Buffers, shape: tuple[int, int], noise: float) -> None:
        super().__init__(buffers, shape, noise)
        self.least, self.count = _bf16_limits(noise)

    def decode(self, codes: Array) -> F32:
        word = self.value.view(np.uint32)
        np.copyto(word, codes)
        np.left_shift(word, np.uint32(16), out=word)
        return self.value

    def round(self, codes: Array, open_: Mask) -> None:
        """Round half up; half - 1 goes up as well, but it is left open."""
        word, short = self.word, self.short
        np.add(self.single.view(np.uint32), np.uint32(0x8001), out=word)
        np.copyto(short, word, casting="unsafe")  # half - 1, half and half + 1 are now 0, 1 and 2
        np.less_equal(short, np.uint16(2), out=open_)
        np.right_shift(word, np.uint32(16), out=word)
        np.copyto(codes, word, casting="unsafe")
        np.bitwise_and(codes, np.uint16(0x7FFF), out=short)
        np.subtract(short, self.least, out=short)
        np.greater_equal(short, self.count, out=self.flag)
        np.logical_or(open_, self.flag, out=open_)


class _F16(_Half):
    def __init__(self, buffers: Buffers, shape: tuple[int, int], noise: float) -> None:
        super().__init__(buffers, shape, noise)
        # bits of |f| that are decided at once, and how many follow before one rounds to infinity
        first = np.uint32(0x477FF000)
        self.least = min(_bits32(max(noise * 2.0**26, 2.0**-126)), first)
        self.count = first - self.least

    def decode(self, codes: Array) -> F32:
        return np.take(_F16_VALUES, codes.view(np.uint16), out=self.value, mode="wrap")

    def round(self, codes: Array, open_: Mask) -> None:
        """Round half up, below 2^-14 half to even; what is near a boundary is left open."""
        word, pattern = self.word, self.single.view(np.uint32)
        np.bitwise_and(pattern, np.uint32(0x7FFFFFFF), out=word)
        np.subtract(word, self.least, out=word)
        np.greater_equal(word, self.count, out=open_)
        np.add(pattern, np.uint32(0x1001), out=word)
        np.bitwise_and(word, np.uint32(0x1FFF), out=word)
        np.less_equal(word, np.uint32(2), out=self.flag)
        np.logical_or(open_, self.flag, out=open_)
        code = self.code.reshape(-1)
        small = f16_half_up(self.single.reshape(-1), code, word.reshape(-1))
        if small.size:
            around = pattern.reshape(-1)[small]
            around = np.where(around << np.uint32(1) == 0, around | np.uint32(1), around)
            code[small] = f16_small(around + np.uint32(1))
            near = code[small] != f16_small(around - np.uint32(1))
            open_.reshape(-1)[small] |= near
        np.copyto(codes, self.code.view(codes.dtype))


class _Single(_Tile):
    """To float32: p is in `double` after `add`."""

    def __init__(self, buffers: Buffers, shape: tuple[int, int], noise: float) -> None:
        super().__init__(buffers, shape, noise)
        self.long = buffers.long[: self.sums.size].reshape(shape)
        top, low = _bits64(2.0**128 - 2.0**103), _bits64(max(noise * 2.0**55 / _K, 2.0**-125))
        self.least, self.count = min(low, top), top - min(low, top)

    def add(self, stored: Array, codes: Array, open_: Mask) -> None:
        np.add(stored, self.sums, out=self.double)
        self.round(codes, open_)

    def take_out(self, merged: Array, codes: Array, open_: Mask, *, is_decoded: bool) -> None:
        """Do the same for the difference."""
        np.subtract(merged, self.sums, out=self.double)
        self.round(codes, open_)

    def errors(self, codes: Array, open_: Mask) -> tuple[float, float]:
        """Return the largest rounding error and their sum, open elements left out; uses up p."""
        p = np.subtract(self.double, codes, out=self.double)
        np.abs(p, out=p)
        np.copyto(p, 0.0, where=open_)
        return float(p.max()), float(p.sum())

    def round(self, codes: Array, open_: Mask) -> None:
        pattern, word = self.double.view(np.uint64), self.long
        np.copyto(codes, self.double, casting="same_kind")
        np.bitwise_and(pattern, np.uint64(2**63 - 1), out=word)
        np.subtract(word, self.least, out=word)
        np.greater_equal(word, self.count, out=open_)
        np.add(pattern, np.uint64(2**28 + _K), out=word)
        np.bitwise_and(word, np.uint64(2**29 - 1), out=word)
        np.less_equal(word, np.uint64(2 * _K), out=self.flag)
        np.logical_or(open_, self.flag, out=open_)


_F16_VALUES: F32 = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def _where(mask: Mask) -> Index:
    """Positions of the few True of a mask that begins a buffer: eight at a time."""
    whole = mask.size // 8 * 8
    hot = np.flatnonzero(mask[:whole].view(np.uint64))
    near = (hot[:, None] * 8 + np.arange(8)).reshape(-1)
    candidates = np.concatenate((near, np.arange(whole, mask.size)))
    return candidates[mask[candidates]]


def gamma(terms: int) -> float:
    """g of the proof for sums of that many products, with room for the rounding of norms."""
    k = terms + 2
    return k * _U / (1 - k * _U) * (1 + 2.0**-30)


def largest_sum(left: F64, right: F64) -> float:
    """Return a bound of ``sum_j |L_oj| |R_ji|`` for all elements of a block."""
    norms = np.linalg.norm(left, axis=1).max() * np.linalg.norm(right, axis=0).max()
    return float(min(norms, np.abs(left).max(axis=0) @ np.abs(right).max(axis=1)))


def _bf16_limits(noise: float) -> Array:
    """Return the first code of what is decided at once, whose |f| is less than a unit away, and how many follow up
    to infinity."""
    least = min((int(_bits32(max(noise * 2.0**26, 2.0**-126))) >> 16) + 2, 0x7F80)
    return np.array([least, 0x7F80 - least], np.uint16)


def _bits32(x: float) -> np.uint32:
    """The bits of the float32 next above `x` > 0, or of infinity."""
    with np.errstate(over="ignore"):
        return np.uint32(np.nextafter(np.float32(x), np.float32(np.inf)).view(np.uint32))


def _bits64(x: float) -> np.uint64:
    return np.uint64(np.float64(x).view(np.uint64))
