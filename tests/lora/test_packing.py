"""Bit-packing, 16-bit payload, scale search."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lrconvert.core import errors
from lrconvert.lora import packing


@given(st.integers(1, 20), st.data())
def test_bits_round_trip(bits, data):
    values = data.draw(hnp.arrays(np.uint32, st.integers(0, 70), elements=st.integers(0, 2**bits - 1)))
    packed = packing.pack_bits(values, bits)
    assert packed.size == (values.size * bits + 7) // 8
    assert np.array_equal(packing.unpack_bits(packed, bits, values.size), values)


@pytest.mark.parametrize("bits", [1, 3, 11])
def test_bits_across_chunks(bits, monkeypatch):
    monkeypatch.setattr(packing, "_CHUNK", 16)
    values = np.random.default_rng(0).integers(0, 2**bits, 333).astype(np.uint32)
    packed = packing.pack_bits(values, bits)
    assert np.array_equal(packing.unpack_bits(packed, bits, 333), values)
    reference = sum(int(v) << (bits * i) for i, v in enumerate(values)).to_bytes(packed.size, "little")
    assert packed.tobytes() == reference


def test_fill_bits_must_be_zero():
    packed = packing.pack_bits(np.array([1, 2, 3], np.uint32), 3)
    packed[-1] |= 0x80
    with pytest.raises(errors.CanonicalError):
        packing.unpack_bits(packed, 3, 3)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**90), max_value=2.0**90)


@given(hnp.arrays(np.float32, st.integers(1, 20), elements=finite))
def test_half_is_idempotent_and_finer_than_bf16(values):
    stored = packing.round_half(values)
    assert np.array_equal(packing.round_half(stored), stored)
    assert not np.any(np.signbit(stored) & (stored == 0))
    largest = np.max(np.abs(values.astype(np.float64)))
    error = np.abs(stored.astype(np.float64) - values)
    bound = np.maximum(np.abs(values) * 2.0**-11, largest * 2.0**-38)  # the second: values below fp16's normal range
    if largest > 2.0**-70:
        assert np.all(error <= bound)


@pytest.mark.parametrize("tiny", [2.0**-121, -(2.0**-140), 0.0])
def test_half_that_underflows_to_nothing_is_plain_zero(tiny):
    """The exponent is a function of what is stored, and nothing but zeros is."""
    spec = packing.half("h", (2,))
    stored, exponent = packing.encode_half(np.array([tiny, 0.0]))
    assert exponent == 0 and not stored.view(np.uint16).any()
    assert np.array_equal(packing.decode(spec, stored, exponent), np.zeros(2))


@given(hnp.arrays(np.float64, st.integers(1, 8), elements=st.floats(-(2.0**111), 2.0**111)))
def test_half_as_written_is_read(values):
    spec = packing.half("h", values.shape)
    stored, exponent = packing.encode_half(values)
    rounded = packing.decode(spec, stored, exponent)
    assert np.array_equal(rounded, packing.round_half(values))
    assert packing.encode(spec, rounded)[1] == exponent


def test_half_refuses_what_it_cannot_hold():
    for bad in (np.nan, np.inf):
        with pytest.raises(errors.ValueRangeError):
            packing.encode_half(np.array([1.0, bad]))


@pytest.mark.parametrize("bits", packing.CODE_BITS)
def test_quantizer_beats_plain_absmax(bits):
    """The searched scale is never worse than the scale that just covers the largest value."""
    rows = np.random.default_rng(bits).standard_normal((32, 96)).astype(np.float32) ** 3
    codes, scale = packing.quantize_rows(rows, bits)
    error = np.sum((rows - packing.code_values(codes, bits) * scale[:, None]) ** 2, axis=1)
    top = (1 << bits) - 1
    absmax = np.abs(rows).max(1) / top
    plain = np.clip(np.floor(rows / (2 * absmax[:, None]) + (1 << bits) / 2), 0, top)
    plain_error = np.sum((rows - packing.code_values(plain, bits) * absmax[:, None]) ** 2, axis=1)
    assert np.all(error <= plain_error * (1 + 1e-6))
    assert error.sum() < plain_error.sum() * (0.999 if bits < 8 else 1.0)


def test_one_bit_is_sign_times_mean_magnitude():
    rows = np.array([[1.0, -3.0, 2.0, -2.0]], np.float32)
    codes, scale = packing.quantize_rows(rows, 1)
    assert np.array_equal(packing.code_values(codes, 1), np.sign(rows))
    assert scale[0] == 2.0


@pytest.mark.parametrize("bits", packing.CODE_BITS)
def test_zero_rows_stay_zero(bits):
    codes, scale = packing.quantize_rows(np.zeros((2, 8), np.float32), bits)
    assert np.all(packing.code_values(codes, bits) * scale[:, None] == 0)


def test_encode_checks_shape_and_range():
    spec = packing.index("i", (3,), 5)
    with pytest.raises(errors.ShapeError):
        packing.encode(spec, np.zeros(2, np.uint32))
    with pytest.raises(errors.IndexRangeError):
        packing.encode(spec, np.array([0, 5, 1], np.uint32))
    with pytest.raises(errors.IndexRangeError):
        packing.encode(spec, np.array([0, -1, 1], np.int64))
    with pytest.raises(errors.ValueRangeError, match="round_half"):
        packing.encode(packing.half("h", (2,)), np.array([1.0, 1.0 + 2.0**-20]))
    with pytest.raises(errors.IndexRangeError):
        packing.decode(spec, packing.pack_bits(np.array([0, 7, 1]), 3), 0)


@pytest.mark.parametrize("bits", range(1, 9))
def test_odd_integers_are_the_code_values(bits):
    codes = np.arange(1 << bits).astype(np.uint8)
    integers = packing.odd_integers(codes, bits)
    assert np.array_equal(integers, packing.code_values(codes, bits)) and integers.itemsize == (2 if bits == 8 else 1)
