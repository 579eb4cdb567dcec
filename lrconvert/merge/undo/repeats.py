"""Commands that are repeated: the same merge, or the same unmerge, is in the model already.

A run may be killed after its last file is written, and before it could say so; whoever repeats the command then, with
`resume` or without, wants what he asked for once. So the records decide what was done, not whether a run ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lrconvert.core.errors import DigestError, LrcError, UndoError
from lrconvert.core.limits import MAX_INDEX_BYTES
from lrconvert.core.wording import spelled
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.io.container import read_small
from lrconvert.merge.hashing import stored_digest
from lrconvert.merge.journal import plan_text, read_signed
from lrconvert.merge.plan.other_files import RECORDS, UNDONE
from lrconvert.merge.plan.updates import Scaled
from lrconvert.merge.report import MergeReport
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
            earlier = read_record(place)
            has_files = earlier.can_undo
            if [_merged(e, has_files) for e in earlier.adapters] == [_merged(e, has_files) for e in entries]:
                return number
    return 0


def _merged(entry: AdapterEntry, has_file: bool) -> tuple[object, ...]:
    """Return all of an adapter's entry that decides what is merged; a record without files does not say where to."""
    places = (entry.targets, entry.extras) if has_file else ()
    return (entry.kind, entry.scale, entry.sha256, *places)


def changed_tensor(checkpoint: Checkpoint, records: Mapping[int, Path]) -> str | None:
    """Return the first tensor of a model that is not what its last merge made of it, or that is missing; None if all
    are."""
    last = read_record(records[max(records)])
    digests = dict(last.added) | {t.output: t.after for t in last.tensors if t.output}
    for name, info in checkpoint.tensors.items():
        if digests.pop(name, None) != stored_digest(checkpoint, info):
            return name
    return min(digests, default=None)


def check_is_merged(checkpoint: Checkpoint, records: Mapping[int, Path]) -> None:
    """Raise E-DIGEST unless every tensor of a model is what its last merge made of it."""
    name = changed_tensor(checkpoint, records)
    if name is not None:
        what = f"holds this merge already, and {name!r} was changed since merge {max(records)}"
        raise DigestError(
            what, fix=f"pass {spelled('again', True)} to merge once more all the same", path=checkpoint.root
        )


def already_merged(place: Path, *, dry_run: bool) -> MergeReport:
    """Return the report of a merge whose record is the folder `place` of the model already."""
    return MergeReport(
        *((),) * 4,
        config={},
        files=(),
        left_out=(),
        dry_run=dry_run,
        record=f"{RECORDS}/{place.name}",
        record_bytes=sum(path.stat().st_size for path in place.rglob("*") if path.is_file()),
        can_undo=read_record(place).can_undo,
        already_done=True,
    )


def read_record(place: Path) -> Record:
    """Return record.json of a record; its other files are not looked at. Raises what `record.parse` raises."""
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
