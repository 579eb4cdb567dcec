"""Places of the labels in a plot: none over another, over a mark, or outside."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SIZE = 12  # of the letters, which are as wide as each other
_CELL = 0.61 * SIZE
_ASCENT, _DESCENT = 0.8 * SIZE, 0.25 * SIZE
_RINGS = (4, 14, 28, 46, 70)  # from the edge of a mark to its label; farther ones have a line to it


@dataclass(frozen=True)
class Box:
    """A rectangle in the coordinates of a plot, whose y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Return whether the two have an inner point in common."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def is_inside(self, other: Box) -> bool:
        """Return whether all of it lies in the other."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True)
class Label:
    """A text whose lower left corner is at (x, y), its box, and the line to its mark, or "" beside it."""

    text: str
    x: float
    y: float
    box: Box
    leader: str


def text_width(text: str) -> float:
    """Return how wide a text is: wide letters of the East count as two, combining ones as one."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text) * _CELL


def boxed(text: str, x: float, y: float) -> Box:
    """Return the box of a text whose base line starts at (x, y)."""
    return Box(x, y - _ASCENT, x + text_width(text), y + _DESCENT)


def placed(
    points: Sequence[tuple[float, float, str]], area: Box, radius: float, taken: Iterable[Box] = ()
) -> list[Label | None]:
    """Return a label for each (x, y, text), in their order; None where there is no room, or no text.

    `radius` is that of the marks, whose circles no label covers, nor anything in `taken`.
    """
    marks = [Box(x - radius, y - radius, x + radius, y + radius) for x, y, _ in points]
    occupied = [*marks, *taken]
    labels: list[Label | None] = []
    for x, y, text in points:
        options = _options(x, y, text, radius) if text else []
        label = next((o for o in options if o.box.is_inside(area) and not any(map(o.box.overlaps, occupied))), None)
        labels.append(label)
        if label is not None:
            occupied.append(label.box)
    return labels


def _options(x: float, y: float, text: str, radius: float) -> list[Label]:
    """The places around a mark that are tried, the nearest first."""
    width, middle = text_width(text), (_ASCENT - _DESCENT) / 2
    options = []
    for ring in _RINGS:
        away = radius + ring
        slant = 0.7 * away
        for dx, dy, left in (
            *((away, 0.0, x + away), (-away, 0.0, x - away - width)),
            *((0.0, -away, x - width / 2), (0.0, away, x - width / 2)),
            *((slant, -slant, x + slant), (slant, slant, x + slant)),
            *((-slant, -slant, x - slant - width), (-slant, slant, x - slant - width)),
        ):
            below = _ASCENT if dy > 0 else -_DESCENT if dy < 0 else middle
            box = boxed(text, left, y + dy + below)
            reach = 1 - 3 / away
            line = f"M{x:.1f} {y:.1f}L{x + reach * dx:.1f} {y + reach * dy:.1f}" if ring > _RINGS[0] else ""
            options.append(Label(text, left, y + dy + below, box, line))
    return options
