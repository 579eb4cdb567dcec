"""Stores: where compact files lie, and which of them a name means.

    /adapters, file:///adapters            NAME is /adapters/NAME.lrc
    s3://bucket/adapters, gs://, memory:// and so on, through fsspec and the package that it names for a protocol
    hf://org/name, hf://org/name@revision/folder    a repository of the Hugging Face Hub, through its local cache

A name may have folders in it (``team/mails``). It comes from whoever may send a request, so it never leaves the store:
what could mean another place is no name of an adapter.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from lrconvert.core.errors import DependencyError, FileKindError, FileReadError, LrcError, OptionError
from lrconvert.formats.expansions.sources import LocalFile, Opened, Source, known_digest, note_digest, read_digest
from lrconvert.io import hub, hub_transfer

log = logging.getLogger(__name__)

SUFFIX = ".lrc"
_PART = re.compile(r"(?!\.)[\w.+=@:, -]{1,200}")
_LENGTH = 600
_VERSIONS: tuple[str, ...] = (
    "ETag",
    "etag",
    "VersionId",
    "generation",
    "md5Hash",
    "content_md5",
    "crc32c",
    "LastModified",
)
_VERSIONS += ("last_modified", "mtime", "updated", "modified", "created")


class Store(Protocol):
    """Files by name."""

    def find(self, name: str) -> Source | None:
        """Return the file of a name, None if there is none. Raises E-IO-READ and E-HUB if nobody can say."""
        ...


def is_name(text: str) -> bool:
    """Say whether a text can be the name of an adapter: parts of letters, digits and ``.+=@:,-_``, which do not begin
    with a dot, with slashes between them."""
    return len(text) <= _LENGTH and all(_PART.fullmatch(part) for part in text.split("/"))


def open_store(place: str) -> Store:
    """Return the store at a folder, a URL, or ``hf://``; nothing remote is asked yet. Raises E-IO-KIND for a folder
    that is not there, E-OPTION for what is no store, E-DEPENDENCY if it needs a package that is not installed."""
    scheme, separator, rest = place.partition("://")
    if scheme == "hf" and separator:
        return _hub_store(rest)
    if separator and scheme != "file":
        return _url_store(place)
    root = Path(unquote(urlsplit(place).path) if separator else place).absolute()
    if not root.is_dir():
        raise FileKindError("the store is no folder that is there", fix="set LRCONVERT_STORE to one", path=root)
    return FolderStore(root)


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


# --- URLs ---------------------------------------------------------------------------------------------------------


def _url_store(url: str) -> Store:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise DependencyError("a store at a URL needs fsspec", fix="pip install fsspec") from None
    try:
        files, root = url_to_fs(url)
    except ImportError as error:
        raise DependencyError(f"the store {url.partition('://')[0]}:// needs a package: {error}") from None
    except ValueError as error:
        raise OptionError(f"{url!r:.120} is no store: {error}", fix="give a folder, hf://org/name or a URL") from None
    return UrlStore(files, str(root).rstrip("/"), url.rstrip("/"))


@dataclass(frozen=True)
class UrlStore:
    """A folder of a file system of fsspec; `url` is what messages call it."""

    files: Any
    root: str
    url: str

    def find(self, name: str) -> Source | None:
        """Return the file of a name, None if there is none. Raises E-IO-READ."""
        if not is_name(name):
            return None
        path, shown = f"{self.root}/{name}{SUFFIX}", f"{self.url}/{name}{SUFFIX}"
        try:
            self.files.invalidate_cache()
            info = self.files.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # whatever the client of that protocol raises
            raise _unreachable(shown, error) from None
        return RemoteFile(self.files, path, shown, _version(info)) if info.get("type") == "file" else None


def _version(info: Mapping[str, Any]) -> str:
    """A text that changes with a file's content, "" if its file system has none."""
    known = {key: str(info[key]) for key in _VERSIONS if info.get(key) is not None}
    return json.dumps({**known, "size": info.get("size")}, sort_keys=True) if known else ""


def _unreachable(shown: str, error: Exception) -> LrcError:
    return FileReadError(f"the store does not answer: {type(error).__name__}: {error!s:.200}", path=shown)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a file system of fsspec. It is fetched when it is needed, and kept no longer."""

    files: Any
    path: str
    shown: str
    version: str

    @contextmanager
    def opened(self, records: Path) -> Iterator[Opened]:
        """Look at the file; one of a version that was fetched before is not fetched. Raises E-IO-READ."""
        with ExitStack() as stack:
            fetched: list[Path] = []

            def path() -> Path:
                if not fetched:
                    fetched.append(self._fetched(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
                return fetched[0]

            digest = known_digest(records, self.shown, self.version) if self.version else None
            if digest is None:
                digest = read_digest(path())
                if self.version:
                    note_digest(records, self.shown, self.version, digest)
            yield Opened(digest, path, lambda: None)

    def _fetched(self, folder: Path) -> Path:
        target = folder / "adapter.lrc"
        try:
            self.files.get_file(self.path, str(target))
        except Exception as error:
            raise _unreachable(self.shown, error) from None
        return target


# --- the hub ------------------------------------------------------------------------------------------------------


def _hub_store(rest: str) -> Store:
    parts = [part for part in rest.split("/") if part]
    hub_id = hub.parse("/".join(parts[:2])) if len(parts) >= 2 else None
    if hub_id is None or not all(_PART.fullmatch(part) for part in parts[2:]):
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
