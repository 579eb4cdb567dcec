"""Checks that an adapter was made for the model that a server has loaded.

Names decide where both have one: a hub id as a whole, a folder by its last part. Where a file notes no base, or a
folder is served whose name says nothing, the targets of the adapter have to be parameters of that folder, in their
shapes. What cannot be told is allowed, with a line in the log.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lrconvert.core.errors import BaseError, FingerprintError, LrcError, OrientationError
from lrconvert.io import hub
from lrconvert.io.checkpoint import Checkpoint, is_without_weights, open_checkpoint, quantization_name
from lrconvert.lora.adapter import CompactAdapter
from lrconvert.lora.base_names import resolve

log = logging.getLogger(__name__)

_CACHED = re.compile(r"models--([^/]+?)--([^/]+)(?:/snapshots/[^/]+)?/?$")


def check_base(
    facts: Mapping[str, Any], load: Callable[[], CompactAdapter], served: str, aliases: Collection[str] = ()
) -> None:
    """Raise E-FPR if the adapter of these facts is none for the model `served`, a hub id or a folder, which has the
    `aliases`, too (``*``: any base will do)."""
    if "*" in aliases or not served:
        return
    noted = str(facts["base"]["model"])
    if noted and any(_same(noted, name) for name in (served, *aliases)):
        return
    if noted and not _is_folder(served):
        raise FingerprintError(
            f"it was made for {noted!r:.120}, and {served!r:.120} is served",
            fix=f"if they are the same, set LRCONVERT_BASE_NAMES={noted:.120}",
        )
    _check_parameters(load, noted or "a base that it does not name", served)


def _same(one: str, other: str) -> bool:
    """Say whether two names mean one model; a folder has no more of a name than its last part."""
    one, other = _plain(one), _plain(other)
    if _is_folder(one) or _is_folder(other) or "/" not in one or "/" not in other:
        one, other = (name.replace("\\", "/").rpartition("/")[2] for name in (one, other))
    return one.casefold() == other.casefold()


def _plain(name: str) -> str:
    """A name without what is no part of it; of a folder in the hub's cache its id."""
    name = name.rstrip("/")
    cached = _CACHED.search(name)
    return f"{cached[1]}/{cached[2]}" if cached else name


def _is_folder(name: str) -> bool:
    return hub.is_private(name) or Path(name).is_dir()


def _check_parameters(load: Callable[[], CompactAdapter], noted: str, served: str) -> None:
    """Raise E-FPR if the targets of the adapter are no parameters of the model, where its folder tells."""
    try:
        checkpoint = _weights(served)
    except LrcError as error:
        log.warning("the adapter is for %s; whether that is %s cannot be told: %s", noted, served, error)
        return
    if checkpoint is None:
        log.warning("the adapter is for %s; whether that is %s cannot be told", noted, served)
        return
    with checkpoint:
        try:
            resolve(load(), checkpoint)
        except (BaseError, OrientationError) as error:
            what = f"it is for {noted:.120}, and does not fit {served!r:.120}: {error.what}"
            raise FingerprintError(what, fix="serve it on its own base") from None
    log.info("the adapter is for %s; it fits %s, of which no more is known", noted, served)


def _weights(served: str) -> Checkpoint | None:
    """The headers of a model that is here, None if it is not, has no weights, or quantized ones, whose shapes say
    nothing. Raises what opening it raises."""
    root = hub.locate(served)
    if not root.is_dir() or is_without_weights(root):
        return None
    checkpoint = open_checkpoint(root, quantized=True)
    if not quantization_name(checkpoint.config):
        return checkpoint
    with checkpoint:
        return None
