"""A made-up layout: ``<module>.delta_in`` (r, in), ``<module>.delta_out`` (out, r) and ``<module>.delta_scale`` (one
number) in a safetensors file.

A complete reader. As ``lrconvert/formats/readers/deltas.py`` it is found by itself: every verb that takes an adapter
takes such a file, and ``--from deltas`` names the layout.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lrconvert.core.errors import PairError
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.shared import naming, pairs
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import Labels, Parts
from lrconvert.formats.readers.shared.weights import Weights, open_weights
from lrconvert.lora.adapter import LoraAdapter, LoraTarget

LABELS = Labels("delta_in", "delta_out")
_NAME = re.compile(r"(?P<module>.+)\.delta_(?P<part>in|out|scale)")
_PARTS = {"in": "A", "out": "B", "scale": "scale"}


def split(name: str) -> tuple[str, str] | None:
    """Return the module and the part that a tensor's name says; None for a name of another layout."""
    match = _NAME.fullmatch(name)
    return None if match is None else (match["module"], _PARTS[match["part"]])


def knows(names: Sequence[str]) -> bool:
    """Return True for the names of this layout: cheap, and never raises."""
    return any(split(name) for name in names)


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read the file. Raises E-TENSOR for a tensor of no known meaning, E-PAIR, E-DTYPE, E-VALUE, E-EMPTY."""
    with open_weights(path, options) as weights:
        modules = pairs.sort_parts(weights, split)  # refuses by name what it does not know
        targets = [target(module, parts, weights) for module, parts in modules.items()]
        return pairs.build_adapter(weights, targets, layout="deltas", warnings=[naming.unnamed("deltas")])


def target(module: str, parts: Parts, weights: Weights) -> LoraTarget:
    if "scale" not in parts:
        raise PairError(f"{module}: there is no delta_scale", fix="the file is incomplete")
    scale = pairs.stated_alpha(weights, parts["scale"])
    return pairs.read_pair(module, parts, lambda rank: scale, weights, LABELS)


READER = Reader("deltas", "file of deltas", read, knows=knows)
