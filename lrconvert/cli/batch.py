"""Converters for many adapters at once: several sources, or a folder of them, into a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrconvert.api.batch.job import Outcome, Work
from lrconvert.api.batch.options import BatchOptions, OnDone
from lrconvert.api.batch.run import run as run_batch
from lrconvert.api.batch.sources import are_many
from lrconvert.api.batch.tally import Batch
from lrconvert.cli import flags
from lrconvert.cli.printing import command_line, emit_line, progress_bar, say, warn
from lrconvert.cli.request import Request
from lrconvert.core.errors import EXIT_REFUSED, printable
from lrconvert.io.durable import check_output

if TYPE_CHECKING:
    from lrconvert.report.html import Adapter


def options() -> list[click.Option]:
    """Return the options of a command that are for several sources, or a folder of them."""
    several = flags.of(BatchOptions)
    (jobs,) = (option for option in several if option.name == "jobs")
    jobs.opts.insert(0, "-j")
    for option in several:
        option.help = f"For many adapters. {option.help}"
    return [
        *several,
        click.Option(["--html"], type=flags.PATH, help="For many adapters. Write an HTML page about all, too."),
    ]


def is_meant(request: Request) -> bool:
    """Return true if a command line asks for many: several sources, an option that is for many, or a folder of several
    adapters. Raises a usage error if there is nothing to work on."""
    if not request.sources and "manifest" not in request.many:
        raise click.UsageError("Missing argument 'SOURCE...', or option '--manifest'.")
    return bool(request.many) or are_many(request.sources, request.output)


def run(request: Request, work: Work, title: str) -> None:
    """Convert, print the table, or with --json a line for each adapter as it is done, the counts last; exit 1 if any
    adapter failed. What is not to be shipped has not failed."""
    from lrconvert.formats import loading

    if request.sources and request.output is None and not request.dry_run:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if request.html is not None:
        check_output(request.html, request.overwrite)
    reading = loading.options(base=work.options.get("base"), **request.reading)
    shown = _Shown(request, work)
    with _progress(title, request.quiet or request.as_json) as on_done:
        batch = run_batch(
            work,
            request.sources or None,
            request.output or (Path() if request.sources else None),
            reading,
            BatchOptions(
                **request.many,
                overwrite=request.overwrite,
                dry_run=request.dry_run,
                verbose=request.verbose and not request.as_json,
                on_done=on_done,
                on_outcome=shown.add,
            ),
        )
    shown.end(batch)
    if request.html is not None:
        from lrconvert.cli import pages
        from lrconvert.report.html import fleet_page

        title = f"{len(shown.adapters):,} adapter{'' if len(shown.adapters) == 1 else 's'} made smaller"
        text = fleet_page(title, shown.adapters, command_line(), pages.versions(torch=False))
        pages.write_page(request.html, text, request.overwrite)
    if not batch.ok:
        raise click.exceptions.Exit(EXIT_REFUSED)


_ROWS = 1000  # of a table; a larger batch has several


class _Shown:
    """The output of a batch: of an adapter no more is kept than the line that it has in the table, until that is
    printed; with an HTML page, the row that it has there."""

    def __init__(self, request: Request, work: Work) -> None:
        self._request, self._method, self._has_verdicts = request, work.method, work.verb == "compress"
        self.adapters: list[Adapter] = []
        self._rows: list[list[str]] = []
        self._warnings: list[str] = []
        self._messages: list[tuple[str, str]] = []

    def add(self, outcome: Outcome) -> None:
        if self._request.html is not None:
            from lrconvert.cli import pages

            self.adapters.append(pages.converted(outcome, self._method))
        if self._request.as_json:
            emit_line(_json(outcome, self._request.dry_run))
            return
        self._warnings += (f"{outcome.source}: {line}" for line in outcome.warnings)
        self._messages += [(outcome.source, outcome.message)] if outcome.message else []
        if not self._request.quiet:
            say(f"{outcome.text}\n\n" if outcome.text else "", nl=False)
            self._rows.append(_row(outcome, self._has_verdicts))
        if max(len(self._rows), len(self._warnings), len(self._messages)) >= _ROWS:
            self._show()

    def end(self, batch: Batch) -> None:
        warn(batch.notes)
        if self._request.as_json:
            verdicts = {"do_not_ship": batch.do_not_ship} if self._has_verdicts else {}
            emit_line({"ok": batch.ok, **_counts(batch), **verdicts})
            return
        counts = ", ".join(f"{count} {state}" for state, count in _counts(batch).items())
        if batch.do_not_ship:
            counts += f"; do not ship {batch.do_not_ship} of them (-v says why, and what to try)"
        self._show(f"\n\n{counts}")

    def _show(self, after: str = "") -> None:
        """Print what has come together, with the text `after` the table."""
        from lrconvert.report.tables import table

        warn(sorted(self._warnings))
        if not self._request.quiet:
            verdict = ["verdict"] if self._has_verdicts else []
            head = ["adapter", "state", "bytes", "ratio", "captured", "dropped", *verdict, "error"]
            say(f"{table(head, sorted(self._rows))}{after}")
        for _, message in sorted(self._messages):
            say(message, err=True)
        self._rows, self._warnings, self._messages = [], [], []


@contextmanager
def _progress(title: str, quiet: bool) -> Iterator[OnDone]:
    with progress_bar(title, quiet) as update:
        yield lambda done, of: update(done / of, f"{done} of {of}")


def _counts(batch: Batch) -> dict[str, int]:
    return {state: batch.count(state) for state in ("done", "skipped", "failed")}


def _json(outcome: Outcome, dry_run: bool) -> dict[str, Any]:
    value: dict[str, Any] = {
        "source": outcome.source,
        "output": None if dry_run else outcome.output,
        "state": outcome.state,
        "bytes": {"total": outcome.total_bytes, "adapter": outcome.nbytes},
        "captured": outcome.captured,
        "ratio": outcome.ratio,
        "dropped": outcome.dropped,
        **({"verdict": outcome.verdict} if outcome.verdict else {}),
    }
    if outcome.code:
        value["error"] = {"code": outcome.code, "message": outcome.message}
    return value | ({"report": dict(outcome.report)} if outcome.report else {})


def _row(outcome: Outcome, has_verdicts: bool) -> list[str]:
    """The row of an adapter in the table."""
    return [
        printable(outcome.source),
        outcome.state,
        "" if outcome.nbytes is None else f"{outcome.nbytes:,}",
        "" if outcome.ratio is None else f"{outcome.ratio:.1f}",
        "" if outcome.captured is None else f"{outcome.captured:.4f}",
        "" if outcome.dropped is None else str(outcome.dropped),
        *([outcome.verdict] if has_verdicts else []),
        outcome.code,
    ]
