"""NVIDIA ModelOpt: FP8 weights with ``weight_scale``, and NVFP4: ``x.weight`` holds two elements in a byte,
``x.weight_scale`` a scale of eight bits for 16 of them, ``x.weight_scale_2`` one for the whole weight.

An NVFP4 element is value * (weight_scale * weight_scale_2), in float32.
"""

from __future__ import annotations

from lrconvert.io.checkpoint import Checkpoint
from lrconvert.io.quantized.base import Described, Stored, suffixed
from lrconvert.io.quantized.shared import fp4, scaled

_WRITER = "ModelOpt"
_ACTIVATIONS = ("input_scale", "output_scale", "k_scale", "v_scale", "q_scale")
_SMOOTHING = "pre_quant_scale"


def described(checkpoint: Checkpoint) -> Described:
    """Return the weights of eight and of four bits."""
    tensors = checkpoint.tensors
    for name in tensors:
        owner = name.removesuffix(f".{_SMOOTHING}")
        if owner != name:
            Stored(checkpoint, f"{owner}.weight", _WRITER).broken(f"it has {name!r}, which is not undone here")
    weights = scaled.weights(checkpoint, _WRITER, ("_scale",))
    for name, info in tensors.items():
        if info.dtype != "U8" or not name.endswith(".weight"):
            continue
        stored = Stored(checkpoint, name, _WRITER)
        scale = stored.shaped(f"{name}_scale", ("F8_E4M3",))
        whole = stored.part(f"{name}_scale_2", "F32", 1)
        factor = stored.numbers(whole)[0]
        weights[name] = fp4.weight(stored, info, scale, factor, beside=(whole.name,))
    return Described(weights, suffixed(checkpoint, _ACTIVATIONS))
