"""Resolve llama.cpp's names of parameters to those of transformers, and put rows back in transformers' order.

The table is `lrconvert.formats.gguf_names`, by which the exporter goes the other way.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lrconvert.core.errors import BaseError, ConfigError
from lrconvert.formats import gguf_names
from lrconvert.formats.gguf_names import Family
from lrconvert.formats.readers.shared.naming import Component
from lrconvert.lora.adapter import LoraTarget

KNOWN = frozenset(family.id for family in gguf_names.FAMILIES.values())


def reorders(architecture: str) -> bool:
    """Return whether rows of attn_q and attn_k may be in llama.cpp's own order."""
    families = [family for family in gguf_names.FAMILIES.values() if family.id == architecture]
    return not families or any(family.rows for family in families)


def placed(pair: LoraTarget, name: str, architecture: str, component: Component) -> LoraTarget:
    """Put `pair`, of llama.cpp's module `name`, on a base. Raises E-BASE for architectures and modules that are not
    known and for bases of another family."""
    family = family_of(architecture, component)
    order = family.rows.get(name.rpartition(".")[2])
    if order is not None:
        pair = in_order(pair, order, component)
    return component.placed(pair, _module(name, family, component))


def family_of(architecture: str, component: Component) -> Family:
    """Return the family of the base, which must be that of the adapter. Raises E-BASE for architectures that are not
    known and for bases of another family."""
    if architecture not in KNOWN:
        fix = f"known: {', '.join(sorted(KNOWN))}; convert the adapter that the GGUF file was made of instead"
        raise BaseError(f"the names of llama.cpp's architecture {architecture!r:.60} are not known here", fix=fix)
    family = gguf_names.family_of(component.config)
    if family is None or family.id != architecture:
        theirs = component.config.get("model_type")
        what = f"the adapter is for llama.cpp's {architecture}, the base is of the family {theirs!r:.60}"
        raise BaseError(what, fix="give the adapter's own base", path=component.root)
    return family


def _module(name: str, family: Family, component: Component) -> str:
    """Return the module of the base. Raises E-BASE."""
    modules = family.modules(name)
    if not modules:
        raise BaseError(f"the module {name!r:.120} of {family.id} is not known here", path=component.root)
    present = [module for module in modules if f"{module}.weight" in component.shapes]
    return component.dotted(present[0] if present else modules[0])


def in_order(pair: LoraTarget, order: str, component: Component) -> LoraTarget:
    """Put the rows of B in transformers' order, from one of `gguf_names`. Raises E-BASE."""
    rows = pair.b.array
    try:
        index = gguf_names.row_order(order, rows.shape[0], component.config)
    except ConfigError as error:
        raise BaseError(f"{pair.target.name}: {error.what}", path=component.root) from None
    ours = np.empty_like(rows)
    ours[index] = rows
    return replace(pair, b=replace(pair.b, array=ours))
