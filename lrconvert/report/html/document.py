"""The page itself: what is said first, how to read it, answers, bytes, and every target."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lrconvert.formats.fidelity import Answers, Fidelity
from lrconvert.report.html import frontier, heatmap, style
from lrconvert.report.html.markup import (
    MEASURES,
    File,
    Measure,
    best_measure,
    name,
    percent,
    row_name,
    section,
    table,
    text,
    times,
)
from lrconvert.report.text_and_json import count_bytes

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, source: str, found: Sequence[tuple[str, Fidelity]]) -> str:
    """One HTML document about the files `found`, each a name and its measurement against the LoRA `source`."""
    files = [File(n, name, kept) for n, (name, kept) in enumerate(found, 1)]
    measures = [m for m in MEASURES if any(m.of(f.kept) is not None for f in files)]
    looks = frontier.looks(files)
    body = [f"<header><h1>{text(title)}</h1><p>Compared with the LoRA {name(source)}</p></header>"]
    if files:
        body += [_facts(files, measures), _reading(files, measures), frontier.section_of(files, measures, looks)]
        body += [_answers(files), _bytes(files, measures), heatmap.section_of(files, measures)]
        body += [_targets(files, measures)]
    else:
        body.append("<p>No files were compared.</p>")
    css = style.sheet(len(looks), measures)
    head = [
        '<meta charset="utf-8"/>',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>',
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
        f"<title>{text(title)}</title>",
        f"<style>{css}</style>",
    ]
    parts = ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body><main>", *filter(None, body)]
    return "\n".join([*parts, "</main></body>", "</html>", ""])


def _facts(files: Sequence[File], measures: Sequence[Measure]) -> str:
    """The LoRA, the smallest file, and the best by answers and by the best measure."""
    first, many = files[0].kept, len(files) > 1
    smallest = min(files, key=lambda f: f.kept.adapter_bytes)
    count = f"{len(first.targets):,} target{'' if len(first.targets) == 1 else 's'}"
    size = count_bytes(smallest.kept.adapter_bytes)
    facts = [
        ("The LoRA", count_bytes(first.source_bytes), f"at 16 bit, {count}"),
        ("Smallest file" if many else "The file", size, f"{name(smallest.name)}, {times(smallest.kept.ratio)}"),
    ]
    answered = [(f, f.kept.answers) for f in files if f.kept.answers is not None]
    if answered:
        best, answers = max(answered, key=lambda pair: pair[1].closed)
        what = "Most of the distance to the LoRA's answers closed" if many else "Distance to the LoRA's answers closed"
        facts.append((what, f"{percent(answers.closed)} %", _who(best)))
    if measures:
        measure = best_measure(measures)
        known = [(f, value) for f in files if (value := measure.of(f.kept)) is not None]
        best, value = max(known, key=lambda pair: pair[1])
        facts.append((f"{'Most captured' if many else 'Captured'} {measure.title}", f"{percent(value)} %", _who(best)))
    cells = "".join(f"<div><dt>{what}</dt><dd><strong>{big}</strong> {more}</dd></div>" for what, big, more in facts)
    return f'<dl class="facts">{cells}</dl>'


def _who(file: File) -> str:
    return f"{name(file.name)}, {count_bytes(file.kept.adapter_bytes)}"


def _reading(files: Sequence[File], measures: Sequence[Measure]) -> str:
    """What the numbers do not say."""
    keys = {m.key for m in measures}
    told = [
        "Captured energy in the weight norm is the share of the update that a file keeps, weight by weight. It is not "
        "what the model answers, and alone it favours low rank, the form that is best in just this norm."
    ]
    if any((MEASURES[0].of(f.kept) or 0.0) < 0 for f in files):
        told.append(
            "Below zero the error is larger than the update itself; a fit that minimizes the error of outputs may go "
            "there and still be good."
        )
    if "o" in keys:
        told.append(
            "Captured of the outputs weighs errors by what flows into the layers; a file that was fitted under the "
            "same statistics was fitted to just that figure."
        )
    if any(f.kept.answers is not None for f in files):
        told.append("Trust the answers first, then the outputs on data.")
    elif keys > {"w"}:
        told.append("The models' answers were not measured; <code>--base</code> with <code>--data</code> does it.")
    else:
        told.append(
            "Neither outputs nor answers were measured: <code>--statistics</code> adds the outputs, "
            "<code>--base</code> with <code>--data</code> adds both."
        )
    return f'<aside aria-label="How to read this"><p>{" ".join(told)}</p></aside>'


def _answers(files: Sequence[File]) -> str:
    """One table for the files that were measured together: they share the items and the distance of the base."""
    groups: dict[tuple[str, int, float, float | None], list[tuple[File, Answers]]] = {}
    for f in files:
        if (a := f.kept.answers) is not None:
            groups.setdefault((a.kind, a.items, a.base_distance, a.base_agreement), []).append((f, a))
    parts = []
    for (kind, items, distance, agreement), members in groups.items():
        agrees = any(a.agreement is not None for _, a in members)
        unit = "KL, nats per item" if kind == "KL" else "relative error of hidden states"
        head = ["file", "method", unit, "of it closed, %", "agrees with the LoRA, %"]
        rows = [["no adapter", "", f"{distance:.4g}", _bar(0.0), _bar(agreement)]]
        for f, a in members:
            rows.append([row_name(f), name(f.kept.method), f"{a.distance:.4g}", _bar(a.closed), _bar(a.agreement)])
        caption = f"Distance of the models' answers from those with the LoRA, on {items:,} items"
        if agrees:
            caption += "; two agree on an item if their first choice is the same"
        else:
            head, rows = head[:-1], [row[:-1] for row in rows]
        parts.append(table("Answers", caption, head, rows, words=2))
    return section("Answers", parts) if parts else ""


def _bar(share: float | None) -> str:
    """A number and a bar as long as it; no bar below zero."""
    if share is None or not math.isfinite(share):
        return "-"
    width = min(max(100 * share, 0.0), 100.0)
    return f'{percent(share)}<span class="bar" aria-hidden="true"><span style="width:{width:.1f}%"></span></span>'


def _bytes(files: Sequence[File], measures: Sequence[Measure]) -> str:
    head = ["file", "method", "payload", "overhead", "extras", "whole file", "ratio"]
    head += [f"{m.column}, %" for m in measures]
    rows = []
    for f in files:
        sizes = f.kept.payload_bytes, f.kept.overhead_bytes, f.kept.extras_bytes, f.kept.total_bytes
        row = [row_name(f), name(f.kept.method), *(f"{n:,}" for n in sizes), f"{f.kept.ratio:,.1f}"]
        rows.append([*row, *(percent(m.of(f.kept)) for m in measures)])
    whole = " or ".join(f"{n:,}" for n in sorted({f.kept.source_bytes for f in files}))
    caption = (
        f"Bytes, and what they keep. The ratio is that of the LoRA at 16 bit, {whole} bytes, to payload and overhead; "
        "extras, tensors that are carried along unchanged, count on neither side"
    )
    return section("Bytes", [table("Bytes", caption, head, rows, words=2)])


def _targets(files: Sequence[File], measures: Sequence[Measure]) -> str:
    worst = best_measure(measures)
    head = ["target", "rank before", "after", "norm", *(f"{m.column}, %" for m in measures)]
    parts = []
    for f in files:
        rows = []
        for t in sorted(f.kept.targets, key=lambda t: math.inf if (v := worst.of(t)) is None else v):
            norm = math.sqrt(t.energy) if t.energy >= 0 else math.nan
            row = [name(t.name), str(t.rank_before), str(t.rank_after), f"{norm:.4g}"]
            rows.append([*row, *(percent(m.of(t)) for m in measures)])
        count = "1 target" if len(rows) == 1 else f"{len(rows):,} targets"
        caption = f"Every target of {name(f.name)}, the worst {worst.title} first"
        parts.append(f"<details><summary>{row_name(f)}: {count}</summary>")
        parts += [table(f"Targets of file {f.number}", caption, head, rows), "</details>"]
    return section("Every target", parts)
