"""Merge adapters into a copy of a base, shard by shard and in row blocks, correctly rounded.

Normative text: ``formats/merge-v1.md``. What no adapter touches is copied byte for byte: tensors, header, index, and
all other files. The output appears whole or not at all. Memory does not grow with the base.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lrconvert import exact, heads, targets
from lrconvert.adapter import CompactAdapter, LoraAdapter, LoraTarget, Target
from lrconvert.container import (
    INDEX_NAME,
    Checkpoint,
    ContainerFile,
    TensorInfo,
    contained,
    encode_header,
    open_checkpoint,
)
from lrconvert.dtypes import FLOATS, STORAGE, Array
from lrconvert.durable import StagedDirectory, Writer, atomic_directory, check_output, require_space
from lrconvert.errors import (
    BaseError,
    FingerprintError,
    LimitError,
    LrcError,
    NoEffectError,
    OutputPathError,
    PlacementError,
    QuantizedBaseError,
)
from lrconvert.exact import Tally, Term, Update, Workspace
from lrconvert.heads import Placement
from lrconvert.limits import MAX_RATIONAL
from lrconvert.methods import base as methods
from lrconvert.methods.base import Method

Adapter = LoraAdapter | CompactAdapter
Progress = Callable[[float, str], None]

CONFIG_NAME = "config.json"
# Weights in other formats would be those of the base, so they are left out; so are indexes of them.
_OTHER_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml"),
    *(".tflite", ".ot", ".npz", ".pkl", ".mlmodel", ".bin.index.json", ".h5.index.json", ".msgpack.index.json"),
    ".safetensors.index.json",
)
_SPACE_MARGIN = 1.05
_ALLOW = "pass --allow-no-op to write a copy of the base all the same"


# --- what a merge did -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergedTensor:
    """One tensor that updates were added to; after a dry run the tally has only its elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    updates: int
    tally: Tally


@dataclass(frozen=True)
class MergeReport:
    """What was merged, or would be. `files` are (name, bytes) of the output; `left_out` files of the base that are not
    in it; `placed`, `added`, `dropped` tensors that are not the base's any more; `config` the changed fields."""

    tensors: tuple[MergedTensor, ...]
    placed: tuple[str, ...]
    added: tuple[str, ...]
    dropped: tuple[str, ...]
    config: Mapping[str, Any]
    files: tuple[tuple[str, int], ...]
    left_out: tuple[str, ...]
    dry_run: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def tally(self) -> Tally:
        """Over all tensors: elements, how many changed, rounding errors."""
        return sum((t.tally for t in self.tensors), Tally())

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.files)


# --- the plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """An update of rows `start` to `stop` of a stored parameter seen as a matrix; `term` gives its factors."""

    start: int
    stop: int
    cols: int
    term: Callable[[], Term]


@dataclass(frozen=True)
class _Output:
    """One tensor of the output: bytes of `source`, or `data`, with the updates of `pieces` added."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo | None = None
    data: bytes | None = None
    pieces: tuple[_Piece, ...] = ()

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * STORAGE[self.dtype].itemsize

    @property
    def is_copy(self) -> bool:
        return self.data is None and not self.pieces


@dataclass(frozen=True)
class _Shard:
    """One weight file of the output."""

    file: ContainerFile
    header: bytes
    outputs: tuple[_Output, ...]

    @property
    def name(self) -> str:
        return self.file.path.name

    @property
    def size(self) -> int:
        return len(self.header) + sum(o.nbytes for o in self.outputs)

    @property
    def is_copy(self) -> bool:
        return self.header == self.file.header_bytes and all(o.is_copy for o in self.outputs)


@dataclass(frozen=True)
class _Plan:
    checkpoint: Checkpoint
    placement: Placement
    shards: tuple[_Shard, ...]
    texts: Mapping[str, bytes]  # config.json and index where they change
    copies: Mapping[str, Path]  # other files of the base
    left_out: tuple[str, ...]
    touched: tuple[_Output, ...]

    @property
    def files(self) -> dict[str, int]:
        """Name and size of every file of the output."""
        sizes = {name: path.stat().st_size for name, path in self.copies.items()}
        sizes.update({name: len(text) for name, text in self.texts.items()})
        sizes.update({shard.name: shard.size for shard in self.shards})
        return dict(sorted(sizes.items()))


def merge(
    base: Path,
    adapters: Sequence[Adapter],
    out: Path,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    allow_no_op: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write the folder `out`: `base` with all `adapters` added in one sum and rounded once.

    `progress(fraction, text)` is called as bytes are written. Raises E-BASE, E-ORIENT, E-FPR, E-PLACE, E-NO-EFFECT
    (nothing to merge, all updates zero, or no element moved), E-OVERFLOW, E-VALUE, E-BASE-QUANT, E-OUT-*, E-IO-*, and
    what `open_checkpoint` raises; nothing is left behind then.
    """
    check_output(out, overwrite, [base], directory=True)
    _check_replaceable(out)
    with open_checkpoint(base) as checkpoint:
        plan = _plan(adapters, checkpoint)
        if not allow_no_op:
            _check_effect(adapters, plan)
        files = plan.files
        report = MergeReport(
            tensors=tuple(_row(o, Tally(elements=int(np.prod(o.shape)))) for o in plan.touched),
            placed=tuple(sorted(plan.placement.prefix + name for name in plan.placement.replaced)),
            added=tuple(sorted([e.name for e in plan.placement.added] + list(plan.placement.copies))),
            dropped=tuple(sorted(plan.placement.dropped)),
            config=plan.placement.config,
            files=tuple(files.items()),
            left_out=plan.left_out,
            dry_run=dry_run,
            warnings=tuple(w for a in adapters if isinstance(a, LoraAdapter) for w in a.warnings),
        )
        if dry_run:
            return report
        require_space(out, int(sum(files.values()) * _SPACE_MARGIN))
        with atomic_directory(out, overwrite=overwrite) as folder, Workspace() as workspace:
            writer = _Merger(plan, folder, workspace, progress or (lambda fraction, text: None))
            tallies = writer.run()
            for file in checkpoint.files:
                file.check_unchanged()
            report = replace(report, tensors=tuple(_row(o, tallies[o.name]) for o in plan.touched))
            if not allow_no_op and not plan.placement.has_effect:
                _check_moved(report)
    return report


def _row(output: _Output, tally: Tally) -> MergedTensor:
    return MergedTensor(output.name, output.dtype, output.shape, len(output.pieces), tally)


def _check_replaceable(out: Path) -> None:
    """Only a model folder, or an empty one, is ever replaced."""
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG_NAME).exists() and not any(out.glob("*.safetensors")):
        raise OutputPathError("is not a model folder, so it is not replaced", fix="choose another output", path=out)


# --- effects --------------------------------------------------------------------------------------------------------


def _check_effect(adapters: Sequence[Adapter], plan: _Plan) -> None:
    """Raise E-NO-EFFECT, before anything is written, where a look at the adapters shows that nothing would change."""
    if plan.placement.has_effect:
        return
    if not plan.touched:
        raise NoEffectError("the adapter has no target and no other tensor for this base", fix=_ALLOW)
    if all(isinstance(a, LoraAdapter) and all(map(heads.is_zero, a.targets)) for a in adapters):
        raise NoEffectError("the update is zero everywhere", fix=f"was the adapter trained? Otherwise {_ALLOW}")


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


# --- planning -------------------------------------------------------------------------------------------------------


def _plan(adapters: Sequence[Adapter], checkpoint: Checkpoint) -> _Plan:
    resolved = [_resolve(adapter, checkpoint) for adapter in adapters]
    _check_contents(adapters, checkpoint)
    placement = heads.place(adapters, resolved, checkpoint)
    placed = checkpoint.tensors.keys() | placement.copies.keys()
    pieces = {name: found for name, found in _pieces(resolved).items() if name in placed}  # the rest is zero
    for name in pieces:
        dtype = checkpoint.tensors[placement.copies.get(name, name)].dtype
        if dtype not in FLOATS:
            raise QuantizedBaseError(
                f"the target {name!r} is stored as {dtype}",
                fix="use the unquantized parent of this checkpoint",
                path=checkpoint.root,
            )
    shards = tuple(_shard(file, checkpoint, placement, pieces) for file in checkpoint.files)
    copies, left_out = _other_files(checkpoint)
    texts = {}
    if placement.config:
        texts[CONFIG_NAME] = _config_text(checkpoint.config, placement.config)
    if checkpoint.index_path is not None:
        if all(shard.header == shard.file.header_bytes for shard in shards):
            copies[INDEX_NAME] = checkpoint.index_path
        else:
            texts[INDEX_NAME] = _json(_index(checkpoint, shards), sort=True)
    copies = {name: path for name, path in copies.items() if name not in texts}
    touched = tuple(o for shard in shards for o in shard.outputs if o.pieces)
    return _Plan(checkpoint, placement, shards, texts, copies, left_out, touched)


def _resolve(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    if isinstance(adapter, LoraAdapter):
        return targets.resolve(adapter, checkpoint)
    return targets.resolve(adapter, checkpoint)


def _check_contents(adapters: Sequence[Adapter], checkpoint: Checkpoint) -> None:
    """Raise E-FPR if an adapter names the contents of its base and this base has others. Reads every byte then."""
    wanted = {a.base.content for a in adapters if isinstance(a, CompactAdapter)} - {""}
    if wanted and wanted != {checkpoint.content_digest()}:
        raise FingerprintError(
            "the base has other contents than the one that the adapter was made for",
            fix="use the same revision of the base",
            path=checkpoint.root,
        )


def _pieces(resolved: Sequence[Adapter]) -> dict[str, tuple[_Piece, ...]]:
    """The updates of every parameter, by its name in the base."""
    found: dict[str, list[_Piece]] = {}
    for adapter in resolved:
        for target, term in _terms(adapter):
            found.setdefault(target.name, []).append(_Piece(*_extent(target), term))
    for name, pieces in found.items():
        if len({piece.cols for piece in pieces}) > 1:
            raise BaseError(f"the adapters see the parameter {name!r} in views that do not go together")
    return {name: tuple(pieces) for name, pieces in found.items()}


def _terms(adapter: Adapter) -> Iterator[tuple[Target, Callable[[], Term]]]:
    """Every target with a function that gives its update, in the orientation in which it is stored.

    Factors are decoded or expanded only when their tensor's turn comes.
    """
    if isinstance(adapter, LoraAdapter):
        for pair in adapter.targets:
            yield pair.target, partial(_lora_term, pair)
        return
    method = methods.get(adapter.method)
    values = methods.values(method, adapter)
    for which, target in enumerate(adapter.targets):
        yield target, partial(_compact_term, method, adapter, values, which)


def _lora_term(pair: LoraTarget) -> Term:
    return _oriented(pair.target, pair.scale, pair.A, pair.B)


def _compact_term(method: Method, adapter: CompactAdapter, values: Mapping[str, Any], which: int) -> Term:
    a, b = method.expand(adapter.config, adapter.targets, values, which, np)
    return _oriented(adapter.targets[which], 1.0, a, b)


def _oriented(target: Target, scale: float, a: Array, b: Array) -> Term:
    """``scale * B @ A`` or its transpose, as `target` is stored."""
    turned = target.view.kind in ("transposed", "expert_transposed")
    return Term(scale, a.T, b.T) if turned else Term(scale, b, a)


def _extent(target: Target) -> tuple[int, int, int]:
    """(first row, end of rows, columns) of a target in its parameter, seen as the matrix (-1, columns) of its rows; a
    stack of experts is one tall matrix."""
    shape, kind = target.shape, target.view.kind
    if kind in ("expert", "expert_transposed"):
        which = int(target.view.text.split(":")[1])
        return which * shape[1], (which + 1) * shape[1], shape[2]
    if kind == "rows":
        start, stop = target.view.text.split(":")[1:]
        return int(start), int(stop), shape[1]
    return 0, shape[0], int(np.prod(shape[1:]))


# --- planning files -------------------------------------------------------------------------------------------------


def _shard(
    file: ContainerFile, checkpoint: Checkpoint, placement: Placement, pieces: Mapping[str, tuple[_Piece, ...]]
) -> _Shard:
    outputs = [
        _output(info, placement, pieces.get(info.name, ()))
        for info in file.tensors
        if info.name not in placement.dropped
    ]
    if file is checkpoint.files[-1]:
        for extra in placement.added:
            outputs.append(_Output(extra.name, extra.dtype, extra.shape, data=extra.data))
        for name, source in placement.copies.items():
            info = checkpoint.tensors[source]
            data = placement.values[name].data if name in placement.values else None
            outputs.append(_Output(name, info.dtype, info.shape, info, data, pieces.get(name, ())))
    before = [(info.name, info.dtype, info.shape) for info in file.tensors]
    if [(o.name, o.dtype, o.shape) for o in outputs] == before:
        return _Shard(file, file.header_bytes, tuple(outputs))
    if len({o.name for o in outputs}) < len(outputs):
        raise PlacementError("a tensor that the adapter adds has the name of one of the base's", path=file.path)
    # Wider dtypes first, as safetensors does, so that every tensor stays aligned.
    outputs.sort(key=lambda o: -STORAGE[o.dtype].itemsize)
    header = encode_header([(o.name, o.dtype, o.shape) for o in outputs], file.metadata)
    return _Shard(file, header, tuple(outputs))


def _output(info: TensorInfo, placement: Placement, pieces: tuple[_Piece, ...]) -> _Output:
    name = placement.prefix + info.name
    if info.name in placement.replaced:
        extra = placement.replaced[info.name]
        return _Output(name, extra.dtype, extra.shape, data=extra.data)
    data = placement.values[info.name].data if info.name in placement.values else None
    return _Output(name, info.dtype, info.shape, info, data, pieces)


def _index(checkpoint: Checkpoint, shards: Sequence[_Shard]) -> dict[str, Any]:
    """The shard index of the output: the base's with other names, shards and totals."""
    outputs = [(o, shard.name) for shard in shards for o in shard.outputs]
    index = {**checkpoint.index, "weight_map": {o.name: name for o, name in outputs}}
    metadata = index.get("metadata")
    if isinstance(metadata, dict):
        totals = {
            "total_size": sum(o.nbytes for o, _ in outputs),
            "total_parameters": sum(int(np.prod(o.shape)) for o, _ in outputs),
        }
        index["metadata"] = {key: totals.get(key, value) for key, value in metadata.items()}
    return index


def _config_text(config: Mapping[str, Any], changes: Mapping[str, Any]) -> bytes:
    """config.json with fields set, or removed where the change is None; keys stay sorted if they were."""
    merged = {key: value for key, value in {**config, **changes}.items() if changes.get(key, ...) is not None}
    return _json(merged, sort=list(config) == sorted(config))


def _json(value: Any, *, sort: bool) -> bytes:
    """JSON as transformers writes it."""
    return (json.dumps(value, indent=2, sort_keys=sort) + "\n").encode()


def _other_files(checkpoint: Checkpoint) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Files of the base's folder beside its weights: those to copy (by name), and those left out (hidden folders, files
    that are links out of the folder, weights in other formats)."""
    root = checkpoint.root
    ours = {file.path.name for file in checkpoint.files} | {INDEX_NAME}
    copies, left_out = {}, []
    for folder, folders, names in os.walk(root):
        place = Path(folder).relative_to(root)
        for name in folders:
            if name.startswith(".") or (Path(folder) / name).is_symlink():
                left_out.append(f"{(place / name).as_posix()}/")
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path, shown = Path(folder) / name, (place / name).as_posix()
            if shown in ours:
                continue
            if path.is_file() and contained(root, path) and not name.lower().endswith(_OTHER_WEIGHTS):
                copies[shown] = path
            else:
                left_out.append(shown)
    return copies, tuple(sorted(left_out))


# --- writing --------------------------------------------------------------------------------------------------------


class _Merger:
    """Writes the files of a plan into a staged folder."""

    def __init__(self, plan: _Plan, folder: StagedDirectory, workspace: Workspace, progress: Progress) -> None:
        self.plan, self.folder, self.workspace, self.progress = plan, folder, workspace, progress
        self.total = max(1, sum(plan.files.values()))
        self.done = 0
        self.rational = 0

    def run(self) -> dict[str, Tally]:
        """Write everything. Returns what happened to the tensors that updates were added to."""
        tallies: dict[str, Tally] = {}
        for shard in self.plan.shards:
            if shard.is_copy:
                with self.folder.create(shard.name) as file:
                    file.copy(shard.file.fileno(), 0, shard.file.size)
                self._advance(shard.size, shard.name)
                continue
            with self.folder.create(shard.name) as file:
                file.write(shard.header)
                self._advance(len(shard.header), shard.name)
                for output in shard.outputs:
                    if output.pieces:
                        tallies[output.name] = self._update(output, file)
                    else:
                        self._copy(output, file)
        for name, path in self.plan.copies.items():
            self._advance(self.folder.copy_file(path, name), name)
        for name, text in self.plan.texts.items():
            self.folder.write_bytes(name, text)
            self._advance(len(text), name)
        return tallies

    def _advance(self, nbytes: int, text: str) -> None:
        self.done += nbytes
        self.progress(min(1.0, self.done / self.total), text)

    def _copy(self, output: _Output, file: Writer) -> None:
        """A tensor as it is, or as the adapter brings it."""
        if output.data is not None:
            file.write(output.data)
        else:
            info = output.source
            assert info is not None
            file.copy(self.plan.checkpoint.file_of(info).fileno(), info.start, info.nbytes)
        self._advance(output.nbytes, output.name)

    def _update(self, output: _Output, file: Writer) -> Tally:
        """A tensor with its updates, in blocks of rows; between two blocks the set of updates may change."""
        cols = output.pieces[0].cols
        rows = int(np.prod(output.shape)) // cols
        cuts = sorted({0, rows, *(p.start for p in output.pieces), *(p.stop for p in output.pieces)})
        height = exact.rows_per_block(cols)
        tally = Tally()
        with _Behind(file) as behind:
            for start, stop in pairwise(cuts):
                update = self._segment(output, start, stop)
                for top in range(start, stop, height):
                    count = min(height, stop - top)
                    block = self._read(output, top * cols, count * cols).reshape(count, cols)
                    if update is None:
                        done, some = block, Tally(elements=block.size)
                    else:
                        done, some = self._add(output, update, block, top - start)
                    tally += some
                    behind.write(done)
                    self._advance(done.nbytes, output.name)
        return tally

    def _segment(self, output: _Output, start: int, stop: int) -> Update | None:
        """The sum of all updates of these rows, or None."""
        terms = []
        for piece in output.pieces:
            if piece.start <= start and stop <= piece.stop:
                term = piece.term()
                terms.append(replace(term, left=term.left[start - piece.start : stop - piece.start]))
        try:
            return Update(terms) if terms else None
        except LrcError as error:
            raise self._named(error, output) from None

    def _read(self, output: _Output, first: int, count: int) -> Array:
        """`count` stored elements from element `first` on."""
        kind = STORAGE[output.dtype]
        if output.data is not None:
            return np.frombuffer(output.data, kind, count, first * kind.itemsize)
        info = output.source
        assert info is not None
        return np.frombuffer(self.plan.checkpoint.read(info, first * kind.itemsize, count * kind.itemsize), kind)

    def _add(self, output: _Output, update: Update, block: Array, row: int) -> tuple[Array, Tally]:
        try:
            done, tally = update.add(block, output.dtype, row, self.workspace)
        except LrcError as error:
            raise self._named(error, output) from None
        self.rational += tally.rational
        if self.rational > MAX_RATIONAL:
            raise self._named(LimitError(f"more than {MAX_RATIONAL} elements need rational arithmetic"), output)
        return done, tally

    def _named(self, error: LrcError, output: _Output) -> LrcError:
        error.what = f"tensor {output.name!r}: {error.what}"
        return error.at(self.plan.checkpoint.root)


class _Behind:
    """Writes one block while the next is computed. When the context ends everything is written, or an error raised."""

    def __init__(self, file: Writer) -> None:
        self._file = file
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[int] | None = None

    def write(self, block: Array) -> None:
        self.wait()
        self._pending = self._pool.submit(self._file.write, np.ascontiguousarray(block).data.cast("B"))

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def __enter__(self) -> _Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error is None:
            self.wait()
