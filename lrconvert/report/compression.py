"""What was tried, and what won: what `compress` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lrconvert.core.errors import printable
from lrconvert.formats.fidelity import Answers
from lrconvert.report.comparison import answers_json
from lrconvert.report.conversion import BY_DEFAULT, conversion_json
from lrconvert.report.tables import listed, percent, share, table

if TYPE_CHECKING:
    from lrconvert.convert.compress import Candidate, Compression


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


def compression_text(source: str, output: str, done: Compression) -> str:
    """Return every candidate on a line, the winner marked: nearest to the LoRA's answers first, else smallest first."""
    after = done.candidates[done.winner].after
    shown = _by_fit(done) if after is None else [*_by_answers(done), "", _closed_note(after)]
    lines = [f"{printable(source)} -> {printable(output)}", "", *shown]
    lines[3:3] = [f"  {c.method}: {printable(c.refused.what)}" for c in done.candidates if c.refused is not None]
    nearest = done.candidates[done.winner].conversion  # what is kept is measured there, whatever the strength
    notes = [f"note: {printable(note, 1000)}" for note in (nearest or done.chosen).notes]
    asked = [BY_DEFAULT] if done.by_default else []
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
        shares = [f"{before.closed:.1%}", f"{after.closed:.1%}", percent(after.agreement)]
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
        captured = [share(fidelity.captured)]
        captured += [share(fidelity.output_captured), share(fidelity.fit_captured)] if weighted else []
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
    options = f" ({listed(candidate.options)})" if candidate.options else ""
    return f"{'* ' if candidate is done.candidates[done.winner] else '  '}{candidate.method}{options}"
