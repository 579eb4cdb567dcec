"""Adapters of URLs as files of this machine: only what is needed of them, sizes known and bounded before.

They lie in a folder of the process (`io.durable.scratch`) below LRCONVERT_SCRATCH, by default below the system's folder
for temporary files, and go with it. Names are those at the URL, so what is read of them says the same.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

from lrconvert.core.byte_sizes import byte_count
from lrconvert.core.errors import (
    FileChangedError,
    LimitError,
    LrcError,
    OptionError,
    TensorNameError,
    UnknownLayoutError,
)
from lrconvert.core.limits import MAX_FETCHED
from lrconvert.core.wording import is_on_command_line
from lrconvert.io.durable import require_space
from lrconvert.io.durable.scratch import Scratch, discard_folder
from lrconvert.io.remote.failures import missing
from lrconvert.io.remote.listing import (
    CARD,
    CONFIG,
    MODEL_CONFIGS,
    SHAPES,
    Adapter,
    adapter_of,
    adapters,
    is_weights,
    needed,
)
from lrconvert.io.remote.opening import open_store
from lrconvert.io.remote.stores import READ_ONLY, Entry, Store
from lrconvert.io.remote.urls import Url

SCRATCH, SCRATCH_SIZE = "LRCONVERT_SCRATCH", "LRCONVERT_SCRATCH_SIZE"
_SIZE = "20GB"
_LEAST_KEPT = 16  # of the last copies: a verb may read several adapters
_AT_ONCE = 8  # files of an adapter
_STATES_ALL = (".lrc", ".gguf")  # files that need nothing beside them
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Files:
    """The files of the adapter at a URL, each at its place; `single` is the name of the weights where the URL names a
    file, "" where it names a folder."""

    url: Url
    items: Sequence[tuple[Store, Entry]]
    single: str = ""

    @property
    def adapter(self) -> Adapter:
        """Return the adapter as a listing has it: a file by itself, whatever stands beside it."""
        entries = [entry for _, entry in self.items]
        return adapter_of("", entries[:1] if self.single else entries)


def files_of(place: Store) -> Files:
    """Return what is to be fetched of the adapter at a place. Raises E-IO-KIND if nothing is there, E-LAYOUT for a
    folder of several adapters, E-LIMIT."""
    is_folder = place.url.text.endswith("/")
    if place.url.scheme in READ_ONLY:
        return _on_the_web(place, is_folder)
    if not is_folder and is_weights(place.url.name) and (own := place.stat()) is not None:
        return _single(place, own)
    entries = place.names()
    if is_one(entries):
        return Files(place.url, [(place.below(entry.name), entry) for entry in needed(entries)])
    if not is_folder and not entries and (own := place.stat()) is not None:
        return _single(place, own)
    inner = list(islice(adapters(place), 2))
    if len(inner) == 1 and inner[0].path:
        return files_of(place.below(inner[0].path))
    if inner:
        fix = f"give one of them, such as {place.url / inner[0].path}"
        raise UnknownLayoutError("holds several adapters, where one is asked for", fix=fix, path=place.url)
    raise UnknownLayoutError("no adapter was found in this folder", path=place.url)


def is_one(entries: Sequence[Entry]) -> bool:
    """Return true if the files of a folder make one adapter, or the folder of a model."""
    return not {CONFIG, *MODEL_CONFIGS}.isdisjoint(entry.name for entry in entries)


def _single(place: Store, own: Entry) -> Files:
    """A file of weights, with what may stand beside it."""
    beside = []
    if not own.name.endswith(_STATES_ALL) and "?" not in place.url.text:
        beside = _present(place.parent(), (CONFIG,))
        beside += _present(place.parent(), (SHAPES, CARD)) if beside else []
    return Files(place.url, [(place, own), *beside], own.name)


def _present(folder: Store, names: Sequence[str]) -> list[tuple[Store, Entry]]:
    places = [folder.below(name) for name in names]
    return [(place, entry) for place in places if (entry := place.stat()) is not None]


def _on_the_web(place: Store, is_folder: bool) -> Files:
    """Files by the names that they have by convention, since nothing lists them."""
    if not is_folder:
        if (own := place.stat()) is None:
            raise missing(place.url)
        return _single(place, own)
    for name in _WEIGHTS:
        if weights := _present(place, (name,)):
            return Files(place.url, [*_present(place, (CONFIG, SHAPES, CARD)), *weights])
    raise missing(place.url / _WEIGHTS[0])


def fetch(files: Files, target: Path) -> Path:
    """Write the files of an adapter into the folder `target`, and return its path there. Raises E-LIMIT and E-OUT-SPACE
    before anything is fetched, E-IO-CHANGED if the adapter changed meanwhile."""
    total = sum(entry.size or 0 for _, entry in files.items)
    if total > MAX_FETCHED:
        what = f"has {total:,} bytes; no more than {MAX_FETCHED:,} are fetched of one adapter"
        raise LimitError(what, path=files.url)
    require_space(target, total)
    for _, entry in files.items:
        if "/" in entry.name or entry.name in ("", ".", "..") or len(entry.name.encode()) > 255:
            raise TensorNameError(f"has a file of the name {entry.name!r:.80}", path=files.url)
    if len(files.items) > 1 and all(place.is_threaded for place, _ in files.items):
        with ThreadPoolExecutor(min(_AT_ONCE, len(files.items))) as threads:
            started = [
                threads.submit(copy_context().run, partial(_fetch, place, entry, target))
                for place, entry in files.items
            ]
            for each in started:
                each.result()
    else:
        for place, entry in files.items:
            _fetch(place, entry, target)
    return target / files.single if files.single else target


def _fetch(place: Store, entry: Entry, target: Path) -> None:
    local = target / entry.name
    try:
        place.get(local, MAX_FETCHED if entry.size is None else entry.size)
        same = entry.size in (None, local.stat().st_size)
    except FileNotFoundError:
        same = False
    if not same:
        raise FileChangedError("changed while it was fetched", fix="try it again", path=place.url)


# --- where they lie -----------------------------------------------------------------------------------------------


@contextmanager
def fetched(text: str) -> Iterator[Path]:
    """Give the adapter at a URL as a file or folder of this machine, until the context ends. Raises what `files_of` and
    `fetch` raise, E-DEPENDENCY and E-OPTION."""
    files = files_of(open_store(text))
    with folder(_folder_name(files)) as target:
        path = fetch(files, target)
        with named(path, text):
            yield path


@contextmanager
def fetched_file(text: str) -> Iterator[Path | None]:
    """Give the file at a URL as one of this machine, until the context ends; None if there is none."""
    place = open_store(text)
    entry = place.stat()
    if entry is None:
        yield None
        return
    with folder("file") as target:
        yield fetch(Files(place.url, [(place, entry)], entry.name), target)


@contextmanager
def folder(name: str) -> Iterator[Path]:
    """Give a folder of that name for what is fetched or to be published, until the context ends."""
    target = _scratch(os.getpid()).folder(name)
    try:
        yield target
    finally:
        discard_folder(target.parent)


def local_copy(text: str) -> Path:
    """Return the adapter at a URL as a file or folder of this machine, which stays until the process ends, or until it
    has another version at the URL, or many others were fetched. Raises what `fetched` raises."""
    return _copies(os.getpid()).of(text)


@contextmanager
def named(local: Path, text: str) -> Iterator[None]:
    """Let errors of a copy name the URL that it is of."""
    try:
        yield
    except LrcError as error:
        shown = str(Url(text))
        if error.path is not None:
            error.path = error.path.replace(str(local), shown.rstrip("/"), 1)
        error.what = error.what.replace(str(local), shown)
        raise


def _folder_name(files: Files) -> str:
    """Return what the folder of an adapter is called at its URL."""
    url = files.url
    text = re.split("[?]", url.text, maxsplit=1)[0]
    name = Url(text.rstrip("/").rpartition("/")[0]).name if files.single else url.name
    return name if name.isprintable() and 0 < len(name.encode()) <= 255 and name not in (".", "..") else "adapter"


@dataclass(frozen=True)
class _Copy:
    state: str
    path: Path
    folder: Path
    nbytes: int


class _Copies:
    """Copies that a process has fetched, the last used at the end."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Copy] = OrderedDict()
        self._lock = threading.Lock()
        text = os.environ.get(SCRATCH_SIZE, "").strip() or _SIZE
        try:
            self._most = byte_count(text)
        except OptionError as error:
            raise OptionError(f"{SCRATCH_SIZE} is {text!r:.40}: {error.what}", fix=error.fix) from None

    def of(self, text: str) -> Path:
        with self._lock:
            known = self._known.get(text)
            if known is not None and is_on_command_line():  # a command looks once
                return known.path
            files = files_of(open_store(text))
            state = files.adapter.state
            if known is not None and state and known.state == state:
                self._known.move_to_end(text)
                return known.path
            if known is not None:
                self._drop(text)
            return self._fetched(text, files, state)

    def _fetched(self, text: str, files: Files, state: str) -> Path:
        nbytes = files.adapter.nbytes
        while len(self._known) > _LEAST_KEPT and self._held + nbytes > self._most:
            self._drop(next(iter(self._known)))
        target = _scratch(os.getpid()).folder(_folder_name(files))
        try:
            path = fetch(files, target)
        except BaseException:
            discard_folder(target.parent)
            raise
        self._known[text] = _Copy(state, path, target.parent, nbytes)
        return path

    @property
    def _held(self) -> int:
        return sum(copy.nbytes for copy in self._known.values())

    def _drop(self, text: str) -> None:
        discard_folder(self._known.pop(text).folder)


@lru_cache(maxsize=1)
def _copies(process: int) -> _Copies:
    return _Copies()


@lru_cache(maxsize=1)
def _scratch(process: int) -> Scratch:
    """The folder of a process, which is removed when it ends; a child that was forked has its own."""
    named = os.environ.get(SCRATCH, "").strip()
    root = Path(named) if named else Path(tempfile.gettempdir()) / f"lrconvert-{os.geteuid()}"
    scratch = Scratch(root.absolute())
    from multiprocessing import util

    util.Finalize(None, scratch.close, exitpriority=0)  # which processes of a pool run, too, and forked children do not
    return scratch
