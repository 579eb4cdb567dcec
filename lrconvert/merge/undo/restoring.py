"""Restoring weight files of a base from a merged model and the record of the merge, every digest compared.

Normative text: ``formats/undo-v1.md``, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import DigestError, UndoError
from lrconvert.core.wording import spelled
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.io.container import TensorInfo, tensor_hasher
from lrconvert.io.durable import Writer
from lrconvert.merge import compute
from lrconvert.merge.arithmetic.exact import Update
from lrconvert.merge.arithmetic.workspace import Workspace, loops_for
from lrconvert.merge.background_writer import BackgroundWriter
from lrconvert.merge.hashing import Digest, chunks, copy_hashed, emit
from lrconvert.merge.plan.updates import cuts, segment
from lrconvert.merge.undo import residual
from lrconvert.merge.undo.open_record import OpenRecord
from lrconvert.merge.undo.record import PREDICTED, STORED, Code, TensorRecord

# Takes a tensor, its first row here, the rows as they are and those of the base.
Change = Callable[[TensorRecord, int, Array, Array], None]


def workspace_for(opened: OpenRecord) -> Workspace:
    """Return what the base of a record is restored with."""
    tensors = (t for t in opened.record.tensors if t.dtype == "BF16")
    elements = sum(code.length * (t.cols or 0) for t in tensors for code in t.codes if code.mode in PREDICTED)
    return Workspace(loops=loops_for("unmerge", elements))


class Restorer:
    """Restores weight files of the base of `opened` from `checkpoint`, which holds the merged ones. A context manager.

    `change` is called with all rows of a tensor with codes, in order, in the background.
    """

    def __init__(
        self, opened: OpenRecord, checkpoint: Checkpoint, workspace: Workspace, change: Change | None = None
    ) -> None:
        self.opened, self.checkpoint, self.workspace, self.change = opened, checkpoint, workspace, change
        self.sources = opened.sources()
        self.writer, self.hasher = BackgroundWriter(), BackgroundWriter()

    def __enter__(self) -> Restorer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.hasher.__exit__(kind, error, None)
        finally:
            self.writer.__exit__(kind, error, None)

    def file(self, number: int, file: Writer, progress: Callable[[TensorInfo], None] = lambda info: None) -> None:
        """Write the base's weight file `number`. Raises E-DIGEST, E-UNDO."""
        header, infos = self.opened.headers[number]
        self.writer.submit(file.write, header)
        for info in infos:
            self.tensor(self.opened.tensors[info.name], file)
            progress(info)
        self.hasher.flush()
        self.writer.flush()

    def tensor(self, tensor: TensorRecord, file: Writer) -> None:
        """Write a tensor of the base; done when both queues are flushed."""
        before: Digest = tensor_hasher(tensor.name, tensor.dtype, tensor.shape)
        if tensor.output:
            info = self.checkpoint.tensors.get(tensor.output)
            if info is None:
                what = f"the record has {tensor.output!r} in another weight file than the model"
                raise UndoError(what, fix=f"give the base: {spelled('from_base', ...)}", path=self.opened.path)
            before = self._from_merged(tensor, info, file, before)
        else:
            self._from_codes(tensor, file, before)
        self.writer.submit(_compare, before, tensor.before, f"{tensor.name!r} would not be that of the base")

    def _from_merged(self, tensor: TensorRecord, info: TensorInfo, file: Writer, before: Digest) -> Digest:
        """Write a tensor that the merged model has, and compare the merged one with its digest. Returns the digest of
        what was written, which is that of the merged one if nothing has changed."""
        after = tensor_hasher(info.name, info.dtype, info.shape)
        hasher = self.writer
        if tensor.codes and tensor.codes[0].mode == STORED:
            self.writer.submit(_read, self.checkpoint, info, after)
            self._from_codes(tensor, file, before)
        elif (tensor.dtype, tensor.shape) != (info.dtype, info.shape):
            raise UndoError(f"the tensor {info.name!r} has another dtype or shape than the merge gave it")
        elif tensor.codes:
            hasher, first = self.hasher, 0
            for present, restore in self._restored(tensor, info):
                self.hasher.submit(after.update, present.data.cast("B"))
                self.writer.submit(self._emit_restored, file, tensor, first, present, restore, before)
                first += present.shape[0]
        else:
            if tensor.name == tensor.output:
                before = after
            self.writer.submit(copy_hashed, self.checkpoint, info, file, {before, after})
        hasher.submit(_compare, after, tensor.after, f"{tensor.output!r} was changed since the merge")
        return before

    def _from_codes(self, tensor: TensorRecord, file: Writer, before: Digest) -> None:
        """Write a tensor whose bytes the record holds."""
        for code, data in self._codes(tensor):
            self.writer.submit(emit, file, residual.decode_bytes(data, code.length), before)

    def _codes(self, tensor: TensorRecord) -> Iterator[tuple[Code, bytes]]:
        """Return the codes of a tensor with their bytes."""
        offset = tensor.offset or 0
        for code in tensor.codes:
            yield code, self.opened.code(offset, code.nbytes)
            offset += code.nbytes

    def _restored(self, tensor: TensorRecord, info: TensorInfo) -> Iterator[tuple[Array, Callable[[], Array]]]:
        """Return (rows as they are now, a function that makes those of the base) in order; rows without a code did not
        change."""
        cols, pool = tensor.cols or 1, self.workspace.pool
        rows = int(np.prod(tensor.shape)) // cols
        height = compute.rows_per_block(cols)
        segments = list(pairwise(cuts(tensor.pieces, rows)))
        updates: dict[int, Update] = {}
        end = 0

        def unchanged(start: int, stop: int) -> Iterator[tuple[Array, Callable[[], Array]]]:
            for top in range(start, stop, height):
                present = compute.read_rows(self.checkpoint, info, top, min(height, stop - top), cols, pool)
                yield present, partial(_same, present)

        for code, data in self._codes(tensor):
            yield from unchanged(end, code.first)
            end = code.first + code.length
            present = compute.read_rows(self.checkpoint, info, code.first, code.length, cols, pool)
            if code.mode in PREDICTED:
                start, stop = next(((a, b) for a, b in segments if a <= code.first and end <= b), (0, 0))
                if start not in updates:
                    updates = {start: self._update(tensor, start, stop)}
                update, row = updates[start], code.first - start
                guess, _ = update.add(present, info.dtype, row, self.workspace, measure=False)
                window = update.window(row, code.length)
                decode = partial(residual.decode, data, code.mode, loops=self.workspace.loops)
                yield present, partial(_corrected, guess, window, present, decode)
            else:
                yield present, partial(_unmasked, present, data)
        yield from unchanged(end, rows)

    def _update(self, tensor: TensorRecord, start: int, stop: int) -> Update:
        """Return what to add to the rows `start` to `stop` to predict those of the base."""
        for piece in tensor.pieces:
            adapter = self.sources[piece.adapter].adapter
            if piece.which >= len(adapter.extras if piece.bias else adapter.targets):
                raise UndoError(f"an update of {tensor.name!r} is not in its adapter", path=self.opened.path)
        update = segment(tensor.pieces, start, stop, self.sources)
        if update is None or update.shape != (stop - start, tensor.cols):
            raise UndoError(f"the record has no update for {tensor.name!r}", path=self.opened.path)
        return update.negated()

    def _emit_restored(
        self, file: Writer, tensor: TensorRecord, first: int, present: Array, restore: Callable[[], Array], digest: Any
    ) -> None:
        restored = np.ascontiguousarray(restore())
        if self.change is not None:
            self.change(tensor, first, present, restored)
        emit(file, restored, digest)


def _same(rows: Array) -> Array:
    return rows


def _corrected(guess: Array, window: tuple[Any, Any] | None, present: Array, decode: Callable[..., Array]) -> Array:
    """Return the rows that `decode` makes of a prediction and the merged rows, `present`."""
    if window is not None:
        predicted, merged = guess[window], present[window].reshape(-1)
        guess[window] = decode(predicted.reshape(-1), merged).reshape(predicted.shape)
    return guess


def _unmasked(present: Array, data: bytes) -> Array:
    return residual.decode_xor(data, present.reshape(-1)).reshape(present.shape)


def _read(checkpoint: Checkpoint, info: TensorInfo, digest: Digest) -> None:
    """Hash a stored tensor."""
    for data in chunks(checkpoint, info):
        digest.update(data)


def _compare(digest: Digest, expected: str, what: str) -> None:
    if digest.hexdigest() != expected:
        raise DigestError(f"the tensor {what}", fix=f"give the base: {spelled('from_base', ...)}")
