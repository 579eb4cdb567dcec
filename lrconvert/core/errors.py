"""One exception per rule, each with a stable code.

Every refusal is one line: ``CODE: file: what is wrong. What to do.`` Scripts match on the code, people read the rest.
Codes are never renamed or reused; ``formats/errors.md`` lists them and a test keeps that page and this module equal.
"""

from __future__ import annotations

from os import PathLike, fspath
from typing import ClassVar

EXIT_REFUSED = 1
EXIT_USAGE = 2


def printable(text: str, limit: int = 300) -> str:
    """`text` safe for a terminal: control and bidirectional characters are escaped, long text is cut.

    Names and metadata come from files of strangers and must not move the cursor, recolour the screen or reorder
    what a person reads.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


class LrcError(Exception):
    """Base of everything lrconvert raises on purpose.

    Parameters: `what` is wrong (no final period), `fix` tells what to do, `path` names the file. A caller that knows
    the file adds it with `at`.
    """

    code: ClassVar[str] = "E-LRC"

    def __init__(self, what: str, *, fix: str = "", path: str | PathLike[str] | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix
        self.path = None if path is None else fspath(path)

    def at(self, path: str | PathLike[str]) -> LrcError:
        """The same error with the file named, unless one is named already."""
        if self.path is None:
            self.path = fspath(path)
        return self

    def __str__(self) -> str:
        where = f"{printable(self.path)}: " if self.path else ""
        advice = f". {printable(self.fix[0].upper() + self.fix[1:], 600)}" if self.fix else ""
        return f"{self.code}: {where}{printable(self.what, 1200)}{advice}"


# --- files and containers -------------------------------------------------------------------------------------------


class FileKindError(LrcError):
    """The path is missing, not a regular file, or too short to be a container."""

    code = "E-IO-KIND"


class FileChangedError(LrcError):
    """A file changed while it was being read."""

    code = "E-IO-CHANGED"


class FileReadError(LrcError):
    """The operating system refused a read or ended it early."""

    code = "E-IO-READ"


class FileWriteError(LrcError):
    """The operating system refused a write; nothing was committed."""

    code = "E-IO-WRITE"


class DurabilityError(LrcError):
    """The new file is in place, but the system did not confirm that it would survive a power loss."""

    code = "E-IO-SYNC"


class LockedError(LrcError):
    """Another run is writing there, or the file system has no locks."""

    code = "E-LOCKED"


class UnfinishedError(LrcError):
    """A merge or unmerge in place was broken off: part of the weights are changed."""

    code = "E-UNFINISHED"


class OutputExistsError(LrcError):
    """The output exists and `--overwrite` was not given."""

    code = "E-OUT-EXISTS"


class OutputPathError(LrcError):
    """The output path is a link, a directory, or one of the inputs."""

    code = "E-OUT-PATH"


class DiskSpaceError(LrcError):
    """The disk has less free space than the output needs."""

    code = "E-OUT-SPACE"


class HeaderLengthError(LrcError):
    """The container's header length is zero, larger than the file, or larger than the limit."""

    code = "E-HDR-LEN"


class HeaderTextError(LrcError):
    """The header is not plain UTF-8 JSON that begins with ``{``."""

    code = "E-HDR-TEXT"


class JsonDuplicateError(LrcError):
    """A JSON object names a key twice."""

    code = "E-JSON-DUP"


class JsonNumberError(LrcError):
    """A JSON number is outside what the format allows (floats, NaN, Infinity, -0, beyond 2^53 - 1)."""

    code = "E-JSON-NUM"


class JsonDepthError(LrcError):
    """JSON is nested deeper than the limit."""

    code = "E-JSON-DEPTH"


class JsonSyntaxError(LrcError):
    """The text is not JSON, or has a type where the format has another."""

    code = "E-JSON-SYNTAX"


class OffsetError(LrcError):
    """Tensor offsets overlap, leave holes, run backwards or leave the file."""

    code = "E-OFF"


class CoverageError(LrcError):
    """Bytes follow the last tensor, or the last tensor ends beyond the file."""

    code = "E-OFF-COVER"


class ShapeError(LrcError):
    """A shape is negative, empty, too large, or has too many dimensions."""

    code = "E-SHAPE"


class DtypeError(LrcError):
    """A dtype is unknown, not allowed here, or disagrees with the byte count."""

    code = "E-DTYPE"


class TensorNameError(LrcError):
    """A tensor or file name is empty, too long or has forbidden characters."""

    code = "E-NAME"


class LimitError(LrcError):
    """A declared size is over a limit; refused before anything was allocated."""

    code = "E-LIMIT"


class ShardPathError(LrcError):
    """A shard index names a path that leaves its folder, or a file that is not a plain shard."""

    code = "E-PATH"


class ShardIndexError(LrcError):
    """A shard index and its shards disagree."""

    code = "E-INDEX-MAP"


class PickleError(LrcError):
    """The file is a pickle; loading it can run code."""

    code = "E-PICKLE"


# --- the lrconvert format -------------------------------------------------------------------------------------------


class VersionError(LrcError):
    """The container, a method or a required feature is newer than this program, or is none we know."""

    code = "E-VER"


class UnknownFieldError(LrcError):
    """The manifest has a field, or the file a tensor, that the format does not define."""

    code = "E-UNKNOWN"


class MissingFieldError(LrcError):
    """The manifest lacks a field, or the file a tensor, that the format requires."""

    code = "E-MISSING"


class CanonicalError(LrcError):
    """The bytes are not the one canonical spelling of their content."""

    code = "E-CANON"


class DigestError(LrcError):
    """A stored digest does not match the bytes."""

    code = "E-DIGEST"


class ValueRangeError(LrcError):
    """A stored value is NaN, infinite or outside its range."""

    code = "E-VALUE"


class IndexRangeError(LrcError):
    """An index points outside what it indexes, or repeats where it must not."""

    code = "E-INDEX"


# --- adapters -------------------------------------------------------------------------------------------------------


class UnknownLayoutError(LrcError):
    """No reader recognises the input."""

    code = "E-LAYOUT"


class NotLoraError(LrcError):
    """The adapter is of another kind whose update is not scale * B @ A."""

    code = "E-NOT-LORA"


class UnsupportedLoraError(LrcError):
    """A LoRA feature that this version does not convert; dropping it would change the model."""

    code = "E-LORA-FEATURE"


class ConfigError(LrcError):
    """The adapter's configuration is missing, unreadable or contradicts itself."""

    code = "E-CONFIG"


class PatternError(LrcError):
    """A pattern of the configuration is too long or too complex to be evaluated safely."""

    code = "E-PATTERN"


class PairError(LrcError):
    """One half of a LoRA pair is missing, or the halves disagree in shape."""

    code = "E-PAIR"


class EmptyAdapterError(LrcError):
    """There is nothing to convert."""

    code = "E-EMPTY"


class TensorUnknownError(LrcError):
    """A tensor of the input has no known meaning; it would have been dropped."""

    code = "E-TENSOR"


# --- meeting a base -------------------------------------------------------------------------------------------------


class BaseError(LrcError):
    """A target does not fit the base: missing, ambiguous, or of another shape."""

    code = "E-BASE"


class OrientationError(LrcError):
    """A square weight may be stored either way round and nothing decides it."""

    code = "E-ORIENT"


class FingerprintError(LrcError):
    """The base is not the one that the file was made for."""

    code = "E-FPR"


class QuantizedBaseError(LrcError):
    """The base is stored quantized."""

    code = "E-BASE-QUANT"


class PlacementError(LrcError):
    """A tensor that the adapter carries has no place in the output."""

    code = "E-PLACE"


class NoEffectError(LrcError):
    """The adapter would change nothing."""

    code = "E-NO-EFFECT"


class AttachError(LrcError):
    """A live model cannot take the adapter, or has none of that name."""

    code = "E-ATTACH"


class UndoError(LrcError):
    """The record of a merge is missing, incomplete or damaged, so the merge cannot be undone with it."""

    code = "E-UNDO"


class UndoOrderError(LrcError):
    """Another merge was made on top of the one that is to be undone."""

    code = "E-UNDO-ORDER"


class StatisticsError(LrcError):
    """Input statistics do not fit the adapter, the base or the data."""

    code = "E-STATS"


class DataError(LrcError):
    """Texts or batches that a model cannot read, or from which nothing can be measured."""

    code = "E-DATA"


class MergeOverflowError(LrcError):
    """A merged value is beyond the range of the base's dtype."""

    code = "E-OVERFLOW"


# --- asking for something impossible --------------------------------------------------------------------------------


class BudgetError(LrcError):
    """The requested size cannot be reached; the message names the smallest size that can."""

    code = "E-BUDGET"


class OptionError(LrcError):
    """Options contradict each other or do not apply to this adapter."""

    code = "E-OPTION"


class ExportError(LrcError):
    """The target format cannot express this adapter."""

    code = "E-EXPORT"


class WorkerError(LrcError):
    """A process that converts one of many adapters ended, or met an error that is none of these."""

    code = "E-WORKER"


class DependencyError(LrcError):
    """An optional dependency is not installed."""

    code = "E-DEPENDENCY"


def all_errors() -> list[type[LrcError]]:
    """Every rule, in the order of this page."""
    return [v for v in globals().values() if isinstance(v, type) and issubclass(v, LrcError) and v is not LrcError]
