"""Adapters as one model takes them: without parts for other models, and with resized embeddings.

LoRAs on embeddings that had more tokens than the base, or fewer: PEFT stores the resized weight beside the LoRA.

The merged model gets the resized embedding whole, as PEFT computes it: its weight, with the update added and rounded
once to the dtype of the base.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lrconvert.core.dtypes import FLOATS, STORAGE
from lrconvert.io import pipeline
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.io.container import TensorInfo
from lrconvert.lora import base_names
from lrconvert.lora.adapter import ExtraTensor, LoraAdapter
from lrconvert.merge.arithmetic.exact import Update
from lrconvert.merge.plan.updates import Adapter, Piece, Scaled, Source, targets_of
from lrconvert.merge.plan.whole_tensors import cast, no_place
from lrconvert.methods import base as methods

_BASE_LAYER = "base_layer."


@dataclass(frozen=True)
class Settled:
    """`adapter` without the targets of resized embeddings, which are whole tensors in it, `merged` by their names, and
    without what is `elsewhere`, in other models of a pipeline; `kept` are the numbers that its targets have in the
    adapter that was given."""

    adapter: Adapter
    kept: tuple[int, ...]
    merged: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()


def settle(item: Scaled, checkpoint: Checkpoint) -> Settled:
    """Return an adapter as this model takes it: resized embeddings as whole tensors, without parts for other models of
    its pipeline. Raises E-PLACE where that cannot be."""
    adapter = item.adapter
    index = base_names.NameIndex.of(checkpoint)
    others = pipeline.siblings(checkpoint.root)
    if others:
        names = {target.name for target in targets_of(adapter)} | {extra.name for extra in adapter.extras}
        elsewhere = frozenset(n for n in names if n.partition(".")[0] in others and index.find(n) is None)
        if elsewhere:
            return _without(adapter, elsewhere)
    resized: dict[str, tuple[ExtraTensor, TensorInfo]] = {}
    for extra in adapter.extras:
        if extra.use != "replace" or f".{_BASE_LAYER}" not in f".{extra.name}" or not extra.shape:
            continue
        name = extra.name.replace(_BASE_LAYER, "")
        info = checkpoint.tensors.get(index.find(name) or base_names.tied_source(name, checkpoint) or "")
        if info is not None and info.shape[1:] == extra.shape[1:] and info.shape[0] != extra.shape[0]:
            resized[name] = extra, info
    targets = targets_of(adapter)
    if not resized:
        return Settled(adapter, tuple(range(len(targets))))
    parts = {extra.name for extra in adapter.extras if extra.use != "replace"} & resized.keys()
    if parts or methods.needs_base(adapter):
        extra = next(extra for name, (extra, _) in resized.items() if name in parts or not parts)
        rows = extra.shape[0]
        raise no_place(
            extra,
            f"it was trained with {rows} tokens, the base has other than that",
            f"resize the base first: model.resize_token_embeddings({rows}), save it, and merge into that",
        ).at(checkpoint.root)
    source = Source(adapter)
    whole = {extra.name: _merged(name, extra, info, item.scale, source) for name, (extra, info) in resized.items()}
    extras = tuple(whole.get(extra.name, extra) for extra in adapter.extras)
    kept = tuple(number for number, target in enumerate(targets) if target.name not in resized)
    merged = frozenset(target.name for target in targets if target.name in resized)
    if isinstance(adapter, LoraAdapter):
        return Settled(replace(adapter, targets=tuple(adapter.targets[n] for n in kept), extras=extras), kept, merged)
    return Settled(replace(adapter, targets=tuple(targets[n] for n in kept), extras=extras), kept, merged)


def _without(adapter: Adapter, elsewhere: frozenset[str]) -> Settled:
    """Return an adapter without these targets and tensors."""
    targets = targets_of(adapter)
    kept = tuple(number for number, target in enumerate(targets) if target.name not in elsewhere)
    extras = tuple(extra for extra in adapter.extras if extra.name not in elsewhere)
    if isinstance(adapter, LoraAdapter):
        pairs = tuple(adapter.targets[n] for n in kept)
        return Settled(replace(adapter, targets=pairs, extras=extras), kept, elsewhere=elsewhere)
    own = replace(adapter, targets=tuple(targets[n] for n in kept), extras=extras)
    return Settled(own, kept, elsewhere=elsewhere)


def _merged(name: str, extra: ExtraTensor, info: TensorInfo, scale: float, source: Source) -> ExtraTensor:
    """A resized weight with its update."""
    if extra.dtype not in FLOATS or info.dtype not in FLOATS:
        raise no_place(extra, f"it is {extra.dtype}, the base's {info.name!r} {info.dtype}")
    weight = replace(cast(extra, info.dtype), name=name)
    terms = []
    for which, target in enumerate(targets_of(source.adapter)):
        if target.name == name:
            out, inner = target.matrix_shape
            if extra.shape not in ((out, inner), (inner, out)):
                raise no_place(extra, f"it is {list(extra.shape)}, and its update {[out, inner]}")
            turned = extra.shape != (out, inner)
            terms.append(source.term(Piece((0, extra.shape[0]), extra.shape[1], 0, which, scale, turned)))
    if not terms:
        return weight
    stored = np.frombuffer(weight.data, STORAGE[weight.dtype]).reshape(weight.shape)
    merged, _ = Update(terms).add(stored, weight.dtype)
    return replace(weight, data=merged.tobytes())
