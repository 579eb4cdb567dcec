"""The sums of a model's inputs: which layers share one, and what each is given in a forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from lrconvert.core.errors import StatisticsError
from lrconvert.live.layer_inputs import Batch, masks_of, patches, real_rows, rows_of
from lrconvert.live.moment_sums import CHUNK, Sum
from lrconvert.lora.input_statistics import Input, Moment

EXACT_WIDTH = 1024  # inputs up to this width keep their whole moment: 4 MB
SKETCH_RANK = 256

Key = tuple[str, int | None]  # a parameter, and which expert of it


@dataclass(frozen=True)
class Settings:
    """Forms of moments: exact up to `exact_width`, sketches of `rank` above; `seed` draws these."""

    exact_width: int = EXACT_WIDTH
    rank: int = SKETCH_RANK
    seed: int = 0


@dataclass(eq=False)
class _Seen:
    """A tensor that a layer was given in the present forward pass, and who counts it."""

    tensor: weakref.ref[Tensor]
    version: int
    leader: Key


@dataclass(eq=False)
class Collector:
    """The sums of a model's inputs. Layers that are given the same tensor share one; only real tokens count. Batches
    may be added in any number of sessions: `sums` and `leaders` are the whole state."""

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
                fix="collect them one after the other, with --include",
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
        elif isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            # Unfolded inputs depend on the layer's kernel: never shared.
            self.leaders[key] = key
            step = max(1, CHUNK // max(1, x[0].numel() * int(np.prod(layer.kernel_size))))
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
