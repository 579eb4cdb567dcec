"""The verbs for many adapters at once: `convert_many`, `compress_many`, `allocate_many`."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lrconvert.api.batch import journal, pool, request
from lrconvert.api.batch.journal import DO_NOT_SHIP, Journal, Line
from lrconvert.api.batch.sources import AnyPath, Job, Plan, plan
from lrconvert.api.shared import method_of, output_of, path_of, take_reading
from lrconvert.core import devices
from lrconvert.core.errors import ArgumentError, OptionError, OutputPathError
from lrconvert.core.notebook import html_table
from lrconvert.core.options import described, make, option, take
from lrconvert.core.wording import is_on_command_line, spelled
from lrconvert.formats.lrc import file
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.io import hub
from lrconvert.io.checkpoint import KnownContent

State = Literal["done", "skipped", "failed"]
Verb = Literal["convert", "compress", "allocate"]
OnDone = Callable[[int, int], None]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one adapter. `nbytes` (without extra tensors), `total_bytes`, `captured`, `ratio` and how many
    modules were `dropped` are None where they are not known; `verdict`, of `compress` alone, is "ship", "do not ship",
    or "" where it is not known; `code` and `message` say why it failed; `report` is the JSON object of one
    conversion."""

    source: str
    output: str
    state: State
    nbytes: int | None = None
    total_bytes: int | None = None
    captured: float | None = None
    ratio: float | None = None
    dropped: int | None = None
    verdict: str = ""
    warnings: tuple[str, ...] = ()
    code: str = ""
    message: str = ""
    report: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


OnOutcome = Callable[[Outcome], None]


@dataclass(frozen=True)
class Batch:
    """The outcomes in the order of the sources, none if `BatchOptions.on_outcome` took them; how many of each state,
    and how many `compress` says not to ship; `notes` on the journal, where it could not be used."""

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
    """The way a batch runs: `jobs` processes at once (without it as many as there are cores, one with a GPU); `verbose`
    adds the reports as text, `dry_run` plans only. `on_done(done, of)` is called after each adapter, and with
    `on_outcome` every outcome is given to it as it comes, and not kept: memory does not grow with their reports."""

    jobs: int | None = option(None, "Work in this many processes.", least=1)
    overwrite: bool = False
    dry_run: bool = False
    verbose: bool = False
    on_done: OnDone = lambda done, of: None
    on_outcome: OnOutcome | None = None


@dataclass(frozen=True)
class Work:
    """The work done on every adapter of a batch: a `verb` with its `method`, and its options by their names, as JSON
    holds them. Options that are left out have their defaults."""

    verb: Verb
    method: str
    options: Mapping[str, Any]


def convert_many(sources: AnyPath | Sequence[AnyPath], out: AnyPath, method: str, **more: Any) -> Batch:
    """Convert many adapters into files in the folder `out`, which is made if it is not there.

    `sources` are adapters, or folders of adapters: ``OUT/<name>.lrc``, by the path in the folder. A failure is one
    outcome among the others. What is finished is passed by: the output is there, passes every check, and its provenance
    holds the digest of the same sources and options; or the journal of the folder says that all this was so, and that
    source and output have the same files, sizes, times and inodes as then. Another file of that name fails with
    E-OUT-EXISTS, unless `overwrite`. One batch at a time writes a folder.

    `more` are single fields of `BatchOptions`, `allow_pickle`, `layout` and `alpha` as in `load`, and what `convert`
    takes, with paths for `base` and `statistics`. The outputs are the same bytes whatever `jobs` is. Raises E-OPTION,
    E-OUT-PATH, E-LAYOUT and E-LOCKED for what no adapter could be converted with, before any is.
    """
    if method == "alora":
        return allocate_many(sources, out, **more)
    form, fixed = method_of(method)
    return _many("convert", form, sources, out, {**more, **fixed})


def compress_many(sources: AnyPath | Sequence[AnyPath], out: AnyPath, **more: Any) -> Batch:
    """Compress many adapters, as `compress` does; see `convert_many`. Each outcome has a `verdict`."""
    return _many("compress", "", sources, out, more)


def allocate_many(sources: AnyPath | Sequence[AnyPath], out: AnyPath, **more: Any) -> Batch:
    """Allocate the ranks of many adapters, as `allocate` does; see `convert_many`. `data` are files."""
    return _many("allocate", "", sources, out, more)


def _many(verb: Verb, method: str, sources: AnyPath | Sequence[AnyPath], out: AnyPath, more: dict[str, Any]) -> Batch:
    batch = take(BatchOptions, None, more, verb)
    reading = take_reading(more, more.get("base"))
    return run(Work(verb, method, more), sources, out, reading, batch)


def run(
    work: Work, sources: AnyPath | Sequence[AnyPath], out: AnyPath | None, reading: ReadOptions, batch: BatchOptions
) -> Batch:
    """Do `work` to every adapter of `sources`, into files in the folder `out`; see `convert_many`."""
    root, jobs = _planned(work, sources, out, batch)
    inputs, content = _inputs(work.options)
    options = {key: _plain(key, value) for key, value in work.options.items()}
    readings = _Readings(jobs, reading)
    wanted = [
        request.digest(work.verb, work.method, request.chosen(work.verb, work.method, options, kind), "", inputs)
        for kind in readings.kinds
    ]
    shared = {
        "verb": work.verb,
        "method": work.method,
        "overwrite": batch.overwrite,
        "verbose": batch.verbose,
        "is_command": is_on_command_line(),
        "options": options,
        "inputs": inputs,
        "base_content": None if content is None else asdict(content),
    }
    with nullcontext() if root is None or batch.dry_run else journal.opened(root) as kept:
        tally = _Tally(batch, jobs, kept, lambda number: wanted[readings.at(number)])
        left = array("l", (number for number in range(len(jobs)) if not tally.knows(number)))
        requests = (
            {
                **shared,
                "loading": readings.kinds[readings.at(number)],
                "path": str(jobs[number].path.absolute()),
                "output": None if batch.dry_run else str(jobs[number].output.absolute()),
            }
            for number in left
        )
        count = min(batch.jobs or _processes(work.options), len(left))
        pool.run(requests, count, lambda at, answer: tally.add(left[at], answer))
        return tally.batch()


def _planned(
    work: Work, sources: AnyPath | Sequence[AnyPath], out: AnyPath | None, batch: BatchOptions
) -> tuple[Path | None, Plan]:
    """The folder of the outputs, None where none is written, and the adapters. Raises what `convert_many` raises."""
    if batch.dry_run and work.verb == "compress":
        raise OptionError("compress has no dry run", fix="leave it out")
    if work.options.get("resume"):
        what = f"{spelled('resume', True)} is for one adapter: a batch passes by what is finished"
        raise OptionError(what, fix="leave it out and give the same command again")
    if isinstance(sources, Mapping) or not isinstance(sources, (str, os.PathLike, Iterable)):
        raise ArgumentError(f"sources is {described(sources)}; paths of adapters, or of folders of them, were expected")
    listed = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    for source in listed:
        path_of(source, "sources", "the path of an adapter, or of a folder of them,")
    root = None if out is None else output_of(out)
    if root is None and not batch.dry_run:
        raise OptionError("there is no folder for the outputs", fix="name one, or plan only")
    if root is not None and root.exists() and not root.is_dir():
        raise OutputPathError("is not a folder", fix="give a folder for the outputs", path=root)
    return root, plan(listed, root)


@dataclass
class _Tally:
    """Outcomes of the adapters so far. With a journal it keeps what a later run needs to know; `settings` of the
    adapter of a number are what `Line.settings` holds."""

    options: BatchOptions
    jobs: Plan
    journal: Journal | None
    settings: Callable[[int], str]
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    counts: Counter[State] = field(default_factory=Counter)
    do_not_ship: int = 0

    def knows(self, number: int) -> bool:
        """Take an adapter as passed by, and return true, if the journal says that its output is finished."""
        job = self.jobs[number]
        line = None if self.journal is None else self.journal.find(job.name)
        if line is None or line.settings != self.settings(number):
            return False
        try:
            source = request.state(*request.files_of(job.path))
        except OSError:
            return False
        if (line.source, line.output) != (source.digest, request.state([job.output], job.output.parent).digest):
            return False
        sizes = {"adapter": line.adapter, "total": line.total}
        self.add(number, {"state": "skipped", "bytes": sizes, "captured": line.captured, "verdict": line.verdict})
        return True

    def add(self, number: int, answer: pool.Answer) -> None:
        """Count an adapter, tell of it, and keep a line in the journal of one that is finished."""
        job = self.jobs[number]
        outcome = _outcome(job, answer)
        self.counts[outcome.state] += 1
        self.do_not_ship += outcome.verdict == DO_NOT_SHIP
        if self.options.on_outcome is None:
            self.outcomes[number] = outcome
        else:
            self.options.on_outcome(outcome)
        self.options.on_done(self.counts.total(), len(self.jobs))
        if self.journal is not None and "states" in answer:
            source, output = answer["states"]
            sizes = answer["bytes"]["adapter"], answer["bytes"]["total"]
            stated = answer["stated"], answer.get("verdict", "")
            self.journal.add(Line(job.name, self.settings(number), source, output, *sizes, *stated))

    def batch(self) -> Batch:
        notes = () if self.journal is None else tuple(self.journal.notes)
        outcomes = tuple(self.outcomes[number] for number in sorted(self.outcomes))
        return Batch(outcomes, self.counts, notes, self.do_not_ship)


def _processes(options: Mapping[str, Any]) -> int:
    """As many as there are cores to run on; one where all would share a GPU."""
    if devices.resolved(str(options.get("device", "auto"))).startswith("cuda"):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _inputs(options: Mapping[str, Any]) -> tuple[dict[str, str], KnownContent | None]:
    """Digests of what options name by a path, and the contents of the base. Raises E-OPTION for what is in memory
    only."""
    digests: dict[str, str] = {}
    content = None
    for key in ("base", "statistics", "data"):
        value = options.get(key)
        if value is None or value in ((), []):
            continue
        paths = list(value) if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(path, (str, os.PathLike)) for path in paths):
            raise OptionError(f"{key} must be a path where several processes need it", fix="write it to a file first")
        if key == "base":
            digests[key], content = request.of_base(hub.locate(paths[0]))
        else:
            files = [Path(path) for path in paths] if key == "statistics" else _data_files(paths)
            digests[key] = " ".join(request.of_file(path) for path in files)
    return digests, content


def _data_files(paths: Sequence[Any]) -> Sequence[Path]:
    """The files of texts, folders and data sets in the cache. Plain files are told apart without loading torch."""
    if all(Path(path).is_file() for path in paths):
        return [Path(path) for path in paths]
    from lrconvert.live.texts import sources

    return sources.find(paths).files


def _plain(key: str, value: Any) -> Any:
    """An option as JSON. Raises E-OPTION for what is none."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain(key, item) for item in value]
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        raise OptionError(f"{key} cannot be given to other processes", fix="give a path, a number or a text") from None


def _plain_reading(reading: ReadOptions) -> dict[str, Any]:
    """The reading options as JSON, in their one spelling."""
    settled = make(ReadOptions, vars(reading), "reading")
    return {key: _plain(key, value) for key, value in vars(settled).items() if value is not None}


class _Readings:
    """The reading options of each source, as JSON, of one or two `kinds`: a layout and an alpha hold for those that are
    not lrconvert files. Where all are, each refuses them."""

    def __init__(self, jobs: Plan, reading: ReadOptions) -> None:
        self.kinds = [_plain_reading(reading), _plain_reading(reading.for_ours())]
        self._ours = bytearray()
        if self.kinds[0] != self.kinds[1]:
            self._ours = bytearray(job.path.is_file() and file.is_lrconvert(job.path) for job in jobs)
        if all(self._ours):
            self._ours.clear()

    def at(self, number: int) -> int:
        """The place, in `kinds`, of those of one source."""
        return self._ours[number] if self._ours else 0


def _outcome(job: Job, answer: pool.Answer) -> Outcome:
    sizes = answer.get("bytes") or {}
    return Outcome(
        source=job.source,
        output=str(job.output),
        state=answer["state"],
        nbytes=sizes.get("adapter"),
        total_bytes=sizes.get("total"),
        captured=answer.get("captured"),
        ratio=answer.get("ratio"),
        dropped=answer.get("dropped"),
        verdict=answer.get("verdict", ""),
        warnings=tuple(answer.get("warnings", ())),
        code=answer.get("code", ""),
        message=answer.get("message", ""),
        report=answer.get("report", {}),
        text=answer.get("text", ""),
    )
