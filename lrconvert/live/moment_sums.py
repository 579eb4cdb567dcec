"""Running sums of the inputs of layers, from which second moments and their sketches follow.

Exact second moments are summed in float64; of wide inputs a linear sketch is kept, ``Y = M Omega`` with random signs
Omega (in, m), from which a Nystrom approximation of rank m follows (Tropp et al., "Fixed-rank approximation of a
positive-semidefinite matrix from streaming data", 2017): a sum as well, so that it costs two thin matrix products, and
the order of batches and a pause between them do not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrconvert.core.dtypes import F32
from lrconvert.core.errors import ValueRangeError
from lrconvert.lora.input_statistics import Moment

CHUNK = 1 << 24  # numbers that are converted to float32 at once


@dataclass(eq=False)
class Sum:
    """The running sum of one input: `tokens`; `square` (n, n) float64, or `diagonal` (n,) float64 with `sketch` (n, m)
    float32, None for embeddings."""

    width: int
    tokens: int = 0
    square: Tensor | None = None
    diagonal: Tensor | None = None
    sketch: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, those that there are."""
        sums = {"square": self.square, "diagonal": self.diagonal, "sketch": self.sketch}
        return {name: value for name, value in sums.items() if value is not None}

    def add(self, x: Tensor, omega: Tensor | None) -> None:
        """Count the rows of x (tokens, n); `omega` (n, m) if this is a sketch."""
        self.tokens += len(x)
        step = max(1, CHUNK // self.width)
        for start in range(0, len(x), step):
            rows = x[start : start + step].float()
            if omega is None:
                self.square = _plus(self.square, (rows.T @ rows).double())
                continue
            self.diagonal = _plus(self.diagonal, (rows * rows).sum(0).double())
            self.sketch = _plus(self.sketch, rows.T @ (rows @ omega))

    def count(self, ids: Tensor) -> None:
        """Count tokens: the input of an embedding is a unit vector."""
        self.tokens += ids.numel()
        self.diagonal = _plus(self.diagonal, torch.bincount(ids.reshape(-1), minlength=self.width).double())

    def moment(self, omega: Tensor | None) -> Moment:
        """Return the mean. Raises E-VALUE for a sum that is NaN or infinite."""
        if not all(bool(value.isfinite().all()) for value in self.tensors().values()):
            raise ValueRangeError("an activation is NaN or infinite", fix="try float32, or other data")
        scale = 1.0 / max(1, self.tokens)
        if self.square is not None:
            return Moment(self.tokens, matrix=_single(self.square * scale))
        assert self.diagonal is not None
        diagonal = _single(self.diagonal * scale)
        if self.sketch is None or omega is None:
            return Moment(self.tokens, diagonal=diagonal)
        rows = _nystrom(self.sketch.double() * scale, omega.double())
        return Moment(self.tokens, diagonal=diagonal, rows=_single(rows))


def _plus(total: Tensor | None, value: Tensor) -> Tensor:
    return value if total is None else total.add_(value)


def _single(x: Tensor) -> F32:
    array: F32 = x.float().cpu().numpy()
    return array


def _nystrom(y: Tensor, omega: Tensor) -> Tensor:
    """R (m, n) with ``R^T R = Y (Omega^T Y)^+ Y^T`` for Y = M Omega (n, m), float64; it does not exceed M. A shift by
    what float32 sums may be off keeps the root real."""
    shift = float(y.norm()) * 2.0**-22 / omega.shape[0] ** 0.5
    y = y + shift * omega
    core = omega.T @ y
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    positive = values > 2.0**-22 * values.amax()
    root = vectors[:, positive] / values[positive].sqrt()
    rows: Tensor = (y @ root).T.contiguous()
    return rows
