"""Names of modules as data: a line for each module, looked up without a search.

A line says what a module is called by some code, and by diffusers::

    double_blocks.#.img_mlp.0    -> transformer_blocks.#.ff.net.0.proj
    double_blocks.#.img_attn.qkv -> transformer_blocks.#.attn.{to_q,to_k,to_v}

``#`` is any number, the same on both sides. Braces list the modules whose rows, one below the other, are the rows of
one fused module. Behind a colon may stand how many rows each has, in widths of the input: ``: 1 1 1 4``, with ``*`` for
an equal share of what is left (without a colon all are ``*``); a line holds for layers of such shapes alone, so that
one name may have several. ``swapped`` behind it: the two halves of the rows (shift and scale) change places.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Generic, TypeVar

Entry = TypeVar("Entry")
Numbers = tuple[str, ...]
_HOLE = "#"


@dataclass(frozen=True)
class Line:
    """One module: its `name`, the modules of diffusers that are its rows, and how many rows each has (None: an equal
    share of the rest)."""

    name: str
    parts: tuple[str, ...]
    rows: tuple[int | None, ...]
    is_swapped: bool = False

    def ends(self, out: int, width: int) -> tuple[int, ...] | None:
        """Return where the rows of each part end in a layer (out, width); None if the line is not of such a layer."""
        fixed = sum(rows * width for rows in self.rows if rows is not None)
        shares = self.rows.count(None)
        share, left = divmod(out - fixed, shares) if shares else (0, out - fixed)
        if left or (shares and share <= 0) or (self.is_swapped and out % 2):
            return None
        return tuple(accumulate(share if rows is None else rows * width for rows in self.rows))

    def holds(self, part: int, out: int, width: int) -> bool:
        """Return whether a layer (out, width) may be that part."""
        rows = self.rows[part]
        return rows is None or rows * width == out


def parse(text: str) -> tuple[Line, ...]:
    """Return the lines of a text. A line without an arrow is of a module that has one name."""
    return tuple(_line(line) for line in text.splitlines() if line.strip())


def _line(text: str) -> Line:
    names, _, shape = text.partition(" : ")
    name, _, other = (side.strip() for side in names.partition("->"))
    parts = _expanded(other or name)
    words = shape.split()
    is_swapped = "swapped" in words
    rows = tuple(None if word == "*" else int(word) for word in words if word != "swapped")
    return Line(name, parts, rows or (None,) * len(parts), is_swapped)


def _expanded(text: str) -> tuple[str, ...]:
    before, brace, rest = text.partition("{")
    if not brace:
        return (text,)
    inner, _, after = rest.partition("}")
    return tuple(f"{before}{word}{after}" for word in inner.split(","))


def filled(template: str, numbers: Numbers) -> str:
    """Return a template with its numbers."""
    pieces = template.split(_HOLE)
    return pieces[0] + "".join(number + piece for number, piece in zip(numbers, pieces[1:], strict=True))


class Templates(Generic[Entry]):
    """Entries by their template, with dots or (`is_flat`) underscores between the words of names. A name is looked up
    by its words, all numbers alike; what numbers a template has of its own is compared then."""

    def __init__(self, entries: Iterable[tuple[str, Entry]], is_flat: bool) -> None:
        self._separator = "_" if is_flat else "."
        self._by_key: dict[str, list[tuple[Numbers, Entry]]] = {}
        for template, entry in entries:
            words = (template.replace(".", "_") if is_flat else template).split(self._separator)
            key, numbers = self._key(words)
            self._by_key.setdefault(key, []).append((numbers, entry))

    def _key(self, words: Sequence[str]) -> tuple[str, Numbers]:
        numbers = tuple(word for word in words if word == _HOLE or word.isdecimal())
        return self._separator.join(_HOLE if word.isdecimal() else word for word in words), numbers

    def find(self, name: str) -> list[tuple[Entry, Numbers]]:
        """Return the entries that a name may be, each with the numbers in its holes."""
        key, numbers = self._key(name.split(self._separator))
        return [
            (entry, tuple(given for given, own in zip(numbers, wanted, strict=True) if own == _HOLE))
            for wanted, entry in self._by_key.get(key, ())
            if all(own in (_HOLE, given) for given, own in zip(numbers, wanted, strict=True))
        ]


@dataclass(frozen=True)
class Scheme:
    """All names that some code has for the modules of a family."""

    lines: tuple[Line, ...]

    @cached_property
    def _by_name(self) -> tuple[Templates[Line], Templates[Line]]:
        entries = [(line.name, line) for line in self.lines]
        return Templates(entries, False), Templates(entries, True)

    @cached_property
    def _by_part(self) -> Templates[tuple[Line, int]]:
        return Templates([(part, (line, n)) for line in self.lines for n, part in enumerate(line.parts)], False)

    def find(self, name: str, is_flat: bool) -> list[tuple[Line, Numbers]]:
        """Return the lines of a module of that name."""
        return self._by_name[is_flat].find(name)

    def place(self, module: str, out: int, width: int, is_flat: bool = False) -> tuple[Line, Numbers] | None:
        """Return the line of a module of this name and shape, or None."""
        return next((hit for hit in self.find(module, is_flat) if hit[0].ends(out, width) is not None), None)

    def of_part(self, module: str, out: int, width: int) -> tuple[Line, int, Numbers] | None:
        """Return the line of which a module of diffusers is a part, and which part; or None."""
        hits = self._by_part.find(module)
        return next(((line, n, numbers) for (line, n), numbers in hits if line.holds(n, out, width)), None)
