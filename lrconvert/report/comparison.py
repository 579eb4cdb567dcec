"""The report of `compare`: the share of their LoRA that files keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from lrconvert.core.errors import printable
from lrconvert.formats.fidelity import FEWEST, Answers, Fidelity, Interval, Scores, TargetFidelity
from lrconvert.report.tables import WIDTH, filled, percent, picked, share, shortened, table

# What was captured: in the weight norm, of the outputs under statistics, of the outputs on data.
CAPTURED = {"captured": "captured", "output_captured": "of outputs", "data_captured": "on the data"}


def answers_json(answers: Answers) -> dict[str, Any]:
    """Return the distance of a model's answers from the LoRA's, and the share of it that is closed."""
    return {"of": answers.kind, **picked(answers, "items", "distance", "base_distance", "closed", "agreement")}


def fidelity_json(fidelity: Fidelity) -> dict[str, Any]:
    """Return what a file keeps of its LoRA, in all and of each target."""
    answers = fidelity.answers
    return {
        **picked(fidelity, "method", *CAPTURED),
        "answers": None if answers is None else {**asdict(answers), "closed": answers.closed},
        "ratio": fidelity.ratio,
        "source_bytes_at_16_bit": fidelity.source_bytes,
        "bytes": {
            part: getattr(fidelity, f"{part}_bytes") for part in ("total", "adapter", "payload", "overhead", "extras")
        },
        "targets": [
            {**picked(t, "name", "rank_before", "rank_after", *CAPTURED), "norm": t.energy**0.5}
            for t in fidelity.targets
        ],
        "dropped": list(fidelity.dropped),
        "notes": list(fidelity.notes),
        "warnings": list(fidelity.warnings),
    }


def comparison_text(files: Sequence[tuple[str, Fidelity]], verbose: bool) -> str:
    """Return the files, each a name and what it keeps, as tables: sizes, answers, and with `verbose` every target."""
    shown = [name for name in CAPTURED if any(getattr(f, name) is not None for _, f in files)]
    rows = [
        [printable(name), f.method, f"{f.adapter_bytes:,}", f"{f.overhead_bytes:,}", f"{f.extras_bytes:,}",
         f"{f.ratio:.1f}", len(f.dropped), *(share(getattr(f, which)) for which in shown)]
        for name, f in files
    ]  # fmt: skip
    head = [
        "file",
        "method",
        "bytes",
        "overhead",
        "extras",
        "ratio",
        "dropped",
        *(CAPTURED[name] for name in shown),
    ]
    parts = [table(head, rows)]
    if answers := [(name, f.answers) for name, f in files if f.answers is not None]:
        parts.append(_answers(answers))
    for name, f in files:
        if verbose:
            parts.append(f"{printable(name)}\n{fidelity_table(f, len(f.targets))}")
    if worst := [_worst(name, f) for name, f in files if not verbose]:
        parts.append("\n".join(["worst target of each file (-v shows all)", *worst]))
    if notes := [filled(f"{printable(name)}: {printable(note, 1000)}", "  ") for name, f in files for note in f.notes]:
        parts.append("\n".join(notes))
    return "\n\n".join(parts)


def _worst(name: str, fidelity: Fidelity) -> str:
    """The target of which the least is kept, on a line."""
    target = min(fidelity.targets, key=worst_first)
    line = f"  {share(target.captured)}  {printable(name)}: "
    return f"{line}{shortened(printable(target.name), max(WIDTH - len(line), 40))}"


def _answers(files: Sequence[tuple[str, Answers]]) -> str:
    """Show how far the models' answers are from the LoRA's, and before each file the base that it was measured from, if
    that is another one than before: heads that a file carries are on its base, too. Then what they are worth on the
    task, where there are right answers."""
    first, rows, base = files[0][1], [], None
    for name, a in files:
        if base != (a.base_distance, a.base_agreement):
            base = a.base_distance, a.base_agreement
            known = a.intervals
            rows.append(
                [
                    "(no update)",
                    _number(a.base_distance, known.get("base_distance")),
                    "0.0%",
                    _share(a.base_agreement, known.get("base_agreement")),
                ]
            )
        closed = _share(a.closed, a.interval)
        agreement = _share(a.agreement, a.intervals.get("agreement"))
        rows.append([printable(name), _number(a.distance, a.intervals.get("distance")), closed, agreement])
    unit = "KL, nats" if first.kind == "KL" else "error of hidden states"
    parts = [table([f"answers on {first.items:,} items", unit, "of it closed", "agrees with the LoRA"], rows)]
    parts += [
        _scored(title, [(name, one) for name, a in files if (one := getattr(a, which)) is not None], show)
        for which, title, show in (("accuracy", "accuracy", _share), ("loss", "loss, nats", _number))
        if any(getattr(a, which) is not None for _, a in files)
    ]
    has = any(a.intervals for _, a in files)
    parts.append(BRACKETS if has else f"No intervals: they need at least {FEWEST} texts.")
    return "\n\n".join(parts)


BRACKETS = "In brackets the 95% interval, of bootstrap samples of the texts."


def _scored(title: str, files: Sequence[tuple[str, Scores]], show: Callable[..., str]) -> str:
    """Show a score of base, LoRA and every file, and how far each file's is from the LoRA's."""

    def cell(one: Interval) -> str:
        return show(one.value, (one.low, one.high))

    rows = [["(no update)", cell(files[0][1].base), ""], ["LoRA", cell(files[0][1].lora), ""]]
    rows += [[printable(name), cell(one.file), cell(one.change)] for name, one in files]
    return table(["on the task", title, "less the LoRA's"], rows)


def _number(value: float, interval: tuple[float, float] | None = None) -> str:
    """A number, with its interval in brackets if there is one."""
    return f"{value:.4g}" if interval is None else f"{value:#.3g} [{interval[0]:#.3g}, {interval[1]:#.3g}]"


def _share(value: float | None, interval: tuple[float, float] | None = None) -> str:
    """A share in percent, with its interval in brackets if there is one."""
    if value is None or interval is None:
        return percent(value)
    return f"{value:.1%} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def fidelity_table(fidelity: Fidelity, rows: int) -> str:
    """Return the captured shares of targets as a table, the worst `rows` of them."""
    shown_targets = sorted(fidelity.targets, key=worst_first)[:rows]
    shown = [name for name in CAPTURED if getattr(fidelity, name) is not None]
    return table(
        ["target (worst first)", "rank before", "after", *(CAPTURED[name] for name in shown)],
        [
            [printable(t.name), t.rank_before, t.rank_after, *(share(getattr(t, name)) for name in shown)]
            for t in shown_targets
        ],
    )


def worst_first(target: TargetFidelity) -> float:
    """Return the key that sorts targets by what is kept of them."""
    return math.inf if target.captured is None else target.captured
