"""Writing a merge: the weight files of a plan in row blocks, the record that undoes it, and a journal of what is done.

Where the files go is up to a `Sink`: a folder under construction, or, for a merge in place, mostly nowhere yet.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.core.errors import LimitError, LrcError, MergeOverflowError
from lrconvert.io.container import (
    INDEX_NAME,
    Checkpoint,
    TensorInfo,
    combined_digest,
    open_regular,
    pread,
    tensor_hasher,
)
from lrconvert.io.durable import CONTENT, Writer
from lrconvert.merge import journal as journals
from lrconvert.merge.arithmetic.stats import MergeStats
from lrconvert.merge.arithmetic.workspace import Workspace
from lrconvert.merge.background_writer import BackgroundWriter
from lrconvert.merge.compute import Block, Computer
from lrconvert.merge.journal import Done, Journal, Patch
from lrconvert.merge.plan.plan import CONFIG_NAME, RECORDS, Output, Plan, Shard, base_texts
from lrconvert.merge.plan.updates import Scaled
from lrconvert.merge.sinks import Sink
from lrconvert.merge.undo import record as records
from lrconvert.merge.undo import residual
from lrconvert.merge.undo.record import RECORD_NAME
from lrconvert.merge.undo.record_json import CODES_NAME, RESIDUAL, STORED, XOR, Code, Record, TensorRecord, encode

Progress = Callable[[float, str], None]

_CHUNK = 1 << 23
LATE = (CONFIG_NAME, INDEX_NAME)  # written last, so that what is broken off is no model


@dataclass
class _Digests:
    """The hashes of one tensor as it is read and written; one where both are the same."""

    output: Output
    pending: Future[Any] | None = None

    def __post_init__(self) -> None:
        output, base = self.output, self.output.base
        self.same = base is not None and output.is_copy and base.name == output.name
        self.after = tensor_hasher(output.name, output.dtype, output.shape)
        self.before = None if base is None or self.same else tensor_hasher(base.name, base.dtype, base.shape)

    def unchanged(self, data: bytearray) -> None:
        self.after.update(data)
        if self.before is not None:
            self.before.update(data)


@dataclass
class _Codes:
    """The undo codes of one tensor, in the order of its rows, from `offset` of undo.bin on."""

    offset: int
    cols: int = 0
    codes: list[Code] = field(default_factory=list)


class Merger:
    """Writes the files of a plan, and the record of the merge. A context manager.

    `entries` are those of the adapters in the record, `place` the folder where it goes; after `run`, `tallies` of the
    touched tensors, `record_bytes`, and `content`, the digest of all tensors of the base.
    """

    def __init__(
        self,
        planned: Plan,
        inputs: Sequence[Scaled],
        workspace: Workspace,
        number: int,
        undo: bool,
        progress: Progress,
    ) -> None:
        self.plan, self.inputs, self.undo, self.progress = planned, inputs, undo, progress
        self.workspace, self.number = workspace, number
        self.computer = Computer(planned, workspace)
        self.behind, self.hashing = BackgroundWriter(), BackgroundWriter()
        self.total = max(1, sum(planned.files.values()))
        self.done = 0
        self.tallies: dict[str, MergeStats] = {}
        self.tensors: dict[str, TensorRecord] = {}
        self.added: dict[str, str] = {}
        self.stored: dict[str, str] = {}
        self.others: dict[str, str] = {}
        self.record_bytes, self.content = 0, ""
        self._codes: _Hashed | None = None
        self._sink: Sink
        self.entries = [self._entry(n, item) for n, item in enumerate(inputs)]
        self.place = records.folder_name(
            number, [(e["sha256"], item.scale) for e, item in zip(self.entries, inputs, strict=True)]
        )

    def __enter__(self) -> Merger:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.hashing.__exit__(kind, error, trace)
        finally:
            self.behind.__exit__(kind, error, trace)

    def plan_text(self, in_place: bool) -> bytes:
        """What stands in plan.json: all that decides which bytes are written, but for the values of the base, whose
        digests stand in the lines of finished files."""
        value = {
            "in_place": in_place,
            "undo": self.undo,
            "place": self.place,
            "adapters": self.entries,
            "base": [[f.path.name, _sha256(f.header_bytes), f.size] for f in self.plan.checkpoint.files],
            "shards": [[s.name, _sha256(s.header), s.size] for s in self.plan.shards],
            "texts": {name: _sha256(text) for name, text in self.plan.texts.items()},
        }
        return journals.plan_text("merge", value)

    def run(self, sink: Sink) -> Journal:
        """Write everything that is not there from an earlier run of the same merge."""
        self._sink = sink
        work = sink.work
        journal = Journal(work.files, self.plan_text(not sink.is_copy), len(self.inputs))
        codes = f"{self.place}/{CODES_NAME}"
        if journal.read():
            names = self._take_over(journal, work.content.root / codes)
            work.clear({journals.PLAN_NAME, journals.DONE_NAME, f"{CONTENT}/{codes}", *names})
        else:
            work.clear()
            journal.begin()
        if self.undo:
            start = journal.finished[-1].codes if journal.finished else 0
            path = work.content.root / codes
            hashed = _prefix_hash(path, start) if start else hashlib.sha256()
            there = path.exists()
            with work.content.reopen(codes, start) if there else work.content.create(codes) as file:
                self._codes = _Hashed(file, hashed)
                self._weights(journal, file.sync)
                self._left_out()
                self.behind.flush()
            self._keep(CODES_NAME, self._codes.digest(), self._codes.file.position)
            for number, item in enumerate(self.inputs):
                name, chunks, _ = records.adapter_files(number, item.adapter)
                self._write(name, chunks)
        else:
            self._weights(journal, lambda: None)
            self._left_out()
            self.behind.flush()
        for name, path in self.plan.copies.items():
            if name not in LATE:
                self._other(name, path)
        self._record()
        for name in LATE:
            if name in self.plan.copies and sink.is_copy:
                self._advance(work.content.copy_file(self.plan.copies[name], name), name)
            elif name in self.plan.texts:
                work.content.write_bytes(name, self.plan.texts[name])
                self._advance(len(self.plan.texts[name]), name)
        return journal

    def _other(self, name: str, path: Path) -> None:
        """A file beside the weights, or of an earlier merge."""
        if self._sink.is_copy:
            self._advance(self._sink.work.content.copy_file(path, name), name)
        if not name.startswith(f"{RECORDS}/"):
            self.others[name] = records.file_digest(path)

    # --- what an earlier run has done ---

    def _take_over(self, journal: Journal, codes: Path) -> list[str]:
        """Take over the finished files that are as they were, and the base that they were made from too: all is hashed
        again. Returns their names in the folder of the work."""
        hashed, at, good, names = hashlib.sha256(), 0, 0, []
        for done, shard in zip(journal.finished, self.plan.shards, strict=False):
            kept = self._sink.kept(done, shard) if done.shard == shard.name and self._is_of_base(done) else None
            if kept is None or (self.undo and not _goes_on(hashed, codes, at, done)):
                break
            at, good = done.codes, good + 1
            names += kept
            self.tensors |= {t.name: t for t in done.tensors}
            self.added |= done.added
            self.tallies |= done.tallies
            self._sink.note(done, shard)
            self._advance(shard.size, shard.name)
        journal.keep(good)
        return names

    def _is_of_base(self, done: Done) -> bool:
        """Whether the tensors that a file was made from are those of the base."""
        for t in done.tensors:
            info = self.plan.checkpoint.tensors.get(t.name)
            if info is None or (info.dtype, info.shape) != (t.dtype, t.shape):
                return False
            digest = tensor_hasher(info.name, info.dtype, info.shape)
            for data in _chunks(self.plan.checkpoint, info):
                digest.update(data)
            if digest.hexdigest() != t.before:
                return False
        return True

    # --- the record ---

    def _entry(self, number: int, item: Scaled) -> dict[str, Any]:
        """The entry of an adapter in the record."""
        _, chunks, entry = records.adapter_files(number, item.adapter)
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        source = item.adapter.provenance.source
        came = {"name": item.name, "scale": item.scale.hex(), "source": source, "sha256": digest.hexdigest()}
        return {**(entry if self.undo else {"kind": entry["kind"]}), **came}

    def _write(self, name: str, chunks: Iterable[bytes]) -> None:
        """A file of the record."""
        with self._sink.work.content.create(f"{self.place}/{name}") as file:
            hashed = _Hashed(file)
            for chunk in chunks:
                hashed.write(chunk)
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
        tensors = [self.tensors[name] for name in checkpoint.tensors]
        self.content = combined_digest((t.name, t.before) for t in tensors)
        record = Record(
            number=self.number,
            can_undo=self.undo,
            content=self.content,
            adapters=tuple(self.entries),
            tensors=tuple(tensors),
            added=self.added,
            files=tuple((f.path.name, f.size - len(f.header_bytes)) for f in checkpoint.files),
            texts=tuple(sorted(texts)),
            others=self.others,
            stored=dict(self.stored),
        )
        text = encode(record)
        self._sink.work.content.write_bytes(f"{self.place}/{RECORD_NAME}", text)
        self.record_bytes += len(text)

    # --- weights ---

    def _advance(self, nbytes: int, text: str) -> None:
        self.done += nbytes
        self.progress(min(1.0, self.done / self.total), text)

    def _weights(self, journal: Journal, sync: Callable[[], None]) -> None:
        for shard in self.plan.shards[len(journal.finished) :]:
            with self._sink.open(shard) as file:
                self.behind.submit(file.write, shard.header)
                self._advance(len(shard.header), shard.name)
                for output in shard.outputs:
                    self._tensor(output, file)
                self.behind.flush()
            done = self._done(shard, self._sink.finish(shard))
            sync()
            journal.add(done)
            self._sink.note(done, shard)

    def _done(self, shard: Shard, patch: Patch | None) -> Done:
        """What the journal says of a file that was just written."""
        bases = [o.base.name for o in shard.outputs if o.base is not None]
        return Done(
            shard=shard.name,
            tensors=tuple(self.tensors[name] for name in bases),
            added={o.name: self.added[o.name] for o in shard.outputs if o.base is None},
            tallies={o.name: self.tallies[o.name] for o in shard.outputs if o.name in self.tallies},
            codes=0 if self._codes is None else self._codes.file.position,
            undo=hashlib.sha256().hexdigest() if self._codes is None else self._codes.digest(),
            patch=patch,
        )

    def _tensor(self, output: Output, file: Writer) -> None:
        digests, codes = _Digests(output), _Codes(0)
        if output.is_touched:
            self._update(output, file, digests, codes)
        else:
            job = self._copy if output.is_copy else self._bring
            self.behind.submit(job, output, file, digests, codes)
            self._advance(output.nbytes, output.name)
        self.behind.submit(self._note, output, digests, codes)

    def _note(self, output: Output, digests: _Digests, codes: _Codes) -> None:
        """Write down what became of a tensor."""
        after = digests.after.hexdigest()
        if output.base is None:
            self.added[output.name] = after
            return
        base = output.base
        if digests.pending is not None:  # the last of its hashing, which is done in order
            digests.pending.result()
        before = after if digests.before is None else digests.before.hexdigest()
        pieces = output.pieces if any(code.mode == RESIDUAL for code in codes.codes) else ()
        place = (codes.cols, codes.offset, tuple(codes.codes)) if codes.codes else (0, 0, ())
        self.tensors[base.name] = TensorRecord(
            base.name, base.dtype, base.shape, before, output.name, after, *place, pieces
        )

    def _copy(self, output: Output, file: Writer, digests: _Digests, codes: _Codes) -> None:
        """A tensor as it is."""
        info = output.source
        assert info is not None
        for data in _chunks(self.plan.checkpoint, info):
            digests.unchanged(data)
        self.plan.checkpoint.file_of(info).copy(info, file)

    def _bring(self, output: Output, file: Writer, digests: _Digests, codes: _Codes) -> None:
        """A tensor as the adapter brings it."""
        assert output.data is not None
        file.write(output.data)
        digests.after.update(output.data)
        if output.base is not None:
            self._store(output.base, digests, codes)

    def _store(self, info: TensorInfo, digests: _Digests, codes: _Codes) -> None:
        """Hash a tensor of the base that the output does not have, and keep its bytes."""
        first = 0
        for data in _chunks(self.plan.checkpoint, info):
            if digests.before is not None:
                digests.before.update(data)
            self._code(codes, first, len(data), STORED, residual.encode_bytes(data))
            first += len(data)

    def _left_out(self) -> None:
        """Tensors of the base that the output leaves out."""
        known = {output.base.name for output in self.plan.outputs if output.base is not None}
        for name, info in self.plan.checkpoint.tensors.items():
            if name not in known:
                self.behind.submit(self._drop, info)

    def _drop(self, info: TensorInfo) -> None:
        digests, codes = _Digests(Output(info.name, info.dtype, info.shape, info, data=b"")), _Codes(0)
        assert digests.before is not None
        self._store(info, digests, codes)
        self.tensors[info.name] = TensorRecord(
            info.name,
            info.dtype,
            info.shape,
            digests.before.hexdigest(),
            output="",
            after="",
            offset=codes.offset,
            codes=tuple(codes.codes),
        )

    def _update(self, output: Output, file: Writer, digests: _Digests, codes: _Codes) -> None:
        """A tensor with its updates."""
        tally = MergeStats()
        for block in self.computer.blocks(output):
            tally += block.tally
            if block.before is not None and digests.before is not None:
                digests.pending = self.hashing.submit(digests.before.update, np.ascontiguousarray(block.before))
            predicted = self._predict(block, output.dtype)
            self.behind.submit(self._finish, output, block, predicted, file, digests, codes)
            self._advance(block.after.nbytes, output.name)
        self.tallies[output.name] = tally

    def _predict(self, block: Block, dtype: str) -> Any:
        """What an unmerge makes of the block before it looks at the undo code; None if it has no prediction."""
        if not self.undo or block.update is None or block.update.is_zero or block.before is None:
            return None
        try:
            return block.update.negated().add(block.after, dtype, block.row, self.workspace)[0]
        except (MergeOverflowError, LimitError):  # at the very end of the range
            return None

    def _finish(
        self, output: Output, block: Block, predicted: Any, file: Writer, digests: _Digests, codes: _Codes
    ) -> None:
        after = np.ascontiguousarray(block.after)
        file.write(after.data.cast("B"))
        digests.after.update(after.data.cast("B"))
        if block.before is None:
            return
        before = np.ascontiguousarray(block.before)
        self._sink.change(output, block.first, before, after)
        if not self.undo or np.array_equal(_bits(before), _bits(after)):
            return
        codes.cols = before.shape[1]
        if predicted is None:
            data, mode = residual.encode_xor(before.reshape(-1), after.reshape(-1)), XOR
        else:
            assert block.update is not None
            window = block.update.window(block.row, before.shape[0])
            wanted, guess = (before[window], predicted[window]) if window else (before[:0], predicted[:0])
            data, mode = residual.encode_residual(wanted.reshape(-1), guess.reshape(-1)), RESIDUAL
        self._code(codes, block.first, before.shape[0], mode, data)

    def _code(self, codes: _Codes, first: int, count: int, mode: int, data: bytes) -> None:
        if self._codes is None:
            return
        if not codes.codes:
            codes.offset = self._codes.file.position
        codes.codes.append(Code(first, count, mode, len(data)))
        self._codes.write(data)


class _Hashed:
    """A file with the digest of what was written."""

    def __init__(self, file: Writer, hashed: Any = None) -> None:
        self.file, self._hash = file, hashlib.sha256() if hashed is None else hashed

    def write(self, data: bytes) -> None:
        self._hash.update(data)
        self.file.write(data)

    def digest(self) -> str:
        return self._hash.hexdigest()


def _chunks(checkpoint: Checkpoint, info: TensorInfo) -> Iterable[bytearray]:
    for offset in range(0, info.nbytes, _CHUNK):
        yield checkpoint.read(info, offset, min(_CHUNK, info.nbytes - offset))


def _bits(stored: Any) -> Any:
    return stored.view(f"u{stored.dtype.itemsize}")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _prefix_hash(path: Path, nbytes: int) -> Any:
    """A sha256 that has seen the first bytes of a file."""
    digest = hashlib.sha256()
    _update_hash(digest, path, 0, nbytes)
    return digest


def _goes_on(digest: Any, codes: Path, start: int, done: Done) -> bool:
    """Whether undo.bin has the codes of a finished file from `start` on; `digest` sees them."""
    try:
        _update_hash(digest, codes, start, done.codes)
    except LrcError:
        return False
    return bool(digest.hexdigest() == done.undo)


def _update_hash(digest: Any, path: Path, start: int, stop: int) -> None:
    if stop <= start:
        return
    descriptor, _ = open_regular(path)
    try:
        for offset in range(start, stop, _CHUNK):
            digest.update(pread(descriptor, min(_CHUNK, stop - offset), offset, path))
    finally:
        os.close(descriptor)
