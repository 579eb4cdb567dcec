"""Pieces that the layouts of plain factors share: the expansion of an adapter, one rank for all, refusals by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lrconvert.core.dtypes import Array, decode, round_to
from lrconvert.core.errors import ExportError
from lrconvert.core.wording import spelled
from lrconvert.formats.exporters.base import ExportOptions
from lrconvert.formats.exporters.shared.files import Entry
from lrconvert.lora.adapter import MAGNITUDES, Adapter, ExtraTensor, LoraAdapter, Target
from lrconvert.methods import base as methods

_USES = {
    "replace": "a saved tensor",
    "add": "the bias of a LoRA",
    "magnitude": "a DoRA magnitude",
    "input_magnitude": "a DoRA magnitude of inputs",
    "textual_inversion": "the embedding of a word",
    "rows": "trained rows of an embedding",
    "row_indices": "trained rows of an embedding",
}


_DORA = {"magnitude": "peft-lora, diffusers or kohya", "input_magnitude": "kohya"}


@dataclass(frozen=True)
class Pair:
    """The factors of one target: `a` (r, in) and `b` (out, r) in float32 or float64; the update is ``scale * b @ a``.
    `dtype` is the narrowest that holds both: that in which a LoRA stores them, F32 of a compact adapter."""

    target: Target
    a: Array
    b: Array
    scale: float = 1.0
    dtype: str = "F32"

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def padded(self, rank: int) -> Pair:
        """Return the same product with zero rows of A and columns of B up to `rank`."""
        more = rank - self.rank
        return replace(self, a=np.pad(self.a, ((0, more), (0, 0))), b=np.pad(self.b, ((0, 0), (0, more))))


@dataclass(frozen=True)
class Factors:
    """The content of a file: pairs whose scale it states, `scale` where it is one for all, the `dtype` that keeps
    them, and notes for the user, a line each."""

    pairs: list[Pair]
    scale: float
    dtype: str
    notes: tuple[str, ...] = ()


Stated = Callable[[Pair], float]


def unscaled(pair: Pair) -> float:
    """Return the scale that a layout states which states none."""
    return 1.0


def expanded(adapter: Adapter) -> list[Pair]:
    """Return the factors of every target, of a LoRA with their own scale. Raises E-OPTION for updates that depend on
    the base."""
    if isinstance(adapter, LoraAdapter):
        return [Pair(t.target, t.A, t.B, t.scale, _wider(t.a.dtype, t.b.dtype)) for t in adapter.targets]
    return [Pair(target, a, b) for target, a, b in methods.expand_all(adapter)]


def factors(adapter: Adapter, options: ExportOptions, stated: Stated | None = None) -> Factors:
    """Return the factors of every target with an update, padded with zeros to one rank unless their own are kept.

    `stated` is the scale that the layout states for a pair; without it one for all. Raises E-EXPORT if nothing is left,
    E-OPTION for a rank that is too small.
    """
    scaled = {extra.name for extra in adapter.extras if extra.use in MAGNITUDES}  # an update even at rank 0
    every = [pair if pair.rank or pair.target.name not in scaled else pair.padded(1) for pair in expanded(adapter)]
    updated = [pair for pair in every if pair.rank]
    if not updated:
        raise ExportError("every target has rank 0, there is nothing to export")
    top = options.rank(max(pair.rank for pair in updated))
    made = settled(updated, options, stated)
    return made if options.keep_ranks else replace(made, pairs=[pair.padded(top) for pair in made.pairs])


def settled(pairs: Sequence[Pair], options: ExportOptions, stated: Stated | None = None) -> Factors:
    """Return the pairs with the scale that the layout states, what it leaves multiplied into B.

    Without `stated` the layout states one scale: that of all, else 1. Without a dtype in the options the factors keep
    their own, all bits of them, unless B would be rounded by that: then it is F32, with a note.
    """
    scales = {pair.scale for pair in pairs if pair.rank}
    common = scales.pop() if stated is None and len(scales) == 1 else 1.0
    common = common if 0 < common < math.inf else 1.0  # programs take an alpha of zero for none
    one = stated or (lambda pair: common)
    made = [_with_scale(pair, one(pair)) for pair in pairs]
    own = functools.reduce(_wider, {pair.dtype for pair in pairs if pair.rank}, "")
    changed = [pair for before, pair in zip(pairs, made, strict=True) if pair.b is not before.b]
    if options.dtype is not None:
        exact = own in (options.dtype, "F16", "BF16") and options.dtype in (own, "F32") and not changed
        return Factors(made, common, options.dtype, () if exact else (f"factors are rounded to {options.dtype}",))
    if own == "F64":
        return Factors(made, common, "F32", ("factors are stored in F64, which is rounded to F32",))
    if all(_holds(own, pair.b) for pair in changed):
        return Factors(made, common, own)
    dtype = "in F32" if own == "F32" else f"which is F32 for that, not {own} as stored"
    return Factors(made, common, "F32", (f"scales that the layout cannot state are multiplied into B, {dtype}",))


def _with_scale(pair: Pair, stated: float) -> Pair:
    """The same update with this scale."""
    if pair.scale == stated:
        return pair
    return replace(pair, b=pair.b.astype(np.float64) * (pair.scale / stated), scale=stated)


def _wider(one: str, other: str) -> str:
    """The dtype that holds the numbers of both."""
    if one == other or not one:
        return other
    return "F64" if "F64" in (one, other) else "F32"


def _holds(dtype: str, values: Array) -> bool:
    return bool(np.array_equal(decode(round_to(values, dtype), dtype), values))


def alpha_of(scale: float, rank: int) -> float:
    """Return alpha, for which alpha / rank is `scale`: a whole number where that is one."""
    near = scale * rank
    for alpha in (round(near), near, math.nextafter(near, 0), math.nextafter(near, math.inf)):
        if alpha / rank == scale:
            return alpha
    return near


def exclude() -> str:
    """Return the advice for a target that a layout cannot name."""
    return f"convert it with {spelled('exclude', ...)} for that, or merge the adapter into the base"


def refuse_extras(adapter: Adapter, layout: str, allowed: Collection[str] = ()) -> None:
    """Raise E-EXPORT for the first tensor beside the factors that has no place in `layout`."""
    for extra in adapter.extras:
        if extra.use not in allowed:
            baking, word = extra.use in MAGNITUDES, extra.use == "textual_inversion"
            fix = "export to kohya or diffusers" if word else "export to raw or peft-lora, or merge it into the base"
            raise ExportError(
                f"{layout} has no place for {_USES[extra.use]}: {extra.name!r:.120}",
                fix=f"convert it with {spelled('bake_dora', ...)}, or export to {_DORA[extra.use]}" if baking else fix,
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


def magnitudes(adapter: Adapter) -> dict[str, ExtraTensor]:
    """Return DoRA's magnitudes by the name of their target. Raises E-EXPORT for those of another layer."""
    counts = {
        (target.name, use): count
        for target in adapter.shapes()
        for use, count in zip(MAGNITUDES, (target.out_features, target.channels), strict=True)
    }
    scaled = {extra.name: extra for extra in adapter.extras if extra.use in MAGNITUDES}
    for extra in scaled.values():
        if math.prod(extra.shape) != counts.get((extra.name, extra.use)):
            what = (
                f"the DoRA magnitudes of {extra.name!r:.120} are {list(extra.shape)}, which its layer has no place for"
            )
            raise ExportError(what, fix="convert the adapter again: its file is of two")
    return scaled


def embeddings(adapter: Adapter) -> list[Entry]:
    """Return the embeddings of words that an adapter carries, under their own names."""
    return [(e.name, e.dtype, e.shape, e.data) for e in adapter.extras if e.use == "textual_inversion"]
