"""Hub ids (``org/name``, ``org/name@revision``) in the local Hugging Face cache. Nothing is downloaded here:
`hub_transfer` does that, where it is asked for.

    CACHE/models--org--name/refs/BRANCH            the commit that a branch or tag stands for
    CACHE/models--org--name/snapshots/COMMIT/FILE  a link to ../../blobs/DIGEST, or a file
    CACHE/models--org--name/blobs/DIGEST           a file, or a link to one that several models share:
    CACHE/blobs/XX/XXDIGEST                        huggingface_hub 2 puts files there

A cache may come from a stranger: links that lead elsewhere are refused, and so are refs that are no commit.
"""

from __future__ import annotations

import ntpath
import os
import posixpath
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lrconvert.core.errors import FileKindError, FileReadError, LrcError, OutputPathError, ShardPathError
from lrconvert.core.limits import MAX_INDEX_BYTES
from lrconvert.core.wording import either
from lrconvert.io.container import read_json, read_small
from lrconvert.io.remote import Url, is_remote, is_url, local_copy, local_path, named
from lrconvert.io.remote.urls import refuse_url

AnyPath = str | os.PathLike[str]

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"(?P<name>(?:{_NAME}/)?{_NAME})(?:@(?P<revision>.{{1,200}}))?")
_ID_LENGTH = 96  # the hub's own limit
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PREFIX = re.compile(r"[0-9a-f]{4,40}")
_SHARED = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}")
_REF_BYTES = 100
_INDEXES = (".safetensors.index.json", ".bin.index.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".npz", ".lrc")
_ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class HubId:
    """``name`` is ``org/name``, or a name alone; ``revision`` a branch, a tag, a commit or the beginning of one."""

    name: str
    revision: str = "main"

    @property
    def repository(self) -> Path:
        """Its folder in the cache, which need not be there."""
        return cache() / f"models--{self.name.replace('/', '--')}"

    @property
    def advice(self) -> str:
        revision = "" if self.revision == "main" else f" --revision {shlex.quote(self.revision)}"
        called = either(f"lrconvert.download({self.name!r})", "--download")
        return f"{called}, or hf download {self.name}{revision}"


def cache() -> Path:
    """Return the folder of the cache, as huggingface_hub has it."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def parse(text: str) -> HubId | None:
    """Return `text` as a hub id, None if it cannot be one."""
    match = _ID.fullmatch(text)
    # With "--", two ids would share a folder of the cache.
    if not match or len(match["name"]) > _ID_LENGTH or "--" in match["name"] or ".." in match["name"]:
        return None
    return HubId(match["name"], match["revision"] or "main")


def hint(path: AnyPath) -> str:
    """Return the name of an input in what we write: a hub id as it is, of a path or URL the last part: folders and
    buckets are private."""
    if is_url(path):
        return Url(os.fspath(path)).name
    hub_id = parse(os.fspath(path))
    try:
        is_id = hub_id is not None and not _is_path(Path(path)) and hub_id.repository.is_dir()
    except OSError:
        is_id = False
    return os.fspath(path) if is_id else Path(path).name


def is_private(name: str) -> bool:
    """Return true if the name of a model in a configuration is a path of somebody's machine, and no hub id."""
    return posixpath.isabs(name) or ntpath.isabs(name) or name.startswith((".", "~", "file:")) or "\\" in name


def last_part(name: str) -> str:
    """Return the last part of a path of whatever system; another text as it is."""
    return ntpath.basename(name.rstrip("/\\")) if is_private(name) else name


def locate(path: AnyPath) -> Path:
    """Return `path` itself if it exists or cannot be a hub id, else the folder of its snapshot in the cache.

    Raises E-IO-KIND (neither there nor in the cache, no such revision, incomplete), E-PATH (a link out of the model's
    folder in the cache, a damaged ref) and E-IO-READ.
    """
    path = _as_path(path, "only adapters are read from URLs", "download it first, and give its path")
    hub_id = parse(os.fspath(path))
    if hub_id is None or _is_path(Path(path)):
        return Path(path)
    try:
        if not hub_id.repository.is_dir():
            if "/" not in os.fspath(path):  # a word is a file name before it is an id
                return Path(path)
            raise FileKindError(
                "there is no such file or folder, and no such model in the Hugging Face cache",
                fix=f"if it is on the hub: {hub_id.advice}",
            )
        snapshot = hub_id.repository / "snapshots" / _commit(hub_id)
        _check_links(hub_id, snapshot)
        _check_complete(hub_id, snapshot)
        return snapshot
    except OSError as error:
        raise FileReadError(f"the Hugging Face cache cannot be read: {error.strerror}", path=path) from None
    except LrcError as error:
        raise error.at(path) from None


def adapter_at(path: AnyPath) -> Path:
    """Return where an adapter is: `locate`, and of a URL a copy on this machine. Raises what both raise."""
    if is_remote(path):
        return local_copy(os.fspath(path))
    return locate(path)


@contextmanager
def adapter(path: AnyPath) -> Iterator[Path]:
    """Give `adapter_at`; errors of a copy name the URL."""
    where = adapter_at(path)
    with named(where, os.fspath(path)) if is_url(path) else nullcontext():
        yield where


def _as_path(path: AnyPath, what: str, fix: str) -> AnyPath:
    """The path that ``file://`` names, another one as it is. Raises E-OPTION for another URL, `what` of it is wrong."""
    local = local_path(os.fspath(path)) if is_url(path) else None
    if local is None:
        refuse_url(path, what, fix)
    return path if local is None else local


def output(path: AnyPath) -> Path:
    """Return the path of an output. Raises E-OUT-PATH if it lies in the cache, which belongs to other programs,
    E-OPTION for a URL."""
    path = _as_path(path, "this output is not written to one", "write it to a path, and copy it from there")
    try:
        inside = Path(path).resolve().is_relative_to(cache().resolve())
    except (OSError, RuntimeError):  # a link to itself, which the writer refuses
        inside = False
    if inside:
        raise OutputPathError("lies inside the Hugging Face cache", fix="choose another output", path=path)
    return Path(path)


def _is_path(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except OSError:  # there, but not to be looked at: the reader will say so
        return True


# --- revisions ------------------------------------------------------------------------------------------------------


def _commit(hub_id: HubId) -> str:
    """The commit of a revision whose snapshot is there. Raises E-IO-KIND and E-PATH."""
    repository, revision = hub_id.repository, hub_id.revision
    plain = PurePosixPath(revision)
    if plain.is_absolute() or ".." in plain.parts or "\\" in revision or not revision.isprintable():
        raise ShardPathError(f"{revision!r:.80} is not the name of a branch, tag or commit")
    present = _snapshots(repository)
    ref = repository / "refs" / plain
    if not _COMMIT.fullmatch(revision) and ref.is_file():
        commit = _read_ref(ref, repository)
        if commit not in present:
            raise FileKindError(f"the cache knows {revision!r} of it, but holds no file of that", fix=hub_id.advice)
        return commit
    matching = [commit for commit in present if _PREFIX.fullmatch(revision) and commit.startswith(revision)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise FileKindError(f"{len(matching)} snapshots in the cache begin with {revision!r}", fix="write more of it")
    refs = repository / "refs"
    branches = sorted(str(p.relative_to(refs)) for p in refs.rglob("*") if p.is_file())
    cached = ", ".join([*branches, *(commit[:12] for commit in present)]) or "none"
    raise FileKindError(
        f"the Hugging Face cache does not hold the revision {revision!r} of it",
        fix=f"it holds {cached:.200}; or: {hub_id.advice}",
    )


def _read_ref(ref: Path, repository: Path) -> str:
    """The commit in the file of a branch or tag. Raises E-PATH."""
    if not ref.resolve().is_relative_to(repository.resolve() / "refs"):
        raise ShardPathError("is a link that leaves the model's folder", path=ref)
    text = read_small(ref, _REF_BYTES).decode("ascii", "replace").strip()
    if not _COMMIT.fullmatch(text):
        raise ShardPathError(f"holds {text!r:.60}, which is not a commit", path=ref)
    return text


def _snapshots(repository: Path) -> list[str]:
    folder = repository / "snapshots"
    return sorted(p.name for p in folder.iterdir() if _COMMIT.fullmatch(p.name)) if folder.is_dir() else []


# --- snapshots ------------------------------------------------------------------------------------------------------


def _check_links(hub_id: HubId, snapshot: Path) -> None:
    """Raise E-PATH if a link leads out of the model's folder and of the store that models share, E-IO-KIND if it leads
    nowhere."""
    repository = hub_id.repository.resolve()
    shared = cache().resolve() / "blobs"
    if snapshot.resolve() != repository / "snapshots" / snapshot.name or not snapshot.is_dir():
        raise ShardPathError("is not a folder of its own", path=snapshot)
    for path in snapshot.rglob("*"):
        if not path.is_symlink():
            continue
        try:
            real = path.resolve()
        except (OSError, RuntimeError):  # a link to itself
            raise ShardPathError("is a link that leads nowhere", path=path) from None
        stored = real.is_relative_to(shared) and _SHARED.fullmatch(real.relative_to(shared).as_posix())
        if not stored and not real.is_relative_to(repository):
            raise ShardPathError("is a link that leaves the model's folder in the cache", path=path)
        if not real.exists():
            raise _incomplete(hub_id, repr(path.name))


def _check_complete(hub_id: HubId, snapshot: Path) -> None:
    """Raise E-IO-KIND if a download was broken off: shards of an index, or all weights, are not there.

    A base without weights is complete where nothing else was asked for: its config.json is enough for some commands.
    """
    names = {path.name for path in snapshot.iterdir()}
    for index in sorted(name for name in names if name.endswith(_INDEXES)):  # of a model, or of an adapter in shards
        shards = read_json(snapshot / index, MAX_INDEX_BYTES).get("weight_map")
        listed = shards.values() if isinstance(shards, dict) else ()  # the checkpoint's reader judges it
        if absent := {name for name in listed if isinstance(name, str)} - names:
            raise _incomplete(hub_id, repr(min(absent)))
    if not any(path.suffix in _WEIGHTS for path in snapshot.rglob("*")):
        begun = any((hub_id.repository / "blobs").glob("*.incomplete"))
        if begun or _ADAPTER_CONFIG in names or not names:
            raise _incomplete(hub_id, "the file of the weights")


def _incomplete(hub_id: HubId, what: str) -> FileKindError:
    return FileKindError(f"is incomplete in the Hugging Face cache: {what:.80} is missing", fix=hub_id.advice)
