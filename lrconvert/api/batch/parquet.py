"""Manifests as Parquet, where pyarrow is installed: jobs are read from one, and records are written as one.

Parquet cannot be appended to. So a batch whose jobs come from ``JOBS.parquet`` keeps its manifest in ``JOBS.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from lrconvert.api.batch.manifest import COLUMNS, Asked, Manifest, Record
from lrconvert.core.errors import (
    DependencyError,
    FileReadError,
    JsonSyntaxError,
    MissingFieldError,
    OptionError,
    UnknownFieldError,
)
from lrconvert.io import fields
from lrconvert.io.durable import appended, atomic_file

SUFFIX = ".parquet"
LEFT = "left"  # the state, in a table, of a job that is not done yet
_ROWS = 10_000  # at once
_ASKED = ("source", "output", "digest")
_INTEGERS = ("bytes", "adapter_bytes", "dropped")
_NUMBERS = ("captured", "ratio", "seconds")


def is_parquet(path: Path) -> bool:
    """Return true if a manifest is Parquet, by its name."""
    return path.suffix.lower() == SUFFIX


def read(path: Path) -> list[Record | Asked]:
    """Return the rows of a table of records, of a job that is asked for as that. Raises E-DEPENDENCY without pyarrow,
    E-IO-READ, E-MISSING and E-UNKNOWN for columns, and what is wrong with a value."""
    lines: list[Record | Asked] = []
    for number, whole in enumerate(_rows(path), 1):
        row = {name: value for name, value in whole.items() if value is not None}
        if row.get("state", LEFT) == LEFT:
            job = {name: value for name, value in row.items() if name in _ASKED}
            lines.append(fields.read(Asked, job, f"row {number}"))
        else:
            lines.append(fields.read(Record, row, f"row {number}"))
    return lines


def write(lines: Iterable[Record | Asked], path: Path, overwrite: bool) -> int:
    """Write records, and jobs that are not done yet, as a table: Parquet, or JSON lines, as its name ends. Returns the
    number of rows. Raises E-DEPENDENCY without pyarrow, E-OPTION for another name, E-OUT-*."""
    if path.suffix == ".jsonl":
        rows = 0
        with atomic_file(path, overwrite=overwrite) as file:
            for rows, line in enumerate(lines, 1):  # noqa: B007
                row = {name: value for name, value in asdict(line).items() if value not in (None, "")}
                file.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")
        return rows
    if not is_parquet(path):
        raise OptionError(f"the table {path.name!r:.80} is neither .parquet nor .jsonl", fix="name it so")
    arrow = _pyarrow()
    kinds = {**dict.fromkeys(_INTEGERS, arrow.int64()), **dict.fromkeys(_NUMBERS, arrow.float64())}
    schema = arrow.schema([(name, kinds.get(name, arrow.string())) for name in COLUMNS])
    whole = [{"state": LEFT, **{name: value for name, value in asdict(line).items() if value != ""}} for line in lines]
    sink = arrow.BufferOutputStream()
    arrow.parquet.write_table(arrow.Table.from_pylist(whole, schema=schema), sink)
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(sink.getvalue())
    return len(whole)


def as_lines(path: Path) -> Path:
    """Return the JSON lines that stand for a table of jobs, beside it: jobs that they do not have are appended. Raises
    what `read` raises."""
    lines = path.with_suffix(".jsonl")
    known = Manifest(lines, asks=True) if lines.exists() else None
    had = set() if known is None else {known.job(number).output for number in range(len(known))}
    text = []
    for row in _rows(path):
        job = {name: row[name] for name in _ASKED if row.get(name) is not None}
        if (asked := fields.read(Asked, job, "a row")).output not in had:
            text.append(json.dumps(fields.as_json(asked), separators=(",", ":")) + "\n")
    if known is not None:
        known.close()
    if text:
        appended(lines, "".join(text).encode())
    return lines


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table that may be a manifest."""
    arrow = _pyarrow()
    try:
        with arrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if missing := [name for name in ("source", "output") if name not in names]:
                raise MissingFieldError(f"the table has no column {missing[0]!r}", path=path)
            if unknown := [name for name in names if name not in COLUMNS]:
                what = f"the table has the column {unknown[0]!r:.80}, which no manifest has"
                raise UnknownFieldError(what, fix=f"leave it out; known: {', '.join(COLUMNS)}", path=path)
            for batch in table.iter_batches(_ROWS):
                yield from batch.to_pylist()
    except arrow.ArrowInvalid as error:
        raise JsonSyntaxError(f"is no Parquet file: {str(error).splitlines()[0]:.200}", path=path) from None
    except OSError as error:
        raise FileReadError(f"cannot be read: {error.strerror or error}", path=path) from None


def _pyarrow() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        fix = "pip install pyarrow, or write JSON lines"
        raise DependencyError("a manifest as Parquet needs pyarrow", fix=fix) from None
    whole: ModuleType = pyarrow
    return whole
