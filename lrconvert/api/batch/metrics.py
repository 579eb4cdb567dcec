"""Figures of a batch while it runs, as JSON lines: one for each adapter, and one for each interval.

    {"event":"adapter","time":...,"source":...,"output":...,"state":...,"code":...,"bytes":...,"seconds":...,
     "worker":...,"queue":...}
    {"event":"interval","time":...,"elapsed":...,"done":...,"skipped":...,"failed":...,"left":...,"queue":...,
     "workers":...,"bytes":...,"seconds":...,"per_minute":...}

`queue` is how many are on their way; `workers` how many had an outcome in the interval; `bytes`, `seconds` (of work, of
all workers together) and `per_minute` are those of the interval, all other counts those of the batch so far. A last
line has ``"event":"end"`` and the figures of the whole batch.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrconvert.api.batch.job import Outcome
from lrconvert.core.errors import OutputPathError
from lrconvert.io.durable import File

INTERVAL = 10.0  # seconds


@dataclass
class _Span:
    """The outcomes that came in since `start`."""

    start: float
    counts: Counter[str] = field(default_factory=Counter)
    nbytes: int = 0
    seconds: float = 0.0
    workers: set[str] = field(default_factory=set)

    def add(self, outcome: Outcome) -> None:
        self.counts[outcome.state] += 1
        self.nbytes += outcome.total_bytes or 0
        self.seconds += outcome.seconds or 0.0
        if outcome.worker:
            self.workers.add(outcome.worker)

    def figures(self, now: float) -> dict[str, Any]:
        elapsed = now - self.start
        return {
            "workers": len(self.workers),
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "per_minute": round(60 * self.counts.total() / elapsed, 1) if elapsed > 0 else None,
        }


class Metrics:
    """A file of figures, which is appended to; without a path nothing is written. Raises E-OUT-PATH, E-IO-WRITE."""

    def __init__(self, path: Path | None, total: int) -> None:
        self._total, now = total, time.monotonic()
        self._file = None if path is None else _appending(path)
        self._whole, self._interval = _Span(now), _Span(now)

    def add(self, outcome: Outcome, queue: int) -> None:
        """Write the line of an adapter, and that of an interval if one is over."""
        if self._file is None:
            return
        self._whole.add(outcome)
        self._interval.add(outcome)
        self._write(
            "adapter",
            source=outcome.source,
            output=outcome.output,
            state=outcome.state,
            code=outcome.code,
            bytes=outcome.total_bytes,
            seconds=outcome.seconds,
            worker=outcome.worker,
            queue=queue,
        )
        self.tick(queue)

    def tick(self, queue: int) -> None:
        """Write the line of an interval if one is over."""
        now = time.monotonic()
        if self._file is not None and now - self._interval.start >= INTERVAL:
            self._write("interval", **self._counts(now, queue), **self._interval.figures(now))
            self._interval = _Span(now)

    def close(self) -> None:
        """Write the figures of the whole batch. Idempotent."""
        if self._file is not None:
            now = time.monotonic()
            self._write("end", **self._counts(now, 0), **self._whole.figures(now))
            with self._file:
                self._file = None

    def _counts(self, now: float, queue: int) -> dict[str, Any]:
        counts = {state: self._whole.counts[state] for state in ("done", "skipped", "failed")}
        left = self._total - self._whole.counts.total()
        return {"elapsed": round(now - self._whole.start, 3), **counts, "left": left, "queue": queue}

    def _write(self, event: str, **figures: Any) -> None:
        assert self._file is not None
        value = {"event": event, "time": round(time.time(), 3), **figures}
        self._file.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")


def _appending(path: Path) -> File:
    if path.exists() and not path.is_file():
        raise OutputPathError("is no file to write metrics to", fix="name another", path=path)
    return File(path, path, keep=path.stat().st_size if path.exists() else None)
