"""Results as text for people and as JSON values for programs. Nothing is computed here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lrconvert.core.errors import printable
from lrconvert.formats.fidelity import Answers, Fidelity, TargetFidelity, inspect_statistics
from lrconvert.methods import base as methods

if TYPE_CHECKING:
    from lrconvert.convert.compress import Candidate, Compression
    from lrconvert.convert.convert import Conversion
    from lrconvert.formats.lrc.file import Sizes
    from lrconvert.lora.input_statistics import InputStatistics
    from lrconvert.merge import MergeReport, Recovery, UnmergeReport, VerifyReport

_ROWS = 12  # targets shown without --verbose
# What was captured: in the weight norm, of the outputs under statistics, of the outputs on data.
_CAPTURED = {"captured": "captured", "output_captured": "of outputs", "data_captured": "on the data"}


def count_bytes(n: int) -> str:
    """Return a size with its unit, 1,234,567 as 1.235 MB; below 10 KB it is exact."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**4)):
        if n >= size:
            return f"{n / (1000 if unit == 'KB' else size):.4g} {unit}"
    return f"{n:,} B"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return columns padded to fit, the first left-aligned, the others right-aligned."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def picked(value: Any, *names: str) -> dict[str, Any]:
    """Return the attributes of these names as a JSON object."""
    return {name: getattr(value, name) for name in names}


# --- inspect --------------------------------------------------------------------------------------------------------


def inspection(path: str, facts: dict[str, Any]) -> str:
    """Return what `api.inspect` says of a file or folder as text."""
    if facts["kind"] == "statistics":
        return f"{_statistics(path, facts)}\nbase contents: {facts['base'] or 'not recorded'}"
    rows, method = facts["targets"], facts.get("method")
    kind = f"lrconvert file, {methods.get(method['id']).title}" if method else "LoRA"
    lines = [f"{printable(path)}: {kind}, {len(rows)} targets"]
    if facts["base_model"]:
        lines.append(f"base model (a hint, never opened): {printable(facts['base_model'])}")
    if method:
        size = facts["bytes"]
        parts = ", ".join(f"{part} {size[part]:,}" for part in ("payload", "overhead", "extras"))
        lines.append(f"{size['total']:,} bytes: {parts}")
        lines.append(f"method {method['id']} version {method['version']}: {_listed(method['config'])}")
        lines.append(f"base contents: {facts['base']['content'] or 'not recorded'}")
    else:
        stored = ", ".join(f"{count_bytes(n)} {dtype}" for dtype, n in facts["bytes_by_dtype"].items())
        lines.append(f"{facts['parameters']:,} numbers: {stored}; {facts['bytes_at_16_bit']:,} bytes at 16 bit")
    if facts["extras"]:
        total = sum(e["bytes"] for e in facts["extras"])
        names = ", ".join(printable(e["name"]) for e in facts["extras"][:4])
        lines.append(f"{len(facts['extras'])} extra tensors carried along, {total:,} bytes: {names}")
    return "\n".join([*lines, "", _target_table(facts["kind"], rows)])


def _listed(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in config.items())


def _target_table(kind: str, rows: Sequence[dict[str, Any]]) -> str:
    """One row per group of targets whose names differ in numbers only: the spectrum as a range over the group."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        pattern = ".".join("*" if part.isdigit() else part for part in row["name"].split("."))
        groups.setdefault((pattern, f"{row['out']} x {row['in']}"), []).append(row)
    head = ["target", "count", "out x in", "rank", "norm"]
    if kind == "lora":
        head += ["scale", "dtype", "rank for 90 %", "99 %", "99.9 %"]
    body = []
    for (pattern, shape), members in groups.items():
        cells = [printable(pattern), len(members), shape, _range(m["rank"] for m in members)]
        norms = [m["norm"] for m in members if m["norm"] is not None]
        cells.append(_range(norms, "{:.3g}") if norms else "-")
        if kind == "lora":
            cells += [_range((m["scale"] for m in members), "{:g}"), "/".join(sorted({m["dtype"] for m in members}))]
            cells += [_range(m["spectrum"][share] for m in members) for share in ("90", "99", "99.9")]
        body.append(cells)
    return table(head, body)


def _range(values: Iterable[Any], form: str = "{}") -> str:
    ordered = sorted(values)
    low, high = form.format(ordered[0]), form.format(ordered[-1])
    return low if low == high else f"{low}..{high}"


# --- convert and compare --------------------------------------------------------------------------------------------


def sizes_json(size: Sizes) -> dict[str, int]:
    """Return the sizes of a file, in bytes."""
    return picked(size, "total", "adapter", "payload", "overhead", "extras")


def size_line(size: Sizes, ratio: float, source_bytes: int) -> str:
    """Return the size of a file beside that of its source as a line of text."""
    return (
        f"size      {size.adapter:,} bytes = payload {size.payload:,} + overhead {size.overhead:,}; "
        f"{ratio:.1f} times smaller than {source_bytes:,} bytes at 16 bit"
    )


def conversion_json(done: Conversion) -> dict[str, Any]:
    """Return a conversion with its sizes, ratio and captured energy, in all and of each target."""
    method = methods.get(done.compact.method)
    value: dict[str, Any] = {
        "method": {"id": method.id, "version": method.version, "config": method.header(done.compact.config)},
        "bytes": sizes_json(done.sizes),
        "source_bytes_at_16_bit": done.source_bytes,
        "ratio": done.ratio,
        "dropped": list(done.dropped),
        "notes": list(done.notes),
        "warnings": list(done.warnings),
    }
    if done.fidelity is not None:
        value["captured"] = done.fidelity.captured
        value["targets"] = fidelity_json(done.fidelity)["targets"]
    return value


_BY_DEFAULT = f"No size was asked for: at least {methods.DEFAULT_RATIO} times smaller."


def conversion(source: str, output: str | None, done: Conversion, verbose: bool) -> str:
    """Return a conversion as text; `output` is None after a dry run."""
    method, size = methods.get(done.compact.method), done.sizes
    lines = [
        f"{printable(source)} -> {printable(output) if output else '(dry run, nothing written)'}",
        f"method    {method.id}: {_listed(method.header(done.compact.config))}",
        size_line(size, done.ratio, done.source_bytes),
        *([f"          {_BY_DEFAULT}"] if done.by_default else []),
    ]
    if size.extras:
        lines.append(
            f"extras    {size.extras:,} bytes carried along unchanged, not counted above; file {size.total:,} bytes"
        )
    lines += [f"note      {note}" for note in method.notes(done.compact.config, done.compact.targets)]
    lines += [f"note      {printable(note, 1000)}" for note in done.notes]
    if done.fidelity is not None:
        lines.append(f"captured  {done.fidelity.captured:.4f} of the update's energy (weight norm; 1 is lossless)")
        if done.fidelity.output_captured is not None:
            lines.append(f"          {done.fidelity.output_captured:.4f} of the outputs' energy (under the statistics)")
        kept = [t for t in done.fidelity.targets if not t.is_dropped and t.captured is not None]
        if kept:
            worst = min(kept, key=_worst_first)
            lines.append(f"worst     {_share(worst.captured)} {printable(worst.name)}")
        if verbose:
            lines += ["", _fidelity_table(done.fidelity, len(done.fidelity.targets))]
    return "\n".join(lines)


def compression_json(done: Compression) -> dict[str, Any]:
    """Return every candidate, and the winner as `conversion_json` does."""
    rows = []
    for n, candidate in enumerate(done.candidates):
        row = {"method": candidate.method, "options": dict(candidate.options), "winner": n == done.winner}
        if candidate.conversion is None:
            row["refused"] = str(candidate.refused)
        else:
            fidelity = candidate.conversion.fidelity
            assert fidelity is not None
            row |= {"bytes": candidate.nbytes, "ratio": candidate.conversion.ratio, "captured": fidelity.captured}
            row |= {"output_captured": fidelity.output_captured, "score": candidate.score}
            row["dropped"] = len(fidelity.dropped)
        if candidate.before is not None and candidate.after is not None:
            row |= {"before": answers_json(candidate.before), "after": answers_json(candidate.after)}
            row["steps"] = candidate.steps
        if candidate.norm:
            row |= {"norm": candidate.norm, "other": None if candidate.other is None else answers_json(candidate.other)}
        if candidate.plain is not None:
            row |= {"strength": candidate.strength, "plain": answers_json(candidate.plain)}
        rows.append(row)
    strength = None if done.stronger is None else done.stronger.strength
    return {"candidates": rows, "note": done.note, "strength": strength, **conversion_json(done.chosen)}


def compression(source: str, output: str, done: Compression) -> str:
    """Return every candidate on a line, the winner marked: nearest to the LoRA's answers first, else smallest first."""
    after = done.candidates[done.winner].after
    shown = _by_fit(done) if after is None else [*_by_answers(done), "", _closed_note(after)]
    lines = [f"{printable(source)} -> {printable(output)}", "", *shown]
    lines[3:3] = [f"  {c.method}: {printable(c.refused.what)}" for c in done.candidates if c.refused is not None]
    nearest = done.candidates[done.winner].conversion  # what is kept is measured there, whatever the strength
    notes = [f"note: {printable(note, 1000)}" for note in (nearest or done.chosen).notes]
    asked = [_BY_DEFAULT] if done.by_default else []
    return "\n".join([*lines, *asked, *_stronger(done), *([done.note] if done.note else []), *notes])


def _stronger(done: Compression) -> list[str]:
    """The strength of the winner where no data chose it."""
    if done.stronger is None:
        return []
    nearest = done.candidates[done.winner].conversion
    assert nearest is not None and nearest.fidelity is not None and done.chosen.fidelity is not None
    return [
        f"Written at {done.stronger.strength:.2f} times the LoRA's strength, at which what keeps "
        f"{nearest.fidelity.captured:.4f} of the weights answers nearer;",
        f"as written it captures {done.chosen.fidelity.captured:.4f}. --strength 1 writes the nearest fit; --base and "
        "--data measure both.",
    ]


def _by_answers(done: Compression) -> list[str]:
    measured = [(c, c.conversion, c.before, c.after) for c in done.candidates]
    rows = []
    for candidate, made, before, after in sorted(
        measured, key=lambda row: (-row[0].steps, 0.0 if row[3] is None else row[3].distance)
    ):
        if made is None or before is None or after is None:
            continue
        shares = [f"{before.closed:.1%}", f"{after.closed:.1%}", _percent(after.agreement)]
        start = [_form(done, candidate), f"{candidate.nbytes:,}", f"{made.ratio:.1f}", len(made.dropped)]
        rows.append([*start, *shares, f"{candidate.steps:,}"])
    chosen = [
        f"{_form(done, c).removeprefix('* ').strip()}: fitted in the norm of the {c.norm}, {before.closed:.1%} closed; "
        f"in that of the {'weights' if c.norm == 'outputs' else 'outputs'} {c.other.closed:.1%}"
        for c, _, before, _ in measured
        if before is not None and c.other is not None
    ]
    chosen += [
        f"{_form(done, c).removeprefix('* ').strip()}: fitted at {c.strength:.3g} times the LoRA's strength; "
        f"at its own {c.plain.closed:.1%} closed"
        for c, _, before, _ in measured
        if before is not None and c.plain is not None
    ]
    head = ["  form", "bytes", "ratio", "dropped", "closed", "refined", "agreement", "steps"]
    return [table(head, rows), *(["", *chosen] if chosen else [])]


def _closed_note(answers: Answers) -> str:
    what = "KL" if answers.kind == "KL" else f"distance of {answers.kind}"
    return (
        f"Closed: the share of the {what} between base and LoRA that the fit has closed, and the refined form, on "
        f"{answers.items:,} held-out items, which chose the winner."
    )


def _by_fit(done: Compression) -> list[str]:
    made = [(c, c.conversion, c.conversion.fidelity) for c in done.candidates if c.conversion is not None]
    weighted = any(fidelity is not None and fidelity.output_captured is not None for _, _, fidelity in made)
    rows = []
    for candidate, conversion, fidelity in sorted(made, key=lambda row: (row[0].nbytes, -row[0].score)):
        assert fidelity is not None
        captured = [_share(fidelity.captured)]
        captured += [_share(fidelity.output_captured), _share(fidelity.fit_captured)] if weighted else []
        start = [_form(done, candidate), f"{candidate.nbytes:,}", f"{conversion.ratio:.1f}", len(conversion.dropped)]
        rows.append([*start, *captured])
    head = ["  form", "bytes", "ratio", "dropped", "captured", *(["of outputs", "score"] if weighted else [])]
    note = (
        "The score is what the fits work on: errors of outputs, each target by the root of its energy."
        if weighted
        else "Captured energy of the weights alone favours low rank; with --base, answers rank the forms."
    )
    return [table(head, rows), "", note]


def _form(done: Compression, candidate: Candidate) -> str:
    options = f" ({_listed(candidate.options)})" if candidate.options else ""
    return f"{'* ' if candidate is done.candidates[done.winner] else '  '}{candidate.method}{options}"


def answers_json(answers: Answers) -> dict[str, Any]:
    """Return the distance of a model's answers from the LoRA's, and the share of it that is closed."""
    return {"of": answers.kind, **picked(answers, "items", "distance", "base_distance", "closed", "agreement")}


def fidelity_json(fidelity: Fidelity) -> dict[str, Any]:
    """Return what a file keeps of its LoRA, in all and of each target."""
    answers = fidelity.answers
    return {
        **picked(fidelity, "method", *_CAPTURED),
        "answers": None if answers is None else {**asdict(answers), "closed": answers.closed},
        "ratio": fidelity.ratio,
        "source_bytes_at_16_bit": fidelity.source_bytes,
        "bytes": {
            part: getattr(fidelity, f"{part}_bytes") for part in ("total", "adapter", "payload", "overhead", "extras")
        },
        "targets": [
            {**picked(t, "name", "rank_before", "rank_after", *_CAPTURED), "norm": t.energy**0.5}
            for t in fidelity.targets
        ],
        "dropped": list(fidelity.dropped),
        "notes": list(fidelity.notes),
        "warnings": list(fidelity.warnings),
    }


def _fidelity_table(fidelity: Fidelity, rows: int) -> str:
    worst_first = sorted(fidelity.targets, key=_worst_first)[:rows]
    shown = [name for name in _CAPTURED if getattr(fidelity, name) is not None]
    return table(
        ["target (worst first)", "rank before", "after", *(_CAPTURED[name] for name in shown)],
        [
            [printable(t.name), t.rank_before, t.rank_after, *(_share(getattr(t, name)) for name in shown)]
            for t in worst_first
        ],
    )


def _worst_first(target: TargetFidelity) -> float:
    return math.inf if target.captured is None else target.captured


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def comparison(files: Sequence[tuple[str, Fidelity]], verbose: bool) -> str:
    """Return the files, each a name and what it keeps, as tables: sizes, answers, and the worst targets or all."""
    shown = [name for name in _CAPTURED if any(getattr(f, name) is not None for _, f in files)]
    rows = [
        [printable(name), f.method, f"{f.adapter_bytes:,}", f"{f.overhead_bytes:,}", f"{f.extras_bytes:,}",
         f"{f.ratio:.1f}", len(f.dropped), *(_share(getattr(f, which)) for which in shown)]
        for name, f in files
    ]  # fmt: skip
    head = [
        "file",
        "method",
        "bytes",
        "of it overhead",
        "extras",
        "ratio",
        "dropped",
        *(_CAPTURED[name] for name in shown),
    ]
    parts = [table(head, rows)]
    if answers := [(name, f.answers) for name, f in files if f.answers is not None]:
        parts.append(_answers(answers))
    for name, f in files:
        notes = "".join(f"note: {printable(note, 1000)}\n" for note in f.notes)
        parts.append(f"{printable(name)}\n{notes}{_fidelity_table(f, len(f.targets) if verbose else _ROWS)}")
        if not verbose and len(f.targets) > _ROWS:
            parts[-1] += f"\n... and {len(f.targets) - _ROWS} more (-v shows all)"
    return "\n\n".join(parts)


def _answers(files: Sequence[tuple[str, Answers]]) -> str:
    """Show how far the models' answers are from the LoRA's, and before each file the base that it was measured from, if
    that is another one than before: heads that a file carries are on its base, too."""
    first, rows, base = files[0][1], [], None
    for name, a in files:
        if base != (a.base_distance, a.base_agreement):
            base = a.base_distance, a.base_agreement
            rows.append(["(no update)", f"{a.base_distance:.4g}", "0.0%", _percent(a.base_agreement)])
        rows.append([printable(name), f"{a.distance:.4g}", f"{a.closed:.1%}", _percent(a.agreement)])
    unit = "KL, nats" if first.kind == "KL" else "error of hidden states"
    return table([f"answers on {first.items:,} items", unit, "of it closed", "agrees with the LoRA"], rows)


# --- statistics -----------------------------------------------------------------------------------------------------


def statistics_json(statistics: InputStatistics, nbytes: int) -> dict[str, Any]:
    """Return what `nbytes` of input statistics hold."""
    facts = inspect_statistics(statistics, nbytes)
    return {key: facts[key] for key in ("tokens", "bytes", "base", "data", "inputs")}


def statistics(output: str, measured: InputStatistics, nbytes: int) -> str:
    """Return the same as text."""
    return f"wrote {_statistics(output, inspect_statistics(measured, nbytes))}"


def _statistics(path: str, facts: dict[str, Any]) -> str:
    inputs = facts["inputs"]
    layers = sum(len(i["names"]) for i in inputs)
    lines = [
        f"{printable(path)}: {facts['bytes']:,} bytes",
        f"tokens  {facts['tokens']:,}",
        f"inputs  {_range({i['width'] for i in inputs})} wide; {layers} layers are measured, by {len(inputs)} inputs"
        + (": layers that are given the same tensor share one" if len(inputs) < layers else ""),
    ]
    if few := [i for i in inputs if i["tokens"] < i["width"]]:
        example = printable(few[0]["names"][0])
        lines.append(f"warning: {len(few)} inputs saw fewer tokens than they are wide, {example} for one")
    return "\n".join(lines)


# --- merge ----------------------------------------------------------------------------------------------------------


def merge_json(report: MergeReport) -> dict[str, Any]:
    """Return what a merge did to each tensor and file, and what undoes it."""
    return {
        "dry_run": report.dry_run,
        "tensors": [
            {
                "name": t.name,
                "dtype": t.dtype,
                "shape": list(t.shape),
                "updates": t.updates,
                **picked(t.stats, "elements", "changed", "unmoved"),
                "max_rounding_error": t.stats.max_error,
                "mean_rounding_error": t.stats.mean_error,
            }
            for t in report.tensors
        ],
        "placed": list(report.placed),
        "added": list(report.added),
        "dropped": list(report.dropped),
        "config": dict(report.config),
        "files": [{"name": name, "bytes": size} for name, size in report.files],
        "left_out": list(report.left_out),
        **picked(report, "touched_bytes", "record", "record_bytes", "can_undo", "already_done"),
        "warnings": list(report.warnings),
    }


def merging(output: str, report: MergeReport, verbose: bool) -> str:
    """Return what a merge did as text."""
    if report.already_done:
        return (
            f"{printable(output)} holds this merge already ({report.record}): nothing was changed\n"
            "again     merges the same once more: --again"
        )
    total = report.stats
    done = "would write" if report.dry_run else "wrote"
    lines = [f"{done} {printable(output)}: {len(report.files)} files, {count_bytes(report.total_bytes)}"]
    lines.append(f"{len(report.tensors)} tensors merged, {total.elements:,} weights, one correct rounding each")
    if not report.dry_run and total.elements:
        lines.append(
            f"changed   {total.changed:,} weights; {total.unmoved:,} have an update below half a step and did not move"
        )
        lines.append(
            f"rounding  at most {total.max_error:.3g}, on average {total.mean_error:.3g} from the exact result"
        )
    if report.record:
        share = 100 * report.record_bytes / max(1, report.touched_bytes)
        size = f"{count_bytes(report.record_bytes)}, {share:.1f} % of the merged bytes"
        how = "undoes the merge bit for bit" if report.can_undo else "has digests only; undoing needs the base itself"
        lines.append(f"record    {size}: {how}")
    for what, names in (("replaced", report.placed), ("added", report.added), ("removed", report.dropped)):
        if names:
            lines.append(f"{what.ljust(9)} {', '.join(map(printable, names))}")
    if report.config:
        lines.append(f"config    {', '.join(sorted(report.config))} changed")
    if report.left_out:
        lines.append(f"left out  {', '.join(map(printable, report.left_out))}: weights of the unmerged base")
    if verbose:
        rows = [
            [
                *(printable(t.name), t.dtype, f"{t.stats.changed:,}", f"{t.stats.unmoved:,}"),
                *(f"{t.stats.max_error:.3g}", f"{t.stats.mean_error:.3g}"),
            ]
            for t in report.tensors
        ]
        lines += ["", table(["tensor", "dtype", "changed", "did not move", "rounding error", "mean"], rows)]
    return "\n".join(lines)


def unmerging(output: str, report: UnmergeReport) -> str:
    """Return what undoing a merge did as text."""
    if report.already_done:
        lines = [f"{printable(output)}: {report.record or 'the merge'} is undone already, nothing was changed"]
        if report.remaining:
            lines.append(f"merges    {report.remaining} are left; undo the last of them: --merge {report.remaining}")
        return "\n".join(lines)
    lines = [f"wrote {printable(output)}: {len(report.files)} files, {count_bytes(report.total_bytes)}"]
    if report.restored:
        lines.append(f"restored  {len(report.restored)} tensors")
    if report.removed:
        lines.append(f"removed   {', '.join(map(printable, report.removed))}")
    lines.append(
        "verified  every tensor has the digest that it had before the merge"
        if report.verified
        else "verified  nothing: there is no record to compare with"
    )
    if report.remaining:
        lines.append(f"remaining {report.remaining} earlier merge{'s' if report.remaining > 1 else ''}")
    return "\n".join(lines)


def recovery(recovered: Recovery) -> str:
    """Return what was done about a merge that was broken off."""
    state = {
        "clean": "holds nothing that was broken off",
        "old": "is as it was before: what was broken off is taken back",
        "new": "is done: what was broken off is finished",
    }[recovered.state]
    lines = [f"{printable(recovered.path)} {state}"]
    if recovered.removed:
        lines.append(f"removed   {', '.join(map(printable, recovered.removed))}")
    for name in recovered.unfinished:
        lines.append(f"unfinished work is in {printable(name)}: the same command with --resume goes on; or delete it")
    return "\n".join(lines)


def verification(merged: str, report: VerifyReport) -> str:
    """Return whether a model is the merge it should be, and where it differs."""
    if report.ok:
        size = f"{report.tensors} tensors, {count_bytes(report.nbytes)}, {report.recomputed} of them computed again"
        return f"{printable(merged)} is the merge, bit for bit: {size}"
    lines = [f"{printable(merged)} is not the merge: {len(report.differences)} differences"]
    shown = report.differences[:_ROWS]
    lines += [f"  {printable(d.name)} {printable(d.what)}" for d in shown]
    if len(shown) < len(report.differences):
        lines.append(f"  ... and {len(report.differences) - len(shown)} more")
    return "\n".join(lines)
