"""Draws docs/accuracy-per-byte.svg: answers against bytes, for lrconvert and its peers.

    python benchmarks/picture.py      reads benchmarks/results/evidence.jsonl and writes the picture

A panel for each task, a line for each way to make a file; what was not measured is not drawn. Upwards the share of the
KL distance between base and LoRA that a file closes, on a scale of what is left of it; bars are 95 % intervals. `python
benchmarks/evidence.py --render` draws it, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import cells

PICTURE = cells.ROOT / "docs" / "accuracy-per-byte.svg"
TASKS = {"sst2": "SST-2: one word", "cola": "CoLA: one word", "gsm8k": "GSM8K: long answers"}  # that tuned nothing
# Of a cell's name, behind task and share: what it is called, its colour, its mark.
WAYS = {
    "lowrank, refined": ("lrconvert, refined", "#1a7f37", "circle"),
    "lowrank, refit": ("lrconvert, refit only", "#0b6bcb", "square"),
    "SVD at 2 bit, refit": ("fewer ranks (SVD) at 2 bit", "#c2410c", "triangle"),
    "SVD at int4, refit": ("fewer ranks (SVD) at 4 bit", "#a16207", "triangle"),
    "SVD at int8, refit": ("fewer ranks (SVD) at 8 bit", "#9d174d", "triangle"),
    "LoRAQuant, refit": ("LoRAQuant", "#7c3aed", "diamond"),
    "LoRA-XS, refined": ("LoRA-XS, trained", "#0e7490", "diamond"),
    "Uni-LoRA, refined": ("Uni-LoRA, trained", "#57534e", "diamond"),
}
SHARES = (0.2, 0.4, 0.8, 1.6, 4.0)
CLOSED = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
PANEL, GAP, LEFT, TOP, HEIGHT = 270, 24, 66, 148, 300
IN_A_ROW, COLUMN = 4, 226  # of the legend
_LIMIT = 0.9995  # what is nearer to the LoRA is drawn here

# On a dark page the ink is light; the colours of the lines are read on both.
_STYLE = """<style>
.page{fill:#ffffff}.ink{fill:#1f2328}.pale{fill:#59636e}.grid{stroke:#d1d9e0}
@media (prefers-color-scheme:dark){.page{fill:#0d1117}.ink{fill:#f0f6fc}.pale{fill:#9198a1}.grid{stroke:#3d444d}
.way{filter:brightness(1.6)}}
</style>"""


def height_of(closed: float) -> float:
    """Return 0 for the lowest tick and 1 for the limit: the logarithm of what is left."""
    low, high = -math.log(1 - CLOSED[0]), -math.log(1 - _LIMIT)
    return (min(max(-math.log(max(1 - closed, 1e-9)), low), high) - low) / (high - low)


def marked(kind: str, x: float, y: float, colour: str) -> str:
    shapes = {
        "square": f"M{x - 4:.1f} {y - 4:.1f}h8v8h-8z",
        "triangle": f"M{x:.1f} {y - 5:.1f}l5 9h-10z",
        "diamond": f"M{x:.1f} {y - 5.5:.1f}l5 5.5l-5 5.5l-5 -5.5z",
    }
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    return f'<path d="{shapes[kind]}" fill="{colour}"/>'


def text(x: float, y: float, words: str, *, size: int = 12, of: str = "ink", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" class="{of}" text-anchor="{anchor}">{escape(words)}</text>'
    )


def points(rows: Mapping[str, Mapping[str, Any]], task: str, way: str) -> list[tuple[float, float, float, float]]:
    """Return the measured (share in %, closed, its interval) of a way on a task, by share."""
    found = []
    for share in SHARES:
        row = rows.get(f"{task}, {share:g}%, {way}")
        if row and "closed" in row:
            closed, low, high = row["closed"]
            found.append((float(row["share"]), float(closed), float(low), float(high)))
    return sorted(found)


def draw(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the picture of these cells, by their names."""
    tasks = [task for task in TASKS if any(points(rows, task, way) for way in WAYS)]
    ways = [way for way in WAYS if any(points(rows, task, way) for task in tasks)]
    width = LEFT + len(tasks) * (PANEL + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + HEIGHT + 62}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        "<title>How near a file answers to its LoRA, against the size of the file</title>",
        _STYLE,
        f'<rect class="page" width="{width}" height="{TOP + HEIGHT + 62}"/>',
        text(LEFT, 26, "How near a file answers to its LoRA, by the size of the file", size=17),
        *legend(ways),
    ]
    for n, task in enumerate(tasks):
        parts += panel(LEFT + n * (PANEL + GAP), TASKS[task], n == 0)
        parts += [line for way in ways for line in curve(LEFT + n * (PANEL + GAP), points(rows, task, way), way)]
    foot = (
        "size of the file, % of the LoRA at 16 bit (rank 16, all linear layers of a chat model of 135 M parameters); "
        "bars: 95 % intervals"
    )
    parts.append(text(LEFT, TOP + HEIGHT + 48, foot, of="pale"))
    return "\n".join([*parts, "</svg>", ""])


def legend(ways: Iterable[str]) -> list[str]:
    parts = []
    for n, way in enumerate(ways):
        words, colour, kind = WAYS[way]
        x, y = LEFT + COLUMN * (n % IN_A_ROW), 52 + 20 * (n // IN_A_ROW)
        parts += [f'<g class="way">{marked(kind, x + 5, y, colour)}</g>', text(x + 16, y + 4, words, size=13)]
    return parts


def panel(left: float, title: str, with_scale: bool) -> list[str]:
    """Return the frame of a task."""
    parts = [text(left, TOP - 14, title, size=14)]
    for closed in CLOSED:
        y = TOP + HEIGHT * (1 - height_of(closed))
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}h{PANEL}"/>')
        if with_scale:
            parts.append(text(left - 8, y + 4, f"{100 * closed:g} %", of="pale", anchor="end"))
    for share in SHARES:
        x = left + place(share)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}v{HEIGHT}"/>')
        parts.append(text(x, TOP + HEIGHT + 20, f"{share:g} %", of="pale", anchor="middle"))
    if with_scale:
        parts.append(
            text(left, TOP - 46, "upwards: share of the KL distance between base and LoRA that is closed", of="pale")
        )
    return parts


def place(share: float) -> float:
    low, high = math.log(SHARES[0] * 0.85), math.log(SHARES[-1] * 1.15)
    return PANEL * (math.log(share) - low) / (high - low)


def curve(left: float, measured: list[tuple[float, float, float, float]], way: str) -> list[str]:
    _, colour, kind = WAYS[way]
    spots = [(left + place(share), TOP + HEIGHT * (1 - height_of(closed))) for share, closed, _, _ in measured]
    parts = []
    if len(spots) > 1:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for (x, y), (_, _, low, high) in zip(spots, measured, strict=True):
        ends = [TOP + HEIGHT * (1 - height_of(value)) for value in (low, high)]
        parts.append(f'<path d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(marked(kind, x, y, colour))
    return [f'<g class="way">{"".join(parts)}</g>'] if parts else []


def write() -> None:
    """Draw what is measured today."""
    PICTURE.write_text(draw(cells.read("evidence")))


if __name__ == "__main__":
    write()
