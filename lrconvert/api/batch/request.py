"""What makes an output finished: the digest of all that it depends on, kept in its provenance as ``request``.

    sha256 of the canonical JSON of {verb, method, options, loading, source, inputs}, its first 128 bits in hexadecimal

`source` is the digest of the adapter's files, so that a changed configuration counts, and `inputs` are the digests of
the base's contents, the statistics and the data: names of folders do not count, and neither do times. An output that
holds the digest and passes every check is not made again; a crash leaves no file, or one that is finished.

The state of files, which `journal` compares, says without reading them that they are the same as before.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lrconvert.api.batch.job import Work
from lrconvert.api.batch.sources import WEIGHTS, is_adapter
from lrconvert.convert.options import AllocateOptions, CompressOptions, ConvertOptions
from lrconvert.core.errors import FileChangedError, FileReadError, LrcError, OptionError
from lrconvert.core.options import make, names, take
from lrconvert.formats.lrc import file
from lrconvert.formats.model_card import CARD
from lrconvert.formats.readers.peft_miss import SHAPES_NAME
from lrconvert.formats.readers.shared.folders import CONFIG_NAME, INDEX
from lrconvert.io import hub
from lrconvert.io.checkpoint import KnownContent, open_checkpoint
from lrconvert.lora.adapter import CompactAdapter
from lrconvert.methods import base as methods
from lrconvert.refine.settings import Settings

FIELD = "request"
_CONTENTS = ("base", "statistics", "data")  # options that stand for contents: their digests are among the inputs
_PLACES = ("device", "resume")
# Nanoseconds after which a change has another time: of the system's clock, and where times are whole seconds.
_TICK, _COARSE_TICK = 50_000_000, 2_000_000_000


def prepared(work: Work) -> Work:
    """Return work whose options are JSON, with the digests of what they name by a path, as of `Work.inputs`; prepared
    work as it is. Raises E-OPTION for what is in memory only, and what reading the base raises."""
    if work.inputs is not None:
        return work
    inputs, content = _inputs(work.options)
    options = {key: plain(key, value) for key, value in work.options.items()}
    return replace(work, options=options, inputs=inputs, base_content=content)


def _inputs(options: Mapping[str, Any]) -> tuple[dict[str, str], KnownContent | None]:
    """Digests of what options name by a path, and the contents of the base."""
    digests: dict[str, str] = {}
    content = None
    for key in _CONTENTS:
        value = options.get(key)
        if value is None or value in ((), []):
            continue
        paths = list(value) if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(path, (str, os.PathLike)) for path in paths):
            raise OptionError(f"{key} must be a path where several processes need it", fix="write it to a file first")
        if key == "base":
            digests[key], content = of_base(hub.locate(paths[0]))
        else:
            files = [Path(path) for path in paths] if key == "statistics" else _data_files(paths)
            digests[key] = " ".join(of_file(path) for path in files)
    return digests, content


def _data_files(paths: Sequence[Any]) -> Sequence[Path]:
    """The files of texts, folders and data sets in the cache. Plain files are told apart without loading torch."""
    if all(Path(path).is_file() for path in paths):
        return [Path(path) for path in paths]
    from lrconvert.live.texts import sources

    return sources.find(paths).files


def plain(key: str, value: Any) -> Any:
    """Return an option as JSON, a path of a file that is there as an absolute one: workers have other folders. Raises
    E-OPTION for what is none."""
    if isinstance(value, os.PathLike) or (key in _CONTENTS and isinstance(value, str)):
        path = Path(value)
        return str(path.absolute()) if key in _CONTENTS and path.exists() else os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [plain(key, item) for item in value]
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        raise OptionError(f"{key} cannot be given to other processes", fix="give a path, a number or a text") from None


def settled(verb: str, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` in their one spelling: defaults filled in, numbers and choices in the type of their field, and
    without those that stand for contents, or say where the work is done. Raises E-OPTION."""
    own: type[Any] = {"compress": CompressOptions, "allocate": AllocateOptions}.get(verb) or methods.get(method).Options
    rest = dict(options)
    chosen = {
        name: value for kind in (ConvertOptions, own) for name, value in vars(take(kind, None, rest, verb)).items()
    }
    plan = chosen["target_size"], chosen["target_ratio"]
    if verb == "convert" and plan == (None, None) and not any(name in options for name in names(own)):
        ratio = methods.get(method).default_ratio
        chosen["target_ratio"] = None if ratio is None else float(ratio)
    if rest.get("retrain") is not None:
        base = {name: chosen[name] for name in ("length", "batch_tokens")}
        rest["retrain"] = vars(make(Settings, {**base, **rest["retrain"]}, "retrain"))
    return {name: value for name, value in {**chosen, **rest}.items() if name not in (*_CONTENTS, *_PLACES)}


def chosen(verb: str, method: str, options: Mapping[str, Any], loading: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options, `settled`, with those of `loading` that are set; a base counts by its contents."""
    reading = {key: value for key, value in loading.items() if key != "base" and value is not False}
    return {**settled(verb, method, options), "loading": reading}


def digest(verb: str, method: str, options: Mapping[str, Any], source: str, inputs: Mapping[str, str]) -> str:
    """The request's digest; `options` are those of the verb and of reading, without paths of `inputs`."""
    whole = {"verb": verb, "method": method, "options": options, "source": source, "inputs": inputs}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def files_of(path: Path) -> tuple[list[Path], Path]:
    """Return the files that an adapter may consist of, and the folder that they are named in: of a folder all directly
    in it (and below, if it is an adapter only by what lies below), of an index all that lies beside it, of another file
    itself with the configurations and the card there, but those of other files (``x.json`` of ``x.safetensors``)."""
    if not path.is_file():
        return list(path.iterdir() if is_adapter(path) else path.rglob("*")), path
    folder = path.parent
    if path.name.endswith(INDEX):
        return list(folder.iterdir()), folder
    changed = folder.stat().st_mtime_ns
    listing = _configurations if _is_past(changed, time.time_ns()) else _configurations.__wrapped__
    return [path, *(folder / name for name in {*listing(folder, changed), f"{path.stem}.json"} - {path.name})], folder


@lru_cache(maxsize=4)
def _configurations(folder: Path, changed: int) -> tuple[str, ...]:
    """Names of the files in a folder that may say something of any file of weights there. Kept, since a folder may hold
    a hundred thousand of them, until it is `changed`."""
    names = [path.name for path in folder.iterdir()]
    stems = {Path(name).stem for name in names if name.endswith(WEIGHTS)}
    own = {f"{stem}.json" for stem in stems} - {CONFIG_NAME, SHAPES_NAME}
    return tuple(name for name in names if name == CARD or (name.endswith(".json") and name not in own))


def of_source(path: Path) -> str:
    """sha256 over the files that an adapter may consist of."""
    return of_files(*files_of(path))


def of_files(paths: Iterable[Path], root: Path) -> str:
    """sha256 over names below `root` and contents of the regular files among `paths`. Raises E-IO-READ."""
    whole = hashlib.sha256()
    for path in sorted(p for p in paths if p.is_file()):
        whole.update(f"{of_file(path)} {path.relative_to(root)}\n".encode())
    return whole.hexdigest()


def of_file(path: Path) -> str:
    """sha256 of a file's bytes. Raises E-IO-READ."""
    try:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise FileReadError(f"cannot be read: {error.strerror}", path=path) from None


@dataclass(frozen=True)
class State:
    """A digest of names, sizes, times and inodes of files; `is_past`: a later change would show in it, since none of
    the times is so young that the next change might have the same."""

    digest: str
    is_past: bool


def state(paths: Iterable[Path], root: Path) -> State:
    """The state of the regular files among `paths`, which are named below `root`."""
    whole, newest, now = hashlib.sha256(), 0, time.time_ns()
    for path in sorted(paths):
        try:
            info = path.stat()
        except OSError:
            continue  # it is not there, and `of_files` passes it by
        if stat.S_ISREG(info.st_mode):
            numbers = info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino
            whole.update(f"{numbers} {path.relative_to(root)}\n".encode("utf-8", "surrogateescape"))
            newest = max(newest, info.st_ctime_ns)  # which no program can set
    return State(whole.hexdigest()[:32], _is_past(newest, now))


def _is_past(changed: int, now: int) -> bool:
    return now - changed > (_TICK if changed % 1_000_000_000 else _COARSE_TICK)


def of_base(base: Path) -> tuple[str, KnownContent | None]:
    """The digest of a base's contents and configuration, however it is sharded, and the contents for the conversions;
    of its files, and None, where it has no weights (a config.json is enough for some readers)."""
    try:
        with open_checkpoint(base, quantized=True) as checkpoint:
            content = checkpoint.known_content()
            config = json.dumps(checkpoint.config, sort_keys=True, default=str)
            return hashlib.sha256(f"{content.digest} {config}".encode()).hexdigest(), content
    except FileChangedError:
        raise
    except LrcError:
        if not base.is_dir():
            raise
        return of_files(base.iterdir(), base), None


def finished(output: Path, wanted: str) -> CompactAdapter | None:
    """The adapter of an output that was made for this request, None if there is none or it is another's or damaged."""
    if not output.is_file():
        return None
    try:
        compact = file.read(output)
    except LrcError:
        return None
    return compact if compact.provenance.fields.get(FIELD) == wanted else None
