"""The outcomes of a batch, as they come and at its end; what a manifest keeps of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from lrconvert.api.batch import manifest, places, stores
from lrconvert.api.batch.job import DO_NOT_SHIP, Outcome, State
from lrconvert.api.batch.manifest import Manifest, Record
from lrconvert.api.batch.metrics import Metrics
from lrconvert.api.batch.options import BatchOptions
from lrconvert.api.batch.sources import AskedPlan, Planned
from lrconvert.api.batch.works import Works
from lrconvert.core.errors import LrcError
from lrconvert.core.notebook import html_table
from lrconvert.core.redaction import redacted
from lrconvert.io.remote import Url


@dataclass(frozen=True)
class Batch:
    """The outcomes in the order of the sources, none if `BatchOptions.on_outcome` took them; how many of each state,
    and how many `compress` says not to ship; `notes` on the manifest, where it could not be used."""

    outcomes: tuple[Outcome, ...]
    counts: Mapping[State, int]
    notes: tuple[str, ...] = ()
    do_not_ship: int = 0

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {state}" for state, count in sorted(self.counts.items()))
        return f"<Batch: {counts or 'no adapters'}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: a row for each adapter, failures first."""
        rows = [
            (one.source, one.state, *("" if v is None else v for v in (one.nbytes, one.captured)), one.code)
            for one in sorted(self.outcomes, key=lambda one: one.state != "failed")
        ]
        return html_table(repr(self)[1:-1], ("adapter", "", "bytes", "captured", "error"), rows, self.notes)

    @property
    def ok(self) -> bool:
        return not self.count("failed")

    def count(self, state: State) -> int:
        return self.counts.get(state, 0)


@dataclass
class Tally:
    """Outcomes of the adapters so far. With a manifest it keeps what a later run needs to know; `root` is the folder of
    the outputs, if that is at a URL."""

    options: BatchOptions
    jobs: Sequence[Planned]
    manifest: Manifest | None
    works: Works
    root: Url | None = None
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    counts: Counter[State] = field(default_factory=Counter)
    do_not_ship: int = 0
    folders: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.metrics = Metrics(None if self.options.metrics is None else Path(self.options.metrics), len(self.jobs))

    def knows(self, number: int) -> bool:
        """Take an adapter as passed by, and return true, if the manifest says that its output is finished."""
        job = self.jobs[number]
        record = None if self.manifest is None else self.manifest.finished(self._key(job))
        if record is None or record.settings != self.works.settings(number):
            return False
        if job.digest not in ("", record.digest):
            return False
        try:
            source = job.state or places.source_state(job.where).digest
            output = self._outputs.of(job.target) if self.root else places.output_state(job.target).digest
        except (OSError, LrcError):  # the worker will say so
            return False
        if (record.source_state, record.output_state) != (source, output):
            return False
        passed = Outcome(
            job.source,
            redacted(job.target),
            "skipped",
            record.adapter_bytes,
            record.bytes,
            None if record.captured is None else round(record.captured, 4),  # as the file states it
            verdict=record.verdict,
            method=record.method,
            source_digest=record.digest or "",
            output_digest=record.output_digest or "",
        )
        self._count(number, passed, queue=0)
        return True

    @cached_property
    def _outputs(self) -> stores.OutputStates:
        assert self.root is not None
        return stores.OutputStates(self.root)

    def add(self, number: int, outcome: Outcome, queue: int) -> None:
        """Count an adapter, tell of it, and record it."""
        job = self.jobs[number]
        outcome = replace(outcome, source=job.source, output=redacted(job.target))
        self._count(number, outcome, queue)
        if self.manifest is not None:
            self.manifest.add(self._record(number, job, outcome))

    def _count(self, number: int, outcome: Outcome, queue: int) -> None:
        self.counts[outcome.state] += 1
        if (folder := places.folder_of(self.jobs[number].target)) is not None:
            self.folders.add(folder)
        self.do_not_ship += outcome.verdict == DO_NOT_SHIP
        self.metrics.add(outcome, queue)
        if self.options.on_outcome is None:
            self.outcomes[number] = outcome
        else:
            self.options.on_outcome(outcome)
        self.options.on_done(self.counts.total(), len(self.jobs))

    def clean_up(self) -> None:
        """Remove what processes that were killed have left of outputs. What keeps it from being removed is a note: the
        outputs do not depend on it."""
        if self.manifest is None:
            return
        try:
            places.clean_up(self.folders, lambda: (job.target for job in self.jobs))
        except LrcError as error:
            self.manifest.notes.append(f"what processes that were killed may have left was not removed: {error}")

    def _key(self, job: Planned) -> str:
        """Return how the manifest names the output of a job."""
        assert self.manifest is not None
        if self.options.manifest is None or isinstance(self.jobs, AskedPlan):
            return manifest.portable(job.name)
        return manifest.portable(redacted(manifest.named(job.target, self.manifest.folder)))

    def _record(self, number: int, job: Planned, outcome: Outcome) -> Record:
        assert self.manifest is not None
        key, settings = self._key(job), self.works.settings(number)
        is_asked = isinstance(self.jobs, AskedPlan)
        place = job.source if is_asked else manifest.portable(manifest.named(job.where, self.manifest.folder))
        source = redacted(place)
        states = outcome.stamps or (None, None)
        before = self.manifest.finished(key) if outcome.state == "skipped" else None
        if before is not None and (before.settings, before.output_digest) == (settings, outcome.output_digest):
            return replace(before, source_state=states[0], output_state=states[1])  # with what was known of it
        return Record(
            state="failed" if outcome.state == "failed" else "done",
            source=source,
            output=key,
            digest=outcome.source_digest or None,
            output_digest=outcome.output_digest or None,
            bytes=outcome.total_bytes,
            adapter_bytes=outcome.nbytes,
            captured=_finite(outcome.captured),
            ratio=_finite(outcome.ratio),
            dropped=outcome.dropped,
            method=outcome.method,
            verdict=outcome.verdict,
            code=outcome.code,
            message=outcome.message,
            seconds=outcome.seconds if outcome.state != "skipped" else None,
            settings=settings,
            source_state=states[0],
            output_state=states[1],
        )

    def batch(self) -> Batch:
        notes = () if self.manifest is None else tuple(self.manifest.notes)
        outcomes = tuple(self.outcomes[number] for number in sorted(self.outcomes))
        return Batch(outcomes, self.counts, notes, self.do_not_ship)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
