"""SBoRA's official checkpoints (a fork of PEFT, ``peft_type`` SBORA): of "sbora_fa" ``<module>.lora_A`` (r,) numbers of
inputs and ``.lora_B.weight`` (out, r); of "sbora_fb" ``.lora_A.weight`` (r, in) and ``.lora_B`` (r,) numbers of
outputs. The scale is alpha / r. Paper: arXiv 2407.05413.

Read as a plain LoRA whose other factor holds the chosen unit vectors, which is the same update to the bit. The file
does not say how many inputs (outputs) a layer has; the base does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from lrconvert.core.dtypes import Stored, round_to
from lrconvert.core.errors import BaseError, ConfigError, IndexRangeError, LrcError, PairError, UnsupportedLoraError
from lrconvert.core.wording import spelled
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.shared import naming, pairs
from lrconvert.formats.readers.shared.config import Count, check_known
from lrconvert.formats.readers.shared.folders import PEFT_WEIGHTS, config_path, peft_type, weights_in
from lrconvert.formats.readers.shared.naming import Component
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import INTEGERS, Labels, Parts
from lrconvert.formats.readers.shared.weights import Weights, load_finite, open_weights
from lrconvert.io import fields
from lrconvert.io.container import TensorInfo, read_json
from lrconvert.io.fields import Check
from lrconvert.lora.adapter import MATRIX, LoraAdapter, LoraTarget, Target

LABELS = Labels("lora_A", "lora_B")
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>[AB])(?:\.weight)?")
_NO_EFFECT = frozenset(
    (
        *("bias", "fan_in_fan_out", "inference_mode", "lora_dropout", "merge_weights", "modules_to_save"),
        *("peft_type", "target_modules", "task_type", "enable_lora", "revision", "auto_mapping"),
    )
)


def _names_variant(name: str) -> bool:
    return ("fa" in name) != ("fb" in name)


@dataclass(frozen=True)
class _Settings:
    """The fields of the configuration that are read."""

    lora_alpha: float
    r: Count
    adapter_name: Annotated[str, Check(_names_variant, "sbora_fa or sbora_fb", ConfigError)]
    base_model_name_or_path: str = ""

    @property
    def has_b(self) -> bool:
        """True if B is stored in full, and the numbers of inputs for A; else A, and the numbers of outputs."""
        return "fa" in self.adapter_name


def recognises(path: Path) -> bool:
    """Return whether a folder's configuration says SBORA."""
    return peft_type(path) == "SBORA"


def _split(name: str) -> tuple[str, str] | None:
    match = _FACTOR.fullmatch(name)
    return None if match is None else (match["module"], match["half"])


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read a folder of SBoRA. Raises E-BASE without a base, E-CONFIG, E-LORA-FEATURE, E-INDEX, E-PAIR, E-TENSOR,
    E-DTYPE, E-VALUE, E-PICKLE."""
    config = read_json(config_path(path))
    try:
        settings = _settings(config)
    except LrcError as error:
        raise error.at(config_path(path)) from None
    component = naming.base_component(options)
    if component is None:
        raise BaseError(
            f"the file does not say how many {'inputs' if settings.has_b else 'outputs'} a layer has",
            fix=f"give the base that it was trained on ({spelled('base', ...)})",
        )
    with open_weights(weights_in(path, PEFT_WEIGHTS), options) as weights:
        modules = pairs.sort_parts(weights, _split)
        targets = [_target(module, parts, settings, weights, component) for module, parts in modules.items()]
        return pairs.build_adapter(weights, targets, layout="sbora", base_model=settings.base_model_name_or_path)


def _settings(config: Mapping[str, Any]) -> _Settings:
    """Return the settings. Raises E-CONFIG, E-LORA-FEATURE."""
    check_known(config, _NO_EFFECT | fields.names(_Settings))
    if config.get("enable_lora") or config.get("modules_to_save"):
        raise UnsupportedLoraError(
            "enable_lora and modules_to_save are not read here", fix="merge it with its own code"
        )
    return fields.read_config(_Settings, config)


def _target(module: str, parts: Parts, settings: _Settings, weights: Weights, component: Component) -> LoraTarget:
    pairs.halves(module, parts, LABELS)
    rank = settings.r
    factor, picked = (parts["B"], parts["A"]) if settings.has_b else (parts["A"], parts["B"])
    side = 0 if settings.has_b else 1  # of (out, in): where the stored factor says the width
    if len(factor.shape) != 2 or factor.shape[1 - side] != rank or picked.shape != (rank,):
        raise PairError(f"{module}: {list(factor.shape)} and {list(picked.shape)} do not fit r = {rank}")
    pairs.check_rank(module, rank)
    name = component.dotted(module)
    shape = component.shapes.get(f"{name}.weight")
    width = factor.shape[side]
    if shape is None or len(shape) != 2 or width not in shape:
        raise BaseError(f"{name!r} is {shape} in the base, the factor has {width} {('outputs', 'inputs')[side]}")
    free = shape[1 - side] if shape[side] == width else shape[side]
    stored = load_finite(weights, factor)
    units = _units(module, picked, free, stored.dtype, weights)
    a, b = (units, stored) if settings.has_b else (stored, pairs.transpose(units))
    target = Target(f"{module}.weight", (b.shape[0], a.shape[1]), MATRIX)
    return component.placed(LoraTarget(target, a, b, pairs.scale_of(module, settings.lora_alpha, rank)), name)


def _units(module: str, picked: TensorInfo, width: int, dtype: str, weights: Weights) -> Stored:
    """Return unit vectors (r, width) in the dtype of the other factor. Raises E-PAIR, E-INDEX."""
    if picked.dtype not in INTEGERS:
        raise PairError(f"{module}: {picked.name!r} is {picked.dtype}, expected the numbers of rows or columns")
    indices = weights.load(picked).array.astype(np.int64)
    if indices.min() < 0 or indices.max() >= width or len(set(indices.tolist())) < indices.size:
        raise IndexRangeError(f"{module}: {picked.name!r} names a place outside of {width}, or one twice")
    units = np.zeros((indices.size, width))
    units[np.arange(indices.size), indices] = 1.0
    return Stored(dtype, round_to(units, dtype))


READER = Reader("sbora", "SBoRA folder", read, recognises)
