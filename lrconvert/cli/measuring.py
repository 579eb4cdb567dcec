"""Commands that measure: input statistics of a base, and what files keep of the LoRA they came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrconvert.cli.shared import (
    as_json_option,
    device_of,
    device_option,
    emit,
    overwrite_option,
    progress_bar,
    quiet_option,
    source_argument,
    takes_adapters,
    verbose_option,
)

_path = click.Path(path_type=Path)
DATA_HELP = "Texts: .txt (running text) or .jsonl (`text`; `prompt` and `completion`; `text` and `label`); repeatable."


@click.command()
@click.argument("base", type=_path)
@click.option("--data", multiple=True, required=True, type=_path, help=DATA_HELP)
@click.option("-o", "--output", required=True, type=_path, help="The file to write.")
@click.option("--adapter", type=_path, help="Only the inputs of this adapter's targets.")
@click.option("--include", multiple=True, help="Only parameters whose name this pattern finds; repeatable.")
@click.option("--exclude", multiple=True, help="No parameters whose name this pattern finds; repeatable.")
@click.option("--length", type=click.IntRange(1), default=512, show_default=True, help="Tokens of a text, at most.")
@click.option("--batch-tokens", type=click.IntRange(1), default=4096, show_default=True, help="Tokens at a time.")
@click.option(
    "--max-tokens", type=click.IntRange(0), default=1 << 18, show_default=True, help="Tokens in all; 0: everything."
)
@click.option(
    "--exact-width",
    type=click.IntRange(0),
    default=1024,
    show_default=True,
    help="Inputs up to this width keep their whole moment, wider ones a sketch.",
)
@click.option("--rank", type=click.IntRange(1), default=256, show_default=True, help="Rows of a sketch.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sketches.")
@device_option
@takes_adapters
@overwrite_option
@quiet_option
@as_json_option
def statistics(
    base: Path,
    data: tuple[Path, ...],
    output: Path,
    adapter: Path | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    length: int,
    batch_tokens: int,
    max_tokens: int,
    exact_width: int,
    rank: int,
    seed: int,
    device: str,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    """Measure what flows into the layers of BASE on texts, for --statistics of every converter.

    Work that was broken off goes on where it was if the same command is given again.
    """
    from lrconvert import api
    from lrconvert.report import text_and_json

    with progress_bar("statistics", quiet or as_json) as progress:
        found = api.statistics(
            base,
            data,
            output,
            adapter=adapter,
            include=include,
            exclude=exclude,
            length=length,
            batch_tokens=batch_tokens,
            max_tokens=max_tokens,
            exact_width=exact_width,
            rank=rank,
            seed=seed,
            device=device_of(device),
            overwrite=overwrite,
            progress=progress,
            **reading,
        )
    if as_json:
        emit({"base": str(base), "output": str(output), **text_and_json.statistics_json(found, output.stat().st_size)})
    elif not quiet:
        click.echo(text_and_json.statistics(str(output), found, output.stat().st_size))


@click.command()
@source_argument
@click.argument("files", nargs=-1, required=True, type=_path)
@click.option("--statistics", type=_path, help="Input statistics: adds the captured energy of the layers' outputs.")
@click.option("--base", type=_path, help="Base model folder or hub id, for --data and for names.")
@click.option("--data", multiple=True, type=_path, help=f"Measure the models' answers on data. {DATA_HELP}")
@click.option("--length", type=click.IntRange(1), default=512, show_default=True, help="Tokens of a text, at most.")
@click.option("--max-tokens", type=click.IntRange(0), default=1 << 15, show_default=True, help="Tokens in all; 0: all.")
@click.option("--html", type=_path, help="Write it as one HTML page, too: plots, a map of the layers, all tables.")
@takes_adapters
@device_option
@overwrite_option
@verbose_option
@as_json_option
def compare(
    source: Path,
    files: tuple[Path, ...],
    statistics: Path | None,
    base: Path | None,
    data: tuple[Path, ...],
    length: int,
    max_tokens: int,
    html: Path | None,
    device: str,
    overwrite: bool,
    verbose: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    """Measure lrconvert FILES against the LoRA SOURCE they came from: captured energy, bytes, ratio; on data also the
    answers of the models."""
    from lrconvert import api
    from lrconvert.io import hub
    from lrconvert.io.durable import atomic_file, check_output
    from lrconvert.report import html as page
    from lrconvert.report import text_and_json

    if html is not None:
        check_output(html, overwrite, inputs=[hub.locate(source), *files])
    with progress_bar("compare", as_json or not data) as progress:
        found = api.compare(
            source,
            files,
            statistics=statistics,
            base=base,
            data=data or None,
            length=length,
            max_tokens=max_tokens,
            device=device_of(device),
            progress=progress,
            **reading,
        )
    named = [(p.name, f) for p, f in zip(files, found, strict=True)]
    if html is not None:
        text = page.page(f"What {len(files)} compact files keep", hub.hint(str(source)), named)
        with atomic_file(html, overwrite=overwrite) as out:
            out.write(text.encode())
    if as_json:
        rows = [{"path": str(p), **text_and_json.fidelity_json(f)} for p, f in zip(files, found, strict=True)]
        emit({"source": str(source), "files": rows})
        return
    click.echo(text_and_json.comparison(named, verbose))
