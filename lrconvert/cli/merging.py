"""Commands that bake adapters into a base, take them out again, and check that a model is such a merge."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from lrconvert.cli import flags
from lrconvert.cli.printing import emit, progress_bar, say, warn
from lrconvert.core.errors import EXIT_REFUSED
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.merge.options import MergeOptions, UnmergeOptions
from lrconvert.merge.plan.updates import Scaled


def _weighted(named: Sequence[tuple[str, float]], base: Path, reading: Mapping[str, Any]) -> list[Scaled]:
    """Load adapters, each a path and its scale."""
    from lrconvert import api
    from lrconvert.io import hub

    adapters = api.load_all([name for name, _ in named], base=base, **reading)
    return [Scaled(adapter, scale, hub.hint(name)) for adapter, (name, scale) in zip(adapters, named, strict=True)]


def _spelled(name: str, scale: float) -> str:
    return name if scale == 1 else f"{name}={scale:g}"


@flags.command(
    "merge-into-base",
    click.Argument(["base"], type=flags.BASE),
    click.Argument(["adapters"], nargs=-1, required=True, type=flags.ScaledPath(), metavar="ADAPTER[=SCALE]..."),
    flags.output("The model folder to write.", required=False, is_local=True),
    *flags.of(MergeOptions),
    *flags.reading(),
    flags.OVERWRITE,
    flags.QUIET,
    flags.VERBOSE,
    flags.AS_JSON,
)
def merge_into_base(base: Path, adapters: tuple[tuple[str, float], ...], output: Path | None, **given: Any) -> None:
    """Bake one or more ADAPTERs (lrconvert files, LoRA folders) into a copy of the model folder BASE.

    Their sum, each times its SCALE, is added to the weights and rounded once, correctly. `unmerge` takes it out again.
    """
    from lrconvert import api
    from lrconvert.report.merging import merge_json, merge_text

    quiet, verbose, as_json = given.pop("quiet"), given.pop("verbose"), given.pop("as_json")
    if output is None and not given["in_place"]:
        raise click.UsageError("where to? -o FOLDER writes a new model folder, --in-place changes BASE itself")
    if output is not None and given["in_place"]:
        raise click.UsageError("--in-place changes BASE itself, and -o writes a new folder: give one of them")
    with progress_bar("merge", quiet or as_json) as progress:
        scaled = _weighted(adapters, base, flags.chosen(given, ReadOptions))
        report = api.merge(base, scaled, output, progress=progress, **flags.chosen(given, MergeOptions))
    if as_json:
        named = {"base": str(base), "adapters": [_spelled(*one) for one in adapters], "output": str(output or base)}
        emit({**named, **merge_json(report)})
        return
    if not quiet:
        say(merge_text(str(output or base), report, verbose))
    warn(report.warnings)


@flags.command(
    "unmerge",
    click.Argument(["merged"], type=flags.PATH),
    flags.output("The folder to write; default: in its place.", required=False, is_local=True),
    *flags.of(UnmergeOptions),
    flags.OVERWRITE,
    flags.QUIET,
    flags.AS_JSON,
)
def unmerge(merged: Path, output: Path | None, quiet: bool, as_json: bool, **given: Any) -> None:
    """Undo the last merge of the model folder MERGED: every byte of the base comes back, verified."""
    from lrconvert import api
    from lrconvert.report.merging import unmerge_text

    with progress_bar("unmerge", quiet or as_json) as progress:
        report = api.unmerge(merged, output, progress=progress, **flags.chosen(given, UnmergeOptions))
    place = str(output or merged)
    if as_json:
        emit({"merged": str(merged), "output": place, **dataclasses.asdict(report)})
        return
    if not quiet:
        say(unmerge_text(place, report))
    warn(report.warnings)


@flags.command(
    "verify",
    click.Argument(["merged"], type=flags.PATH),
    flags.base("Model folder or hub id of the base.", required=True),
    click.Option(
        ["--adapter", "adapters"],
        required=True,
        multiple=True,
        type=flags.ScaledPath(),
        metavar="ADAPTER[=SCALE]",
        help="As merged; repeatable.",
    ),
    *(option for option in flags.of(MergeOptions) if option.name in ("dequantize", "component")),
    *flags.reading(),
    flags.QUIET,
    flags.AS_JSON,
)
def verify(merged: Path, base: Path, adapters: tuple[tuple[str, float], ...], **given: Any) -> None:
    """Confirm that MERGED is BASE with the ADAPTERs merged in: computes it again and compares every bit."""
    from lrconvert import api
    from lrconvert.report.merging import verification_text

    quiet, as_json = given.pop("quiet"), given.pop("as_json")
    how = flags.chosen(given, MergeOptions)
    with progress_bar("verify", quiet or as_json) as progress:
        scaled = _weighted(adapters, base, flags.chosen(given, ReadOptions))
        report = api.verify(merged, base, scaled, progress=progress, **how)
    if as_json:
        emit({"merged": str(merged), "base": str(base), "ok": report.ok, **dataclasses.asdict(report)})
    elif not (quiet and report.ok):
        say(verification_text(str(merged), report))
    if not report.ok:
        raise click.exceptions.Exit(EXIT_REFUSED)


@flags.command("recover", click.Argument(["path"], type=flags.PATH), flags.QUIET, flags.AS_JSON)
def recover(path: Path, quiet: bool, as_json: bool) -> None:
    """Bring PATH, in which a merge or unmerge was broken off, to its old state or the new one.

    Also removes what killed runs have left of an output PATH beside it.
    """
    from lrconvert import api
    from lrconvert.report.merging import recovery_text

    recovery = api.recover(path)
    if as_json:
        emit(dataclasses.asdict(recovery))
    elif not quiet:
        say(recovery_text(recovery))
