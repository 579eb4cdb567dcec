"""Converters for many adapters at once: several sources, or a folder of them, into a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from lrconvert.cli.shared import device_of, emit, progress_bar, warn
from lrconvert.core.errors import EXIT_REFUSED, printable

if TYPE_CHECKING:
    from lrconvert.api.batch.run import Batch, Outcome, Told

Verb = Literal["convert", "compress", "allocate"]
_OF_READING = ("allow_pickle", "layout", "alpha")  # options of `load_lora`, besides the base; others are the verb's


def sources_argument() -> click.Argument:
    return click.Argument(["sources"], metavar="SOURCE...", nargs=-1, required=True, type=click.Path(path_type=Path))


def jobs_option() -> click.Option:
    return click.Option(
        ["-j", "--jobs"],
        type=click.IntRange(1),
        help="For several sources, or a folder of them: this many processes.  [default: one for each core]",
    )


def are_meant(given: Mapping[str, Any]) -> bool:
    """Whether a command line asks for many: several sources, --jobs, or a folder of several adapters."""
    from lrconvert.api.batch.sources import are_many

    return given["jobs"] is not None or are_many(given["sources"], given["output"])


def single(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a command for one adapter is called with."""
    rest = {key: value for key, value in given.items() if key not in ("sources", "jobs")}
    return {"source": given["sources"][0], **rest}


def run(
    verb: Verb,
    title: str,
    method: str,
    settings: Mapping[str, Any],
    *,
    sources: tuple[Path, ...],
    output: Path | None,
    jobs: int | None,
    dry_run: bool,
    overwrite: bool,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    device: str,
    **common: Any,
) -> None:
    """Convert, print the table, and exit 1 if any adapter failed."""
    from lrconvert.api.batch import run as verbs

    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output'.")
    reading = {key: common.pop(key) for key in _OF_READING if key in common}
    with _progress(title, quiet or as_json) as told:
        batch = verbs.many(
            verb,
            method,
            sources,
            output or Path(),
            jobs=jobs,
            overwrite=overwrite,
            dry_run=dry_run,
            verbose=verbose and not as_json,
            loading=reading,
            told=told,
            device=device_of(device),
            **common,
            **settings,
        )
    if as_json:
        emit({"ok": batch.ok, **_counts(batch), "adapters": [_json(outcome, dry_run) for outcome in batch.outcomes]})
    else:
        for outcome in batch.outcomes:
            warn(f"{outcome.source}: {line}" for line in outcome.warnings)
        if not quiet:
            click.echo("".join(f"{outcome.text}\n\n" for outcome in batch.outcomes if outcome.text), nl=False)
            click.echo(table(batch))
        for outcome in batch.outcomes:
            if outcome.message:
                click.echo(outcome.message, err=True)
    if not batch.ok:
        raise click.exceptions.Exit(EXIT_REFUSED)


@contextmanager
def _progress(title: str, quiet: bool) -> Iterator[Told]:
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
    }
    if outcome.code:
        value["error"] = {"code": outcome.code, "message": outcome.message}
    return value | ({"report": dict(outcome.report)} if outcome.report else {})


def table(batch: Batch) -> str:
    """A row for each adapter, and the counts."""
    from lrconvert.report import text_and_json

    rows = [
        [
            printable(outcome.source),
            outcome.state,
            "" if outcome.nbytes is None else f"{outcome.nbytes:,}",
            "" if outcome.ratio is None else f"{outcome.ratio:.1f}",
            "" if outcome.captured is None else f"{outcome.captured:.4f}",
            outcome.code,
        ]
        for outcome in batch.outcomes
    ]
    counts = ", ".join(f"{count} {state}" for state, count in _counts(batch).items())
    return f"{text_and_json.table(['adapter', 'state', 'bytes', 'ratio', 'captured', 'error'], rows)}\n\n{counts}"
