"""Where an adapter is that is given by its path: a hub id, a URL, or ``FLEET#NAME``, a member of a fleet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lrconvert.core.errors import LrcError
from lrconvert.formats.fleet import names
from lrconvert.formats.fleet.opened import OpenFleet
from lrconvert.io import durable, hub, remote
from lrconvert.io.hub import AnyPath
from lrconvert.lora.adapter import CompactAdapter


def read_member(path: AnyPath) -> CompactAdapter | None:
    """Return the adapter that ``FLEET#NAME`` stands for, fully checked; None for another path. Raises E-MISSING,
    E-DIGEST, E-NAME."""
    member = names.member_of(path)
    if member is None:
        return None
    with OpenFleet(member[0]) as fleet:
        return fleet.compact(member[1])


@contextmanager
def adapter(path: AnyPath) -> Iterator[Path]:
    """Give where an adapter is, until the context ends: `hub.adapter`, and of a member of a fleet a copy of its file on
    this machine, whose errors name the member. Raises what both raise."""
    member = names.member_of(path)
    if member is None:
        with hub.adapter(path) as where:
            yield where
        return
    root, name = member
    with OpenFleet(root) as fleet:
        data = fleet.bytes_of(name)
    with remote.folder("member") as folder:
        where = folder / f"{name.replace('/', '-')}.lrc"
        with durable.atomic_file(where, overwrite=False) as copy:
            copy.write(data)
        try:
            yield where
        except LrcError as error:
            shown = str(names.spelled_member(root, name))
            error.path = shown if error.path in (None, str(where)) else error.path
            error.what = error.what.replace(str(where), shown)
            raise


def read_from(path: AnyPath) -> Path:
    """Return the file or folder that an adapter is read from, which must not be written to: of a member its fleet."""
    member = names.member_of(path)
    return hub.adapter_at(path) if member is None else member[0]


def is_member(path: AnyPath) -> bool:
    """Return true if a path is ``FLEET#NAME``."""
    return names.member_of(path) is not None
