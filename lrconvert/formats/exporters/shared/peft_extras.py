"""Extra tensors under PEFT's names, and the fields of the configuration that place them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lrconvert.core.dtypes import STORAGE
from lrconvert.core.errors import ExportError
from lrconvert.core.wording import spelled
from lrconvert.formats.exporters.shared.files import Entry
from lrconvert.formats.exporters.shared.plain import exclude
from lrconvert.formats.readers.peft.names import BASE_LAYER, PREFIX
from lrconvert.lora.adapter import Adapter, ExtraTensor, Target

# Parts of an update beside its factors, as PEFT calls them.
_PARTS = {
    "add": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
    "rows": "token_adapter.trainable_tokens_delta",
}


@dataclass(frozen=True)
class Placed:
    """Tensors of the file, and the fields of the configuration that place them."""

    entries: tuple[Entry, ...]
    config: dict[str, Any] = field(default_factory=dict)


def place(adapter: Adapter, adapted: Collection[str], only: str = "lora_only") -> Placed:
    """Return the extras of `adapter` under PEFT's names. `adapted` are the modules that have an update, `only` is what
    PEFT's option `bias` calls their biases. Raises E-EXPORT for what has no place."""
    _check_owners(adapter.extras, adapted)
    whole = [e for e in adapter.extras if e.use == "replace"]
    biases = [e for e in whole if _is_bias(e, whole)]
    kept = [e for e in whole if e not in biases and f"{BASE_LAYER}." not in e.name]
    entries = [(PREFIX + e.name, e.dtype, e.shape, e.data) for e in whole if e not in biases]
    entries += [(PREFIX + _bias_name(e, adapted), e.dtype, e.shape, e.data) for e in biases]
    entries += list(_parts(adapter))
    saved = saved_modules(adapter, kept)
    both = next((module for module in sorted(adapted) if _placed(module, saved)), "")
    if both:
        raise ExportError(
            f"{both!r} has an update, and PEFT would save it whole because of modules_to_save {saved}",
            fix=exclude(),
        )
    config: dict[str, Any] = {"modules_to_save": saved or None}
    if biases:
        own = all(owner(e.name) in adapted for e in biases)
        config["bias"] = only if own else "all"
    rows = [e for e in adapter.extras if e.use == "row_indices"]
    if rows:
        config["trainable_token_indices"] = {
            owner(e.name): np.frombuffer(e.data, STORAGE[e.dtype]).tolist() for e in rows
        }
    return Placed(tuple(entries), config)


def _check_owners(extras: Iterable[ExtraTensor], adapted: Collection[str]) -> None:
    """Raise E-EXPORT for what PEFT has no place for, and parts of an update that it would look for in another wrapper
    than the one it makes."""
    for e in extras:
        module = owner(e.name)
        if e.use == "input_magnitude":
            what = f"PEFT's DoRA scales outputs, and that of {e.name!r:.120} scales inputs"
            raise ExportError(what, fix=f"convert it with {spelled('bake_dora', ...)}, or export to kohya")
        if e.use in ("add", "magnitude") and module not in adapted:
            raise ExportError(
                f"{e.name!r} is a part of the update of {module!r}, which has no factors",
                fix="convert the adapter again: its file lacks a target",
            )
        if e.use == "rows" and module in adapted:
            raise ExportError(
                f"{module!r} has factors and trained rows; PEFT has one of them in a layer",
                fix=exclude(),
            )


def _parts(adapter: Adapter) -> Iterable[Entry]:
    convolutions = {target.name: target for target in adapter.shapes() if target.view.kind == "conv"}
    for e in adapter.extras:
        if e.use in _PARTS:
            layer = convolutions.get(e.name) if e.use == "magnitude" else None
            shape = e.shape if layer is None else magnitude_shape(layer)
            yield f"{PREFIX}{owner(e.name)}.{_PARTS[e.use]}", e.dtype, shape, e.data


def magnitude_shape(target: Target) -> tuple[int, ...]:
    """Return the shape in which PEFT keeps DoRA's magnitudes of a layer."""
    ones = (1,) * len(target.shape[2:])
    return (1, target.out_features, *ones) if target.view.kind == "conv" else (target.out_features,)


def owner(name: str) -> str:
    """Return the module that a parameter belongs to, without PEFT's wrapper."""
    return name.rpartition(".")[0].removesuffix(BASE_LAYER)


def _is_bias(extra: ExtraTensor, whole: Iterable[ExtraTensor]) -> bool:
    """Return True if PEFT saved a tensor for its option `bias`: a bias without the weight of its module."""
    weight = f"{owner(extra.name)}.weight"
    return extra.name.endswith(".bias") and not any(e.name == weight for e in whole)


def _bias_name(extra: ExtraTensor, adapted: Collection[str]) -> str:
    module = owner(extra.name)
    return f"{module}{BASE_LAYER if module in adapted else ''}.bias"


def saved_modules(adapter: Adapter, extras: Iterable[ExtraTensor]) -> list[str]:
    """Return the modules_to_save that place these extras: the source's own list if it does, else the extras'
    modules."""
    owners = sorted({e.name.rpartition(".")[0] for e in extras})
    if "" in owners:
        raise ExportError("an extra tensor belongs to no module, PEFT cannot place it")
    listed = [m for m in adapter.provenance.fields.get("modules_to_save", "").split(",") if m]
    return listed if owners and all(_placed(owner, listed) for owner in owners) else owners


def _placed(owner: str, modules: list[str]) -> bool:
    """Return True if PEFT's rule (a module's path ends with a listed name) saves the module `owner` or one around
    it."""
    parts = owner.split(".")
    paths = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(path.endswith(m) for path in paths for m in modules)
