"""Adapters of other kinds in PEFT's folders: their configuration in the words of a LoRA's, and their tensors by module.

Names are ``base_model.model.<module>.<part>``, with the adapter's name behind or without it. What is no part rides
along, as in a LoRA's folder.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lrconvert.core.errors import EmptyAdapterError, LrcError, NotLoraError, TensorUnknownError
from lrconvert.formats.readers.peft import extras, names
from lrconvert.formats.readers.peft.config import Settings, parse, provenance_fields
from lrconvert.formats.readers.shared import kinds
from lrconvert.formats.readers.shared.config import check_known
from lrconvert.formats.readers.shared.folders import WEIGHT_SUFFIXES, config_path, peft_type
from lrconvert.formats.readers.shared.notes import beside, notes_of
from lrconvert.formats.readers.shared.pairs import all_zero, put_once, sort_extras
from lrconvert.formats.readers.shared.weights import Weights, source_digest
from lrconvert.io.container import TensorInfo, read_json
from lrconvert.lora.adapter import MATRIX, TRANSPOSED, ExtraTensor, LoraAdapter, LoraTarget, Provenance

# Fields that every kind has: those that a LoRA's configuration takes as they are, and those without an effect.
_SHARED = ("auto_mapping", "base_model_name_or_path", "modules_to_save", "peft_version", "revision", "task_type")
_NO_EFFECT = frozenset(
    (
        *("bias", "exclude_modules", "inference_mode", "init_weights", "layers_pattern", "layers_to_transform"),
        *("peft_type", "target_modules"),
    )
)


@dataclass
class Sorted:
    """The tensors of a file. `modules`: parts by module. `whole`: parts of the whole adapter, by name."""

    modules: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    whole: dict[str, TensorInfo] = field(default_factory=dict)
    others: dict[str, list[TensorInfo]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def is_of_kind(path: Path, kind: str) -> bool:
    """Return whether a folder, or the folder of a file of weights, has a configuration of this `peft_type`."""
    if path.is_dir():
        return peft_type(path) == kind
    return path.name.endswith((*WEIGHT_SUFFIXES, ".json")) and peft_type(path.parent) == kind


def settings_of(
    path: Path, kind: str, own: Mapping[str, str], unread: Collection[str]
) -> tuple[dict[str, Any], Settings]:
    """Return the configuration at `path`, also as that of a LoRA: `own` fields by the name that a LoRA has for them,
    `unread` without an effect. Raises E-NOT-LORA for another kind, E-CONFIG, E-LORA-FEATURE, E-PATTERN."""
    place = config_path(path)
    config = read_json(place)
    try:
        if config.get("peft_type") != kind:
            raise NotLoraError(f"peft_type is {config.get('peft_type')!r:.60}, expected {kind}")
        check_known(config, {*_NO_EFFECT, *_SHARED, *own, *unread})
        taken = {theirs: config[ours] for ours, theirs in own.items() if config.get(ours) is not None}
        shared = {key: config[key] for key in _SHARED if key in config}
        return config, parse({"r": 1, "lora_alpha": 1, **shared, **taken, "peft_type": "LORA"})
    except LrcError as error:
        raise error.at(place) from None


def sort(weights: Weights, parts: Sequence[str], whole: Sequence[str] = ()) -> Sorted:
    """Return the tensors of a file by what they are. Raises E-TENSOR for names without PEFT's prefix, E-NOT-LORA and
    E-LORA-FEATURE for parts of other kinds, E-EMPTY without a module."""
    places = Sorted()
    part = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(parts)})(?:\.[^.]+)??(?:\.weight)?")
    shared = re.compile(rf"(?:base_model\.(?:model\.)?)?(?P<part>{'|'.join(whole)})(?:\.[^.]+)?") if whole else None
    for info in weights.tensors:
        if shared is not None and (match := shared.fullmatch(info.name)):
            put_once(places.whole, match["part"], info)
            continue
        name = info.name.removeprefix(names.PREFIX)
        if name == info.name or not name:
            what = f"tensor {info.name!r:.200} does not begin with {names.PREFIX!r}"
            raise TensorUnknownError(what, fix="is this a PEFT file?")
        if match := part.fullmatch(name):
            put_once(places.modules.setdefault(match["module"], {}), match["part"], info)
        elif ".original_module." in name:
            places.unused.append(name)
        else:
            kinds.refuse_parts([name])
            places.others.setdefault(names.without_wrapper(name, "default"), []).append(info)
    if not places.modules:
        raise EmptyAdapterError("the file holds no part of any module", fix="was it saved empty?")
    places.modules = dict(sorted(places.modules.items()))
    return places


def build(
    weights: Weights,
    places: Sorted,
    targets: Sequence[LoraTarget],
    config: Mapping[str, Any],
    settings: Settings,
    more: Sequence[ExtraTensor] = (),
) -> LoraAdapter:
    """Return the LoRA, with what rides along. Raises E-TENSOR, E-IO-CHANGED."""
    carried = sort_extras([*extras.read_extras(places.others, weights), *more])
    fields = provenance_fields(config, settings) | {"source_format": f"peft-{str(config['peft_type']).lower()}"}
    source = Provenance(source_digest(weights), settings.base_model, settings.revision, settings.task_type, fields)
    lines = [*all_zero(targets), *notes_of(weights), *beside(places.others)]
    if places.unused:
        lines.append(
            f"{len(places.unused)} tensors are not part of the model and are left out, {places.unused[0]} for one"
        )
    return LoraAdapter(tuple(sorted(targets, key=lambda pair: pair.target)), carried, source, tuple(lines))


def turned(pair: LoraTarget, transposed: bool) -> LoraTarget:
    """Return the pair on a weight that is stored (in, out), if the configuration claims that; the base settles it."""
    if not transposed or pair.target.view != MATRIX:
        return pair
    return replace(pair, target=replace(pair.target, shape=pair.target.shape[::-1], view=TRANSPOSED))
