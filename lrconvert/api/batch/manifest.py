"""The manifest of a batch: JSON lines, of jobs that are asked for and of what became of them.

A line without a state asks for a job, and people and programs write it: `source`, `output`, and if it is known the
`digest` of the source. A line with a state is a record: a batch appends it as soon as a job is done, and seals it. Of
several records of an output the last one holds. A path in a manifest is relative to the folder that it lies in. The
fields are in docs/guides/batches.md.

An output is known to be finished if the digest of the request and the states of source and output are those of today.
What is not known is checked in full, so records may be lost at any time, and are synced to the disk at the end alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np

from lrconvert.api.batch.job import DO_NOT_SHIP, SHIP
from lrconvert.core.errors import (
    DigestError,
    FileReadError,
    FileWriteError,
    LockedError,
    LrcError,
    OptionError,
    OutputPathError,
)
from lrconvert.core.limits import FOREIGN
from lrconvert.io import fields as json_fields
from lrconvert.io import strictjson
from lrconvert.io.durable import File, atomic_file, discard, file_lock, locked, make_folder, remove_empty
from lrconvert.io.fields import Hex, Whole, matches, one_of

NAME = "manifest.jsonl"
SEAL = "seal"
_LINE_BYTES = 1 << 16
_RECORD = b'{"state":'  # how records begin
_SPARE = 1000  # lines that are not worth writing the manifest anew
_State = Annotated[str, matches("[0-9a-f]{32}", "32 hexadecimal digits")]


@dataclass(frozen=True)
class Asked:
    """A line that asks for a job."""

    source: str
    output: str
    digest: Hex | None = None


@dataclass(frozen=True)
class Record:
    """A line of what became of a job. `digest` and `output_digest` are sha256 of the adapter's files and of the file
    written; `settings`, `source_state` and `output_state` are what a later run compares."""

    state: Literal["done", "failed"]
    source: str
    output: str
    digest: Hex | None = None
    output_digest: Hex | None = None
    bytes: Whole | None = None
    adapter_bytes: Whole | None = None
    captured: float | None = None
    ratio: float | None = None
    dropped: Whole | None = None
    method: str = ""
    verdict: Annotated[str, one_of(("", SHIP, DO_NOT_SHIP))] = ""
    code: str = ""
    message: str = ""
    seconds: float | None = None
    settings: _State | None = None
    source_state: _State | None = None
    output_state: _State | None = None


COLUMNS = tuple(field.name for field in fields(Record))
_read_asked, _read_record = json_fields.reader(Asked), json_fields.reader(Record)


class Manifest:
    """The manifest at `path`, of a job its place alone is kept. `notes` say what of it could not be used. One that is
    there to be written (`writes`) is written anew where most of its records are replaced.

    Raises E-OUT-PATH for what is no file and E-IO-READ; where `asks`, because the jobs come from it, what is wrong with
    a line that may be one, and E-OPTION for two jobs of one output; for a batch, E-DIGEST for a damaged record that may
    be the only word of a job.
    """

    def __init__(self, path: Path, *, asks: bool = False, writes: bool = False) -> None:
        self._writes = writes
        self.path, self.folder = path, path.parent
        self.notes: list[str] = []
        self.has_asked = False
        self._lines: BinaryIO | None = None
        self._appended: File | None = None
        self._is_written, self._has_finished = True, False
        self._open(asks)

    # --- reading

    def _open(self, asks: bool) -> None:
        keys, places, kinds = array("q"), array("q"), array("b")
        self._end, self._is_joined = 0, False
        try:
            if not stat.S_ISREG(self.path.stat().st_mode if asks else self.path.lstat().st_mode):
                raise OutputPathError("is in the way of the manifest of a batch", fix="remove it", path=self.path)
            self._lines = self.path.open("rb")
            for number, (place, text) in enumerate(self._texts(), 1):
                line = self._usable(number, text, asks)
                if line is not None:
                    keys.append(hash(line.output))
                    places.append(place)
                    kinds.append(0 if isinstance(line, Asked) else 1 + (line.state == "done"))
        except FileNotFoundError:
            if asks:
                raise FileReadError("there is no such manifest", fix="name one", path=self.path) from None
        except OSError as error:
            raise FileReadError(f"cannot be read: {error.strerror}", path=self.path) from None
        self._index(np.array(keys, np.int64), np.array(places, np.int64), np.array(kinds, np.int8), asks)
        if self._writes and (len(keys) > 2 * len(self._keys) + _SPARE or self.notes) and not self.has_asked:
            self._shorten()

    def _texts(self) -> Iterator[tuple[int, bytes]]:
        """The lines that are not blank, with their places. One without an end is the last, which a crash has torn, or
        a person wrote."""
        place = 0
        while text := self._line_at(place):
            if text.strip(b"\0 \t\r\n"):
                yield place, text
            place += len(text)
            if text.endswith(b"\n"):
                self._end = place

    def _usable(self, number: int, text: bytes, asks: bool) -> Asked | Record | None:
        """A line, None if it is damaged, which is a note."""
        try:
            line = _parsed(text)
        except LrcError as error:
            if not text.endswith(b"\n") and (text.startswith(_RECORD) or _RECORD.startswith(text)):
                return None  # a crash has torn it
            if asks and not text.startswith(_RECORD):
                what = f"line {number} cannot be a job: {error.what}"
                raise type(error)(what, fix=error.fix or "correct the line, or remove it", path=self.path) from None
            self.notes.append(f"line {number} of {self.path.name} is damaged, and is not used")
            return None
        if not text.endswith(b"\n"):  # as a person may end a file
            self._end, self._is_joined = self._end + len(text), True
        return line

    def _index(self, keys: Any, places: Any, kinds: Any, asks: bool) -> None:
        """Sort the keys of outputs: the places of the last record of each and of the last that is finished, or -1, and
        `_jobs`, those of the jobs in the order in which they came. `kinds`: 0 is a job, 1 a failure, 2 is finished."""
        asked = kinds == 0
        self.has_asked = bool(asked.any())
        if asks and self._writes and self.notes and not self.has_asked:
            raise DigestError(f"{self.notes[0]}: a job may be lost", fix="give the sources instead", path=self.path)
        self._keys, first, at = np.unique(keys, return_index=True, return_inverse=True)
        self._places = np.full(len(self._keys), -1, np.int64)
        self._places[at[~asked]] = places[~asked]  # of several the last
        self._finished = np.full(len(self._keys), -1, np.int64)
        self._finished[at[kinds == 2]] = places[kinds == 2]
        jobs = places[first]
        jobs[at[~asked]] = places[~asked]
        jobs[at[asked]] = places[asked]
        self._jobs = jobs[np.argsort(places[first])]
        own, times = np.unique(at[asked], return_counts=True)
        for key in own[times > 1]:
            lines = [_parsed(self._line_at(int(place))) for place in places[asked & (at == key)]]
            if len({line.output for line in lines}) < len(lines):
                what = f"{lines[0].source!r} and {lines[1].source!r} would both be written to {lines[0].output!r}"
                raise OptionError(what, fix="name another output in one of these lines", path=self.path)

    def _line_at(self, place: int) -> bytes:
        assert self._lines is not None
        self._lines.seek(place)
        return self._lines.readline(_LINE_BYTES)

    def __len__(self) -> int:
        """The number of outputs."""
        return len(self._jobs)

    def job(self, number: int) -> Asked:
        """Return the job of a number, in the order of the manifest."""
        line = _parsed(self._line_at(int(self._jobs[number])))
        return line if isinstance(line, Asked) else Asked(line.source, line.output)

    def find(self, output: str) -> Record | None:
        """Return the last record of an output, None if it has none."""
        return self._record(output, self._places)

    def finished(self, output: str) -> Record | None:
        """Return the last record of an output that says that it is done, None if it has none: who asks for another
        adapter under its name, in vain, does not make it unfinished."""
        return self._record(output, self._finished)

    def _record(self, output: str, places: Any) -> Record | None:
        key = hash(output)
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key or places[at] < 0:
            return None
        line = _parsed(self._line_at(int(places[at])))
        return line if isinstance(line, Record) and line.output == output else None

    def records(self) -> Iterator[Record | Asked]:
        """Yield the last record of each output, in the order of the manifest; of one that has none, its job."""
        for number in range(len(self)):
            asked = self.job(number)
            yield self.find(asked.output) or asked

    # --- writing

    def add(self, record: Record) -> None:
        """Append a record, for a later run. What cannot be written is a note: the outputs do not depend on it."""
        self._has_finished |= record.state == "done"
        if not self._is_written:
            return
        try:
            if self._appended is None:
                exists = self.path.exists()
                self._appended = File(self.path, self.path, keep=self._end if exists else None)
                self._appended.write(b"\n" * self._is_joined)
            self._appended.write(sealed(record))
        except FileWriteError as error:
            self._is_written = False
            name = self.path.name
            self.notes.append(f"{name} is not complete, and a later run checks these outputs in full: {error}")

    def _shorten(self) -> None:
        """Leave out records that others have replaced, and what is damaged."""
        with atomic_file(self.path, overwrite=True) as file:
            for place in sorted({*self._places.tolist(), *self._finished.tolist()} - {-1}):
                file.write(self._line_at(place).rstrip(b"\n") + b"\n")
        notes = self.notes
        self.close()
        self.notes = []
        self._open(False)
        self.notes = notes

    def close(self) -> None:
        """Idempotent."""
        if self._lines is not None:
            self._lines.close()
        if self._appended is not None:
            with suppress(FileWriteError), self._appended:  # synced, where it can be
                self._appended = None
        self._lines = None

    @property
    def is_empty(self) -> bool:
        """True if it had no line, and has got none."""
        return self._end == 0 and self._appended is None

    def clear(self) -> None:
        """Delete the manifest if it had no line, and nothing in it is finished."""
        if self._end == 0 and not self._has_finished:
            discard(self.path)


def portable(name: str) -> str:
    """Return a path as text that JSON can hold: bytes that are no UTF-8 become escapes (``b\\xe4r``)."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def named(path: str, folder: Path) -> str:
    """Return a place as a manifest in `folder` names it: below it by its path from there, another path absolutely, a
    URL as it is."""
    if "://" in path:
        return path
    whole, root = str(Path(path).absolute()), str(folder.absolute())
    return whole[len(root) + 1 :] if whole.startswith(f"{root}{os.sep}") else whole


def placed(name: str, folder: Path) -> str:
    """Return the place that a manifest in `folder` names; the way back from `named`."""
    return name if "://" in name else str(folder.absolute() / name)


def sealed(record: Record) -> bytes:
    """Return a record as its line: fields without a value are left out, and the seal is the beginning of the sha256 of
    the same line with an empty one."""
    value = {name: item for name in COLUMNS if (item := getattr(record, name)) not in (None, "")}
    return _dump({**value, SEAL: _seal(value)}) + b"\n"


def _seal(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dump({**value, SEAL: ""})).hexdigest()[:32]


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _parsed(text: bytes) -> Asked | Record:
    """The line of a text. Raises E-DIGEST for a record that is not as it was sealed, and what `fields.read` raises."""
    value = strictjson.parse(text.strip(), depth=FOREIGN.json_depth, floats=True)
    if not isinstance(value, dict) or "state" not in value:
        return _read_asked(value, "a job")
    stated = value.pop(SEAL, "")
    if stated != _seal(value):
        raise DigestError("a record is not as it was sealed")
    return _read_record(value, "a record")


@contextmanager
def opened(path: Path, *, asks: bool = False) -> Iterator[Manifest]:
    """Give a manifest, which is made if it is not there. Raises E-LOCKED if another batch writes it, and what
    `Manifest` raises."""
    if asks and not path.exists():
        raise FileReadError("there is no such manifest", fix="name one", path=path)
    is_new = not path.exists()
    lock = file_lock(path, wait=False)
    if lock is None:
        raise LockedError("another batch writes this manifest", fix="wait until it ends", path=path)
    with lock:
        manifest = Manifest(path, asks=asks, writes=True)
        try:
            yield manifest
        finally:
            is_unused = is_new and manifest.is_empty
            manifest.close()
            if is_unused:
                discard(path)


@contextmanager
def opened_in(root: Path) -> Iterator[Manifest]:
    """Give the manifest in a folder of outputs, which is made if it is not there and goes again if nothing is put into
    it. Raises E-LOCKED if another batch writes there."""
    made = make_folder(root)
    root = root.resolve()
    with locked(root, needed=False):
        manifest = Manifest(root / NAME, writes=True)
        try:
            yield manifest
        finally:
            manifest.close()
            manifest.clear()
            remove_empty(made)
