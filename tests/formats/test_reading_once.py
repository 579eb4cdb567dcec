"""Factors are looked at as bits, and decoded once."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ADAPTERS

from lrconvert import api
from lrconvert.core import dtypes
from lrconvert.core.dtypes import FLOATS, Stored, decode, round_to
from lrconvert.lora import svd

VALUES = [0.0, -0.0, 1.0, -2.5, 3e-5, -6e4, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("dtype", sorted(FLOATS))
@pytest.mark.parametrize("value", VALUES)
def test_bits_say_what_numbers_say(dtype, value):
    """Finite, and zero, are the same of stored bits as of the numbers that they stand for."""
    stored = Stored(dtype, round_to(np.array([0.0, -0.0, value], np.float32), dtype))
    values = decode(stored.array, dtype)
    assert stored.is_finite() == bool(np.isfinite(values).all())
    assert stored.is_zero() == (not values.any())
    assert Stored(dtype, stored.array[:0]).is_finite() and Stored(dtype, stored.array[:0]).is_zero()


def test_bits_are_looked_at_to_the_end(monkeypatch):
    """What is looked at in pieces is looked at whole."""
    monkeypatch.setattr(dtypes, "_CHUNK", 4)
    for dtype in sorted(FLOATS):
        for n in range(11):
            values = np.zeros((11, 1), np.float32)
            values[n] = 1.0
            assert not Stored(dtype, round_to(values, dtype)).is_zero()
            values[n] = np.nan
            assert not Stored(dtype, round_to(values, dtype)).is_finite()


def test_inspecting_decodes_every_factor_once(monkeypatch):
    """What an adapter is takes each of its numbers once from bits to floats."""
    lora = api.load_lora(ADAPTERS / "llama-plain")
    decoded: list[int] = []

    def counting(array, dtype):
        decoded.append(array.size)
        return decode(array, dtype)

    for module in (dtypes, svd):
        monkeypatch.setattr(module, "decode", counting)
    api.inspect(ADAPTERS / "llama-plain")
    assert sum(decoded) == lora.numel
