"""A job of a batch and its outcome: small, frozen, and made to be pickled, since any executor may carry them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lrconvert.io.checkpoint import KnownContent

State = Literal["done", "skipped", "failed"]
Verb = Literal["convert", "compress", "allocate"]
SHIP, DO_NOT_SHIP = "ship", "do not ship"


@dataclass(frozen=True)
class Work:
    """The work done on every adapter of a batch: a `verb` with its `method`, and its `options` by their names, as JSON
    holds them. Options that are left out have their defaults.

    `reading` says how an adapter is read, as `load` takes it. `inputs` are the digests of what options name by a path,
    and `base_content` those of the base: taken once for a batch, or by each job where they are not given. `is_command`:
    messages speak of flags; `verbose`: the outcome has the report as text.
    """

    verb: Verb
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    reading: Mapping[str, Any] = field(default_factory=dict)
    overwrite: bool = False
    inputs: Mapping[str, str] | None = None
    base_content: KnownContent | None = None
    verbose: bool = False
    is_command: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter to work on: `source` is its path, hub id or URL, `output` the file to write, a path or a URL, or ""
    to plan only. Paths are absolute where another process works in another folder. `shown` is what messages and
    outcomes call the source, if that is not `source`; `source_digest`, where it is known, what its files must have.
    """

    source: str
    output: str
    work: Work
    shown: str = ""
    source_digest: str = ""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one adapter. `nbytes` (without extra tensors), `total_bytes`, `captured`, `ratio` and how many
    modules were `dropped` are None where they are not known; `verdict`, of `compress` alone, is "ship", "do not ship",
    or "" where it is not known; `code` and `message` say why it failed; `report` is the JSON object of one
    conversion.

    `source_digest` and `output_digest` are sha256 of the adapter's files and of the file written, "" where they were
    not read; `stamps` the states of both for a later run; `seconds` and `worker` (host and process) say where the work
    was done and how long it took. These do not count where outcomes are compared.
    """

    source: str
    output: str
    state: State
    nbytes: int | None = None
    total_bytes: int | None = None
    captured: float | None = None
    ratio: float | None = None
    dropped: int | None = None
    verdict: str = ""
    warnings: tuple[str, ...] = ()
    code: str = ""
    message: str = ""
    report: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    method: str = field(default="", compare=False)
    source_digest: str = field(default="", compare=False)
    output_digest: str = field(default="", compare=False)
    stamps: tuple[str, str] | None = field(default=None, compare=False)
    seconds: float | None = field(default=None, compare=False)
    worker: str = field(default="", compare=False)
