"""Commands that measure: input statistics of a base, and what files keep of the LoRA they came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrconvert.cli import flags
from lrconvert.cli.printing import emit, progress_bar, say, warn
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.live.options import CompareOptions, StatisticsOptions


@flags.command(
    "statistics",
    click.Argument(["base"], type=flags.PATH),
    flags.data(required=True),
    flags.output("The file to write."),
    click.Option(["--adapter"], type=flags.PATH, help="Only the inputs of this adapter's targets."),
    *flags.of(StatisticsOptions),
    *flags.reading(),
    flags.OVERWRITE,
    flags.QUIET,
    flags.AS_JSON,
)
def statistics(base: Path, data: tuple[Path, ...], output: Path, adapter: Path | None, **given: Any) -> None:
    """Measure what flows into the layers of BASE on texts, for --statistics of every converter.

    Work that was broken off goes on where it was if the same command is given again.
    """
    from lrconvert import api
    from lrconvert.report.inspection import statistics_json, statistics_text

    quiet, as_json = given.pop("quiet"), given.pop("as_json")
    with progress_bar("statistics", quiet or as_json) as progress:
        options = flags.chosen(given, StatisticsOptions, ReadOptions)
        measured = api.statistics(base, data, output, adapter=adapter, progress=progress, **options)
    nbytes = output.stat().st_size
    if as_json:
        emit({"base": str(base), "output": str(output), **statistics_json(measured, nbytes)})
    elif not quiet:
        say(statistics_text(str(output), measured, nbytes))


@flags.command(
    "compare",
    click.Argument(["source"], type=flags.PATH),
    click.Argument(["files"], nargs=-1, required=True, type=flags.PATH),
    click.Option(
        ["--statistics"], type=flags.PATH, help="Input statistics: adds the captured energy of the layers' outputs."
    ),
    flags.base("Base model folder or hub id, for --data and for names."),
    flags.data(f"Measure the models' answers on data. {flags.DATA_HELP}"),
    *flags.of(CompareOptions),
    click.Option(
        ["--html"], type=flags.PATH, help="Write it as one HTML page, too: plots, a map of the layers, all tables."
    ),
    *flags.reading(),
    flags.OVERWRITE,
    flags.VERBOSE,
    flags.AS_JSON,
)
def compare(source: Path, files: tuple[Path, ...], html: Path | None, **given: Any) -> None:
    """Measure lrconvert FILES against the LoRA SOURCE they came from: captured energy, bytes, ratio; on data also the
    answers of the models."""
    from lrconvert import api
    from lrconvert.io import hub
    from lrconvert.io.durable import atomic_file, check_output
    from lrconvert.report import html as pages
    from lrconvert.report.comparison import comparison_text, fidelity_json

    overwrite, verbose, as_json = given.pop("overwrite"), given.pop("verbose"), given.pop("as_json")
    data = given.pop("data") or None
    if html is not None:
        check_output(html, overwrite, inputs=[hub.locate(source), *files])
    with progress_bar("compare", as_json or not data) as progress:
        options = flags.chosen(given, CompareOptions, ReadOptions)
        rows = api.compare(source, files, data=data, progress=progress, **options, **given)
    named = [(path.name, fidelity) for path, fidelity in zip(files, rows, strict=True)]
    if html is not None:
        text = pages.page(f"What {len(files)} compact files keep", hub.hint(str(source)), named)
        with atomic_file(html, overwrite=overwrite) as out:
            out.write(text.encode())
    if as_json:
        measured = [{"path": str(path), **fidelity_json(fidelity)} for path, fidelity in zip(files, rows, strict=True)]
        emit({"source": str(source), "files": measured})
        return
    for path, fidelity in zip(files, rows, strict=True):
        warn(f"{path}: {line}" for line in fidelity.warnings)
    say(comparison_text(named, verbose))
