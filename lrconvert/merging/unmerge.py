"""Undo a merge: every byte of the base's weights comes back, and is compared with its digest before anything appears.

Normative text: ``formats/undo-v1.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert import exact
from lrconvert.container import Checkpoint, TensorInfo, combined_digest, open_checkpoint, tensor_hasher
from lrconvert.dtypes import Array
from lrconvert.durable import StagedDirectory, Writer, atomic_directory, check_output, require_space
from lrconvert.errors import BaseError, DigestError, FingerprintError, LrcError, UndoError
from lrconvert.exact import Update, Workspace
from lrconvert.merging import record as records
from lrconvert.merging import residual
from lrconvert.merging.compute import read_rows
from lrconvert.merging.merge import Progress, check_replaceable
from lrconvert.merging.pipeline import Behind
from lrconvert.merging.plan import CONFIG_NAME, RECORDS, other_files
from lrconvert.merging.record import OpenRecord
from lrconvert.merging.record_json import RESIDUAL, STORED, Code, Record, TensorRecord
from lrconvert.merging.report import UnmergeReport
from lrconvert.merging.updates import cuts, segment

_CHUNK = 1 << 23
_SPACE_MARGIN = 1.02


def unmerge(
    merged: Path,
    out: Path | None = None,
    *,
    number: int | None = None,
    from_base: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> UnmergeReport:
    """Write the folder `out` (without it: replace `merged` in one step) with the base that the last merge started from.

    With `from_base` the bytes come from that base, compared with the record's digests where there is a record. Raises
    E-UNDO (no record, or one that cannot undo), E-UNDO-ORDER (`number` is not the last merge), E-DIGEST (weights or
    record changed since the merge), E-OUT-*, E-IO-*; nothing is changed then.
    """
    place = merged if out is None else out
    if out is not None:
        check_output(out, overwrite, [merged, *([] if from_base is None else [from_base])], directory=True)
        check_replaceable(out)
    report = progress or (lambda fraction, text: None)
    if from_base is not None:
        return _copy_base(merged, from_base, place, out is None or overwrite, number, report)
    with ExitStack() as stack:
        opened = stack.enter_context(OpenRecord(records.latest(merged, number)))
        if not opened.record.can_undo:
            raise UndoError(
                "the merge was made with --no-undo, so the record has digests only",
                fix="give the base: --from-base",
                path=opened.folder,
            )
        checkpoint = stack.enter_context(open_checkpoint(merged))
        _check_tensors(opened.record, checkpoint)
        require_space(place, int(sum(size for _, size in opened.record.files) * _SPACE_MARGIN))
        folder = stack.enter_context(atomic_directory(place, overwrite=out is None or overwrite))
        try:
            with Workspace() as workspace, _Unmerger(opened, checkpoint, folder, workspace, report) as work:
                done = work.run()
        except LrcError as error:
            raise error.at(merged) from None
        for file in checkpoint.files:
            file.check_unchanged()
    return done


class _Unmerger:
    """Writes the base's files into a staged folder; a context manager."""

    def __init__(
        self,
        opened: OpenRecord,
        checkpoint: Checkpoint,
        folder: StagedDirectory,
        workspace: Workspace,
        progress: Progress,
    ) -> None:
        self.opened, self.checkpoint, self.folder, self.progress = opened, checkpoint, folder, progress
        self.record, self.workspace = opened.record, workspace
        self.sources = opened.sources()
        self.behind, self.hashing = Behind(), Behind()
        self.total = max(1, sum(size for _, size in self.record.files))
        self.done = 0
        self.files: dict[str, int] = {}

    def __enter__(self) -> _Unmerger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.hashing.__exit__(kind, error, None)
        finally:
            self.behind.__exit__(kind, error, None)

    def run(self) -> UnmergeReport:
        known = {t.name: t for t in self.record.tensors}
        for (name, _), (header, infos) in zip(self.record.files, self.opened.headers, strict=True):
            with self.folder.create(name) as file:
                self.behind.submit(file.write, header)
                for info in infos:
                    self._tensor(known[info.name], file)
                    self.done += info.nbytes
                    self.progress(min(1.0, self.done / self.total), info.name)
                self.hashing.flush()
                self.behind.flush()
                self.files[name] = file.position
        if combined_digest((t.name, t.before) for t in self.record.tensors) != self.record.content:
            raise DigestError("the digests of the record do not agree with each other", path=self.opened.path)
        warnings = self._others()
        return UnmergeReport(
            record=self.opened.folder.name,
            restored=tuple(t.name for t in self.record.tensors if t.codes),
            removed=tuple(sorted(self.record.added)),
            files=tuple(sorted(self.files.items())),
            remaining=self.record.number - 1,
            verified=True,
            warnings=warnings,
        )

    # --- weights ---

    def _tensor(self, tensor: TensorRecord, file: Writer) -> None:
        before = tensor_hasher(tensor.name, tensor.dtype, tensor.shape)
        if not tensor.output:
            for code, data in self._stored(tensor):
                self.behind.submit(_emit, file, residual.decode_bytes(data, code.count), before)
            self.behind.submit(_compare, before, tensor.before, f"{tensor.name!r} would not be that of the base")
            return
        info = self.checkpoint.tensors[tensor.output]
        after = tensor_hasher(info.name, info.dtype, info.shape)
        if tensor.codes and tensor.codes[0].mode == STORED:
            self.behind.submit(_digest, self.checkpoint, info, after)
            for code, data in self._stored(tensor):
                self.behind.submit(_emit, file, residual.decode_bytes(data, code.count), before)
        elif tensor.codes:
            _check_same(tensor, info)
            for present, restore in self._restored(tensor, info):
                self.hashing.submit(after.update, present.data.cast("B"))
                self.behind.submit(_emit_restored, file, restore, before)
            self.hashing.submit(_compare, after, tensor.after, f"{tensor.output!r} was changed since the merge")
            self.behind.submit(_compare, before, tensor.before, f"{tensor.name!r} would not be that of the base")
            return
        else:
            _check_same(tensor, info)
            twin = None if tensor.name == tensor.output else before
            self.behind.submit(_copy, self.checkpoint, info, file, after, twin)
            before = before if twin is not None else after
        self.behind.submit(_compare, after, tensor.after, f"{tensor.output!r} was changed since the merge")
        self.behind.submit(_compare, before, tensor.before, f"{tensor.name!r} would not be that of the base")

    def _stored(self, tensor: TensorRecord) -> Iterator[tuple[Code, bytes]]:
        """The codes of a tensor with their bytes."""
        offset = tensor.offset
        for code in tensor.codes:
            yield code, self.opened.code(offset, code.nbytes)
            offset += code.nbytes

    def _restored(self, tensor: TensorRecord, info: TensorInfo) -> Iterator[tuple[Array, Callable[[], Array]]]:
        """(rows as they are now, what makes those of the base), in order; what no code covers did not change."""
        rows = int(np.prod(tensor.shape)) // tensor.cols
        height = exact.rows_per_block(tensor.cols)
        ends = cuts(tensor.pieces, rows)
        updates: dict[int, Update] = {}
        at = 0

        def unchanged(start: int, stop: int) -> Iterator[tuple[Array, Callable[[], Array]]]:
            for top in range(start, stop, height):
                some = read_rows(self.checkpoint, info, top, min(height, stop - top), tensor.cols)
                yield some, partial(_same, some)

        for code, data in self._stored(tensor):
            yield from unchanged(at, code.first)
            present = read_rows(self.checkpoint, info, code.first, code.count, tensor.cols)
            if code.mode == RESIDUAL:
                start, stop = next(
                    ((a, b) for a, b in pairwise(ends) if a <= code.first and code.first + code.count <= b), (0, 0)
                )
                if start not in updates:
                    updates = {start: self._update(tensor, start, stop)}
                update, row = updates[start], code.first - start
                guess, _ = update.add(present, info.dtype, row, self.workspace)
                yield present, partial(_corrected, guess, update.window(row, code.count), data)
            else:
                yield present, partial(_unmasked, present, data)
            at = code.first + code.count
        yield from unchanged(at, rows)

    def _update(self, tensor: TensorRecord, start: int, stop: int) -> Update:
        """What to add to the rows `start` to `stop` to predict those of the base."""
        for piece in tensor.pieces:
            adapter = self.sources[piece.origin.adapter].adapter
            if piece.origin.which >= len(adapter.extras if piece.origin.bias else adapter.targets):
                raise UndoError(f"an update of {tensor.name!r} is not in its adapter", path=self.opened.path)
        found = segment(tensor.pieces, start, stop, self.sources)
        if found is None or found.shape != (stop - start, tensor.cols):
            raise UndoError(f"the record has no update for {tensor.name!r}", path=self.opened.path)
        return found.negated()

    # --- other files ---

    def _others(self) -> tuple[str, ...]:
        """Write the base's small files and copy the others. Returns warnings of those that have changed."""
        copies, _ = other_files(self.checkpoint)
        warnings = []
        ours = f"{RECORDS}/{self.opened.folder.name}/"
        for name, path in sorted(copies.items()):
            if name in self.record.texts or name.startswith(ours):
                continue
            self.files[name] = self.folder.copy_file(path, name)
            if not name.startswith(f"{RECORDS}/") and self.record.others.get(name) != records.file_digest(path):
                how = "was changed" if name in self.record.others else "was added"
                warnings.append(f"{name} {how} since the merge and is kept as it is")
        for name in self.record.texts:
            text = self.opened.text(f"base/{name}")
            self.folder.write_bytes(name, text)
            self.files[name] = len(text)
        missing = sorted(set(self.record.others) - set(self.files))
        return (*warnings, *(f"{name} was removed since the merge and is not restored" for name in missing))


# --- from the base itself -------------------------------------------------------------------------------------------


def _copy_base(
    merged: Path, base: Path, place: Path, overwrite: bool, number: int | None, progress: Progress
) -> UnmergeReport:
    """A copy of `base`, if it is what the last record of `merged` says, or without a record, has tensors like it."""
    found = records.numbered(merged)
    folder_of_record = records.latest(merged, number) if found or number is not None else None
    with ExitStack() as stack:
        ours = stack.enter_context(open_checkpoint(merged))
        theirs = stack.enter_context(open_checkpoint(base))
        content = None
        if folder_of_record is not None:
            content = stack.enter_context(OpenRecord(folder_of_record)).record.content
        else:
            _check_alike(ours, theirs)
        copies, _ = other_files(theirs)
        for path in (theirs.root / CONFIG_NAME, *([theirs.index_path] if theirs.index_path else [])):
            if path.exists():
                copies[path.name] = path
        sizes = {file.path.name: file.size for file in theirs.files}
        require_space(place, int(sum(sizes.values()) * _SPACE_MARGIN))
        folder = stack.enter_context(atomic_directory(place, overwrite=overwrite))
        total, done = max(1, sum(sizes.values())), 0
        digests = []
        for file in theirs.files:
            for info in file.tensors if content is not None else ():
                digest = tensor_hasher(info.name, info.dtype, info.shape)
                _digest(theirs, info, digest)
                digests.append((info.name, digest.hexdigest()))
            with folder.create(file.path.name) as new:
                new.copy(file.fileno(), 0, file.size)
            done += file.size
            progress(done / total, file.path.name)
        if content is not None and combined_digest(digests) != content:
            raise FingerprintError("is not the base that was merged into", fix="use the same revision", path=base)
        sizes |= {name: folder.copy_file(path, name) for name, path in copies.items()}
        for file in theirs.files:
            file.check_unchanged()
    return UnmergeReport(
        record="" if folder_of_record is None else folder_of_record.name,
        restored=(),
        removed=tuple(sorted(set(ours.tensors) - set(theirs.tensors))),
        files=tuple(sorted(sizes.items())),
        remaining=len(records.numbered(place)),
        verified=content is not None,
        warnings=() if content is not None else ("there is no record, so nothing shows that this is the base",),
    )


def _check_alike(ours: Checkpoint, theirs: Checkpoint) -> None:
    """Raise E-BASE unless the models have the same tensors but for a few."""
    shared = [n for n, t in theirs.tensors.items() if n in ours.tensors and ours.tensors[n].shape == t.shape]
    if 2 * len(shared) < len(theirs.tensors):
        raise BaseError("does not have the tensors of the merged model", fix="give its own base", path=theirs.root)


# --- checks and jobs ------------------------------------------------------------------------------------------------


def _check_tensors(record: Record, checkpoint: Checkpoint) -> None:
    """Raise E-UNDO if a merged model lacks tensors of the record, or has ones that it does not know."""
    known = {t.output for t in record.tensors if t.output} | set(record.added)
    missing, strange = sorted(known - set(checkpoint.tensors)), sorted(set(checkpoint.tensors) - known)
    if missing or strange:
        what = f"lacks {missing[0]!r}" if missing else f"has {strange[0]!r}, which the merge did not write"
        raise UndoError(
            f"the model {what}",
            fix="it was changed since the merge; give the base: --from-base",
            path=checkpoint.root,
        )


def _check_same(tensor: TensorRecord, info: TensorInfo) -> None:
    if (tensor.dtype, tensor.shape) != (info.dtype, info.shape):
        raise UndoError(f"the tensor {info.name!r} has another dtype or shape than the merge gave it")


def _emit(file: Writer, data: Array | bytes, digest: object) -> None:
    view = data if isinstance(data, bytes) else np.ascontiguousarray(data).data.cast("B")
    digest.update(view)  # type: ignore[attr-defined]
    file.write(view)


def _emit_restored(file: Writer, restore: Callable[[], Array], digest: object) -> None:
    _emit(file, restore(), digest)


def _same(rows: Array) -> Array:
    return rows


def _corrected(guess: Array, window: tuple[Any, Any] | None, data: bytes) -> Array:
    """The rows that a residual makes of a prediction."""
    if window is not None:
        some = guess[window]
        guess[window] = residual.decode_residual(data, some.reshape(-1)).reshape(some.shape)
    return guess


def _unmasked(present: Array, data: bytes) -> Array:
    return residual.decode_xor(data, present.reshape(-1)).reshape(present.shape)


def _digest(checkpoint: Checkpoint, info: TensorInfo, *digests: object) -> None:
    for offset in range(0, info.nbytes, _CHUNK):
        data = checkpoint.read(info, offset, min(_CHUNK, info.nbytes - offset))
        for digest in digests:
            digest.update(data)  # type: ignore[attr-defined]


def _copy(checkpoint: Checkpoint, info: TensorInfo, file: Writer, *digests: object) -> None:
    """A tensor that the merge did not change."""
    _digest(checkpoint, info, *(d for d in digests if d is not None))
    checkpoint.file_of(info).copy(info, file)


def _compare(digest: object, wanted: str, what: str) -> None:
    if digest.hexdigest() != wanted:  # type: ignore[attr-defined]
        raise DigestError(f"the tensor {what}", fix="give the base: --from-base")
