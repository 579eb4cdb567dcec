"""The frontier: bytes on a logarithmic axis against what is kept, one plot for each measure, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from lrconvert.core.errors import printable
from lrconvert.report.html.markup import File, Measure, name, percent, section, short, text, times
from lrconvert.report.text_and_json import count_bytes

_NAMED = 12  # with more files than this, marks carry numbers instead of names
_WIDTH, _HEIGHT = 420, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 36, 410, 44, 258
_LOWEST = -0.5  # an axis goes no lower; marks below stand on its edge, their value beside them
_SHAPES = (
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    "M-4.5-4.5h9v9h-9z",
    "M0-6 5.6 4h-11.2z",
    "M0-6.4 6.4 0 0 6.4-6.4 0z",
    "M0 6 5.6-4h-11.2z",
    "M-5.4-3.2-3.2-5.4 0-2.2 3.2-5.4 5.4-3.2 2.2 0 5.4 3.2 3.2 5.4 0 2.2-3.2 5.4-5.4 3.2-2.2 0z",
    "M-1.9-5.8h3.8v3.9h3.9v3.8h-3.9v3.9h-3.8v-3.9h-3.9v-3.8h3.9z",
    "M-3.1-5.4h6.2l3.1 5.4-3.1 5.4h-6.2l-3.1-5.4z",
)

_Point = tuple[File, float]
_Box = tuple[float, float, float, float]


def looks(files: Sequence[File]) -> dict[str, int]:
    """The number of each method's colour and shape."""
    return {method: n for n, method in enumerate(sorted({f.kept.method for f in files}))}


def section_of(files: Sequence[File], measures: Sequence[Measure], looks: Mapping[str, int]) -> str:
    panels = [(f"Captured {m.title}", [(f, v) for f in files if (v := m.of(f.kept)) is not None]) for m in measures]
    answers = [(f, f.kept.answers) for f in files if f.kept.answers is not None]
    closed = [(f, a.closed) for f, a in answers if math.isfinite(a.closed)]
    if closed:
        panels.append(("Distance to the LoRA's answers, share closed", closed))
    numbered = len(files) > _NAMED or len({f.name for f in files}) < len(files)
    key = "".join(
        f'<li><svg width="16" height="16" viewBox="-8 -8 16 16" aria-hidden="true">{_mark(n, 0, 0)}</svg>'
        f" {name(method)}</li>"
        for method, n in looks.items()
    )
    said = (
        "Up and to the left is better. The dashed line goes along the files that no smaller file beats. Bytes are those"
        " of a file without extra tensors."
    )
    if numbered:
        said += " The numbers are those of the files in the tables."
    return section(
        "Frontier",
        [
            f"<p>{said}</p>",
            f'<ul class="key" aria-label="Methods">{key}</ul>',
            '<div class="panels">',
            *(_panel(n, what, points, looks, numbered) for n, (what, points) in enumerate(panels)),
            "</div>",
        ],
    )


def _size(file: File) -> int:
    return max(file.kept.adapter_bytes, 1)


@dataclass(frozen=True)
class _Axes:
    """Bytes from left to right, a share of at most 1 from bottom to top."""

    smallest: float
    largest: float
    lowest: float

    def x(self, nbytes: float) -> float:
        part = math.log(nbytes / self.smallest) / math.log(self.largest / self.smallest)
        return _LEFT + part * (_RIGHT - _LEFT)

    def y(self, share: float) -> float:
        part = (max(share, self.lowest) - self.lowest) / (1 - self.lowest)
        return _BOTTOM - min(part, 1.0) * (_BOTTOM - _TOP)


def _axes(points: Sequence[_Point]) -> tuple[_Axes, list[float]]:
    """Axes around the points, and the ticks of the vertical one."""
    sizes = [_size(f) for f, _ in points]
    middle = math.sqrt(min(sizes) * max(sizes))
    half = max(1.3 * math.sqrt(max(sizes) / min(sizes)), math.sqrt(8))
    low = max(min([0.95, *(value for _, value in points)]), _LOWEST)
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25) if (1 - low) / s <= 6.5)
    count = math.ceil((1 - low) / step - 1e-9)
    return _Axes(middle / half, middle * half, 1 - count * step), [1 - n * step for n in range(count + 1)]


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten, or the powers alone where that would be too many."""
    powers = [10.0**d for d in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    fine = [m * power for power in powers for m in (1, 2, 5) if low <= m * power <= high]
    return fine if len(fine) <= 7 else [power for power in powers if low <= power <= high]


def _panel(n: int, what: str, points: Sequence[_Point], looks: Mapping[str, int], numbered: bool) -> str:
    axes, shares = _axes(points)
    ordered = sorted(points, key=lambda p: (_size(p[0]), -p[1], p[0].number))
    told = "; ".join(f"{printable(f.name)} {count_bytes(_size(f))} {percent(value)} %" for f, value in ordered)
    lines = [
        f'<figure><figcaption id="plot-{n}">{what}, %</figcaption>',
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="plot-{n} points-{n}">',
        f'<desc id="points-{n}">Against bytes, smallest file first: {escape(told)}</desc>',
    ]
    for share in shares:
        y = axes.y(share)
        lines.append(f'<path class="{"zero" if abs(share) < 1e-9 else "grid"}" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>')
        lines.append(_label(_LEFT - 5, y + 4, f"{100 * share:.0f}", "end"))
    for tick in _ticks(axes.smallest, axes.largest):
        x = axes.x(tick)
        lines.append(f'<path class="grid" d="M{x:.1f} {_BOTTOM}v4"/>')
        lines.append(_label(x, _BOTTOM + 16, count_bytes(round(tick)), "middle"))
    lines.append(_label(_RIGHT, _BOTTOM + 34, "bytes of the file", "end"))
    sources = {f.kept.source_bytes for f, _ in points}
    if len(sources) == 1 and (whole := sources.pop()) > 0:
        for ratio in _ticks(whole / axes.largest, whole / axes.smallest):
            x = axes.x(whole / ratio)
            lines.append(f'<path class="grid" d="M{x:.1f} {_TOP}v-4"/>')
            lines.append(_label(x, _TOP - 8, f"{ratio:,g}x", "middle"))
        lines.append(_label(_RIGHT, _TOP - 26, "times smaller", "end"))
    lines.append(f'<path class="front" d="{_steps(ordered, axes)}"/>')
    return "\n".join([*lines, *_marks(ordered, axes, looks, numbered), "</svg></figure>"])


def _label(x: float, y: float, shown: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{shown}</text>'


def _steps(ordered: Sequence[_Point], axes: _Axes) -> str:
    path, best = "", -math.inf
    for f, value in ordered:
        if value > best:
            x, y = axes.x(_size(f)), axes.y(value)
            path += f"H{x:.1f}V{y:.1f}" if path else f"M{x:.1f} {y:.1f}"
            best = value
    return f"{path}H{_RIGHT}"


def _mark(look: int, x: float, y: float, inside: str = "") -> str:
    # After eight methods the colours go on with other shapes.
    shape = _SHAPES[(look + look // len(_SHAPES)) % len(_SHAPES)]
    return f'<path class="k{look}" transform="translate({x:.1f} {y:.1f})" d="{shape}">{inside}</path>'


def _marks(ordered: Sequence[_Point], axes: _Axes, looks: Mapping[str, int], numbered: bool) -> list[str]:
    """Marks, and labels where there is room: beside the mark, else further off with a line to it."""
    spots = [(axes.x(_size(f)), axes.y(value)) for f, value in ordered]
    taken: list[_Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    lines, marks, labels = [], [], []
    for (f, value), (x, y) in zip(ordered, spots, strict=True):
        shown = str(f.number) if numbered else short(f.name.removesuffix(".lrc"), 20)
        if value < axes.lowest:
            shown += f" ({percent(value)})"
        box = _room(x, y, 6.2 * len(shown) + 4, taken)
        taken.append(box)
        middle, height = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        if abs(height - y) > 16:
            edge = min(max(x, box[0]), box[2])
            lines.append(f'<path class="lead" d="M{x:.1f} {y:.1f}L{edge:.1f} {height:.1f}"/>')
        labels.append(f'<text class="label" x="{middle:.1f}" y="{height + 4:.1f}">{escape(shown)}</text>')
        told = f"{text(f.name)}: {percent(value)} %, {_size(f):,} bytes, {times(f.kept.ratio)}, {text(f.kept.method)}"
        marks.append(_mark(looks[f.kept.method], x, y, f"<title>{told}</title>"))
    return [*lines, *marks, *labels]


def _room(x: float, y: float, width: float, taken: Sequence[_Box]) -> _Box:
    """The first free place for a label around a mark; over its right side if there is none at all."""
    places = [(x + 8, y - 7), (x - 8 - width, y - 7), (x - width / 2, y - 21), (x - width / 2, y + 8)]
    for away in range(1, 14):
        for sign in (-1, 1):
            places += [(x + 14, y - 7 + sign * 13 * away), (x - 14 - width, y - 7 + sign * 13 * away)]
    for left, top in places:
        box = (left, top, left + width, top + 14)
        inside = left >= _LEFT and box[2] <= _WIDTH and top >= _TOP - 6 and box[3] <= _BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            return box
    left = max(min(x + 8, _WIDTH - width), _LEFT)
    return (left, y - 7, left + width, y + 7)


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] - 1 and other[1] < one[3] - 1
