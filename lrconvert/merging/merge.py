"""Merge adapters into a copy of a base, shard by shard and in row blocks, correctly rounded.

Normative text: ``formats/merge-v1.md``. What no adapter touches is copied byte for byte: tensors, header, index, and
all other files. The output appears whole or not at all. Memory does not grow with the base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert import heads
from lrconvert.adapter import LoraAdapter
from lrconvert.container import (
    INDEX_NAME,
    Checkpoint,
    TensorInfo,
    combined_digest,
    tensor_hasher,
)
from lrconvert.durable import StagedDirectory, Writer, atomic_directory, check_output, require_space
from lrconvert.errors import FingerprintError, LimitError, MergeOverflowError, NoEffectError, OutputPathError
from lrconvert.exact import Tally, Workspace
from lrconvert.merging import record as records
from lrconvert.merging import residual
from lrconvert.merging.compute import Block, Computer
from lrconvert.merging.pipeline import Behind
from lrconvert.merging.plan import CONFIG_NAME, RECORDS, Output, Plan, base_texts, plan
from lrconvert.merging.record import RECORD_NAME
from lrconvert.merging.record_json import CODES_NAME, RESIDUAL, STORED, XOR, Code, Record, TensorRecord, encode
from lrconvert.merging.report import MergedTensor, MergeReport
from lrconvert.merging.updates import Adapter, Scaled
from lrconvert.quantized import DequantizedCheckpoint, open_base

Progress = Callable[[float, str], None]

_CHUNK = 1 << 23
_SPACE_MARGIN = 1.05
_RECORD_SHARE = 0.08  # of the touched bytes, as an estimate: 3.5 % in bf16, more where updates are large
_ALLOW = "pass --allow-no-op to write a copy of the base all the same"


def merge(
    base: Path,
    adapters: Sequence[Adapter | Scaled],
    out: Path,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    allow_no_op: bool = False,
    undo: bool = True,
    shard_bytes: int | None = None,
    dequantize: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write the folder `out`: `base` with all `adapters` added in one sum and rounded once, and the record that undoes
    it (with `undo`; otherwise digests only).

    `dequantize` takes a base that bitsandbytes has quantized as bf16. `shard_bytes` bounds the weight files of the
    output; without it they are cut as the base's. `progress(fraction, text)` is called as bytes are written. Raises
    E-BASE, E-ORIENT, E-FPR, E-PLACE, E-NO-EFFECT (nothing to merge, all updates zero, or no element moved), E-OVERFLOW,
    E-VALUE, E-BASE-QUANT, E-OUT-*, E-IO-*, and what `open_base` raises; nothing is left behind then.
    """
    inputs = [item if isinstance(item, Scaled) else Scaled(item) for item in adapters]
    check_output(out, overwrite, [base], directory=True)
    check_replaceable(out)
    with open_base(base, dequantize=dequantize) as checkpoint:
        planned = plan(inputs, checkpoint, shard_bytes)
        if not allow_no_op:
            _check_effect(inputs, planned)
        earlier = records.numbered(base)
        report = _report(inputs, planned)
        if dry_run:
            if planned.contents:
                _check_content(checkpoint.content_digest(), planned, earlier)
            return replace(report, dry_run=True, warnings=(*report.warnings, *notes(checkpoint)))
        needed = sum(planned.files.values()) + (report.touched_bytes * _RECORD_SHARE if undo else 0)
        require_space(out, int(needed * _SPACE_MARGIN))
        with atomic_directory(out, overwrite=overwrite) as folder, Workspace() as workspace:
            number = max(earlier, default=0) + 1
            with _Merger(planned, inputs, folder, workspace, number, undo, progress or _silent) as merger:
                merger.run()
            for file in checkpoint.files:
                file.check_unchanged()
            _check_content(merger.content, planned, earlier)
            report = replace(
                report,
                tensors=tuple(_row(o, merger.tallies[o.name]) for o in planned.touched),
                record=merger.place,
                record_bytes=merger.record_bytes,
                can_undo=undo,
                warnings=(*report.warnings, *notes(checkpoint)),
            )
            if not allow_no_op and not planned.placement.has_effect:
                _check_moved(report)
    return report


def notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the user should know of a base, with what was measured if all of it was read."""
    return (checkpoint.note,) if isinstance(checkpoint, DequantizedCheckpoint) else ()


def _silent(fraction: float, text: str) -> None:
    """The progress callback of a caller who wants none."""


def _report(inputs: Sequence[Scaled], planned: Plan) -> MergeReport:
    placement = planned.placement
    return MergeReport(
        tensors=tuple(_row(o, Tally(elements=int(np.prod(o.shape)))) for o in planned.touched),
        placed=tuple(sorted(placement.prefix + name for name in placement.replaced)),
        added=tuple(sorted([e.name for e in placement.added] + list(placement.copies))),
        dropped=tuple(sorted(placement.dropped)),
        config=placement.config,
        files=tuple(planned.files.items()),
        left_out=planned.left_out,
        warnings=tuple(w for item in inputs if isinstance(item.adapter, LoraAdapter) for w in item.adapter.warnings),
        touched_bytes=sum(o.nbytes for o in planned.touched),
    )


def _row(output: Output, tally: Tally) -> MergedTensor:
    updates = len(output.pieces) + (output.rows is not None)
    return MergedTensor(output.name, output.dtype, output.shape, updates, tally)


def check_replaceable(out: Path) -> None:
    """Only a model folder, or an empty one, is ever replaced."""
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG_NAME).exists() and not any(out.glob("*.safetensors")):
        raise OutputPathError("is not a model folder, so it is not replaced", fix="choose another output", path=out)


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_content(found: str, planned: Plan, earlier: dict[int, Path]) -> None:
    """Raise E-FPR if an adapter names the contents of its base and neither this base nor, if it is a merged model, what
    it was merged from has them. Updates that depend on the base are of this one alone."""
    if not planned.contents or found in planned.contents:
        return
    for place in () if any(source.needs_base for source in planned.sources) else earlier.values():
        with records.OpenRecord(place) as opened:
            if opened.record.content in planned.contents:
                return
    raise FingerprintError(
        "the base has other contents than the one that the adapter was made for",
        fix="use the same revision of the base",
        path=planned.checkpoint.root,
    )


def _check_effect(inputs: Sequence[Scaled], planned: Plan) -> None:
    """Raise E-NO-EFFECT, before anything is written, where a look at the adapters shows that nothing would change."""
    if planned.placement.has_effect:
        return
    if not planned.touched:
        raise NoEffectError("the adapter has no target and no other tensor for this base", fix=_ALLOW)
    if all(_is_zero(item) for item in inputs):
        raise NoEffectError("the update is zero everywhere", fix=f"was the adapter trained? Otherwise {_ALLOW}")


def _is_zero(item: Scaled) -> bool:
    """Whether a look at the adapter shows that it changes nothing beside whole tensors."""
    adapter = item.adapter
    if any(e.use != "replace" for e in adapter.extras):
        return False
    return item.scale == 0 or (isinstance(adapter, LoraAdapter) and all(map(heads.is_zero, adapter.targets)))


def _check_moved(report: MergeReport) -> None:
    tally = report.tally
    if tally.changed:
        return
    if not tally.unmoved:
        raise NoEffectError("the update is zero everywhere", fix=f"was the adapter trained? Otherwise {_ALLOW}")
    names = ", ".join(sorted({t.dtype for t in report.tensors}))
    raise NoEffectError(
        f"no element moved: all {tally.unmoved} nonzero updates are below the resolution of {names}",
        fix=f"merge into a base of a wider dtype, or {_ALLOW}",
    )


# --- writing --------------------------------------------------------------------------------------------------------


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


class _Merger:
    """Writes the files of a plan and the record of the merge into a staged folder; a context manager."""

    def __init__(
        self,
        planned: Plan,
        inputs: Sequence[Scaled],
        folder: StagedDirectory,
        workspace: Workspace,
        number: int,
        undo: bool,
        progress: Progress,
    ) -> None:
        self.plan, self.inputs, self.folder, self.undo, self.progress = planned, inputs, folder, undo, progress
        self.computer = Computer(planned, workspace)
        self.workspace, self.number = workspace, number
        self.behind, self.hashing = Behind(), Behind()
        self.total = max(1, sum(planned.files.values()))
        self.done = 0
        self.tallies: dict[str, Tally] = {}
        self.tensors: dict[str, TensorRecord] = {}
        self.added: dict[str, str] = {}
        self.stored: dict[str, str] = {}
        self.others: dict[str, str] = {}
        self.place, self.record_bytes, self.content = "", 0, ""
        self._codes: _Hashed | None = None

    def __enter__(self) -> _Merger:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.hashing.__exit__(kind, error, trace)
        finally:
            self.behind.__exit__(kind, error, trace)

    def run(self) -> None:
        """Write everything."""
        entries = self._adapters()
        if self.undo:
            with self.folder.create(f"{self.place}/{CODES_NAME}") as file:
                self._codes = _Hashed(file)
                self._weights()
                self._left_out()
                self.behind.flush()
            self._keep(CODES_NAME, self._codes.digest(), self._codes.file.position)
        else:
            self._weights()
            self._left_out()
            self.behind.flush()
        late = (CONFIG_NAME, INDEX_NAME)  # last, so that what is broken off is no model
        for name, path in self.plan.copies.items():
            if name not in late:
                self._other(name, path)
        self._record(entries)
        for name in late:
            if name in self.plan.copies:
                self._advance(self.folder.copy_file(self.plan.copies[name], name), name)
            elif name in self.plan.texts:
                self.folder.write_bytes(name, self.plan.texts[name])
                self._advance(len(self.plan.texts[name]), name)

    def _other(self, name: str, path: Path) -> None:
        """A file beside the weights, or of an earlier merge."""
        self._advance(self.folder.copy_file(path, name), name)
        if not name.startswith(f"{RECORDS}/"):
            self.others[name] = records.file_digest(path)

    # --- the record ---

    def _adapters(self) -> list[dict[str, Any]]:
        """Settle where the record lies, and write the adapters into it. Returns their entries."""
        entries, names = [], []
        for number, item in enumerate(self.inputs):
            name, chunks, entry = records.adapter_files(number, item.adapter)
            names.append((name, item))
            digest = hashlib.sha256()
            for chunk in chunks:
                digest.update(chunk)
            source = item.adapter.provenance.source
            came = {"name": item.name, "scale": item.scale.hex(), "source": source, "sha256": digest.hexdigest()}
            entries.append({**(entry if self.undo else {"kind": entry["kind"]}), **came})
        self.place = records.folder_name(
            self.number, [(e["sha256"], item.scale) for e, item in zip(entries, self.inputs, strict=True)]
        )
        if self.undo:
            for number, (name, item) in enumerate(names):
                self._write(name, records.adapter_files(number, item.adapter)[1])
        return entries

    def _write(self, name: str, chunks: Iterable[bytes]) -> None:
        """A file of the record."""
        with self.folder.create(f"{self.place}/{name}") as file:
            hashed = _Hashed(file)
            for chunk in chunks:
                hashed.write(chunk)
        self._keep(name, hashed.digest(), file.position)

    def _keep(self, name: str, digest: str, nbytes: int) -> None:
        self.stored[name] = digest
        self.record_bytes += nbytes

    def _record(self, entries: list[dict[str, Any]]) -> None:
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
            adapters=tuple(entries),
            tensors=tuple(tensors),
            added=self.added,
            files=tuple((f.path.name, f.size - len(f.header_bytes)) for f in checkpoint.files),
            texts=tuple(sorted(texts)),
            others=self.others,
            stored=dict(self.stored),
        )
        text = encode(record)
        self.folder.write_bytes(f"{self.place}/{RECORD_NAME}", text)
        self.record_bytes += len(text)

    # --- weights ---

    def _advance(self, nbytes: int, text: str) -> None:
        self.done += nbytes
        self.progress(min(1.0, self.done / self.total), text)

    def _weights(self) -> None:
        for shard in self.plan.shards:
            with self.folder.create(shard.name) as file:
                self.behind.submit(file.write, shard.header)
                self._advance(len(shard.header), shard.name)
                for output in shard.outputs:
                    self._tensor(output, file)
                self.behind.flush()

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
        tally = Tally()
        for block in self.computer.blocks(output):
            tally += block.tally
            if block.before is not None and digests.before is not None:
                digests.pending = self.hashing.submit(digests.before.update, np.ascontiguousarray(block.before))
            predicted = self._predict(block, output.dtype)
            self.behind.submit(self._finish, block, predicted, file, digests, codes)
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

    def _finish(self, block: Block, predicted: Any, file: Writer, digests: _Digests, codes: _Codes) -> None:
        after = np.ascontiguousarray(block.after)
        file.write(after.data.cast("B"))
        digests.after.update(after.data.cast("B"))
        if block.before is None:
            return
        before = np.ascontiguousarray(block.before)
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

    def __init__(self, file: Writer) -> None:
        self.file, self._hash = file, hashlib.sha256()

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
