"""The journal of a merge: what it set out to do, and which weight files are finished, so that a later run can go on.

Normative text: ``formats/undo-v1.md``, section 5. ``plan.json`` is written first; ``done.jsonl`` gets a line for each
finished weight file, synced after what it tells of. Every line has a digest of its own: what a crash has torn, or a
disk has damaged, is done again.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrconvert.core.errors import DigestError, JsonSyntaxError, LrcError, UndoError, VersionError
from lrconvert.core.limits import FOREIGN, MAX_INDEX_BYTES
from lrconvert.io import strictjson
from lrconvert.io.container import open_regular, pread, read_small
from lrconvert.io.durable import StagedDirectory
from lrconvert.io.strictjson import as_hex, as_object
from lrconvert.merge.arithmetic.stats import MergeStats
from lrconvert.merge.undo.record_json import TensorRecord, digests_of, parse_tensor, sign, tensor_json

FORMAT, VERSION = "lrconvert-journal", 1
PLAN_NAME, DONE_NAME = "plan.json", "done.jsonl"


@dataclass(frozen=True)
class Patch:
    """Rows that are changed where they lie: the file of that name in the journal has them, before and after."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Done:
    """A finished weight file: what became of its `tensors`, digests of tensors that were `added`, `tallies` of those
    that updates were added to; `codes` bytes of undo.bin with the digest `undo` so far; the `patch` that changes it."""

    shard: str
    tensors: tuple[TensorRecord, ...]
    added: Mapping[str, str]
    tallies: Mapping[str, MergeStats]
    codes: int
    undo: str
    patch: Patch | None = None


def plan_text(kind: str, value: Mapping[str, Any]) -> bytes:
    """The bytes of plan.json: what the work is, and digests of all that it is made from."""
    return sign({"format": FORMAT, "version": VERSION, "kind": kind, **value})


def read_signed(path: Path, kind: str | None = None) -> dict[str, Any]:
    """A signed JSON object of the journal. Raises E-VER, E-DIGEST, E-UNDO, E-IO-KIND."""
    data = read_small(path, MAX_INDEX_BYTES)
    value = strictjson.parse(data, depth=FOREIGN.json_depth)
    if not isinstance(value, dict):
        raise JsonSyntaxError("the journal is not a JSON object", path=path)
    if (value.get("format"), value.get("version")) != (FORMAT, VERSION):
        raise VersionError(f"the journal is of version {value.get('version')!r:.40}", fix="update lrconvert", path=path)
    if sign({key: item for key, item in value.items() if key != "digest"}) != data:
        raise DigestError("the journal was changed", path=path)
    if kind is not None and value.get("kind") != kind:
        raise UndoError(f"the journal is of another kind: {value.get('kind')!r:.40}", path=path)
    return value


# --- lines ----------------------------------------------------------------------------------------------------------


def _line(done: Done) -> bytes:
    value: dict[str, Any] = {
        "shard": done.shard,
        "tensors": [tensor_json(t) for t in done.tensors],
        "added": dict(done.added),
        "tallies": {name: _tally_json(t) for name, t in done.tallies.items()},
        "codes": done.codes,
        "undo": done.undo,
    }
    if done.patch is not None:
        value["patch"] = [done.patch.name, done.patch.nbytes, done.patch.sha256]
    return sign(value) + b"\n"


def _parse_line(line: bytes, adapters: int) -> Done:
    value = strictjson.parse(line, depth=FOREIGN.json_depth)
    fields = ("shard", "tensors", "added", "tallies", "codes", "undo", "digest")
    value = as_object(value, "a line of the journal", fields, ["patch"])
    if sign({key: item for key, item in value.items() if key != "digest"}) != line:
        raise DigestError("a line of the journal was changed")
    return Done(
        shard=value["shard"],
        tensors=tuple(parse_tensor(item, adapters) for item in value["tensors"]),
        added=digests_of(value["added"]),
        tallies={name: _tally(item) for name, item in value["tallies"].items()},
        codes=value["codes"],
        undo=as_hex(value["undo"], "the digest of the undo codes"),
        patch=Patch(*value["patch"]) if "patch" in value else None,
    )


def _tally_json(t: MergeStats) -> list[Any]:
    return [t.elements, t.changed, t.unmoved, t.max_error.hex(), t.sum_error.hex(), t.recomputed, t.rational]


def _tally(value: Any) -> MergeStats:
    elements, changed, unmoved, most, total, recomputed, rational = value
    errors = float.fromhex(most), float.fromhex(total)
    return MergeStats(elements, changed, unmoved, *errors, recomputed, rational)


# --- the journal ----------------------------------------------------------------------------------------------------


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
        """Whether there is a journal with this plan; its lines up to the first that is not whole."""
        path = self.folder.root / PLAN_NAME
        if not _is_file(path) or path.stat().st_size != len(self.plan) or path.read_bytes() != self.plan:
            return False
        lines = self.folder.root / DONE_NAME
        if not _is_file(lines):
            return True
        descriptor, info = open_regular(lines)
        try:
            data = bytes(pread(descriptor, info.st_size, 0, lines))
        finally:
            os.close(descriptor)
        end = 0
        for line in data.split(b"\n")[:-1]:
            try:
                done = _parse_line(line, self.adapters)
            except (LrcError, TypeError, ValueError, KeyError, AttributeError):
                break
            end += len(line) + 1
            self.finished.append(done)
            self._ends.append(end)
        return True

    def begin(self) -> None:
        """Write the plan, as the first of all."""
        self.folder.write_bytes(PLAN_NAME, self.plan)
        self.folder.write_bytes(DONE_NAME, b"")
        self.folder.sync()

    def keep(self, count: int) -> None:
        """Keep the first `count` lines only."""
        del self.finished[count:], self._ends[count:]
        if not (self.folder.root / DONE_NAME).exists():
            self.folder.write_bytes(DONE_NAME, b"")
        with self.folder.reopen(DONE_NAME, self._ends[-1] if self._ends else 0):
            pass

    def add(self, done: Done) -> None:
        """A line, on the disk when this returns."""
        line = _line(done)
        start = self._ends[-1] if self._ends else 0
        with self.folder.reopen(DONE_NAME, start) as file:
            file.write(line)
        self.finished.append(done)
        self._ends.append(start + len(line))


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def shard_plan(shards: Sequence[tuple[str, str, int]]) -> list[list[Any]]:
    """(name, sha256 of the header, bytes) of weight files, for a plan."""
    return [list(item) for item in shards]
