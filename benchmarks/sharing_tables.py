"""The tables of `sharing.py`."""

from __future__ import annotations

from typing import Any

import cells

SHARES = (0.4, 1.6, 4.0)  # of an adapter's factors at 16 bit, in percent
ANSWERED = (0.4, 1.6)
_ROWS = (  # of the table of what is captured: a title and the names of cells after the size
    ("six of seed 1: low rank, coded, nothing shared", "nothing shared, lowrank"),
    ("the same, coded by this script", "nothing shared, lowrank as coded here"),
    ("VB-LoRA, its own bank", "vblora, own bank"),
    ("VB-LoRA, a bank of 1 other", "vblora, of 1"),
    ("VB-LoRA, a bank of 10 others", "vblora, of 10"),
    ("VB-LoRA, a bank of all others", "vblora, of all"),
    ("VB-LoRA, a bank of 10, itself among them", "vblora, of 10, members"),
    ("VB-LoRA, a bank of all, itself among them", "vblora, of all, members"),
    ("VB-LoRA, a bank learned of Gaussian numbers", "vblora, synthetic"),
    ("VB-LoRA, a bank of Gaussian numbers, not learned", "vblora, random"),
    ("joint basis, 16, of 18 others", "joint 16, 18"),
    ("joint basis, 64, of 18 others", "joint 64, 18"),
    ("joint basis, 64, of all others", "joint 64, all"),
    ("joint basis, 16, one a task", "joint 16, by task"),
    ("joint basis, 16, of 18, itself among them", "joint 16, 18, members"),
    ("joint basis, 64, of 18, itself among them", "joint 64, 18, members"),
    ("common directions of A, and what lies outside", "common directions"),
    ("common directions of both sides, and what lies outside", "common directions, both sides"),
    ("common directions of both sides of the task's others, and what lies outside", "by task, common directions"),
    ("six of seed 0: nothing shared", "seed 0, nothing shared"),
    ("common directions of A, of the five others of this start, and what lies outside", "seed 0, the start"),
    ("the same by lowrank as it is, one model for both", "seed 0, the start, one model a row"),
    ("nine of three tasks, one seed, other texts: nothing shared", "customers, nothing shared"),
    ("common directions of both sides of the task's other two, and what lies outside", "customers, common directions"),
    ("six trained on from those of seed 0: nothing shared", "next, nothing shared"),
    ("what they differ from the earlier version in the fleet, of as many bytes", "next, the difference"),
    ("chat model, five of one start: nothing shared", "nothing shared"),
    ("chat model, common directions of A, of the four others, and what lies outside", "the start"),
    ("chat model, two of one task: nothing shared", "same task, nothing shared"),
    ("chat model, the directions of the other, both sides, and what lies outside", "same task, the other's"),
)


def _captured(done: dict[str, Any]) -> str:
    rows = []
    for title, name in _ROWS:
        before = "chat, " if title.startswith("chat") else ""
        measured = [done.get(f"{before}{share:g}%, {name}") for share in SHARES]
        once = next((cell["once"] for cell in measured if cell and cell.get("once")), 0)
        learned = next((cell["learned of"] for cell in measured if cell and "learned of" in cell), "")
        shown = ["" if cell is None else f"{cell['captured']:.3f}" for cell in measured]
        if any(shown):
            rows.append([title, learned, f"{once:,}" if once else "", *shown])
    head = ["adapters and form", "learned of", "bytes once for all", *(f"{share:g} %" for share in SHARES)]
    return cells.markdown(head, rows)


def _shared_parts(done: dict[str, Any]) -> str:
    rows = []
    for label in (name for name in done if "overlap" in name):
        if (cell := done.get(label)) is not None:
            shares = [f"{cell[side]:.1%} ({cell[side + ' by chance']:.1%})" for side in ("inputs", "outputs")]
            rows.append([label.replace("overlap, ", ""), cell["pairs"], f"{cell['cosine']:.3f}", *shares])
    head = ["pairs of adapters", "pairs", "cosine", "inputs in the other's (by chance)", "outputs in the other's"]
    return cells.markdown(head, rows)


def _worths(done: dict[str, Any]) -> str:
    titles = {
        "customers": "one script, seed and task, other texts",
        "the start": "one start, other tasks",
        "the start, chat": "chat model, one start, other tasks",
        "the same task, chat": "chat model, one task, other starts",
    }
    rows = []
    for name, title in titles.items():
        measured = [done.get(f"worth, {share:g}%, {name}") for share in SHARES]
        if any(measured):
            rows.append([title, *("" if cell is None else f"{cell['bytes without'] - 1:+.0%}" for cell in measured)])
    return cells.markdown(["bytes to capture as much without", *(f"{share:g} %" for share in SHARES)], rows)


def _shares(cell: dict[str, Any]) -> list[str]:
    shown = [f"{mean:.1%} ({low:.1%} to {high:.1%})" for mean, low, high in (cell["without"], cell["with"])]
    mean, low, high = cell["more"]
    return [*shown, f"{mean:+.1%} ({low:+.1%} to {high:+.1%})"]


def _answered(done: dict[str, Any]) -> str:
    rows = []
    for share in ANSWERED:
        for strength in ("", ", at the strength of compress"):
            if (cell := done.get(f"answers, {share:g}%{strength}")) is None:
                continue
            rows.append([f"{share:g} %{strength}", *_shares(cell)])
    for task in ("sst2", "e2e"):
        if (cell := done.get(f"chat, answers, 0.4%, {task}")) is not None:
            rows.append([f"chat model, {task}, 0.4 %", *_shares(cell)])
    return cells.markdown(["size", "KL closed, nothing shared", "with the common directions", "more"], rows)


def _other(done: dict[str, Any]) -> str:
    rows = []
    for share in SHARES:
        names = [f"{share:g}%, {name}" for name in ("own file", "in a fleet", "tables")]
        if all(done.get(name) for name in names):
            own, fleet, tables = (done[name] for name in names)
            rows.append(
                [f"{share:g} %", f"{own['captured']:.3f}", f"{fleet['captured']:.3f}", f"{tables['saved']:.2%}"]
            )
    return cells.markdown(["size", "a file of its own", "in a fleet, 256 bytes beside", "bits that tables save"], rows)


def tables(done: dict[str, Any]) -> str:
    """Return the tables of docs/sharing.md."""
    trained = [
        f"{cell['members']} {title}, {cell['above the base']} of them above their base "
        f"({cell['accuracy of the base']:.1%} to {cell['accuracy with the LoRA']:.1%} in the mean)"
        for kind, title in (
            ("long", "of 70 or 100 steps"),
            ("next", "trained on from these"),
            ("customer", "of one script, seed and task with other texts"),
            ("short", "of 40 short steps"),
        )
        if (cell := done.get(f"trained, {kind}"))
    ]
    parts = [
        "; ".join(trained) + ".",
        _shared_parts(done),
        _captured(done),
        _worths(done),
        _answered(done),
        _other(done),
    ]
    return "\n\n".join(parts)
