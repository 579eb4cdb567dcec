"""A fleet's head: the one small file that says what of the others counts. Normative text:
``formats/fleet-v1.md``, section 2.

It is replaced as a whole, last: what it does not state is not there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from lrconvert.core import errors
from lrconvert.core.errors import LrcError
from lrconvert.core.limits import MAX_INT
from lrconvert.formats.fleet import names
from lrconvert.formats.fleet.index import MAX_NODE, MAX_RUNS, Run
from lrconvert.formats.fleet.records import MAGIC
from lrconvert.io import fields, strictjson
from lrconvert.io.container import read_small
from lrconvert.io.fields import By, Hex, between

FORMAT, VERSION = "lrconvert-fleet", 1
HEAD_BYTES = 1 << 14
_OURS = re.compile(r"(?:members|index)-[1-9][0-9]{0,14}")

_Count = Annotated[int, between(0, MAX_INT)]
_Number = Annotated[int, between(1, 10**15 - 1)]


@dataclass(frozen=True)
class _Run:
    bytes: _Number
    digest: Hex
    entries: _Number
    number: _Number
    root: Annotated[int, between(1, MAX_NODE)]


def _runs(value: Any, path: str) -> tuple[Run, ...]:
    listed = fields.read(tuple[_Run, ...], value, path)
    runs = tuple(Run(run.number, run.bytes, run.root, run.entries, run.digest) for run in listed)
    if len(runs) > MAX_RUNS:
        raise errors.LimitError(f"the index of the fleet has {len(runs)} runs; at most {MAX_RUNS} are read")
    if any(run.root > run.bytes for run in runs) or len({run.number for run in runs}) < len(runs):
        raise errors.OffsetError("a run of the index is shorter than its root, or named twice")
    return runs


def _as_json(runs: Sequence[Run]) -> list[dict[str, Any]]:
    return [fields.as_json(_Run(run.bytes, run.digest, run.entries, run.number, run.root)) for run in runs]


@dataclass(frozen=True)
class Head:
    """A fleet's head: the `generation` of its data file and how many `bytes` of that count, how many `members` it has,
    how many of the bytes are those of members that were removed or replaced (`dead`), and the `runs` of its index,
    oldest first; `next` is the number of the run that is written next: none is used twice."""

    bytes: Annotated[int, between(len(MAGIC), MAX_INT)] = len(MAGIC)
    dead: _Count = 0
    generation: _Number = 1
    members: _Count = 0
    next: _Number = 1
    runs: Annotated[tuple[Run, ...], By(_runs, _as_json)] = ()

    @property
    def data_name(self) -> str:
        return f"members-{self.generation}"


_OWN = ("format", "requires", "version", "digest")


def encode(head: Head) -> bytes:
    """Return the bytes of a head."""
    about = {"format": FORMAT, "requires": [], "version": VERSION, **_values(head)}
    about["digest"] = hashlib.sha256(strictjson.dump_canonical(about)).hexdigest()
    return strictjson.dump_canonical(about)


def _values(head: Head) -> dict[str, Any]:
    counts = {name: getattr(head, name) for name in ("bytes", "dead", "generation", "members", "next")}
    return {**counts, "runs": _as_json(head.runs)}


def decode(data: bytes) -> Head:
    """Return the head that some bytes are. Raises E-VER, E-DIGEST, E-CANON and what reading JSON raises."""
    value = strictjson.parse_canonical(data, depth=4)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise errors.JsonSyntaxError(f"is no {FORMAT} file")
    if value.get("version") != VERSION:
        shown = f"{value.get('version')!r:.20}"
        raise errors.VersionError(
            f"the fleet has version {shown}, this program knows {VERSION}", fix="update lrconvert"
        )
    if value.get("requires") != []:
        what = f"the fleet requires features that are not known: {value.get('requires')!r:.80}"
        raise errors.VersionError(what, fix="update lrconvert")
    stated = value.pop("digest", None)
    if stated != hashlib.sha256(strictjson.dump_canonical(value)).hexdigest():
        raise errors.DigestError("does not match its digest", fix="restore it from a copy of the fleet")
    about = {key: item for key, item in value.items() if key not in _OWN}
    missing = fields.names(Head) - about.keys()
    if missing:
        raise errors.MissingFieldError(f"lacks the field {min(missing)!r}")
    head = fields.read(Head, about, "the head")
    if any(run.number >= head.next for run in head.runs):
        raise errors.IndexRangeError("a run of the index has a number that is still to come")
    if head.dead > head.bytes:
        raise errors.OffsetError("more bytes are dead than there are")
    return head


def read(root: Path) -> Head:
    """Return the head of the fleet in a folder. Raises E-IO-KIND, E-LIMIT, and what `decode` raises."""
    path = root / names.HEAD
    try:
        return decode(read_small(path, HEAD_BYTES))
    except LrcError as error:
        raise error.at(path) from None


def index_name(run: Run) -> str:
    """Return the name of the file of a run."""
    return f"index-{run.number}"


def is_ours(name: str) -> bool:
    """Return true if a name is one of a data file or a run: of a fleet's folder only such files are deleted."""
    return _OURS.fullmatch(name) is not None


def files_of(head: Head) -> set[str]:
    """Return the names of the files that a head states."""
    return {head.data_name, *map(index_name, head.runs)}


def grown(head: Head, nbytes: int, members: int, dead: int) -> Head:
    """Return a head with so many bytes, and these many more members and dead bytes."""
    return replace(head, bytes=nbytes, members=head.members + members, dead=head.dead + dead)
