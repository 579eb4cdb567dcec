"""Adapters in the record of a merge: a file each, every bit kept, and an entry of record.json."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from lrconvert.core.dtypes import FLOATS, Stored, itemsize
from lrconvert.core.errors import UndoError
from lrconvert.formats.lrc import file
from lrconvert.io.container import ContainerFile, encode_header
from lrconvert.lora.adapter import ExtraTensor, LoraAdapter, LoraTarget, Target, View
from lrconvert.merge.plan.updates import Adapter, Scaled
from lrconvert.merge.signed_json import portable
from lrconvert.merge.undo.record import AdapterEntry, ExtraEntry, TargetEntry


def entry_of(item: Scaled, has_file: bool) -> AdapterEntry:
    """Return the entry of an adapter, whose file is in the record or not."""
    adapter, digest = item.adapter, hashlib.sha256()
    for chunk in encode(adapter):
        digest.update(chunk)
    targets: tuple[TargetEntry, ...] | None = None
    extras: tuple[ExtraEntry, ...] | None = None
    if isinstance(adapter, LoraAdapter) and has_file:
        targets = tuple(
            TargetEntry(p.target.name, p.target.shape, p.target.view.text, p.scale) for p in adapter.targets
        )
        extras = tuple(ExtraEntry(e.name, e.use) for e in adapter.extras)
    kind = "lora" if isinstance(adapter, LoraAdapter) else "compact"
    name, source = portable(item.name), portable(adapter.provenance.source)
    return AdapterEntry(kind, name, item.scale, source, digest.hexdigest(), targets, extras)


def encode(adapter: Adapter) -> Iterator[bytes]:
    """Return the bytes of an adapter's file in pieces."""
    if not isinstance(adapter, LoraAdapter):
        yield from file.encode(adapter)
        return
    tensors: list[tuple[str, str, tuple[int, ...], bytes]] = []
    for n, pair in enumerate(adapter.targets):
        tensors += [(f"{n}.{h}", s.dtype, s.shape, s.array.tobytes()) for h, s in (("a", pair.a), ("b", pair.b))]
    tensors += [(f"extra.{n}", e.dtype, e.shape, e.data) for n, e in enumerate(adapter.extras)]
    tensors.sort(key=lambda t: (-itemsize(t[1]), t[0]))
    yield encode_header([(name, dtype, shape) for name, dtype, shape, _ in tensors], {})
    for *_, data in tensors:
        yield data


def load(folder: Path, number: int, entry: AdapterEntry) -> Adapter:
    """Return adapter `number` of the record in `folder`. Raises E-UNDO and the errors of its format."""
    path = folder / entry.file_name(number)
    if entry.targets is None or entry.extras is None:
        return file.read(path)
    with ContainerFile(path) as source:

        def tensor(name: str) -> Stored:
            if name not in source.by_name:
                raise UndoError(f"the tensor {name!r} is missing", path=path)
            return source.load(source.by_name[name])

        pairs = []
        for n, (name, shape, view, scale) in enumerate(entry.targets):
            pair = LoraTarget(Target(name, shape, View(view)), tensor(f"{n}.a"), tensor(f"{n}.b"), scale)
            out, inner = pair.target.matrix_shape
            fits = len(pair.a.shape) == 2 and pair.a.shape[1:] == (inner,) and pair.b.shape == (out, pair.a.shape[0])
            if not fits or not {pair.a.dtype, pair.b.dtype} <= set(FLOATS):
                raise UndoError(f"the factors of {name!r} do not fit it", path=path)
            pairs.append(pair)
        extras = []
        for n, (name, use) in enumerate(entry.extras):
            stored = tensor(f"extra.{n}")
            extras.append(ExtraTensor(name, stored.dtype, stored.shape, stored.array.tobytes(), use))
    return LoraAdapter(tuple(pairs), tuple(extras))
