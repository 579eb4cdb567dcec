"""The journal of a merge: what it set out to do, and which weight files are finished, so that a later run can go on.

Normative text: ``formats/undo-v1.md``, section 5. ``plan.json`` is written first; ``done.jsonl`` gets a line for each
finished weight file, synced after the file itself. Every line has a digest of its own: what a crash has torn, or a disk
has damaged, is done again.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from lrconvert.core.errors import LrcError
from lrconvert.core.limits import MAX_INDEX_BYTES
from lrconvert.io import fields
from lrconvert.io.container import read_small
from lrconvert.io.durable import LINES_NAME, PLAN_NAME, StagedDirectory
from lrconvert.io.fields import By, Hex, Key, Whole
from lrconvert.merge.arithmetic.stats import MergeStats
from lrconvert.merge.signed_json import VERSION, HexFloat, sign, verify
from lrconvert.merge.undo.record import TensorRecord, check_tensor

FORMAT = "lrconvert-journal"


class Patch(NamedTuple):
    """Rows that are changed where they lie: the file of that name in the journal has them, before and after."""

    name: str
    nbytes: Whole
    sha256: Hex


class _Stats(NamedTuple):
    """`MergeStats` in a line."""

    elements: Whole
    changed: Whole
    unmoved: Whole
    max_error: HexFloat
    sum_error: HexFloat
    recomputed: Whole
    rational: Whole


def _read_stats(value: Any, path: str) -> MergeStats:
    return MergeStats(*fields.read(_Stats, value, path))


def _write_stats(stats: MergeStats) -> Any:
    return fields.as_json(_Stats(**vars(stats)))


@dataclass(frozen=True)
class Done:
    """A finished weight file: what became of its `tensors`, digests of tensors that were `added`, `stats` of those that
    updates were added to; `codes` bytes of undo.bin with the digest `undo` so far; the `patch` that changes it."""

    shard: str
    tensors: tuple[TensorRecord, ...]
    added: Mapping[str, Hex]
    stats: Annotated[Mapping[str, Annotated[MergeStats, By(_read_stats, _write_stats)]], Key("tallies")]
    codes: Whole
    undo: Hex
    patch: Patch | None = None

    @property
    def digests(self) -> dict[str, str]:
        """The digests of the tensors of the finished file."""
        return dict(self.added) | {t.output: t.after for t in self.tensors if t.output}


def plan_text(kind: str, value: Mapping[str, Any]) -> bytes:
    """Return the bytes of plan.json: what the work is, and digests of all that it is made from."""
    return sign({"format": FORMAT, "version": VERSION, "kind": kind, **value})


def read_signed(path: Path) -> dict[str, Any]:
    """Return the fields of a signed object of the journal. Raises E-VER, E-DIGEST, E-IO-KIND."""
    try:
        return verify(read_small(path, MAX_INDEX_BYTES), "the journal", FORMAT)
    except LrcError as error:
        raise error.at(path) from None


def _parse_line(line: bytes, adapters: int) -> Done:
    done = fields.read(Done, verify(line, "a line of the journal"), "a line of the journal")
    for tensor in done.tensors:
        check_tensor(tensor, adapters)
    return done


@dataclass
class Journal:
    """The journal in a folder of work. `finished` are the lines of an earlier run with the same plan; those that its
    output does not bear out are taken off (`keep`) before lines are added."""

    folder: StagedDirectory
    plan: bytes
    adapters: int
    finished: list[Done] = field(default_factory=list)
    _ends: list[int] = field(default_factory=list)

    def read(self) -> bool:
        """Read the lines up to the first that is not whole. Returns whether there is a journal with this plan."""
        path, lines = self.folder.root / PLAN_NAME, self.folder.root / LINES_NAME
        if not _is_file(path) or path.stat().st_size != len(self.plan) or path.read_bytes() != self.plan:
            return False
        end = 0
        for line in lines.read_bytes().split(b"\n")[:-1] if _is_file(lines) else ():
            try:
                done = _parse_line(line, self.adapters)
            except LrcError:
                break
            end += len(line) + 1
            self.finished.append(done)
            self._ends.append(end)
        return True

    def begin(self) -> None:
        """Write the plan, as the first of all."""
        self.folder.write_bytes(PLAN_NAME, self.plan)
        self.folder.write_bytes(LINES_NAME, b"")
        self.folder.sync()

    def keep(self, count: int) -> None:
        """Keep the first `count` lines only."""
        del self.finished[count:], self._ends[count:]
        if not (self.folder.root / LINES_NAME).exists():
            self.folder.write_bytes(LINES_NAME, b"")
        with self.folder.reopen(LINES_NAME, self._ends[-1] if self._ends else 0):
            pass

    def add(self, done: Done) -> None:
        """Add a line; it is on the disk when this returns."""
        line = sign(fields.as_json(done)) + b"\n"
        start = self._ends[-1] if self._ends else 0
        with self.folder.reopen(LINES_NAME, start) as file:
            file.write(line)
        self.finished.append(done)
        self._ends.append(start + len(line))


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False
