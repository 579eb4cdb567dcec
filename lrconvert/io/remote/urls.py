"""URLs as places of adapters: told from paths, joined, and shown without secrets."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lrconvert.core.errors import OptionError
from lrconvert.core.redaction import redacted

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_WITHOUT_A_SLASH = re.compile(r"(s3a?|gs|gcs|abfss?|az|adl|hf|https?|memory|file):/(?!/)")
_CHAIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*::")
# Protocols of fsspec that are views of other places, code of their own, or run a command.
_NO_STORES = ("data", "filecache", "simplecache", "blockcache", "cached", "dir", "reference", "generic", "zip", "tar")


def is_url(text: str | os.PathLike[str]) -> bool:
    """Return true if a text is a URL, and no path: ``scheme://...``, where no such file is."""
    match = _SCHEME.match(named := os.fspath(text)) or _CHAIN.match(named)
    return match is not None and not Path(named).exists()


def is_remote(text: str | os.PathLike[str]) -> bool:
    """Return true for a URL that names no file of this machine."""
    return is_url(text) and local_path(os.fspath(text)) is None


def refuse_url(path: str | os.PathLike[str], what: str, fix: str) -> None:
    """Raise E-OPTION if a place is a URL, where none is taken: `what` is wrong, and what to do."""
    text = os.fspath(path)
    if is_url(text):
        raise OptionError(f"'{redacted(text):.200}' is a URL, and {what}", fix=fix)
    if _WITHOUT_A_SLASH.match(text) and not Path(text).exists():
        raise OptionError(f"'{redacted(text):.200}' is a URL that lost a slash as a path", fix="give it as a text")


def local_path(text: str) -> Path | None:
    """Return the path that ``file://`` names, None for a URL of another scheme. Raises E-OPTION for another host."""
    scheme, _, _ = text.partition("://")
    if scheme.lower() not in ("file", "local"):
        return None
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise OptionError(f"'{text:.200}' names a file of another machine", fix="write file:///path")
    return Path(unquote(parts.path))


@dataclass(frozen=True)
class Url(os.PathLike[str]):
    """A URL. `os.fspath` gives it whole, for who fetches it; `str` and `repr` without secrets, for all else."""

    text: str = field(repr=False)

    def __fspath__(self) -> str:
        return self.text

    def __str__(self) -> str:
        return redacted(self.text)

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    @property
    def scheme(self) -> str:
        return self.text.partition("://")[0].lower()

    @property
    def name(self) -> str:
        """Return the last part of the path, without query, as files are named; of a bare host or bucket its name
        without the credentials before it."""
        place = self.text.partition("://")[2]
        if self.scheme in ("http", "https"):
            place = unquote(re.split("[?#]", place, maxsplit=1)[0])
        _, slash, name = place.rstrip("/").rpartition("/")
        return name if slash else name.rpartition("@")[2]

    def __truediv__(self, inside: str) -> Url:
        """Return the URL of what lies below a folder."""
        return Url(f"{self.text.rstrip('/')}/{inside}")


def parse(text: str) -> Url:
    """Return `text` as the URL of a store. Raises E-OPTION for chains (``zip::s3://...``) and what is no store."""
    match = _SCHEME.match(text)
    if match is None or match[1].lower() in _NO_STORES or _CHAIN.match(text) or "::" in text.partition("?")[0]:
        what = f"'{redacted(text):.200}' is no place of a store"
        raise OptionError(what, fix="give one URL, such as s3://bucket/folder, and no chain of them")
    if not text.isprintable() or not text[match.end() :].strip("/"):
        raise OptionError(f"'{redacted(text):.200}' names no place in a store", fix="such as s3://bucket/folder")
    return Url(text)
