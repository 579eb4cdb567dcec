"""The contract of a reader, and loading an adapter of another tool with the reader that its content calls for.

A reader is one module or package here, of the name of its id, that binds ``READER``. It is chosen by content, never by
file name alone, and accounts for every tensor: converted, carried as an extra, named in a warning, or refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lrconvert.core import registry
from lrconvert.core.errors import (
    ConfigError,
    FileKindError,
    HeaderLengthError,
    HeaderTextError,
    LrcError,
    OptionError,
    UnknownLayoutError,
)
from lrconvert.core.wording import either, spelled
from lrconvert.formats.readers.shared import bundled, folders, frameworks, kinds
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.weights import Weights, open_weights
from lrconvert.io import mistaken
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter

_FOLDER = "lrconvert.formats.readers"
_MOST = "peft"  # is what most adapters are


@dataclass(frozen=True)
class Reader:
    """One foreign layout.

    `read` returns a plain LoRA, or a compact adapter if the layout is a compact form. Content decides who reads,
    cheaply and without raising: `recognises(path)` looks at a folder or file, `knows(names)` at the names of the
    tensors in a single file of weights. `takes_alpha`: the layout does not always state its alpha. `takes_rank`: it
    holds another kind of adapter, of which a LoRA is made. `read_weights`: `read` of a file that is open, for a layout
    whose modules other kinds of adapters have, too.
    """

    id: str
    title: str
    read: Callable[[Path, ReadOptions], LoraAdapter | CompactAdapter]
    recognises: Callable[[Path], bool] = lambda path: False
    knows: Callable[[Sequence[str]], bool] = lambda names: False
    takes_alpha: bool = False
    takes_rank: bool = False
    read_weights: Callable[[Weights, ReadOptions], LoraAdapter] | None = None


def ids() -> list[str]:
    """Return the ids of all readers, for `--from`, without importing any."""
    return registry.names(_FOLDER)


def named(layout: str) -> Reader:
    """Return the reader of that id. Raises E-OPTION for an unknown one."""
    if layout not in ids():
        raise OptionError(f"there is no reader {layout!r:.60}", fix=f"there are: {', '.join(ids())}")
    reader: Reader = registry.load(_FOLDER, layout, "READER")
    return reader


def all_readers() -> list[Reader]:
    """Return all readers, sorted by id."""
    return [registry.load(_FOLDER, layout, "READER") for layout in ids()]


def _in_turn() -> Iterator[Reader]:
    """Yield all readers, imported one after the other. Most adapters are PEFT's; the order means nothing else, since no
    two know one file."""
    for layout in sorted(ids(), key=lambda layout: layout != _MOST):
        yield registry.load(_FOLDER, layout, "READER")


def load(path: Path, options: ReadOptions | None = None) -> LoraAdapter | CompactAdapter:
    """Read the adapter at `path` (a folder or a file) with the reader that its content calls for, or `options` name.

    A folder that no reader knows and that holds a single file of weights stands for that file. PEFT saves an adapter
    that is not called "default" into a folder of its name: where `path` holds nothing but one such folder, that is
    read, with a warning. Raises E-LAYOUT if no reader knows the layout, E-CONFIG if `path` holds several adapters,
    E-NOT-LORA for other kinds of adapters, E-OPTION for an unknown reader or an alpha that the layout states itself.
    """
    options = options or ReadOptions()
    if options.layout is not None:
        return _read(named(options.layout), folders.only_file(path) or path, options)
    for reader in _in_turn():
        if reader.recognises(path):
            return _read(reader, path, options)
    checkpoint = frameworks.refused(path)
    if checkpoint is not None:
        raise checkpoint
    single = folders.only_file(path)
    if single is not None:
        try:
            return _load_file(single, options)
        except UnknownLayoutError:
            if mistaken.is_model(path):
                raise _unknown(path) from None
            raise
    inner = folders.inner_folders(path)
    if len(inner) == 1:
        adapter = load(inner[0], options)
        if isinstance(adapter, CompactAdapter):
            return adapter
        return replace(adapter, warnings=(*adapter.warnings, f"read from the folder {inner[0].name!r:.80} inside"))
    several = [] if mistaken.is_model(path) else inner or folders.weight_files(path)
    if several:
        names = ", ".join(repr(entry.name) for entry in several)
        fix = f"give one of them{either(', or all to lrconvert.convert_many or compress_many', '')}"
        raise ConfigError(f"the folder holds {len(several)} adapters: {names:.400}", fix=fix, path=path)
    if not path.exists():
        raise UnknownLayoutError("there is no such file or folder", fix="is the path spelled right?", path=path)
    raise _unknown(path)


def check_taken(reader: Reader, options: ReadOptions, path: Path) -> None:
    """Raise E-OPTION for an alpha where the layout always states its own, and for a rank where it holds pairs."""
    for name, value, taken in (
        ("alpha", options.alpha, reader.takes_alpha), ("source_rank", options.source_rank, reader.takes_rank)
    ):  # fmt: skip
        if value is not None and not taken:
            what = "an alpha" if name == "alpha" else "another rank: it holds pairs of factors"
            raise OptionError(
                f"the layout {reader.id} does not take {what}", fix=f"leave {spelled(name)} out", path=path
            )


def _read(reader: Reader, path: Path, options: ReadOptions) -> LoraAdapter | CompactAdapter:
    check_taken(reader, options, path)
    try:
        return reader.read(path, options)
    except LrcError as error:
        raise error.at(path) from None


def _load_file(path: Path, options: ReadOptions) -> LoraAdapter | CompactAdapter:
    """Read a file of weights by its content, or by the names of its tensors."""
    for reader in _in_turn():
        if reader.recognises(path):
            return _read(reader, path, options)
    try:
        with open_weights(path, options) as weights:
            names = [info.name for info in weights.tensors if not bundled.is_bundled(info.name)]
    except (FileKindError, HeaderLengthError, HeaderTextError) as error:  # no file of tensors at all, by its content
        if path.suffix in folders.WEIGHT_SUFFIXES:
            raise error.at(path) from None
        raise _unknown(path) from None
    except LrcError as error:
        raise error.at(path) from None
    for reader in all_readers():
        if reader.knows(names):
            return _read(reader, path, options)
    try:
        kinds.refuse(names)
    except LrcError as error:
        raise error.at(path) from None
    raise _unknown(path, names)


def _unknown(path: Path, names: Sequence[str] = ()) -> LrcError:
    mistake = mistaken.for_adapter(path)
    if mistake is not None:
        return mistake
    if (whole := kinds.whole_weights(names)) is not None:
        return whole.at(path)
    holds = f": {_named(names)}" if names else ", and no file of weights in it" if path.is_dir() else ""
    fix = f"read are {', '.join(ids())}; {spelled('layout', ..., '--from')} says which it is"
    return UnknownLayoutError(f"no known adapter layout{holds}", fix=fix, path=path)


def _named(names: Sequence[str]) -> str:
    """Say what tensors are called, for a layout that nobody knows."""
    shown = ", ".join(f"{name!r:.80}" for name in names[:3])
    return f"its {len(names)} tensors are {shown}{', ...' if len(names) > 3 else ''}"
