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
from lrconvert.io.container import Checkpoint, TensorInfo, tensor_hasher
from lrconvert.io.durable import Writer
from lrconvert.merge import compute
from lrconvert.merge.arithmetic.exact import Update
from lrconvert.merge.arithmetic.workspace import Workspace
from lrconvert.merge.background_writer import BackgroundWriter
from lrconvert.merge.plan.updates import cuts, segment
from lrconvert.merge.undo import residual
from lrconvert.merge.undo.record import OpenRecord
from lrconvert.merge.undo.record_json import RESIDUAL, STORED, Code, TensorRecord

_CHUNK = 1 << 23

# Told of a tensor, its first row here, the rows as they are and those of the base.
Change = Callable[[TensorRecord, int, Array, Array], None]


class Restorer:
    """Restores weight files of the base of `opened` from `checkpoint`, which holds the merged ones. A context manager.

    `change` is told of every row of a tensor with codes, in order, behind the computation.
    """

    def __init__(
        self, opened: OpenRecord, checkpoint: Checkpoint, workspace: Workspace, change: Change | None = None
    ) -> None:
        self.opened, self.checkpoint, self.workspace, self.change = opened, checkpoint, workspace, change
        self.sources = opened.sources()
        self.known = {t.name: t for t in opened.record.tensors}
        self.behind, self.hashing = BackgroundWriter(), BackgroundWriter()

    def __enter__(self) -> Restorer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.hashing.__exit__(kind, error, None)
        finally:
            self.behind.__exit__(kind, error, None)

    def file(self, number: int, file: Writer, progress: Callable[[TensorInfo], None] = lambda info: None) -> None:
        """Write the base's weight file `number`. Raises E-DIGEST, E-UNDO."""
        header, infos = self.opened.headers[number]
        self.behind.submit(file.write, header)
        for info in infos:
            self.tensor(self.known[info.name], file)
            progress(info)
        self.hashing.flush()
        self.behind.flush()

    def tensor(self, tensor: TensorRecord, file: Writer) -> None:
        """Write a tensor of the base; done when both queues are flushed."""
        before = tensor_hasher(tensor.name, tensor.dtype, tensor.shape)
        if not tensor.output:
            for code, data in self._stored(tensor):
                self.behind.submit(_emit, file, residual.decode_bytes(data, code.count), before)
            self.behind.submit(_compare, before, tensor.before, f"{tensor.name!r} would not be that of the base")
            return
        info = self.checkpoint.tensors[tensor.output]
        after = tensor_hasher(info.name, info.dtype, info.shape)
        if tensor.codes and tensor.codes[0].mode == STORED:
            self.behind.submit(digest_into, self.checkpoint, info, after)
            for code, data in self._stored(tensor):
                self.behind.submit(_emit, file, residual.decode_bytes(data, code.count), before)
        elif tensor.codes:
            _check_same(tensor, info)
            first = 0
            for present, restore in self._restored(tensor, info):
                self.hashing.submit(after.update, present.data.cast("B"))
                self.behind.submit(self._emit_restored, file, tensor, first, present, restore, before)
                first += present.shape[0]
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
        height = compute.rows_per_block(tensor.cols)
        ends = cuts(tensor.pieces, rows)
        updates: dict[int, Update] = {}
        at = 0

        def unchanged(start: int, stop: int) -> Iterator[tuple[Array, Callable[[], Array]]]:
            for top in range(start, stop, height):
                some = compute.read_rows(self.checkpoint, info, top, min(height, stop - top), tensor.cols)
                yield some, partial(_same, some)

        for code, data in self._stored(tensor):
            yield from unchanged(at, code.first)
            present = compute.read_rows(self.checkpoint, info, code.first, code.count, tensor.cols)
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

    def _emit_restored(
        self, file: Writer, tensor: TensorRecord, first: int, present: Array, restore: Callable[[], Array], digest: Any
    ) -> None:
        restored = np.ascontiguousarray(restore())
        if self.change is not None:
            self.change(tensor, first, present, restored)
        _emit(file, restored, digest)


def _check_same(tensor: TensorRecord, info: TensorInfo) -> None:
    if (tensor.dtype, tensor.shape) != (info.dtype, info.shape):
        raise UndoError(f"the tensor {info.name!r} has another dtype or shape than the merge gave it")


def _emit(file: Writer, data: Array | bytes, digest: object) -> None:
    view = data if isinstance(data, bytes) else np.ascontiguousarray(data).data.cast("B")
    digest.update(view)  # type: ignore[attr-defined]
    file.write(view)


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


def digest_into(checkpoint: Checkpoint, info: TensorInfo, *digests: object) -> None:
    """Give the bytes of a tensor to digests."""
    for offset in range(0, info.nbytes, _CHUNK):
        data = checkpoint.read(info, offset, min(_CHUNK, info.nbytes - offset))
        for digest in digests:
            digest.update(data)  # type: ignore[attr-defined]


def _copy(checkpoint: Checkpoint, info: TensorInfo, file: Writer, *digests: object) -> None:
    """A tensor that the merge did not change."""
    digest_into(checkpoint, info, *(d for d in digests if d is not None))
    checkpoint.file_of(info).copy(info, file)


def _compare(digest: object, wanted: str, what: str) -> None:
    if digest.hexdigest() != wanted:  # type: ignore[attr-defined]
        raise DigestError(f"the tensor {what}", fix="give the base: --from-base")
