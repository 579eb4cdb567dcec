"""The statistics file: moments of a model's inputs, in the same container as adapters.

Normative text: ``formats/statistics-v1.md``. Moments are read one at a time, each checked against its digest as it is
read, so that a file of gigabytes costs as much memory as its largest moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.core.dtypes import STORAGE, Array
from lrconvert.core.errors import (
    CanonicalError,
    DigestError,
    DtypeError,
    JsonSyntaxError,
    LimitError,
    LrcError,
    MissingFieldError,
    ShapeError,
    UnknownFieldError,
    ValueRangeError,
    VersionError,
)
from lrconvert.core.limits import GIB, MAX_DIM, MAX_INT, MIB, Limits
from lrconvert.io import strictjson
from lrconvert.io.container import ContainerFile, TensorInfo, encode_header, tensor_digest
from lrconvert.io.durable import atomic_file
from lrconvert.io.strictjson import as_hex, as_object
from lrconvert.lora.fingerprint import content_digest
from lrconvert.lora.input_statistics import Input, InputStatistics, Moment

METADATA_KEY = "lrconvert-statistics"
PARTIAL_KEY = "lrconvert-statistics-partial"
VERSION = 1
FORMS = ("exact", "sketch", "diagonal")
LIMITS = Limits(
    header_bytes=64 * MIB,  # a stack of experts per layer has thousands of inputs
    json_depth=8,
    string_bytes=64 * MIB,
    tensors=1 << 18,
    name_bytes=255,
    ndim=2,
    dim=MAX_DIM,
    file_bytes=256 * GIB,
)
_NAME_BYTES = 4096
_NAMES = 1 << 20
_KEPT = 32  # moments that stay in memory, of some megabytes each


# --- the container --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Opened:
    """A file whose manifest was read and whose tensors are read when they are asked for."""

    file: ContainerFile
    manifest: dict[str, Any]
    digests: dict[str, Any]

    def tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> Array:
        """Raises E-MISSING, E-DTYPE, E-SHAPE, E-DIGEST."""
        info = self.file.by_name.get(name)
        if info is None:
            raise MissingFieldError(f"the tensor {name!r} is missing", path=self.file.path)
        if info.dtype != dtype or info.shape != shape:
            what = f"tensor {name!r} is {info.dtype} {list(info.shape)}, not {dtype} {list(shape)}"
            raise (ShapeError if info.dtype == dtype else DtypeError)(what, path=self.file.path)
        data = self._checked(info)
        return np.frombuffer(data, STORAGE[dtype]).reshape(shape)

    def _checked(self, info: TensorInfo) -> bytearray:
        data = self.file.read(info)
        if tensor_digest(info.name, info.dtype, info.shape, [data]) != self.digests[info.name]:
            raise DigestError(
                f"tensor {info.name!r} does not match its digest", fix="the file is damaged", path=self.file.path
            )
        return data


def _header(key: str, fields: Mapping[str, Any], arrays: Sequence[tuple[str, str, Array]]) -> bytes:
    """The header of a file: tensors in the given order, `fields` with their digests as its only metadata."""
    tensors = {name: tensor_digest(name, dtype, a.shape, [_bytes(a, dtype)]) for name, dtype, a in arrays}
    digests = {"content": content_digest(tensors, fields), "tensors": tensors}
    text = strictjson.dump_canonical({**fields, "digests": digests}).decode()
    return encode_header([(name, dtype, a.shape) for name, dtype, a in arrays], {key: text})


def _bytes(array: Array, dtype: str) -> bytes:
    return np.ascontiguousarray(array, STORAGE[dtype]).tobytes()


def _write(
    key: str, path: Path, fields: Mapping[str, Any], arrays: Sequence[tuple[str, str, Array]], overwrite: bool
) -> None:
    header = _header(key, fields, arrays)
    with atomic_file(path, overwrite=overwrite) as out:
        out.write(header)
        for _, dtype, array in arrays:
            out.write(_bytes(array, dtype))


def _open(key: str, path: Path) -> _Opened:
    with ExitStack() as stack:
        file = stack.enter_context(ContainerFile(path, LIMITS))
        try:
            if set(file.metadata) != {key}:
                raise MissingFieldError(
                    f"the file has no {key} manifest" if key not in file.metadata else "the file has other metadata",
                    fix="give a file that `lrconvert statistics` wrote",
                )
            manifest = strictjson.parse_canonical(file.metadata[key].encode(), depth=LIMITS.json_depth)
            if not isinstance(manifest, dict):
                raise JsonSyntaxError("the manifest is not an object")
            if manifest.get("version") != VERSION:
                raise VersionError(f"version {manifest.get('version')!r:.40} is not known", fix="is lrconvert too old?")
            stated = as_object(manifest.pop("digests", None), "digests", ["content", "tensors"])
            digests = stated["tensors"] if isinstance(stated["tensors"], dict) else {}
            unknown = sorted(digests.keys() ^ file.by_name.keys())
            if unknown:
                raise UnknownFieldError(f"{unknown[0]!r:.80} is not both a tensor and a digest")
            for name, value in digests.items():
                as_hex(value, f"the digest of {name!r:.80}")
            if content_digest(digests, manifest) != stated["content"]:
                raise DigestError("digests.content is not that of the manifest", fix="the file is damaged")
            if encode_header([(t.name, t.dtype, t.shape) for t in file.tensors], file.metadata) != file.header_bytes:
                raise CanonicalError("the header is not the canonical one of its content")
        except LrcError as error:
            raise error.at(path) from None
        stack.pop_all()  # it stays open for the tensors
    return _Opened(file, manifest, digests)


# --- statistics -----------------------------------------------------------------------------------------------------


def is_statistics(path: Path) -> bool:
    """Whether `path` is a safetensors file that carries our statistics manifest (valid or not)."""
    try:
        with ContainerFile(path, LIMITS) as file:
            return METADATA_KEY in file.metadata
    except LrcError:
        return False


def write(statistics: InputStatistics, path: Path, *, overwrite: bool = False) -> None:
    """Write a statistics file, atomically. The same content gives the same bytes. Raises E-OUT-*, E-IO-*."""
    entries, arrays = [], []
    for n, some in enumerate(statistics.inputs):
        moment = statistics.load(n)
        stored = _stored(n, moment)
        form = "exact" if moment.matrix is not None else "sketch" if len(stored) == 2 else "diagonal"
        entry: dict[str, Any] = {"names": list(some.names), "width": some.width, "tokens": some.tokens, "form": form}
        if some.expert is not None:
            entry["expert"] = some.expert
        if form == "sketch":
            entry["rank"] = len(stored[1][2])
        entries.append(entry)
        arrays += stored
    fields = {
        "version": VERSION,
        "base": statistics.content,
        "families": list(statistics.families),
        "data": statistics.data,
        "tokens": statistics.tokens,
        "inputs": entries,
    }
    _write(METADATA_KEY, path, fields, arrays, overwrite)


def _stored(n: int, moment: Moment) -> list[tuple[str, str, Array]]:
    if moment.matrix is not None:
        return [(f"triangle.{n}", "F32", moment.matrix[np.triu_indices(moment.width)])]
    found: list[tuple[str, str, Array]] = [(f"diagonal.{n}", "F32", moment.squares)]
    if moment.rows is not None and len(moment.rows):
        found.append((f"sketch.{n}", "F32", moment.rows))
    return found


def read(path: Path) -> InputStatistics:
    """The statistics of a file, which stays open: moments are read, and checked, when they are asked for."""
    opened = _open(METADATA_KEY, path)
    try:
        return _statistics(opened)
    except LrcError as error:
        opened.file.close()
        raise error.at(path) from None


def _statistics(opened: _Opened) -> InputStatistics:
    fields = as_object(opened.manifest, "the manifest", ["version", "base", "families", "data", "tokens", "inputs"])
    for key in ("base", "data"):
        if fields[key]:
            as_hex(fields[key], key)
    families = fields["families"]
    if not isinstance(families, list) or not all(isinstance(f, str) and len(f) <= _NAME_BYTES for f in families):
        raise JsonSyntaxError("families is not a list of strings")
    entries = fields["inputs"]
    if not isinstance(entries, list) or not entries:
        raise JsonSyntaxError("inputs is not a list of at least one")
    if sum(len(e["names"]) for e in entries if isinstance(e, dict) and isinstance(e.get("names"), list)) > _NAMES:
        raise LimitError(f"the inputs have more than {_NAMES} names")
    parsed = [_entry(entry, n) for n, entry in enumerate(entries)]
    inputs = tuple(some for some, _, _ in parsed)
    known = [(name, some.expert) for some in inputs for name in some.names]
    if len(set(known)) != len(known):
        raise CanonicalError("one parameter has two inputs")
    expected = [name for n, (_, form, _) in enumerate(parsed) for name in _tensor_names(n, form)]
    unknown = sorted(set(expected) ^ opened.file.by_name.keys())
    if unknown:
        raise (MissingFieldError if unknown[0] in expected else UnknownFieldError)(f"the tensor {unknown[0]!r}")
    if [t.name for t in opened.file.tensors] != expected:
        raise CanonicalError("the tensors are not in the order of their inputs")

    @lru_cache(maxsize=_KEPT)
    def load(n: int) -> Moment:
        some, form, rank = parsed[n]
        try:
            moment = _moment(opened, n, some, form, rank)
        except LrcError as error:
            raise error.at(opened.file.path) from None
        opened.file.check_unchanged()
        return moment

    tokens = _whole(fields["tokens"], "tokens", 0, MAX_INT)
    return InputStatistics(inputs, load, fields["base"], fields["data"], tokens, tuple(families))


def _tensor_names(n: int, form: str) -> list[str]:
    if form == "exact":
        return [f"triangle.{n}"]
    return [f"diagonal.{n}"] + ([f"sketch.{n}"] if form == "sketch" else [])


def _entry(value: Any, n: int) -> tuple[Input, str, int]:
    """(input, form, rank) of one entry of the manifest."""
    what = f"inputs[{n}]"
    fields = as_object(value, what, ["names", "width", "tokens", "form"], ["expert", "rank"])
    names = fields["names"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise JsonSyntaxError(f"{what}.names is not a list of names")
    if names != sorted(set(names)) or any(len(name.encode()) > _NAME_BYTES for name in names):
        raise CanonicalError(f"{what}.names are not sorted, or too long")
    form = fields["form"]
    if form not in FORMS or (form == "sketch") != ("rank" in fields):
        raise JsonSyntaxError(f"{what}.form is {form!r:.40}; exact, diagonal, or sketch with a rank are allowed")
    width = _whole(fields["width"], f"{what}.width", 1, MAX_DIM)
    rank = _whole(fields["rank"], f"{what}.rank", 1, width) if form == "sketch" else 0
    expert = _whole(fields["expert"], f"{what}.expert", 0, MAX_DIM) if "expert" in fields else None
    return Input(tuple(names), expert, width, _whole(fields["tokens"], f"{what}.tokens", 0, MAX_INT)), form, rank


def _whole(value: Any, what: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise LimitError(f"{what} is {value!r:.40}; {least} to {most} are allowed")
    return value


def _moment(opened: _Opened, n: int, some: Input, form: str, rank: int) -> Moment:
    """Raises E-VALUE for numbers that no second moment has."""
    width = some.width
    if form == "exact":
        triangle = opened.tensor(f"triangle.{n}", "F32", (width * (width + 1) // 2,))
        matrix = np.zeros((width, width), np.float32)
        matrix[np.triu_indices(width)] = triangle
        matrix += np.triu(matrix, 1).T
        moment = Moment(some.tokens, matrix=matrix)
    else:
        rows = opened.tensor(f"sketch.{n}", "F32", (rank, width)) if form == "sketch" else None
        moment = Moment(some.tokens, diagonal=opened.tensor(f"diagonal.{n}", "F32", (width,)), rows=rows)
    stored = moment.matrix if moment.matrix is not None else moment.rows
    finite = stored is None or bool(np.isfinite(stored).all())
    if not finite or not np.isfinite(moment.squares).all() or bool((moment.squares < 0).any()):
        raise ValueRangeError(f"the moment of {some.names[0]!r} has NaN, infinity or a negative square")
    return moment


# --- half-done work -------------------------------------------------------------------------------------------------


def write_partial(
    path: Path, fields: Mapping[str, Any], arrays: Iterable[tuple[str, str, Array]], key: str = PARTIAL_KEY
) -> None:
    """Keep unfinished sums, atomically, over the last ones; under another `key`, other unfinished work."""
    ordered = sorted(arrays, key=lambda entry: (-STORAGE[entry[1]].itemsize, entry[0]))
    _write(key, path, {"version": VERSION, **fields}, ordered, overwrite=True)


def read_partial(path: Path, key: str = PARTIAL_KEY) -> tuple[dict[str, Any], dict[str, Array]]:
    """What `write_partial` kept: (fields, arrays), every digest checked."""
    opened = _open(key, path)
    with opened.file as file:
        return opened.manifest, {t.name: opened.tensor(t.name, t.dtype, t.shape) for t in file.tensors}
