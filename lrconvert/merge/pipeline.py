"""Merges into models of a diffusers pipeline: each as a model folder of its own, all else of the pipeline copied."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lrconvert.core.errors import OptionError, OutputPathError, UndoError
from lrconvert.core.wording import spelled
from lrconvert.io import pipeline
from lrconvert.io.checkpoint import contained
from lrconvert.io.durable import atomic_directory, check_output, require_space
from lrconvert.io.durable.files import hidden_sibling
from lrconvert.merge.options import MergeOptions
from lrconvert.merge.plan.other_files import is_weights
from lrconvert.merge.plan.plan import ELSEWHERE
from lrconvert.merge.plan.updates import Scaled, targets_of
from lrconvert.merge.report import MergeReport, VerifyReport
from lrconvert.merge.undo.open_record import numbered
from lrconvert.merge.writing import Progress

_SPACE_MARGIN = 1.02
MergeOne = Callable[[Path, Path | None, MergeOptions, Progress], MergeReport]
VerifyOne = Callable[[Path, Path, bool], VerifyReport]


def names_of(inputs: Sequence[Scaled]) -> list[str]:
    """Return the names of all that adapters change."""
    adapters = [item.adapter for item in inputs]
    return [target.name for each in adapters for target in targets_of(each)] + [
        extra.name for each in adapters for extra in each.extras if extra.use != "textual_inversion"
    ]


def merge(
    base: Path, inputs: Sequence[Scaled], out: Path | None, options: MergeOptions, progress: Progress, one: MergeOne
) -> MergeReport:
    """Merge into the models of a pipeline that the adapters name, with `one` into each; the output appears whole or not
    at all. Raises E-BASE, E-OPTION, E-OUT-* and what `one` raises."""
    names = pipeline.chosen(base, names_of(inputs), options.component)
    inner = replace(options, component="", overwrite=False)
    if options.in_place or out is None:
        if len(names) > 1:
            what = f"the adapters are for {' and '.join(names)}, and {spelled('in_place', True)} changes one model"
            raise OptionError(what, fix=f"pass {spelled('component', ...)} for one after the other", path=base)
        return _named(names[0], one(base / names[0], None, inner, progress))
    if options.resume:
        what = f"{spelled('resume', True)} does not go with a pipeline"
        raise OptionError(what, fix="give the folder of the model in it", path=base)
    check_output(out, options.overwrite, [base], directory=True)
    if out.is_dir() and any(out.iterdir()) and not pipeline.is_pipeline(out):
        raise OutputPathError("is no pipeline, so it is not replaced", fix="choose another output", path=out)
    copies, left_out = _others(base, names)
    sizes = {name: path.stat().st_size for name, path in copies.items()}
    whole = not options.component
    if options.dry_run:
        nowhere = hidden_sibling(out, "dry")
        planned = [_named(name, one(base / name, nowhere, inner, progress)) for name in names]
        return _joined(planned, sizes, left_out, whole)
    require_space(out, int(sum(sizes.values()) * _SPACE_MARGIN))
    reports = []
    with atomic_directory(out, overwrite=options.overwrite) as folder:
        for number, name in enumerate(names):
            part = _part(progress, number, len(names))
            reports.append(_named(name, one(base / name, folder.root / name, inner, part)))
        for name, path in sorted(copies.items()):
            folder.copy_file(path, name)
    return _joined(reports, sizes, left_out, whole)


def verify(merged: Path, base: Path, inputs: Sequence[Scaled], component: str, one: VerifyOne) -> VerifyReport:
    """Verify every model of a pipeline, with `one(merged, base, with the adapters)`: those that the adapters name, and
    the others, which have to be those of the base."""
    changed = pipeline.chosen(base, names_of(inputs), component)
    reports = {name: one(merged / name, base / name, name in changed) for name in pipeline.models(base)}
    differences = (
        replace(each, name=f"{name}: {each.name}") for name, report in reports.items() for each in report.differences
    )
    return VerifyReport(
        tensors=sum(report.tensors for report in reports.values()),
        recomputed=sum(report.recomputed for report in reports.values()),
        nbytes=sum(report.nbytes for report in reports.values()),
        differences=tuple(differences),
        warnings=tuple(dict.fromkeys(_own(w for report in reports.values() for w in report.warnings))),
        hint="; ".join(f"{name}: {report.hint}" for name, report in reports.items() if report.hint),
    )


def refuse_unmerge(merged: Path) -> None:
    """Raise E-UNDO for a pipeline: its models have their own records."""
    if not pipeline.is_pipeline(merged):
        return
    with_record = [name for name in pipeline.models(merged) if numbered(merged / name)]
    if not with_record:
        raise UndoError("no model of this pipeline has a record of a merge", path=merged)
    shown = " or ".join(str(merged / name) for name in with_record)
    raise UndoError("is a pipeline, whose models have their own records", fix=f"give {shown}", path=merged)


def _others(base: Path, names: Sequence[str]) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Return the files of a pipeline outside of these models: those to copy, and those left out. A file of weights
    beside the models holds all of them as they were."""
    copies, left_out = {}, []
    for folder, folders, files in os.walk(base):
        place = Path(folder).relative_to(base)
        is_root = not place.parts
        skipped = [n for n in folders if n.startswith(".") or (Path(folder) / n).is_symlink()]
        left_out += [f"{(place / n).as_posix()}/" for n in skipped]
        folders[:] = sorted(n for n in folders if n not in skipped and not (is_root and n in names))
        for name in files:
            path, shown = Path(folder) / name, (place / name).as_posix()
            if path.is_file() and contained(base, path) and not (is_root and is_weights(name)):
                copies[shown] = path
            else:
                left_out.append(shown)
    return copies, tuple(sorted(left_out))


def _part(progress: Progress, number: int, count: int) -> Progress:
    return lambda fraction, text: progress((number + fraction) / count, text)


def _own(warnings: Iterable[str]) -> Iterator[str]:
    """Return warnings without those that parts for other models are left out: they are merged, too."""
    return (warning for warning in warnings if not warning.endswith(ELSEWHERE))


def _named(name: str, report: MergeReport) -> MergeReport:
    """Return a report of one model with names as the pipeline has them."""
    return replace(
        report,
        tensors=tuple(replace(each, name=f"{name}.{each.name}") for each in report.tensors),
        placed=tuple(f"{name}.{each}" for each in report.placed),
        added=tuple(f"{name}.{each}" for each in report.added),
        dropped=tuple(f"{name}.{each}" for each in report.dropped),
        files=tuple((f"{name}/{each}", size) for each, size in report.files),
        left_out=tuple(f"{name}/{each}" for each in report.left_out),
        record=f"{name}/{report.record}" if report.record else "",
    )


def _joined(
    reports: Sequence[MergeReport], others: dict[str, int], left_out: tuple[str, ...], whole: bool
) -> MergeReport:
    """Return the report of all models; `whole` where they are all that the adapters have parts for."""
    first = reports[0]
    warnings = [warning for report in reports for warning in report.warnings]
    return replace(
        first,
        tensors=tuple(each for report in reports for each in report.tensors),
        placed=tuple(each for report in reports for each in report.placed),
        added=tuple(each for report in reports for each in report.added),
        dropped=tuple(each for report in reports for each in report.dropped),
        files=tuple(sorted([*(each for report in reports for each in report.files), *others.items()])),
        left_out=tuple(sorted([*(each for report in reports for each in report.left_out), *left_out])),
        warnings=tuple(dict.fromkeys(_own(warnings) if whole else warnings)),
        record=", ".join(report.record for report in reports if report.record),
        record_bytes=sum(report.record_bytes for report in reports),
        touched_bytes=sum(report.touched_bytes for report in reports),
    )
