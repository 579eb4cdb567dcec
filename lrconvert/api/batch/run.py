"""The verbs for many adapters at once: `convert_many`, `compress_many`, `allocate_many`."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from lrconvert.api.batch import manifest, parquet, scheduler, stores
from lrconvert.api.batch.flight import Flight
from lrconvert.api.batch.job import Job, Verb, Work
from lrconvert.api.batch.manifest import Manifest
from lrconvert.api.batch.metrics import INTERVAL
from lrconvert.api.batch.one import convert_one
from lrconvert.api.batch.options import BatchOptions
from lrconvert.api.batch.sources import AnyPath, AskedPlan, Plan, plan
from lrconvert.api.batch.tally import Batch, Tally
from lrconvert.api.batch.workers import Workers
from lrconvert.api.batch.works import Works
from lrconvert.api.shared import method_of, output_of, path_of, take_reading
from lrconvert.core import devices
from lrconvert.core.errors import ArgumentError, OptionError, OutputPathError
from lrconvert.core.options import described, take
from lrconvert.core.wording import spelled
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.io import remote
from lrconvert.io.remote import Url

Sources = AnyPath | Sequence[AnyPath] | None
_IN_FLIGHT = 256  # jobs given at once to an executor that does not say how many workers it has


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
    works = Works(jobs, work, reading, batch)
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
        works = Works(jobs, work, reading, batch)
        tally = Tally(batch, jobs, None if batch.dry_run else kept, works, root if isinstance(root, Url) else None)
        try:
            left = array("q", (number for number in range(len(jobs)) if not tally.knows(number)))
            if left:
                _fly(works, left, batch, tally)
        finally:
            tally.metrics.close()
            tally.clean_up()
        done = tally.batch()
    return done if kept is None else replace(done, notes=tuple(kept.notes))


def _fly(works: Works, left: Sequence[int], batch: BatchOptions, tally: Tally) -> None:
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
def _executor(batch: BatchOptions, works: Works, left: Sequence[int]) -> Iterator[tuple[Executor, Callable[[], int]]]:
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


def _processes(options: Mapping[str, Any], waiting: bool) -> int:
    """As many as there are cores to run on, twice as many where half of them are `waiting` for a store; one where all
    would share a GPU."""
    if devices.resolved(str(options.get("device", "auto"))).startswith("cuda"):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 2 * cores if waiting else cores
