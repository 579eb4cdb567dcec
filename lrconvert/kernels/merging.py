"""The filter of a merge into bfloat16, and the comparison behind undo codes of 16-bit weights, a row at a time.

`merge/arithmetic/filter`, with the proof, and `merge/undo/residual` have the same in numpy: equal bits, places and
counts. The sum of the errors is one of float32 in another order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lrconvert.core.dtypes import F32, F64, Array
from lrconvert.kernels.jit import compiled
from lrconvert.kernels.machine_code import Signature

LOOPS = {
    "add": Signature(
        ("u2 2", "i8", "f8 2", "u2 1", ("u2 2", "u2 2"), "u4 2", "f8 1", ("f4 1", "? 2")),
        4,
    ),
    "compare": Signature(("u2 1", "u2 1", "u2 1", "i8", "u2 1", "u4 1", "u2 2"), 2),
    "count_lower": Signature(("u2 1", "u2 1", "i8"), 1),
    "restore": Signature(("u2 1", "u2 1", "i8", "u2 1", "u2 2")),
}

_TOP = np.uint16(0x8000)
_SIZE = np.uint16(0x7FFF)  # all bits but the sign


@compiled()
def add(
    stored: Array,
    first: int,
    sums: F64,
    limits: Array,
    results: tuple[Array, Array],
    places: Array,
    errors: F64,
    scratch: tuple[F32, Array],
) -> tuple[int, int, int, int]:
    """Fill the `results`, the bits of M, and those of P unless it has no rows, from `stored`, the bits of W, all uint16
    (n, cols), in the columns from `first` on, and `sums` (n, m), U:

        M <- W + U;  P <- M - U        each rounded to float32, then half up to bfloat16

    An M is open if its rounding is (`_round`), or if ``0 < |U| <= small``, which is ``errors[0]``. Places in `sums` of
    open M go to ``places[0]``, of other elements whose P is open to ``places[1]``, both uint32. Returns how many there
    are of both, how many of the M that are not open differ from W, and how many of them have U = 0. The largest of
    their errors ``|f - M|``, f the float32, goes to ``errors[1]``, and the sum is added to ``errors[2]``. If `small` is
    below 0, only places are of use. `scratch` is for a row of f (m,) and of what is open, bool (2, m).
    """
    n, m = sums.shape
    small, last = errors[0], first + m
    codes, guess = results
    f, open_, unsure = scratch[0], scratch[1][0], scratch[1][1]
    opened = guessed = changed = zeros = 0
    for i in range(n):
        row, change, code = stored[i, first:last], sums[i], codes[i, first:last]
        has_open = _round(row, change, 1.0, limits, f, code, open_)
        if small >= 0:
            if _count_small(change, small):
                has_open = True
                for j in range(m):
                    if abs(change[j]) <= small:
                        open_[j] |= change[j] != 0
                        zeros += not open_[j]
            changed += _count_different(row, code)
            _to_errors(f, code)
        if has_open:
            for j in range(m):
                if open_[j]:
                    places[0, opened] = i * m + j
                    opened += 1
                    changed -= code[j] != row[j]
                    f[j] = 0
        if small >= 0:
            largest, total = _largest_and_sum(f)
            errors[1] = max(errors[1], np.float64(largest))
            errors[2] += np.float64(total)
        if len(guess) and _round(code, change, -1.0, limits, f, guess[i, first:last], unsure):
            for j in range(m):
                if unsure[j] and not open_[j]:
                    places[1, guessed] = i * m + j
                    guessed += 1
    return opened, guessed, changed, zeros


@compiled()
def _round(row: Array, change: F64, sign: float, limits: Array, f: F32, code: Array, open_: Array) -> bool:
    """Fill `f` with ``W + sign U`` in float32, W given by its bits `row`, and `code` with the bits of f rounded half up
    to 16. Open, in `open_`, is where the lower 16 bits are at most one from a half, or all bits but the sign are not
    among the ``limits[1]`` from ``limits[0]`` on. Returns whether any is."""
    least, count = limits[0], limits[1]
    for j in range(len(f)):
        f[j] = np.float64(np.uint32(np.uint32(row[j]) << np.uint32(16)).view(np.float32)) + sign * change[j]
    any_open = np.uint8(0)
    for j in range(len(f)):
        word = np.uint32(np.float32(f[j]).view(np.uint32) + np.uint32(0x8001))
        high = np.uint16(word >> np.uint32(16))
        is_open = (np.uint16(word) <= np.uint16(2)) | (np.uint16((high & _SIZE) - least) >= count)
        code[j] = high
        open_[j] = is_open
        any_open |= np.uint8(is_open)
    return bool(any_open != 0)


@compiled()
def _count_small(change: F64, small: float) -> Any:
    count = np.int64(0)
    for j in range(len(change)):
        count += np.int64(abs(change[j]) <= small)
    return count


@compiled()
def _count_different(one: Array, other: Array) -> Any:
    count = np.int32(0)
    for j in range(len(one)):
        count += np.int32(one[j] != other[j])
    return count


@compiled()
def _to_errors(f: F32, code: Array) -> None:
    for j in range(len(f)):
        f[j] = abs(f[j] - np.uint32(np.uint32(code[j]) << np.uint32(16)).view(np.float32))


@compiled(reassociate=True)
def _largest_and_sum(errors: F32) -> tuple[np.float32, np.float32]:
    """Return the largest of some numbers that are not below 0, by their bits, and their sum."""
    largest, total = np.int32(0), np.float32(0)
    for j in range(len(errors)):
        size = np.float32(errors[j]).view(np.int32)
        if size > largest:
            largest = size
        total += errors[j]
    return np.int32(largest).view(np.float32), total


# --- undo codes -----------------------------------------------------------------------------------------------------


@compiled()
def compare(
    base: Array, predicted: Array, merged: Array, mask: int, steps: Array, strays: Array, scratch: Array
) -> tuple[int, int]:
    """Fill `steps`, uint16 (n,), with those from P to W where the exponent of P is below that of M, both bits under
    `mask`, and `strays`, uint32, with the places of the other P that are not W. All three are flat uint16 (n,). Returns
    how many there are of both; stops with one more than `strays` holds. `scratch`, uint16 (3, m), is for m places at a
    time."""
    chosen = stray = 0
    step, is_lower, is_stray = scratch[0], scratch[1], scratch[2]
    for start in range(0, len(base), len(step)):
        stop = start + len(step)
        own, guess, goal = base[start:stop], predicted[start:stop], merged[start:stop]
        any_stray = np.uint16(0)
        for j in range(len(own)):
            lower = (guess[j] & mask) < (goal[j] & mask)
            step[j] = _ordered(own[j]) - _ordered(guess[j])
            is_lower[j] = lower
            is_stray[j] = (own[j] != guess[j]) & (not lower)
            any_stray |= is_stray[j]
        for j in range(len(own)):  # one in ten: a branch would be guessed wrong too often
            steps[chosen] = step[j]
            chosen += is_lower[j]
        if any_stray:
            for j in range(len(own)):
                if is_stray[j]:
                    if stray == len(strays):
                        return chosen, stray + 1
                    strays[stray] = start + j
                    stray += 1
    return chosen, stray


@compiled()
def count_lower(predicted: Array, merged: Array, mask: int) -> np.int64:
    """Return at how many places the exponent of P is below that of M."""
    count = np.int64(0)
    for j in range(len(predicted)):
        count += (predicted[j] & mask) < (merged[j] & mask)
    return count


@compiled()
def restore(predicted: Array, merged: Array, mask: int, steps: Array, scratch: Array) -> None:
    """Change P to W where its exponent is below that of M, by the `steps`, uint16, one more than there are of these.
    `scratch`, uint16 (2, m), is for m places at a time."""
    taken = 0
    step, is_lower = scratch[0], scratch[1]
    for start in range(0, len(predicted), len(step)):
        guess, goal = predicted[start : start + len(step)], merged[start : start + len(step)]
        for j in range(len(guess)):
            is_lower[j] = (guess[j] & mask) < (goal[j] & mask)
        for j in range(len(guess)):
            step[j] = steps[taken] * is_lower[j]
            taken += is_lower[j]
        for j in range(len(guess)):
            order = np.uint16(_ordered(guess[j]) + step[j])
            guess[j] = order ^ (_TOP if order & _TOP else ~np.uint16(0))


@compiled()
def _ordered(code: Any) -> np.uint16:
    """Return the bits as an integer in the order of the numbers."""
    return np.uint16(code ^ (~np.uint16(0) if code & _TOP else _TOP))
