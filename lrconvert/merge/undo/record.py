"""The fields of record.json: what became of every tensor and file of a base that adapters were merged into.

Normative text: ``formats/undo-v1.md``, sections 2 and 3. A record may come from a stranger: `parse` checks every value
before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from lrconvert.core.dtypes import itemsize
from lrconvert.core.errors import MissingFieldError, UndoError, UnknownFieldError
from lrconvert.io import fields
from lrconvert.io.checkpoint import INDEX_NAMES
from lrconvert.io.fields import Hex, Whole
from lrconvert.lora.adapter import USES, Use, View
from lrconvert.merge.plan.plan import CONFIG_NAME
from lrconvert.merge.plan.updates import Piece
from lrconvert.merge.signed_json import HexFloat, sign, verify

FORMAT = "lrconvert-undo"
VERSIONS = (1, 2)
CODES_NAME = "undo.bin"
RESIDUAL, XOR, STORED, UNCERTAIN = 0, 1, 2, 3
PREDICTED = (RESIDUAL, UNCERTAIN)  # these start from what an update predicts
CODE_ELEMENTS = 1 << 23  # of one code, unless a single row has more; bytes where they are stored
TEXTS = (CONFIG_NAME, *INDEX_NAMES)

WEIGHT_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,240}\.safetensors"
_WEIGHTS = fields.matches(WEIGHT_NAME, "a plain name of a weight file", UndoError)


class Code(NamedTuple):
    """The undo code of `length` rows from `first` on; of bytes in place of rows where `mode` is STORED."""

    first: Whole
    length: Whole
    mode: Whole
    nbytes: Whole


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the base, and what became of it: the tensor `output` of the merged model ("": left out).

    `before` and `after` are digests. `codes` begin at `offset` of undo.bin, one after the other, and see the tensor as
    a matrix with `cols` columns (0 where bytes are stored). Without codes the bytes are the same in both.
    """

    name: str
    dtype: str
    shape: tuple[Whole, ...]
    before: Hex
    output: str = ""
    after: Hex = ""
    cols: Whole | None = None
    offset: Whole | None = None
    codes: tuple[Code, ...] = ()
    pieces: tuple[Piece, ...] = ()


class TargetEntry(NamedTuple):
    """A target of a LoRA: its factors are tensors of the adapter's file."""

    name: str
    shape: tuple[Whole, ...]
    view: str
    scale: HexFloat


class ExtraEntry(NamedTuple):
    """An extra tensor of a LoRA."""

    name: str
    use: Annotated[Use, fields.one_of(USES, UndoError)]


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter of the merge; `targets` and `extras` are those of a LoRA whose file is in the record."""

    kind: Annotated[str, fields.one_of(("lora", "compact"), UndoError)]
    name: str
    scale: HexFloat
    source: str
    sha256: Hex
    targets: tuple[TargetEntry, ...] | None = None
    extras: tuple[ExtraEntry, ...] | None = None

    def file_name(self, number: int) -> str:
        """Return the name that its file has in the record as adapter `number`."""
        return f"adapter-{number}.{'lrc' if self.kind == 'compact' else 'safetensors'}"


class WeightFile(NamedTuple):
    """A weight file of the base, with the bytes of its data."""

    name: Annotated[str, _WEIGHTS]
    nbytes: Whole


@dataclass(frozen=True)
class Record:
    """One merge. `files` are the base's weight files in order, `texts` its small files that are kept, `others` the
    digests of those that were copied, `added` those of tensors that the base does not have, `stored` those of the
    record's own files. `content` is the digest of all of the base's tensors. Without `can_undo` there are no codes and
    no adapters' files."""

    number: Whole
    can_undo: bool
    content: Hex
    adapters: tuple[AdapterEntry, ...]
    tensors: tuple[TensorRecord, ...]
    added: Mapping[str, Hex]
    files: tuple[WeightFile, ...]
    texts: tuple[Annotated[str, fields.one_of(TEXTS, UndoError)], ...]
    others: Mapping[str, Hex]
    stored: Mapping[str, Hex]


def encode(record: Record) -> bytes:
    """Return the bytes of record.json."""
    return sign({"format": FORMAT, "version": _version(record), **fields.as_json(record)})


def _version(record: Record) -> int:
    """Return the least version that has all modes of the record's codes."""
    return max(VERSIONS) if any(c.mode == UNCERTAIN for t in record.tensors for c in t.codes) else min(VERSIONS)


def parse(data: bytes) -> Record:
    """Return the record whose record.json is `data`. Raises E-VER, E-DIGEST, E-UNDO and what `fields.read` raises."""
    record = fields.read(Record, verify(data, "the record", FORMAT, VERSIONS), "the record")
    if len({t.name for t in record.tensors}) < len(record.tensors):
        raise UndoError("the record describes a tensor twice")
    for entry in record.adapters:
        _check_adapter(entry, record.can_undo)
    for tensor in record.tensors:
        check_tensor(tensor, len(record.adapters))
    if len({file.name for file in record.files}) < len(record.files):
        raise UndoError("the record names a weight file twice")
    expected = {f"base/{n}.header" for n in range(len(record.files))} | {f"base/{name}" for name in record.texts}
    if record.can_undo:
        expected |= {CODES_NAME, *(entry.file_name(n) for n, entry in enumerate(record.adapters))}
    if set(record.stored) != expected:
        raise UndoError("the record does not list exactly its files")
    if encode(record) != data:
        raise UndoError("the record has another version than its codes ask for")
    return record


def _check_adapter(entry: AdapterEntry, has_file: bool) -> None:
    """Raise E-MISSING or E-UNKNOWN unless a LoRA with a file, and only such a one, lists its tensors; E-SHAPE for views
    that do not apply."""
    if entry.kind == "lora" and has_file:
        if entry.targets is None or entry.extras is None:
            raise MissingFieldError("a LoRA of the record lacks the fields 'targets' and 'extras'")
        for target in entry.targets:
            View(target.view).matrix_shape(target.shape)
    elif entry.targets is not None or entry.extras is not None:
        raise UnknownFieldError("an adapter of the record has tensors without a file")


def check_tensor(tensor: TensorRecord, adapters: int) -> None:
    """Raise E-UNDO unless the entry of a tensor agrees with itself, in a record of so many adapters."""
    if bool(tensor.output) != bool(tensor.after):
        raise UndoError(f"the tensor {tensor.name!r} of the record has a new name without a digest, or the reverse")
    if any(piece.adapter >= adapters for piece in tensor.pieces):
        raise UndoError(f"a piece of {tensor.name!r} is of an adapter that the record does not have")
    if not _codes_fit(tensor):
        raise UndoError(f"the codes of {tensor.name!r} do not fit its shape")


def _codes_fit(t: TensorRecord) -> bool:
    """True if codes rise inside the tensor, each of a size that is read at once, and pieces lie in it."""
    size, modes = math.prod(t.shape), {code.mode for code in t.codes}
    if not modes:
        return not t.pieces
    if modes == {STORED}:
        unit, stop, most = 1, size * itemsize(t.dtype), CODE_ELEMENTS
    elif not modes <= {*PREDICTED, XOR} or not t.cols or size % t.cols or not t.output:
        return False
    else:
        unit, stop, most = t.cols, size // t.cols, max(1, CODE_ELEMENTS // t.cols)
    end = 0
    for code in t.codes:
        if code.first < end or not 1 <= code.length <= most or code.first + code.length > stop:
            return False
        end = code.first + code.length
    pieces_fit = all(piece.cols == unit and piece.start < piece.stop <= stop for piece in t.pieces)
    return pieces_fit and (bool(t.pieces) or modes.isdisjoint(PREDICTED))
