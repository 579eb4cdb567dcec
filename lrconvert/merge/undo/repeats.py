"""What a command that is repeated finds: the same merge, or the same unmerge, is in the model already.

A run may be killed after its last file is written, and before it could say so; whoever repeats the command then, with
`resume` or without, wants what he asked for once. So the records decide what was done, not whether a run ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lrconvert.core.errors import DigestError, LrcError, UndoError
from lrconvert.core.limits import MAX_INDEX_BYTES
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.io.container import read_small
from lrconvert.merge.hashing import stored_digest
from lrconvert.merge.journal import plan_text, read_signed
from lrconvert.merge.plan.plan import RECORDS, UNDONE
from lrconvert.merge.plan.updates import Scaled
from lrconvert.merge.undo import adapters, record
from lrconvert.merge.undo.open_record import RECORD_NAME, folder_name
from lrconvert.merge.undo.record import AdapterEntry, Record

_NOTE = "undone"


# --- of merges ------------------------------------------------------------------------------------------------------


def same_merge(records: Mapping[int, Path], inputs: Sequence[Scaled]) -> int:
    """Return the number of the last record of a merge of exactly these adapters, each with its scale; 0 if none is."""
    if not records:
        return 0
    entries = [adapters.entry_of(item, True) for item in inputs]
    for number, place in sorted(records.items(), reverse=True):
        if f"{RECORDS}/{place.name}" == folder_name(number, [(entry.sha256, entry.scale) for entry in entries]):
            earlier = _record(place)
            has_files = earlier.can_undo
            if [_merged(e, has_files) for e in earlier.adapters] == [_merged(e, has_files) for e in entries]:
                return number
    return 0


def _merged(entry: AdapterEntry, has_file: bool) -> tuple[object, ...]:
    """Return all of an adapter's entry that decides what is merged; a record without files does not say where to."""
    places = (entry.targets, entry.extras) if has_file else ()
    return (entry.kind, entry.scale, entry.sha256, *places)


def check_is_merged(checkpoint: Checkpoint, records: Mapping[int, Path]) -> None:
    """Raise E-DIGEST unless every tensor of a model is what its last merge made of it."""
    number = max(records)
    last = _record(records[number])
    digests = dict(last.added) | {t.output: t.after for t in last.tensors if t.output}
    for name, info in checkpoint.tensors.items():
        if digests.pop(name, None) != stored_digest(checkpoint, info):
            raise _changed(number, name, checkpoint.root)
    for name in digests:
        raise _changed(number, name, checkpoint.root)


def _changed(number: int, name: str, root: Path) -> DigestError:
    what = f"holds this merge already, and {name!r} was changed since merge {number}"
    return DigestError(what, fix="pass --again to merge once more all the same", path=root)


def _record(place: Path) -> Record:
    path = place / RECORD_NAME
    try:
        return record.parse(read_small(path, MAX_INDEX_BYTES))
    except LrcError as error:
        raise error.at(path) from None


# --- of unmerges ----------------------------------------------------------------------------------------------------


def undone_note(undone: Path, records: Mapping[int, Path]) -> bytes | None:
    """Return the note that an unmerge which was not told a number leaves: what was `undone`, and which of the `records`
    is the last one now. None where no other is left, since nothing more can be undone then."""
    rest = [number for number, place in records.items() if place.name != undone.name]
    if not rest:
        return None
    value = {"place": f"{RECORDS}/{undone.name}", "last": f"{RECORDS}/{records[max(rest)].name}"}
    return plan_text(_NOTE, value)


def noted_place(model: Path, records: Mapping[int, Path]) -> str:
    """Return the place of the record that the note of a model says was undone last; "" where there is no note, or a
    merge came since. Raises E-DIGEST, E-UNDO for a note that no unmerge wrote."""
    path = model / UNDONE
    if not records or not path.exists():
        return ""
    value = read_signed(path)
    if value.get("kind") != _NOTE or not isinstance(value.get("place"), str):
        raise UndoError("is not a note that an unmerge writes", fix="remove it", path=path)
    return value["place"] if value.get("last") == f"{RECORDS}/{records[max(records)].name}" else ""
