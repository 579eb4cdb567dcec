"""The coordinates in which the rows of components are stored: as they are, or those that another form overrides."""

from __future__ import annotations

from typing import Any

import numpy as np

from lrconvert.core.dtypes import F32, F64


class Coordinates:
    """Rows of A (`role` "A") and columns of B ("B") as they are. What numpy arrays can do, torch tensors can, with
    gradients where `rows` is concerned."""

    def rows(self, numbers: Any, role: str, xp: Any = np) -> Any:
        """Return the rows (n, length) that stored `numbers` (n, length) stand for; exact, in float32 or float64."""
        return numbers

    def numbers(self, rows: Any, role: str, xp: Any = np) -> Any:
        """Return the numbers, before rounding, whose `rows` these are."""
        return rows

    def unit(self, length: int) -> float:
        """Return the length of the vector that a number 1 stands for; in the mean, if they are not all of one."""
        return 1.0

    def fill(self, out: F32, scales: F64, rows: F64, role: str) -> None:
        """Fill `out` (n, length) with the numbers of ``scales * rows``, scales (n, 1), in units in which all lengths
        are kept."""
        np.multiply(scales, rows, out=out, casting="same_kind")

    def sampled(self, rows: F64, stride: int, role: str) -> F64:
        """Return of the numbers that `fill` makes of rows (..., length) every one in `stride`, with its units."""
        return np.ascontiguousarray(rows[..., ::stride])


PLAIN = Coordinates()
