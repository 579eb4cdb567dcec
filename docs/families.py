"""Write the table of families of diffusion transformers into docs/guides/diffusion.md: ``python docs/families.py``."""

from __future__ import annotations

from pathlib import Path

from lrconvert.formats.families.base import ORIGINAL, Family, families
from lrconvert.formats.families.shared.table import Line, filled

PAGE = Path(__file__).resolve().parent / "guides" / "diffusion.md"
MARKS = ("<!-- families -->\n", "\n<!-- /families -->")


def table() -> str:
    """Return a row for each family, by title, with the module that tells most."""
    rows = [
        "| family | diffusers' class | a module in the model's own code | the same in diffusers |",
        "|---|---|---|---|",
    ]
    for family in sorted(families().values(), key=lambda one: one.title):
        line = _telling(family)
        numbers = ("0",) * line.name.count("#")
        first, *others = (filled(part, numbers) for part in line.parts)
        shown = ", ".join(f"`{name}`" for name in (first, *(other.rpartition(".")[2] for other in others)))
        classes = ", ".join(f"`{name}`" for name in family.classes)
        rows.append(f"| {family.title} | {classes} | `{filled(line.name, numbers)}` | {shown} |")
    return "\n".join(rows)


def _telling(family: Family) -> Line:
    """The first line of the most parts, of a block if there is one whose names differ."""
    lines = family.schemes[ORIGINAL].lines
    return max(lines, key=lambda line: (len(line.parts), line.name != line.parts[0], "#" in line.name))


def page() -> str:
    """Return the page with the table of today."""
    text = PAGE.read_text("utf-8")
    before, rest = text.split(MARKS[0])
    return before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
