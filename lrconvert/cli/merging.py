"""Commands that bake adapters into a base, take them out again, and check that a model is such a merge."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli.shared import (
    DEVICE,
    DEVICE_OPTION,
    ByteSize,
    as_json_option,
    device_of,
    emit,
    overwrite_option,
    progress_bar,
    quiet_option,
    takes_adapters,
    verbose_option,
    warn,
)
from lrconvert.core.errors import EXIT_REFUSED

if TYPE_CHECKING:
    from lrconvert.merge import Scaled


def _weighted(texts: Sequence[str], base: Path, reading: Mapping[str, Any]) -> list[Scaled]:
    """The adapters that ``path`` or ``path=scale`` mean, loaded."""
    from lrconvert import api
    from lrconvert.io import hub
    from lrconvert.merge import Scaled

    named = [_scaled(text) for text in texts]
    found = api.load_all([name for name, _ in named], base=base, **reading)
    return [Scaled(adapter, scale, hub.hint(name)) for adapter, (name, scale) in zip(found, named, strict=True)]


def _scaled(text: str) -> tuple[str, float]:
    """The path and the scale of ``path`` or ``path=scale``."""
    name, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        return name, float(number)
    except ValueError:
        raise click.UsageError(f"{text!r}: what follows the last '=' is not a scale") from None


def _check_output(output: Path | None, in_place: bool) -> None:
    if (output is None) != in_place:
        raise click.UsageError("give --output, or --in-place")


_resume = click.option("--resume", is_flag=True, help="Keep what is done if it is broken off, and go on from there.")
_device = click.option(
    *DEVICE, help="Where products are computed; the bytes are the same.", **(DEVICE_OPTION | {"default": "cpu"})
)
_dequantize = click.option("--dequantize", is_flag=True, help="Take a base that bitsandbytes has quantized as bf16.")


@click.command("merge-into-base")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=SCALE]...")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The model folder to write.")
@click.option("--in-place", is_flag=True, help="Change BASE itself, file by file; a crash is taken back by `recover`.")
@_resume
@click.option("--dry-run", is_flag=True, help="Print what would be written; write nothing.")
@click.option("--no-undo", is_flag=True, help="Write no undo record: only the base itself can undo it then.")
@click.option("--out-shard-size", type=ByteSize(), help="Largest weight file, as 5GB; default: cut as the base is.")
@click.option("--allow-no-op", is_flag=True, help="Write a copy of the base even if the adapter changes nothing.")
@_dequantize
@_device
@takes_adapters
@overwrite_option
@quiet_option
@verbose_option
@as_json_option
def merge_into_base(
    base: Path,
    adapters: tuple[str, ...],
    output: Path | None,
    in_place: bool,
    resume: bool,
    dry_run: bool,
    no_undo: bool,
    out_shard_size: int | None,
    allow_no_op: bool,
    dequantize: bool,
    device: str,
    overwrite: bool,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    """Bake one or more ADAPTERs (lrconvert files, LoRA folders) into a copy of the model folder BASE.

    Their sum, each times its SCALE, is added to the weights and rounded once, correctly. `unmerge` takes it out again.
    """
    from lrconvert import api
    from lrconvert.report import text_and_json

    _check_output(output, in_place)
    with progress_bar("merge", quiet or as_json) as progress:
        report = api.merge(
            base,
            _weighted(adapters, base, reading),
            output,
            in_place=in_place,
            resume=resume,
            overwrite=overwrite,
            dry_run=dry_run,
            undo=not no_undo,
            shard_bytes=out_shard_size,
            allow_no_op=allow_no_op,
            dequantize=dequantize,
            device=device_of(device),
            progress=progress,
        )
    if as_json:
        emit(
            {
                "base": str(base),
                "adapters": list(adapters),
                "output": str(output or base),
                **text_and_json.merge_json(report),
            }
        )
        return
    if not quiet:
        click.echo(text_and_json.merging(str(output or base), report, verbose))
    warn(report.warnings)


@click.command()
@click.argument("merged", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The folder to write; default: in its place.")
@click.option("--in-place", is_flag=True, help="Change MERGED file by file, with one file of extra space.")
@click.option("--resume", is_flag=True, help="Finish an unmerge in place that was broken off.")
@click.option("--merge", "number", type=int, help="Insist on this merge; only the last one can be undone.")
@click.option("--from-base", type=click.Path(path_type=Path), help="Take the bytes from this base.")
@_device
@overwrite_option
@quiet_option
@as_json_option
def unmerge(
    merged: Path,
    output: Path | None,
    in_place: bool,
    resume: bool,
    number: int | None,
    from_base: Path | None,
    device: str,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Undo the last merge of the model folder MERGED: every byte of the base comes back, verified."""
    from lrconvert import api
    from lrconvert.report import text_and_json

    with progress_bar("unmerge", quiet or as_json) as progress:
        report = api.unmerge(
            merged,
            output,
            in_place=in_place,
            resume=resume,
            number=number,
            from_base=from_base,
            device=device_of(device),
            overwrite=overwrite,
            progress=progress,
        )
    place = str(output or merged)
    if as_json:
        emit({"merged": str(merged), "output": place, **dataclasses.asdict(report)})
        return
    if not quiet:
        click.echo(text_and_json.unmerging(place, report))
    warn(report.warnings)


@click.command()
@click.argument("merged", type=click.Path(path_type=Path))
@click.option("--base", required=True, type=click.Path(path_type=Path), help="Model folder or hub id of the base.")
@click.option(
    "--adapter", "adapters", required=True, multiple=True, metavar="ADAPTER[=SCALE]", help="As merged; repeatable."
)
@_dequantize
@_device
@takes_adapters
@quiet_option
@as_json_option
def verify(
    merged: Path,
    base: Path,
    adapters: tuple[str, ...],
    dequantize: bool,
    device: str,
    quiet: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    """Confirm that MERGED is BASE with the ADAPTERs merged in: computes it again and compares every bit."""
    from lrconvert import api
    from lrconvert.report import text_and_json

    with progress_bar("verify", quiet or as_json) as progress:
        inputs = _weighted(adapters, base, reading)
        report = api.verify(merged, base, inputs, dequantize=dequantize, device=device_of(device), progress=progress)
    if as_json:
        emit({"merged": str(merged), "base": str(base), "ok": report.ok, **dataclasses.asdict(report)})
    elif not (quiet and report.ok):
        click.echo(text_and_json.verification(str(merged), report))
    if not report.ok:
        raise click.exceptions.Exit(EXIT_REFUSED)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@quiet_option
@as_json_option
def recover(path: Path, quiet: bool, as_json: bool) -> None:
    """Bring PATH, in which a merge or unmerge was broken off, to its old state or the new one.

    Also removes what killed runs have left of an output PATH beside it.
    """
    from lrconvert import api
    from lrconvert.report import text_and_json

    found = api.recover(path)
    if as_json:
        emit(dataclasses.asdict(found))
    elif not quiet:
        click.echo(text_and_json.recovery(found))
