"""Where adapters come from and where outputs go: the only two places where a batch touches either.

A source is a path, a hub id or a URL, an output a path or a URL. A job asks for `fetched` and `source_state` of the
one, for `kept`, `output_state` and `publish` of the other, and knows nothing else of where they lie.

What tells that a file at a URL is as it was is what its store says of its content (an ETag, a generation), with its
size; a store that says nothing of the kind has no states, and what lies there is checked in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lrconvert.api.batch import request
from lrconvert.formats.lrc import file
from lrconvert.io import hub, remote
from lrconvert.io.durable import check_output, clean_up_files, make_folder
from lrconvert.lora.adapter import CompactAdapter


def absolute(place: str) -> str:
    """Return the place of an output as it is called in every folder, which workers have others of."""
    return place if remote.is_remote(place) else str(Path(place).absolute())


def absolute_source(place: str) -> str:
    """Return the place of a source as it is called in every folder; a hub id as it is."""
    return place if hub.parse(place) is not None and not Path(place).exists() else absolute(place)


def is_compact(source: str) -> bool:
    """Return true if a source is an lrconvert file; one at a URL is told by its name."""
    if remote.is_remote(source):
        return remote.parse(source).name.endswith(".lrc")
    path = Path(source)
    return path.is_file() and file.is_lrconvert(path)


# --- sources ------------------------------------------------------------------------------------------------------


@contextmanager
def fetched(source: str) -> Iterator[Path]:
    """Give the folder or file of an adapter on this machine's disk, for as long as the context lasts. Raises what
    `hub.locate` and `remote.fetched` raise."""
    if not remote.is_remote(source):
        yield hub.locate(source)
        return
    with remote.fetched(source) as path:
        yield path


def source_state(source: str) -> request.State:
    """Return the state of an adapter's files, without reading them. Raises OSError, and what `hub.locate` and
    `remote.files_of` raise."""
    if remote.is_remote(source):
        state = remote.files_of(remote.open_store(source)).adapter.state
        return request.State(state, bool(state))
    return request.state(*request.files_of(hub.locate(source)))


# --- outputs ------------------------------------------------------------------------------------------------------


@contextmanager
def kept(output: str) -> Iterator[Path | None]:
    """Give an output that is there already as a file on this machine's disk, to be checked; None if there is none."""
    if not remote.is_remote(output):
        path = Path(output)
        yield path if path.exists() else None
        return
    with remote.fetched_file(output) as fetched:
        yield fetched


def output_state(output: str) -> request.State:
    """Return the state of an output, without reading it; that of nothing if it is not there."""
    if remote.is_remote(output):
        entry = remote.open_store(output).stat()
        return request.State(remote.state_of(entry), entry is not None and bool(entry.version))
    path = Path(output)
    return request.state([path], path.parent)


def check(output: str, *, overwrite: bool, source: Path) -> None:
    """Raise E-OUT-* or E-IO-WRITE, before any work, if `output` could not be written, or lies in the `source`; E-OPTION
    for a URL that is read only."""
    if remote.is_remote(output):  # whether it is there was looked at, and is looked at when it is published
        remote.check_writable(remote.parse(output))
        return
    path = Path(output)
    if path.parent.exists():
        check_output(path, overwrite, inputs=[source])


def folder_of(output: str) -> Path | None:
    """Return the folder that an output is written in; None for one at a URL, where nothing is begun beside it."""
    return None if remote.is_remote(output) else Path(output).parent


def clean_up(folders: Iterable[Path], outputs: Callable[[], Iterable[str]]) -> None:
    """Remove what processes that were killed had begun to write for `outputs` in `folders`. What another run writes
    there meanwhile stays. Raises E-IO-READ, E-LOCKED (no locks tell what is left), E-IO-WRITE."""
    clean_up_files(folders, lambda: (Path(output) for output in outputs() if not remote.is_remote(output)))


def publish(compact: CompactAdapter, output: str, *, overwrite: bool) -> str:
    """Write an output, whole or not at all: of two that write at once, one does. Returns the sha256 of the file. Raises
    E-OUT-EXISTS if it is there and not to be overwritten, and what writing raises."""
    if remote.is_remote(output):
        with remote.folder("output") as folder:
            made = folder / "output.lrc"
            file.write(compact, made)
            remote.publish(made, output, overwrite=overwrite)
            return request.of_file(made)
    path = Path(output)
    make_folder(path.parent)  # not before there is something to put into it
    file.write(compact, path, overwrite=overwrite)
    return request.of_file(path)
