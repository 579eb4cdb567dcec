"""The options of VB-LoRA, their checks, and the form without a size to meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lrconvert.core.errors import OptionError
from lrconvert.core.limits import MAX_DIM, MAX_RANK, MAX_VECTORS
from lrconvert.core.options import option
from lrconvert.core.wording import spelled
from lrconvert.lora.adapter import LoraAdapter, Target
from lrconvert.methods.shared.options import check_range
from lrconvert.methods.vblora.form import MAX_PASSES, MAX_TOP_K, MAX_WEIGHT_BITS, Form

_WEIGHT_BITS = 3  # 2 lose some percent of what is captured, 4 gain none per byte
FITTED_BITS = (16, 8, 4)


@dataclass(frozen=True)
class VBLoraOptions:
    """The options of `lora-to-vblora`."""

    rank: int | None = option(None, "Components of every target (at most what it has).")
    vector_length: int | None = option(None, "Numbers per bank vector, b.")
    num_vectors: int | None = option(None, "Vectors in the bank, h.")
    top_k: int | None = option(None, "Bank vectors mixed in one sub-vector, k.")
    bits: int | None = option(None, "Bits per number of the bank: 16, 8 or 4.")
    weight_bits: int | None = option(None, "Bits per mixing weight, 1 to 8; only for k > 1.")
    gain: str = option(
        "auto", "A gain per coded row: on, off, or auto (on unless PEFT-compatible).", choices=("auto", "on", "off")
    )
    passes: int | None = option(None, "How often a row is coded at most; needs gains.")
    peft_compatible: bool = option(
        False, "Keep to what PEFT's VBLoRA can express: one rank, no gains, no cut sub-vectors."
    )

    @property
    def scaled(self) -> bool:
        """True if rows have gains."""
        return self.gain == "on" or (self.gain == "auto" and not self.peft_compatible)

    def form(self, vector_length: int, num_vectors: int, top_k: int, bits: int) -> Form:
        """Return the form of this shape; the rest is as asked for, or as measured to be best."""
        weight_bits = 0 if top_k == 1 else self.weight_bits or _WEIGHT_BITS
        return Form(vector_length, num_vectors, top_k, bits, weight_bits, self.scaled)


def check_options(lora: LoraAdapter, options: VBLoraOptions) -> None:
    """Raise E-OPTION on options that are out of range or contradict each other."""
    check_range(options, "rank", 1, MAX_RANK)
    check_range(options, "vector_length", 1, MAX_DIM)
    check_range(options, "num_vectors", 1, MAX_VECTORS)
    check_range(options, "top_k", 1, MAX_TOP_K)
    check_range(options, "weight_bits", 1, MAX_WEIGHT_BITS)
    check_range(options, "passes", 1, MAX_PASSES)
    if options.bits not in (None, *FITTED_BITS):
        raise OptionError(f"{spelled('bits')} is {options.bits}; the bank takes 16, 8 or 4")
    if options.gain not in ("auto", "on", "off"):
        raise OptionError(f"{spelled('gain')} is {options.gain!r}; auto, on and off are allowed")
    if options.top_k is not None and options.num_vectors is not None and options.top_k > options.num_vectors:
        raise OptionError(
            f"{spelled('top_k', options.top_k)} needs at least as many vectors; "
            f"{spelled('num_vectors')} is {options.num_vectors}"
        )
    if options.weight_bits is not None and options.top_k == 1:
        raise OptionError(f"{spelled('weight_bits')} has no meaning with {spelled('top_k', 1)}")
    if not options.scaled and (options.passes or 1) > 1:
        raise OptionError(
            f"{spelled('passes')} above 1 need gains",
            fix=f"leave out {spelled('gain', 'off')} and {spelled('peft_compatible', True)}, or {spelled('passes')}",
        )
    if options.peft_compatible and options.gain == "on":
        raise OptionError(f"{spelled('peft_compatible', True)} and {spelled('gain', 'on')} contradict each other")
    if options.peft_compatible:
        b, common = options.vector_length, common_divisor(lora.shapes())
        if common % (b or common):
            what = f"{spelled('peft_compatible', True)}: {b} does not divide every dimension"
            raise OptionError(what, fix=f"choose a divisor of {common}")
        if common == 1:
            raise OptionError(f"{spelled('peft_compatible', True)}: no vector length divides every dimension")


def common_divisor(targets: Sequence[Target]) -> int:
    """Return the largest vector length that cuts no sub-vector."""
    return math.gcd(*(n for t in targets for n in t.matrix_shape))


def default_form(targets: Sequence[Target], limits: Sequence[int], options: VBLoraOptions) -> Form:
    """Return the form without a size to meet: 8 numbers per vector (a divisor in PEFT-compatible mode), k = 1, and a
    small bank beside the codes; from 64 numbers per vector on the published k = 2 and up to 2048 vectors."""
    b = options.vector_length
    if b is None:
        common = common_divisor(targets)
        b = next((n for n in (8, 4, 2, 16, 3, 5, 6, 7) if common % n == 0), 8)
        if options.peft_compatible and common % b:
            b = common
    k = options.top_k or (2 if b >= 64 and (options.num_vectors or 2) > 1 else 1)
    h = options.num_vectors
    if h is None:
        codes = sum(rank * -(-n // b) for t, rank in zip(targets, limits, strict=True) for n in t.matrix_shape)
        h = 1 << max(4, min(11 if b >= 64 else 8, int(np.log2(max(codes / (2 * b), 1)))))
        h = max(h, 1 << (k - 1).bit_length())
    return options.form(b, h, k, options.bits or 16)
