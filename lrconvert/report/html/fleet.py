"""The page about many adapters: how they came out together, a histogram, and a table that sorts, the worst first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lrconvert.report.html.labels import Box
from lrconvert.report.html.templates import rendered

_ROWS = 5000  # of the table; a browser takes no more with ease
_FAILED = 200
_BINS = 20
DO_NOT_SHIP, LEFT = "do not ship", "left"
WIDTH, HEIGHT = 900, 250
AREA = Box(60, 16, 880, 200)


@dataclass(frozen=True)
class Adapter:
    """An adapter of a fleet. Numbers are None where they are not known; `verdict` is "ship", "do not ship" or "";
    `failure` says in a line why there is none."""

    name: str
    state: str = "done"
    method: str = ""
    nbytes: int | None = None
    ratio: float | None = None
    captured: float | None = None
    closed: float | None = None
    dropped: int | None = None
    verdict: str = ""
    failure: str = ""


@dataclass(frozen=True)
class Bar:
    """A bar of the histogram: its box, the range of shares in percent, and how many adapters are in it."""

    box: Box
    low: int
    high: int
    count: int


def fleet_page(title: str, adapters: Sequence[Adapter], command: str = "", versions: str = "") -> str:
    """Return one HTML document about many adapters, of which those whose state is "left" are counted alone. `command`
    is the one that was given."""
    count = len(adapters)
    adapters = [a for a in adapters if a.state != LEFT]
    measured = [a for a in adapters if _kept(a) is not None]
    failed = sorted((a for a in adapters if a.failure), key=lambda a: a.name)
    whole = sorted((a for a in adapters if not a.failure), key=lambda a: (_or_infinite(_kept(a)), a.name))
    by_answers = any(a.closed is not None for a in adapters)
    shares = [share for a in measured if (share := _kept(a)) is not None]
    sized = [a for a in whole if a.nbytes is not None and a.ratio is not None]
    total = sum(a.nbytes or 0 for a in sized)
    return rendered(
        "fleet.html",
        title=title,
        command=command,
        versions=versions,
        adapters=whole[:_ROWS],
        left_out=len(whole) - len(whole[:_ROWS]),
        failed=failed[:_FAILED],
        failed_count=len(failed),
        count=count,
        left=count - len(adapters),
        total=total,
        source=round(sum((a.nbytes or 0) * (a.ratio or 0) for a in sized)),
        by_answers=by_answers,
        has_verdicts=any(a.verdict for a in adapters),
        not_shipped=sum(a.verdict == DO_NOT_SHIP for a in adapters),
        what="of the distance to the LoRA's answers that is closed"
        if by_answers
        else "of the weights' energy that is captured",
        middle=median(shares) if shares else None,
        worst=whole[0] if shares else None,
        worst_share=_kept(whole[0]) if shares else None,
        bars=_bars(shares),
        grid=_grid(shares),
    )


def _kept(adapter: Adapter) -> float | None:
    """Return the share that counts of an adapter: of answers if they were measured, else weights."""
    share = adapter.captured if adapter.closed is None else adapter.closed
    return None if share is None or not math.isfinite(share) else share


def _counts(shares: Sequence[float]) -> tuple[list[int], int, int]:
    """Return the number of shares in each bin, the percent at which the first begins, and the percent that a bin is
    wide. The first takes those below zero."""
    lowest = min(max(100 * min(shares), 0.0), 99.0)
    width = next(w for w in (1, 2, 5) if w == 5 or lowest >= 100 - w * _BINS)
    first = int(lowest // width) * width
    counts = [0] * ((100 - first) // width)
    for share in shares:
        counts[min(max(int((100 * share - first) // width), 0), len(counts) - 1)] += 1
    return counts, first, width


def _bars(shares: Sequence[float]) -> list[Bar]:
    if not shares:
        return []
    counts, first, width = _counts(shares)
    step = (AREA.right - AREA.left) / len(counts)
    scale = (AREA.bottom - AREA.top) / max(counts)
    return [
        Bar(
            Box(AREA.left + n * step, AREA.bottom - scale * count, AREA.left + (n + 1) * step - 2, AREA.bottom),
            first + n * width,
            first + (n + 1) * width,
            count,
        )
        for n, count in enumerate(counts)
    ]


def _grid(shares: Sequence[float]) -> list[tuple[float, int]]:
    """Lines of the histogram as (y, how many)."""
    if not shares:
        return []
    most = max(_counts(shares)[0])
    numbers = sorted({0, most, most // 2} - ({most // 2} if most < 4 else set()))
    return [(AREA.bottom - n / most * (AREA.bottom - AREA.top), n) for n in numbers]


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value
