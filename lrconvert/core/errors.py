"""One exception per rule, each with a stable code.

Every refusal is one line: ``CODE: file: what is wrong. What to do.`` Scripts match on the code, people read the rest.
Codes are never renamed or reused; ``formats/errors.md`` lists them and a test keeps that page and this module equal.
"""

from __future__ import annotations

from os import PathLike, fspath
from typing import ClassVar

from lrconvert.core.redaction import redacted

EXIT_REFUSED = 1


def printable(text: str, limit: int = 300) -> str:
    """Return `text` safe for a terminal: control and bidirectional characters are escaped, long text is cut.

    Names and metadata come from files of strangers and must not move the cursor, recolour the screen or reorder
    what a person reads.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


class LrcError(Exception):
    """The base of all errors that lrconvert raises on purpose.

    Parameters: `what` is wrong (no final period), `fix` tells what to do, `path` names the file. A caller that knows
    the file adds it with `at`. Secrets in URLs are cut out of all three.
    """

    code: ClassVar[str] = "E-LRC"

    def __init_subclass__(cls, code: str = "E-LRC") -> None:
        cls.code = code

    def __init__(self, what: str, *, fix: str = "", path: str | PathLike[str] | None = None) -> None:
        self.what = redacted(what)
        self.fix = redacted(fix)
        self.path = None if path is None else redacted(fspath(path))
        super().__init__(self.what)

    def at(self, path: str | PathLike[str]) -> LrcError:
        """Name the file, unless one is named already, and return the error."""
        if self.path is None:
            self.path = redacted(fspath(path))
        return self

    def __str__(self) -> str:
        where = f"{printable(self.path)}: " if self.path else ""
        advice = f". {printable(self.fix[0].upper() + self.fix[1:], 600)}" if self.fix else ""
        return f"{self.code}: {where}{printable(self.what, 1200)}{advice}"


# --- files and containers -------------------------------------------------------------------------------------------


class FileKindError(LrcError, code="E-IO-KIND"):
    """The path is missing, not a regular file, or too short to be a container."""


class FileChangedError(LrcError, code="E-IO-CHANGED"):
    """A file changed while it was being read."""


class FileReadError(LrcError, code="E-IO-READ"):
    """The operating system refused a read or ended it early."""


class FileWriteError(LrcError, code="E-IO-WRITE"):
    """The operating system refused a write; nothing was committed."""


class DurabilityError(LrcError, code="E-IO-SYNC"):
    """The new file is in place, but the system did not confirm that it would survive a power loss."""


class LockedError(LrcError, code="E-LOCKED"):
    """Another run is writing there, or the file system has no locks."""


class UnfinishedError(LrcError, code="E-UNFINISHED"):
    """A merge or unmerge in place was broken off: part of the weights are changed."""


class OutputExistsError(LrcError, code="E-OUT-EXISTS"):
    """The output exists and was not to be replaced."""


class OutputPathError(LrcError, code="E-OUT-PATH"):
    """The output path is a link, a directory, or one of the inputs."""


class DiskSpaceError(LrcError, code="E-OUT-SPACE"):
    """The disk has less free space than the output needs."""


class HeaderLengthError(LrcError, code="E-HDR-LEN"):
    """The container's header length is zero, larger than the file, or larger than the limit."""


class HeaderTextError(LrcError, code="E-HDR-TEXT"):
    """The header is not plain UTF-8 JSON that begins with ``{``."""


class JsonDuplicateError(LrcError, code="E-JSON-DUP"):
    """A JSON object names a key twice."""


class JsonNumberError(LrcError, code="E-JSON-NUM"):
    """A JSON number is outside what the format allows (floats, NaN, Infinity, -0, beyond 2^53 - 1)."""


class JsonDepthError(LrcError, code="E-JSON-DEPTH"):
    """JSON is nested deeper than the limit."""


class JsonSyntaxError(LrcError, code="E-JSON-SYNTAX"):
    """The text is not JSON, or has a type where the format has another."""


class OffsetError(LrcError, code="E-OFF"):
    """Tensor offsets overlap, leave holes, run backwards or leave the file."""


class CoverageError(LrcError, code="E-OFF-COVER"):
    """Bytes follow the last tensor, or the last tensor ends beyond the file."""


class ShapeError(LrcError, code="E-SHAPE"):
    """A shape is negative, empty, too large, or has too many dimensions."""


class DtypeError(LrcError, code="E-DTYPE"):
    """A dtype is unknown, not allowed here, or disagrees with the byte count."""


class TensorNameError(LrcError, code="E-NAME"):
    """A tensor or file name is empty, too long or has forbidden characters."""


class LimitError(LrcError, code="E-LIMIT"):
    """A declared size is over a limit; refused before anything was allocated."""


class ShardPathError(LrcError, code="E-PATH"):
    """A shard index names a path that leaves its folder, or a file that is not a plain shard."""


class ShardIndexError(LrcError, code="E-INDEX-MAP"):
    """A shard index and its shards disagree."""


class PickleError(LrcError, code="E-PICKLE"):
    """The file is a pickle; loading it can run code."""


# --- the lrconvert format -------------------------------------------------------------------------------------------


class VersionError(LrcError, code="E-VER"):
    """The container, a method or a required feature is newer than this program, or is none we know."""


class UnknownFieldError(LrcError, code="E-UNKNOWN"):
    """The manifest has a field, or the file a tensor, that the format does not define."""


class MissingFieldError(LrcError, code="E-MISSING"):
    """The manifest lacks a field, or the file a tensor, that the format requires."""


class CanonicalError(LrcError, code="E-CANON"):
    """The bytes are not the one canonical spelling of their content."""


class DigestError(LrcError, code="E-DIGEST"):
    """A stored digest does not match the bytes."""


class ValueRangeError(LrcError, code="E-VALUE"):
    """A stored value is NaN, infinite or outside its range."""


class IndexRangeError(LrcError, code="E-INDEX"):
    """An index points outside what it indexes, or repeats where it must not."""


# --- adapters -------------------------------------------------------------------------------------------------------


class UnknownLayoutError(LrcError, code="E-LAYOUT"):
    """No reader recognises the input."""


class NotLoraError(LrcError, code="E-NOT-LORA"):
    """The adapter is of another kind whose update is not scale * B @ A."""


class UnsupportedLoraError(LrcError, code="E-LORA-FEATURE"):
    """A LoRA feature that this version does not convert; dropping it would change the model."""


class ConfigError(LrcError, code="E-CONFIG"):
    """The adapter's configuration is missing, unreadable or contradicts itself."""


class PatternError(LrcError, code="E-PATTERN"):
    """A pattern of the configuration is too long or too complex to be evaluated safely."""


class PairError(LrcError, code="E-PAIR"):
    """One half of a LoRA pair is missing, or the halves disagree in shape."""


class EmptyAdapterError(LrcError, code="E-EMPTY"):
    """There is nothing to convert."""


class TensorUnknownError(LrcError, code="E-TENSOR"):
    """A tensor of the input has no known meaning; it would have been dropped."""


# --- meeting a base -------------------------------------------------------------------------------------------------


class BaseError(LrcError, code="E-BASE"):
    """A target does not fit the base: missing, ambiguous, or of another shape."""


class OrientationError(LrcError, code="E-ORIENT"):
    """A square weight may be stored either way round and nothing decides it."""


class FingerprintError(LrcError, code="E-FPR"):
    """The base is not the one that the file was made for."""


class QuantizedBaseError(LrcError, code="E-BASE-QUANT"):
    """The base is stored quantized."""


class PlacementError(LrcError, code="E-PLACE"):
    """A tensor that the adapter carries has no place in the output, or the output would not load."""


class NoEffectError(LrcError, code="E-NO-EFFECT"):
    """The adapter would change nothing."""


class AttachError(LrcError, code="E-ATTACH"):
    """A live model cannot take the adapter, or has none of that name."""


class UndoError(LrcError, code="E-UNDO"):
    """The record of a merge is missing, incomplete or damaged, so the merge cannot be undone with it."""


class UndoOrderError(LrcError, code="E-UNDO-ORDER"):
    """Another merge was made on top of the one that is to be undone."""


class StatisticsError(LrcError, code="E-STATS"):
    """Input statistics do not fit the adapter, the base or the data."""


class DataError(LrcError, code="E-DATA"):
    """Texts or batches that a model cannot read, or from which nothing can be measured."""


class MergeOverflowError(LrcError, code="E-OVERFLOW"):
    """A merged value is beyond the range of the base's dtype."""


# --- asking for something impossible --------------------------------------------------------------------------------


class BudgetError(LrcError, code="E-BUDGET"):
    """The requested size cannot be reached; the message names the smallest size that can, `smallest` in bytes."""

    def __init__(self, what: str, *, fix: str = "", path: str | PathLike[str] | None = None, smallest: int = 0) -> None:
        super().__init__(what, fix=fix, path=path)
        self.smallest = smallest


class ArgumentError(LrcError, TypeError, code="E-ARGUMENT"):
    """An argument of a verb is of a kind that it does not take, or arguments are swapped."""


class OptionError(LrcError, code="E-OPTION"):
    """Options contradict each other or do not apply to this adapter."""


class ExportError(LrcError, code="E-EXPORT"):
    """The target format cannot express this adapter."""


class AccessError(LrcError, code="E-ACCESS"):
    """A store at a URL refuses the credentials that its driver has, or there are none."""


class RemoteError(FileReadError, code="E-REMOTE"):
    """A store at a URL did not answer, or failed, however often it was asked; a later run may go well."""

    def __init__(
        self, what: str, *, fix: str = "", path: str | PathLike[str] | None = None, status: int | None = None
    ) -> None:
        super().__init__(what, fix=fix, path=path)
        self.status = status


class HubError(LrcError, code="E-HUB"):
    """The Hugging Face Hub refused, could not be reached, or is switched off by HF_HUB_OFFLINE."""


class WorkerError(LrcError, code="E-WORKER"):
    """A process that converts one of many adapters ended, an executor works no more, or an error is none of these."""


class DependencyError(LrcError, code="E-DEPENDENCY"):
    """An optional dependency is not installed."""


def all_errors() -> list[type[LrcError]]:
    """Return every rule, in the order of this page."""
    return [v for v in globals().values() if isinstance(v, type) and issubclass(v, LrcError) and v is not LrcError]
