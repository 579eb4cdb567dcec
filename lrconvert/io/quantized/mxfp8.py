"""MXFP8: weights of eight bits with a power of two for 32 elements of a row, stored as `fp8` is."""

from __future__ import annotations

from lrconvert.io.quantized.fp8 import described as described
