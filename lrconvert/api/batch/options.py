"""The way a batch runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from lrconvert.api.batch.job import Outcome
from lrconvert.core.options import option

OnDone = Callable[[int, int], None]
OnOutcome = Callable[[Outcome], None]


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
