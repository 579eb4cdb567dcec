"""SBoRA's official checkpoints (a fork of PEFT, ``peft_type`` SBORA): of "sbora_fa" ``<module>.lora_A`` (r,) numbers of
inputs and ``.lora_B.weight`` (out, r); of "sbora_fb" ``.lora_A.weight`` (r, in) and ``.lora_B`` (r,) numbers of
outputs. The scale is alpha / r. Paper: arXiv 2407.05413.

Read as a plain LoRA whose other factor holds the chosen unit vectors, which is the same update to the bit. The file
does not say how many inputs (outputs) a layer has; the base does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.core.dtypes import Stored, round_to
from lrconvert.core.errors import BaseError, ConfigError, IndexRangeError, LrcError, PairError, UnsupportedLoraError
from lrconvert.formats.readers.base import CONFIG_NAME, Reader
from lrconvert.formats.readers.shared import naming, pairs
from lrconvert.formats.readers.shared.naming import Component
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import Labels, Parts
from lrconvert.formats.readers.shared.weights import Weights, load_finite, open_weights, weights_in
from lrconvert.io.container import TensorInfo, config_text, read_json
from lrconvert.lora.adapter import MATRIX, LoraAdapter, LoraTarget, Target

LABELS = Labels("lora_A", "lora_B")
_WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>[AB])(?:\.weight)?")
_NO_EFFECT = frozenset(
    (
        *("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_dropout", "merge_weights"),
        *("modules_to_save", "peft_type", "target_modules", "task_type", "enable_lora", "revision", "auto_mapping"),
    )
)
_READ_HERE = frozenset(("adapter_name", "lora_alpha", "r"))
_INTEGERS = ("I64", "I32", "I16", "I8", "U8")


def recognises(path: Path) -> bool:
    """A folder whose configuration says SBORA."""
    try:
        return path.is_dir() and read_json(path / CONFIG_NAME).get("peft_type") == "SBORA"
    except LrcError:
        return False


def _split(name: str) -> tuple[str, str] | None:
    found = _FACTOR.fullmatch(name)
    return None if found is None else (found["module"], found["half"])


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """See the module's docstring. Raises E-BASE without a base, E-CONFIG, E-LORA-FEATURE, E-INDEX, E-PAIR, E-TENSOR,
    E-DTYPE, E-VALUE, E-PICKLE."""
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / CONFIG_NAME)
    try:
        alpha, rank, known = _settings(config)
    except LrcError as error:
        raise error.at(folder / CONFIG_NAME) from None
    if options.base is None:
        raise BaseError(
            f"the file does not say how many {'inputs' if known == 'B' else 'outputs'} a layer has, the base does",
            fix="give the base that it was trained on (--base)",
        )
    component = naming.base_names(options.base).component((), "the adapter")
    with open_weights(weights_in(path, _WEIGHTS_NAMES), options) as weights:
        modules = pairs.sort_parts(weights, _split)
        targets = [
            _target(module, parts, known, rank, alpha / rank, weights, component) for module, parts in modules.items()
        ]
        return pairs.finished(
            weights,
            targets,
            layout="sbora",
            base_model=config_text(config, "base_model_name_or_path"),
        )


def _settings(config: Mapping[str, Any]) -> tuple[float, int, str]:
    """(alpha, r, which half is stored as numbers of the layer itself). Raises E-CONFIG, E-LORA-FEATURE."""
    for key in sorted(set(config) - _NO_EFFECT - _READ_HERE):
        if config[key] not in (None, False, "", [], {}):
            raise UnsupportedLoraError(
                f"the configuration field {key!r} is not known and is set to {config[key]!r:.60}",
                fix="remove the field if it does not change the update",
            )
    if config.get("enable_lora") or config.get("modules_to_save"):
        raise UnsupportedLoraError(
            "enable_lora and modules_to_save are not read here", fix="merge it with its own code"
        )
    alpha, rank, name = (config.get(key) for key in ("lora_alpha", "r", "adapter_name"))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ConfigError(f"lora_alpha is {alpha!r:.60}, expected a number")
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"r is {rank!r:.60}, expected a positive integer")
    if not isinstance(name, str) or ("fa" in name) == ("fb" in name):
        raise ConfigError(f"adapter_name is {name!r:.60}, expected sbora_fa or sbora_fb")
    return float(alpha), rank, "B" if "fa" in name else "A"


def _target(
    module: str, parts: Parts, known: str, rank: int, scale: float, weights: Weights, component: Component
) -> LoraTarget:
    pairs.halves(module, parts, LABELS)
    other = "A" if known == "B" else "B"
    factor, picked = parts[known], parts[other]
    side = 0 if known == "B" else 1  # of (out, in): where the stored factor says the width
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
    a, b = (units, stored) if known == "B" else (stored, pairs.turned(units))
    pair = LoraTarget(Target(f"{module}.weight", (b.shape[0], a.shape[1]), MATRIX), a, b, scale)
    return component.placed(pair, name)


def _units(module: str, picked: TensorInfo, width: int, dtype: str, weights: Weights) -> Stored:
    """Unit vectors (r, width) in the dtype of the other factor. Raises E-DTYPE as E-PAIR, E-INDEX."""
    if picked.dtype not in _INTEGERS:
        raise PairError(f"{module}: {picked.name!r} is {picked.dtype}, expected the numbers of rows or columns")
    indices = weights.load(picked).array.astype(np.int64)
    if indices.min() < 0 or indices.max() >= width or len(set(indices.tolist())) < indices.size:
        raise IndexRangeError(f"{module}: {picked.name!r} names a place outside of {width}, or one twice")
    units = np.zeros((indices.size, width))
    units[np.arange(indices.size), indices] = 1.0
    return Stored(dtype, round_to(units, dtype))


READER = Reader("sbora", "SBoRA folder", recognises, read)
