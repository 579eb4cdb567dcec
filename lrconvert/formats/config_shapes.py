"""An adapter against a base of which only the configuration is there: widths that differ are of another model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lrconvert.core.errors import BaseError, LrcError
from lrconvert.formats import unet_names
from lrconvert.io.checkpoint import PIPELINE_NAME
from lrconvert.io.container import read_json
from lrconvert.lora import architecture, renamings
from lrconvert.lora.adapter import LoraAdapter, Target
from lrconvert.lora.name_index import NameIndex

Shape = tuple[int, ...]


def check(lora: LoraAdapter, base: Path) -> None:
    """Raise E-BASE for the first target whose shape is none that the configurations in `base` give its parameter. What
    they do not tell is taken as it is."""
    resized = {extra.name.replace("base_layer.", "") for extra in lora.extras if ".base_layer." in f".{extra.name}"}
    for prefix, config in _configs(base):
        shapes = _shapes(config)
        index = NameIndex(shapes.keys(), renamings.families(config))
        for target in lora.shapes():
            if not target.name.startswith(prefix) or target.name in resized:
                continue
            name = target.name.removeprefix(prefix)
            try:
                found = shapes.get(index.find(name) or "")
            except LrcError:  # it may be one of several
                continue
            if found is not None and not _fits(target, found):
                raise BaseError(
                    f"{target.name!r} is {list(target.matrix_shape)} (out, in) in the adapter, {list(found)} by the "
                    "configuration of the base",
                    fix="is this the adapter's own base?",
                    path=base,
                )


def _configs(base: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield what the names of a model's parameters begin with in an adapter, and its configuration."""
    if (base / PIPELINE_NAME).is_file():
        for path in sorted(base.glob("*/config.json")):
            yield f"{path.parent.name}.", read_json(path)
    elif (base / "config.json").is_file():
        yield "", read_json(base / "config.json")


def _shapes(config: Mapping[str, Any]) -> Mapping[str, Shape]:
    if config.get("_class_name") == unet_names.CLASS:
        try:
            return {f"{module}.weight": shape for module, shape in unet_names.modules(config).items()}
        except BaseError:  # of a kind that is not known
            return {}
    found = architecture.of(config)
    return {} if found is None else found.shapes


def _fits(target: Target, shape: Shape) -> bool:
    """Return whether a target can be a matrix of a parameter of this shape."""
    out, inner = target.matrix_shape
    if target.view.kind.startswith("expert"):
        return len(shape) == 3 and sorted(shape[1:]) == sorted((out, inner))
    if target.view.kind == "rows":
        return len(shape) == 2 and shape[1] == inner and shape[0] >= out
    if len(shape) == 2:
        return shape in ((out, inner), (inner, out))
    return bool(shape) and (shape[0], math.prod(shape[1:])) == (out, inner)
