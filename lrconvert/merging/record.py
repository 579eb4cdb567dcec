"""The record of a merge: what it takes to undo it, in a folder of its own inside the merged model.

Normative text: ``formats/undo-v1.md``. A record is complete by itself: the adapters, the headers and small files of the
base as they were, digests of every tensor before and after, and undo codes (`residual`) of all that was changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert import file, strictjson
from lrconvert.adapter import ExtraTensor, LoraAdapter, LoraTarget, Target, View
from lrconvert.container import (
    INDEX_NAME,
    ContainerFile,
    TensorInfo,
    encode_header,
    open_regular,
    parse_header,
    pread,
    read_small,
)
from lrconvert.dtypes import itemsize
from lrconvert.errors import DigestError, JsonSyntaxError, LrcError, UndoError, UndoOrderError, VersionError
from lrconvert.limits import FOREIGN, MAX_INDEX_BYTES
from lrconvert.manifest import as_hex, as_object
from lrconvert.merging.plan import CONFIG_NAME, RECORDS
from lrconvert.merging.updates import Adapter, Origin, Piece, Source

FORMAT, VERSION = "lrconvert-undo", 1
RECORD_NAME, CODES_NAME = "record.json", "undo.bin"
RESIDUAL, XOR, STORED = 0, 1, 2
_FOLDER = re.compile(r"merge-([1-9][0-9]{0,5})-[0-9a-f]{12}")
_TEXTS = (CONFIG_NAME, INDEX_NAME)
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_CHUNK = 1 << 23


@dataclass(frozen=True)
class Code:
    """The undo code of `count` rows from `first` on; of bytes in place of rows where `mode` is STORED."""

    first: int
    count: int
    mode: int
    nbytes: int


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the base, and what became of it: the tensor `output` of the merged model ("": left out).

    `before` and `after` are digests; `codes` begin at `offset` of undo.bin, one after the other. Without codes the
    bytes are the same in both.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    before: str
    output: str
    after: str
    cols: int = 0
    offset: int = 0
    codes: tuple[Code, ...] = ()
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class Record:
    """One merge. `files` are the base's weight files in order with the bytes of
    their data, `texts` its small files that the merge changed, `others`
    the digests of those that it copied, `added` those of tensors that the base does not have. `content` is the digest
    of all of the base's tensors. Without `can_undo` there are no codes and no adapters."""

    number: int
    can_undo: bool
    content: str
    adapters: tuple[Mapping[str, Any], ...]
    tensors: tuple[TensorRecord, ...]
    added: Mapping[str, str]
    files: tuple[tuple[str, int], ...]
    texts: tuple[str, ...]
    others: Mapping[str, str]
    stored: Mapping[str, str]

    def encode(self) -> bytes:
        """The bytes of record.json: keys sorted, no spaces, `digest` the sha256 of the same text with an empty one."""
        value = {
            "format": FORMAT,
            "version": VERSION,
            "number": self.number,
            "can_undo": self.can_undo,
            "content": self.content,
            "adapters": list(self.adapters),
            "tensors": [_tensor_json(t) for t in self.tensors],
            "added": dict(self.added),
            "files": [list(item) for item in self.files],
            "texts": list(self.texts),
            "others": dict(self.others),
            "stored": dict(self.stored),
            "digest": "",
        }
        return _dump(value | {"digest": hashlib.sha256(_dump(value)).hexdigest()})


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


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
        return f"adapter-{number}.lrc", file.encode(adapter), {"kind": "compact"}
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

    return f"adapter-{number}.safetensors", chunks(), entry


def load_adapter(folder: Path, number: int, entry: Mapping[str, Any]) -> Adapter:
    """The adapter that `adapter_files` wrote. Raises E-UNDO and the errors of its format."""
    if entry["kind"] == "compact":
        return file.read(folder / f"adapter-{number}.lrc")
    path = folder / f"adapter-{number}.safetensors"
    with ContainerFile(path) as source:

        def load(name: str) -> Any:
            if name not in source.by_name:
                raise UndoError(f"the tensor {name!r} is missing", path=path)
            return source.load(source.by_name[name])

        targets = []
        for n, item in enumerate(entry["targets"]):
            target = Target(item[0], tuple(item[1]), View(item[2]))
            targets.append(LoraTarget(target, load(f"{n}.a"), load(f"{n}.b"), float.fromhex(item[3])))
        extras = []
        for n, (name, use) in enumerate(entry["extras"]):
            stored = load(f"extra.{n}")
            extras.append(ExtraTensor(name, stored.dtype, stored.shape, stored.array.tobytes(), use))
    return LoraAdapter(tuple(targets), tuple(extras))


# --- reading --------------------------------------------------------------------------------------------------------


class OpenRecord:
    """A record whose files were all compared with their digests. A context manager, since undo.bin stays open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / RECORD_NAME
        if not self.path.is_file():
            raise UndoError(f"the record has no {RECORD_NAME}", fix="give the base: --from-base", path=folder)
        try:
            self.record = _record(read_small(self.path, MAX_INDEX_BYTES))
            for name, wanted in self.record.stored.items():
                self._check(name, wanted)
            self.headers = [self._header(n, name, size) for n, (name, size) in enumerate(self.record.files)]
        except LrcError as error:
            raise error.at(self.path) from None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise JsonSyntaxError(f"the record is not built as it must be ({error})", path=self.path) from None
        self._codes = open_regular(folder / CODES_NAME)[0] if self.record.can_undo else -1

    def _check(self, name: str, wanted: str) -> None:
        path = self.folder / name
        if not path.is_file() or path.is_symlink():
            raise UndoError(f"the record's file {name!r} is missing", fix="give the base: --from-base", path=path)
        if file_digest(path) != wanted:
            raise DigestError(
                "the file is not the one that the merge wrote", fix="give the base: --from-base", path=path
            )

    def _header(self, number: int, name: str, nbytes: int) -> tuple[bytes, list[TensorInfo]]:
        data = self.text(f"base/{number}.header")
        ours = {t.name: t for t in self.record.tensors}
        _, infos = parse_header(data[8:], nbytes, FOREIGN, self.path)
        for info in infos:
            known = ours.get(info.name)
            if known is None or (known.dtype, known.shape) != (info.dtype, info.shape):
                raise UndoError(f"the record does not describe the tensor {info.name!r} of {name!r}")
        return data, infos

    def text(self, name: str) -> bytes:
        return read_small(self.folder / name, MAX_INDEX_BYTES)

    def sources(self) -> tuple[Source, ...]:
        return tuple(Source(load_adapter(self.folder, n, entry)) for n, entry in enumerate(self.record.adapters))

    def code(self, offset: int, nbytes: int) -> bytes:
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


# --- JSON -----------------------------------------------------------------------------------------------------------


def _tensor_json(t: TensorRecord) -> dict[str, Any]:
    value: dict[str, Any] = {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "before": t.before}
    if t.output:
        value |= {"output": t.output, "after": t.after}
    if t.codes:
        value |= {"cols": t.cols, "offset": t.offset, "codes": [[c.first, c.count, c.mode, c.nbytes] for c in t.codes]}
    if t.pieces:
        value["pieces"] = [_piece_json(p) for p in t.pieces]
    return value


def _piece_json(piece: Piece) -> dict[str, Any]:
    origin = piece.origin
    value: dict[str, Any] = {
        "rows": [piece.start, piece.stop],
        "cols": piece.cols,
        "adapter": origin.adapter,
        "which": origin.which,
        "scale": origin.scale.hex(),
    }
    for name, flag in (("turned", origin.turned), ("bias", origin.bias)):
        if flag:
            value[name] = True
    if origin.rows is not None:
        value["part"] = list(origin.rows)
    return value


def _record(data: bytes) -> Record:
    value = strictjson.parse(data, depth=FOREIGN.json_depth)
    fields = ("number", "can_undo", "content", "adapters", "tensors", "added", "files", "texts", "others", "stored")
    if isinstance(value, dict) and (value.get("format"), value.get("version")) != (FORMAT, VERSION):
        raise VersionError(
            f"the record is {value.get('format')!r} version {value.get('version')!r}", fix="update lrconvert"
        )
    value = as_object(value, "the record", ["format", "version", "digest", *fields])
    if _dump(value) != data or hashlib.sha256(_dump(value | {"digest": ""})).hexdigest() != value["digest"]:
        raise DigestError("the record is not what the merge wrote", fix="give the base: --from-base")
    files, texts, stored = value["files"], value["texts"], value["stored"]
    files = [(name, _whole(nbytes)) for name, nbytes in files]
    if not all(_FILE.fullmatch(name) for name, _ in files) or len(dict(files)) < len(files):
        raise UndoError("the record names weight files that are none")
    if not set(texts) <= set(_TEXTS):
        raise UndoError("the record names small files that a merge does not change")
    wanted = {f"base/{n}.header" for n in range(len(files))} | {f"base/{n}" for n in texts}
    if value["can_undo"]:
        wanted |= {CODES_NAME} | {
            f"adapter-{n}.{'lrc' if a['kind'] == 'compact' else 'safetensors'}" for n, a in enumerate(value["adapters"])
        }
    if set(stored) != wanted:
        raise UndoError("the record does not list exactly its files")
    for what in ("added", "others", "stored"):
        for name, digest in value[what].items():
            as_hex(digest, f"the digest of {name!r}")
    tensors = tuple(_tensor(item, len(value["adapters"])) for item in value["tensors"])
    if len({t.name for t in tensors}) < len(tensors):
        raise UndoError("the record describes a tensor twice")
    return Record(
        number=_whole(value["number"]),
        can_undo=value["can_undo"] is True,
        content=as_hex(value["content"], "the digest of the base"),
        adapters=tuple(value["adapters"]),
        tensors=tensors,
        added=value["added"],
        files=tuple(files),
        texts=tuple(texts),
        others=value["others"],
        stored=stored,
    )


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise JsonSyntaxError(f"{value!r:.40} is not a number of something")
    return value


def _tensor(value: Any, adapters: int) -> TensorRecord:
    optional = ("output", "after", "cols", "offset", "codes", "pieces")
    as_object(value, "a tensor of the record", ["name", "dtype", "shape", "before"], optional)
    shape = tuple(_whole(n) for n in value["shape"])
    codes = tuple(Code(*map(_whole, item)) for item in value.get("codes", ()))
    cols, size = _whole(value.get("cols", 0)), 1
    for n in shape:
        size *= n
    end = 0
    for code in codes:
        top = size * itemsize(value["dtype"]) if code.mode == STORED else size // max(1, cols)
        if (
            code.first < end
            or code.first + code.count > top
            or code.mode > STORED
            or (code.mode != STORED and not cols)
        ):
            raise UndoError(f"the codes of {value['name']!r} do not fit its shape")
        end = code.first + code.count
    return TensorRecord(
        name=str(value["name"]),
        dtype=value["dtype"],
        shape=shape,
        before=as_hex(value["before"], "a digest"),
        output=str(value.get("output", "")),
        after=as_hex(value["after"], "a digest") if "output" in value else "",
        cols=cols,
        offset=_whole(value.get("offset", 0)),
        codes=codes,
        pieces=tuple(_piece(item, adapters) for item in value.get("pieces", ())),
    )


def _piece(value: Any, adapters: int) -> Piece:
    as_object(value, "a piece", ["rows", "cols", "adapter", "which", "scale"], ["turned", "bias", "part"])
    start, stop = map(_whole, value["rows"])
    if _whole(value["adapter"]) >= adapters:
        raise UndoError("a piece of the record is of an adapter that it does not have")
    part = tuple(map(_whole, value["part"])) if "part" in value else None
    origin = Origin(
        adapter=value["adapter"],
        which=_whole(value["which"]),
        scale=float.fromhex(value["scale"]),
        turned=value.get("turned") is True,
        bias=value.get("bias") is True,
        rows=None if part is None else (part[0], part[1]),
    )
    return Piece(start, stop, _whole(value["cols"]), origin)
