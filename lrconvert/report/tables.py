"""Pieces of reports that several of them print: tables, sizes, shares. Nothing is computed here."""

from __future__ import annotations

import posixpath
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lrconvert.core.errors import printable

_NAME = 10  # characters of the name of a fact


def count_bytes(n: int) -> str:
    """Return a size with its unit, 1,234,567 as 1.235 MB; below 10 KB it is exact."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**4)):
        if n >= size:
            return f"{n / (1000 if unit == 'KB' else size):.4g} {unit}"
    return f"{n:,} B"


def counted(count: int, what: str = "member") -> str:
    """Return a number of things, 1 member and 2 members."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


WIDTH = 100  # of tables
_LEAST = 16  # of names that are shortened


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], width: int = WIDTH) -> str:
    """Return columns padded to fit, the first left-aligned, the others right-aligned. Where they would be wider than
    `width`, the names in the first are shortened in the middle."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    longest, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    first = max(min(longest, width - sum(widths) - 2 * len(widths)), min(longest, _LEAST))
    named = [[shortened(row[0], first).ljust(first), *map(str.rjust, row[1:], widths)] for row in cells]
    lines = ["  ".join(row).rstrip() for row in named]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def shortened(name: str, width: int) -> str:
    """Return a name of at most `width` characters: of a longer one the middle is left out."""
    if len(name) <= width:
        return name
    start = (width - 1) // 2
    return f"{name[:start]}…{name[len(name) - (width - 1 - start) :]}"


def relative(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Return a line that names the folder which all `paths` are in, or "", and the paths from there."""
    parents = [posixpath.dirname(path) for path in paths]
    mixed = len({path.startswith("/") for path in paths}) > 1
    common = "" if mixed else posixpath.commonpath(parents)
    if not common or common == "/" or common.endswith(":"):
        return "", list(paths)
    shown = common.replace(":/", "://", 1) if "://" in paths[0] else common
    return f"in {printable(shown)}:\n", [posixpath.relpath(path, common) for path in paths]


def picked(value: Any, *names: str) -> dict[str, Any]:
    """Return the attributes of these names as a JSON object."""
    return {name: getattr(value, name) for name in names}


def listed(config: Mapping[str, Any]) -> str:
    """Return a mapping as `key value` pairs with commas between."""
    return ", ".join(f"{key} {value}" for key, value in config.items())


def span(values: Iterable[Any], form: str = "{}") -> str:
    """Return the smallest and the largest of some values, or the one that all are."""
    ordered = sorted(values)
    low, high = form.format(ordered[0]), form.format(ordered[-1])
    return low if low == high else f"{low}..{high}"


def share(value: float | None) -> str:
    """Return a share with four digits."""
    return "-" if value is None else f"{value:.4f}"


def percent(value: float | None) -> str:
    """Return a share in percent."""
    return "-" if value is None else f"{value:.1%}"


def filled(text: str, indent: str = "") -> str:
    """Return text in lines of a terminal's width, all but the first after `indent`."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def fact(name: str, text: str) -> str:
    """Return a fact with its name in front, in lines of a terminal's width."""
    return filled(f"{name.ljust(_NAME)}{text}" if name else f"{' ' * _NAME}{text}", " " * _NAME)
