"""Stores: where compact files lie, and which of them a name means.

    /adapters, file:///adapters            NAME is /adapters/NAME.lrc; of a fleet its member NAME
    s3://bucket/adapters, gs://, memory:// and so on, through fsspec and the package that it names for a protocol
    hf://org/name, hf://org/name@revision/folder    a repository of the Hugging Face Hub, through its local cache

A name may have folders in it (``team/mails``). It comes from whoever may send a request, so it never leaves the store:
what could mean another place is no name of an adapter.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lrconvert.core.errors import FileKindError, OptionError
from lrconvert.formats.expansions.sources import FleetMember, LocalFile, RemoteFile, Source
from lrconvert.formats.fleet import names
from lrconvert.formats.fleet.opened import OpenFleet
from lrconvert.io import hub, hub_transfer, remote

log = logging.getLogger(__name__)

SUFFIX = ".lrc"
_LENGTH = 600


class Store(Protocol):
    """Files by name."""

    def find(self, name: str) -> Source | None:
        """Return the file of a name, None if there is none. Raises E-REMOTE, E-ACCESS and E-HUB if nobody can say."""
        ...


def is_name(text: str) -> bool:
    """Say whether a text can be the name of an adapter: parts of letters, digits and ``.+=@:,-_``, which do not begin
    with a dot, with slashes between them."""
    return len(text) <= _LENGTH and all(names.PART.fullmatch(part) for part in text.split("/"))


def open_store(place: str) -> Store:
    """Return the store at a folder, a URL, or ``hf://``; nothing remote is asked yet. Raises E-IO-KIND for a folder
    that is not there, E-OPTION for what is no store, E-DEPENDENCY if it needs a package that is not installed."""
    scheme, separator, rest = place.partition("://")
    if scheme == "hf" and separator:
        return _hub_store(rest)
    if separator and scheme != "file":
        return UrlStore(remote.open_store(place))
    root = (remote.local_path(place) or Path(place)).absolute()
    if not root.is_dir():
        raise FileKindError("the store is no folder that is there", fix="set LRCONVERT_STORE to one", path=root)
    return FleetStore(root) if names.is_fleet(root) else FolderStore(root)


@dataclass(frozen=True)
class FolderStore:
    """A folder; links in it may lead to other places in it, and to no other."""

    root: Path

    def find(self, name: str) -> Source | None:
        """Return the file of a name, None if there is none."""
        if not is_name(name):
            return None
        path = self.root / f"{name}{SUFFIX}"
        try:
            real = path.resolve()
            if not real.is_file():
                return None
        except (OSError, RuntimeError):  # a link to itself, a name that is too long
            return None
        if not real.is_relative_to(self.root.resolve()):
            log.warning("%s is a link that leaves the store: it is not served", path)
            return None
        return LocalFile(path)


@dataclass(frozen=True)
class FleetStore:
    """A fleet; members that are added later are found, and removed ones are not."""

    root: Path

    def find(self, name: str) -> Source | None:
        """Return the member of a name, None if there is none. Raises what a damaged fleet is refused with."""
        if not names.is_name(name):
            return None
        with OpenFleet(self.root) as fleet:
            return FleetMember(self.root, name) if fleet.find(name.encode()) else None


# --- URLs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UrlStore:
    """A folder at a URL."""

    place: remote.Store

    def find(self, name: str) -> Source | None:
        """Return the file of a name, None if there is none. Raises E-REMOTE, E-ACCESS."""
        if not is_name(name):
            return None
        place = self.place.below(f"{name}{SUFFIX}")
        entry = place.stat()
        return None if entry is None else RemoteFile(place, entry)


# --- the hub ------------------------------------------------------------------------------------------------------


def _hub_store(rest: str) -> Store:
    parts = [part for part in rest.split("/") if part]
    hub_id = hub.parse("/".join(parts[:2])) if len(parts) >= 2 else None
    if hub_id is None or not all(names.PART.fullmatch(part) for part in parts[2:]):
        raise OptionError(f"'hf://{rest:.120}' names no repository", fix="write hf://org/name")
    return HubStore(hub_id.name, hub_id.revision, "/".join(parts[2:]))


@dataclass(frozen=True)
class HubStore:
    """A repository of the hub, or a `folder` of one; what was fetched stays in its local cache."""

    repository: str
    revision: str = "main"
    folder: str = ""

    def find(self, name: str) -> Source | None:
        """Return the file of a name, None if there is none. Raises E-HUB."""
        if not is_name(name):
            return None
        inside = f"{self.folder}/{name}{SUFFIX}".lstrip("/")
        path = hub_transfer.fetch_file(self.repository, inside, self.revision)
        return None if path is None else LocalFile(path)
