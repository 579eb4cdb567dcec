"""FBGEMM's FP8: weights of eight bits and ``weight_scale``, a factor for every row; for experts that are stored (in,
out) one for every column.
"""

from __future__ import annotations

from lrconvert.io.checkpoint import Checkpoint
from lrconvert.io.quantized.base import Described, suffixed
from lrconvert.io.quantized.shared import scaled

_ACTIVATIONS = ("input_scale_ub", "input_scale", "activation_scale")


def described(checkpoint: Checkpoint) -> Described:
    """Return the weights of eight bits."""
    return Described(scaled.weights(checkpoint, "FBGEMM", ("_scale",)), suffixed(checkpoint, _ACTIVATIONS))
