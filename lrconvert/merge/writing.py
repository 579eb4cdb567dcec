"""Writing a merge: the weight files of a plan in row blocks, the record that undoes it, and a journal of what is done.

Where the files go is up to a `Sink`: a folder under construction, or, for a merge in place, mostly nowhere yet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.core.errors import LrcError
from lrconvert.io import fields
from lrconvert.io.container import TensorInfo, combined_digest, tensor_hasher
from lrconvert.io.durable import CONTENT, LINES_NAME, PLAN_NAME, Writer
from lrconvert.merge import journal as journals
from lrconvert.merge.arithmetic.rounding import bits
from lrconvert.merge.arithmetic.stats import MergeStats
from lrconvert.merge.arithmetic.workspace import Workspace
from lrconvert.merge.background_writer import BackgroundWriter
from lrconvert.merge.compute import Block, Computer
from lrconvert.merge.hashing import chunks, copy_hashed, emit, file_digest, hash_file, stored_digest
from lrconvert.merge.journal import Done, Journal, Patch
from lrconvert.merge.plan.other_files import RECORDS
from lrconvert.merge.plan.plan import Output, Plan, Shard, base_texts
from lrconvert.merge.plan.updates import Scaled
from lrconvert.merge.signed_json import portable
from lrconvert.merge.sinks import Sink
from lrconvert.merge.undo import adapters, record, residual
from lrconvert.merge.undo.open_record import RECORD_NAME, folder_name
from lrconvert.merge.undo.record import (
    CODE_ELEMENTS,
    CODES_NAME,
    PREDICTED,
    STORED,
    TEXTS,
    XOR,
    Code,
    Record,
    TensorRecord,
    WeightFile,
)

Progress = Callable[[float, str], None]


class _Tensor:
    """A tensor while it is written: its digests in the base and in the output (one hash where both are the same), and
    its undo codes, in the order of its rows, from `offset` of undo.bin on."""

    def __init__(self, output: Output) -> None:
        self.output, base = output, output.base
        is_same = base is not None and output.is_copy and base.name == output.name
        self.after = tensor_hasher(output.name, output.dtype, output.shape)
        self.before = None if base is None or is_same else tensor_hasher(base.name, base.dtype, base.shape)
        self.pending: Future[Any] | None = None  # the last job that hashes `before`
        self.offset, self.cols = 0, 0
        self.codes: list[Code] = []

    def entry(self, after: str) -> TensorRecord:
        """Return the entry in the record; `after` is "" if the output leaves the tensor out."""
        base = self.output.base
        assert base is not None
        return TensorRecord(
            name=base.name,
            dtype=base.dtype,
            shape=base.shape,
            before=after if self.before is None else self.before.hexdigest(),
            output=self.output.name if after else "",
            after=after,
            cols=self.cols if self.codes else None,
            offset=self.offset if self.codes else None,
            codes=tuple(self.codes),
            pieces=self.output.pieces if any(code.mode in PREDICTED for code in self.codes) else (),
        )


class _Hashed:
    """A file with the digest of what was written."""

    def __init__(self, file: Writer, digest: Any) -> None:
        self.file, self._digest = file, digest

    def write(self, data: bytes) -> None:
        emit(self.file, data, self._digest)

    def digest(self) -> str:
        return self._digest.hexdigest()  # type: ignore[no-any-return]


class Merger:
    """Writes the files of a plan, and the record of the merge. A context manager.

    `entries` are those of the adapters in the record, `place` the folder where it goes; after `run`, `stats` of the
    touched tensors, `record_bytes`, and `content`, the digest of all tensors of the base.
    """

    def __init__(
        self, planned: Plan, inputs: Sequence[Scaled], workspace: Workspace, number: int, undo: bool, progress: Progress
    ) -> None:
        self.plan, self.inputs, self.undo, self.progress = planned, inputs, undo, progress
        self.number = number
        self.computer = Computer(planned, workspace, predict=undo)
        self.writer, self.hasher = BackgroundWriter(), BackgroundWriter()
        self.total, self.done = max(1, sum(planned.files.values())), 0
        self.stats: dict[str, MergeStats] = {}
        self.tensors: dict[str, TensorRecord] = {}
        self.added: dict[str, str] = {}
        self.stored: dict[str, str] = {}
        self.others: dict[str, str] = {}
        self.record_bytes, self.content = 0, ""
        self._codes: _Hashed | None = None
        self._sink: Sink
        self.entries = tuple(adapters.entry_of(item, undo) for item in inputs)
        self.place = folder_name(number, [(entry.sha256, entry.scale) for entry in self.entries])

    def __enter__(self) -> Merger:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.hasher.__exit__(kind, error, trace)
        finally:
            self.writer.__exit__(kind, error, trace)

    def plan_text(self, in_place: bool) -> bytes:
        """Return plan.json: all that decides which bytes are written, but for the values of the base, whose digests
        stand in the lines of finished files."""
        value = {
            "in_place": in_place,
            "undo": self.undo,
            "place": self.place,
            "adapters": [fields.as_json(entry) for entry in self.entries],
            "base": [[f.path.name, _sha256(f.header_bytes), f.size] for f in self.plan.checkpoint.files],
            "shards": [[s.name, _sha256(s.header), s.size] for s in self.plan.shards],
            "texts": {name: _sha256(text) for name, text in self.plan.texts.items()},
        }
        return journals.plan_text("merge", value)

    def run(self, sink: Sink) -> None:
        """Write everything that is not there from an earlier run of the same merge. Small files of the model come last,
        so that what is broken off is no model."""
        self._sink, work = sink, sink.work
        journal = Journal(work.files, self.plan_text(not sink.is_copy), len(self.inputs))
        codes = f"{self.place}/{CODES_NAME}"
        if journal.read():
            names = self._take_over(journal, work.content.root / codes)
            work.clear({PLAN_NAME, LINES_NAME, f"{CONTENT}/{codes}", *names})
        else:
            work.clear()
            journal.begin()
        if self.undo:
            self._with_codes(journal, codes)
        else:
            self._weights(journal, lambda: None)
        for name, path in self.plan.copies.items():
            if name not in TEXTS:
                if sink.is_copy:
                    self._advance(work.content.copy_file(path, name), name)
                if not name.startswith(f"{RECORDS}/"):
                    self.others[portable(name)] = file_digest(path)
        self._record()
        for name in TEXTS:
            if name in self.plan.copies and sink.is_copy:
                self._advance(work.content.copy_file(self.plan.copies[name], name), name)
            elif name in self.plan.texts:
                work.content.write_bytes(name, self.plan.texts[name])
                self._advance(len(self.plan.texts[name]), name)

    def _with_codes(self, journal: Journal, codes: str) -> None:
        """Write weights, undo codes (on from those of an earlier run) and adapters."""
        content, digest = self._sink.work.content, hashlib.sha256()
        start = journal.finished[-1].codes if journal.finished else 0
        path = content.root / codes
        hash_file(digest, path, 0, start)
        with content.reopen(codes, start) if path.exists() else content.create(codes) as file:
            self._codes = _Hashed(file, digest)
            self._weights(journal, file.sync)
        self._keep(CODES_NAME, self._codes.digest(), file.position)
        for number, (item, entry) in enumerate(zip(self.inputs, self.entries, strict=True)):
            self._write(entry.file_name(number), adapters.encode(item.adapter))

    # --- what an earlier run has done ---

    def _take_over(self, journal: Journal, codes: Path) -> list[str]:
        """Take over the finished files that are as they were, and the base that they were made from too: all is hashed
        again. Returns their names in the folder of the work."""
        digest, end, count, names = hashlib.sha256(), 0, 0, []
        for done, shard in zip(journal.finished, self.plan.shards, strict=False):
            kept = self._sink.kept(done, shard) if _is_of_shard(done, shard) and self._is_of_base(done) else None
            if kept is None or (self.undo and not _has_codes(digest, codes, end, done)):
                break
            end, count = done.codes, count + 1
            names += kept
            self.tensors |= {t.name: t for t in done.tensors}
            self.added |= done.added
            self.stats |= done.stats
            self._sink.note(done, shard)
            self._advance(shard.size, shard.name)
        journal.keep(count)
        return names

    def _is_of_base(self, done: Done) -> bool:
        """Return whether the tensors that a file was made from are those of the base."""
        for tensor in done.tensors:
            info = self.plan.checkpoint.tensors.get(tensor.name)
            if info is None or (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
                return False
            if stored_digest(self.plan.checkpoint, info) != tensor.before:
                return False
        return True

    # --- the record ---

    def _write(self, name: str, parts: Iterable[bytes]) -> None:
        """Write a file of the record."""
        with self._sink.work.content.create(f"{self.place}/{name}") as file:
            hashed = _Hashed(file, hashlib.sha256())
            for part in parts:
                hashed.write(part)
        self._keep(name, hashed.digest(), file.position)

    def _keep(self, name: str, digest: str, nbytes: int) -> None:
        self.stored[name] = digest
        self.record_bytes += nbytes

    def _record(self) -> None:
        checkpoint = self.plan.checkpoint
        for n, file in enumerate(checkpoint.files):
            self._write(f"base/{n}.header", [file.header_bytes])
        texts = base_texts(checkpoint)
        for name, text in texts.items():
            self._write(f"base/{name}", [text])
        tensors = tuple(self.tensors[name] for name in checkpoint.tensors)
        self.content = combined_digest((t.name, t.before) for t in tensors)
        entry = Record(
            number=self.number,
            can_undo=self.undo,
            content=self.content,
            adapters=self.entries,
            tensors=tensors,
            added=self.added,
            files=tuple(WeightFile(f.path.name, f.size - len(f.header_bytes)) for f in checkpoint.files),
            texts=tuple(sorted(texts)),
            others=self.others,
            stored=self.stored,
        )
        data = record.encode(entry)
        self._sink.work.content.write_bytes(f"{self.place}/{RECORD_NAME}", data)
        self.record_bytes += len(data)

    # --- weights ---

    def _advance(self, nbytes: int, text: str) -> None:
        self.done += nbytes
        self.progress(min(1.0, self.done / self.total), text)

    def _weights(self, journal: Journal, sync: Callable[[], None]) -> None:
        """Write all weight files that are not finished, and the codes of tensors that the output leaves out."""
        for shard in self.plan.shards[len(journal.finished) :]:
            with self._sink.open(shard) as file:
                self.writer.submit(file.write, shard.header)
                self._advance(len(shard.header), shard.name)
                for output in shard.outputs:
                    self._tensor(output, file)
                self.writer.flush()
            done = self._done(shard, self._sink.finish(shard))
            sync()
            journal.add(done)
            self._sink.note(done, shard)
        kept = {output.base.name for output in self.plan.outputs if output.base is not None}
        for name, info in self.plan.checkpoint.tensors.items():
            if name not in kept:
                self.writer.submit(self._drop, info)
        self.writer.flush()

    def _done(self, shard: Shard, patch: Patch | None) -> Done:
        """Return the journal's line of a file that was just written."""
        names = [o.name for o in shard.outputs]
        return Done(
            shard=shard.name,
            tensors=tuple(self.tensors[o.base.name] for o in shard.outputs if o.base is not None),
            added={o.name: self.added[o.name] for o in shard.outputs if o.base is None},
            stats={name: self.stats[name] for name in names if name in self.stats},
            codes=0 if self._codes is None else self._codes.file.position,
            undo=_sha256(b"") if self._codes is None else self._codes.digest(),
            patch=patch,
        )

    def _tensor(self, output: Output, file: Writer) -> None:
        tensor = _Tensor(output)
        if output.is_touched:
            self._update(tensor, file)
        else:
            self.writer.submit(self._copy if output.is_copy else self._bring, tensor, file)
            self._advance(output.nbytes, output.name)
        self.writer.submit(self._note, tensor)

    def _note(self, tensor: _Tensor) -> None:
        """Write down what became of a tensor."""
        after = tensor.after.hexdigest()
        if tensor.pending is not None:
            tensor.pending.result()
        if tensor.output.base is None:
            self.added[tensor.output.name] = after
        else:
            self.tensors[tensor.output.base.name] = tensor.entry(after)

    def _copy(self, tensor: _Tensor, file: Writer) -> None:
        """Write a tensor as it is."""
        info = tensor.output.source
        assert info is not None
        digests = [tensor.after] if tensor.before is None else [tensor.after, tensor.before]
        copy_hashed(self.plan.checkpoint, info, file, digests)

    def _bring(self, tensor: _Tensor, file: Writer) -> None:
        """Write a tensor as the adapter brings it."""
        assert tensor.output.data is not None
        emit(file, tensor.output.data, tensor.after)
        if tensor.output.base is not None:
            self._store(tensor, tensor.output.base)

    def _store(self, tensor: _Tensor, info: TensorInfo) -> None:
        """Hash a tensor of the base that the output does not have, and keep its bytes."""
        first = 0
        for data in chunks(self.plan.checkpoint, info, CODE_ELEMENTS):
            if tensor.before is not None:
                tensor.before.update(data)
            self._code(tensor, first, len(data), STORED, residual.encode_bytes(data))
            first += len(data)

    def _drop(self, info: TensorInfo) -> None:
        """Keep a tensor of the base that the output leaves out."""
        tensor = _Tensor(Output(info.name, info.dtype, info.shape, info, data=b""))
        self._store(tensor, info)
        self.tensors[info.name] = tensor.entry("")

    def _update(self, tensor: _Tensor, file: Writer) -> None:
        """Write a tensor with its updates."""
        output, stats = tensor.output, MergeStats()
        for block in self.computer.blocks(output):
            stats += block.stats
            if block.before is not None and tensor.before is not None:
                tensor.pending = self.hasher.submit(tensor.before.update, np.ascontiguousarray(block.before))
            self.writer.submit(self._block, tensor, block, file)
            self._advance(block.after.nbytes, output.name)
        self.stats[output.name] = stats

    def _block(self, tensor: _Tensor, block: Block, file: Writer) -> None:
        """Write rows of a tensor, and the code that undoes them."""
        after = np.ascontiguousarray(block.after)
        emit(file, after, tensor.after)
        if block.before is None:
            return
        before = np.ascontiguousarray(block.before)
        self._sink.change(tensor.output, block.first, before, after)
        if not self.undo or all(map(np.array_equal, bits(before), bits(after))):  # stops at the first row that differs
            return
        tensor.cols, predicted = before.shape[1], block.predicted
        if predicted is None:
            data, mode = residual.encode_xor(before.reshape(-1), after.reshape(-1)), XOR
        else:
            assert block.update is not None
            window = block.update.window(block.row, before.shape[0])
            base, guess, merged = (side[window] if window else side[:0] for side in (before, predicted, after))
            loops = self.computer.workspace.loops
            data, mode = residual.encode(base.reshape(-1), guess.reshape(-1), merged.reshape(-1), loops)
        self._code(tensor, block.first, before.shape[0], mode, data)

    def _code(self, tensor: _Tensor, first: int, count: int, mode: int, data: bytes) -> None:
        if self._codes is None:
            return
        if not tensor.codes:
            tensor.offset = self._codes.file.position
        tensor.codes.append(Code(first, count, mode, len(data)))
        self._codes.write(data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_of_shard(done: Done, shard: Shard) -> bool:
    """Return whether a line of the journal speaks of the file's tensors, all of them and no others."""
    made = [(o.base.name, o.name) for o in shard.outputs if o.base is not None]
    return (
        done.shard == shard.name
        and [(t.name, t.output) for t in done.tensors] == made
        and set(done.added) == {o.name for o in shard.outputs if o.base is None}
        and {o.name for o in shard.outputs if o.is_touched} <= set(done.stats) <= {o.name for o in shard.outputs}
    )


def _has_codes(digest: Any, codes: Path, start: int, done: Done) -> bool:
    """Return whether undo.bin has the codes of a finished file from `start` on, and hash them."""
    try:
        hash_file(digest, codes, start, done.codes)
    except LrcError:
        return False
    return bool(digest.hexdigest() == done.undo)
