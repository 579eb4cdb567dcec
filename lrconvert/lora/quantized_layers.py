"""Layers of a base that are stored quantized, whatever the method: their shapes are those of the base's class."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from lrconvert.core.dtypes import FLOATS
from lrconvert.core.errors import QuantizedBaseError
from lrconvert.io.checkpoint import Checkpoint, quantization_name, quantized_base
from lrconvert.lora import ties

# The last segments of tensors that describe a quantized one: scales, zero points, codes.
_DESCRIBES = re.compile(r"\w*(?:scales?|zeros?|zero_point|absmax|packed|blocks)(?:_\w+)?|SCB|qweight|g_idx|W_q")
_QUANT_STATE = ".quant_state."


@dataclass(frozen=True)
class QuantizedLayers:
    """The quantized layers of a checkpoint."""

    checkpoint: Checkpoint

    @cached_property
    def modules(self) -> frozenset[str]:
        """The modules with tensors that describe others."""
        described = set()
        for name in self.checkpoint.tensors:
            owner, _, leaf = name.rpartition(".")
            if _QUANT_STATE in name or _DESCRIBES.fullmatch(leaf):
                owner = name.partition(_QUANT_STATE)[0] if _QUANT_STATE in name else owner
                described |= {owner, owner.removesuffix(".weight")}
        return frozenset(described)

    def holds(self, name: str) -> bool:
        """Return whether the parameter of this stored name is quantized."""
        info = self.checkpoint.tensors.get(name)
        if info is None or info.dtype not in FLOATS:
            return True
        return bool(quantization_name(self.checkpoint.config)) and name.rpartition(".")[0] in self.modules

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a quantized parameter, as the class of the base has it; None if that lacks it. Raises
        E-BASE-QUANT where the class is not known."""
        known = ties.of(self.checkpoint.config)
        if known is None:
            raise self.refused(name)
        return known.architecture.shapes.get(known.find(name) or "")

    def refused(self, name: str) -> QuantizedBaseError:
        """Return the error for an update of a quantized parameter."""
        return quantized_base(self.checkpoint.config, self.checkpoint.root, f"the layer {name!r} of ")


def of(checkpoint: Checkpoint) -> QuantizedLayers | None:
    """Return the quantized layers of a checkpoint whose configuration says that it has some."""
    return QuantizedLayers(checkpoint) if quantization_name(checkpoint.config) else None
