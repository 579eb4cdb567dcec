"""The matrices of a base as an adapter sees them: out rows and in columns, read a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lrconvert.core.dtypes import FLOATS, STORAGE, Array, decode
from lrconvert.core.errors import BaseError, QuantizedBaseError
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.io.container import TensorInfo
from lrconvert.lora import base_names, quantized_layers
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, Target

BLOCK = 1 << 18  # elements of a weight at a time: what is computed from them stays in the cache


class BaseWeights:
    """The weights of a checkpoint by the targets of one adapter, which keep the names they have there.

    Valid while the checkpoint is open. `content` is the digest of all that it holds.
    """

    def __init__(self, adapter: LoraAdapter | CompactAdapter, checkpoint: Checkpoint, content: str = "") -> None:
        """Raise E-BASE, E-ORIENT if a target has no place in the checkpoint."""
        if isinstance(adapter, LoraAdapter):
            targets, stored = adapter.shapes(), base_names.resolve(adapter, checkpoint).shapes()
        else:
            targets, stored = adapter.targets, base_names.resolve(adapter, checkpoint).targets
        self.content = content
        self._checkpoint, self._quantized = checkpoint, quantized_layers.of(checkpoint)
        self._places = {(t.name, t.view.text): place for t, place in zip(targets, stored, strict=True)}

    def rows(self, target: Target, start: int, stop: int) -> Array:
        """Return rows `start` to `stop` of a target's matrix, (stop - start, in), float32 (float64 if stored so).

        Of a parameter that is stored (in, out) all is read for that. Raises E-BASE, E-BASE-QUANT.
        """
        place = self._places[target.name, target.view.text]
        info = self._info(place)
        kind, _, rest = place.view.text.partition(":")
        shape = info.shape
        if kind in ("transposed", "expert_transposed"):
            which = int(rest) if rest else 0
            whole = self._read(info, which * shape[-2] * shape[-1], shape[-2], shape[-1])
            return np.ascontiguousarray(whole[:, start:stop].T)
        cols = place.matrix_shape[1]
        above = int(rest.split(":")[0]) if kind == "rows" else int(rest) * shape[1] if kind == "expert" else 0
        return self._read(info, (above + start) * cols, stop - start, cols)

    def blocks(self, target: Target, step: int = 1, elements: int = BLOCK) -> Iterator[tuple[int, Array]]:
        """Yield (first row, rows) of a target's matrix from the top, in multiples of `step` rows, about `elements` at
        once."""
        out, inner = target.matrix_shape
        height = max(1, elements // (inner * step)) * step
        turned = self._places[target.name, target.view.text].view.kind.endswith("transposed")
        whole = self.rows(target, 0, out) if turned else None
        for top in range(0, out, height):
            stop = min(top + height, out)
            yield top, self.rows(target, top, stop) if whole is None else whole[top:stop]

    def _info(self, place: Target) -> TensorInfo:
        name = place.name
        if name not in self._checkpoint.tensors:
            name = base_names.tied_source(name, self._checkpoint) or name
        info = self._checkpoint.tensors.get(name)
        if self._quantized is not None and self._quantized.holds(name):
            raise self._quantized.refused(name)
        if info is None:
            raise BaseError(f"the base stores {name!r} in another form, an update cannot depend on that")
        if info.shape != place.shape:
            raise BaseError(f"{name!r} is {list(place.shape)} in the adapter, {list(info.shape)} in the base")
        if info.dtype not in FLOATS:
            raise QuantizedBaseError(f"{name!r} is stored as {info.dtype}", fix="give the base that is not quantized")
        return info

    def _read(self, info: TensorInfo, first: int, rows: int, cols: int) -> Array:
        """`rows` rows of `cols` numbers of a stored tensor, from number `first` on."""
        kind = STORAGE[info.dtype]
        data = self._checkpoint.read(info, first * kind.itemsize, rows * cols * kind.itemsize)
        return decode(np.frombuffer(data, kind), info.dtype).reshape(rows, cols)
