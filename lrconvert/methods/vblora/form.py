"""The configuration of a VB-LoRA file: the form, the allocation, and where each code lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import LimitError
from lrconvert.core.limits import MAX_DIM, MAX_RANK, MAX_VECTORS
from lrconvert.io.fields import between, one_of
from lrconvert.lora import packing
from lrconvert.lora.adapter import Target
from lrconvert.lora.packing import TensorSpec
from lrconvert.methods.shared.beside import beside_config
from lrconvert.methods.vblora.rows import I64, Rows

MAX_TOP_K = 16
MAX_PASSES = 16
MAX_WEIGHT_BITS = 8
EXACT = 32  # bits of numbers that came from elsewhere as float32
BANK_BITS = (EXACT, 16, 8, 4)


@dataclass(frozen=True)
class Header:
    """The JSON part of a config: its `Form`, and what the allocation is at most."""

    vector_length: Annotated[int, between(1, MAX_DIM)]
    num_vectors: Annotated[int, between(1, MAX_VECTORS)]
    top_k: Annotated[int, between(1, MAX_TOP_K)]
    bits: Annotated[int, one_of(BANK_BITS, LimitError)]
    weight_bits: Annotated[int, one_of((*range(MAX_WEIGHT_BITS + 1), EXACT), LimitError)]
    gains: bool
    padded: bool
    rank: Annotated[int, between(1, MAX_RANK)]
    uniform: bool
    passes: Annotated[int, between(1, MAX_PASSES)]
    rows: Annotated[int, between(2, 1 << 40)]

    @property
    def form(self) -> Form:
        return Form(*(getattr(self, field.name) for field in fields(Form)))

    def check(self) -> None:
        """Raise E-LIMIT on fields that contradict each other."""
        if self.top_k > self.num_vectors:
            raise LimitError(f"method.config.top_k is {self.top_k}, more than the {self.num_vectors} vectors")
        if (self.weight_bits == 0) != (self.top_k == 1):
            raise LimitError("method.config.weight_bits must be 0 for top_k 1, and at least 1 for more")
        if self.passes > 1 and not self.gains:
            raise LimitError("method.config.passes is more than 1 without gains")


@dataclass(frozen=True)
class Form:
    """Everything but the allocation: the bank is (num_vectors, vector_length) at `bits`; codes mix `top_k` vectors with
    weights of `weight_bits`; `gains`: rows are scaled."""

    vector_length: int
    num_vectors: int
    top_k: int = 1
    bits: int = 16
    weight_bits: int = 0
    gains: bool = True

    @property
    def denominator(self) -> int:
        """Weights are multiples of 1 / denominator."""
        return 2 << self.weight_bits

    @property
    def exact_weights(self) -> bool:
        """Weights are float32 and not multiples of a unit; the first vector of a code need not be the heaviest."""
        return self.weight_bits == EXACT

    @property
    def weight_unit(self) -> float:
        """Return the factor of a stored weight."""
        return 1.0 if self.exact_weights else 1.0 / self.denominator

    @property
    def code_bits(self) -> int:
        """Bits of one coded sub-vector."""
        return self.top_k * packing.index_bits(self.num_vectors) + (self.top_k - 1) * self.weight_bits

    @property
    def bank_bits(self) -> int:
        """Bits of the bank and its scales."""
        scales = 16 * self.num_vectors if self.bits < 16 else 0
        return self.num_vectors * self.vector_length * self.bits + scales

    def row_bits(self, length: Any) -> Any:
        """Return the bits of one pass over a row of `length` numbers."""
        return -(-length // self.vector_length) * self.code_bits + (16 if self.gains else 0)


@dataclass(frozen=True)
class Config:
    """`ranks`: components of each target. `passes`: of each row, empty if every row has one. `padded`: some row is not
    a multiple of the vector length, so that its last sub-vector is cut."""

    form: Form
    ranks: tuple[int, ...]
    passes: tuple[int, ...] = ()
    padded: bool = False

    @property
    def rows(self) -> int:
        return 2 * sum(self.ranks)


@beside_config
def starts(config: Config, targets: tuple[Target, ...]) -> tuple[tuple[int, int, int], ...]:
    """Return (row, pass, code) where each target begins; the last entry holds the totals. Grows with targets and
    `passes`."""
    b = config.form.vector_length
    row = turn = code = 0
    starts = []
    for target, rank in zip(targets, config.ranks, strict=True):
        starts.append((row, turn, code))
        out, inner = target.matrix_shape
        for length in (inner, out):
            turns = sum(config.passes[row : row + rank]) if config.passes else rank
            code += turns * -(-length // b)
            turn += turns
            row += rank
    return (*starts, (row, turn, code))


def complete(form: Form, targets: Sequence[Target], ranks: Sequence[int], passes: Sequence[int]) -> Config:
    """Return the one Config of an allocation."""
    b = form.vector_length
    padded = any(rank and any(n % b for n in t.matrix_shape) for t, rank in zip(targets, ranks, strict=True))
    return Config(form, tuple(ranks), tuple(passes) if max(passes, default=1) > 1 else (), padded)


def coded_rows(config: Config, targets: Sequence[Target]) -> Rows:
    """Return the rows of a fit, in file order."""
    shapes = np.array([t.matrix_shape for t in targets], np.int64).reshape(-1, 2)
    sizes = np.repeat(shapes[:, ::-1].reshape(-1), np.repeat(config.ranks, 2))
    passes = np.array(config.passes or [1] * len(sizes), np.int64)
    return Rows.of(sizes, passes, config.form.vector_length)


def specs(config: Config, targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
    """Return the payload tensors, in declaration order."""
    form = config.form
    _, passes, codes = starts(config, tuple(targets))[-1]
    shape = (form.num_vectors, form.vector_length)
    specs = [packing.single("bank", shape) if form.bits == EXACT else packing.half("bank", shape)]
    if form.bits < 16:
        specs = [packing.code("bank", shape, form.bits), packing.half("scales", (form.num_vectors,))]
    specs.append(packing.index("indices", (codes, form.top_k), form.num_vectors))
    if form.top_k > 1:
        small = (codes, form.top_k - 1)
        units = packing.index("weights", small, 1 << form.weight_bits)
        specs.append(packing.single("weights", small) if form.exact_weights else units)
    if form.gains:
        specs.append(packing.half("gains", (passes,)))
    return tuple(specs)


def canonical_codes(indices: I64, units: Array) -> tuple[I64, Array]:
    """Return codes (n, k) as the format spells them: heaviest first, lower index first among equals; a weight of zero
    has the lowest index that is free. `units` are the weights, or multiples of them."""
    order = np.lexsort((indices, -units), axis=1)
    indices, units = np.take_along_axis(indices, order, 1), np.take_along_axis(units, order, 1)
    used = np.where(units > 0, indices, -1)
    free = np.zeros(len(indices), np.int64)
    for s in range(1, indices.shape[1]):
        empty = units[:, s] == 0
        if not empty.any():
            continue
        for _ in range(indices.shape[1]):
            free += empty & (used == free[:, None]).any(1)
        indices[:, s] = np.where(empty, free, indices[:, s])
        free += empty
    return indices, units
