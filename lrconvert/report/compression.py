"""The report of `compress`: all that was tried, and what won."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrconvert.convert.verdict import Judged, Verdict
from lrconvert.core.errors import printable
from lrconvert.formats.fidelity import Answers, Interval, dropped_note
from lrconvert.methods import base as methods
from lrconvert.report.comparison import answers_json, fidelity_table
from lrconvert.report.conversion import BY_DEFAULT, conversion_json, size_line
from lrconvert.report.tables import fact, filled, listed, percent, share, table

_NAME = 24  # characters of a file's name above a column

if TYPE_CHECKING:
    from lrconvert.convert.compress import Candidate, Compression
    from lrconvert.convert.convert import Conversion


def compression_json(done: Compression) -> dict[str, Any]:
    """Return every candidate, the winner as `conversion_json` does, what its answers are, and the verdict."""
    strength = None if done.stronger is None else done.stronger.strength
    return {
        "candidates": [_candidate_json(done, n) for n in range(len(done.candidates))],
        "note": done.note,
        "strength": strength,
        "not_tried": list(_not_tried(done)),
        "judged": None if done.judged is None else asdict(done.judged),
        "verdict": verdict_json(done.verdict),
        **conversion_json(done.chosen),
    }


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """Return whether to ship a file, why, and what to try where not."""
    return {"ship": verdict.ship, "because": verdict.because, "try": verdict.advice}


def _candidate_json(done: Compression, number: int) -> dict[str, Any]:
    candidate = done.candidates[number]
    row = {"method": candidate.method, "options": dict(candidate.options), "winner": number == done.winner}
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
    return row


def compression_text(source: str, output: str, done: Compression, verbose: bool = False) -> str:
    """Return every candidate on a line, the winner marked: nearest to the LoRA's answers first, else smallest first;
    then the facts of the winner, what its answers are, with `verbose` its targets, and the verdict."""
    after = done.candidates[done.winner].after
    shown = _by_fit(done) if after is None else [*_by_answers(done), "", _closed_note(after)]
    refused = [f"  {c.method}: {printable(c.refused.what)}" for c in done.candidates if c.refused is not None]
    parts = [f"{printable(source)} -> {printable(output)}", "\n".join([*shown, *refused])]
    if done.judged is not None:
        parts.append(_judged(printable(Path(output).name), done.judged))
    if verbose and done.chosen.fidelity is not None:
        parts.append(fidelity_table(done.chosen.fidelity, len(done.chosen.fidelity.targets)))
    parts.append("\n".join(_facts(done)))
    parts.append(verdict_text(Path(output).name, done))
    return "\n\n".join(parts)


def _facts(done: Compression) -> Iterator[str]:
    """Yield the form of the winner, its bits, size, and the share captured; what was not tried, and would add."""
    chosen, nearest = done.chosen, done.nearest.fidelity
    compact, size = chosen.compact, chosen.sizes
    method = methods.get(compact.method)
    assert nearest is not None
    numbers = sum(spec.numel for spec in method.specs(compact.config, compact.targets))
    width = 8 * size.payload / max(1, numbers)
    yield fact("form", f"{method.id} ({method.title}), {numbers:,} numbers of {width:.2g} bits on average")
    yield fact("", _listed_on_one_line(method.header(compact.config)))
    yield fact("size", size_line(size, chosen.ratio, chosen.source_bytes).removeprefix("size").strip())
    if done.by_default:
        yield fact("", BY_DEFAULT)
    kept = f"{max(nearest.captured, 0):.1%} of the energy of the weights"
    if nearest.output_captured is not None:
        kept += f", {max(nearest.output_captured, 0):.1%} of the outputs' under the statistics"
    if nearest.captured < 0:
        kept += "; training on answers found other weights that answer alike"
    yield fact("captured", kept)
    for note in (*_stronger(done), *((done.note,) if done.note else ()), *_dropped(done.nearest)):
        yield fact("note", note)
    yield fact("not tried", "; ".join(_not_tried(done)))
    if done.judged is None:
        yield fact("would add", _WOULD_ADD)


_WOULD_ADD = (
    "--base and --data: the form and strength that answer most as the LoRA does, refinement, and KL, agreement, loss "
    "or accuracy with intervals"
)


def _dropped(done: Conversion) -> list[str]:
    """The note on modules of which nothing is kept; what else there is to say of a loss, the verdict does."""
    return [printable(dropped_note(done.dropped, len(done.compact.targets)), 1000)] if done.dropped else []


def _listed_on_one_line(header: Mapping[str, Any]) -> str:
    shown = listed(header)
    return shown if len(shown) <= 180 else f"{shown[:179]}…"


def _not_tried(done: Compression) -> Iterator[str]:
    """Yield what was left out, for whatever reason."""
    tried = {c.method for c in done.candidates}
    late = [line.partition(" ")[0] for line in done.left_out]
    yield from done.left_out
    if others := [m.id for m in methods.all_methods() if m.searches and m.id not in tried and m.id not in late]:
        yield f"{', '.join(others)} (not among --methods)"
    yield "bat (its file holds for one base alone: lora-to-bat)"
    if done.judged is None:
        yield "refinement (needs --base)"
    elif not done.candidates[done.winner].steps:
        yield "refinement (--steps)"


def _stronger(done: Compression) -> Iterator[str]:
    """Yield the strength of the winner where no data chose it."""
    if done.stronger is None:
        return
    assert done.chosen.fidelity is not None
    yield (
        f"written at {done.stronger.strength:.2f} times the LoRA's strength, which brings the answers of small files "
        f"nearer and captures {max(done.chosen.fidelity.captured, 0):.1%}; --strength 1 writes the nearest fit"
    )


def verdict_text(file: str, done: Compression) -> str:
    """Return the verdict on a file as one sentence, and on what it rests."""
    verdict, ratio, name = done.verdict, done.chosen.ratio, printable(file)
    times = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"
    if verdict.ship:
        text = f"ship {name}: {times} times smaller, because {verdict.because}"
    else:
        text = f"do not ship {name}: {verdict.because}; try {verdict.advice}"
    if done.judged is None:
        text += ". Only weights were compared, no answers"
    return fact("verdict", text)


def _judged(name: str, judged: Judged) -> str:
    """Return a table of base, LoRA and file with intervals, and what the texts were."""
    unit = "KL, nats" if judged.kind == "KL" else "error of hidden states"
    rows: list[list[str]] = [
        [unit, _with_interval(judged.base_distance), "0", _with_interval(judged.distance)],
        ["of it closed", "0.0%", "100.0%", _percent_interval(judged.closed)],
    ]
    if judged.agreement is not None and judged.base_agreement is not None:
        same = _percent_interval(judged.base_agreement), "100.0%", _percent_interval(judged.agreement)
        rows.append(["agrees with the LoRA", *same])
    for title, scores, shown in (
        ("loss, nats", judged.loss, _with_interval),
        ("accuracy", judged.accuracy, _percent_interval),
    ):
        if scores is not None:
            rows.append([title, *(shown(x) for x in (scores.base, scores.lora, scores.file))])
            rows.append(["  less the LoRA's", "", "", shown(scores.change)])
    whose = "texts that the LoRA wrote itself" if judged.by_lora else "texts"
    chose = "which chose nothing" if judged.is_fresh else "which also chose the form, so that it looks a little better"
    said = f"On {judged.texts:,} {whose} with {judged.items:,} answers, {chose}; in brackets the 95% interval."
    lines = [table(["", "base", "LoRA", _cut(name)], rows), filled(said)]
    if judged.loss is not None and not judged.loss.lora.value < judged.loss.base.value:
        lines.append("The LoRA itself is no better than the base on these texts: are they of its task?")
    return "\n".join(lines)


def _cut(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"


def _with_interval(number: Interval) -> str:
    value, low, high = (format(x, "#.3g") for x in (number.value, number.low, number.high))
    return f"{value} [{low}, {high}]"


def _percent_interval(share: Interval) -> str:
    value, low, high = (format(100 * x, ".1f") for x in (share.value, share.low, share.high))
    return f"{value}% [{low}, {high}]"


def _by_answers(done: Compression) -> list[str]:
    measured = [(c, c.conversion, c.before, c.after) for c in done.candidates]
    rows = []
    for candidate, made, before, after in sorted(
        measured, key=lambda row: (-row[0].steps, 0.0 if row[3] is None else row[3].distance)
    ):
        if made is None or before is None or after is None:
            continue
        start = [_form(done, candidate), f"{candidate.nbytes:,}", f"{made.ratio:.1f}", len(made.dropped)]
        fit = [candidate.norm, f"{candidate.strength:.3g}", f"{before.closed:.1%}"]
        rows.append([*start, *fit, f"{after.closed:.1%}", percent(after.agreement), f"{candidate.steps:,}"])
    head = ["  form", "bytes", "ratio", "dropped", "norm", "strength", "closed", "refined", "agreement", "steps"]
    return [table(head, rows)]


def _closed_note(answers: Answers) -> str:
    what = "KL" if answers.kind == "KL" else f"distance of {answers.kind}"
    return filled(
        f"Closed: the share of the {what} between base and LoRA that the fit closes, in the norm and at the strength "
        f"that close most, and the refined form, on {answers.items:,} held-out items, which chose the winner."
    )


def _by_fit(done: Compression) -> list[str]:
    made = [(c, c.conversion, c.conversion.fidelity) for c in done.candidates if c.conversion is not None]
    weighted = any(fidelity is not None and fidelity.output_captured is not None for _, _, fidelity in made)
    rows = []
    for candidate, conversion, fidelity in sorted(made, key=lambda row: (row[0].nbytes, -row[0].score)):
        assert fidelity is not None
        captured = [share(fidelity.captured)]
        captured += [share(fidelity.output_captured), share(fidelity.fit_captured)] if weighted else []
        start = [_form(done, candidate), f"{candidate.nbytes:,}", f"{conversion.ratio:.1f}", len(conversion.dropped)]
        rows.append([*start, *captured])
    head = ["  form", "bytes", "ratio", "dropped", "captured", *(["of outputs", "score"] if weighted else [])]
    note = (
        "The score is what the fits work on: errors of outputs, each target by the root of its energy."
        if weighted
        else "Captured energy of the weights alone favours low rank."
    )
    return [table(head, rows), "", note]


def _form(done: Compression, candidate: Candidate) -> str:
    options = f" ({listed(candidate.options)})" if candidate.options else ""
    return f"{'* ' if candidate is done.candidates[done.winner] else '  '}{candidate.method}{options}"
