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
from typing import Annotated, Any

import numpy as np

from lrconvert.core import errors
from lrconvert.core.dtypes import STORAGE, Array
from lrconvert.core.errors import LrcError
from lrconvert.core.limits import GIB, MAX_DIM, MAX_INT, MIB, Limits
from lrconvert.core.wording import verb
from lrconvert.io import fields, strictjson
from lrconvert.io.container import ContainerFile, carries, encode_header, tensor_digest
from lrconvert.io.durable import atomic_file
from lrconvert.io.fields import Check, Hex, between, matches, one_of
from lrconvert.lora.fingerprint import content_digest
from lrconvert.lora.input_statistics import Input, InputStatistics, Moment

METADATA_KEY = "lrconvert-statistics"
PARTIAL_KEY = "lrconvert-statistics-partial"
VERSION = 1
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
_CACHED = 32  # moments that stay in memory, of some megabytes each

_Text = Annotated[str, Check(lambda text: len(text.encode()) <= _NAME_BYTES, f"at most {_NAME_BYTES} bytes")]
_Digest = Annotated[str, matches("[0-9a-f]{64}|", "64 lower-case hexadecimal digits, or none", errors.DigestError)]


@dataclass(frozen=True)
class _Entry:
    """One input: the parameters that it flows into, and in which form its moment is stored."""

    names: Annotated[
        tuple[Annotated[str, Check(bool, "a name")], ...],
        Check(bool, "at least one name"),
        Check(lambda names: list(names) == sorted(set(names)), "sorted names", errors.CanonicalError),
        Check(lambda names: max(len(n.encode()) for n in names) <= _NAME_BYTES, "short names", errors.CanonicalError),
    ]
    width: Annotated[int, between(1, MAX_DIM)]
    tokens: Annotated[int, between(0, MAX_INT)]
    form: Annotated[str, one_of(("exact", "sketch", "diagonal"))]
    expert: Annotated[int, between(0, MAX_DIM)] | None = None
    rank: Annotated[int, between(1, MAX_DIM)] = 0

    def __post_init__(self) -> None:
        if (self.form == "sketch") != (self.rank > 0):
            raise errors.JsonSyntaxError(f"the input of {self.names[0]!r:.80} has a sketch without a rank, or a rank")
        if self.rank > self.width:
            what = f"the input of {self.names[0]!r:.80} has rank {self.rank}"
            raise errors.LimitError(f"{what}, more than its width {self.width}")

    def tensors(self, n: int) -> list[str]:
        """Return the names of its tensors, as entry `n` of the list."""
        sketch = [f"sketch.{n}"] if self.form == "sketch" else []
        return [f"triangle.{n}"] if self.form == "exact" else [f"diagonal.{n}", *sketch]


@dataclass(frozen=True)
class _Manifest:
    version: int
    base: _Digest
    families: tuple[_Text, ...]
    data: _Digest
    tokens: Annotated[int, between(0, MAX_INT)]
    inputs: Annotated[tuple[_Entry, ...], Check(bool, "at least one input")]


@dataclass(frozen=True)
class _Digests:
    content: Hex
    tensors: dict[str, Hex]


# --- the container --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Opened:
    """A file whose manifest was read and whose tensors are read when they are used."""

    file: ContainerFile
    manifest: dict[str, Any]
    digests: Mapping[str, str]

    def tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> Array:
        """Read a tensor. Raises E-MISSING, E-DTYPE, E-SHAPE, E-DIGEST."""
        info = self.file.by_name.get(name)
        if info is None:
            raise errors.MissingFieldError(f"the tensor {name!r} is missing", path=self.file.path)
        if info.dtype != dtype or info.shape != shape:
            what = f"tensor {name!r} is {info.dtype} {list(info.shape)}, not {dtype} {list(shape)}"
            raise (errors.ShapeError if info.dtype == dtype else errors.DtypeError)(what, path=self.file.path)
        data = self.file.read(info)
        if tensor_digest(name, dtype, shape, [data]) != self.digests[name]:
            what = f"tensor {name!r} does not match its digest"
            raise errors.DigestError(what, fix="the file is damaged", path=self.file.path)
        return np.frombuffer(data, STORAGE[dtype]).reshape(shape)


def _header(key: str, manifest: Mapping[str, Any], arrays: Sequence[tuple[str, str, Array]]) -> bytes:
    """The header of a file: tensors in the given order, the manifest with their digests as its only metadata."""
    tensors = {name: tensor_digest(name, dtype, a.shape, [_bytes(a, dtype)]) for name, dtype, a in arrays}
    digests = {"content": content_digest(tensors, manifest), "tensors": tensors}
    text = strictjson.dump_canonical({**manifest, "digests": digests}).decode()
    return encode_header([(name, dtype, a.shape) for name, dtype, a in arrays], {key: text})


def _bytes(array: Array, dtype: str) -> bytes:
    return np.ascontiguousarray(array, STORAGE[dtype]).tobytes()


def _write(
    key: str, path: Path, manifest: Mapping[str, Any], arrays: Sequence[tuple[str, str, Array]], overwrite: bool
) -> None:
    header = _header(key, manifest, arrays)
    with atomic_file(path, overwrite=overwrite) as out:
        out.write(header)
        for _, dtype, array in arrays:
            out.write(_bytes(array, dtype))


def _open(key: str, path: Path) -> _Opened:
    with ExitStack() as stack:
        file = stack.enter_context(ContainerFile(path, LIMITS))
        try:
            if set(file.metadata) != {key}:
                raise errors.MissingFieldError(
                    f"the file has no {key} manifest" if key not in file.metadata else "the file has other metadata",
                    fix=f"give a file that {verb('statistics')} wrote",
                )
            manifest = strictjson.parse_canonical(file.metadata[key].encode(), depth=LIMITS.json_depth)
            if not isinstance(manifest, dict):
                raise errors.JsonSyntaxError("the manifest is not an object")
            if manifest.get("version") != VERSION:
                what = f"version {manifest.get('version')!r:.40} is not known"
                raise errors.VersionError(what, fix="is lrconvert too old?")
            digests = fields.read(_Digests, manifest.pop("digests", None), "digests")
            unpaired = sorted(digests.tensors.keys() ^ file.by_name.keys())
            if unpaired:
                raise errors.UnknownFieldError(f"{unpaired[0]!r:.80} is not both a tensor and a digest")
            if content_digest(digests.tensors, manifest) != digests.content:
                raise errors.DigestError("digests.content is not that of the manifest", fix="the file is damaged")
            if encode_header([(t.name, t.dtype, t.shape) for t in file.tensors], file.metadata) != file.header_bytes:
                raise errors.CanonicalError("the header is not the canonical one of its content")
        except LrcError as error:
            raise error.at(path) from None
        stack.pop_all()  # it stays open for the tensors
    return _Opened(file, manifest, digests.tensors)


# --- statistics -----------------------------------------------------------------------------------------------------


def is_statistics(path: Path) -> bool:
    """Return true if `path` is a safetensors file that carries our statistics manifest (valid or not)."""
    return carries(path, METADATA_KEY, LIMITS)


def write(statistics: InputStatistics, path: Path, *, overwrite: bool = False) -> None:
    """Write a statistics file, atomically. The same content gives the same bytes. Raises E-OUT-*, E-IO-*."""
    entries, arrays = [], []
    for n, measured in enumerate(statistics.inputs):
        moment = statistics.load(n)
        stored = _stored(n, moment)
        form = "exact" if moment.matrix is not None else "sketch" if len(stored) == 2 else "diagonal"
        rank = len(stored[1][2]) if form == "sketch" else 0
        entries.append(_Entry(measured.names, measured.width, measured.tokens, form, measured.expert, rank))
        arrays += stored
    manifest = _Manifest(
        VERSION, statistics.content, tuple(statistics.families), statistics.data, statistics.tokens, tuple(entries)
    )
    _write(METADATA_KEY, path, fields.as_json(manifest), arrays, overwrite)


def _stored(n: int, moment: Moment) -> list[tuple[str, str, Array]]:
    if moment.matrix is not None:
        return [(f"triangle.{n}", "F32", moment.matrix[np.triu_indices(moment.width)])]
    stored: list[tuple[str, str, Array]] = [(f"diagonal.{n}", "F32", moment.squares)]
    if moment.rows is not None and len(moment.rows):
        stored.append((f"sketch.{n}", "F32", moment.rows))
    return stored


def read(path: Path) -> InputStatistics:
    """Read the statistics of a file, which stays open: moments are read, and checked, when they are used."""
    opened = _open(METADATA_KEY, path)
    try:
        return _statistics(opened)
    except LrcError as error:
        opened.file.close()
        raise error.at(path) from None


def _statistics(opened: _Opened) -> InputStatistics:
    manifest = fields.read(_Manifest, opened.manifest, "the manifest")
    entries = manifest.inputs
    if sum(len(entry.names) for entry in entries) > _NAMES:
        raise errors.LimitError(f"the inputs have more than {_NAMES} names")
    claimed = {(name, entry.expert) for entry in entries for name in entry.names}
    if len(claimed) < sum(len(entry.names) for entry in entries):
        raise errors.CanonicalError("one parameter has two inputs")
    expected = [name for n, entry in enumerate(entries) for name in entry.tensors(n)]
    unpaired = sorted(set(expected) ^ opened.file.by_name.keys())
    if unpaired:
        error = errors.MissingFieldError if unpaired[0] in expected else errors.UnknownFieldError
        raise error(f"the tensor {unpaired[0]!r}")
    if [t.name for t in opened.file.tensors] != expected:
        raise errors.CanonicalError("the tensors are not in the order of their inputs")

    @lru_cache(maxsize=_CACHED)
    def load(n: int) -> Moment:
        try:
            moment = _moment(opened, n, entries[n])
        except LrcError as error:
            raise error.at(opened.file.path) from None
        opened.file.check_unchanged()
        return moment

    inputs = tuple(Input(entry.names, entry.expert, entry.width, entry.tokens) for entry in entries)
    return InputStatistics(inputs, load, manifest.base, manifest.data, manifest.tokens, manifest.families)


def _moment(opened: _Opened, n: int, entry: _Entry) -> Moment:
    """The moment of input `n`. Raises E-VALUE for numbers that no second moment has."""
    width = entry.width
    if entry.form == "exact":
        triangle = opened.tensor(f"triangle.{n}", "F32", (width * (width + 1) // 2,))
        matrix = np.zeros((width, width), np.float32)
        matrix[np.triu_indices(width)] = triangle
        matrix += np.triu(matrix, 1).T
        moment = Moment(entry.tokens, matrix=matrix)
    else:
        rows = opened.tensor(f"sketch.{n}", "F32", (entry.rank, width)) if entry.form == "sketch" else None
        moment = Moment(entry.tokens, diagonal=opened.tensor(f"diagonal.{n}", "F32", (width,)), rows=rows)
    stored = moment.matrix if moment.matrix is not None else moment.rows
    finite = stored is None or bool(np.isfinite(stored).all())
    if not finite or not np.isfinite(moment.squares).all() or bool((moment.squares < 0).any()):
        raise errors.ValueRangeError(f"the moment of {entry.names[0]!r} has NaN, infinity or a negative square")
    return moment


# --- half-done work -------------------------------------------------------------------------------------------------


def write_partial(
    path: Path, notes: Mapping[str, Any], arrays: Iterable[tuple[str, str, Array]], key: str = PARTIAL_KEY
) -> None:
    """Write unfinished sums, atomically, over the last ones; under another `key`, other unfinished work."""
    ordered = sorted(arrays, key=lambda entry: (-STORAGE[entry[1]].itemsize, entry[0]))
    _write(key, path, {"version": VERSION, **notes}, ordered, overwrite=True)


def read_partial(path: Path, key: str = PARTIAL_KEY) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return (notes, arrays) that `write_partial` kept, every digest checked."""
    opened = _open(key, path)
    with opened.file as file:
        return opened.manifest, {t.name: opened.tensor(t.name, t.dtype, t.shape) for t in file.tensors}
