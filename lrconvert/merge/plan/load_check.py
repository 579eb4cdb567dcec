"""A check that a merged model loads: its names and shapes against transformers' class of it, on the meta device.

A base may itself have tensors that its class lacks, or lack some (tables that are computed, experts that transformers
stacks as it loads): what the base does not load as it is, is no fault of the merge. So the merged model is compared
with the base: nothing may be missing or unexpected, or have another shape than the class, that was right before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lrconvert.core.errors import PlacementError
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.lora import architecture, renamings, ties
from lrconvert.lora.name_index import NameIndex
from lrconvert.lora.ties import BaseClass

_FIX = "merge with PEFT, or report the architecture: lrconvert cannot place this adapter in it"

_RESIZE = "resize the base first: model.resize_token_embeddings({}), save it, and merge into that"


@dataclass(frozen=True)
class Named:
    """A tensor of a merged model, and the one of the base that it is or starts from, "" for one from elsewhere."""

    name: str
    shape: tuple[int, ...]
    base: str = ""


def merged_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with fields set, or removed where the change is None."""
    return {key: value for key, value in {**config, **changes}.items() if changes.get(key, ...) is not None}


def is_as_base(tensors: Iterable[Named], checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Return whether a model has exactly the names, shapes and configuration of its base, so that it loads as that."""
    stored = {name: info.shape for name, info in checkpoint.tensors.items()}
    return {each.name: each.shape for each in tensors} == stored and dict(config) == dict(checkpoint.config)


def check(tensors: list[Named], checkpoint: Checkpoint, config: Mapping[str, Any]) -> str:
    """Raise E-PLACE if a merged model would not load as its base does. Returns a warning if that cannot be told."""
    if is_as_base(tensors, checkpoint, config):
        return ""
    found = problems(tensors, checkpoint, config)
    if found is None:
        named = (config.get("architectures") or ["of its configuration"])[0]
        return f"transformers has no class {named!s:.80}: names and shapes of the merged model are not checked"
    if found:
        size = config.get("vocab_size")
        fix = _FIX if size == checkpoint.config.get("vocab_size") else _RESIZE.format(size)
        raise PlacementError(f"the merged model would not load: {found[0]}", fix=fix, path=checkpoint.root)
    return ""


def problems(tensors: list[Named], checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return in words what of a merged model does not load and did in the base; None if transformers has no class for
    it."""
    after = ties.of(config)
    if after is None:
        return None
    known = ties.of(checkpoint.config) or _bare(checkpoint.config)
    own = [Named(name, info.shape, name) for name, info in checkpoint.tensors.items()]
    excused = {} if known is None else _misfits(own, known)
    found = _misfits(tensors, after)
    title = after.architecture.name
    return tuple(
        f"{text} {title}"
        for key, text in found.items()
        if key not in excused and not (key[0] == "lacks" and known and ("lacks", known.find(key[1]) or "") in excused)
    )


def _bare(config: Mapping[str, Any]) -> BaseClass | None:
    """The class without a head of a configuration that names none."""
    found = architecture.of(config)
    index = None if found is None else NameIndex(found.shapes.keys(), renamings.families(config))
    return None if found is None or index is None else BaseClass(found, index)


def _misfits(tensors: Iterable[Named], known: BaseClass) -> dict[tuple[str, str], str]:
    """Return what does not fit a class, in words, by its kind and the tensor's name in the base or in the class."""
    found: dict[tuple[str, str], str] = {}
    shapes, there = known.architecture.shapes, set()
    for each in tensors:
        place = known.find(each.name)
        if place is None:
            found["unexpected", each.base or each.name] = f"{each.name!r} is not in"
        else:
            there.add(place)
            if shapes[place] != each.shape:
                wanted = f"{each.name!r} is {list(each.shape)}, and {list(shapes[place])} in"
                found["shape", each.base or each.name] = wanted
    for name in shapes.keys() - there:
        if known.architecture.shared_with(name).isdisjoint(there):
            found["lacks", name] = f"{name!r} is missing in the tensors of"
    return dict(sorted(found.items(), key=str))
