"""The configuration of a file of low rank, version 2: how many components each target has, and their models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.limits import MAX_RANK, OWN
from lrconvert.io.fields import between
from lrconvert.lora.adapter import Target
from lrconvert.lora.coded.stream import Rows
from lrconvert.methods.lowrank.coordinates import PLAIN, Coordinates
from lrconvert.methods.shared.beside import beside_config


@dataclass(frozen=True)
class Header:
    """The JSON part of a config. `length`: the bytes of the tensor ``codes``."""

    components: Annotated[int, between(1, OWN.tensors * MAX_RANK)]
    length: Annotated[int, between(0, OWN.file_bytes)]
    max_count: Annotated[int, between(1, MAX_RANK)]


@dataclass(frozen=True)
class Quantizer:
    """The rounding of a fit: the `step` D, of each target the components that are `kept`, numbered from the largest,
    and their coded integers as a file has them, int32; None where only their number of bits is known."""

    step: float
    kept: tuple[tuple[int, ...], ...]
    codes: Array | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Config:
    """`counts`: components of each target. `models`: those of the A row and the B column of every component, by target.
    `length`: bytes of their numbers. `quantizer`, what a plan has chosen for the fit, is no part of a file."""

    counts: tuple[int, ...]
    models: tuple[tuple[int, int], ...]
    length: int
    quantizer: Quantizer | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Starts:
    """The first number and the first component of every target, and the rows of the tensor ``codes``."""

    numbers: tuple[int, ...]
    components: tuple[int, ...]
    rows: Rows


@beside_config
def starts(config: Config, targets: tuple[Target, ...]) -> Starts:
    """Return where the targets begin in the tensors."""
    shapes = np.array([target.matrix_shape for target in targets], np.int64)
    counts = np.array(config.counts, np.int64)
    owners = np.repeat(np.arange(len(targets)), counts)
    lengths = shapes[owners][:, ::-1]  # of the A row, of the B column
    pairs = np.stack([np.array(config.models, np.int64).reshape(-1), lengths.reshape(-1)], axis=1)
    numbers, components = counts * shapes.sum(axis=1), counts
    return Starts(_running(numbers), _running(components), tuple(map(tuple, pairs.tolist())))


def _running(sizes: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]]) -> tuple[int, ...]:
    """Return the sum of all sizes before each."""
    return tuple((np.cumsum(sizes) - sizes).tolist())


def factors(gains: Any, a: Any, b: Any, xp: Any, coordinates: Coordinates = PLAIN) -> tuple[Any, Any]:
    """Return A (n, in) and B (out, n), float32, of components with `gains` (n, 1) and numbers `a` (n, in) and `b` (n,
    out).

    The root of a gain, as a power of two, goes to the other side, which is exact: both factors are then of one size,
    and neither is out of the range of float16.
    """
    return scaled(a, b, scales(gains, xp), xp, coordinates)


def scaled(a: Any, b: Any, sides: tuple[Any, Any], xp: Any, coordinates: Coordinates = PLAIN) -> tuple[Any, Any]:
    """Return `factors` of numbers `a` (n, in) and `b` (n, out) with the `scales` (n, 1) of their sides."""
    rows, columns = coordinates.rows(a, "A", xp), coordinates.rows(b, "B", xp)
    return _single(rows * sides[0], xp), _single(columns * sides[1], xp).T


def scales(gains: Any, xp: Any) -> tuple[Any, Any]:
    """Return what `factors` multiplies the rows of A and those of B with, in the shape of `gains`: a gain without the
    power of two next to its root, and that power, which has no gradient."""
    half, one = xp.frexp(gains)[1] // 2, xp.ones_like(gains)  # torch's ldexp has wrong gradients below 1
    return gains * xp.ldexp(one, -half), xp.ldexp(one, half)


def _single(numbers: Any, xp: Any) -> Any:
    """Numbers in float32, as they are if they are already."""
    return numbers.astype(np.float32, copy=False) if xp is np else numbers.float()
