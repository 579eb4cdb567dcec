"""Draws docs/architecture.svg: the way of the data through the folders, and which folder imports which.

    python docs/architecture.py      measures the imports of lrconvert/ and writes the picture

The order of the folders is the rule that stands in docs/architecture.md; the imports are read from the code. A test
fails if the picture is not what this script makes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "lrconvert"
PICTURE = HERE / "architecture.svg"
WIDTH = 1040
INK, PALE, LINE, FILL, THING = "#1f2933", "#52606d", "#9aa5b1", "#dbe9f6", "#fff6dd"

Edges = dict[str, set[str]]


def rule() -> list[str]:
    """Return the folders in the order of the rule, the lowest first."""
    line = re.search(r"^ {4}(core < .+)$", (HERE / "architecture.md").read_text(), re.MULTILINE)
    assert line is not None
    return line[1].split(" < ")


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def holds() -> dict[str, str]:
    """Return for each folder the line that the table of docs/architecture.md has on it."""
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (HERE / "architecture.md").read_text(), re.MULTILINE))


def measure(folders: list[str]) -> Edges:
    """Return for each folder the other folders that its files import."""
    edges: Edges = {}
    for folder in folders:
        names = {name for path in (PACKAGE / folder).rglob("*.py") for name in imported(path)}
        used = {name.split(".")[1] for name in names if name.startswith("lrconvert.")}
        edges[folder] = used & set(folders) - {folder}
    return edges


# --- pieces of the picture ------------------------------------------------------------------------------------------


def text(
    x: float, y: float, words: str, size: int = 13, fill: str = INK, anchor: str = "start", bold: bool = False
) -> str:
    look = f'font-size="{size}" fill="{fill}" text-anchor="{anchor}"' + (' font-weight="600"' if bold else "")
    return f'<text x="{x:g}" y="{y:g}" {look}>{escape(words)}</text>'


def box(x: float, y: float, width: float, title: str, words: str, fill: str) -> str:
    """Draw a box of 54 pixels: a folder that does something (square), or a thing that it makes (round)."""
    rounded = 20 if fill == THING else 4
    return "\n".join(
        (
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="54" rx="{rounded}" fill="{fill}" stroke="{LINE}"/>',
            text(x + width / 2, y + 23, title, 13, anchor="middle", bold=True),
            text(x + width / 2, y + 42, words, 11, PALE, "middle"),
        )
    )


def arrow(*points: tuple[float, float]) -> str:
    path = " L".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path d="M{path}" fill="none" stroke="{PALE}" stroke-width="1.6" marker-end="url(#tip)"/>'


def way() -> list[str]:
    """Draw the way of the data: an adapter of any tool comes in on the left, what people load goes out on the right."""
    top, middle, low = 60, 160, 260
    center = middle + 27
    return [
        text(20, 34, "The way of the data", 17, bold=True),
        box(20, middle, 130, "an adapter", "of any tool", THING),
        box(174, middle, 140, "formats/readers", "chosen by content", FILL),
        box(338, middle, 130, "LoraAdapter", "lora", THING),
        box(492, middle, 160, "convert, methods", "fit under a budget", FILL),
        box(676, middle, 150, "CompactAdapter", "lora", THING),
        box(860, middle, 160, "formats/lrc", "one small file", FILL),
        box(338, top, 314, "live", "base and texts: statistics, outputs", FILL),
        box(676, top, 150, "refine", "distils the LoRA into it", FILL),
        box(860, top, 160, "live/attach", "a model in memory", FILL),
        box(174, low, 140, "formats/compat", "what would refuse it", FILL),
        box(338, low, 314, "report, api, cli", "what each step costs and keeps", FILL),
        box(676, low, 150, "merge", "into a base, and undone", FILL),
        box(860, low, 160, "formats/exporters", "for other programs", FILL),
        *(arrow((x, center), (stop - 2, center)) for x, stop in ((150, 174), (314, 338), (468, 492), (652, 676))),
        arrow((826, center), (858, center)),
        arrow((572, top + 54), (572, middle - 2)),  # statistics to the fit
        arrow((652, top + 27), (674, top + 27)),  # the model to the refinement
        arrow((731, middle), (731, top + 56)),
        arrow((771, top + 54), (771, middle - 2)),
        arrow((751, middle + 54), (751, low - 2)),
        arrow((826, middle + 12), (843, middle + 12), (843, top + 27), (858, top + 27)),
        arrow((826, middle + 42), (843, middle + 42), (843, low + 27), (858, low + 27)),
        arrow((85, middle + 54), (85, low + 27), (172, low + 27)),
    ]


def matrix(folders: list[str], edges: Edges, top: float) -> list[str]:
    """Draw a table of imports: a dot where the folder of the row imports that of the column."""
    cell, left, lines = 26, 150, holds()
    parts = [
        text(20, top, "Who imports whom", 17, bold=True),
        text(
            20,
            top + 22,
            "A dot: the folder of the row imports that of the column. None stands on or above the diagonal.",
            12,
            PALE,
        ),
    ]
    first = top + 104
    for place, name in enumerate(folders):
        x, y = left + place * cell, first + place * cell
        turned = f'transform="translate({x + 17:g} {first - 10:g}) rotate(-60)"'
        parts.append(f'<text {turned} font-size="13" fill="{INK}">{name}</text>')
        parts.append(text(left - 10, y + 18, name, 13, anchor="end", bold=True))
        for column in range(len(folders)):
            fill = "#ffffff" if column < place else "#eef1f4"
            spot = left + column * cell
            square = f'<rect x="{spot:g}" y="{y:g}" width="{cell}" height="{cell}"'
            parts.append(f'{square} fill="{fill}" stroke="{LINE}" stroke-width="0.5"/>')
            if folders[column] in edges[name]:
                parts.append(f'<circle cx="{spot + cell / 2:g}" cy="{y + cell / 2:g}" r="5" fill="#2f6fab"/>')
        parts.append(text(left + len(folders) * cell + 24, y + 18, lines[name], 12, PALE))
    return parts


def draw(folders: list[str], edges: Edges) -> str:
    """Return the SVG of these folders and edges; the same bytes for the same input."""
    table = matrix(folders, edges, 366)
    height = 366 + 104 + 26 * len(folders) + 24
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" role="img">'
    )
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{PALE}"/></marker></defs>'
    )
    title = "<title>The folders of lrconvert: the way of the data, and which imports which</title>"
    ground = f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    return "\n".join((head, title, tip, ground, *way(), *table, "</svg>\n"))


if __name__ == "__main__":
    PICTURE.write_text(draw(rule(), measure(rule())))
