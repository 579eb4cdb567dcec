"""The contract of a reader, and the registry that finds readers by scanning this folder.

A reader is one module or package here that binds ``READER``. It is chosen by content, never by file name alone, and
accounts for every tensor: converted, carried as an extra, named in a warning, or refused by name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lrconvert.adapter import CompactAdapter, LoraAdapter
from lrconvert.errors import ConfigError, LrcError, UnknownLayoutError

CONFIG_NAME = "adapter_config.json"
_NOT_READERS = ("base", "weights")


@dataclass(frozen=True)
class ReadOptions:
    """What a user may ask of every reader. `allow_pickle`: load ``.bin`` and ``.pt`` files, with torch's loader that
    builds tensors only. `base`: the folder of the base, for layouts that do not say how wide its layers are."""

    allow_pickle: bool = False
    base: Path | None = None


@dataclass(frozen=True)
class Reader:
    """One foreign layout. `recognises(path)` looks at content cheaply and does not raise; `read` converts: to a plain
    LoRA, or to a compact adapter if the layout is a compact form."""

    id: str
    title: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, ReadOptions], LoraAdapter | CompactAdapter]


def all_readers() -> list[Reader]:
    import lrconvert.readers as package

    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in _NOT_READERS)
    return [importlib.import_module(f"lrconvert.readers.{name}").READER for name in names]


def load(path: Path, options: ReadOptions | None = None) -> LoraAdapter | CompactAdapter:
    """The adapter at `path` (a folder or a file), by the first reader that recognises it. Raises E-LAYOUT if none does.

    PEFT saves an adapter that is not called "default" into a folder of its name: where `path` holds nothing but one
    such folder, that is read, with a warning. Raises E-CONFIG if there are several.
    """
    options = options or ReadOptions()
    readers = all_readers()
    for reader in readers:
        if reader.recognises(path):
            try:
                return reader.read(path, options)
            except LrcError as error:
                raise error.at(path) from None
    inner = _inner_folders(path)
    if len(inner) == 1:
        found = load(inner[0], options)
        if isinstance(found, CompactAdapter):
            return found
        return replace(found, warnings=(*found.warnings, f"read from the folder {inner[0].name!r:.80} inside"))
    if inner:
        names = ", ".join(repr(folder.name) for folder in inner)
        raise ConfigError(f"the folder holds {len(inner)} adapters: {names:.400}", fix="give one of them", path=path)
    if not path.exists():
        raise UnknownLayoutError("there is no such file or folder", path=path)
    known = "; ".join(reader.title for reader in readers)
    raise UnknownLayoutError("no known adapter layout", fix=f"known: {known}", path=path)


def _inner_folders(path: Path) -> list[Path]:
    """Folders directly inside `path` that hold an adapter's configuration; none if `path` has one itself."""
    try:
        if not path.is_dir() or (path / CONFIG_NAME).exists():
            return []
        return sorted(folder for folder in path.iterdir() if (folder / CONFIG_NAME).is_file())
    except OSError:  # not to be looked into
        return []
