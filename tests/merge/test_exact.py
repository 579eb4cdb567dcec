"""Correct rounding of ``W + sum of scale * left @ right``, against rational arithmetic, element by element."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lrconvert.core.dtypes import F64, FLOATS, STORAGE, Array, decode, round_to
from lrconvert.core.errors import DtypeError, LimitError, MergeOverflowError, ShapeError, ValueRangeError
from lrconvert.merge.arithmetic import exact, rational
from lrconvert.merge.arithmetic.exact import Term, Update
from lrconvert.merge.arithmetic.rational import round_fraction
from lrconvert.merge.arithmetic.rounding import bits
from lrconvert.merge.arithmetic.stats import MergeStats
from lrconvert.merge.arithmetic.workspace import Product, Workspace, multiply


def slow(stored: Array, dtype: str, terms: Sequence[Term]) -> Array:
    """The definition, one element at a time: W keeps its bits where the exact result equals it."""
    out = stored.copy()
    values = decode(stored, dtype).astype(np.float64)
    for row in range(stored.shape[0]):
        for col in range(stored.shape[1]):
            change = Fraction(0)
            for t in terms:
                for a, b in zip(t.left[row].tolist(), t.right[:, col].tolist(), strict=True):
                    change += Fraction(t.scale) * Fraction(a) * Fraction(b)
            if change:
                result = Fraction(float(values[row, col])) + change
                bits(out)[row, col] = round_fraction(result, dtype)
    return out


def check(stored: Array, dtype: str, terms: Sequence[Term]) -> MergeStats:
    expected = slow(stored, dtype, terms)
    out, stats = Update(terms).add(stored, dtype)
    assert np.array_equal(bits(out), bits(expected))
    assert stats.elements == stored.size
    assert stats.changed == np.count_nonzero(bits(out) != bits(stored))
    return stats


def weights(rng: np.random.Generator, shape: tuple[int, int], dtype: str, spread: int = 0) -> Array:
    """Gaussian weights of size 0.02, over `spread` more decades downwards."""
    sizes = 10.0 ** -rng.integers(0, spread + 1, shape)
    return round_to(rng.standard_normal(shape) * 0.02 * sizes, dtype)


def factors(rng: np.random.Generator, rows: int, rank: int, cols: int, size: float) -> tuple[Array, Array]:
    left = rng.standard_normal((rows, rank)).astype(np.float32) * np.float32(size)
    return left, rng.standard_normal((rank, cols)).astype(np.float32)


# --- against the definition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", (2.0, 16 / 8**0.5, -0.3))
def test_random_update(dtype: str, scale: float) -> None:
    rng = np.random.default_rng(1)
    stats = check(weights(rng, (23, 31), dtype, 6), dtype, [Term(scale, *factors(rng, 23, 4, 31, 0.003))])
    assert stats.changed > 300 and stats.rational == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_several_terms_of_other_ranks_are_one_sum(dtype: str) -> None:
    rng = np.random.default_rng(2)
    terms = [Term(s, *factors(rng, 17, r, 19, 0.01)) for s, r in ((0.5, 1), (16 / 3, 7), (1e-3, 3))]
    check(weights(rng, (17, 19), dtype), dtype, terms)


@pytest.mark.parametrize("dtype", FLOATS)
def test_terms_that_cancel_leave_every_bit(dtype: str) -> None:
    rng = np.random.default_rng(3)
    left, right = factors(rng, 15, 3, 20, 0.1)
    stored = weights(rng, (15, 20), dtype)
    stats = check(stored, dtype, [Term(0.7, left, right), Term(-0.7, left, right)])
    assert (stats.changed, stats.unmoved, stats.max_error) == (0, 0, 0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_float64_factors(dtype: str) -> None:
    """Their products need two float64 each."""
    rng = np.random.default_rng(4)
    left, right = rng.standard_normal((12, 5)) * 0.01, rng.standard_normal((5, 14))
    check(weights(rng, (12, 14), dtype, 3), dtype, [Term(1 / 3, left, right)])


@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_that_the_update_cancels(dtype: str) -> None:
    """Results far smaller than what they are the difference of."""
    rng = np.random.default_rng(5)
    left, right = factors(rng, 13, 4, 17, 1.0)
    product = left.astype(np.float64) @ right.astype(np.float64)
    check(round_to(-product, dtype), dtype, [Term(1.0, left, right)])


@pytest.mark.parametrize("dtype", ("F32", "F16", "BF16"))  # factors that small are refused for F64
@pytest.mark.parametrize("beyond", (0.0, 2.0**-40, -(2.0**-40)))
def test_subnormal_results(dtype: str, beyond: float) -> None:
    """Multiples of a quarter of the smallest value, half of them ties or 2^-40 of it beyond one."""
    rng = np.random.default_rng(6)
    smallest = {"F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}[dtype]
    codes = rng.integers(0, 9, (9, 11)).astype(f"u{STORAGE[dtype].itemsize}")
    left = rng.integers(-5, 6, (9, 2)) * 2.0**-20
    right = rng.integers(-5, 6, (2, 11)) * (2.0**20 * smallest / 4 * (1 + beyond))
    stats = check(codes.view(STORAGE[dtype]), dtype, [Term(1.0, left, right)])
    assert stats.max_error == pytest.approx(smallest / 2, rel=1e-6)


@pytest.mark.parametrize("dtype", ("F32", "F16", "BF16"))
def test_just_beyond_a_tie(dtype: str) -> None:
    """W + half a unit, exactly, and 2^-40 of it more or less: float32 on the way would lose the difference."""
    unit = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}[dtype]
    stored = round_to(1 + unit * np.arange(6)[None, :] * np.ones((3, 1)), dtype)
    left = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0]], np.float32)
    right = np.array([[unit / 2] * 6, [unit * 2.0**-41] * 6], np.float32)
    check(stored, dtype, [Term(1.0, left, right)])
    out, _ = Update([Term(1.0, left, right)]).add(stored, dtype)
    steps = np.round((decode(out, dtype).astype(np.float64) - 1) / unit)
    assert steps.tolist() == [[0, 2, 2, 4, 4, 6], [1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5]]


def exact_values(dtype: str) -> st.SearchStrategy[int]:
    """Bit patterns of finite values, structured ones often."""
    mantissa, _, infinity = rational.FORMATS[dtype]
    magnitude = st.one_of(
        st.integers(0, infinity - 1),
        st.sampled_from([0, 1, 2, 1 << mantissa, (1 << mantissa) - 1, (1 << mantissa) + 1]),
    )
    sign = 1 << (8 * STORAGE[dtype].itemsize - 1)
    return st.builds(lambda m, s: m | (sign if s else 0), magnitude, st.booleans())


def numbers(width: int) -> st.SearchStrategy[float]:
    limit = 2.0**40
    free = st.floats(-limit, limit, allow_nan=False, allow_subnormal=True, width=width)  # type: ignore[arg-type]
    structured = st.builds(lambda m, e: m * 2.0**e, st.integers(-7, 7), st.integers(-30, 10))
    return st.one_of(free, structured).filter(lambda x: x == 0 or abs(x) > 2.0**-300)


@st.composite
def problems(draw: st.DrawFn, dtype: str) -> tuple[Array, list[Term]]:
    """(stored weights, terms) of a few elements, hostile ones often."""
    rows, cols = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kind = STORAGE[dtype]
    codes = draw(hnp.arrays(f"<u{kind.itemsize}", (rows, cols), elements=exact_values(dtype)))
    terms = []
    for _ in range(draw(st.integers(1, 3))):
        rank, width = draw(st.integers(1, 3)), draw(st.sampled_from([32, 64]))
        shapes = ((rows, rank), (rank, cols))
        left, right = (draw(hnp.arrays(f"f{width // 8}", s, elements=numbers(width))) for s in shapes)
        scale = draw(st.one_of(st.sampled_from([0.0, 1.0, -2.0, 0.5, 16 / 8**0.5]), st.floats(-8, 8, width=32)))
        terms.append(Term(0.0 if 0 < abs(scale) < 2.0**-100 else scale, left, right))
        if draw(st.booleans()):
            terms.append(Term(-terms[-1].scale, left, right))
    return codes.view(kind), terms


@pytest.mark.parametrize("dtype", FLOATS)
@given(data=st.data())
@settings(max_examples=50, deadline=None)
@pytest.mark.medium
def test_anything(dtype: str, data: st.DataObject) -> None:
    stored, terms = data.draw(problems(dtype))
    infinity = rational.FORMATS[dtype][2]
    expected = slow(stored, dtype, terms)
    if ((bits(expected) & (rational.sign_bit(dtype) - 1)) >= infinity).any():
        with pytest.raises(MergeOverflowError):
            Update(terms).add(stored, dtype)
    else:
        check(stored, dtype, terms)


# --- zeros, infinities, overflow ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_signs(dtype: str) -> None:
    """No change keeps -0; full cancellation gives +0; what underflows keeps its sign."""
    stored = round_to(np.array([[-0.0, 0.0, 1.0, -1.0]] * 2), dtype)
    tiny = 2.0**-390
    left = np.array([[0.0, 1.0], [1.0, 0.0]])
    right = np.array([[tiny, -tiny, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    out, stats = Update([Term(2.0**-90 if dtype != "F64" else 1.0, left, right)]).add(stored, dtype)
    assert np.array_equal(bits(out)[0], bits(stored)[0])
    if dtype != "F64":
        values = decode(out, dtype)[1]
        assert values[:2].tolist() == [0, 0] and np.signbit(values[:2]).tolist() == [False, True]
        assert stats.changed == 2 and stats.unmoved == 2  # the signs of the zeros; 1 and -1 stay
    out, _ = Update([Term(1.0, left, right)]).add(stored, dtype)
    assert decode(out, dtype)[1, 2:].tolist() == [0, 0] and not np.signbit(decode(out, dtype)[1, 2:]).any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_stays_or_is_refused(dtype: str) -> None:
    stored = round_to(np.array([[np.inf, np.nan, 1.0], [-np.inf, 1.0, 1.0]]), dtype)
    right = np.array([[0.0, 0.0, 1.0]], np.float32)
    out, stats = Update([Term(1.0, np.ones((2, 1), np.float32), right)]).add(stored, dtype)
    assert np.array_equal(bits(out)[:, 0], bits(stored)[:, 0]) and bits(out)[0, 1] == bits(stored)[0, 1]
    assert stats.changed == 2 and np.isfinite(stats.sum_error)
    hidden = Term(1.0, np.ones((2, 2), np.float32), np.array([[1, 1, 1], [-1, -1, 1]], np.float32))
    out, _ = Update([hidden]).add(stored, dtype)  # zero there, but not by its factors
    assert np.array_equal(bits(out)[:, 0], bits(stored)[:, 0])
    with pytest.raises(ValueRangeError, match=r"element \[1, 0\] is -inf"):
        Update([Term(1.0, np.array([[0], [1]], np.float32), np.ones((1, 3), np.float32))]).add(stored, dtype)


@pytest.mark.parametrize("dtype", ("F32", "F16", "BF16"))  # no update can reach half a unit of the largest float64
def test_overflow(dtype: str) -> None:
    """The largest value may be rounded to, half a unit above it is too much."""
    mantissa, _, infinity = rational.FORMATS[dtype]
    largest = np.array([[infinity - 1]], f"<u{STORAGE[dtype].itemsize}").view(STORAGE[dtype])
    value = float(decode(largest, dtype)[0, 0])
    half_unit = value / (2 ** (mantissa + 1) - 1) / 2
    root = 2.0 ** (np.frexp(half_unit)[1] // 2)
    left, right = np.array([[root]]), np.array([[half_unit / root]])
    for sign in (1.0, -1.0):
        w = round_to(np.array([[sign * value]]), dtype)
        below = Term(sign * (1 - 2.0**-40), left, right)
        out, stats = Update([below]).add(w, dtype)
        assert np.array_equal(bits(out), bits(w)) and stats.unmoved == 1
        with pytest.raises(MergeOverflowError, match=rf"E-OVERFLOW: element \[5, 0\].*{dtype}"):
            wide = np.repeat(left, 6, axis=0) * np.array([[0, 0, 0, 0, 0, 1]]).T
            Update([Term(sign, wide, right)]).add(np.repeat(w, 6, axis=0), dtype)


# --- structure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_dead_rows_and_columns_are_copied(dtype: str) -> None:
    """Zero rows and columns of the factors: skipped, whatever W holds there."""
    rng = np.random.default_rng(7)
    left, right = factors(rng, 40, 3, 50, 0.01)
    left[rng.random(40) < 0.5] = 0
    right[:, rng.random(50) < 0.5] = 0
    stored = weights(rng, (40, 50), dtype)
    stored[:, 3] = round_to(np.full(40, -0.0), dtype)
    check(stored, dtype, [Term(1.5, left, right)])


@pytest.mark.medium
@pytest.mark.parametrize("dtype", FLOATS)
def test_blocks_and_threads_change_nothing(dtype: str) -> None:
    rng = np.random.default_rng(8)
    rows, cols = 700, 4500  # more than one block each way
    terms = [Term(2.0, *factors(rng, rows, 5, cols, 0.003)), Term(0.1, *factors(rng, rows, 2, cols, 0.003))]
    stored = weights(rng, (rows, cols), dtype, 1)
    whole, stats = Update(terms).add(stored, dtype)
    with Workspace(threads=3) as workspace:
        update = Update(terms)
        parts = [update.add(stored[r : r + 211], dtype, r, workspace) for r in range(0, rows, 211)]
    assert np.array_equal(bits(whole), np.concatenate([bits(out) for out, _ in parts]))
    total = sum((t for _, t in parts), MergeStats())
    assert (total.elements, total.changed, total.unmoved) == (stats.elements, stats.changed, stats.unmoved)
    assert total.max_error == stats.max_error and total.mean_error == pytest.approx(stats.mean_error)
    sample = rng.integers(0, [rows, cols], (200, 2))
    for row, col in sample:
        expected = Fraction(float(decode(stored, dtype)[row, col])) + Update(terms).exact(row, col)
        assert bits(whole)[row, col] == round_fraction(expected, dtype)


@pytest.mark.parametrize("threads", ("1", "2"))
def test_blas_threads_change_nothing(threads: str) -> None:
    program = """
import hashlib, numpy as np
from lrconvert.merge.arithmetic.exact import Term, Update
rng = np.random.default_rng(0)
left, right = rng.standard_normal((256, 48)).astype("f4"), rng.standard_normal((48, 512)).astype("f4")
w = rng.standard_normal((256, 512)).astype("f4")
print(hashlib.sha256(Update([Term(0.3, left, right)]).add(w, "F32")[0].tobytes()).hexdigest())
"""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((256, 48)).astype("f4"), rng.standard_normal((48, 512)).astype("f4")
    w = rng.standard_normal((256, 512)).astype("f4")
    here = hashlib.sha256(Update([Term(0.3, left, right)]).add(w, "F32")[0].tobytes()).hexdigest()
    assert done.stdout.strip() == here


# --- who multiplies -------------------------------------------------------------------------------------------------


def by_matmul(left: F64, right: F64, out: F64) -> None:
    out[:] = (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()


def from_the_back(left: F64, right: F64, out: F64) -> None:
    """The same products, added up in the opposite order and one by one."""
    out[:] = 0
    for j in reversed(range(left.shape[1])):
        out += left[:, j : j + 1] * right[j]


def in_pairs(left: F64, right: F64, out: F64) -> None:
    """The same products, added up in halves."""
    parts = [left[:, j : j + 1] * right[j] for j in range(left.shape[1])]
    while len(parts) > 1:
        parts = [sum(parts[n + 1 : n + 2], parts[n]) for n in range(0, len(parts), 2)]
    out[:] = parts[0]


def at_its_worst(left: F64, right: F64, out: F64) -> None:
    """Off by nearly all that the bound allows, upwards in one element and downwards in the next."""
    exactly = left.astype(np.longdouble) @ right.astype(np.longdouble)
    room = (left.shape[1] - 1) * 2.0**-53 * (np.abs(left) @ np.abs(right))
    signs = np.where(np.indices(exactly.shape).sum(axis=0) % 2, 1, -1)
    out[:] = (exactly + signs * room).astype(np.float64)


MULTIPLIERS = (by_matmul, from_the_back, in_pairs, at_its_worst)


def add_by(multiplier: Product, stored: Array, dtype: str, terms: Sequence[Term]) -> Array:
    with Workspace(1, multiplier) as workspace:
        return bits(Update(terms).add(stored, dtype, workspace=workspace)[0])


@pytest.mark.parametrize("multiplier", MULTIPLIERS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_who_multiplies_changes_nothing(dtype: str, multiplier: Product) -> None:
    rng = np.random.default_rng(12)
    terms = [Term(0.7, *factors(rng, 300, 48, 500, 0.003))]
    stored = weights(rng, (300, 500), dtype, 2)
    assert np.array_equal(add_by(multiplier, stored, dtype, terms), add_by(multiply, stored, dtype, terms))


@pytest.mark.medium
@pytest.mark.parametrize("multiplier", MULTIPLIERS)
@pytest.mark.parametrize("dtype", ("BF16", "F16", "F32"))
@pytest.mark.parametrize("beyond", (0.0, 2.0**-40, -(2.0**-40)))
def test_ties_are_the_same_whoever_multiplies(dtype: str, multiplier: Product, beyond: float) -> None:
    """Half of all results exactly between two values, or 2^-40 of a unit beside; and terms that cancel at the end."""
    unit = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}[dtype]
    rng = np.random.default_rng(13)
    left = rng.integers(-3, 4, (40, 6)).astype(np.float64)
    right = rng.integers(-3, 4, (6, 50)) * (unit / 2 * (1 + beyond))
    terms = [Term(1.0, left, right), Term(3.0, left, right), Term(-3.0, left, right)]
    stored = round_to(1 + unit * rng.integers(0, 60, (40, 50)), dtype)
    assert np.array_equal(add_by(multiplier, stored, dtype, terms), bits(slow(stored, dtype, terms)))


def test_a_product_that_breaks_its_promise_is_seen() -> None:
    """Off by a hundred times the bound: these tests would tell."""

    def careless(left: F64, right: F64, out: F64) -> None:
        room = 100 * (left.shape[1] + 2) * 2.0**-53 * (np.abs(left) @ np.abs(right)).max()
        out[:] = left @ right + room

    stored = round_to(np.full((40, 50), -1.0), "BF16")  # the update cancels it, but for a little less than a tie
    terms = [Term(1.0, np.ones((40, 1)), np.full((1, 50), 1 + 2.0**-25 * (1 + 2.0**-8 - 2.0**-21)))]
    assert not np.array_equal(add_by(careless, stored, "BF16", terms), add_by(multiply, stored, "BF16", terms))


@pytest.mark.parametrize("dtype", FLOATS)
@given(data=st.data())
@settings(max_examples=50, deadline=None)
@pytest.mark.medium
def test_anything_is_the_same_whoever_multiplies(dtype: str, data: st.DataObject) -> None:
    stored, terms = data.draw(problems(dtype))
    try:
        expected = add_by(multiply, stored, dtype, terms)
    except MergeOverflowError as refused:
        with pytest.raises(MergeOverflowError, match=re.escape(refused.what)):
            add_by(from_the_back, stored, dtype, terms)
    else:
        assert np.array_equal(add_by(from_the_back, stored, dtype, terms), expected)


def test_products_keep_their_bound() -> None:
    """Every element, against rational numbers, by the bound of its own terms: all sizes, sums that cancel."""
    rng = np.random.default_rng(14)
    left = rng.standard_normal((9, 33)) * 2.0 ** rng.integers(-300, 100, (9, 33))
    right = rng.standard_normal((33, 7)) * 2.0 ** rng.integers(-300, 100, (33, 7))
    left[:, 1::2], right[1::2] = left[:, :-1:2] * (1 + 2.0**-52), -right[:-1:2]
    out = np.empty((9, 7))
    multiply(left, right, out)
    for row, col in np.ndindex(out.shape):
        parts = [Fraction(a) * Fraction(b) for a, b in zip(left[row].tolist(), right[:, col].tolist(), strict=True)]
        room = Fraction(33) / 2**53 * sum(map(abs, parts)) * (1 + Fraction(1, 2**40))
        assert abs(Fraction(float(out[row, col])) - sum(parts)) <= room


@pytest.mark.parametrize("dtype", ("BF16", "F16", "F32"))
def test_a_million_ties(dtype: str) -> None:
    """Structured factors put half of all results exactly between two values; that must not reach slow code."""
    unit = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}[dtype]
    rng = np.random.default_rng(9)
    rows, cols = 1024, 2048
    stored = round_to(1 + unit * rng.integers(0, 60, (rows, cols)), dtype)
    left = rng.integers(-3, 4, (rows, 4)).astype(np.float32)
    right = rng.integers(-3, 4, (4, cols)).astype(np.float32) * np.float32(unit / 2)
    out, stats = Update([Term(1.0, left, right)]).add(stored, dtype)
    assert 900_000 < stats.recomputed < 1_200_000 and stats.rational == 0
    total = decode(stored, dtype).astype(np.float64) + left.astype(np.float64) @ right.astype(np.float64)
    assert np.array_equal(bits(out), bits(round_to(total, dtype)))  # the total is exact in float64 here


def test_rational_stage_decides_what_two_levels_lose() -> None:
    """A tie, and far below it three numbers of which two cancel: float64 pairs cannot say which side is left."""
    left = np.ones((1, 4), np.float32)
    right = np.array([[2.0**-8], [2.0**-80], [2.0**-149], [-(2.0**-80)]], np.float32)
    stored = round_to(np.array([[1.0]]), "BF16")
    stats = check(stored, "BF16", [Term(1.0, left, right)])
    assert stats.rational == 1
    out, _ = Update([Term(1.0, left, right)]).add(stored, "BF16")
    assert decode(out, "BF16")[0, 0] == 1 + 2.0**-7


def test_rational_stage_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "MAX_RATIONAL", 100)
    left = np.ones((20, 4), np.float32)
    right = np.array([[2.0**-8], [2.0**-80], [2.0**-149], [-(2.0**-80)]], np.float32).repeat(20, axis=1)
    with pytest.raises(LimitError, match="more than 100 elements"):
        Update([Term(1.0, left, right)]).add(round_to(np.ones((20, 20)), "BF16"), "BF16")


def test_tally_measures() -> None:
    """Errors and unmoved elements, where they can be counted by hand."""
    stored = round_to(np.array([[1.0, 1.0, 1.0, 0.0]]), "BF16")
    right = np.array([[2.0**-9, 2.0**-7, 3 * 2.0**-9, 0.0]], np.float32)
    out, stats = Update([Term(1.0, np.ones((1, 1), np.float32), right)]).add(stored, "BF16")
    assert decode(out, "BF16").tolist() == [[1.0, 1 + 2.0**-7, 1 + 2.0**-7, 0.0]]
    assert (stats.elements, stats.changed, stats.unmoved) == (4, 2, 1)
    assert stats.max_error == 2.0**-9 and stats.mean_error == 2 * 2.0**-9 / 4


# --- refusals -------------------------------------------------------------------------------------------------------


def test_shapes_must_fit() -> None:
    one = np.ones((2, 3), np.float32)
    with pytest.raises(ShapeError):
        Update([])
    with pytest.raises(ShapeError, match="do not give an update"):
        Update([Term(1.0, one, one)])
    with pytest.raises(ShapeError, match="do not give an update"):
        Update([Term(1.0, one, one.T), Term(1.0, one, np.ones((3, 5), np.float32))])
    update = Update([Term(1.0, one, one.T)])
    with pytest.raises(ShapeError, match="do not fit"):
        update.add(np.ones((2, 2), np.float32), "F32", first_row=1)
    with pytest.raises(DtypeError, match="I32"):
        update.add(np.ones((2, 2), np.int32), "I32")
    with pytest.raises(DtypeError, match="float32"):
        update.add(np.ones((2, 2), np.float32), "F16")


def test_numbers_must_be_usable() -> None:
    one = np.ones((1, 1))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueRangeError, match="scale is NaN or infinite"):
            Update([Term(bad, one, one)])
        with pytest.raises(ValueRangeError, match="factor is NaN or infinite"):
            Update([Term(1.0, one * bad, one)])
    with pytest.raises(ValueRangeError, match="beyond"):
        Update([Term(1e-40, one, one)])
    with pytest.raises(ValueRangeError, match="beyond"):
        Update([Term(1.0, one, one * 1e200)])


def test_zero_updates_are_seen_as_such() -> None:
    one = np.ones((2, 2), np.float32)
    assert Update([Term(0.0, one, one), Term(1.0, one * 0, one)]).is_zero
    stored = np.array([[1.0, -0.0], [np.nan, np.inf]], np.float32)
    out, stats = Update([Term(0.0, one, one)]).add(stored, "F32")
    assert np.array_equal(bits(out), bits(stored)) and stats == MergeStats(elements=4)
    empty = Update([Term(1.0, np.zeros((2, 0), np.float32), np.zeros((0, 2), np.float32))])
    assert empty.is_zero
