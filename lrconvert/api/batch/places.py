"""Where adapters come from and where outputs go: the only two places where a batch touches either.

A source is a path or a hub id, an output a path. A job asks for `fetched` and `source_state` of the one, for `kept`,
`output_state` and `publish` of the other, and knows nothing else of where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lrconvert.api.batch import request
from lrconvert.formats.lrc import file
from lrconvert.io import hub
from lrconvert.io.durable import check_output, make_folder
from lrconvert.lora.adapter import CompactAdapter


@contextmanager
def fetched(source: str) -> Iterator[Path]:
    """Give the folder or file of an adapter on this machine's disk, for as long as the context lasts. Raises what
    `hub.locate` raises."""
    yield hub.locate(source)


def source_state(source: str) -> request.State:
    """Return the state of an adapter's files, without reading them. Raises OSError, and what `hub.locate` raises."""
    return request.state(*request.files_of(hub.locate(source)))


@contextmanager
def kept(output: str) -> Iterator[Path | None]:
    """Give an output that is there already as a file on this machine's disk, to be checked; None if there is none."""
    path = Path(output)
    yield path if path.exists() else None


def output_state(output: str) -> request.State:
    """Return the state of an output, without reading it; that of nothing if it is not there."""
    path = Path(output)
    return request.state([path], path.parent)


def check(output: str, *, overwrite: bool, source: Path) -> None:
    """Raise E-OUT-* or E-IO-WRITE, before any work, if `output` could not be written, or lies in the `source`."""
    path = Path(output)
    if path.parent.exists():
        check_output(path, overwrite, inputs=[source])


def publish(compact: CompactAdapter, output: str, *, overwrite: bool) -> str:
    """Write an output, whole or not at all: of two that write at once, one does. Returns the sha256 of the file. Raises
    E-OUT-EXISTS if it is there and not to be overwritten, and what writing raises."""
    path = Path(output)
    make_folder(path.parent)  # not before there is something to put into it
    file.write(compact, path, overwrite=overwrite)
    return request.of_file(path)
