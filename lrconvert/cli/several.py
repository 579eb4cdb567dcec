"""Several sources, and folders of adapters, for the commands that look at adapters as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lrconvert.core.errors import LrcError


def adapters(sources: Sequence[Path]) -> list[tuple[str, Path]]:
    """Return every adapter that is meant, as it is called and where it lies: a folder that is no adapter itself and
    holds several stands for these."""
    from lrconvert.io import hub, mistaken

    meant: list[tuple[str, Path]] = []
    for source in sources:
        where = hub.locate(source)
        inside = _inside(where) if where.is_dir() and not mistaken.is_adapter(where) else []
        if len(inside) < 2:
            meant.append((str(source), source))
        else:
            meant += [(str(source / name), where / name) for name in inside]
    return meant


def _inside(folder: Path) -> list[str]:
    """The adapters in a folder, none if it is one itself."""
    from lrconvert.api.batch.sources import adapters_in, is_adapter  # it loads all readers

    return [] if is_adapter(folder) else list(adapters_in(folder))


def of_each(
    named: Sequence[tuple[str, Path]], look: Callable[[Path], Any], progress: Callable[[float, str], None]
) -> list[tuple[str, Any]]:
    """Return what `look` says of each adapter, or the error with which it refuses it."""
    looked: list[tuple[str, Any]] = []
    for n, (name, path) in enumerate(named):
        progress(n / len(named), name)
        try:
            looked.append((name, look(path)))
        except LrcError as error:
            looked.append((name, error.at(path)))
    return looked


def refusal(error: LrcError) -> dict[str, Any]:
    """Return an error as a JSON value."""
    return {"error": {"code": error.code, "message": str(error)}}
