"""Which adapters are meant, and where their outputs go."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import overload

import numpy as np

from lrconvert.api.batch import stores
from lrconvert.api.batch.manifest import Manifest, placed
from lrconvert.core.errors import FileReadError, OptionError, OutputPathError, UnknownLayoutError
from lrconvert.core.redaction import redacted
from lrconvert.formats.readers import base as readers
from lrconvert.formats.readers.shared.folders import CONFIG_NAME
from lrconvert.io import hub, mistaken
from lrconvert.io.remote import Url, is_remote, parse

AnyPath = str | os.PathLike[str]
SUFFIX = ".lrc"
# What tools call the one file of an adapter: it is named by its folder.
_GENERIC = ("adapter", "adapter_model", "adapters", "lora", "pytorch_lora_weights")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".gguf", SUFFIX)


@dataclass(frozen=True, slots=True)
class Planned:
    """One adapter: `source` as it is shown, `path` where it lies, `output` the file to write, `name` its path in the
    folder of the outputs, or what the manifest calls it; `digest` what its files must have, and `state` that of its
    files in a listing, where these are known."""

    source: str
    where: str
    target: str
    name: str
    digest: str = ""
    state: str = ""

    @property
    def path(self) -> Path:
        return Path(self.where)

    @property
    def output(self) -> Path:
        return Path(self.target)


def is_adapter(path: Path) -> bool:
    """Return true if `path` itself is an adapter, and no folder of adapters."""
    # Whatever it says, some reader takes it, or refuses it by name; and so with the folder of a model.
    if path.is_file() or (path / CONFIG_NAME).exists() or mistaken.is_model(path):
        return True
    return any(reader.recognises(path) for reader in readers.all_readers())


def adapters_in(folder: Path, inside: str = "") -> Iterator[str]:
    """The adapters below a folder, by their paths in there, in the order of their names: folders that a reader
    recognises, which end with a slash and are not looked into, and files that look like weights, recognised or not.
    Hidden names and links to folders are passed by. Raises E-IO-READ."""
    try:
        entries = sorted((p.name, p.is_dir()) for p in (folder / inside).iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise FileReadError(f"cannot be looked into: {error.strerror}", path=folder / inside) from None
    for name, is_folder in entries:
        path = f"{inside}{name}"
        if is_folder:
            if is_adapter(folder / path):
                yield f"{path}/"
            elif not (folder / path).is_symlink():
                yield from adapters_in(folder, f"{path}/")
        elif name.endswith(WEIGHTS) and (folder / path).is_file():
            yield path


def are_many(sources: Sequence[Path | Url], output: Path | Url | None) -> bool:
    """Return true if `sources` are to be converted into files in a folder: several, or a folder that is no adapter and
    holds more than one, or that is to be converted into an existing folder."""
    if len(sources) != 1:
        return True
    if isinstance(sources[0], Url):
        return stores.are_many(sources[0], output)
    where = hub.locate(sources[0])
    if not where.is_dir() or is_adapter(where):
        return False
    adapters = adapters_in(where)
    return next(adapters, None) is not None and (
        next(adapters, None) is not None or (isinstance(output, Path) and output.is_dir())
    )


@dataclass(frozen=True, slots=True)
class _Source:
    """One source as it was given, `where` it lies, and the paths of the adapters in it, as of `adapters_in`; one that
    is itself an adapter has one, the empty one."""

    shown: str
    where: Path | Url
    paths: Sequence[str]
    states: bytes = b""

    def job(self, number: int, out: Path | Url) -> Planned:
        """The adapter of that number, for an output below `out`."""
        path, state = self.paths[number], stores.state_at(self.states, number)
        if not path:
            place, target = os.fspath(self.where), os.fspath(out / self._own_name)
            return Planned(self.shown, place, target, self._own_name, state=state)
        *folders, name = path.removesuffix("/").split("/")
        plain = name if path.endswith("/") else _plain(name)
        if plain != name and plain in _GENERIC:
            plain = folders.pop() if folders else self._named
        target = "/".join([*folders, f"{plain}{SUFFIX}"])
        shown = str(self.where / path if isinstance(self.where, Url) else Path(self.shown, path))
        return Planned(shown, os.fspath(self.where / path), os.fspath(out / target), target, state=state)

    @property
    def _named(self) -> str:
        return hub.hint(self.shown).replace("/", "--")

    @property
    def _own_name(self) -> str:
        if isinstance(self.where, Url):
            *_, above, name = ("", *(part for part in self.where.text.rstrip("/").split("/") if part))
            return f"{above if _plain(name) in _GENERIC else _plain(self.where.name)}{SUFFIX}"
        if not self.where.is_file():
            return f"{self._named}{SUFFIX}"
        named = self.where.resolve().parent.name if self.where.stem in _GENERIC else self._named
        return f"{_plain(named)}{SUFFIX}"


def _plain(name: str) -> str:
    """The name of a file of weights without its suffix; another one as it is."""
    path = Path(name)
    return path.stem if path.suffix in WEIGHTS else name


class Jobs(Sequence[Planned], ABC):
    """Jobs by their number, each made when it is asked for: a fleet may have a hundred thousand."""

    @overload
    def __getitem__(self, number: int) -> Planned: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Planned]: ...
    def __getitem__(self, number: int | slice) -> Planned | Sequence[Planned]:
        numbers = range(len(self))[number]
        return self._job(numbers) if isinstance(numbers, int) else [self._job(n) for n in numbers]

    @abstractmethod
    def _job(self, number: int) -> Planned: ...


class Plan(Jobs):
    """A job for every adapter of sources. Of an adapter its path inside the source is kept, some hundred bytes."""

    def __init__(self, sources: Sequence[_Source], out: Path | Url) -> None:
        self._sources, self._out = sources, out
        self._ends = list(accumulate(len(source.paths) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _job(self, number: int) -> Planned:
        at = bisect_right(self._ends, number)
        return self._sources[at].job(number - (self._ends[at - 1] if at else 0), self._out)


class AskedPlan(Jobs):
    """The jobs of a manifest, each read when it is asked for."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def __len__(self) -> int:
        return len(self._manifest)

    def _job(self, number: int) -> Planned:
        asked = self._manifest.job(number)
        source, output = (placed(name, self._manifest.folder) for name in (asked.source, asked.output))
        if hub.parse(asked.source) is not None and not Path(source).exists():
            source = asked.source
        return Planned(redacted(asked.source), source, output, asked.output, asked.digest or "")


def plan(sources: Sequence[AnyPath], out_root: Path | Url | None) -> Plan:
    """A job for every adapter, in the order given: ``OUT/<name>.lrc``, for one inside a folder by its path in there.
    Without `out_root` nothing is to be written.

    Raises E-LAYOUT for a folder without adapters, E-OPTION for two outputs of one name, E-OUT-PATH for an output folder
    inside a folder of sources.
    """
    jobs = Plan([_looked_into(source, out_root) for source in sources], out_root or Path())
    keys = np.frombuffer(array("q", (hash(job.target) for job in jobs)), np.int64)
    seen, times = np.unique(keys, return_counts=True)
    repeated, first = set(seen[times > 1].tolist()), dict[str, str]()
    for job in (job for job in jobs if hash(job.target) in repeated) if repeated else ():
        if job.target in first:
            raise OptionError(
                f"{first[job.target]!r} and {job.source!r} would both be written to {job.output.name!r}",
                fix="rename one, or convert them into different folders",
            )
        first[job.target] = job.source
    return jobs


def _looked_into(source: AnyPath, out_root: Path | Url | None) -> _Source:
    if is_remote(source):
        url = parse(os.fspath(source))
        return _Source(str(url), url, *stores.listed(url, out_root))
    where, out = hub.locate(source), out_root if isinstance(out_root, Path) else Path()
    if isinstance(out_root, Path) and where.is_dir() and where.resolve() in (out.resolve(), *out.resolve().parents):
        raise OutputPathError(f"lies inside the source {os.fspath(source)!r}", fix="choose another output", path=out)
    if not where.is_dir() or is_adapter(where):
        return _Source(os.fspath(source), where, ("",))
    paths = list(adapters_in(where))
    if not paths:
        raise UnknownLayoutError("no adapter was found in this folder", path=source)
    return _Source(os.fspath(source), where, paths)
