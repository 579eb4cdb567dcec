"""The checks and the report of an unmerge, wherever it writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lrconvert.core.errors import UndoError
from lrconvert.core.wording import spelled
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.merge.hashing import file_digest
from lrconvert.merge.plan.other_files import RECORDS
from lrconvert.merge.report import UnmergeReport
from lrconvert.merge.signed_json import portable
from lrconvert.merge.undo.open_record import RECORD_NAME, OpenRecord


def check_undoable(opened: OpenRecord, checkpoint: Checkpoint) -> None:
    """Raise E-UNDO if a record has digests only, or a merged model lacks tensors of it, or has others."""
    record = opened.record
    if not record.can_undo:
        raise UndoError(
            f"the merge was made with {spelled('undo', False, '--no-undo')}, so the record has digests only",
            fix=f"give the base: {spelled('from_base', ...)}",
            path=opened.folder,
        )
    names = {t.output for t in record.tensors if t.output} | set(record.added)
    missing, strange = sorted(names - set(checkpoint.tensors)), sorted(set(checkpoint.tensors) - names)
    if missing or strange:
        what = f"lacks {missing[0]!r}" if missing else f"has {strange[0]!r}, which the merge did not write"
        raise UndoError(
            f"the model {what}",
            fix=f"it was changed since the merge; give the base: {spelled('from_base', ...)}",
            path=checkpoint.root,
        )


def check_own_record(opened: OpenRecord) -> None:
    """Raise E-UNDO if the folder of a record, which goes away with an unmerge in its place, holds a file of others."""
    ours = {RECORD_NAME, *opened.record.stored}
    for path in sorted(opened.folder.rglob("*")):
        if (path.is_symlink() or not path.is_dir()) and path.relative_to(opened.folder).as_posix() not in ours:
            raise UndoError("is in the folder of the record, and no merge wrote it", fix="move it away", path=path)


def changed_files(opened: OpenRecord, copies: Mapping[str, Path]) -> tuple[str, ...]:
    """Return warnings of the files beside the weights, `copies`, which are kept as they are."""
    record, warnings = opened.record, []
    for name, path in sorted(copies.items()):
        if name in record.texts or name.startswith(f"{RECORDS}/"):
            continue
        if record.others.get(portable(name)) != file_digest(path):
            how = "was changed" if portable(name) in record.others else "was added"
            warnings.append(f"{name} {how} since the merge and is kept as it is")
    missing = sorted(set(record.others) - set(map(portable, copies)) - set(record.texts))
    return (*warnings, *(f"{name} was removed since the merge and is not restored" for name in missing))


def undone(opened: OpenRecord, files: Mapping[str, int], warnings: tuple[str, ...]) -> UnmergeReport:
    """Return the report of a merge that was undone with its record."""
    return UnmergeReport(
        record=opened.folder.name,
        restored=tuple(t.name for t in opened.record.tensors if t.codes),
        removed=tuple(sorted(opened.record.added)),
        files=tuple(sorted(files.items())),
        remaining=opened.record.number - 1,
        verified=True,
        warnings=warnings,
    )
