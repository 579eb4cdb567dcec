"""Results as text for people and as JSON values for programs. No computing here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lrconvert.core.errors import printable
from lrconvert.formats.fidelity import Answers, Fidelity, inspect_statistics
from lrconvert.methods import base as methods

if TYPE_CHECKING:
    from lrconvert.convert.compress import Candidate, Compression
    from lrconvert.convert.convert import Conversion
    from lrconvert.formats.lrc.file import Sizes
    from lrconvert.lora.input_statistics import InputStatistics
    from lrconvert.merge import MergeReport, Recovery, UnmergeReport, VerifyReport

_ROWS = 12  # targets shown without --verbose


def count_bytes(n: int) -> str:
    """1,234,567 as 1.23 MB; exact below 10 KB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**4)):
        if n >= size:
            return f"{n / (1000 if unit == 'KB' else size):.4g} {unit}"
    return f"{n:,} B"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns padded to fit; the first left-aligned, the others right-aligned."""
    cells = [[str(c) for c in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# --- inspect --------------------------------------------------------------------------------------------------------


def inspection(path: str, found: dict[str, Any]) -> str:
    if found["kind"] == "statistics":
        return f"{_statistics(path, found)}\nbase contents: {found['base'] or 'not recorded'}"
    rows = found["targets"]
    lines = [f"{printable(path)}: {_kind(found)}, {len(rows)} targets"]
    if found["base_model"]:
        lines.append(f"base model (a hint, never opened): {printable(found['base_model'])}")
    if found["kind"] == "lora":
        held = ", ".join(f"{count_bytes(n)} {dtype}" for dtype, n in found["bytes_by_dtype"].items())
        lines.append(f"{found['parameters']:,} numbers: {held}; {found['bytes_at_16_bit']:,} bytes at 16 bit")
    else:
        size = found["bytes"]
        lines.append(
            f"{size['total']:,} bytes: payload {size['payload']:,}, overhead {size['overhead']:,}, "
            f"extras {size['extras']:,}"
        )
        config = ", ".join(f"{k} {v}" for k, v in found["method"]["config"].items())
        lines.append(f"method {found['method']['id']} version {found['method']['version']}: {config}")
        lines.append(f"base contents: {found['base']['content'] or 'not recorded'}")
    if found["extras"]:
        total = sum(e["bytes"] for e in found["extras"])
        names = ", ".join(printable(e["name"]) for e in found["extras"][:4])
        lines.append(f"{len(found['extras'])} extra tensors carried along, {total:,} bytes: {names}")
    return "\n".join([*lines, "", _target_table(found["kind"], rows)])


def _kind(found: dict[str, Any]) -> str:
    if found["kind"] == "lora":
        return "LoRA"
    return f"lrconvert file, {methods.get(found['method']['id']).title}"


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


def _range(values: Any, form: str = "{}") -> str:
    found = sorted(values)
    low, high = form.format(found[0]), form.format(found[-1])
    return low if low == high else f"{low}..{high}"


# --- convert and compare --------------------------------------------------------------------------------------------


def sizes_json(size: Sizes) -> dict[str, int]:
    return {
        "total": size.total,
        "adapter": size.adapter,
        "payload": size.payload,
        "overhead": size.overhead,
        "extras": size.extras,
    }


def conversion_json(done: Conversion) -> dict[str, Any]:
    method = methods.get(done.compact.method)
    value: dict[str, Any] = {
        "method": {"id": method.id, "version": method.version, "config": method.header(done.compact.config)},
        "bytes": sizes_json(done.sizes),
        "source_bytes_at_16_bit": done.source_bytes,
        "ratio": done.ratio,
        "warnings": list(done.warnings),
    }
    if done.fidelity is not None:
        value["captured"] = done.fidelity.captured
        value["targets"] = fidelity_json(done.fidelity)["targets"]
    return value


def conversion(source: str, output: str | None, done: Conversion, verbose: bool) -> str:
    method = methods.get(done.compact.method)
    size = done.sizes
    config = ", ".join(f"{k} {v}" for k, v in method.header(done.compact.config).items())
    lines = [
        f"{printable(source)} -> {printable(output) if output else '(dry run, nothing written)'}",
        f"method    {method.id}: {config}",
        f"size      {size.adapter:,} bytes = payload {size.payload:,} + overhead {size.overhead:,}; "
        f"{done.ratio:.1f} times smaller than {done.source_bytes:,} bytes at 16 bit",
    ]
    if size.extras:
        lines.append(
            f"extras    {size.extras:,} bytes carried along unchanged, not counted above; file {size.total:,} bytes"
        )
    lines += [f"note      {note}" for note in method.notes(done.compact.config, done.compact.targets)]
    if done.fidelity is not None:
        lines.append(f"captured  {done.fidelity.captured:.4f} of the update's energy (weight norm; 1 is lossless)")
        if done.fidelity.output_captured is not None:
            lines.append(f"          {done.fidelity.output_captured:.4f} of the outputs' energy (under the statistics)")
        worst = min(done.fidelity.targets, key=lambda t: t.captured)
        lines.append(f"worst     {worst.captured:.4f} {printable(worst.name)}")
        if verbose:
            lines += ["", _fidelity_table(done.fidelity, len(done.fidelity.targets))]
    return "\n".join(lines)


def compression_json(done: Compression) -> dict[str, Any]:
    rows = []
    for n, some in enumerate(done.candidates):
        row: dict[str, Any] = {"method": some.method, "options": dict(some.options), "winner": n == done.winner}
        if some.conversion is None:
            row["refused"] = str(some.refused)
        else:
            fidelity = some.conversion.fidelity
            assert fidelity is not None
            row |= {"bytes": some.nbytes, "ratio": some.conversion.ratio, "captured": fidelity.captured}
            row |= {"output_captured": fidelity.output_captured, "score": some.score}
        if some.before is not None and some.after is not None:
            row |= {"before": answers_json(some.before), "after": answers_json(some.after), "steps": some.steps}
        rows.append(row)
    return {"candidates": rows, "note": done.note, **conversion_json(done.chosen)}


def compression(source: str, output: str, done: Compression) -> str:
    """Every candidate on a line, the winner marked: nearest to the LoRA's answers first, else smallest first."""
    after = done.candidates[done.winner].after
    shown = _by_fit(done) if after is None else [*_by_answers(done), "", _closed_note(after)]
    lines = [f"{printable(source)} -> {printable(output)}", "", *shown]
    refused = [f"  {c.method}: {printable(c.refused.what)}" for c in done.candidates if c.refused is not None]
    lines[3:3] = refused
    return "\n".join([*lines, *([done.note] if done.note else [])])


def _by_answers(done: Compression) -> list[str]:
    made = [(c, c.conversion, c.before, c.after) for c in done.candidates]
    rows = []
    for some, found, before, after in sorted(made, key=lambda e: (-e[0].steps, 0.0 if e[3] is None else e[3].distance)):
        if found is None or before is None or after is None:
            continue
        agreement = "-" if after.agreement is None else f"{after.agreement:.1%}"
        shares = [f"{before.closed:.1%}", f"{after.closed:.1%}", agreement]
        rows.append([_form(done, some), f"{some.nbytes:,}", f"{found.ratio:.1f}", *shares, f"{some.steps:,}"])
    return [table(["  form", "bytes", "ratio", "closed", "refined", "agreement", "steps"], rows)]


def _closed_note(found: Answers) -> str:
    what = "KL" if found.kind == "KL" else f"distance of {found.kind}"
    return (
        f"Closed: the share of the {what} between base and LoRA that the fit has closed, and the refined form, on "
        f"{found.items:,} held-out items, which chose the winner."
    )


def _by_fit(done: Compression) -> list[str]:
    made = [(c, c.conversion, c.conversion.fidelity) for c in done.candidates if c.conversion is not None]
    weighted = any(fidelity is not None and fidelity.output_captured is not None for _, _, fidelity in made)
    rows = []
    for some, found, fidelity in sorted(made, key=lambda entry: (entry[0].nbytes, -entry[0].score)):
        assert fidelity is not None
        captured = [_share(fidelity.captured)]
        captured += [_share(fidelity.output_captured), _share(fidelity.fit_captured)] if weighted else []
        rows.append([_form(done, some), f"{some.nbytes:,}", f"{found.ratio:.1f}", *captured])
    head = ["  form", "bytes", "ratio", "captured", *(["of outputs", "score"] if weighted else [])]
    note = (
        "The score is what the fits work on: errors of outputs, each target by the root of its energy."
        if weighted
        else "Captured energy of the weights alone favours low rank; with --base, answers rank the forms."
    )
    return [table(head, rows), "", note]


def _form(done: Compression, some: Candidate) -> str:
    told = ", ".join(f"{key} {value}" for key, value in some.options.items())
    return f"{'* ' if some is done.candidates[done.winner] else '  '}{some.method}{f' ({told})' if told else ''}"


def answers_json(found: Answers) -> dict[str, Any]:
    return {
        "of": found.kind,
        "items": found.items,
        "distance": found.distance,
        "base_distance": found.base_distance,
        "closed": found.closed,
        "agreement": found.agreement,
    }


def fidelity_json(found: Fidelity) -> dict[str, Any]:
    return {
        "method": found.method,
        "captured": found.captured,
        "output_captured": found.output_captured,
        "data_captured": found.data_captured,
        "answers": None if found.answers is None else {**asdict(found.answers), "closed": found.answers.closed},
        "ratio": found.ratio,
        "source_bytes_at_16_bit": found.source_bytes,
        "bytes": {
            "total": found.total_bytes,
            "adapter": found.adapter_bytes,
            "payload": found.payload_bytes,
            "overhead": found.overhead_bytes,
            "extras": found.extras_bytes,
        },
        "targets": [
            {
                "name": t.name,
                "rank_before": t.rank_before,
                "rank_after": t.rank_after,
                "captured": t.captured,
                "output_captured": t.output_captured,
                "data_captured": t.data_captured,
                "norm": t.energy**0.5,
            }
            for t in found.targets
        ],
    }


def _fidelity_table(found: Fidelity, rows: int) -> str:
    worst_first = sorted(found.targets, key=lambda t: t.captured)[:rows]
    shown = [name for name in _CAPTURED if getattr(found, name) is not None]
    return table(
        ["target (worst first)", "rank before", "after", *(_CAPTURED[name] for name in shown)],
        [
            [printable(t.name), t.rank_before, t.rank_after, *(_share(getattr(t, name)) for name in shown)]
            for t in worst_first
        ],
    )


# What was captured: in the weight norm, of the outputs under statistics, of the outputs on data.
_CAPTURED = {"captured": "captured", "output_captured": "of outputs", "data_captured": "on the data"}


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def comparison(found: Sequence[tuple[str, Fidelity]], verbose: bool) -> str:
    shown = [name for name in _CAPTURED if any(getattr(f, name) is not None for _, f in found)]
    rows = [
        [printable(name), f.method, f"{f.adapter_bytes:,}", f"{f.overhead_bytes:,}", f"{f.extras_bytes:,}",
         f"{f.ratio:.1f}", *(_share(getattr(f, which)) for which in shown)]
        for name, f in found
    ]  # fmt: skip
    head = ["file", "method", "bytes", "of it overhead", "extras", "ratio", *(_CAPTURED[name] for name in shown)]
    parts = [table(head, rows)]
    if any(f.answers is not None for _, f in found):
        parts.append(_answers(found))
    for name, f in found:
        parts.append(f"{printable(name)}\n{_fidelity_table(f, len(f.targets) if verbose else _ROWS)}")
        if not verbose and len(f.targets) > _ROWS:
            parts[-1] += f"\n... and {len(f.targets) - _ROWS} more (-v shows all)"
    return "\n\n".join(parts)


def _answers(found: Sequence[tuple[str, Fidelity]]) -> str:
    """How far the models' answers are from the LoRA's."""
    known = [(name, f.answers) for name, f in found if f.answers is not None]
    first = known[0][1]
    rows = [["(no adapter)", f"{first.base_distance:.4g}", "0.0%", _percent(first.base_agreement)]]
    rows += [[printable(name), f"{a.distance:.4g}", f"{a.closed:.1%}", _percent(a.agreement)] for name, a in known]
    unit = "KL, nats" if first.kind == "KL" else "error of hidden states"
    head = [f"answers on {first.items:,} items", unit, "of it closed", "agrees with the LoRA"]
    return table(head, rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


# --- statistics -----------------------------------------------------------------------------------------------------


def statistics_json(found: InputStatistics, nbytes: int) -> dict[str, Any]:
    told = inspect_statistics(found, nbytes)
    return {key: told[key] for key in ("tokens", "bytes", "base", "data", "inputs")}


def statistics(output: str, found: InputStatistics, nbytes: int) -> str:
    return f"wrote {_statistics(output, inspect_statistics(found, nbytes))}"


def _statistics(path: str, found: dict[str, Any]) -> str:
    inputs = found["inputs"]
    layers = sum(len(i["names"]) for i in inputs)
    lines = [
        f"{printable(path)}: {found['bytes']:,} bytes",
        f"tokens  {found['tokens']:,}",
        f"inputs  {len(inputs)} of {layers} layers, {_range({i['width'] for i in inputs})} wide",
    ]
    few = [i for i in inputs if i["tokens"] < i["width"]]
    if few:
        one = printable(few[0]["names"][0])
        lines.append(f"warning: {len(few)} inputs saw fewer tokens than they are wide, {one} for one")
    return "\n".join(lines)


# --- merge ----------------------------------------------------------------------------------------------------------


def merge_json(report: MergeReport) -> dict[str, Any]:
    return {
        "dry_run": report.dry_run,
        "tensors": [
            {
                "name": t.name,
                "dtype": t.dtype,
                "shape": list(t.shape),
                "updates": t.updates,
                "elements": t.tally.elements,
                "changed": t.tally.changed,
                "unmoved": t.tally.unmoved,
                "max_rounding_error": t.tally.max_error,
                "mean_rounding_error": t.tally.mean_error,
            }
            for t in report.tensors
        ],
        "placed": list(report.placed),
        "added": list(report.added),
        "dropped": list(report.dropped),
        "config": dict(report.config),
        "files": [{"name": name, "bytes": size} for name, size in report.files],
        "left_out": list(report.left_out),
        "touched_bytes": report.touched_bytes,
        "record": report.record,
        "record_bytes": report.record_bytes,
        "can_undo": report.can_undo,
        "warnings": list(report.warnings),
    }


def merging(output: str, report: MergeReport, verbose: bool) -> str:
    total = report.tally
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
                *(printable(t.name), t.dtype, f"{t.tally.changed:,}", f"{t.tally.unmoved:,}"),
                *(f"{t.tally.max_error:.3g}", f"{t.tally.mean_error:.3g}"),
            ]
            for t in report.tensors
        ]
        lines += ["", table(["tensor", "dtype", "changed", "did not move", "rounding error", "mean"], rows)]
    return "\n".join(lines)


def unmerging(output: str, report: UnmergeReport) -> str:
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


def recovery(found: Recovery) -> str:
    what = {
        "clean": "holds nothing that was broken off",
        "old": "is as it was before: what was broken off is taken back",
        "new": "is done: what was broken off is finished",
    }[found.state]
    lines = [f"{printable(found.path)} {what}"]
    if found.removed:
        lines.append(f"removed   {', '.join(map(printable, found.removed))}")
    return "\n".join(lines)


def verification(merged: str, report: VerifyReport) -> str:
    if report.ok:
        size = f"{report.tensors} tensors, {count_bytes(report.nbytes)}, {report.recomputed} of them computed again"
        return f"{printable(merged)} is the merge, bit for bit: {size}"
    lines = [f"{printable(merged)} is not the merge: {len(report.differences)} differences"]
    shown = report.differences[:_ROWS]
    lines += [f"  {printable(d.name)} {printable(d.what)}" for d in shown]
    if len(shown) < len(report.differences):
        lines.append(f"  ... and {len(report.differences) - len(shown)} more")
    return "\n".join(lines)
