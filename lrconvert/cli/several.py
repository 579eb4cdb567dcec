"""Several sources, and folders of adapters, for the commands that look at adapters as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lrconvert.core.errors import LrcError
from lrconvert.io import remote

Place = Path | remote.Url


def adapters(sources: Sequence[Place]) -> list[tuple[str, Place]]:
    """Return every adapter that is meant, as it is called and where it lies: a folder that is no adapter itself and
    holds several stands for these."""
    from lrconvert.formats.fleet import names
    from lrconvert.io import hub, mistaken

    meant: list[tuple[str, Place]] = []
    for source in sources:
        if isinstance(source, remote.Url):
            meant += _at(source)
            continue
        if names.is_fleet(source):
            meant += _members(source)
            continue
        where = hub.locate(source)
        inside = _inside(where) if where.is_dir() and not mistaken.is_adapter(where) else []
        if len(inside) < 2:
            meant.append((str(source), source))
        else:
            meant += [(str(source / name), where / name) for name in inside]
    return meant


def _members(fleet: Path) -> list[tuple[str, Place]]:
    """The members of a fleet."""
    from lrconvert.api.fleets import Fleet
    from lrconvert.formats.fleet.names import spelled_member

    with Fleet(fleet) as opened:
        places = [spelled_member(fleet, name) for name in opened]
    return [(str(place), place) for place in places]


def _at(url: remote.Url) -> list[tuple[str, Place]]:
    """The adapters at a URL: itself, or those below it."""
    paths = [adapter.path for adapter in remote.adapters(remote.open_store(url))]
    places = [url / path for path in paths] if len(paths) > 1 else [url]
    return [(str(place), place) for place in places]


def _inside(folder: Path) -> list[str]:
    """The adapters in a folder, none if it is one itself."""
    from lrconvert.api.batch.sources import adapters_in, is_adapter  # it loads all readers

    return [] if is_adapter(folder) else list(adapters_in(folder))


def of_each(
    named: Sequence[tuple[str, Place]], look: Callable[[Place], Any], progress: Callable[[float, str], None]
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
