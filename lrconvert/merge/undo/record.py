"""The record of a merge: what it takes to undo it, in a folder of its own inside the merged model.

Normative text: ``formats/undo-v1.md``. A record is complete by itself: the adapters, the headers and small files of the
base as they were, digests of every tensor before and after, and undo codes (`residual`) of all that was changed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lrconvert.core.dtypes import FLOATS, Stored, itemsize
from lrconvert.core.errors import DigestError, LrcError, UndoError, UndoOrderError
from lrconvert.core.limits import FOREIGN, MAX_INDEX_BYTES
from lrconvert.formats.lrc import file
from lrconvert.io.container import (
    ContainerFile,
    TensorInfo,
    combined_digest,
    encode_header,
    open_regular,
    parse_header,
    pread,
    read_small,
)
from lrconvert.lora.adapter import ExtraTensor, LoraAdapter, LoraTarget, Target, View
from lrconvert.merge.plan.plan import RECORDS
from lrconvert.merge.plan.updates import Adapter, Source
from lrconvert.merge.undo import record_json
from lrconvert.merge.undo.record_json import CODES_NAME, adapter_name

RECORD_NAME = "record.json"
_FOLDER = re.compile(r"merge-([1-9][0-9]{0,5})-[0-9a-f]{12}")
_CHUNK = 1 << 23
_ADVICE = "give the base: --from-base"


def folder_name(number: int, adapters: Iterable[tuple[str, float]]) -> str:
    """The folder of merge number `number` of adapters with these digests and scales, under the model's folder."""
    digest = hashlib.sha256("".join(f"{text} {scale.hex()}\n" for text, scale in adapters).encode()).hexdigest()
    return f"{RECORDS}/merge-{number}-{digest[:12]}"


def numbered(model: Path) -> dict[int, Path]:
    """The records of a model by number. Raises E-UNDO if two have the same one."""
    found: dict[int, Path] = {}
    root = model / RECORDS
    for path in sorted(root.iterdir()) if root.is_dir() and not root.is_symlink() else ():
        match = _FOLDER.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            number = int(match[1])
            if number in found:
                raise UndoError(f"two records have the number {number}", fix="remove the one that is a copy", path=path)
            found[number] = path
    return found


# --- adapters -------------------------------------------------------------------------------------------------------


def adapter_files(number: int, adapter: Adapter) -> tuple[str, Iterator[bytes], dict[str, Any]]:
    """(file name, its bytes in pieces, entry of record.json) of an adapter, every bit kept."""
    if not isinstance(adapter, LoraAdapter):
        return adapter_name(number, "compact"), file.encode(adapter), {"kind": "compact"}
    tensors: list[tuple[str, str, tuple[int, ...], bytes]] = []
    for n, pair in enumerate(adapter.targets):
        tensors += [(f"{n}.{h}", s.dtype, s.shape, s.array.tobytes()) for h, s in (("a", pair.a), ("b", pair.b))]
    tensors += [(f"extra.{n}", e.dtype, e.shape, e.data) for n, e in enumerate(adapter.extras)]
    tensors.sort(key=lambda t: (-itemsize(t[1]), t[0]))
    entry = {
        "kind": "lora",
        "targets": [[p.target.name, list(p.target.shape), p.target.view.text, p.scale.hex()] for p in adapter.targets],
        "extras": [[e.name, e.use] for e in adapter.extras],
    }

    def chunks() -> Iterator[bytes]:
        yield encode_header([(name, dtype, shape) for name, dtype, shape, _ in tensors], {})
        for *_, data in tensors:
            yield data

    return adapter_name(number, "lora"), chunks(), entry


def load_adapter(folder: Path, number: int, entry: Mapping[str, Any]) -> Adapter:
    """The adapter that `adapter_files` wrote. Raises E-UNDO and the errors of its format."""
    path = folder / adapter_name(number, entry["kind"])
    if entry["kind"] == "compact":
        return file.read(path)
    with ContainerFile(path) as source:

        def load(name: str) -> Stored:
            if name not in source.by_name:
                raise UndoError(f"the tensor {name!r} is missing", path=path)
            return source.load(source.by_name[name])

        pairs = []
        for n, (name, shape, view, scale) in enumerate(entry["targets"]):
            pair = LoraTarget(
                Target(name, tuple(shape), View(view)), load(f"{n}.a"), load(f"{n}.b"), float.fromhex(scale)
            )
            out, inner = pair.target.matrix_shape
            fits = len(pair.a.shape) == 2 and pair.a.shape[1:] == (inner,) and pair.b.shape == (out, pair.a.shape[0])
            if not fits or not {pair.a.dtype, pair.b.dtype} <= set(FLOATS):
                raise UndoError(f"the factors of {name!r} do not fit it", path=path)
            pairs.append(pair)
        extras = []
        for n, (name, use) in enumerate(entry["extras"]):
            stored = load(f"extra.{n}")
            extras.append(ExtraTensor(name, stored.dtype, stored.shape, stored.array.tobytes(), use))
    return LoraAdapter(tuple(pairs), tuple(extras))


# --- reading --------------------------------------------------------------------------------------------------------


class OpenRecord:
    """A record whose files were all compared with their digests. A context manager, since undo.bin stays open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / RECORD_NAME
        if not self.path.is_file():
            raise UndoError(f"the record has no {RECORD_NAME}", fix=_ADVICE, path=folder)
        try:
            self.record = record_json.parse(read_small(self.path, MAX_INDEX_BYTES))
            for name, wanted in self.record.stored.items():
                self._check(name, wanted)
            self.headers = [self._header(n, name, size) for n, (name, size) in enumerate(self.record.files)]
        except LrcError as error:
            raise error.at(self.path) from None
        self._codes, self._size = -1, 0
        if self.record.can_undo:
            self._codes, info = open_regular(folder / CODES_NAME)
            self._size = info.st_size

    def _check(self, name: str, wanted: str) -> None:
        path = self.folder / name
        if not path.is_file() or path.is_symlink():
            raise UndoError(f"the record's file {name!r} is missing", fix=_ADVICE, path=path)
        if file_digest(path) != wanted:
            raise DigestError("the file is not the one that the merge wrote", fix=_ADVICE, path=path)

    def _header(self, number: int, name: str, nbytes: int) -> tuple[bytes, list[TensorInfo]]:
        data = self.text(f"base/{number}.header")
        ours = {t.name: t for t in self.record.tensors}
        _, infos = parse_header(data[8:], nbytes, FOREIGN, self.path)
        for info in infos:
            known = ours.get(info.name)
            if known is None or (known.dtype, known.shape) != (info.dtype, info.shape):
                raise UndoError(f"the record does not describe the tensor {info.name!r} of {name!r}")
        return data, infos

    def check_content(self) -> None:
        """Raise E-DIGEST unless the digests of the tensors make up that of the base."""
        if combined_digest((t.name, t.before) for t in self.record.tensors) != self.record.content:
            raise DigestError("the digests of the record do not agree with each other", path=self.path)

    def holds(self, name: str) -> bool:
        """Whether a file of the model, named from its folder, is one of the record."""
        return name.startswith(f"{RECORDS}/{self.folder.name}/")

    def text(self, name: str) -> bytes:
        return read_small(self.folder / name, MAX_INDEX_BYTES)

    def sources(self) -> tuple[Source, ...]:
        return tuple(Source(load_adapter(self.folder, n, entry)) for n, entry in enumerate(self.record.adapters))

    def code(self, offset: int, nbytes: int) -> bytes:
        """Bytes of undo.bin. Raises E-UNDO if it does not have them."""
        if offset + nbytes > self._size:
            raise UndoError(
                f"{CODES_NAME} has {self._size} bytes, a code is to end at {offset + nbytes}", path=self.path
            )
        return bytes(pread(self._codes, nbytes, offset, self.folder / CODES_NAME))

    def close(self) -> None:
        if self._codes >= 0:
            os.close(self._codes)
            self._codes = -1

    def __enter__(self) -> OpenRecord:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def latest(model: Path, number: int | None = None) -> Path:
    """The folder of the last record of a model. Raises E-UNDO if there is none, E-UNDO-ORDER if `number` is another."""
    found = numbered(model)
    if not found:
        raise UndoError(
            "holds no record of a merge",
            fix="give the base it was merged from: --from-base",
            path=model,
        )
    last = max(found)
    if number is not None and number != last:
        if number in found:
            raise UndoOrderError(
                f"merge {last} was made on top of merge {number}", fix=f"undo merge {last} first", path=model
            )
        raise UndoError(f"there is no record of a merge {number}; the last is {last}", path=model)
    return found[last]


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    descriptor, info = open_regular(path)
    try:
        digest = hashlib.sha256()
        for offset in range(0, info.st_size, _CHUNK):
            digest.update(pread(descriptor, min(_CHUNK, info.st_size - offset), offset, path))
        return digest.hexdigest()
    finally:
        os.close(descriptor)
