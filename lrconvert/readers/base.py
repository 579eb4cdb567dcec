"""The contract of a reader, and the registry that finds readers by scanning this folder.

A reader is one file here that binds ``READER``. It is chosen by content, never by file name alone, and accounts for
every tensor: converted, carried as an extra, or refused by name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lrconvert.adapter import LoraAdapter
from lrconvert.errors import LrcError, UnknownLayoutError


@dataclass(frozen=True)
class Reader:
    """One foreign layout. `recognises(path)` looks at content cheaply and does not raise; `read(path)` converts."""

    id: str
    title: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path], LoraAdapter]


def all_readers() -> list[Reader]:
    import lrconvert.readers as package

    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "base")
    return [importlib.import_module(f"lrconvert.readers.{name}").READER for name in names]


def load(path: Path) -> LoraAdapter:
    """The LoRA at `path` (a folder or a file), by the first reader that recognises it. Raises E-LAYOUT if none does."""
    readers = all_readers()
    for reader in readers:
        if reader.recognises(path):
            try:
                return reader.read(path)
            except LrcError as error:
                raise error.at(path) from None
    if not path.exists():
        raise UnknownLayoutError("there is no such file or folder", path=path)
    known = "; ".join(reader.title for reader in readers)
    raise UnknownLayoutError("no known adapter layout", fix=f"known: {known}", path=path)
