"""PEFT AdaLoRA: ``lora_A`` (r, in), ``lora_B`` (out, r) and between them ``lora_E`` (r, 1), as singular values. The
update is ``alpha / (r + 1e-5) * B @ diag(E) @ A`` with the r that was left of the module, a LoRA of that rank.
Paper: arXiv 2303.10512.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lrconvert.core.dtypes import Stored, round_to
from lrconvert.core.errors import PairError
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.peft.config import NO_EFFECT
from lrconvert.formats.readers.shared import pairs, peft_kinds
from lrconvert.formats.readers.shared.folders import PEFT_WEIGHTS, weights_in
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import Labels
from lrconvert.formats.readers.shared.weights import Weights, load_finite, open_weights
from lrconvert.io.container import TensorInfo
from lrconvert.lora.adapter import LoraAdapter, LoraTarget, Target

LABELS = Labels("lora_A", "lora_B")
_PARTS = {"lora_A": "A", "lora_B": "B", "lora_E": "E", "ranknum": "ranknum"}
_OWN = {"lora_alpha": "lora_alpha", "fan_in_fan_out": "fan_in_fan_out"}
_UNREAD = NO_EFFECT | {  # of the training, LoRA's fields that AdaLoRA does not look at, and ranks, which tensors show
    *("alpha_pattern", "beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "r", "rank_pattern", "target_r"),
    *("tfinal", "tinit", "total_step"),
}
_EPSILON = 1e-5  # that PEFT adds to the rank it divides by


def recognises(path: Path) -> bool:
    """Return whether the configuration says ADALORA."""
    return peft_kinds.is_of_kind(path, "ADALORA")


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read an AdaLoRA. Raises E-CONFIG, E-LORA-FEATURE, E-TENSOR, E-PAIR, E-EMPTY, E-LIMIT, E-DTYPE, E-VALUE."""
    config, settings = peft_kinds.settings_of(path, "ADALORA", _OWN, _UNREAD)
    with open_weights(weights_in(path, PEFT_WEIGHTS), options) as weights:
        places = peft_kinds.sort(weights, tuple(_PARTS))
        targets = []
        for module, parts in places.modules.items():
            own = {_PARTS[part]: info for part, info in parts.items()}
            targets.append(peft_kinds.turned(_pair(module, own, settings.lora_alpha, weights), settings.transposed))
        return peft_kinds.build(weights, places, targets, config, settings)


def _pair(module: str, parts: Mapping[str, TensorInfo], alpha: float, weights: Weights) -> LoraTarget:
    a, b = pairs.halves(module, parts, LABELS)
    rank = pairs.rank_of(module, a, b, LABELS)
    if "E" not in parts or math.prod(parts["E"].shape) != rank or len(a.shape) != 2 or len(b.shape) != 2:
        shown = list(parts["E"].shape) if "E" in parts else "missing"
        raise PairError(f"{module}: lora_E is {shown}, lora_A {list(a.shape)}: expected ({rank}, 1)")
    values = load_finite(weights, parts["E"]).decode().astype(np.float64).reshape(rank, 1)
    scaled = round_to(load_finite(weights, a).decode().astype(np.float64) * values, "F32")
    scale = pairs.scale_of(module, alpha if alpha > 0 else rank, rank + _EPSILON)
    target = Target(f"{module}.weight", (b.shape[0], a.shape[1]))
    return LoraTarget(target, Stored("F32", scaled), load_finite(weights, b), scale)


READER = Reader("peft_adalora", "PEFT AdaLoRA folder", read, recognises)
