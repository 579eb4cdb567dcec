"""Planning a merge: what every tensor and file of the output is made of. Nothing is written, no weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.core.dtypes import FLOATS, STORAGE, Array
from lrconvert.core.errors import BaseError, FingerprintError, LrcError, OptionError, PlacementError, QuantizedBaseError
from lrconvert.core.limits import MAX_INDEX_BYTES
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.io.container import ContainerFile, TensorInfo, encode_header, read_small
from lrconvert.lora import base_names, quantized_layers
from lrconvert.lora.adapter import MAGNITUDES, ExtraTensor, LoraAdapter, Target
from lrconvert.merge.plan import extra_tensors, load_check, resized
from lrconvert.merge.plan.other_files import other_files
from lrconvert.merge.plan.placement import Placement
from lrconvert.merge.plan.resized import Settled
from lrconvert.merge.plan.updates import (
    Adapter,
    NonlinearPiece,
    Piece,
    Scaled,
    Source,
    extent,
    is_transposed,
    targets_of,
)
from lrconvert.merge.plan.whole_tensors import cast, no_place
from lrconvert.methods import base as methods

CONFIG_NAME = "config.json"
ELSEWHERE = "which are not of this model and are left out"


@dataclass(frozen=True)
class Rows:
    """Trained rows of an embedding: `values` (n, features) as the embedding stores them take the places `index`."""

    index: Array
    values: Array


@dataclass(frozen=True)
class Output:
    """One tensor of the output: bytes of `source`, or `data`, with the updates of `pieces` added, or `rows` put in.

    `base` is the tensor of the base whose place it takes, None for one that the base does not have.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    base: TensorInfo | None = None
    source: TensorInfo | None = None
    data: bytes | None = None
    pieces: tuple[Piece, ...] = ()
    rows: Rows | None = None

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * STORAGE[self.dtype].itemsize

    @property
    def is_touched(self) -> bool:
        """True if its values are computed."""
        return bool(self.pieces) or self.rows is not None

    @property
    def is_copy(self) -> bool:
        return self.data is None and not self.is_touched


@dataclass(frozen=True)
class Shard:
    """One weight file of the output. `file` is the one of the base that has its name and order of tensors, if any."""

    name: str
    header: bytes
    outputs: tuple[Output, ...]
    file: ContainerFile | None = None

    @property
    def has_header_of_base(self) -> bool:
        return self.file is not None and self.header == self.file.header_bytes

    @property
    def size(self) -> int:
        return len(self.header) + sum(o.nbytes for o in self.outputs)


@dataclass(frozen=True)
class Plan:
    """`texts` are config.json and index where they change, `copies` other files of the base; `contents` the digests of
    base contents that the adapters were made for."""

    checkpoint: Checkpoint
    sources: tuple[Source, ...]
    placement: Placement
    shards: tuple[Shard, ...]
    texts: Mapping[str, bytes]
    copies: Mapping[str, Path]
    left_out: tuple[str, ...]
    contents: frozenset[str] = field(default_factory=frozenset)
    warnings: tuple[str, ...] = ()

    @property
    def outputs(self) -> Iterable[Output]:
        return (output for shard in self.shards for output in shard.outputs)

    @property
    def touched(self) -> tuple[Output, ...]:
        return tuple(o for o in self.outputs if o.is_touched)

    @property
    def files(self) -> dict[str, int]:
        """Name and size of every file of the output, but for the record."""
        sizes = {name: path.stat().st_size for name, path in self.copies.items()}
        sizes.update({name: len(text) for name, text in self.texts.items()})
        sizes.update({shard.name: shard.size for shard in self.shards})
        return dict(sorted(sizes.items()))


def plan(inputs: Sequence[Scaled], checkpoint: Checkpoint, shard_bytes: int | None = None) -> Plan:
    """Return the plan of merging `inputs` into `checkpoint`, with its own shards or with ones of at most `shard_bytes`.

    Raises E-BASE, E-ORIENT, E-PLACE, E-BASE-QUANT, E-OPTION, and E-FPR if the adapters were made for different bases.
    """
    settled = [resized.settle(item, checkpoint) for item in inputs]
    adapters = [each.adapter for each in settled]
    resolved = [_resolve(adapter, checkpoint) for adapter in adapters]
    merged = frozenset(name for each in settled for name in each.merged)
    placement = extra_tensors.place(adapters, resolved, checkpoint, merged)
    placed = checkpoint.tensors.keys() | placement.copies.keys()
    _check_plain(resolved, placement, checkpoint)
    try:
        pieces = _pieces(inputs, settled, resolved, checkpoint)
        pieces = {name: group for name, group in pieces.items() if name in placed}  # the rest is zero
        rows = _rows(adapters, placement, pieces, checkpoint)
    except LrcError as error:
        raise error.at(checkpoint.root) from None
    for name in (*pieces, *rows):
        dtype = checkpoint.tensors[placement.copies.get(name, name)].dtype
        if dtype not in FLOATS:
            raise QuantizedBaseError(
                f"the target {name!r} is stored as {dtype}",
                fix="use the unquantized parent of this checkpoint",
                path=checkpoint.root,
            )
    shards = _shards(checkpoint, placement, pieces, rows, shard_bytes)
    warning = _check_load(checkpoint, placement, shards)
    copies, left_out = other_files(checkpoint)
    texts = {}
    if placement.config or checkpoint.is_derived:
        texts[CONFIG_NAME] = _config_text(checkpoint.config, placement.config)
    is_same = all(shard.has_header_of_base for shard in shards)
    if checkpoint.index_path is not None and is_same and not checkpoint.is_derived:
        copies[checkpoint.names.index] = checkpoint.index_path
    elif len(shards) > 1 or (checkpoint.index_path is not None and shard_bytes is None):
        texts[checkpoint.names.index] = _json(_index(checkpoint, shards), sort=True)
    copies = {name: path for name, path in copies.items() if name not in texts}
    sources = tuple(Source(item.adapter) for item in inputs)
    elsewhere = sorted({name.partition(".")[0] for each in settled for name in each.elsewhere})
    said = (f"the adapters have parts for {', '.join(elsewhere)}, {ELSEWHERE}",) if elsewhere else ()
    warnings = (*((warning,) if warning else ()), *said, *_of_words(adapters))
    return Plan(checkpoint, sources, placement, shards, texts, copies, left_out, _contents(adapters), warnings)


def _check_load(checkpoint: Checkpoint, placement: Placement, shards: Sequence[Shard]) -> str:
    """Raise E-PLACE if what is planned would not load as the base does; a warning if that cannot be told."""
    config = load_check.merged_config(checkpoint.config, placement.config)
    return load_check.check([named(o) for shard in shards for o in shard.outputs], checkpoint, config)


def named(output: Output) -> load_check.Named:
    """Return a planned tensor as the check of loading sees it."""
    origin = output.base or output.source
    return load_check.Named(output.name, output.shape, origin.name if origin else "")


def _check_plain(resolved: Sequence[Adapter], placement: Placement, checkpoint: Checkpoint) -> None:
    """Raise E-BASE-QUANT for an update, or rows, of a tensor that is stored quantized."""
    quantized = quantized_layers.of(checkpoint)
    if quantized is None:
        return
    for name in (*(t.name for a in resolved for t in targets_of(a)), *(n for p in placement.rows.values() for n in p)):
        stored = name if name in checkpoint.tensors else base_names.tied_source(name, checkpoint)
        if quantized.holds(stored or name):
            raise quantized.refused(name)


def _of_words(adapters: Sequence[Adapter]) -> Iterator[str]:
    """Yield a warning of the embeddings of words that adapters carry: they are no weights."""
    names = sorted({extra.name for a in adapters for extra in a.extras if extra.use == "textual_inversion"})
    if names:
        yield (
            f"{len(names)} embeddings of words (textual inversion) are not merged, {names[0]!r:.80} for one: "
            "they change no weight, and the program that reads prompts takes them from the adapter's file"
        )


def _resolve(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    if isinstance(adapter, LoraAdapter):  # either type is given back as itself
        return base_names.resolve(adapter, checkpoint)
    return base_names.resolve(adapter, checkpoint)


def _contents(adapters: Sequence[Adapter]) -> frozenset[str]:
    """Return the contents of the base that compact adapters name. Raises E-FPR if they name different ones."""
    contents = {a.base.content for a in adapters if not isinstance(a, LoraAdapter)} - {""}
    if len(contents) > 1:
        raise FingerprintError("the adapters were made for bases of different contents", fix="merge one of them")
    return frozenset(contents)


# --- updates --------------------------------------------------------------------------------------------------------


def _pieces(
    inputs: Sequence[Scaled], settled: Sequence[Settled], resolved: Sequence[Adapter], checkpoint: Checkpoint
) -> dict[str, tuple[Piece, ...]]:
    """Return the updates of every parameter, by its name in the base."""
    pieces: dict[str, list[Piece]] = {}
    index = base_names.NameIndex.of(checkpoint)
    for number, (item, each, adapter) in enumerate(zip(inputs, settled, resolved, strict=True)):
        for name, piece in _pieces_of(number, item, replace(each, adapter=adapter), index, checkpoint):
            pieces.setdefault(name, []).append(piece)
    for name, group in pieces.items():
        if len({piece.cols for piece in group}) > 1:
            raise BaseError(f"the adapters see the parameter {name!r} in views that do not go together")
        for piece in group:
            if isinstance(piece, NonlinearPiece) and any(p is not piece and _meet(p, piece) for p in group):
                raise PlacementError(
                    f"two adapters update {name!r}, and one of them is no sum with the base's weights",
                    fix="merge one after the other",
                )
    return {name: tuple(group) for name, group in pieces.items()}


def _pieces_of(
    number: int,
    item: Scaled,
    resolved: Settled,
    index: base_names.NameIndex,
    checkpoint: Checkpoint,
) -> Iterator[tuple[str, Piece]]:
    """Return the updates of adapter number `number`, `resolved`, with the names of their parameters in the base."""
    is_base_dependent = methods.needs_base(item.adapter)
    elsewhere = resolved.elsewhere
    magnitudes = {e.name: e for e in item.adapter.extras if e.use in MAGNITUDES and e.name not in elsewhere}
    if magnitudes and item.scale != 1:
        raise OptionError("a DoRA adapter cannot be scaled: its magnitudes hold for the whole of its update")
    for which, target in zip(resolved.kept, targets_of(resolved.adapter), strict=True):
        own = targets_of(item.adapter)[which]
        magnitude = magnitudes.pop(own.name, None)
        # Itself, the parts of an expert as the base stores them, or an expert's part of a stack.
        parts = () if target.name in checkpoint.tensors else base_names.parts(target, index, checkpoint)
        inside = None if target.name in checkpoint.tensors else base_names.stack_rows(target, index, checkpoint)
        if inside is not None:
            if is_base_dependent or magnitude is not None:
                raise BaseError(f"the base stores {target.name!r} in a stack, an update cannot depend on that")
            rows = (inside.start, inside.stop)
            yield inside.name, Piece(rows, inside.cols, number, which, item.scale, inside.is_transposed)
            continue
        places: list[tuple[Target, tuple[int, int] | None]] = [(p.target, (p.start, p.stop)) for p in parts]
        if parts and magnitude is not None:
            raise BaseError(f"the base stores {target.name!r} in parts, and its DoRA is that of the whole")
        for stored, part in places or [(target, None)]:
            start, stop, cols = extent(stored)
            transposed = is_transposed(target) and part is None
            piece = Piece((start, stop), cols, number, which, item.scale, transposed, part=part)
            if is_base_dependent or magnitude is not None:
                piece = NonlinearPiece(**vars(piece), magnitude=magnitude)
            yield stored.name, piece
    for magnitude in magnitudes.values():
        raise no_place(magnitude, "the adapter has no update of this parameter")
    for which, extra in enumerate(item.adapter.extras):
        if extra.use == "add" and extra.name not in elsewhere:
            name = index.find(extra.name)
            if name is None or checkpoint.tensors[name].shape != extra.shape:
                what = "has no such bias" if name is None else f"has {list(checkpoint.tensors[name].shape)}"
                raise no_place(extra, f"the base {what}", "train without it")
            yield name, Piece((0, 1), extra.shape[0], number, which, item.scale, bias=True)


def _meet(one: Piece, other: Piece) -> bool:
    return one.start < other.stop and other.start < one.stop


def _rows(
    adapters: Sequence[Adapter], placement: Placement, pieces: Mapping[str, Any], checkpoint: Checkpoint
) -> dict[str, Rows]:
    """Return trained token rows by the stored embedding they go into; both ends of a tie that is stored twice."""
    rows: dict[str, Rows] = {}
    for adapter in adapters:
        places = {e.name: e for e in adapter.extras if e.use == "row_indices"}
        for extra in (e for e in adapter.extras if e.use == "rows"):
            if extra.name not in places:
                raise no_place(extra, "nothing says which rows these are")
            if not placement.rows.get(extra.name):
                raise no_place(extra, "the base has no such embedding")
            for name in placement.rows[extra.name]:
                origin = placement.copies.get(name, name)
                if name in pieces or name in placement.replaced or name in placement.values:
                    raise no_place(extra, "the embedding itself is changed too", "merge one after the other")
                if name in placement.copies.values() or origin not in checkpoint.tensors:
                    raise no_place(extra, "what is tied to it becomes a tensor of its own", "merge them apart")
                if name in rows:
                    raise no_place(extra, "two adapters bring rows of it", "merge one after the other")
                rows[name] = _row_patch(extra, places[extra.name], checkpoint.tensors[origin])
    return rows


def _row_patch(extra: ExtraTensor, places: ExtraTensor, info: TensorInfo) -> Rows:
    index = np.frombuffer(places.data, STORAGE[places.dtype]).astype(np.int64)
    if len(info.shape) != 2 or extra.shape[1:] != info.shape[1:] or index[-1] >= info.shape[0]:
        raise no_place(extra, f"the base has {list(info.shape)}, the last row is {index[-1]}", "resize the base first")
    if extra.dtype not in FLOATS or info.dtype not in FLOATS:
        raise no_place(extra, f"it is {extra.dtype}, the base {info.dtype}")
    data = cast(extra, info.dtype).data
    return Rows(index, np.frombuffer(data, STORAGE[info.dtype]).reshape(extra.shape))


# --- planning files -------------------------------------------------------------------------------------------------


def _shards(
    checkpoint: Checkpoint,
    placement: Placement,
    pieces: Mapping[str, tuple[Piece, ...]],
    rows: Mapping[str, Rows],
    shard_bytes: int | None,
) -> tuple[Shard, ...]:
    groups = [
        [
            _output(info, placement, pieces.get(info.name, ()), rows.get(info.name))
            for info in file.tensors
            if info.name not in placement.dropped
        ]
        for file in checkpoint.files
    ]
    groups[-1] += _new_outputs(checkpoint, placement, pieces, rows)
    _check_names(groups, checkpoint)
    if shard_bytes is None:
        return tuple(_shard(file, outputs) for file, outputs in zip(checkpoint.files, groups, strict=True))
    packed = _packed([output for group in groups for output in group], shard_bytes)
    count = len(packed)
    names = [checkpoint.names.single if count == 1 else checkpoint.names.shard(n + 1, count) for n in range(count)]
    metadata = checkpoint.files[0].metadata
    return tuple(_written_anew(name, outputs, metadata) for name, outputs in zip(names, packed, strict=True))


def _new_outputs(
    checkpoint: Checkpoint, placement: Placement, pieces: Mapping[str, tuple[Piece, ...]], rows: Mapping[str, Rows]
) -> list[Output]:
    """Return the tensors that the base does not have."""
    added = [Output(extra.name, extra.dtype, extra.shape, data=extra.data) for extra in placement.added]
    for name, origin in placement.copies.items():
        info = checkpoint.tensors[origin]
        data = placement.values[name].data if name in placement.values else None
        added.append(Output(name, info.dtype, info.shape, None, info, data, pieces.get(name, ()), rows.get(name)))
    return added


def _check_names(groups: Sequence[Sequence[Output]], checkpoint: Checkpoint) -> None:
    names = [output.name for group in groups for output in group]
    if len(set(names)) < len(names):
        raise PlacementError("a tensor that the adapter adds has the name of one of the base's", path=checkpoint.root)


def _shard(file: ContainerFile, outputs: Sequence[Output]) -> Shard:
    """Return a shard of the base; its header stays as it is if no tensor changes name, dtype or shape."""
    before = [(info.name, info.dtype, info.shape) for info in file.tensors]
    if [(o.name, o.dtype, o.shape) for o in outputs] == before:
        return Shard(file.path.name, file.header_bytes, tuple(outputs), file)
    return replace(_written_anew(file.path.name, outputs, file.metadata), file=file)


def _written_anew(name: str, outputs: Sequence[Output], metadata: Mapping[str, str]) -> Shard:
    # Wider dtypes first, as safetensors does, so that every tensor stays aligned.
    ordered = sorted(outputs, key=lambda o: -STORAGE[o.dtype].itemsize)
    return Shard(name, encode_header([(o.name, o.dtype, o.shape) for o in ordered], metadata), tuple(ordered))


def _packed(outputs: Sequence[Output], shard_bytes: int) -> list[list[Output]]:
    """Return `outputs` in order, in groups of at most `shard_bytes`; a larger one has a group of its own."""
    groups: list[list[Output]] = []
    free = 0
    for output in outputs:
        if not groups or output.nbytes > free:
            groups.append([])
            free = shard_bytes
        groups[-1].append(output)
        free -= output.nbytes
    return groups


def _output(info: TensorInfo, placement: Placement, pieces: tuple[Piece, ...], rows: Rows | None) -> Output:
    name = placement.prefix + info.name
    if info.name in placement.replaced:
        extra = placement.replaced[info.name]
        return Output(name, extra.dtype, extra.shape, info, data=extra.data)
    data = placement.values[info.name].data if info.name in placement.values else None
    return Output(name, info.dtype, info.shape, info, info, data, pieces, rows)


def _index(checkpoint: Checkpoint, shards: Sequence[Shard]) -> dict[str, Any]:
    """Return the shard index of the output: the base's with other names, shards and totals."""
    outputs = [(o, shard.name) for shard in shards for o in shard.outputs]
    totals = {
        "total_size": sum(o.nbytes for o, _ in outputs),
        "total_parameters": sum(int(np.prod(o.shape)) for o, _ in outputs),
    }
    metadata = checkpoint.index.get("metadata")
    if checkpoint.index_path is None:
        metadata = {"total_size": 0}
    index = {**checkpoint.index, "weight_map": {o.name: name for o, name in outputs}}
    if isinstance(metadata, dict):
        index["metadata"] = {key: totals.get(key, value) for key, value in metadata.items()}
    return index


def _config_text(config: Mapping[str, Any], changes: Mapping[str, Any]) -> bytes:
    """Return config.json with fields set, or removed where the change is None; keys stay sorted if they were."""
    return _json(load_check.merged_config(config, changes), sort=list(config) == sorted(config))


def base_texts(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return config.json and index of a base, as they are or as they would be."""
    if checkpoint.is_derived:
        texts = {CONFIG_NAME: _config_text(checkpoint.config, {})}
        return texts | ({checkpoint.names.index: _json(checkpoint.index, sort=True)} if checkpoint.index_path else {})
    paths = [checkpoint.root / CONFIG_NAME, *([checkpoint.index_path] if checkpoint.index_path else [])]
    return {path.name: read_small(path, MAX_INDEX_BYTES) for path in paths if path.exists()}


def _json(value: Any, *, sort: bool) -> bytes:
    """Return JSON as transformers writes it."""
    return (json.dumps(value, indent=2, sort_keys=sort) + "\n").encode()
