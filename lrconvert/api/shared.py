"""Paths, progress and options of all verbs.

A verb takes its inputs, a frozen dataclass of options, and single fields of it as keywords: ``convert(lora, "lowrank",
target_ratio=50)`` is ``convert(lora, "lowrank", ConvertOptions(target_ratio=50))``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from difflib import get_close_matches
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from lrconvert.core.errors import ArgumentError, OptionError, UnknownLayoutError
from lrconvert.core.notices import Notice
from lrconvert.core.options import described, make, names, refuse_unknown
from lrconvert.core.wording import either, spelled
from lrconvert.formats import loading
from lrconvert.formats.fleet import places as fleet_places
from lrconvert.formats.lrc import file
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.io import hub, remote
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.methods.shared.plain_lora import plain_lora

if TYPE_CHECKING:
    from torch import nn

AnyPath = str | PathLike[str]
Progress = Callable[[float, str], None]


class Result(Protocol):
    """A result of a verb that makes a compact adapter: `Conversion`, `Compression`, `Allocation`, `Refinement`."""

    @property
    def compact(self) -> CompactAdapter: ...


class MadeLora(Protocol):
    """A result of a verb that makes a LoRA: `Extraction`, `Combination`."""

    @property
    def lora(self) -> LoraAdapter | None: ...


AnyCompact = AnyPath | CompactAdapter | Result
AnyLora = AnyPath | LoraAdapter | CompactAdapter | Result | MadeLora
AnyAdapter = AnyLora


def path_of(value: object, name: str, what: str = "a path") -> AnyPath:
    """Return the path that the argument `name` is. Raises E-ARGUMENT for anything else; `what` was expected."""
    if not isinstance(value, (str, PathLike)):
        raise _other(value, name, what)
    text = fspath(value)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ArgumentError(f"{name} is {text!r:.80}, which is no path", fix=f"give {what}")
    return value


def located(value: object, name: str) -> Path:
    """Return where an input is, of a hub id its place in the local cache. Raises E-ARGUMENT, and `hub.locate`'s."""
    return hub.locate(path_of(value, name, "a path or a hub id"))


@contextmanager
def adapter_at(value: object, name: str) -> Iterator[Path]:
    """Give where an adapter is: of a hub id its place in the local cache, of a URL, and of a member of a fleet, a copy
    on this machine. Raises E-ARGUMENT, and what `fleet.places.adapter` does."""
    with fleet_places.adapter(path_of(value, name, "a path, a hub id or a URL")) as where:
        yield where


def is_remote(value: object) -> bool:
    """Return true if an output is a URL of a store."""
    return isinstance(value, (str, PathLike)) and remote.is_remote(value)


@contextmanager
def published(value: object, *, overwrite: bool, folder: bool = False) -> Iterator[Path]:
    """Give a path of this machine for an output that is a URL, to which it is written when the context ends: a file,
    or a `folder` with all in it. Raises, before any work, E-OUT-EXISTS and what else `remote.check_output` does."""
    url = remote.parse(fspath(path_of(value, "out")))
    remote.check_output(url, overwrite, folder=folder)
    with remote.folder("output") as scratch:
        local = scratch / url.name
        yield local
        if folder:
            names = [path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()]
            remote.publish_folder(local, names, url, overwrite=overwrite)
        elif local.exists():  # of several processes one writes
            remote.publish(local, url, overwrite=overwrite)


def refuse_resume(keywords: Mapping[str, Any], verb: str) -> None:
    """Raise E-OPTION if work is to be resumed that would lie beside an output at a URL."""
    if keywords.get("resume"):
        what = f"{verb} keeps unfinished work beside an output that is a path, not at a URL"
        raise OptionError(what, fix=f"write to a path, or leave {spelled('resume')} out")


def output_of(value: object, name: str = "out") -> Path:
    """Return the path of an output. Raises E-ARGUMENT, and what `hub.output` does."""
    return hub.output(path_of(value, name))


def live_model(value: object, name: str = "model") -> nn.Module:
    """Return a live torch model. Raises E-ARGUMENT for anything else, a path of one above all."""
    if _is_model(value):
        return value
    fix = "load it first, such as AutoModelForCausalLM.from_pretrained(...)"
    raise _other(value, name, "a torch model in memory", fix if isinstance(value, (str, PathLike)) else "")


def model_or_folder(value: object, name: str = "base") -> nn.Module | Path:
    """Return a live model as it is, or where the folder of one is. Raises E-ARGUMENT."""
    if _is_model(value):
        return value
    if not isinstance(value, (str, PathLike)):
        raise _other(value, name, "a model folder, a hub id or a torch model")
    return located(value, name)


def adapter_of(item: object, reading: ReadOptions, name: str = "adapter") -> LoraAdapter | CompactAdapter:
    """Return an adapter: as it is, of the result of a verb, or read. Raises E-ARGUMENT, and what `load` raises."""
    if isinstance(item, (LoraAdapter, CompactAdapter)):
        return loading.adapter(item, reading)
    if isinstance(compact := getattr(item, "compact", None), CompactAdapter):
        return loading.adapter(compact, reading)
    if isinstance(lora := getattr(item, "lora", None), LoraAdapter):
        return loading.adapter(lora, reading)
    return loading.adapter(path_of(item, name, "an adapter, its path or a result"), reading)


def lora_of(item: object, reading: ReadOptions, name: str = "lora") -> LoraAdapter:
    """Return a LoRA: as it is, or read; a compact adapter, and that of a result, is expanded, with a warning."""
    loaded = adapter_of(item, reading, name)
    return loaded if isinstance(loaded, LoraAdapter) else plain_lora(loaded)


def compact_of(item: object, name: str = "adapter") -> CompactAdapter:
    """Return a compact adapter: as it is, of the result of a verb, or read: an lrconvert file, or a folder of a compact
    layout. Raises E-ARGUMENT and E-LAYOUT for a LoRA, and what reading raises."""
    if isinstance(item, CompactAdapter):
        return item
    if isinstance(compact := getattr(item, "compact", None), CompactAdapter):
        return compact
    fix = "make it compact first: lrconvert.convert(...)"
    if isinstance(item, LoraAdapter):
        raise ArgumentError(f"{name} is a LoRA; a compact adapter was expected", fix=fix)
    given = path_of(item, name, "a compact adapter, its path or a result")
    with fleet_places.adapter(given) as where:
        if not where.is_dir():
            return file.read(where)
    loaded = loading.load(given, ReadOptions())
    if isinstance(loaded, LoraAdapter):
        first = either("lrconvert.convert(...)", "`lrconvert compress`")
        fix = f"make it compact first, with {first}, or give it where a LoRA is asked for"
        raise UnknownLayoutError("is a LoRA, not a compact adapter", fix=fix, path=given)
    return loaded


def check_data(data: object) -> None:
    """Raise E-ARGUMENT unless `data` are files of texts, or batches of model inputs, of which a list is looked into."""
    expected = "files of texts, or batches of model inputs, were expected"
    if not _is_path(data) and (isinstance(data, (bytes, Mapping)) or not isinstance(data, Iterable)):
        raise ArgumentError(f"data is {described(data)}; {expected}")
    if _is_path(data):
        path_of(data, "data")
    for item in data if isinstance(data, (list, tuple)) else ():
        if not _is_path(item) and not hasattr(item, "items"):
            raise ArgumentError(f"data holds {described(item)}; {expected}")


def method_of(name: object) -> tuple[str, dict[str, Any]]:
    """Return the id of a form, and the options that its name stands for: of "bat" ``bone`` with its variant. Raises
    E-ARGUMENT, and E-OPTION for an unknown one."""
    from lrconvert.methods import base as methods

    known = methods.module_names()
    if not isinstance(name, str):
        raise _other(name, "method", "the name of a form", f"known: {', '.join(known)}")
    if name.partition(".v")[0] in known:
        return name, {}
    named = {c.name: (m.id, dict(c.fixed)) for m in methods.all_methods() for c in m.commands}
    if f"lora-to-{name}" in named:
        return named[f"lora-to-{name}"]
    names = sorted({*known, "alora", *(text.removeprefix("lora-to-") for text in named)})
    near = get_close_matches(name.lower(), names, 1)
    guess = f"is it {near[0]!r}? Known: " if near else "known: "
    raise OptionError(f"there is no form {name!r:.40}", fix=f"{guess}{', '.join(names)}")


def _is_path(value: object) -> bool:
    return isinstance(value, (str, PathLike))


def _is_model(value: object) -> TypeGuard[nn.Module]:
    """Say whether a value is a torch module; torch is not loaded to find that out."""
    return any(kind.__module__.startswith("torch.nn") and kind.__name__ == "Module" for kind in type(value).__mro__)


def _other(value: object, name: str, expected: str, fix: str = "") -> ArgumentError:
    """The error for an argument of another kind than `expected`."""
    if _is_model(value):
        fix = fix or "are two arguments swapped?"
    return ArgumentError(f"{name} is {described(value)}; {expected} was expected", fix=fix)


def silent(fraction: float, text: str) -> None:
    """Report nothing: the progress callback of a caller who wants none. What data had to leave out is a Python warning
    there."""
    if isinstance(text, Notice) and text.is_warning:
        warnings.warn(text, stacklevel=2)


def take_reading(keywords: MutableMapping[str, Any], base: Any = None) -> ReadOptions:
    """Remove what says how adapters are read (`ReadOptions`) from `keywords`, and return it with the `base`, if that is
    a path."""
    own = {name: keywords.pop(name) for name in names(ReadOptions) if name in keywords and name != "base"}
    chosen = make(ReadOptions, own, "reading")
    if base is not None and not _is_path(base) and not _is_model(base):
        raise _other(base, "base", "a model folder or a hub id")
    return loading.options(**{**vars(chosen), "base": base})


def refuse_rest(keywords: MutableMapping[str, Any], verb: str, *options: type[Any]) -> None:
    """Raise E-OPTION for a keyword that is a field of none of the `options` of the `verb`."""
    known = [name for kind in options for name in names(kind)]
    refuse_unknown(set(keywords), verb, [*known, *(name for name in names(ReadOptions) if name != "base")])
