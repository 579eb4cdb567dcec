"""Stores behind fsspec: files below a URL, asked with patience, with what each kind of store promises.

| protocol | a file appears | taken names are refused by | unchanged is told by |
|---|---|---|---|
| s3, s3a | whole: one PUT, or a multipart upload when it is completed | the PUT (If-None-Match) | ETag |
| gs, gcs | whole | the upload (generation 0) | generation, MD5 |
| abfs, az | whole: blocks when they are committed | the upload | ETag |
| hf | whole: one commit | a look before it | digest of git |
| memory | whole | the store | time of creation |
| others (sftp, smb, hdfs, ...) | by a rename, from a name of its own beside | a look before it | times, size |
| http, https | is read, not written | | ETag, Last-Modified |
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from lrconvert.core.errors import FileReadError, LimitError, OptionError
from lrconvert.core.limits import MAX_LISTED
from lrconvert.io.remote.failures import PATIENCE, Patience, asked
from lrconvert.io.remote.urls import Url

T = TypeVar("T")
_WHOLE = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf", "memory")
READ_ONLY = ("http", "https")
# What changes with the content; the first that a store gives is enough.
_TAGS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "Content-MD5", "blob_id", "checksum", "VersionId")
_TIMES = ("LastModified", "last_modified", "Last-Modified", "mtime", "updated", "modified", "created")


@dataclass(frozen=True)
class Entry:
    """A file: its `name` below what was listed, its size in bytes (None where a server does not say), a `version` that
    changes with its content ("" if the store has none), and the MD5 of it in hex, if that is what the store says."""

    name: str
    size: int | None
    version: str = ""
    md5: str = ""


@dataclass(frozen=True)
class Store:
    """A place in a file system of fsspec: a file, or a folder (`below` is in it). Raises E-ACCESS, E-REMOTE."""

    files: Any
    root: str
    url: Url
    patience: Patience = PATIENCE

    @property
    def is_whole(self) -> bool:
        """Return true if a file appears whole, without a rename."""
        return self.url.scheme in _WHOLE

    @property
    def is_threaded(self) -> bool:
        """Return true if the driver takes calls from several threads at once."""
        return bool(getattr(self.files, "async_impl", False))

    def below(self, inside: str) -> Store:
        """Return what lies below it."""
        return replace(self, root=f"{self.root.rstrip('/')}/{inside}", url=self.url / inside)

    def parent(self) -> Store:
        """Return the folder that it lies in."""
        above = Url(self.url.text.rstrip("/").rpartition("/")[0])
        return replace(self, root=self.root.rstrip("/").rpartition("/")[0], url=above)

    def ask(self, call: Callable[[], T]) -> T:
        return asked(self.url, call, self.patience)

    def stat(self) -> Entry | None:
        """Return the file, None if there is none of that name."""

        def info() -> Mapping[str, Any]:
            self.files.invalidate_cache()
            known: Mapping[str, Any] = self.files.info(self.root)
            return known

        try:
            details = self.ask(info)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return entry(self.url.name, details) if details.get("type") == "file" else None

    def names(self) -> list[Entry]:
        """Return the files directly in the folder, none if it is none. Raises E-LIMIT for a folder too large to be an
        adapter's."""
        listed = [one for one in self._inside() if not one.name.endswith("/")]
        refuse_many(len(listed), self.url)
        return listed

    def walk(self) -> Iterator[Entry]:
        """Give the files below the folder, in the order of their names, folder by folder: the names of a folder and of
        those it lies in are in memory, and of no other."""
        for one in sorted(self._inside(), key=lambda one: one.name):
            if not one.name.endswith("/"):
                yield one
            elif not one.name.startswith("."):
                inner = one.name.rstrip("/")
                yield from (replace(deep, name=f"{inner}/{deep.name}") for deep in self.below(inner).walk())

    def _inside(self) -> list[Entry]:
        """The files and folders in the folder, these with a slash at the end of their names."""
        if self.url.scheme in READ_ONLY:
            fix = "give the URL of one file, or of an adapter's folder with a slash"
            raise OptionError("a web server does not list folders", fix=fix, path=self.url)

        def listing() -> list[Mapping[str, Any]]:
            self.files.invalidate_cache()
            known: list[Mapping[str, Any]] = self.files.ls(self.root, detail=True)
            return known

        try:
            listed = self.ask(listing)
        except (FileNotFoundError, NotADirectoryError):
            return []
        entries = []
        for info in listed:
            name = posixpath.basename(str(info["name"]).rstrip("/"))
            is_itself = str(info["name"]).rstrip("/").endswith(self.root.rstrip("/")) and info.get("type") == "file"
            if name and not (is_itself and len(listed) == 1):
                entries.append(entry(name if info.get("type") == "file" else f"{name}/", info))
        return entries

    def get(self, target: Path, most: int) -> None:
        """Write the file to a path of this machine. Raises E-LIMIT before more than `most` bytes are there, whatever
        the store said of its size; FileNotFoundError."""
        from fsspec.callbacks import Callback

        def check(size: int | None, value: int, **more: Any) -> None:
            if value > most:
                raise LimitError(f"is longer than the {most:,} bytes that it is to have at most", path=self.url)

        self.ask(lambda: self.files.get_file(self.root, str(target), callback=Callback(hooks={"bound": check})))

    def put(self, source: Path, *, exclusive: bool) -> None:
        """Write a local file to the place. FileExistsError if `exclusive` and it is taken."""
        if self.url.scheme == "memory":
            mode = "create" if exclusive else "overwrite"
            self.ask(lambda: self.files.pipe_file(self.root, source.read_bytes(), mode=mode))
            return
        known = inspect.signature(getattr(self.files, "_put_file", self.files.put_file)).parameters
        how: dict[str, Any] = {}
        if "mode" in known:
            how = {"mode": "create" if exclusive else "overwrite"}
        elif "overwrite" in known:
            how = {"overwrite": not exclusive}
        elif exclusive and self.stat() is not None:
            raise FileExistsError
        self.ask(lambda: self.files.put_file(str(source), self.root, **how))

    def move(self, target: Store) -> None:
        """Give the file another name."""
        self.ask(lambda: self.files.mv(self.root, target.root))

    def remove(self) -> None:
        """Delete the file, which may be gone already."""
        try:
            self.ask(lambda: self.files.rm_file(self.root))
        except FileNotFoundError:
            return

    def stored(self, source: Path) -> Entry | None:
        """Return what the store says of the file if it has the bytes of a local one, by a digest of the store, or by
        reading them back; else None."""
        known = self.stat()
        if known is None or known.size not in (None, source.stat().st_size):
            return None
        is_same = bool(known.md5) and known.md5 == _digest(source, "md5")
        return known if is_same or self.read_digest() == _digest(source, "sha256") else None

    def read_digest(self) -> str:
        """Return the sha256 of the file, which is read for it."""

        def read() -> str:
            self.files.invalidate_cache()
            with self.files.open(self.root, "rb") as opened:
                whole = hashlib.sha256()
                for block in iter(lambda: opened.read(1 << 22), b""):
                    whole.update(block)
                return whole.hexdigest()

        return self.ask(read)


def _digest(path: Path, kind: str) -> str:
    try:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise FileReadError(f"cannot be read: {error.strerror}", path=path) from None


def entry(name: str, info: Mapping[str, Any]) -> Entry:
    """Return a file of what a driver says of it."""
    size = info.get("size")
    return Entry(name, None if size is None else int(size), version(info), _md5(info))


def version(info: Mapping[str, Any]) -> str:
    """Return a text that changes with a file's content, "" if its store has none: its tag or generation, else its
    times, and its size."""
    known = {key: str(info[key]).strip('"') for key in _TAGS if info.get(key)}
    if not known:
        known = {key: _time(info[key]) for key in _TIMES if info.get(key) is not None}
    first = next(iter(known.items()), None)
    return json.dumps({first[0].lower(): first[1], "size": info.get("size")}, sort_keys=True) if first else ""


def _time(value: object) -> str:
    """A time as text, the same whether a driver gives it as a date or in seconds."""
    return str(value.timestamp() if isinstance(value, datetime) else value)


def _md5(info: Mapping[str, Any]) -> str:
    """The MD5 of a file in hex, as far as its store says so. An ETag of 32 digits may be another digest."""
    tag = str(info.get("ETag") or "").strip('"')
    if len(tag) == 32:
        return tag.lower()
    for key in ("md5Hash", "content_md5", "Content-MD5"):
        if value := info.get(key):
            try:
                return (bytes(value) if isinstance(value, (bytes, bytearray)) else base64.b64decode(value)).hex()
            except ValueError:
                continue
    return ""


def refuse_many(count: int, url: Url) -> None:
    """Raise E-LIMIT for a folder with more files than any adapter has."""
    if count > MAX_LISTED:
        raise LimitError(f"holds more than {MAX_LISTED:,} files, which no adapter does", path=url)


def check_writable(url: Url) -> None:
    """Raise E-OPTION for a place that nothing can be written to."""
    if url.scheme in READ_ONLY:
        fix = "write to a path, or to s3://, gs:// or another store"
        raise OptionError("a web server takes no files", fix=fix, path=url)
