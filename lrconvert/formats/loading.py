"""Adapters by their path, in whatever layout: what every verb that takes an adapter reads it with.

What a user may say of a layout (`readers.base.ReadOptions`) is about files of other tools; an lrconvert file states all
of it. Where several adapters are given, it holds for those of other tools, and is refused where there is none: an
option is never without effect in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from lrconvert.core.errors import OptionError
from lrconvert.formats import fidelity, model_card
from lrconvert.formats.lrc import file
from lrconvert.formats.readers import base as readers
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.io import hub
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter

AnyPath = str | PathLike[str]
Adapter = LoraAdapter | CompactAdapter


def options(
    allow_pickle: bool = False, base: object = None, layout: str | None = None, alpha: float | None = None
) -> ReadOptions:
    """What a user says of the files. `base` counts if it is a path or a hub id; a live model says no names here."""
    where = hub.locate(base) if isinstance(base, (str, PathLike)) else None
    return ReadOptions(allow_pickle, where, layout, alpha)


def load(path: AnyPath, said: ReadOptions) -> Adapter:
    """The adapter at a path or hub id. See `lrconvert.api.load`."""
    return load_all([path], said)[0]


def load_all(paths: Sequence[AnyPath], said: ReadOptions) -> list[Adapter]:
    """Several adapters. Raises E-OPTION if a layout or an alpha is said where every file is an lrconvert file."""
    found = [hub.locate(path) for path in paths]
    ours = [where.is_file() and file.is_lrconvert(where) for where in found]
    if all(ours):
        refuse_said(said, found[0] if found else None)
    return [file.read(where) if own else _foreign(where, said) for where, own in zip(found, ours, strict=True)]


def refuse_said(said: ReadOptions, path: Path | None = None) -> None:
    """Raise E-OPTION for a layout or an alpha where no file of another tool is read."""
    if said.layout is None and said.alpha is None:
        return
    if path is not None:
        raise OptionError("an lrconvert file states its layout and its scales", fix="leave both out", path=path)
    raise OptionError("a layout and an alpha are for files of other tools, and none is read", fix="leave both out")


def lora(item: AnyPath | LoraAdapter, said: ReadOptions) -> LoraAdapter:
    """A LoRA: as it is if it is loaded, else read; a compact one is expanded, with a warning."""
    found = adapter(item, said)
    return found if isinstance(found, LoraAdapter) else fidelity.expanded(found)


def adapter(item: AnyPath | Adapter, said: ReadOptions) -> Adapter:
    """An adapter: as it is if it is loaded, else read. Raises E-OPTION for what is said of one that is loaded."""
    if isinstance(item, (LoraAdapter, CompactAdapter)):
        refuse_said(said)
        return item
    return load(item, said)


def _foreign(where: Path, said: ReadOptions) -> Adapter:
    """An adapter of another tool, with the licence that the card beside it states noted in its provenance."""
    found = readers.load(where, said)
    stated = model_card.licence(where if where.is_dir() else where.parent)
    came = found.provenance
    return replace(found, provenance=replace(came, fields={**stated, **came.fields})) if stated else found
