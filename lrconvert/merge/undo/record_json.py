"""record.json: what stands in the record of a merge, its one spelling, and its parsing.

Normative text: ``formats/undo-v1.md``, sections 2 and 3. A record may come from a stranger: every value is checked
before it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lrconvert.core.dtypes import itemsize
from lrconvert.core.errors import DigestError, JsonSyntaxError, UndoError, VersionError
from lrconvert.core.limits import FOREIGN
from lrconvert.io import strictjson
from lrconvert.io.container import INDEX_NAME
from lrconvert.io.strictjson import as_hex, as_object
from lrconvert.lora.adapter import USES, View
from lrconvert.merge.plan.plan import CONFIG_NAME
from lrconvert.merge.plan.updates import Origin, Piece

FORMAT, VERSION = "lrconvert-undo", 1
CODES_NAME = "undo.bin"
RESIDUAL, XOR, STORED = 0, 1, 2
CODE_ELEMENTS = 1 << 23  # of one code, unless a single row has more; bytes where they are stored

_TEXTS = (CONFIG_NAME, INDEX_NAME)
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_FLOAT = re.compile(r"-?0x[01]\.[0-9a-f]{1,13}p[+-][0-9]{1,4}")
_ADVICE = "give the base: --from-base"


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
    """One merge. `files` are the base's weight files in order with the bytes of their data, `texts` its small files
    that are kept, `others` the digests of those that were copied, `added` those of tensors that the base does not have,
    `stored` those of the record's own files. `content` is the digest of all of the base's tensors. Without `can_undo`
    there are no codes and no adapters."""

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


def adapter_name(number: int, kind: str) -> str:
    """The file of an adapter in the record."""
    return f"adapter-{number}.{'lrc' if kind == 'compact' else 'safetensors'}"


# --- out ------------------------------------------------------------------------------------------------------------


def encode(record: Record) -> bytes:
    """The bytes of record.json: keys sorted, no spaces, `digest` the sha256 of the same text with an empty one."""
    return sign(
        {
            "format": FORMAT,
            "version": VERSION,
            "number": record.number,
            "can_undo": record.can_undo,
            "content": record.content,
            "adapters": list(record.adapters),
            "tensors": [tensor_json(t) for t in record.tensors],
            "added": dict(record.added),
            "files": [list(item) for item in record.files],
            "texts": list(record.texts),
            "others": dict(record.others),
            "stored": dict(record.stored),
        }
    )


def sign(value: Mapping[str, Any]) -> bytes:
    """The canonical text of an object with its digest in it."""
    return _dump({**value, "digest": hashlib.sha256(_dump({**value, "digest": ""})).hexdigest()})


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def tensor_json(t: TensorRecord) -> dict[str, Any]:
    """The entry of a tensor."""
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


# --- in -------------------------------------------------------------------------------------------------------------


def parse(data: bytes) -> Record:
    """The record whose record.json is `data`. Raises E-VER, E-DIGEST, E-UNDO and what strict JSON raises."""
    value = strictjson.parse(data, depth=FOREIGN.json_depth)
    if isinstance(value, dict) and (value.get("format"), value.get("version")) != (FORMAT, VERSION):
        found = f"{value.get('format')!r:.40} version {value.get('version')!r:.40}"
        raise VersionError(f"the record is {found}; this program reads {FORMAT} {VERSION}", fix="update lrconvert")
    lists, tables = ("adapters", "tensors", "files", "texts"), ("added", "others", "stored")
    fields = ("format", "version", "digest", "number", "can_undo", "content", *lists, *tables)
    value = as_object(value, "the record", fields)
    if sign({key: item for key, item in value.items() if key != "digest"}) != data:
        raise DigestError("the record is not what the merge wrote", fix=_ADVICE)
    adapters = tuple(_adapter(item, _flag(value["can_undo"])) for item in _list(value["adapters"]))
    tensors = tuple(parse_tensor(item, len(adapters)) for item in _list(value["tensors"]))
    if len({t.name for t in tensors}) < len(tensors):
        raise UndoError("the record describes a tensor twice")
    record = Record(
        number=_whole(value["number"]),
        can_undo=_flag(value["can_undo"]),
        content=as_hex(value["content"], "the digest of the base"),
        adapters=adapters,
        tensors=tensors,
        added=digests_of(value["added"]),
        files=tuple(_file(item) for item in _list(value["files"])),
        texts=tuple(_text(item) for item in _list(value["texts"])),
        others=digests_of(value["others"]),
        stored=digests_of(value["stored"]),
    )
    _check_files(record)
    return record


def _check_files(record: Record) -> None:
    """Raise E-UNDO unless the record lists exactly the files that it has to have."""
    if len(dict(record.files)) < len(record.files) or not set(record.texts) <= set(_TEXTS):
        raise UndoError("the record names files that no merge changes")
    wanted = {f"base/{n}.header" for n in range(len(record.files))} | {f"base/{name}" for name in record.texts}
    if record.can_undo:
        wanted |= {CODES_NAME, *(adapter_name(n, a["kind"]) for n, a in enumerate(record.adapters))}
    if set(record.stored) != wanted:
        raise UndoError("the record does not list exactly its files")


def _adapter(value: Any, whole: bool) -> Mapping[str, Any]:
    """The entry of an adapter; of a LoRA with its targets and extras if the record is `whole`."""
    is_lora = isinstance(value, dict) and value.get("kind") == "lora" and whole
    more = ("targets", "extras") if is_lora else ()
    as_object(value, "an adapter of the record", ["kind", "name", "scale", "source", "sha256", *more])
    if value["kind"] not in ("lora", "compact"):
        raise UndoError(f"the record has an adapter of the kind {value['kind']!r:.40}")
    _text(value["name"]), _text(value["source"]), _float(value["scale"])
    as_hex(value["sha256"], "the digest of an adapter")
    for item in _list(value.get("targets", [])):
        name, shape, view, scale = _list(item, 4)
        View(_text(view)).matrix_shape(tuple(map(_whole, _list(shape))))
        _text(name), _float(scale)
    for item in _list(value.get("extras", [])):
        name, use = _list(item, 2)
        if _text(name) and use not in USES:
            raise UndoError(f"the record has an extra tensor with the use {use!r:.40}")
    return value  # type: ignore[no-any-return]


def parse_tensor(value: Any, adapters: int) -> TensorRecord:
    """The entry of a tensor, of a record with so many adapters. Raises E-UNDO and what strict JSON raises."""
    optional = ("output", "after", "cols", "offset", "codes", "pieces")
    as_object(value, "a tensor of the record", ["name", "dtype", "shape", "before"], optional)
    if ("output" in value) != ("after" in value):
        raise UndoError("a tensor of the record has a new name without a digest, or the reverse")
    tensor = TensorRecord(
        name=_text(value["name"]),
        dtype=_text(value["dtype"]),
        shape=tuple(map(_whole, _list(value["shape"]))),
        before=as_hex(value["before"], "a digest"),
        output=_text(value.get("output", "")),
        after=as_hex(value["after"], "a digest") if "after" in value else "",
        cols=_whole(value.get("cols", 0)),
        offset=_whole(value.get("offset", 0)),
        codes=tuple(Code(*map(_whole, _list(item, 4))) for item in _list(value.get("codes", []))),
        pieces=tuple(_piece(item, adapters) for item in _list(value.get("pieces", []))),
    )
    if not _codes_fit(tensor):
        raise UndoError(f"the codes of {tensor.name!r} do not fit its shape")
    return tensor


def _codes_fit(t: TensorRecord) -> bool:
    """Whether codes rise inside the tensor, each of a size that is read at once, and pieces lie in it."""
    size, modes = math.prod(t.shape), {code.mode for code in t.codes}
    if modes == {STORED}:
        unit, end, most = 1, size * itemsize(t.dtype), CODE_ELEMENTS
    elif not modes:
        return not t.pieces
    elif STORED in modes or not modes <= {RESIDUAL, XOR} or not t.cols or size % t.cols or not t.output:
        return False
    else:
        unit, end, most = t.cols, size // t.cols, max(1, CODE_ELEMENTS // t.cols)
    if not t.output and not t.codes:
        return False
    at = 0
    for code in t.codes:
        if code.first < at or not 1 <= code.count <= most or code.first + code.count > end:
            return False
        at = code.first + code.count
    return all(p.cols == unit and p.start < p.stop <= end for p in t.pieces) and (
        bool(t.pieces) or RESIDUAL not in modes
    )


def _piece(value: Any, adapters: int) -> Piece:
    as_object(value, "a piece", ["rows", "cols", "adapter", "which", "scale"], ["turned", "bias", "part"])
    start, stop = map(_whole, _list(value["rows"], 2))
    if _whole(value["adapter"]) >= adapters:
        raise UndoError("a piece of the record is of an adapter that it does not have")
    part = tuple(map(_whole, _list(value["part"], 2))) if "part" in value else None
    origin = Origin(
        adapter=value["adapter"],
        which=_whole(value["which"]),
        scale=_float(value["scale"]),
        turned=_flag(value.get("turned", False)),
        bias=_flag(value.get("bias", False)),
        rows=None if part is None else (part[0], part[1]),
    )
    return Piece(start, stop, _whole(value["cols"]), origin)


def _file(value: Any) -> tuple[str, int]:
    name, nbytes = _list(value, 2)
    if not _FILE.fullmatch(_text(name)):
        raise UndoError(f"the record names the weight file {name!r:.60}, which is no plain name")
    return name, _whole(nbytes)


def digests_of(value: Any) -> Mapping[str, str]:
    """A table of names and digests."""
    if not isinstance(value, dict):
        raise JsonSyntaxError("a table of digests is not an object")
    return {name: as_hex(digest, f"the digest of {name!r:.60}") for name, digest in value.items()}


def _list(value: Any, count: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (count is not None and len(value) != count):
        raise JsonSyntaxError(f"{value!r:.40} is not a list{'' if count is None else f' of {count}'}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise JsonSyntaxError(f"{value!r:.40} is not a string")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise JsonSyntaxError(f"{value!r:.40} is not true or false")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise JsonSyntaxError(f"{value!r:.40} is not a whole number")
    return value


def _float(value: Any) -> float:
    if not _FLOAT.fullmatch(_text(value)):
        raise JsonSyntaxError(f"{value!r:.40} is not a number in C99 hexadecimal")
    try:
        return float.fromhex(value)
    except OverflowError:
        raise JsonSyntaxError(f"{value!r:.40} is beyond float64") from None
