"""The outcomes of a fleet: counts, bytes, shares, time, the worst, and the failures by their code."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lrconvert.core.errors import printable
from lrconvert.report.tables import count_bytes, percent, relative, table

_WORST = 10  # adapters that are shown
_EXAMPLES = 3  # failures of each code


class Line(Protocol):
    """A line of a manifest: a job that is asked for, which has no more than these, or a record."""

    @property
    def source(self) -> str: ...
    @property
    def output(self) -> str: ...


@dataclass(frozen=True)
class Spread:
    """The least, the median, the 95th percentile and the most of some numbers."""

    least: float
    median: float
    p95: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Return that of numbers, None of none."""
        if not values:
            return None
        ordered = sorted(values)

        def at(share: float) -> float:
            return ordered[min(math.ceil(share * len(ordered)), len(ordered)) - 1]

        return cls(ordered[0], at(0.5), at(0.95), ordered[-1])


@dataclass(frozen=True)
class Summary:
    """The outcomes of a fleet: how many adapters, of which state, with which verdict; the spread of their bytes,
    captured shares, ratios and seconds, and the sums of bytes and seconds; how many failures have which code."""

    count: int
    done: int
    failed: int
    left: int
    not_shipped: int
    nbytes: Spread | None
    captured: Spread | None
    ratio: Spread | None
    seconds: Spread | None
    total_bytes: int
    total_seconds: float
    codes: dict[str, int]


def summary(lines: Sequence[Any]) -> Summary:
    """Return the summary of the lines of a manifest, one for each output."""
    states = Counter(getattr(line, "state", "left") for line in lines)
    done = [line for line in lines if getattr(line, "state", "") == "done"]

    def spread(name: str, among: Sequence[Any] = done) -> Spread | None:
        return Spread.of([value for line in among if (value := getattr(line, name, None)) is not None])

    codes = Counter(line.code for line in lines if getattr(line, "state", "") == "failed")
    return Summary(
        len(lines),
        states["done"],
        states["failed"],
        states["left"],
        sum(line.verdict == "do not ship" for line in done),
        spread("bytes"),
        spread("captured"),
        spread("ratio"),
        spread("seconds", lines),
        sum(line.bytes or 0 for line in done),
        math.fsum(getattr(line, "seconds", None) or 0.0 for line in lines),
        dict(codes.most_common()),
    )


def worst(lines: Sequence[Any], count: int) -> list[Any]:
    """Return the adapters that keep least, the worst first."""
    measured = [line for line in lines if getattr(line, "captured", None) is not None and line.state == "done"]
    return sorted(measured, key=lambda line: (line.captured, line.source))[:count]


def fleet_json(told: Summary, lines: Sequence[Any]) -> dict[str, Any]:
    """Return a fleet as a JSON value: its summary, the worst adapters, and all failures."""
    spreads = {name: getattr(told, name) for name in ("nbytes", "captured", "ratio", "seconds")}
    failures = [line for line in lines if getattr(line, "state", "") == "failed"]
    return {
        "adapters": told.count,
        "done": told.done,
        "failed": told.failed,
        "left": told.left,
        "do_not_ship": told.not_shipped,
        "total_bytes": told.total_bytes,
        "total_seconds": round(told.total_seconds, 3),
        **{
            "bytes" if name == "nbytes" else name: None if spread is None else vars(spread)
            for name, spread in spreads.items()
        },
        "worst": [
            {"source": line.source, "output": line.output, "captured": line.captured, "ratio": line.ratio}
            for line in worst(lines, _WORST)
        ],
        "codes": told.codes,
        "failures": [
            {"source": line.source, "output": line.output, "code": line.code, "message": line.message}
            for line in failures
        ],
    }


def fleet_text(told: Summary, lines: Sequence[Any], verbose: bool = False) -> str:
    """Return a fleet as text. `verbose` names every adapter and every failure."""
    parts = [f"adapters  {told.count:,}: {told.done:,} done, {told.failed:,} failed, {told.left:,} left"]
    if told.not_shipped:
        parts[0] += f"; do not ship {told.not_shipped:,} of them"
    if told.nbytes is not None:
        each = f"median {count_bytes(round(told.nbytes.median))}, most {count_bytes(round(told.nbytes.most))}"
        times = "" if told.ratio is None else f"; median {told.ratio.median:.1f} times smaller"
        parts.append(f"bytes     {count_bytes(told.total_bytes)} in all, {each}{times}")
    if told.captured is not None:
        kept = told.captured
        parts.append(f"captured  median {percent(kept.median)}, least {percent(kept.least)}, most {percent(kept.most)}")
    if told.seconds is not None:
        spent = told.seconds
        per = f"median {spent.median:.3g} s, 95 of 100 within {spent.p95:.3g} s, most {spent.most:.3g} s"
        parts.append(f"work      {_duration(told.total_seconds)} in all; {per}")
    shown = worst(lines, told.count if verbose else _WORST)
    if shown:
        folder, names = relative([line.source for line in shown])
        cells = [
            [
                printable(name),
                line.method,
                "" if line.adapter_bytes is None else f"{line.adapter_bytes:,}",
                "" if line.ratio is None else f"{line.ratio:.1f}",
                percent(line.captured),
                "" if line.dropped is None else line.dropped,
            ]
            for line, name in zip(shown, names, strict=True)
        ]
        head = ["adapter (worst first)", "method", "bytes", "ratio", "captured", "dropped"]
        parts.append(f"\n{folder}{table(head, cells)}")
        if len(shown) < told.done:
            parts.append(f"... and {told.done - len(shown):,} more (-v shows all)")
    return "\n".join([*parts, *_failures(told, lines, verbose)])


def _failures(told: Summary, lines: Sequence[Any], verbose: bool) -> list[str]:
    """The failures, by their code, the most frequent first."""
    parts = []
    for code, count in told.codes.items():
        parts.append(f"\n{code}: {count:,} failed")
        failed = [line for line in lines if getattr(line, "code", "") == code]
        parts += [
            f"  {printable(line.message.removeprefix(f'{code}: '), 300)}"
            for line in failed[: None if verbose else _EXAMPLES]
        ]
        if count > _EXAMPLES and not verbose:
            parts.append(f"  ... and {count - _EXAMPLES:,} more (-v shows all)")
    return parts


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
