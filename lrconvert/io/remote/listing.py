"""Adapters below a URL, told by the names in its listing: nothing is opened.

An adapter is a folder with an adapter_config.json, whatever else is in it (what lies below it, such as checkpoints, is
part of it), the folder of a model, which is refused when it is read, or a single file of weights elsewhere. Hidden
names, and what trainers keep to go on with, are none.

The listing is read once, a page at a time. Of a folder that is being listed no more is kept than what tells the
version of an adapter; keys come in the order of their bytes, so a folder ends where the first key outside it comes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lrconvert.core.errors import FileReadError
from lrconvert.io.remote.failures import missing
from lrconvert.io.remote.stores import Entry, Store

CONFIG = "adapter_config.json"
MODEL_CONFIGS = ("config.json", "model_index.json")
SHAPES, CARD = "lrconvert.json", "README.md"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".gguf", ".lrc")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_PEFT = ("adapter_model.safetensors", "adapter_model.bin")
_INDEX = ".index.json"
# Beside an adapter's weights: the state of a trainer, in pickles and tensors of its own.
_OF_TRAINERS = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args|random_states|pytorch_model_fsdp)\b.*")


@dataclass(frozen=True)
class Adapter:
    """An adapter below a URL: its `path` there ("" if it is the place itself; a folder ends with a slash), the bytes of
    what is needed of it, and a digest of names and versions ("" if the store tells no versions)."""

    path: str
    nbytes: int
    state: str


def is_weights(name: str) -> bool:
    """Return true for the name of a file that may be an adapter by itself."""
    return name.endswith(WEIGHTS) and not name.startswith(".") and not _OF_TRAINERS.fullmatch(name)


def needed(entries: Sequence[Entry]) -> list[Entry]:
    """Return the files of an adapter's folder that are read: its configuration, card and weights; of the folder of a
    model its configuration alone, by which it is refused."""
    known = {entry.name: entry for entry in entries}
    if CONFIG not in known and (models := [name for name in MODEL_CONFIGS if name in known]):
        return [known[name] for name in models]
    beside = [name for name in (CONFIG, SHAPES, CARD, *MODEL_CONFIGS) if name in known]
    return [known[name] for name in [*beside, *_weights(list(known))]]


def _weights(names: Sequence[str]) -> list[str]:
    for name in _PEFT:
        if name in names:
            return [name]
        if f"{name}{_INDEX}" in names:  # in shards
            stem, _, suffix = name.rpartition(".")
            shards = re.compile(rf"{re.escape(stem)}-\d+-of-\d+\.{suffix}")
            return [f"{name}{_INDEX}", *(other for other in names if shards.fullmatch(other))]
    weights = [name for name in names if is_weights(name) or name.endswith(_INDEX)]
    safe = [name for name in weights if not name.endswith(_PICKLES)]
    return safe or weights


def adapter_of(path: str, files: Sequence[Entry]) -> Adapter:
    """Return the adapter that files make up."""
    wanted = sorted(files, key=lambda entry: entry.name)
    whole = hashlib.sha256()
    for entry in wanted:
        whole.update(f"{entry.name}\0{entry.version}\n".encode())
    known = all(entry.version for entry in wanted)
    return Adapter(path, sum(entry.size or 0 for entry in wanted), whole.hexdigest()[:32] if known else "")


def state_of(entry: Entry | None) -> str:
    """Return a digest of the version of a file, None for one that is not there."""
    return hashlib.sha256(b"" if entry is None else entry.version.encode()).hexdigest()[:32]


def adapters(place: Store) -> Iterator[Adapter]:
    """Give the adapters at a place: the file itself, or those in the folder, in the order of their names. Raises
    E-IO-KIND if nothing is there, E-ACCESS, E-REMOTE."""
    named = place.url.name
    is_folder = place.url.text.endswith("/")
    if not is_folder and is_weights(named) and (own := place.stat()) is not None:
        yield adapter_of("", [own])
        return
    seen = False
    for adapter in _told(_watched(place), lambda inside: place.below(f"{inside}{CONFIG}").stat() is not None):
        seen = True
        yield adapter
    if not seen and next(place.walk(), None) is None:
        if not is_folder and (own := place.stat()) is not None:
            yield adapter_of("", [own])
            return
        raise missing(place.url)


def _watched(place: Store) -> Iterator[Entry]:
    """The files below a place. Raises E-IO-READ if they come in an order in which folders cannot be told."""
    last = b""
    for entry in place.walk():
        parts = entry.name.split("/")
        if any(part in ("", ".", "..") for part in parts):  # a key may be called anything; no folder of ours may
            continue
        if (key := _order(parts)) < last:
            raise FileReadError("lists its files in no order", fix="give the adapters one by one", path=place.url)
        last = key
        yield entry


def _order(parts: Sequence[str]) -> bytes:
    return "/".join(parts).encode("utf-8", "surrogatepass")


@dataclass
class _Folder:
    """A folder that is being listed, by its path with a slash at the end; None of `is_adapter`: not known yet."""

    path: str
    is_adapter: bool | None = None
    is_model: bool = False
    kept: list[Entry] = field(default_factory=list)

    def inside(self, name: str) -> str:
        return name[len(self.path) :]

    def closed(self) -> Iterator[Adapter]:
        if self.is_adapter or self.is_model:
            yield adapter_of(self.path, needed(self.kept))


def _told(entries: Iterable[Entry], has_config: Callable[[str], bool]) -> Iterator[Adapter]:
    """The adapters among files in the order of their names. `has_config` is asked of a folder only where something
    comes before the name by which it would be told."""
    stack = [_Folder("")]
    for entry in entries:
        while not entry.name.startswith(stack[-1].path):
            yield from stack.pop().closed()
        if any(folder.is_adapter or folder.is_model for folder in stack[:-1]):
            continue
        folders = stack[-1].inside(entry.name).split("/")[:-1]
        if stack[-1].is_adapter or stack[-1].is_model:
            if not folders:
                _keep(stack[-1], entry)
            continue
        if any(part.startswith(".") for part in folders):
            continue
        for part in folders:
            stack.append(_Folder(f"{stack[-1].path}{part}/"))
        yield from _taken(stack, entry, has_config)
    while stack:
        yield from stack.pop().closed()


def _taken(stack: list[_Folder], entry: Entry, has_config: Callable[[str], bool]) -> Iterator[Adapter]:
    """Take up a file in the last folder of the stack; a single adapter comes at once."""
    own = stack[-1]
    name = own.inside(entry.name)
    counts = is_weights(name) or name == CONFIG or name in MODEL_CONFIGS
    for folder in stack if counts else ():
        if folder.is_adapter is None:
            inside = folder.inside(entry.name)
            folder.is_adapter = inside == CONFIG or (inside < CONFIG and has_config(folder.path))
        if folder.is_adapter:
            break
    above = [folder for folder in stack if folder.is_adapter]
    if above:
        if above[0] is own:
            _keep(own, entry)
        return
    if name in MODEL_CONFIGS:
        own.is_model = True
        _keep(own, entry)
    elif is_weights(name):
        yield adapter_of(entry.name, [Entry(name, entry.size, entry.version)])
    elif name in (CARD, SHAPES):
        _keep(own, entry)


def _keep(folder: _Folder, entry: Entry) -> None:
    name = folder.inside(entry.name)
    if is_weights(name) or name in (CONFIG, SHAPES, CARD, *MODEL_CONFIGS) or name.endswith(_INDEX):
        folder.kept.append(Entry(name, entry.size, entry.version, entry.md5))
