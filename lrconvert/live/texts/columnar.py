"""Rows of Parquet and Arrow files, where pyarrow is installed, a few hundred at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lrconvert.core.errors import DataError, DependencyError
from lrconvert.live.texts.layouts import COLUMNS

SUFFIXES = (".parquet", ".arrow")  # the second is what `datasets` keeps in its cache
_ROWS = 256


def rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a file with those of its columns that mean something here. Raises E-DATA, E-DEPENDENCY."""
    try:
        import pyarrow
    except ImportError:
        raise DependencyError(
            f"reading {path.suffix} files needs pyarrow",
            fix="pip install pyarrow, or write the data as .jsonl",
            path=path,
        ) from None
    try:
        batches = _parquet(path) if path.suffix == ".parquet" else _arrow(path)
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS):
                yield from batch.slice(start, _ROWS).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"cannot be read: {lines[0]:.200}", path=path) from None


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_ROWS, columns=_wanted(file.schema_arrow.names, path))


def _arrow(path: Path) -> Iterator[Any]:
    with _opened(path) as (schema, batches):
        wanted = _wanted(schema.names, path)
        for batch in batches:
            yield batch.select(wanted)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Iterator[Any]]]:
    """The schema and the batches of a stream, which is what `datasets` writes, or of a file with an index."""
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(str(path)) as source:
        try:
            reader = ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            whole = ipc.open_file(source)
            yield whole.schema, (whole.get_batch(n) for n in range(whole.num_record_batches))
            return
        yield reader.schema, iter(reader)


def _wanted(names: list[str], path: Path) -> list[str]:
    """The columns to read: images, for one, stay where they are. Raises E-DATA if there is none."""
    wanted = [name for name in names if name in COLUMNS]
    if not wanted:
        shown = ", ".join(f"{name!r:.40}" for name in names[:8])
        raise DataError(f"has none of the columns that are read, but {shown or 'none at all'}", path=path)
    return wanted
