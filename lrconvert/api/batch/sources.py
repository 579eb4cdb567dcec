"""Which adapters are meant, and where their outputs go."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lrconvert.core.errors import FileReadError, OptionError, OutputPathError, UnknownLayoutError
from lrconvert.formats.readers import base as readers
from lrconvert.io import hub

AnyPath = str | os.PathLike[str]
SUFFIX = ".lrc"
# What tools call the one file of an adapter: it is named by its folder.
_GENERIC = ("adapter", "adapter_model", "adapters", "lora", "pytorch_lora_weights")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".gguf", SUFFIX)


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter: `source` as it is shown, `path` where it lies, `output` the file to write. Texts: a hundred thousand
    paths would take a tenth of a gigabyte."""

    source: str
    where: str
    target: str

    @property
    def path(self) -> Path:
        return Path(self.where)

    @property
    def output(self) -> Path:
        return Path(self.target)


def is_adapter(path: Path) -> bool:
    """Return true if `path` itself is an adapter, and no folder of adapters."""
    if path.is_file():
        return True
    return any(reader.recognises(path) for reader in readers.all_readers())


def adapters_in(folder: Path) -> Iterator[Path]:
    """The adapters below a folder, in the order of their names: folders that a reader recognises, which are not looked
    into, and files that look like weights, recognised or not. Hidden names and links to folders are passed by.
    Raises E-IO-READ."""
    try:
        entries = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise FileReadError(f"cannot be looked into: {error.strerror}", path=folder) from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if is_adapter(entry):
                yield entry
            elif not entry.is_symlink():
                yield from adapters_in(entry)
        elif entry.is_file() and entry.suffix in _WEIGHTS:
            yield entry


def are_many(sources: Sequence[Path], output: Path | None) -> bool:
    """Return true if `sources` are to be converted into files in a folder: several, or a folder that is no adapter and
    holds more than one, or that is to be converted into an existing folder."""
    if len(sources) != 1:
        return True
    where = hub.locate(sources[0])
    if not where.is_dir() or is_adapter(where):
        return False
    adapters = adapters_in(where)
    return next(adapters, None) is not None and (
        next(adapters, None) is not None or (output is not None and output.is_dir())
    )


def plan(sources: Sequence[AnyPath], out_root: Path | None) -> tuple[Job, ...]:
    """A job for every adapter, in the order given: ``OUT/<name>.lrc``, for one inside a folder by its path in there.
    Without `out_root` nothing is to be written.

    Raises E-LAYOUT for a folder without adapters, E-OPTION for two outputs of one name, E-OUT-PATH for an output folder
    inside a folder of sources.
    """
    jobs = [job for source in sources for job in _jobs(source, out_root)]
    seen: dict[str, str] = {}
    for job in jobs:
        if job.target in seen:
            raise OptionError(
                f"{seen[job.target]!r} and {job.source!r} would both be written to {job.output.name!r}",
                fix="rename one, or convert them into different folders",
            )
        seen[job.target] = job.source
    return tuple(jobs)


def _jobs(source: AnyPath, out_root: Path | None) -> Iterator[Job]:
    where, out = hub.locate(source), out_root or Path()
    if out_root is not None and where.is_dir() and where.resolve() in (out.resolve(), *out.resolve().parents):
        raise OutputPathError(f"lies inside the source {os.fspath(source)!r}", fix="choose another output", path=out)
    if not where.is_dir() or is_adapter(where):
        named = hub.hint(source).replace("/", "--")
        if where.is_file() and where.stem in _GENERIC:
            named = where.resolve().parent.name
        yield Job(os.fspath(source), str(where), str(out / _file_name(named, where)))
        return
    path = None
    for path in adapters_in(where):
        inside = path.relative_to(where)
        name = inside.parent / _file_name(inside.name, path)
        if path.is_file() and path.stem in _GENERIC:
            folder = inside.parent if inside.parent.name else Path(hub.hint(source).replace("/", "--"))
            name = folder.parent / f"{folder.name}{SUFFIX}"
        yield Job(str(Path(source) / inside), str(path), str(out / name))
    if path is None:
        raise UnknownLayoutError("no adapter was found in this folder", path=source)


def _file_name(name: str, path: Path) -> str:
    plain = name.removesuffix(path.suffix) if path.is_file() and path.suffix in _WEIGHTS else name
    return f"{plain}{SUFFIX}"
