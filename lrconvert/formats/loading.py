"""Adapters by their path, in whatever layout: every verb that takes an adapter reads it with this.

The options of a layout (`ReadOptions`) are about files of other tools; an lrconvert file states all of it. Of several
adapters they hold for those of other tools, and are refused where there is none: no option is ignored in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from lrconvert.core.errors import OptionError, UnknownLayoutError
from lrconvert.core.wording import spelled
from lrconvert.formats import model_card
from lrconvert.formats.fleet import names
from lrconvert.formats.fleet import places as fleet_places
from lrconvert.formats.lrc import file
from lrconvert.formats.readers import base as readers
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.io import hub, mistaken
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.methods.shared.plain_lora import plain_lora

AnyPath = str | PathLike[str]
Adapter = LoraAdapter | CompactAdapter


def options(base: object = None, **given: Any) -> ReadOptions:
    """Return the options of a layout. `base` counts if it is a path or a hub id; a live model says no names here."""
    folder = hub.locate(base) if isinstance(base, (str, PathLike)) else None
    return ReadOptions(base=folder, **given)


def load(path: AnyPath, reading: ReadOptions) -> Adapter:
    """Load the adapter at a path or hub id. See `lrconvert.api.load`."""
    return load_all([path], reading)[0]


def load_all(paths: Sequence[AnyPath], reading: ReadOptions) -> list[Adapter]:
    """Load several adapters. Raises E-OPTION for a layout or an alpha where every file is an lrconvert file."""
    members = [fleet_places.read_member(path) for path in paths]
    places = [fleet_places.read_from(path) for path in paths]
    for place, member in zip(places, members, strict=True):
        if member is None and names.is_fleet(place):
            raise UnknownLayoutError("is a fleet, of which a member is read", fix=f"write {place}#NAME", path=place)
    if reading.base is not None:
        for place in places:
            mistaken.check_order(reading.base, place)
    ours = [
        member is not None or (place.is_file() and file.is_lrconvert(place))
        for member, place in zip(members, places, strict=True)
    ]
    if all(ours):
        refuse_options(reading, places[0] if places else None)
    loaded: list[Adapter] = []
    for path, own, member in zip(paths, ours, members, strict=True):
        if member is not None:
            loaded.append(member)
            continue
        with hub.adapter(path) as place:
            loaded.append(file.read(place) if own else _foreign(place, reading))
    return loaded


def refuse_options(reading: ReadOptions, path: Path | None = None) -> None:
    """Raise E-OPTION for a layout, an alpha or a rank where no file of another tool is read."""
    if reading == reading.for_ours():
        return
    if reading.layout is None and reading.alpha is None:
        what = "an adapter keeps its rank" if path is None else "an lrconvert file keeps its rank"
        raise OptionError(what, fix=f"leave {spelled('source_rank')} out", path=path)
    if path is not None:
        raise OptionError("an lrconvert file states its layout and its scales", fix="leave both out", path=path)
    raise OptionError("a layout and an alpha are for files of other tools, and none is read", fix="leave both out")


def lora(item: AnyPath | LoraAdapter, reading: ReadOptions) -> LoraAdapter:
    """Return a LoRA: as it is if it is loaded, else read; a compact one is expanded, with a warning."""
    source = adapter(item, reading)
    return source if isinstance(source, LoraAdapter) else plain_lora(source)


def adapter(item: AnyPath | Adapter, reading: ReadOptions) -> Adapter:
    """Return an adapter: as it is if it is loaded, else read. Raises E-OPTION for the options of one that is loaded."""
    if isinstance(item, (LoraAdapter, CompactAdapter)):
        refuse_options(reading)
        return item
    return load(item, reading)


def _foreign(path: Path, reading: ReadOptions) -> Adapter:
    """Load an adapter of another tool, with the licence that the card beside it states in its provenance."""
    loaded = readers.load(path, reading)
    stated = model_card.licence(path if path.is_dir() else path.parent)
    if not stated:
        return loaded
    return replace(loaded, provenance=replace(loaded.provenance, fields={**stated, **loaded.provenance.fields}))
