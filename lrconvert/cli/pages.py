"""Results as HTML pages: where their numbers come from, and folders of files against folders of adapters."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrconvert.api.batch.job import Outcome
from lrconvert.api.batch.sources import are_many, plan
from lrconvert.cli.printing import command_line, emit, progress_bar, say
from lrconvert.core.errors import LrcError, printable
from lrconvert.core.version import __version__

if TYPE_CHECKING:
    from lrconvert.formats.fidelity import Fidelity
    from lrconvert.report.html import About, Adapter

_ROWS = 20  # adapters shown without --verbose


def versions(*, torch: bool) -> str:
    """Return the versions of what computed a page."""
    packages = ("numpy", "torch", "transformers") if torch else ("numpy",)
    used = (f"{name} {importlib.metadata.version(name)}" for name in packages)
    return ", ".join([f"lrconvert {__version__}", f"Python {platform.python_version()}", *used])


def about(source: Path, files: Sequence[Path], given: Mapping[str, Any], logs: Sequence[Path]) -> About:
    """Return where the numbers of a comparison come from. `given` is what `compare` was given, with the options that
    say how `source` is read as `reading`. Raises as `read_curves` does, and reading the LoRA."""
    from lrconvert import api
    from lrconvert.formats.fleet import places as fleet_places
    from lrconvert.io import hub
    from lrconvert.lora import svd
    from lrconvert.report import html

    base, data = given["reading"].get("base"), given.get("data") or ()
    lora = api.load_lora(source, **given["reading"])
    spectra = [
        (pair.target.name, tuple(map(float, values)))
        for pair, values in zip(lora.targets, svd.spectra(lora.targets), strict=True)
    ]
    written = (datetime.date.fromtimestamp(fleet_places.read_from(path).stat().st_mtime).isoformat() for path in files)
    return html.About(
        base="" if base is None else hub.hint(str(base)),
        data=tuple(path.name for path in data),
        dates=tuple(written),
        versions=versions(torch=bool(data)),
        command=command_line(),
        spectra=tuple(spectra),
        curves=tuple(curve for path in logs for curve in html.read_curves(path)),
    )


def write_page(path: Path, text: str, overwrite: bool) -> None:
    """Write a page, whole or not at all."""
    from lrconvert.io.durable import atomic_file

    with atomic_file(path, overwrite=overwrite) as out:
        out.write(text.encode())


# --- many adapters --------------------------------------------------------------------------------------------------


def converted(outcome: Outcome, method: str) -> Adapter:
    """Return the row of an adapter that a batch converted."""
    from lrconvert.report.html import Adapter

    return Adapter(
        outcome.source,
        outcome.state,
        method or outcome.report.get("method", {}).get("id", ""),
        outcome.nbytes,
        outcome.ratio,
        outcome.captured,
        dropped=outcome.dropped,
        verdict=outcome.verdict,
        failure=outcome.message,
    )


def are_folders(source: Path, files: Sequence[Path]) -> bool:
    """Return whether a comparison is of a folder of adapters and the folder of the files that were made from them."""
    is_folder = len(files) == 1 and isinstance(files[0], Path) and files[0].is_dir()
    return is_folder and are_many([source], files[0])


def compare_folders(source: Path, folder: Path, html: Path | None, given: Mapping[str, Any]) -> bool:
    """Compare every adapter below `source` with the file of its name below `folder`, as a batch writes it; print the
    table, the worst first, and write the page. Returns whether all were compared.

    `given` has the options of `api.compare`, and of printing: `overwrite`, `verbose`, `as_json`."""
    from lrconvert.report import html as pages

    options = {key: value for key, value in given.items() if key not in ("overwrite", "verbose", "as_json")}
    with progress_bar("compare", given["as_json"]) as progress:
        rows = []
        jobs = plan([source], folder)
        for row in _compared(jobs, _with_model(options)):
            rows.append(row)
            progress(len(rows) / len(jobs), f"{len(rows)} of {len(jobs)}")
    if html is not None:
        title = f"What {len(rows):,} files keep of their adapters"
        text = pages.fleet_page(title, rows, command_line(), versions(torch=bool(options.get("data"))))
        write_page(html, text, given["overwrite"])
    if given["as_json"]:
        emit({"source": str(source), "adapters": [vars(row) for row in rows]})
    else:
        say(_table(rows, len(rows) if given["verbose"] else _ROWS))
    return not any(row.failure for row in rows)


def _with_model(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the base as a model in memory, where answers are measured: it is loaded once for all."""
    if options.get("base") is None or not options.get("data"):
        return dict(options)
    from lrconvert.io import hub
    from lrconvert.live.load_model import load_model

    return {**options, "base": load_model(hub.locate(options["base"]))}


def _compared(jobs: Sequence[Any], options: Mapping[str, Any]) -> Iterator[Adapter]:
    from lrconvert import api
    from lrconvert.report.html import Adapter

    for job in jobs:
        if not job.output.is_file():
            yield Adapter(job.source, "failed", failure=f"there is no {job.name} to compare it with")
            continue
        try:
            (kept,) = api.compare(job.path, [job.output], **options)
        except LrcError as error:
            yield Adapter(job.source, "failed", failure=str(error))
            continue
        yield _row(job.source, kept)


def _row(source: str, kept: Fidelity) -> Adapter:
    from lrconvert.report.html import Adapter

    closed = None if kept.answers is None else kept.answers.closed
    return Adapter(
        source, "done", kept.method, kept.adapter_bytes, kept.ratio, kept.captured, closed, len(kept.dropped)
    )


def _table(rows: Sequence[Adapter], most: int) -> str:
    """The adapters, what keeps least first, then those that could not be compared, and how many of each."""
    from lrconvert.report.tables import count_bytes, percent, table

    done = [row for row in rows if not row.failure]
    done.sort(key=lambda row: ((row.captured if row.closed is None else row.closed) or 0.0, row.name))
    cells = [
        [
            printable(r.name),
            r.method,
            f"{r.nbytes:,}",
            f"{r.ratio:.1f}",
            percent(r.captured),
            percent(r.closed),
            r.dropped,
        ]
        for r in done[:most]
    ]
    lines = [table(["adapter (worst first)", "method", "bytes", "ratio", "captured", "closed", "dropped"], cells)]
    if len(done) > most:
        lines.append(f"... and {len(done) - most:,} more (-v shows all)")
    lines += [f"failed    {printable(row.name)}: {printable(row.failure, 1000)}" for row in rows if row.failure]
    total = sum(row.nbytes or 0 for row in done)
    return "\n".join([*lines, "", f"{len(done):,} compared, {len(rows) - len(done):,} failed; {count_bytes(total)}"])
