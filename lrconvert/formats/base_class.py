"""An adapter under the names that the base's class has in memory, and what a file notes of them.

Targets of a file keep the names of their source, which is what it is compared with. Where the base was given when the
file was made, it notes how they become those of the class; where it is given for an export, the class is asked then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from lrconvert.core.wording import spelled
from lrconvert.lora import class_names
from lrconvert.lora.adapter import Adapter, CompactAdapter, ExtraTensor, LoraAdapter, Provenance
from lrconvert.lora.class_names import Renaming

NAMES = "class_names"  # the field of the provenance with a renaming
_EXPERTS = ("expert", "expert_transposed")


def noted(lora: LoraAdapter, config: Mapping[str, Any], stored: Collection[str] = ()) -> LoraAdapter:
    """Return `lora` with notes of what the class of a base with this config.json calls its targets, and of the class
    itself where experts are adapted, whose order PEFT asks it for. `stored` are the names that the base stores."""
    names = [target.name for target in lora.shapes()]
    found = class_names.renaming(lora.shapes(), config, lora.provenance.task_type, stored)
    fields = dict(lora.provenance.fields)
    if text := class_names.as_text(found.new, names):
        fields[NAMES] = text
    if any(target.view.kind in _EXPERTS for target in lora.shapes()):
        title = found.title or next((one.title for one in class_names.classes(config)), "")
        if title and (library := class_names.library(title)):
            fields |= {"base_model_class": title, "parent_library": library}
    return replace(lora, provenance=replace(lora.provenance, fields=fields))


def renamed(adapter: Adapter, config: Mapping[str, Any] | None) -> tuple[Adapter, tuple[str, ...]]:
    """Return `adapter` with the names of the class of its base, and notes for the user: the base with this config.json,
    or that which it was made with."""
    names = [target.name for target in adapter.shapes()]
    every = {*names, *(extra.name for extra in adapter.extras)}
    text = adapter.provenance.fields.get(NAMES, "")
    notes: tuple[str, ...] = ()
    if config is not None:
        found = class_names.renaming(adapter.shapes(), config, adapter.provenance.task_type)
        if found.title:  # extra tensors, heads above all, may be of no class
            also = [name for name in every if name not in names]
            found = replace(found, new={**found.new, **_beside(also, found, config, adapter.provenance.task_type)})
        if found.lost:
            what = f"{len(found.lost)} targets are no parameters of {found.title} and keep their names"
            notes = (f"{what}, {found.lost[0]!r:.120} for one",)
    elif text:
        found = Renaming("its base", {name: class_names.from_text(text, name) for name in every})
    else:
        if isinstance(adapter, CompactAdapter) and not adapter.base.content:  # of a LoRA its reader says it
            notes = (
                "names were not checked: no base was given, and programs find modules by their whole names; "
                f"{spelled('base', ...)} does it, its config.json is enough",
            )
        return adapter, notes
    changed = next((name for name in names if found(name) != name), None)
    if changed is None:
        return adapter, notes
    keep = spelled("keep_names", True)
    note = f"names are those of {found.title}: {changed!r:.120} is {found(changed)!r:.120} ({keep} keeps them)"
    return _with_names(adapter, found), (note, *notes)


def _beside(names: Collection[str], found: Renaming, config: Mapping[str, Any], task: str) -> dict[str, str]:
    """The new names of extra tensors that the class has."""
    one = next((one for one in class_names.classes(config, task) if one.title == found.title), None)
    every = {name: found.new.get(name) or (one.find(name) if one is not None else None) for name in names}
    return {name: new for name, new in every.items() if new is not None}


def renamed_by(adapter: Adapter, rename: Callable[[str], str]) -> Adapter:
    """Return `adapter` with the names of its targets and extra tensors changed."""
    every = [*(target.name for target in adapter.shapes()), *(extra.name for extra in adapter.extras)]
    return _with_names(adapter, Renaming("", {name: rename(name) for name in every}))


def _with_names(adapter: Adapter, found: Renaming) -> Adapter:
    """The adapter under other names, in the same order."""
    extras = tuple(_extra(extra, found) for extra in adapter.extras)
    shapes = [replace(target, name=found(target.name)) for target in adapter.shapes()]
    named = replace(adapter, extras=extras, provenance=_provenance(adapter.provenance, found))
    if isinstance(named, CompactAdapter):
        return replace(named, targets=tuple(shapes))
    pairs = zip(named.targets, shapes, strict=True)
    return replace(named, targets=tuple(replace(pair, target=shape) for pair, shape in pairs))


def _extra(extra: ExtraTensor, found: Renaming) -> ExtraTensor:
    """An extra tensor under its new name; the bias of a layer goes with its weight."""
    owner, _, leaf = extra.name.rpartition(".")
    weight = found(f"{owner}.weight")
    along = f"{weight.removesuffix('.weight')}.{leaf}" if weight != f"{owner}.weight" else extra.name
    return replace(extra, name=found.new.get(extra.name, along))


def _provenance(provenance: Provenance, found: Renaming) -> Provenance:
    """The notes that name modules or parameters, under the new names."""
    fields = dict(provenance.fields)
    for key, ending in (("embeddings", ".weight"), ("modules_to_save", ".weight"), ("target_parameters", "")):
        if listed := fields.get(key, ""):
            names = [found(name + ending).removesuffix(ending) for name in listed.split(",")]
            fields[key] = ",".join(names)
    fields.pop(NAMES, None)
    return replace(provenance, fields=fields)
