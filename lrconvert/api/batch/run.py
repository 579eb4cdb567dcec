"""The verbs for many adapters at once: `convert_many`, `compress_many`, `allocate_many`."""

from __future__ import annotations

import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lrconvert.api.batch import manifest, parquet, places, request, scheduler, stores
from lrconvert.api.batch.flight import Flight
from lrconvert.api.batch.job import DO_NOT_SHIP, Job, Outcome, State, Verb, Work
from lrconvert.api.batch.manifest import Manifest, Record
from lrconvert.api.batch.metrics import INTERVAL, Metrics
from lrconvert.api.batch.one import convert_one
from lrconvert.api.batch.sources import AnyPath, AskedPlan, Plan, Planned, plan
from lrconvert.api.batch.workers import Workers
from lrconvert.api.shared import method_of, output_of, path_of, take_reading
from lrconvert.core import devices
from lrconvert.core.errors import ArgumentError, LrcError, OptionError, OutputPathError
from lrconvert.core.notebook import html_table
from lrconvert.core.options import described, make, option, take
from lrconvert.core.redaction import redacted
from lrconvert.core.wording import is_on_command_line, spelled
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.io import remote
from lrconvert.io.remote import Url

OnDone = Callable[[int, int], None]
OnOutcome = Callable[[Outcome], None]
Sources = AnyPath | Sequence[AnyPath] | None
_IN_FLIGHT = 256  # jobs given at once to an executor that does not say how many workers it has


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


@dataclass(frozen=True)
class BatchOptions:
    """The way a batch runs.

    The work is done by `jobs` processes (without it as many as there are cores, twice as many for URLs, one with a
    GPU), by an `executor` of `concurrent.futures`, or by the Dask cluster whose `scheduler` has that address;
    `in_flight` jobs are given to these at once. `manifest` is the record of the batch, and names the jobs where no
    sources are given; `metrics` is a file of figures that is appended to. `verbose` adds the reports as text, `dry_run`
    plans only. `on_done(done, of)` is called after each adapter, and with `on_outcome` every outcome is given to it as
    it comes, and not kept: memory does not grow with their reports.
    """

    jobs: int | None = option(None, "Work in this many processes.  [default: one for each core, two for URLs]", least=1)
    executor: Executor | None = None
    scheduler: str | None = option(None, "Work on the Dask cluster whose scheduler is at this address (tcp://...).")
    in_flight: int | None = option(
        None, "Jobs given to --scheduler at once.  [default: two for each of its threads]", least=1
    )
    manifest: Path | None = option(
        None, "JSON lines of the jobs to do, in place of SOURCE and -o; what is done is appended.", kind="path"
    )
    metrics: Path | None = option(None, "Append figures to this file while it runs, as JSON lines.", kind="path")
    overwrite: bool = False
    dry_run: bool = False
    verbose: bool = False
    on_done: OnDone = lambda done, of: None
    on_outcome: OnOutcome | None = None


def convert_many(sources: Sources, out: AnyPath | None, method: str, **more: Any) -> Batch:
    """Convert many adapters into files in the folder `out`, which is made if it is not there.

    `sources` are adapters, or folders of adapters: ``OUT/<name>.lrc``, by the path in the folder. Where both are None,
    the jobs are those of a `manifest`. A failure is one outcome among the others. What is finished is passed by: the
    output is there, passes every check, and its provenance holds the digest of the same sources and options; or the
    manifest says that all this was so, and that source and output have the same files, sizes, times and inodes as then.
    Another file of that name fails with E-OUT-EXISTS, unless `overwrite`. One batch at a time writes a folder.

    `more` are single fields of `BatchOptions`, `allow_pickle`, `layout` and `alpha` as in `load`, and what `convert`
    takes, with paths for `base` and `statistics`. The outputs are the same bytes whatever does the work. A process that
    dies takes no adapter with it: its job is done once more, alone. Raises E-OPTION, E-OUT-PATH, E-LAYOUT and E-LOCKED
    for what no adapter could be converted with, before any is, and E-WORKER for an executor that breaks.
    """
    verb, form, fixed = _verb_of(method)
    return _many(verb, form, sources, out, {**more, **fixed})


def compress_many(sources: Sources, out: AnyPath | None, **more: Any) -> Batch:
    """Compress many adapters, as `compress` does; see `convert_many`. Each outcome has a `verdict`."""
    return _many("compress", "", sources, out, more)


def allocate_many(sources: Sources, out: AnyPath | None, **more: Any) -> Batch:
    """Allocate the ranks of many adapters, as `allocate` does; see `convert_many`. `data` are files."""
    return _many("allocate", "", sources, out, more)


def batch_jobs(sources: Sources, out: AnyPath, method: str, **more: Any) -> Iterator[Job]:
    """Yield the jobs that `convert_many` would give out, for `convert_one` in a scheduler of your own, which is as safe
    to repeat there. `method` may be "compress", too. Base, statistics and data are digested here, once. `more` is as in
    `convert_many`, of `BatchOptions` only `overwrite`. Raises what `convert_many` raises before any work.

    >>> from lrconvert import batch_jobs, convert_one
    >>> [convert_one(job).state for job in batch_jobs("my-adapter", "compact", "lowrank", target_ratio=4)]
    ['done']
    """
    verb, form, fixed = ("compress", "", {}) if method == "compress" else _verb_of(method)
    batch = BatchOptions(overwrite=bool(more.pop("overwrite", False)))
    reading = take_reading(more, more.get("base"))
    work = Work(verb, form, {**more, **fixed})
    root, listed = _checked(work, sources, out, batch)
    jobs = plan(listed, root)
    works = _Works(jobs, work, reading, batch)
    return (works.job(number) for number in range(len(jobs)))


def _verb_of(method: str) -> tuple[Verb, str, dict[str, Any]]:
    """The verb that a method is of, its id, and the options that its name stands for."""
    if method == "alora":
        return "allocate", "", {}
    return "convert", *method_of(method)


def _many(verb: Verb, method: str, sources: Sources, out: AnyPath | None, more: dict[str, Any]) -> Batch:
    batch = take(BatchOptions, None, more, verb)
    reading = take_reading(more, more.get("base"))
    return run(Work(verb, method, more), sources, out, reading, batch)


def run(work: Work, sources: Sources, out: AnyPath | None, reading: ReadOptions, batch: BatchOptions) -> Batch:
    """Do `work` to every adapter of `sources`, into files in the folder `out`, or to those of a manifest; see
    `convert_many`."""
    root, listed = _checked(work, sources, out, batch)
    planned = None if root is None and not listed else plan(listed, root)
    with _manifest(batch, root, asks=planned is None) as kept:
        jobs: Plan | AskedPlan = AskedPlan(kept) if planned is None and kept is not None else planned or plan([], None)
        works = _Works(jobs, work, reading, batch)
        tally = _Tally(batch, jobs, None if batch.dry_run else kept, works, root if isinstance(root, Url) else None)
        try:
            left = array("q", (number for number in range(len(jobs)) if not tally.knows(number)))
            if left:
                _fly(works, left, batch, tally)
        finally:
            tally.metrics.close()
            tally.clean_up()
        done = tally.batch()
    return done if kept is None else replace(done, notes=tuple(kept.notes))


def _fly(works: _Works, left: Sequence[int], batch: BatchOptions, tally: _Tally) -> None:
    """Give the jobs of these numbers to what does the work, and take their outcomes."""
    with (
        _executor(batch, works, left) as (executor, limit),
        Flight(executor, convert_one, limit) as flight,
    ):

        def land() -> None:
            if (landed := flight.next(INTERVAL)) is not None:
                tally.add(*landed, queue=len(flight))
            else:
                tally.metrics.tick(len(flight))

        for number in left:
            while flight.is_full:
                land()
            flight.add(number, works.job(number))
        while flight:
            land()


@contextmanager
def _executor(batch: BatchOptions, works: _Works, left: Sequence[int]) -> Iterator[tuple[Executor, Callable[[], int]]]:
    """Give what does the work, and how many jobs may be on their way. Processes of our own end with the `Flight`."""
    if batch.executor is not None:
        most = batch.in_flight or 2 * getattr(batch.executor, "_max_workers", _IN_FLIGHT // 2)
        yield batch.executor, lambda: most
    elif batch.scheduler is not None:
        with scheduler.connected(batch.scheduler) as (executor, limit):
            yield executor, limit if batch.in_flight is None else lambda: batch.in_flight or 1
    else:
        waiting = remote.is_remote(works.job(left[0]).source)
        processes = min(batch.jobs or _processes(works.options, waiting), len(left))
        yield Workers(processes), lambda: processes


def _manifest(batch: BatchOptions, root: Path | Url | None, asks: bool) -> AbstractContextManager[Manifest | None]:
    """The manifest of a batch; none where nothing is written."""
    if batch.manifest is not None:
        path = Path(batch.manifest)
        if parquet.is_parquet(path) and not asks:
            raise OptionError("a record is appended to, which Parquet cannot be", fix="name a file of JSON lines")
        return manifest.opened(parquet.as_lines(path) if parquet.is_parquet(path) else path, asks=asks)
    if root is None or batch.dry_run:
        return nullcontext()
    return stores.manifest_of(root) if isinstance(root, Url) else manifest.opened_in(root)


def _checked(
    work: Work, sources: Sources, out: AnyPath | None, batch: BatchOptions
) -> tuple[Path | Url | None, list[AnyPath]]:
    """The folder of the outputs, None where none is written, and the sources as a list. Raises what `convert_many`
    raises."""
    if batch.dry_run and work.verb == "compress":
        raise OptionError("compress has no dry run", fix="leave it out")
    if work.options.get("resume"):
        what = f"{spelled('resume', True)} is for one adapter: a batch passes by what is finished"
        raise OptionError(what, fix="leave it out and give the same command again")
    ways = {"jobs": batch.jobs, "executor": batch.executor, "scheduler": batch.scheduler}
    chosen = [spelled(name) for name, way in ways.items() if way is not None]
    if len(chosen) > 1:
        raise OptionError(f"{' and '.join(chosen)} are two ways to do the work", fix="choose one")
    if batch.in_flight is not None and batch.executor is None and batch.scheduler is None:
        what = f"{spelled('in_flight')} is for {spelled('scheduler')} and executors"
        raise OptionError(what, fix=f"choose {spelled('jobs')}: each process has one job at a time")
    if sources is None and batch.manifest is not None:
        if out is not None:
            raise OptionError("the outputs are those that the manifest names", fix="leave the folder out")
        return None, []
    if isinstance(sources, Mapping) or not isinstance(sources, (str, os.PathLike, Iterable)):
        raise ArgumentError(f"sources is {described(sources)}; paths of adapters, or of folders of them, were expected")
    listed: list[AnyPath] = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    for source in listed:
        path_of(source, "sources", "the path of an adapter, or of a folder of them,")
    root = None if out is None else _root(out)
    if root is None and not batch.dry_run:
        raise OptionError("there is no folder for the outputs", fix="name one, or plan only")
    return root, listed


def _root(out: AnyPath) -> Path | Url:
    """The folder of the outputs. Raises E-OUT-PATH, and E-OPTION for a URL that nothing is written to."""
    if remote.is_remote(path_of(out, "out")):
        url = remote.parse(os.fspath(out))
        remote.check_writable(url)
        return url
    root = output_of(out)
    if root.exists() and not root.is_dir():
        raise OutputPathError("is not a folder", fix="give a folder for the outputs", path=root)
    return root


@dataclass
class _Tally:
    """Outcomes of the adapters so far. With a manifest it keeps what a later run needs to know; `root` is the folder of
    the outputs, if that is at a URL."""

    options: BatchOptions
    jobs: Sequence[Planned]
    manifest: Manifest | None
    works: _Works
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


def _processes(options: Mapping[str, Any], waiting: bool) -> int:
    """As many as there are cores to run on, twice as many where half of them are `waiting` for a store; one where all
    would share a GPU."""
    if devices.resolved(str(options.get("device", "auto"))).startswith("cuda"):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 2 * cores if waiting else cores


class _Works:
    """The jobs of a plan with their work, prepared once for all. It is of one or two kinds: a layout and an alpha hold
    for sources that are not lrconvert files. Where all are, each refuses them."""

    def __init__(self, jobs: Sequence[Planned], work: Work, reading: ReadOptions, batch: BatchOptions) -> None:
        self._jobs, self._is_plan, self.options = jobs, batch.dry_run, work.options
        ready = request.prepared(work)
        ready = replace(ready, overwrite=batch.overwrite, verbose=batch.verbose, is_command=is_on_command_line())
        both = [_plain_reading(reading), _plain_reading(reading.for_ours())]
        self._kinds = [replace(ready, reading=kind) for kind in both]
        self._settings = [
            request.digest(
                work.verb,
                work.method,
                request.chosen(work.verb, work.method, ready.options, kind),
                "",
                ready.inputs or {},
            )
            for kind in both
        ]
        self._ours = bytearray()
        if both[0] != both[1]:
            self._ours = bytearray(places.is_compact(job.where) for job in jobs)
        if all(self._ours):
            self._ours.clear()

    def job(self, number: int) -> Job:
        """Return the job of a number, with absolute paths."""
        planned = self._jobs[number]
        output = "" if self._is_plan else places.absolute(planned.target)
        source, work = places.absolute_source(planned.where), self._kinds[self._kind(number)]
        return Job(source, output, work, planned.source, planned.digest)

    def settings(self, number: int) -> str:
        """Return the digest of a request without its source, as a manifest holds it."""
        return self._settings[self._kind(number)]

    def _kind(self, number: int) -> int:
        return self._ours[number] if self._ours else 0


def _plain_reading(reading: ReadOptions) -> dict[str, Any]:
    """The reading options as JSON, in their one spelling."""
    settled = make(ReadOptions, vars(reading), "reading")
    return {key: request.plain(key, value) for key, value in vars(settled).items() if value is not None}
