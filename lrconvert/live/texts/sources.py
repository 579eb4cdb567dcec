"""Files that data is read from: given by name, all those of a folder, or of a data set in the local Hugging Face cache.

Of a folder, and of a data set, one kind of file and one split are read: `train` where there are several. Whatever else
would have to be guessed is refused. Nothing is ever downloaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lrconvert.core.errors import DataError, LrcError, printable
from lrconvert.core.wording import either
from lrconvert.io import hub
from lrconvert.live.texts import rows

RUNNING_TEXT = ".txt"
SUFFIXES = (*rows.SUFFIXES, RUNNING_TEXT)
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
_WORDS = re.compile(r"[^A-Za-z0-9]+")
_NAME = re.compile(r"(?P<id>[^:]+)(?::(?P<config>[^:/]+))??(?::(?P<split>[^:/]+))?")
_SHOWN = 6


@dataclass(frozen=True)
class Sources:
    """The files to read, in order, and what has to be said of how they were chosen."""

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def find(items: Iterable[str | os.PathLike[str]]) -> Sources:
    """Return the files of paths, folders and names of data sets, in the order given. Raises E-DATA, E-PATH."""
    files: list[Path] = []
    notes: list[str] = []
    for item in items:
        path = Path(item)
        if path.is_dir():
            more = _of_folder(path, "")
        elif path.exists() or path.suffix in SUFFIXES:
            more = Sources((path,))
        else:
            more = _of_name(os.fspath(item))
        files += more.files
        notes += more.notes
    return Sources(tuple(files), tuple(notes))


# --- folders --------------------------------------------------------------------------------------------------------


def _of_folder(folder: Path, split: str) -> Sources:
    """The files of a folder and below. Raises E-DATA where several kinds or splits leave a choice."""
    inside = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    names = {path: path.relative_to(folder) for path in inside}
    listed = [p for p in inside if p.name not in _DESCRIPTIONS and not any(x.startswith(".") for x in names[p].parts)]
    tables = [path for path in listed if path.suffix != RUNNING_TEXT]
    chosen = tables or listed
    if not chosen:
        raise DataError("holds no data", fix=f"it takes {', '.join(SUFFIXES)}", path=folder)
    kinds = sorted({path.suffix for path in chosen})
    if len(kinds) > 1:
        what = f"holds files of several kinds ({', '.join(kinds)}), which may be the same data twice"
        raise DataError(what, fix="name the files to read", path=folder)
    return _of_split(chosen, {path: _split_of(names[path]) for path in chosen}, split, folder)


def _of_split(files: Sequence[Path], split_of: dict[Path, str], split: str, folder: Path) -> Sources:
    """Those of the files that are of a split: the one asked for, the only one, or `train`. Raises E-DATA."""
    splits = sorted({*split_of.values()})
    wanted = split or (splits[0] if len(splits) == 1 else "train")
    if wanted not in splits:
        shown = ", ".join(name or "files of no split" for name in splits)
        raise DataError(f"holds {printable(shown, 200)}, and no split {wanted!r:.40}", fix="name files", path=folder)
    chosen = tuple(path for path in files if split_of[path] == wanted)
    rest = [name or "files of no split" for name in splits if name != wanted]
    if not rest:
        return Sources(chosen)
    return Sources(chosen, (f"of {printable(folder.name, 80)} the split {wanted}, not {', '.join(rest[:_SHOWN])}",))


def _split_of(name: Path) -> str:
    """The split that a file's name or its folder names; none where they do not."""
    for part in reversed(name.with_suffix("").parts):
        for word in _WORDS.split(part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return ""


# --- the Hugging Face cache -----------------------------------------------------------------------------------------


def _of_name(item: str) -> Sources:
    """The files of ``ID``, ``ID:SPLIT`` or ``ID:CONFIG:SPLIT``: as `datasets` prepared them, else as they were
    downloaded. Raises E-DATA, E-PATH."""
    match = _NAME.fullmatch(item)
    hub_id = hub.parse(match["id"]) if match else None
    if match is None or hub_id is None:
        fix = either("give texts themselves as rows: data=[{'text': ...}, ...]", "")
        raise DataError("is no file, and no name of a data set", fix=fix, path=item)
    config, split = match["config"] or "", match["split"] or ""
    try:
        prepared = _prepared(hub_id.name, config)
        if prepared is not None:
            files = sorted(prepared.glob("*.arrow"))
            return _of_split(files, {path: _split_in_cache(path) for path in files}, split, prepared)
        repository = hub.cache() / f"datasets--{hub_id.name.replace('/', '--')}"
        snapshot = _snapshot(repository, hub_id.revision)
        if snapshot is not None:
            return _of_snapshot(snapshot, repository, config, split)
    except OSError as error:
        raise DataError(f"cannot be read from the Hugging Face cache: {error.strerror}", path=item) from None
    except LrcError as error:
        raise error.at(item) from None
    raise DataError(
        "there is no such file or folder, and no such data set in the Hugging Face cache",
        fix=f"if it is a data set: hf download --repo-type dataset {hub_id.name}",
        path=item,
    )


def _prepared(name: str, config: str) -> Path | None:
    """The folder of Arrow files that `datasets` made of a data set: NAME/CONFIG/VERSION/DIGEST, the newest."""
    from huggingface_hub import constants

    root = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    wanted = _plain(name.replace("/", "___"))
    folders = (
        [path for path in root.iterdir() if path.is_dir() and _plain(path.name) == wanted] if root.is_dir() else []
    )
    made = [path.parent for folder in folders for path in folder.glob("*/*/*/dataset_info.json")]
    made = [path for path in made if any(path.glob("*.arrow"))]
    configs = sorted({path.parents[1].name for path in made})
    if not made:
        return None
    chosen = config or (configs[0] if len(configs) == 1 else "default")
    if chosen not in configs:
        raise _choice("configurations", configs, chosen if config else "")
    return max((path for path in made if path.parents[1].name == chosen), key=lambda path: path.stat().st_mtime_ns)


def _plain(name: str) -> str:
    """A name without what `datasets` changes in it: CamelCase becomes camel_case."""
    return name.lower().replace("_", "")


def _split_in_cache(path: Path) -> str:
    """The split of NAME-SPLIT.arrow, NAME-SPLIT-00000-of-00002.arrow."""
    return re.sub(r"-\d{5}-of-\d{5}$", "", path.stem).rpartition("-")[2]


def _snapshot(repository: Path, revision: str) -> Path | None:
    """The folder of a revision, whose files are links into the cache."""
    ref = repository / "refs" / revision
    commit = ref.read_text("ascii", "replace").strip() if re.fullmatch(r"[\w.-]+", revision) and ref.is_file() else ""
    folder = repository / "snapshots" / (commit or revision)
    return folder if re.fullmatch(r"[\w.-]+", folder.name) and folder.is_dir() else None


def _of_snapshot(snapshot: Path, repository: Path, config: str, split: str) -> Sources:
    folders = sorted(path.name for path in snapshot.iterdir() if path.is_dir() and not path.name.startswith("."))
    if config and config not in folders:
        raise _choice("folders", folders, config)
    sources = _of_folder(snapshot / config, split)
    places = sorted({path.parent.relative_to(snapshot).as_posix() for path in sources.files})
    if len(places) > 1:
        raise _choice("folders", places, "")
    roots = (repository.resolve(), (hub.cache() / "blobs").resolve())
    for path in sources.files:
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise DataError("is a link that leaves the data set's folder in the cache", path=path)
    notes = tuple(note.replace(snapshot.name, repository.name.removeprefix("datasets--")) for note in sources.notes)
    return Sources(sources.files, notes)


def _choice(what: str, names: Sequence[str], wanted: str) -> DataError:
    shown = printable(", ".join(names[:_SHOWN]) or "none", 200)
    missing = f"has no {wanted!r:.40} among its {what}" if wanted else f"has several {what}"
    return DataError(f"{missing}: {shown}", fix="name one: ID:CONFIG:SPLIT")
