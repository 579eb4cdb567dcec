"""Undo a merge: every byte of the base's weights comes back, and is compared with its digest before anything appears.

Normative text: ``formats/undo-v1.md``.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from lrconvert.core.errors import BaseError, FingerprintError, LrcError, OptionError, OutputPathError
from lrconvert.core.wording import spelled
from lrconvert.io.checkpoint import Checkpoint, open_checkpoint, unfinished
from lrconvert.io.container import TensorInfo, combined_digest
from lrconvert.io.durable import StagedDirectory, atomic_directory, check_output, locked, require_space
from lrconvert.merge.hashing import stored_digest
from lrconvert.merge.in_place.model_folder import BETWEEN, ModelFolder
from lrconvert.merge.in_place.unmerge import undone_before, unmerge_in_place
from lrconvert.merge.job import check_replaceable
from lrconvert.merge.options import UnmergeOptions
from lrconvert.merge.pipeline import refuse_unmerge
from lrconvert.merge.plan.other_files import UNDONE, other_files
from lrconvert.merge.plan.plan import CONFIG_NAME
from lrconvert.merge.report import UnmergeReport
from lrconvert.merge.undo.checks import changed_files, check_own_record, check_undoable, undone
from lrconvert.merge.undo.open_record import OpenRecord, latest, numbered
from lrconvert.merge.undo.repeats import undone_note
from lrconvert.merge.undo.restoring import Restorer, workspace_for
from lrconvert.merge.writing import Progress

_SPACE_MARGIN = 1.02


def unmerge(merged: Path, out: Path | None, options: UnmergeOptions, progress: Progress) -> UnmergeReport:
    """Write the folder `out` (without it: replace `merged` in one step) with the base that the last merge started from.

    With `in_place` the weight files of `merged` are restored one after the other, or only the rows that the merge
    changed; a broken off one goes on with `resume`. With `from_base` the bytes come from that base, compared with the
    record's digests where there is a record. Raises E-UNDO (no record, or one that cannot undo), E-UNDO-ORDER (`number`
    is not the last merge), E-DIGEST (weights or record changed since the merge), E-OUT-*, E-OPTION, E-LOCKED, E-IO-*:
    nothing is changed then. E-UNFINISHED: an unmerge in place was broken off; `recover` finishes it.
    """
    options.check(out)
    refuse_unmerge(merged)
    number, from_base, overwrite = options.number, options.from_base, options.overwrite
    if options.in_place:
        return unmerge_in_place(merged, number, progress, resume=options.resume)
    if options.resume:
        raise OptionError(
            f"{spelled('resume', True)} is for an unmerge in place", fix=f"add {spelled('in_place', True)}"
        )
    with ExitStack() as stack:
        if out is None and merged.is_dir():  # no other run may change what is replaced
            stack.enter_context(locked(merged, needed=False))
        folder = ModelFolder(merged)
        state = folder.state()
        if state.stage == BETWEEN:
            raise unfinished(merged)
        if out is not None:
            check_output(out, overwrite, [merged, *([] if from_base is None else [from_base])], directory=True)
            check_replaceable(out)
        elif from_base is None and (done := undone_before(merged, state, number, resume=False)):
            folder.clear()
            return done
        if from_base is not None:
            place = merged if out is None else out
            return _copy_base(merged, from_base, place, out is None or overwrite, number, progress)
        return _restore(merged, out, overwrite, number, progress)


def _restore(merged: Path, out: Path | None, overwrite: bool, number: int | None, progress: Progress) -> UnmergeReport:
    """Write the base that the record and the merged weights give."""
    place = merged if out is None else out
    with ExitStack() as stack:
        opened = stack.enter_context(OpenRecord(latest(merged, number)))
        checkpoint = stack.enter_context(open_checkpoint(merged, quantized=True))
        check_undoable(opened, checkpoint)
        if out is None:
            check_own_record(opened)
            _check_complete(checkpoint)
        require_space(place, int(sum(size for _, size in opened.record.files) * _SPACE_MARGIN))
        folder = stack.enter_context(atomic_directory(place, overwrite=out is None or overwrite))
        try:
            report = _write(opened, checkpoint, folder, progress)
        except LrcError as error:
            raise error.at(merged) from None
        note = undone_note(opened.folder, numbered(merged)) if out is None and number is None else None
        if note is not None:
            folder.write_bytes(UNDONE, note)
        for file in checkpoint.files:
            file.check_unchanged()
    return report


def _check_complete(checkpoint: Checkpoint) -> None:
    """Raise E-OUT-PATH if a model has files that are not copied, so that they would be gone with the old folder."""
    _, left_out = other_files(checkpoint)
    if left_out:
        raise OutputPathError(
            f"holds {left_out[0]!r}, which would be gone with the folder that is replaced",
            fix=f"pass {spelled('in_place', True)}, which leaves it alone, or {spelled('out', ..., '--output')}",
            path=checkpoint.root,
        )


def _write(opened: OpenRecord, checkpoint: Checkpoint, folder: StagedDirectory, progress: Progress) -> UnmergeReport:
    """Write the base's files into a staged folder."""
    total, done = max(1, sum(size for _, size in opened.record.files)), 0
    files: dict[str, int] = {}

    def advance(info: TensorInfo) -> None:
        nonlocal done
        done += info.nbytes
        progress(min(1.0, done / total), info.name)

    with workspace_for(opened) as workspace, Restorer(opened, checkpoint, workspace) as restorer:
        for number, (name, _) in enumerate(opened.record.files):
            with folder.create(name) as file:
                restorer.file(number, file, advance)
                files[name] = file.position
    opened.check_content()
    copies, _ = other_files(checkpoint)
    warnings = changed_files(opened, copies)
    for name, path in sorted(copies.items()):
        if name not in opened.record.texts and not opened.holds(name):
            files[name] = folder.copy_file(path, name)
    for name in opened.record.texts:
        text = opened.text(f"base/{name}")
        folder.write_bytes(name, text)
        files[name] = len(text)
    return undone(opened, files, warnings)


# --- from the base itself -------------------------------------------------------------------------------------------


def _copy_base(
    merged: Path, base: Path, place: Path, overwrite: bool, number: int | None, progress: Progress
) -> UnmergeReport:
    """Copy `base`, if it is what the last record of `merged` says, or without a record, has tensors like it."""
    has_record = number is not None or bool(numbered(merged))
    folder_of_record = latest(merged, number) if has_record else None
    with ExitStack() as stack:
        model = stack.enter_context(open_checkpoint(merged, quantized=True))
        source = stack.enter_context(open_checkpoint(base, quantized=True))
        content = None
        if folder_of_record is not None:
            content = stack.enter_context(OpenRecord(folder_of_record)).record.content
        else:
            _check_alike(model, source)
        if place == merged:
            _check_complete(model)
        copies, _ = other_files(source)
        for path in (source.root / CONFIG_NAME, *([source.index_path] if source.index_path else [])):
            if path.exists():
                copies[path.name] = path
        sizes = {file.path.name: file.size for file in source.files}
        require_space(place, int(sum(sizes.values()) * _SPACE_MARGIN))
        folder = stack.enter_context(atomic_directory(place, overwrite=overwrite))
        total, done = max(1, sum(sizes.values())), 0
        digests = []
        for file in source.files:
            for info in file.tensors if content is not None else ():
                digests.append((info.name, stored_digest(source, info)))
            with folder.create(file.path.name) as new:
                new.copy(file.fileno(), 0, file.size)
            done += file.size
            progress(done / total, file.path.name)
        if content is not None and combined_digest(digests) != content:
            raise FingerprintError("is not the base that was merged into", fix="use the same revision", path=base)
        sizes |= {name: folder.copy_file(path, name) for name, path in copies.items()}
        for file in source.files:
            file.check_unchanged()
    return UnmergeReport(
        record="" if folder_of_record is None else folder_of_record.name,
        restored=(),
        removed=tuple(sorted(set(model.tensors) - set(source.tensors))),
        files=tuple(sorted(sizes.items())),
        remaining=len(numbered(place)),
        verified=content is not None,
        warnings=() if content is not None else ("there is no record, so nothing shows that this is the base",),
    )


def _check_alike(model: Checkpoint, source: Checkpoint) -> None:
    """Raise E-BASE unless the models have the same tensors but for a few."""
    shared = [n for n, t in source.tensors.items() if n in model.tensors and model.tensors[n].shape == t.shape]
    if 2 * len(shared) < len(source.tensors):
        raise BaseError("does not have the tensors of the merged model", fix="give its own base", path=source.root)
