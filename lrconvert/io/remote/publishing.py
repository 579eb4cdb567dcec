"""Outputs at URLs: a file is there whole, with the bytes that were meant, or not at all.

Where a store lets a file appear whole (`stores`), it is put under its name, and what the store says of it, or what is
read back, is compared with what was meant; S3 compares the SHA-256 itself before the object is there. Elsewhere it is
put under a name of its own beside (``.NAME.PID.HEX.tmp``), compared, and renamed; what a killed run has left of
such names is removed a day later.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterable
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from lrconvert.core.errors import FileWriteError, LrcError, OutputExistsError, OutputPathError
from lrconvert.core.wording import spelled
from lrconvert.io.remote.listing import CONFIG
from lrconvert.io.remote.opening import open_store
from lrconvert.io.remote.stores import Entry, Store, check_writable
from lrconvert.io.remote.urls import Url

_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")
_MEANWHILE = "was created by another program meanwhile"
_STALE = 86400.0  # seconds


def check_output(url: Url | str, overwrite: bool, *, folder: bool = False) -> None:
    """Raise E-OUT-EXISTS for a file that is there, and of a `folder` for any file in it, E-OUT-PATH for a place without
    a name, E-OPTION where nothing can be written, E-ACCESS, E-REMOTE; before any work."""
    place = open_store(url)
    check_writable(place.url)
    if not place.url.name or (place.url.text.endswith("/") and not folder):
        raise OutputPathError("names no file", fix="write the name of the file at the end", path=place.url)
    if overwrite:
        return
    if place.stat() is not None or (folder and next(place.walk(), None) is not None):
        raise _exists(place)


def _exists(place: Store, what: str = "exists already") -> OutputExistsError:
    return OutputExistsError(what, fix=f"choose another output, or pass {spelled('overwrite', True)}", path=place.url)


def publish(source: Path, url: Url | str, *, overwrite: bool) -> Entry:
    """Write a local file to a URL, and return what the store says of it. Raises E-OUT-EXISTS if another file is there
    by now, E-IO-WRITE if the store does not hold the bytes, E-ACCESS, E-REMOTE."""
    place = open_store(url)
    check_writable(place.url)
    return _put(source, place, overwrite) if place.is_whole else _put_beside(source, place, overwrite)


def _put(source: Path, place: Store, overwrite: bool) -> Entry:
    try:
        place.put(source, exclusive=not overwrite)
    except FileExistsError:
        # An upload whose answer was lost, and which was tried again, has taken the name itself.
        if stored := place.stored(source):
            return stored
        raise _exists(place, _MEANWHILE) from None
    if stored := place.stored(source):
        return stored
    place.remove()
    raise _damaged(place)


def _put_beside(source: Path, place: Store, overwrite: bool) -> Entry:
    folder = place.parent()
    _make_folder(folder)
    _tidy(folder)
    beside = folder.below(f".{place.url.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        beside.put(source, exclusive=False)
        stored = beside.stored(source)
        if stored is None:
            raise _damaged(place)
        if place.stat() is not None:
            if not overwrite:
                raise _exists(place, _MEANWHILE)
            place.remove()  # some of these file systems rename over nothing that is there
        beside.move(place)
    except BaseException:
        _forget(beside)
        raise
    return place.stat() or stored


def _damaged(place: Store) -> FileWriteError:
    what = "the store holds other bytes than were written to it, which were removed"
    return FileWriteError(what, fix="run it again, and see to the network", path=place.url)


def _forget(place: Store) -> None:
    """Remove a leftover as far as possible; a later run will else."""
    try:
        place.remove()
    except LrcError:
        return


def _make_folder(folder: Store) -> None:
    folder.ask(lambda: folder.files.makedirs(folder.root, exist_ok=True))


def _tidy(folder: Store) -> None:
    """Remove what killed runs have left in a folder, once in a process."""
    for name in _leftovers(folder.url, folder):
        _forget(folder.below(name))


@lru_cache(maxsize=64)
def _leftovers(url: Url, folder: Store) -> list[str]:
    listed: list[dict[str, Any]] = folder.ask(lambda: folder.files.ls(folder.root, detail=True))
    named = ((str(info["name"]).rpartition("/")[2], info) for info in listed)
    return [name for name, info in named if _TEMPORARY.fullmatch(name) and _age(info) > _STALE]


def _age(info: dict[str, Any]) -> float:
    """Seconds since a file was changed, 0 where its store does not say."""
    for key in ("mtime", "modified", "last_modified", "LastModified", "created"):
        value = info.get(key)
        if isinstance(value, (int, float)):
            return time.time() - value
        if isinstance(value, datetime):
            return time.time() - value.timestamp()
    return 0.0


def publish_folder(source: Path, names: Iterable[str], url: Url | str, *, overwrite: bool) -> None:
    """Write the files `names` of a local folder to a folder at a URL, that which makes it an adapter last. With
    `overwrite` that one is removed first, so that no reader takes old and new files together for an adapter. Raises
    what `publish` raises, E-OUT-PATH if there are files of other names."""
    place = open_store(url)
    order = sorted(names, key=lambda name: (name == CONFIG, name))
    if overwrite:
        if others := sorted({entry.name for entry in place.names()} - set(order)):
            what = f"holds {others[0]!r:.80}, which would stay beside the new files"
            raise OutputPathError(what, fix="choose another output, or remove what is there", path=place.url)
        if CONFIG in order:
            place.below(CONFIG).remove()
    for name in order:
        publish(source / name, place.below(name).url, overwrite=overwrite)
