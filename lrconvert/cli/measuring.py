"""Commands that measure: input statistics of a base, and what files keep of the LoRA they came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrconvert.cli import flags
from lrconvert.cli.printing import emit, progress_bar, say, warn
from lrconvert.core.errors import EXIT_REFUSED
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.live.options import CompareOptions, StatisticsOptions


@flags.command(
    "statistics",
    click.Argument(["base"], type=flags.BASE),
    flags.data(required=True),
    flags.output("The file to write.", is_local=True),
    click.Option(["--adapter"], type=flags.ADAPTER, help="Only the inputs of this adapter's targets."),
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
    click.Argument(["source"], type=flags.ADAPTER),
    click.Argument(["files"], nargs=-1, required=True, type=flags.PLACE),
    click.Option(
        ["--statistics"], type=flags.PATH, help="Input statistics: adds the captured energy of the layers' outputs."
    ),
    flags.base("Base model folder or hub id, for --data and for names."),
    flags.data(f"Measure the models' answers on data. {flags.DATA_HELP}"),
    *flags.of(CompareOptions),
    click.Option(["--html"], type=flags.PATH, help="Write an HTML page, too: verdict, plots, layers, all tables."),
    click.Option(
        ["--log", "logs"], multiple=True, type=flags.PATH, help="Logs of `refine`: their curves are on the page."
    ),
    *flags.reading(),
    flags.OVERWRITE,
    flags.VERBOSE,
    flags.AS_JSON,
)
def compare(source: Path, files: tuple[Path, ...], html: Path | None, logs: tuple[Path, ...], **given: Any) -> None:
    """Measure lrconvert FILES against the LoRA SOURCE they came from: captured energy, bytes, ratio; on data also the
    answers of the models.

    A folder of adapters is compared with the folder into which a converter wrote their files, name by name.
    """
    from lrconvert import api
    from lrconvert.cli import pages
    from lrconvert.formats.fleet import places as fleet_places
    from lrconvert.io import hub
    from lrconvert.io.durable import check_output
    from lrconvert.report.comparison import comparison_text, fidelity_json

    if html is not None:
        check_output(html, given["overwrite"], inputs=[fleet_places.read_from(path) for path in (source, *files)])
    elif logs:
        raise click.UsageError("--log is for --html")
    reading, options = flags.chosen(given, ReadOptions), flags.chosen(given, CompareOptions)
    given |= {"data": given["data"] or None}
    if pages.are_folders(source, files):
        if not pages.compare_folders(source, files[0], html, {**given, **options, **reading}):
            raise click.exceptions.Exit(EXIT_REFUSED)
        return
    overwrite, verbose, as_json = given.pop("overwrite"), given.pop("verbose"), given.pop("as_json")
    with progress_bar("compare", as_json or not given["data"]) as progress:
        rows = api.compare(source, files, progress=progress, **options, **reading, **given)
    named = [(path.name, fidelity) for path, fidelity in zip(files, rows, strict=True)]
    if html is not None:
        from lrconvert.report import html as report

        shown = hub.hint(str(source))
        title = (
            f"What {len(files)} files keep of {shown}" if len(files) > 1 else f"What {files[0].name} keeps of {shown}"
        )
        text = report.page(title, shown, named, pages.about(source, files, {**given, "reading": reading}, logs))
        pages.write_page(html, text, overwrite)
    if as_json:
        measured = [{"path": str(path), **fidelity_json(fidelity)} for path, fidelity in zip(files, rows, strict=True)]
        emit({"source": str(source), "files": measured})
        return
    for path, fidelity in zip(files, rows, strict=True):
        warn(f"{path}: {line}" for line in fidelity.warnings)
    say(comparison_text(named, verbose))
