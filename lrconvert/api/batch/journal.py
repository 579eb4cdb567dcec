"""The journal of a folder of outputs: which of them are known to be finished, so that neither they nor their sources
are read again.

``OUT/.lrconvert-batch.jsonl`` has a line for each output that was made or checked, a JSON object that is signed as the
lines of a merge's journal are:

    name      of the output, its path below OUT
    settings  the digest of a request without its source: the verb, its options, the contents of base and data
    source    the state of the adapter's files: a digest of their names, sizes, times and inodes (`request.state`)
    output    the state of the output
    adapter, total, captured  what is shown of it: bytes without extra tensors, of the file; the captured share
    verdict   of `compress`: "ship" or "do not ship"

An output is known if all three digests are those of today; of several lines of a name the last holds. What is not known
is checked in full. So the journal may be lost or deleted at any time, and is synced to the disk at the end alone.
"""

from __future__ import annotations

import stat
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np

from lrconvert.core.errors import FileReadError, FileWriteError, LrcError, OutputPathError
from lrconvert.io import fields
from lrconvert.io.durable import File, atomic_file, locked, make_folder, remove_empty
from lrconvert.io.fields import Whole, matches, one_of
from lrconvert.merge.signed_json import HexFloat, portable, sign, verify

NAME = ".lrconvert-batch.jsonl"
SHIP, DO_NOT_SHIP = "ship", "do not ship"
_LINE_BYTES = 1 << 16
_SPARE = 1000  # lines that are not worth writing the journal anew
_State = Annotated[str, matches("[0-9a-f]{32}", "32 hexadecimal digits")]


@dataclass(frozen=True)
class Line:
    """A finished output; see above."""

    name: str
    settings: _State
    source: _State
    output: _State
    adapter: Whole
    total: Whole
    captured: HexFloat | None = None
    verdict: Annotated[str, one_of(("", SHIP, DO_NOT_SHIP))] = ""


class Journal:
    """The journal in the folder `root`, which is locked: read once, of a line its place alone is kept. `notes` say what
    of it could not be used."""

    def __init__(self, root: Path) -> None:
        self.notes: list[str] = []
        self._root, self._path = root, root / NAME
        self._lines: BinaryIO | None = None
        self._appended: File | None = None
        self._is_written = True
        self._open()

    def _open(self) -> None:
        """Find the lines up to the first that is not whole. Raises E-OUT-PATH for what is no file, E-IO-READ."""
        keys, places, self._end = array("q"), array("q", [0]), 0
        try:
            if not stat.S_ISREG(self._path.lstat().st_mode):
                raise OutputPathError("is in the way of the journal of a batch", fix="remove it", path=self._path)
            self._lines = self._path.open("rb")
            for text in iter(lambda: self._line_at(places[-1]), b""):
                try:
                    line = _parsed(text)
                except LrcError:
                    if text.endswith(b"\n"):  # else it is the last one, which a crash has torn
                        what = f"line {len(keys) + 1} of {NAME} is damaged"
                        self.notes.append(f"{what}: the outputs from there on are checked in full")
                    break
                keys.append(hash(line.name))
                places.append(places[-1] + len(text))
        except FileNotFoundError:
            return
        except OSError as error:
            raise FileReadError(f"cannot be read: {error.strerror}", path=self._path) from None
        self._end = places[-1]
        last_first = np.array(keys, np.int64)[::-1]
        self._keys, at = np.unique(last_first, return_index=True)
        self._places = np.array(places, np.int64)[len(keys) - 1 - at] if keys else last_first
        if len(keys) > 2 * len(self._keys) + _SPARE:
            self._shorten()

    def _line_at(self, place: int) -> bytes:
        assert self._lines is not None
        self._lines.seek(place)
        return self._lines.readline(_LINE_BYTES)

    def _shorten(self) -> None:
        """Leave out lines that others have replaced."""
        with atomic_file(self._path, overwrite=True) as file:
            for place in sorted(self._places.tolist()):
                file.write(self._line_at(place))
        self.close()
        self._open()

    def find(self, name: str) -> Line | None:
        """Return the last line of an output, None if it has none."""
        name = portable(name)
        key = hash(name)
        at = int(np.searchsorted(self._keys, key)) if self._lines is not None else 0
        if self._lines is None or at == len(self._keys) or self._keys[at] != key:
            return None
        line = _parsed(self._line_at(int(self._places[at])))
        return line if line.name == name else None

    def add(self, line: Line) -> None:
        """Append a line, for a later run. What cannot be written is a note: the outputs do not depend on it."""
        if not self._is_written:
            return
        try:
            if self._appended is None:
                exists = self._path.exists()
                self._appended = File(self._path, self._path, keep=self._end if exists else None)
            self._appended.write(_text(line))
        except FileWriteError as error:
            self._is_written = False
            self.notes.append(f"{NAME} is not complete, and a later run checks these outputs in full: {error}")

    def close(self) -> None:
        """Idempotent."""
        if self._lines is not None:
            self._lines.close()
        if self._appended is not None:
            with suppress(FileWriteError), self._appended:  # synced, where it can be
                self._appended = None
        self._lines = None


def _parsed(text: bytes) -> Line:
    """The line of a text. Raises what `verify` and `fields.read` raise."""
    what = "a line of the journal"
    return fields.read(Line, verify(text.removesuffix(b"\n") if text.endswith(b"\n") else b"", what), what)


def _text(line: Line) -> bytes:
    return sign(fields.as_json(replace(line, name=portable(line.name)))) + b"\n"


@contextmanager
def opened(root: Path) -> Iterator[Journal]:
    """Give the journal of a folder of outputs, which is made if it is not there and goes again if nothing is put into
    it. Raises E-LOCKED if another batch writes there."""
    made = make_folder(root)
    root = root.resolve()
    with locked(root, needed=False):
        journal = Journal(root)
        try:
            yield journal
        finally:
            journal.close()
            remove_empty(made)
