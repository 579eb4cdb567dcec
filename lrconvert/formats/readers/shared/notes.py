"""Settings that a file states beside its tensors and that no reader uses: they are named, never ignored."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from lrconvert.formats.readers.shared.weights import Weights

# Texts about a file, its training and its model that say nothing of the update.
_NO_MEANING = re.compile(
    r"format|lrconvert_.*|ss_(?!network_(?:alpha|dim)$).*|sshs_.*|modelspec\..*|general\..*|tokenizer\..*"
)
_SCALES = ("alpha", "lora_alpha", "scale", "scaling")
_SHOWN = 5


def notes_of(weights: Weights, used: Collection[str] = ()) -> list[str]:
    """Return what the file's names and tensors gave warnings for, and the settings beside them that are not `used`."""
    return [*weights.notes, *unused(weights.metadata, used)]


def beside(names: Iterable[str]) -> list[str]:
    """Return the warning, if any, of tensors that are called like a scale and are none in their layout."""
    scales = [name for name in names if name.rpartition(".")[2] in _SCALES]
    return [f"{len(scales)} tensors ride along and change no scale, {scales[0]!r:.160} for one"] if scales else []


def unused(stated: Mapping[str, object], used: Collection[str]) -> list[str]:
    """Return the warning, if any, of settings that are not among the `used` ones and could mean something."""
    left = {key: value for key, value in stated.items() if key not in used and not _NO_MEANING.fullmatch(key)}
    if not left:
        return []
    shown = ", ".join(f"{key:.60} = {value!s:.40}" for key, value in list(left.items())[:_SHOWN])
    more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    return [f"the file states {shown}{more}, which is not used"]
