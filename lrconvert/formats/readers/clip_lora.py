"""CLIP-LoRA's files: a pickled ``{"weights": {"layer_0": {"q_proj": {"w_lora_A", "w_lora_B"}}}, "metadata": {}}`` with
A (r, in) and B (out, r) of the attention of a CLIP. Paper: arXiv 2405.18541.

Layers are numbered in the order in which they are adapted, those of the text encoder first; which these are, the
metadata says (``encoder``, ``position``) with its tables below. The scale is alpha / sqrt(r), as its code has it. Names
become those of transformers' CLIP, whose rows of queries, keys and values are those of OpenAI's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lrconvert.core.errors import ConfigError
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.shared import naming, pairs
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import Labels
from lrconvert.formats.readers.shared.weights import Weights, open_weights
from lrconvert.lora.adapter import LoraAdapter

LABELS = Labels("w_lora_A", "w_lora_B")
_NAME = re.compile(r"(?P<module>layer_(?:0|[1-9]\d{0,3})\.(?:q_proj|k_proj|v_proj|proj))\.w_lora_(?P<half>[AB])")
_LEAVES = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "proj": "out_proj"}
# Layers of both encoders by `position`; of all layers of a vision encoder it knows two numbers, the second ViT-L/14's.
_POSITIONS = {
    "bottom": range(4), "mid": range(4, 8), "up": range(8, 12), "half-up": range(6, 12), "half-bottom": range(6),
    "all": range(12), "top": range(11, 12), "top1": range(11, 12), "top2": range(10, 12), "top3": range(9, 12),
}  # fmt: skip
_ALL_OF_VISION = (12, 21)
_ENCODERS = {"text": ("text_model",), "vision": ("vision_model",), "both": ("text_model", "vision_model")}
_STATED = ("r", "alpha", "encoder", "params", "position")


def knows(names: Sequence[str]) -> bool:
    """Return whether half of the tensors are factors of CLIP-LoRA's numbered layers."""
    return 0 < len(names) <= 2 * sum(_NAME.fullmatch(name) is not None for name in names)


def _split(name: str) -> tuple[str, str] | None:
    match = _NAME.fullmatch(name)
    return None if match is None else (match["module"], match["half"])


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read a file of CLIP-LoRA. Raises E-CONFIG if its metadata does not say which layers it has, E-PICKLE, E-TENSOR,
    E-PAIR, E-EMPTY, E-BASE, E-LIMIT, E-DTYPE, E-VALUE."""
    component = naming.base_component(options)
    with open_weights(path, options) as weights:
        modules = pairs.sort_parts(weights, _split)
        pairs.check_both_halves(modules, LABELS)
        stated = {key: text for key in _STATED for text in _texts(weights, key)}
        targets = []
        layers: list[str] = []

        def scale(rank: int) -> float:
            return pairs.scale_of("the file", _number(stated, "alpha"), math.sqrt(_number(stated, "r", rank)))

        for module, parts in modules.items():
            pair = pairs.read_pair(module, parts, scale, weights, LABELS)
            layers = layers or _layers(stated, 1 + max(_place(name)[0] for name in modules))
            number, leaf = _place(module)
            name = f"{layers[number]}.self_attn.{_LEAVES[leaf]}"
            pair = replace(pair, target=replace(pair.target, name=f"{name}.weight"))
            targets.append(pair if component is None else component.placed(pair, component.dotted(name)))
        used = [key for key in weights.metadata if key.removeprefix("metadata.") in _STATED]
        notes = [naming.unnamed("CLIP-LoRA")] if component is None else []
        return pairs.build_adapter(weights, targets, layout="clip-lora", warnings=notes, used=used)


def _place(module: str) -> tuple[int, str]:
    layer, _, leaf = module.partition(".")
    return int(layer.removeprefix("layer_")), leaf


def _texts(weights: Weights, key: str) -> list[str]:
    return [weights.metadata[name] for name in (key, f"metadata.{key}") if name in weights.metadata]


def _number(stated: Mapping[str, str], key: str, expected: int | None = None) -> float:
    """Return a number of the metadata. Raises E-CONFIG without it, and for another one than is expected."""
    try:
        value = float(stated[key])
    except (KeyError, ValueError):
        raise ConfigError(f"the metadata says no {key}, which the scale alpha / sqrt(r) needs", fix=_FIX) from None
    if expected is not None and value != expected:
        raise ConfigError(f"the metadata says r = {value:g}, the tensors have rank {expected}", fix=_FIX)
    return value


_FIX = "give the .pt file as CLIP-LoRA saved it, with its metadata"


def _layers(stated: Mapping[str, str], count: int) -> list[str]:
    """Return the layers of a CLIP in the order in which they are numbered. Raises E-CONFIG for metadata that is
    missing, or names other layers than the file has."""
    encoders, position = _ENCODERS.get(stated.get("encoder", "")), stated.get("position", "")
    if encoders is None or position not in _POSITIONS:
        what = f"the metadata says encoder {stated.get('encoder')!r:.40} and position {position!r:.40}"
        raise ConfigError(f"{what}, which do not tell the layers", fix=_FIX)
    known = []
    for depth in _ALL_OF_VISION:
        layers = [
            f"{encoder}.encoder.layers.{number}"
            for encoder in encoders
            for number in (range(depth) if (position, encoder) == ("all", "vision_model") else _POSITIONS[position])
        ]
        if len(layers) == count:
            return layers
        known.append(len(layers))
    what = f"the file has {count} layers, encoder {stated['encoder']!r} and position {position!r} are {known[0]}"
    raise ConfigError(what, fix="is the file whole, and as CLIP-LoRA saved it?")


READER = Reader("clip_lora", "CLIP-LoRA file", read, knows=knows)
