"""The sums of a model's inputs, from which second moments and their sketches follow.

Layers that are given the same tensor share one sum. Only real tokens count. Exact second moments are summed in float64;
of wide inputs a linear sketch is kept, ``Y = M Omega`` with random signs Omega (in, m), from which a Nystrom
approximation of rank m follows (Tropp et al., "Fixed-rank approximation of a positive-semidefinite matrix from
streaming data", 2017): a sum as well, so that it costs two thin matrix products, and the order of batches and a pause
between them do not matter.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from lrconvert.core.dtypes import F32
from lrconvert.core.errors import StatisticsError, ValueRangeError
from lrconvert.core.wording import spelled
from lrconvert.live.layer_inputs import CONVOLUTIONS, Batch, masks_of, patches, real_rows, rows_of
from lrconvert.lora.input_statistics import Input, Moment

_CHUNK = 1 << 24  # numbers that are converted to float32 at once

Key = tuple[str, int | None]  # a parameter, and which expert of it


@dataclass(frozen=True)
class Settings:
    """Forms of moments: exact up to `exact_width`, sketches of `rank` above; `seed` draws these."""

    exact_width: int = 1024  # a moment of 4 MB
    rank: int = 256
    seed: int = 0


# --- sums -----------------------------------------------------------------------------------------------------------


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
        step = max(1, _CHUNK // self.width)
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


# --- collecting -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Seen:
    """A tensor that a layer was given in the present forward pass, and who counts it."""

    tensor: weakref.ref[Tensor]
    version: int
    leader: Key


@dataclass(eq=False)
class Collector:
    """The sums of a model's inputs. Batches may be added in any number of sessions: `sums` and `leaders` are the whole
    state."""

    settings: Settings = Settings()
    leaders: dict[Key, Key] = field(default_factory=dict)  # of each parameter, whose sum its input is in
    sums: dict[Key, Sum] = field(default_factory=dict)
    _omegas: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)
    masks: tuple[Tensor, ...] = ()  # of the present forward pass
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _new: set[Key] = field(default_factory=set)

    def omega(self, width: int, device: torch.device) -> Tensor | None:
        """Return the random signs (width, m) of a sketch; None if the width is kept exactly."""
        if width <= max(self.settings.exact_width, self.settings.rank):  # a sketch as wide as its input saves nothing
            return None
        if (width, device) not in self._omegas:
            rng = np.random.default_rng((self.settings.seed, width))
            signs = rng.integers(0, 2, (width, self.settings.rank), np.int8).astype(np.float32) * 2 - 1
            self._omegas[width, device] = torch.from_numpy(signs).to(device)
        return self._omegas[width, device]

    def run(self, model: nn.Module, batch: Batch) -> None:
        """Make one forward pass; the model must be `watched`."""
        self.masks = masks_of(model, batch)
        self._seen, self._new = {}, set()
        with torch.no_grad():
            model(**batch)
        self._seen = {}

    def _sum_of(self, key: Key, x: Tensor) -> Sum | None:
        """The sum that takes x for a parameter; None if another one takes this very tensor. Raises E-STATS if layers
        that were given one tensor are now given two."""
        seen = self._seen.get(id(x))
        same = seen is not None and seen.tensor() is x and seen.version == x._version
        leader = self.leaders.get(key)
        if leader is None:
            # Only an input that began in this very pass has no tokens that the newcomer did not get.
            leader = seen.leader if seen is not None and same and seen.leader in self._new else key
            self.leaders[key] = leader
            if leader == key:
                self._new.add(key)
        if leader == key:
            self._seen[id(x)] = _Seen(weakref.ref(x), x._version, key)
            return self.sums.setdefault(key, Sum(0))
        if seen is None or not same or seen.leader != leader:
            raise StatisticsError(
                f"{key[0]!r} and {leader[0]!r} shared their input at first and do not now",
                fix=f"collect them one after the other, with {spelled('include', ...)}",
            )
        return None

    def add_matrix(self, key: Key, x: Tensor, rows: Tensor | None = None) -> None:
        """Count the input x (..., n) of a linear layer; `rows`: those of real tokens, if it is known which they are."""
        total = self._sum_of(key, x)
        if total is not None:
            self._add(total, real_rows(x, self.masks, 1) if rows is None else rows)

    def _add(self, total: Sum, rows: Tensor) -> None:
        total.width = rows.shape[-1]
        if len(rows):
            total.add(rows, self.omega(total.width, rows.device))

    def add_layer(self, key: Key, layer: nn.Module, x: Tensor) -> None:
        """Count the input of a layer of any known kind."""
        if isinstance(layer, nn.Embedding):
            total = self._sum_of(key, x)
            if total is not None:
                total.width = layer.num_embeddings
                total.count(rows_of(layer, x, self.masks))
        elif isinstance(layer, CONVOLUTIONS):
            # Unfolded inputs depend on the layer's kernel: never shared.
            self.leaders[key] = key
            step = max(1, _CHUNK // max(1, x[0].numel() * int(np.prod(layer.kernel_size))))
            for start in range(0, len(x), step):
                self._add(self.sums.setdefault(key, Sum(0)), patches(layer, x[start : start + step]))
        else:
            self.add_matrix(key, x)

    def inputs(self) -> Iterator[tuple[Input, Moment]]:
        """Yield every input that was collected with its moment, by name."""
        members: dict[Key, list[Key]] = {}
        for key, leader in self.leaders.items():
            members.setdefault(leader, []).append(key)
        groups = [(sorted(keys, key=sort_key), self.sums[leader]) for leader, keys in members.items()]
        for keys, total in sorted(groups, key=lambda group: sort_key(group[0][0])):
            if total.tokens:
                device = next(iter(total.tensors().values())).device
                omega = self.omega(total.width, device) if total.sketch is not None else None
                names = tuple(name for name, _ in keys)
                yield Input(names, keys[0][1], total.width, total.tokens), total.moment(omega)


def sort_key(key: Key) -> tuple[str, int]:
    """Return a key that sorts by name, then by expert; also how a checkpoint spells it."""
    return key[0], -1 if key[1] is None else key[1]
