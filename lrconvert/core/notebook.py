"""Results as a notebook shows them: one small table, every text escaped, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from lrconvert.core.errors import printable

_ROWS = 50


def html_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]], notes: Iterable[str] = ()) -> str:
    """Return an HTML table of at most 50 rows, of which it says how many more there are, with `notes` below it."""
    listed = list(rows)
    left = len(listed) - _ROWS
    shown = listed if left <= 0 else listed[:_ROWS]
    parts = ["<table>", f"<caption>{_text(caption)}</caption>", _row("th", head)]
    parts += [_row("td", row) for row in shown]
    parts += ["</table>"]
    parts += [f"<div>{_text(note)}</div>" for note in ([f"and {left} more"] if left > 0 else []) + list(notes)]
    return "".join(parts)


def _row(cell: str, values: Sequence[object]) -> str:
    return f"<tr>{''.join(f'<{cell}>{_text(value)}</{cell}>' for value in values)}</tr>"


def _text(value: object) -> str:
    return escape(printable(str(value), 500))
