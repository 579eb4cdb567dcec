"""FP8 as DeepSeek, Qwen and others store it: ``x.weight`` of eight bits and ``x.weight_scale_inv``, a factor for every
block of `weight_block_size`, or one for the whole weight. Experts may have four bits, with powers of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from lrconvert.core.errors import LrcError
from lrconvert.io import fields
from lrconvert.io.checkpoint import Checkpoint, quantization_settings
from lrconvert.io.quantized.base import Described, Stored, Weight, suffixed
from lrconvert.io.quantized.shared import fp4, scaled

_WRITER = "an FP8 checkpoint"
SUFFIXES = ("_scale_inv", ".scale", ".qscale_weight", "_scale")
_ACTIVATIONS = ("activation_scale", "input_scale", "qscale_act", "k_scale", "v_scale", "kv_scale")


@dataclass(frozen=True)
class _Settings:
    weight_block_size: tuple[Annotated[int, fields.between(1, 1 << 20)], ...] | None = None


def described(checkpoint: Checkpoint) -> Described:
    """Return the weights of eight bits, and those of four where they stand beside them."""
    block = _block_size(quantization_settings(checkpoint.config), checkpoint)
    weights: dict[str, Weight] = scaled.weights(checkpoint, _WRITER, SUFFIXES, block)
    for name, info in checkpoint.tensors.items():
        scales = [scale for scale in scaled.scale_names(name, SUFFIXES) if scale in checkpoint.tensors]
        if info.dtype != "I8" or len(scales) != 1:
            continue
        stored = Stored(checkpoint, name, _WRITER)
        scale = stored.shaped(scales[0], ("F8_E8M0", "U8"))
        weights[name] = fp4.weight(stored, info, scale)
    return Described(weights, suffixed(checkpoint, _ACTIVATIONS))


def _block_size(settings: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return rows and columns of a block, () without blocks. Raises E-CONFIG."""
    try:
        given = {key: value for key, value in settings.items() if key == "weight_block_size"}
        block = fields.read_config(_Settings, given).weight_block_size or ()
    except LrcError as error:
        raise error.at(checkpoint.root / "config.json") from None
    if len(block) not in (0, 2):
        Stored(checkpoint, "*", _WRITER).broken(f"weight_block_size is {list(block)}, not two numbers")
    return block
