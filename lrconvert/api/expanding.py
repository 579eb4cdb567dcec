"""The verb `expanded`: a compact file as a folder that servers load, made once however many ask for it."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.api.shared import AnyPath, is_remote, located, output_of, path_of, refuse_rest
from lrconvert.core.errors import ArgumentError, FileKindError, LrcError, OptionError, UnknownLayoutError
from lrconvert.core.options import described, option, take
from lrconvert.core.version import __version__
from lrconvert.core.wording import spelled, verb
from lrconvert.formats.expansions.cache import Cache, Expansion, Files
from lrconvert.formats.expansions.ranks import MAX_ERROR
from lrconvert.formats.expansions.reducing import Reduced, reduced
from lrconvert.formats.expansions.sources import FleetMember, LocalFile, RemoteFile, Source
from lrconvert.formats.exporters import base as exporters
from lrconvert.formats.exporters.base import ExportOptions
from lrconvert.formats.fleet import names
from lrconvert.formats.lrc import file
from lrconvert.io import remote
from lrconvert.lora.adapter import CompactAdapter

_WRITER = 1  # of what an expansion holds: a new number where the same file becomes other bytes
CACHE_VARIABLE = "LRCONVERT_CACHE"


@dataclass(frozen=True)
class ExpandOptions:
    """The options of an expansion, and how large the cache may grow."""

    dtype: str | None = option(
        None, "Of the factors; without it F32. A server rounds to its own.", choices=("F32", "F16", "BF16")
    )
    rank: int | None = option(None, "Pad with zeros to this rank; without it to the largest of the file.", least=1)
    max_rank: int | None = option(
        None, "At most this rank: exact where the update allows it, else the nearest, with its error stated.", least=1
    )
    max_error: float = option(MAX_ERROR, "How much of the update's norm --max-rank may cost.", least=0, kind="share")
    cache_size: int | None = option(
        None, "Keep the cache to this size, such as 20GB: what was not asked for longest goes.", least=0, kind="size"
    )


def expanded(
    path: AnyPath,
    cache: AnyPath | None = None,
    options: ExpandOptions | None = None,
    *,
    to: str = "peft-lora",
    base: AnyPath | None = None,
    **more: Any,
) -> Path:
    """Return a folder that servers load: the expansion of the lrconvert file `path`, made in `cache` if it is not yet.

    The folder is known by the content of the file and by how it is expanded, so it never changes: a changed file gives
    another folder. However many processes ask for it at once, one makes it. `cache`: without it LRCONVERT_CACHE or
    ~/.cache/lrconvert. `to` is "peft-lora" or another layout of `export`; `base` (its config.json is enough) decides
    the names of modules. `more` are single fields of `ExpandOptions`: `dtype`, `rank`, `max_rank`, `max_error`,
    `cache_size`.

    What was asked for in the last ten minutes stays, whatever the size of the cache. A rank that costs some of the
    update is a Python warning. Raises E-EXPORT for what the layout or `max_rank` cannot express, E-OPTION, E-IO-*,
    E-OUT-PATH, and what reading raises.

    >>> from lrconvert import convert, write
    >>> _ = write(convert("my-adapter", "lowrank", target_size=6000), "small.lrc")
    >>> folder = expanded("small.lrc", "cache", dtype="BF16")
    >>> sorted(path.name for path in folder.iterdir())
    ['README.md', 'adapter_config.json', 'adapter_model.safetensors', 'expansion.json', 'lrconvert.json']
    >>> expanded("small.lrc", "cache", dtype="BF16") == folder
    True
    """
    chosen = take(ExpandOptions, options, more, "expanded")
    refuse_rest(more, "expanded", ExpandOptions)
    cached = expand(source_at(path), cache, chosen, to=to, base=base)
    for line in notes_of(cached):
        warnings.warn(line, stacklevel=2)
    return cached.folder


Load = Callable[[], CompactAdapter]
Accept = Callable[[Mapping[str, Any], Load], None]


def expand(
    source: Source,
    cache: AnyPath | None,
    options: ExpandOptions,
    *,
    to: str = "peft-lora",
    base: AnyPath | None = None,
    accept: Accept = lambda facts, load: None,
) -> Expansion:
    """Return the expansion of a source. `accept` may refuse it by raising: it is given the facts about it, and what
    loads it, before anything is made, and of an expansion that is there. Raises what `expanded` and `accept` raise."""
    if not isinstance(to, str) or to not in exporters.ids():
        fix = ", ".join(exporters.ids())
        raise ArgumentError(f"to is {described(to)}; the name of a layout was expected", fix=fix)
    place = cache_folder(cache)
    config = None if base is None else exporters.base_config(located(base, "base"))
    with source.opened(place / "digests") as opened:

        def make() -> tuple[Files, Mapping[str, Any]]:
            compact = file.read(opened.path())
            facts = _facts(compact)
            accept(facts, lambda: compact)
            made, more = _files(compact, options, to, config)
            opened.check()
            return made, facts | more

        try:
            cached = Cache(place, options.cache_size).get(_key(opened.digest, options, to, config), make)
            if cached.was_there:
                accept(cached.facts, lambda: file.read(opened.path()))
        except LrcError as error:
            raise error.at(source.shown) from None
    return cached


def cache_folder(cache: AnyPath | None) -> Path:
    """Return where expansions lie: in `cache`, LRCONVERT_CACHE, or the user's own cache."""
    if cache is not None:
        return output_of(cache, "cache").resolve()
    if named := os.environ.get(CACHE_VARIABLE):
        return output_of(named, CACHE_VARIABLE).resolve()
    try:
        own = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        what = f"this user has no home for {spelled('cache')}"
        raise OptionError(what, fix=f"name a folder, or set {CACHE_VARIABLE}") from None
    return Path(own).resolve() / "lrconvert"


def source_at(given: AnyPath) -> Source:
    """Return the source at a path, a URL or ``FLEET#NAME``. Raises E-IO-KIND or E-LAYOUT for what is no file, E-REMOTE,
    E-ACCESS."""
    given = path_of(given, "path", "the path or URL of an lrconvert file")
    if is_remote(given):
        place = remote.open_store(os.fspath(given))
        if (entry := place.stat()) is None:
            raise remote.missing(place.url)
        return RemoteFile(place, entry)
    path = remote.local_path(os.fspath(given)) or Path(given)
    if (member := names.member_of(path)) is not None:
        return FleetMember(*member)
    if names.is_fleet(path):
        raise UnknownLayoutError("is a fleet, of which a member is expanded", fix=f"write {path}#NAME", path=path)
    if path.is_dir():
        is_lora = (path / "adapter_config.json").exists()
        what = "is a folder; lrconvert files are expanded" + (", and servers load a LoRA as it is" if is_lora else "")
        raise UnknownLayoutError(what, fix=f"give a file, or use {verb('export')}", path=path)
    if not path.exists():
        raise FileKindError("there is no such file", path=path)
    return LocalFile(path)


def _key(digest: str, options: ExpandOptions, to: str, config: Mapping[str, Any] | None) -> str:
    """The name of an expansion: a digest of all that decides its bytes, and of what its error may be."""
    limits = None if options.max_rank is None else [options.max_rank, options.max_error]
    writer = [_WRITER, __version__]
    about = [digest, to, options.dtype, options.rank, limits, writer, config]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _files(
    compact: CompactAdapter, options: ExpandOptions, to: str, config: Mapping[str, Any] | None
) -> tuple[Files, dict[str, Any]]:
    """The files of an expansion, and the facts that come of making it."""
    small = Reduced(compact, 0)
    if options.max_rank is not None:
        small = reduced(compact, options.max_rank, options.max_error)
    public, notes = exporters.public(small.adapter, None)
    export = ExportOptions(pad_rank=options.rank, dtype=options.dtype, base_config=config)
    made = exporters.get(to).folder(public, export, None)
    facts: dict[str, Any] = {"notes": [*notes, *made.notes]}
    if small.cut:
        about = {"rank": small.rank, "targets": small.cut, "error": small.error}
        facts["reduced"] = about | {"worst": small.worst, "worst_error": small.worst_error}
    return made.files, facts


def _facts(compact: CompactAdapter) -> dict[str, Any]:
    """The facts of a file whose expansion is there: the base that it was made for."""
    provenance = compact.provenance
    about = {"model": provenance.base_model, "revision": provenance.revision}
    return {"base": about | {"names": compact.base.names, "content": compact.base.content}}


def notes_of(cached: Expansion) -> tuple[str, ...]:
    """Return what a user is told of an expansion each time that it is asked for, a line each."""
    lines = []
    if (cut := cached.facts.get("reduced")) and cut["error"] > 1e-6:
        lines.append(
            f"{cut['targets']} of the targets are cut to rank {cut['rank']}: {cut['error']:.2g} of the update's norm "
            f"is lost, at most {cut['worst_error']:.2g} of a target's ({cut['worst']})"
        )
    if cached.excess:
        more = f"{cached.excess:,} bytes more than {spelled('cache_size')}"
        lines.append(f"the cache has {more}, all of it in use or asked for in the last ten minutes")
    return tuple(lines)
