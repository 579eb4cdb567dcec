"""Rows of files of text: JSON lines, a JSON list, CSV and TSV, read as they come, whatever the size of the file."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lrconvert.core.errors import DataError
from lrconvert.live.texts import columnar

_CHUNK = 1 << 16  # characters
_LONGEST_CELL = 1 << 27
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Row:
    """A row: its number, counted from 1, and its columns; or in `why` what is wrong with it."""

    number: int
    fields: Mapping[str, Any] | None
    why: str = ""


def unit(path: Path) -> str:
    """Return what the rows of a file are counted in."""
    return "row" if path.suffix in columnar.SUFFIXES or path.suffix == ".json" else "line"


def rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file whose suffix is in `SUFFIXES`. Raises E-DATA."""
    if path.suffix in columnar.SUFFIXES:
        for number, fields in enumerate(columnar.rows(path), 1):
            yield Row(number, fields)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="" if path.suffix in _DELIMITED else None) as handle:
            yield from _READERS[path.suffix](handle, path)
    except UnicodeDecodeError:
        raise DataError("is not UTF-8 text", path=path) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=path) from None


# --- JSON -----------------------------------------------------------------------------------------------------------


def _json_lines(handle: TextIO, path: Path) -> Iterator[Row]:
    for number, line in enumerate(handle, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                yield Row(number, None, "is not JSON")
                continue
            yield _row(number, value)


def _json(handle: TextIO, path: Path) -> Iterator[Row]:
    """Rows of a list, or of JSON lines under another name."""
    start = ""
    while not start.strip() and (line := handle.readline()):
        start = line
    handle.seek(0)
    if not start.lstrip().startswith("["):
        yield from _json_lines(handle, path)
        return
    for number, value in enumerate(_elements(handle, path), 1):
        yield _row(number, value)


def _row(number: int, value: Any) -> Row:
    return Row(number, value) if isinstance(value, dict) else Row(number, None, "is no JSON object")


def _elements(handle: TextIO, path: Path) -> Iterator[Any]:
    """Yield the elements of a JSON list; of the file there is never more in memory than an element and a chunk."""
    buffer = _Buffer(handle, path)
    buffer.take("[")
    if buffer.next() == "]":
        return
    while True:
        yield buffer.value()
        if buffer.next() == "]":
            buffer.take("]")
            break
        buffer.take(",")
    if buffer.next(at_end=True):
        raise DataError("goes on after the end of its list", path=path)


class _Buffer:
    """The part of a JSON text that is in memory, and how far it has been read."""

    def __init__(self, handle: TextIO, path: Path) -> None:
        self.handle, self.path = handle, path
        self.text, self.at, self.values = "", 0, 0

    def next(self, at_end: bool = False) -> str:
        """Return the next character that is no space, without taking it."""
        while True:
            match = _SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            self.text, self.at = self.handle.read(_CHUNK), 0
            if not self.text:
                if at_end:
                    return ""
                raise DataError(f"ends within its list, after row {self.values}", path=self.path)

    def take(self, expected: str) -> None:
        if self.next() != expected:
            raise DataError(f"is no JSON list: after row {self.values} there is no {expected!r}", path=self.path)
        self.at += 1

    def value(self) -> Any:
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except RecursionError:
                raise DataError(f"row {self.values + 1} is nested too deeply", path=self.path) from None
            except ValueError:
                more = self.handle.read(max(_CHUNK, len(self.text)))  # so that a long value is not read over and over
                if not more:
                    raise DataError(f"row {self.values + 1} is not JSON", path=self.path) from None
                self.text, self.at = self.text[self.at :] + more, 0
                continue
            self.at, self.values = end, self.values + 1
            return value


# --- tables ---------------------------------------------------------------------------------------------------------


def _csv(handle: TextIO, path: Path) -> Iterator[Row]:
    return _table(csv.reader(handle, strict=True), path)


def _tsv(handle: TextIO, path: Path) -> Iterator[Row]:
    """Rows of cells that are taken as they are: quotes mean nothing, as in the files of GLUE."""
    return _table(csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE), path)


def _table(reader: Any, path: Path) -> Iterator[Row]:
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = _cells(reader)
        except csv.Error as error:
            yield Row(number, None, f"is no row of a table: {error}")
            continue
        if cells is None:
            return
        if header is None and cells:
            header = cells
            if len(set(header)) < len(header):
                raise DataError("names a column twice in its first line", path=path)
        elif cells and header is not None:
            if len(cells) != len(header):
                yield Row(number, None, f"has {len(cells)} cells, and the first line {len(header)}")
            else:
                yield Row(number, dict(zip(header, cells, strict=True)))


def _cells(reader: Any) -> list[str] | None:
    """The cells of the next row, None at the end. The limit on their length is one of the whole process, and too low
    for conversations: it is raised for this call alone."""
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        cells: list[str] | None = next(reader, None)
    finally:
        csv.field_size_limit(before)
    return cells


_DELIMITED = (".csv", ".tsv")
_READERS: Mapping[str, Callable[[TextIO, Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
}
SUFFIXES = (*_READERS, *columnar.SUFFIXES)
