"""Decoding and rounding of bf16 and fp16: every bit pattern, every boundary, and the double-rounding trap."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrconvert.core import dtypes
from lrconvert.core.dtypes import Stored, decode, round_to
from lrconvert.core.errors import DtypeError
from lrconvert.merge.arithmetic.rational import round_fraction

HALVES = ("BF16", "F16")


def all_codes(dtype: str) -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16).view(dtypes.STORAGE[dtype])


def code(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_survives_decode_and_round(dtype: str) -> None:
    codes = all_codes(dtype)
    values = decode(codes, dtype)
    back = round_to(values, dtype)
    number = ~np.isnan(values)
    assert np.array_equal(code(back)[number], code(codes)[number])
    assert np.isnan(decode(back, dtype)[~number]).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_decode_equals_torch(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtypes.TORCH_NAMES[dtype])
    bits = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16))
    theirs = bits.view(kind).float().numpy()
    np.testing.assert_array_equal(decode(all_codes(dtype), dtype), theirs)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sign", (1.0, -1.0))
def test_all_midpoints(dtype: str, sign: float) -> None:
    """A midpoint goes to the even neighbour; 2^-40 of it to either side (which float32 does not see) goes that way."""
    codes = np.arange(1, (0x7F80 if dtype == "BF16" else 0x7C00) - 1, dtype=np.uint16)
    low = decode(codes.view(dtypes.STORAGE[dtype]), dtype).astype(np.float64)
    high = decode((codes + 1).view(dtypes.STORAGE[dtype]), dtype).astype(np.float64)
    middle = sign * (low + high) / 2
    flag = np.uint16(0x8000 if sign < 0 else 0)
    even = np.where(codes % 2 == 0, codes, codes + 1)
    assert np.array_equal(code(round_to(middle, dtype)), even | flag)
    assert np.array_equal(code(round_to(middle * (1 + 2.0**-40), dtype)), (codes + 1) | flag)
    assert np.array_equal(code(round_to(middle * (1 - 2.0**-40), dtype)), codes | flag)


def test_the_trap_catches_double_rounding() -> None:
    """The values above do tell one rounding from two: through float32 some go the wrong way."""
    tie_and_a_bit = 1 + 2.0**-8 + 2.0**-40
    assert decode(round_to([tie_and_a_bit], "BF16"), "BF16")[0] == 1 + 2.0**-7
    assert decode(round_to(np.float32([tie_and_a_bit]), "BF16"), "BF16")[0] == 1.0


@pytest.mark.parametrize("dtype", ("F64", "F32", "F16", "BF16"))
@given(x=st.floats(allow_nan=False, allow_infinity=False))
def test_rounding_equals_rational_arithmetic(dtype: str, x: float) -> None:
    rounded = int(code(round_to(np.array([x]), dtype))[0])
    expected = round_fraction(Fraction(x), dtype)
    if x == 0 or (Fraction(x) != 0 and expected == 0):
        return  # zeros: the sign of x is kept, which a fraction does not have
    assert rounded == expected


@pytest.mark.parametrize("dtype", ("F32", "F16", "BF16"))
@given(x=st.floats(allow_nan=False, width=32))
def test_float32_input_rounds_like_float64(dtype: str, x: float) -> None:
    assert np.array_equal(code(round_to(np.float32([x]), dtype)), code(round_to(np.float64([x]), dtype)))


def test_fp16_equals_numpy() -> None:
    """Every float32 whose last 13 bits, which fp16 does not have, are zero, a half, or next to that or to zero."""
    high = np.arange(1 << 19, dtype=np.uint32) << 13
    for low in (0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF):
        values = (high | np.uint32(low)).view(np.float32)
        with np.errstate(over="ignore", under="ignore"):
            theirs = values.astype("<f2")
        ours, number = round_to(values, "F16"), ~np.isnan(values)
        assert np.array_equal(code(ours)[number], code(theirs)[number])
        assert np.isnan(ours[~number]).all() and np.isnan(theirs[~number]).all()


def test_layouts_and_lengths_do_not_matter() -> None:
    """More numbers than are rounded at a time, in reverse, with gaps, in columns."""
    x = np.random.default_rng(0).standard_normal((300, 500)) * 2.0 ** np.arange(-300, 200).clip(-30, 20)
    for dtype in HALVES:
        whole = round_to(x, dtype)
        for view in (np.s_[::-1], np.s_[:, ::3], np.s_[7:7], np.s_[3, 4:5]):
            assert np.array_equal(code(round_to(x[view], dtype)), code(whole[view]))
        assert np.array_equal(code(round_to(x.T, dtype)), code(whole.T))


@pytest.mark.parametrize("dtype", ("F32", "F16", "BF16"))
def test_signs_overflow_and_nan(dtype: str) -> None:
    x = np.array([0.0, -0.0, 1e300, -1e300, np.inf, -np.inf, 1e-300, -1e-300])
    values = decode(round_to(x, dtype), dtype)
    np.testing.assert_array_equal(values, [0, 0, np.inf, -np.inf, np.inf, -np.inf, 0, 0])
    assert np.signbit(values).tolist() == [False, True, False, True, False, True, False, True]
    assert np.isnan(decode(round_to(np.array([np.nan, -np.nan]), dtype), dtype)).all()


def test_shapes_are_kept() -> None:
    for shape in ((), (0,), (2, 3), (2, 1, 4)):
        for dtype in dtypes.FLOATS:
            assert round_to(np.ones(shape), dtype).shape == shape
            assert decode(round_to(np.ones(shape), dtype), dtype).shape == shape


def test_integers_are_refused() -> None:
    with pytest.raises(DtypeError, match="I32 does not hold real numbers"):
        decode(np.zeros(2, np.int32), "I32")
    with pytest.raises(DtypeError, match="I8"):
        round_to([1.0], "I8")
    with pytest.raises(DtypeError, match="'F7'"):
        dtypes.itemsize("F7")


def test_stored_equality_is_by_bits() -> None:
    nan = Stored("F32", np.array([np.nan], "<f4"))
    assert nan == Stored("F32", np.array([np.nan], "<f4"))
    assert Stored("F32", np.array([0.0], "<f4")) != Stored("F32", np.array([-0.0], "<f4"))
    assert Stored("F16", np.zeros(1, "<f2")) != Stored("BF16", np.zeros(1, "<u2"))
    assert nan.nbytes == 4 and nan.shape == (1,)
