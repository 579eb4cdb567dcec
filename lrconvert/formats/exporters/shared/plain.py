"""Pieces that the layouts of plain factors share: the expansion of an adapter, one rank for all, refusals by name."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import ExportError
from lrconvert.core.wording import spelled
from lrconvert.formats.exporters.base import ExportOptions
from lrconvert.lora.adapter import CompactAdapter, Target
from lrconvert.methods import base as methods

_USES = {
    "replace": "a saved tensor",
    "add": "the bias of a LoRA",
    "magnitude": "a DoRA magnitude",
    "rows": "trained rows of an embedding",
    "row_indices": "trained rows of an embedding",
}


@dataclass(frozen=True)
class Pair:
    """The factors of one target, scale included: `a` (r, in) and `b` (out, r) in float32; the update is ``b @ a``."""

    target: Target
    a: Array
    b: Array

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def padded(self, rank: int) -> Pair:
        """Return the same product with zero rows of A and columns of B up to `rank`."""
        more = rank - self.rank
        return replace(self, a=np.pad(self.a, ((0, more), (0, 0))), b=np.pad(self.b, ((0, 0), (0, more))))


def expanded(compact: CompactAdapter) -> list[Pair]:
    """Return the factors of every target. Raises E-OPTION for updates that depend on the base."""
    return [Pair(target, a, b) for target, a, b in methods.expand_all(compact)]


def pairs(compact: CompactAdapter, options: ExportOptions) -> list[Pair]:
    """Return the factors of every target with an update, padded with zeros to one rank unless their own are kept.

    Raises E-EXPORT if nothing is left, E-OPTION for a rank that is too small.
    """
    updated = [pair for pair in expanded(compact) if pair.rank]
    if not updated:
        raise ExportError("every target has rank 0, there is nothing to export")
    top = options.rank(max(pair.rank for pair in updated))
    return updated if options.keep_ranks else [pair.padded(top) for pair in updated]


def exclude() -> str:
    """Return the advice for a target that a layout cannot name."""
    return f"convert again with {spelled('exclude', ...)} for it, or merge the adapter into the base"


def refuse_extras(compact: CompactAdapter, layout: str, allowed: Collection[str] = ()) -> None:
    """Raise E-EXPORT for the first tensor beside the factors that has no place in `layout`."""
    for extra in compact.extras:
        if extra.use not in allowed:
            baking = extra.use == "magnitude"
            raise ExportError(
                f"{layout} has no place for {_USES[extra.use]}: {extra.name!r:.120}",
                fix=f"convert again with {spelled('bake_dora', ...)}"
                if baking
                else "export to peft-lora, or merge it into the base",
            )


def module_of(target: Target, layout: str) -> str:
    """Return the module whose weight a target is. Raises E-EXPORT for a parameter of its own, or a slice or entry of
    one, and for a name that no module can have."""
    module = target.name.removesuffix(".weight")
    if not all(module.split(".")):
        raise ExportError(f"{target.name!r:.120} has an empty part, and no module can be called so", fix=exclude())
    if module == target.name:
        raise ExportError(f"{target.name!r:.120} is no module's weight, {layout} cannot name it", fix=exclude())
    if target.view.kind not in ("matrix", "transposed", "conv"):
        what = f"{target.name!r:.120} is updated in a part ({target.view.text}), which {layout} cannot express"
        raise ExportError(what, fix=exclude())
    return module


def unfolded(pair: Pair, layout: str) -> tuple[Array, Array]:
    """Return the factors in the shapes of two layers one after the other: (r, in, kernel) and (out, r, 1, 1) for a
    convolution, as they are otherwise. Raises E-EXPORT for a convolution in groups."""
    target = pair.target
    if target.view.kind != "conv":
        return pair.a, pair.b
    if target.view.text.rpartition(":")[2] != "1":
        raise ExportError(f"{target.name!r:.120} is a convolution in groups, {layout} has none", fix=exclude())
    kernel = target.shape[2:]
    return pair.a.reshape(pair.rank, -1, *kernel), pair.b.reshape(-1, pair.rank, *(1 for _ in kernel))
