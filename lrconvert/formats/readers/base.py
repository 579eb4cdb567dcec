"""The contract of a reader, and the registry that finds readers by scanning this folder.

A reader is one module or package here that binds ``READER``. It is chosen by content, never by file name alone, and
accounts for every tensor: converted, carried as an extra, named in a warning, or refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lrconvert.core import registry
from lrconvert.core.errors import ConfigError, LrcError, OptionError, PickleError, UnknownLayoutError
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter

CONFIG_NAME = "adapter_config.json"


def _never(path: Path) -> bool:
    return False


def _nothing(names: Sequence[str]) -> bool:
    return False


@dataclass(frozen=True)
class Reader:
    """One foreign layout. Content decides, cheaply and without raising: `recognises(path)` looks at a folder or file,
    `knows(names)` at the names of the tensors in a single file of weights. `read` converts: to a plain LoRA, or to a
    compact adapter if the layout is a compact form. `takes_alpha`: the layout does not always state its alpha."""

    id: str
    title: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, ReadOptions], LoraAdapter | CompactAdapter]
    knows: Callable[[Sequence[str]], bool] = _nothing
    takes_alpha: bool = False


def by_names(
    reader_id: str,
    title: str,
    knows: Callable[[Sequence[str]], bool],
    read: Callable[[Path, ReadOptions], LoraAdapter | CompactAdapter],
    *,
    takes_alpha: bool = False,
) -> Reader:
    """A reader of single files that the names of their tensors tell apart."""
    return Reader(reader_id, title, _never, read, knows, takes_alpha)


def all_readers() -> list[Reader]:
    folder = "lrconvert.formats.readers"
    return [registry.load(folder, name, "READER") for name in registry.names(folder)]


def ids() -> list[str]:
    """The ids of all readers, for `--from`."""
    return [reader.id for reader in all_readers()]


def load(path: Path, options: ReadOptions | None = None) -> LoraAdapter | CompactAdapter:
    """The adapter at `path` (a folder or a file), by the reader that its content calls for, or that `options` name.

    A folder that no reader knows and that holds a single file of weights stands for that file. PEFT saves an adapter
    that is not called "default" into a folder of its name: where `path` holds nothing but one such folder, that is
    read, with a warning. Raises E-LAYOUT if no reader knows the layout, E-CONFIG if `path` holds several adapters,
    E-NOT-LORA for other kinds of adapters, E-OPTION for an unknown reader or an alpha that the layout states itself.
    """
    options = options or ReadOptions()
    readers = all_readers()
    if options.layout is not None:
        return _read(named(options.layout), _only_file(path) or path, options)
    for reader in readers:
        if reader.recognises(path):
            return _read(reader, path, options)
    single = _only_file(path)
    if single is not None:
        return _load_file(single, options, readers)
    inner = _inner_folders(path)
    if len(inner) == 1:
        found = load(inner[0], options)
        if isinstance(found, CompactAdapter):
            return found
        return replace(found, warnings=(*found.warnings, f"read from the folder {inner[0].name!r:.80} inside"))
    several = inner or _weight_files(path)
    if several:
        names = ", ".join(repr(entry.name) for entry in several)
        raise ConfigError(f"the folder holds {len(several)} adapters: {names:.400}", fix="give one of them", path=path)
    if not path.exists():
        raise UnknownLayoutError("there is no such file or folder", path=path)
    raise _unknown(path, readers)


def named(layout: str) -> Reader:
    """The reader of that id. Raises E-OPTION for an unknown one."""
    for reader in all_readers():
        if reader.id == layout:
            return reader
    raise OptionError(f"there is no reader {layout!r:.60}", fix=f"there are: {', '.join(ids())}")


def check_alpha(reader: Reader, alpha: float | None, path: Path) -> None:
    """Raise E-OPTION for an alpha where the layout always states its own."""
    if alpha is not None and not reader.takes_alpha:
        raise OptionError(f"the layout {reader.id} does not take an alpha", fix="leave --alpha out", path=path)


def _read(reader: Reader, path: Path, options: ReadOptions) -> LoraAdapter | CompactAdapter:
    check_alpha(reader, options.alpha, path)
    try:
        return reader.read(path, options)
    except LrcError as error:
        raise error.at(path) from None


def _load_file(path: Path, options: ReadOptions, readers: Sequence[Reader]) -> LoraAdapter | CompactAdapter:
    """A file of weights that nothing but the names of its tensors tells."""
    from lrconvert.formats.readers.shared import kinds
    from lrconvert.formats.readers.shared.weights import open_weights

    for reader in readers:
        if reader.recognises(path):
            return _read(reader, path, options)
    try:
        with open_weights(path, options) as weights:
            names = [info.name for info in weights.tensors]
    except PickleError as error:
        raise error.at(path) from None
    except LrcError:  # no file of tensors at all
        raise _unknown(path, readers) from None
    for reader in readers:
        if reader.knows(names):
            return _read(reader, path, options)
    try:
        kinds.refuse(names)
    except LrcError as error:
        raise error.at(path) from None
    raise _unknown(path, readers)


def _unknown(path: Path, readers: Sequence[Reader]) -> UnknownLayoutError:
    known = "; ".join(reader.title for reader in readers)
    return UnknownLayoutError("no known adapter layout", fix=f"known: {known}", path=path)


# --- folders --------------------------------------------------------------------------------------------------------

WEIGHT_SUFFIXES = (".safetensors", ".npz", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
# What a training tool calls its last result; checkpoints of earlier steps lie beside it.
_FINAL_NAMES = ("pytorch_lora_weights.safetensors", "adapters.safetensors", "adapters.npz", "pytorch_lora_weights.bin")


def _weight_files(path: Path) -> list[Path]:
    """Files of weights directly inside `path`; none if it has an adapter's configuration."""
    try:
        if not path.is_dir() or (path / CONFIG_NAME).exists():
            return []
        return sorted(entry for entry in path.iterdir() if entry.suffix in WEIGHT_SUFFIXES and entry.is_file())
    except OSError:  # not to be looked into
        return []


def _only_file(path: Path) -> Path | None:
    """`path` if it is a file, or the one file of weights in it that counts; None if that is not clear."""
    if path.is_file():
        return path
    found = _weight_files(path)
    final = [entry for entry in found if entry.name in _FINAL_NAMES]
    for entries in (final[:1], found):
        if len(entries) == 1:
            return entries[0]
    return None


def _inner_folders(path: Path) -> list[Path]:
    """Folders directly inside `path` that hold an adapter's configuration; none if `path` has one itself."""
    try:
        if not path.is_dir() or (path / CONFIG_NAME).exists():
            return []
        return sorted(folder for folder in path.iterdir() if (folder / CONFIG_NAME).is_file())
    except OSError:  # not to be looked into
        return []
