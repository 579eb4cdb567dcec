"""From data as a user gives it to examples of text, read as they are asked for, with an account of what was read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

from lrconvert.core.errors import DataError
from lrconvert.live.texts import layouts, rows, sources
from lrconvert.live.texts.layouts import LeftOut, UnknownLayout
from lrconvert.live.texts.rows import Row
from lrconvert.live.texts.tally import BAD, Tally
from lrconvert.live.texts.text import Conversation, Place, Text


@dataclass(frozen=True, eq=False)
class TextData:
    """Data that is text: `texts` are its examples, which are read once, and `tally` counts them. `path` is where the
    first of them comes from."""

    texts: Iterator[Text | Conversation]
    tally: Tally
    path: Path | None = None


def open_texts(data: Any) -> tuple[TextData | None, Any]:
    """Return `data` as text, if it is: paths, names of data sets, or rows in memory (dicts with the columns of files,
    such as those of a `datasets.Dataset`). Else None and the model inputs that it is. Raises E-DATA."""
    paths: Any = [data] if isinstance(data, (str, PathLike)) else data
    if are_paths(paths):
        chosen = sources.find(paths)
        tally = Tally(files=chosen.files, notes=chosen.notes)
        return TextData(read(chosen.files, tally), tally, chosen.files[0]), None
    if isinstance(data, Mapping):
        raise DataError("the data is one dictionary", fix="give rows or batches in a list, or one split of a data set")
    first, data = _looked_at(data)
    if not layouts.is_text_row(first):
        return None, data
    tally = Tally()
    counted = (Row(number, fields) for number, fields in enumerate(data, 1))
    return TextData(_of_rows(counted, None, "row", tally), tally), None


def _looked_at(data: Any) -> tuple[Any, Any]:
    """The first item of data, and all of it. A loader that shuffles begins once: to begin again would be another
    order."""
    if isinstance(data, Sequence) or (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return (data[0] if len(data) else None), data
    if not isinstance(data, Iterable):
        return None, data
    rest = iter(data)
    first = next(rest, None)
    return first, rest if first is None else chain([first], rest)


def are_paths(data: Any) -> bool:
    """Return whether data is a sequence of paths, not of model inputs."""
    return isinstance(data, Sequence) and bool(data) and all(isinstance(path, (str, PathLike)) for path in data)


def read(files: Iterable[Path], tally: Tally | None = None) -> Iterator[Text | Conversation]:
    """Yield the examples of files, in order; what is left out is in the `tally`. Raises E-DATA (naming file and line)
    where the first row of a file, or every one, cannot be read."""
    for path in files:
        if path.suffix == sources.RUNNING_TEXT:
            yield from _running(path)
        elif path.suffix in rows.SUFFIXES:
            yield from _of_rows(rows.rows(path), path, rows.unit(path), tally or Tally())
        else:
            known = ", ".join(rows.SUFFIXES)
            raise DataError("is of no known kind", fix=f"give .txt (running text), or one of {known}", path=path)


def _running(path: Path) -> Iterator[Text]:
    is_empty = True
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    is_empty = False
                    yield Text(line, running=True, kind="lines of running text", place=Place(path, number))
    except UnicodeDecodeError:
        raise DataError("is not UTF-8 text", path=path) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=path) from None
    if is_empty:
        raise DataError("holds no text", path=path)


def _of_rows(read_rows: Iterable[Row], path: Path | None, unit: str, tally: Tally) -> Iterator[Text | Conversation]:
    """The examples of rows. A row that is bad is left out, unless it is the first one: then the file is meant to be
    something else. So it is where none is good."""
    has_rows, has_texts = False, False
    refused: DataError | None = None
    for row in read_rows:
        place = Place(path, row.number, unit)
        try:
            text, passed_over = _text(row)
        except LeftOut as error:
            is_bad = error.reason == BAD
            if is_bad:
                refused = refused or DataError(f"{unit} {row.number} {error}", fix=_FIX, path=path)
            if refused and (not has_rows or (isinstance(error, UnknownLayout) and not has_texts)):
                raise refused from None
            tally.leave_out(error.reason, place, error.why)
            has_rows = True
            continue
        has_rows = has_texts = True
        tally.passed_over.update(passed_over)
        yield replace(text, place=place)
    if not has_texts and refused:
        raise refused
    if not has_rows:
        raise DataError("holds no text", path=path)


_FIX = "docs/guides/data.md has the layouts that are read"


def _text(row: Row) -> tuple[Text | Conversation, tuple[str, ...]]:
    if row.fields is None or not isinstance(row.fields, Mapping):
        raise LeftOut(BAD, row.why or "is no row of columns")
    return layouts.read(row.fields)
