"""Modules of diffusion transformers with the names of the model's own code, on a base that has diffusers'.

A reader names a target as its file does, after the model of the base (`own_name`); when all are read, `translated`
makes of each the modules that it is in the base: a fused layer becomes its parts, with what rides along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lrconvert.core.errors import UnsupportedLoraError
from lrconvert.formats.families import base as families
from lrconvert.formats.families.base import DIFFUSERS
from lrconvert.formats.families.shared import translate
from lrconvert.formats.families.shared.table import filled
from lrconvert.formats.families.shared.translate import Piece, Reading
from lrconvert.formats.readers.shared.naming import BaseNames, Component
from lrconvert.lora.adapter import ExtraTensor, LoraTarget


def _readings(component: Component) -> list[Reading]:
    """Return the schemes of a model's family that are not diffusers'."""
    family = families.of_class(component.config.get("_class_name"))
    if family is None:
        return []
    name = next(name for name, one in families.families().items() if one is family)
    return [Reading(name, family, scheme) for scheme in family.schemes if scheme != DIFFUSERS]


def own_name(module: str, component: Component, is_flat: bool) -> str | None:
    """Return a module's name with dots, in the scheme of the model's own code; one of diffusers' where underscores are
    written and the base does not say its names. None if it has neither."""
    family = families.of_class(component.config.get("_class_name"))
    if family is None:
        return None
    plain = family.schemes[DIFFUSERS].find(module, is_flat)
    if plain:
        return filled(plain[0][0].name, plain[0][1]) if is_flat and not component.shapes else None
    every = (scheme.find(module, is_flat) for scheme in family.schemes.values())
    return next((filled(hits[0][0].name, hits[0][1]) for hits in every if hits), None)


def translated(
    targets: Sequence[LoraTarget], extras: Sequence[ExtraTensor], base: BaseNames
) -> tuple[list[LoraTarget], list[ExtraTensor], str]:
    """Return the targets and extra tensors under the names of the base, and the scheme that they had, "" if it was
    diffusers'. Raises E-BASE, E-PAIR, E-LORA-FEATURE."""
    moved: list[LoraTarget] = []
    beside: dict[str, list[ExtraTensor]] = {}
    for extra in extras:
        beside.setdefault(extra.name, []).append(extra)
    scheme = ""
    for pair in targets:
        where = _place(pair.target.name, base)
        if where is None:
            moved.append(pair)
            continue
        component, module, readings = where
        shape = pair.target.matrix_shape
        reading = next((one for one in readings if one.place(module, shape, False)), None)
        if reading is None:
            what = (
                f"{pair.target.name!r:.160} is {list(shape)} (out, in), and no layer of {readings[0].family.title} is"
            )
            raise UnsupportedLoraError(what, fix="is this the adapter's own base?")
        scheme = reading.scheme
        piece = translate.piece_of(pair, module, beside)
        parts = translate.to_parts(piece, reading, is_flat=False)
        for extra in piece.extras.values():
            beside[extra.name].remove(extra)
        for part in parts:
            moved.append(_placed(part, component, beside))
    left = [extra for every in beside.values() for extra in every]
    return moved, [_renamed(extra, base) for extra in left], scheme


def _place(name: str, base: BaseNames) -> tuple[Component, str, list[Reading]] | None:
    """Return the model of a target, its module there, and the schemes in which that may be a name; None if it has
    diffusers' name."""
    for component in base.components:
        front = component.full("")
        if name.startswith(front):
            module = name[len(front) :].removesuffix(".weight")
            readings = [one for one in _readings(component) if one.family.schemes[one.scheme].find(module, False)]
            known = readings and readings[0].family.schemes[DIFFUSERS].find(module, False)
            return (component, module, readings) if readings and not known else None
    return None


def _placed(part: Piece, component: Component, beside: dict[str, list[ExtraTensor]]) -> LoraTarget:
    """Put a part on its module of the base, and what rides along into `beside`."""
    module = component.dotted(part.module)
    for extra in part.extras.values():
        leaf = extra.name.rpartition(".")[2]
        name = component.full(f"{module}.{leaf}")
        beside.setdefault(name, []).append(replace(extra, name=name))
    return component.placed(part.pair, module)


def _renamed(extra: ExtraTensor, base: BaseNames) -> ExtraTensor:
    """A tensor of a module without factors: a norm's, mostly."""
    owner, _, leaf = extra.name.rpartition(".")
    where = _place(owner, base)
    if where is None:
        return extra
    component, module, readings = where
    line, numbers = readings[0].family.schemes[readings[0].scheme].find(module, False)[0]
    if len(line.parts) > 1 or line.is_swapped:
        what = f"{extra.name!r:.160} is of a layer that the base has in parts, and has no factors beside it"
        raise UnsupportedLoraError(what, fix="merge it with the tool that trained it")
    return replace(extra, name=component.full(f"{component.dotted(filled(line.parts[0], numbers))}.{leaf}"))
