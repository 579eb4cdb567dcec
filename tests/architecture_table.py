"""The table of architectures and features as data: what is expected of every cell, and the page that shows it.

`benchmarks/architectures.py` measures the cells and writes both.
"""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from architecture_features import FEATURES
from architectures import ARCHITECTURES

DATA = Path(__file__).with_name("architecture_table.json")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"

COLUMNS = {
    "attach": ("attach",),
    "of the 16-bit file": ("file", "file-base"),
    "export": ("export", "export-base"),
    "merge": ("merge", "merge-resized"),
}
"""Whose largest errors the page shows, and of which steps."""

Cells = Mapping[str, Mapping[str, Any]]


def verdict(cell: Mapping[str, Any]) -> str:
    """Return a cell in one line: "ok", what PEFT says of it, or every verdict that is not "ok" and its steps."""
    if "steps" not in cell:
        return f"PEFT {cell['peft']}"
    groups: dict[str, list[str]] = {}
    for name, (said, _) in cell["steps"].items():
        if said != "ok":
            groups.setdefault(said, []).append(name)
    return "; ".join(f"{said} {' '.join(sorted(names))}" for said, names in sorted(groups.items())) or "ok"


def expected() -> dict[str, dict[str, str]]:
    """Return the verdict of every feature, by architecture."""
    table = json.loads(DATA.read_text())["verdicts"]
    return {
        architecture: {feature: said for said, features in groups.items() for feature in features.split()}
        for architecture, groups in table.items()
    }


def write(cells: Cells) -> None:
    """Write the data and the page from all cells."""
    missing = [f"{a}/{f}" for a in ARCHITECTURES for f in FEATURES if f"{a}/{f}" not in cells]
    if missing:
        raise SystemExit(f"{len(missing)} cells are missing, the first is {missing[0]}")
    DATA.write_text(json.dumps(_data(cells), indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(json.loads(DATA.read_text())))


def _data(cells: Cells) -> dict[str, Any]:
    rows = {name: [cells[f"{name}/{feature}"] for feature in FEATURES] for name in ARCHITECTURES}
    columns = {name: [cells[f"{architecture}/{name}"] for architecture in ARCHITECTURES] for name in FEATURES}
    verdicts: dict[str, dict[str, str]] = {}
    said: dict[str, str] = {}
    for name, row in rows.items():
        groups: dict[str, list[str]] = {}
        for feature, cell in zip(FEATURES, row, strict=True):
            groups.setdefault(verdict(cell), []).append(feature)
            for step, (code, words) in cell.get("steps", {}).items():
                if code not in ("ok", "WRONG", "MERGED", "UNCHECKED") and step != "check":
                    said.setdefault(f"{feature}: {verdict(cell)}", f"{code}: {words}")
        verdicts[name] = {text: " ".join(features) for text, features in groups.items()}
    packages = ("torch", "transformers", "peft", "safetensors")
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "verdicts": verdicts,
        "errors": {
            "of architectures": {name: _largest(row) for name, row in rows.items()},
            "of features": {name: _largest(column) for name, column in columns.items()},
        },
        "said": dict(sorted(said.items())),
    }


def _largest(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the largest error of every column, of all cells that are right."""
    cells = list(cells)
    found = []
    for steps in COLUMNS.values():
        errors = [c["steps"][s][1] for c in cells for s in steps if c.get("steps", {}).get(s, [""])[0] == "ok"]
        found.append(f"{max(errors):.0e}".replace("e-0", "e-") if errors else "")
    return found


# --- the page -------------------------------------------------------------------------------------------------------

_MARKS = {
    "ok": "✓: attached, written at 16 bits and attached, exported and loaded by PEFT, merged and loaded by "
    "transformers without a missing or unexpected tensor, it answers as PEFT's attached model does; `verify` agrees, "
    "`unmerge` restores every byte, and `check --for peft` says what PEFT does",
    "MERGED": "m: it answers as the model that PEFT merges, and PEFT's attached one answers otherwise: its wrapper of "
    "trained tokens leaves out the bias of a tied head, and Jamba uses the weight of a layer without calling it",
    "UNCHECKED": "u: without a base the export keeps names that PEFT does not find, and says that they were not "
    "checked; with one it is right, as all else is",
    "E-": "r: refused, in part or whole, with the reason and what to do",
    "PEFT": "·: the model has nothing of the kind, or PEFT refuses it, or gives it no effect, or saves it in part",
    "WRONG": "✗: wrong numbers, or a file that its program does not load",
}


def mark(said: str) -> str:
    """Return the sign of a verdict."""
    if said == "ok" or said.startswith("PEFT"):
        return "✓" if said == "ok" else "·"
    marks = {"WRONG": "✗", "FAILS": "✗", "E-": "r", "MERGED": "m", "UNCHECKED": "u"}
    return next(sign for word, sign in marks.items() if word in said)


def page(data: Mapping[str, Any]) -> str:
    """Return docs/architectures.md."""
    table = {
        name: {feature: said for said, features in groups.items() for feature in features.split()}
        for name, groups in data["verdicts"].items()
    }
    marks = [mark(said) for row in table.values() for said in row.values()]
    counts = {sign: marks.count(sign) for sign in "✓mur·✗"}
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    numbers = {feature: str(n + 1) for n, feature in enumerate(FEATURES)}
    parts = [
        _HEAD.format(
            date=data["date"],
            versions=versions,
            architectures=len(table),
            features=len(FEATURES),
            cells=len(marks),
            **{
                name: counts[sign]
                for name, sign in zip(("right", "merged", "unchecked", "refused", "none", "wrong"), counts, strict=True)
            },
            marks="\n".join(f"- {text}" for text in _MARKS.values()),
        ),
        "## Features\n",
        _rows(
            ["", "feature", "right", "refused", *(f"{name}" for name in COLUMNS)],
            [
                [
                    number,
                    f"{FEATURES[name].about}",
                    sum(mark(row[name]) in "✓mu" for row in table.values()),
                    sum(mark(row[name]) == "r" for row in table.values()),
                    *data["errors"]["of features"][name],
                ]
                for name, number in numbers.items()
            ],
        ),
        "\n## Architectures\n",
        _rows(
            ["", *numbers.values(), *COLUMNS],
            [
                [f"{name}", *(mark(row[feature]) for feature in FEATURES), *data["errors"]["of architectures"][name]]
                for name, row in table.items()
            ],
        ),
        "\n## What is not a ✓\n",
        *_notes(table, data["said"]),
    ]
    return "\n".join(parts).rstrip() + "\n"


_HEAD = """# Architectures and features, held against PEFT

Adapters that PEFT itself trained and saved on {architectures} tiny random models of transformers' classes, {features}
kinds of each, and what lrconvert makes of them. Every error is the distance of the logits from those of PEFT's attached
model, over the adapter's own effect: 0 is PEFT, 1 is as wrong as no adapter. What computes with the adapter's own
numbers (attach, merge) is right at 1e-4 or less; what was rounded to 16 bits on its way (file, export) at 3e-3 or less.

Measured on {date} with {versions}. Of {cells} cells {right} are right, {merged} right as PEFT merges,
{unchecked} right with a base, {refused} refused, {wrong} wrong; in {none} PEFT has nothing to compare with.

    python benchmarks/architectures.py cells.jsonl             # measures what is missing in the file
    python benchmarks/architectures.py cells.jsonl --render    # writes this page and tests/architecture_table.json

`tests/live/test_architecture_table.py` runs a sample of the cells by default and all of them with `-m long`: a verdict
that changes fails. The models are those of `tests/architectures.py`, the features those of
`tests/architecture_features.py`.

{marks}
"""


def _rows(head: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(['---'] * len(head))}|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"


def _notes(table: Mapping[str, Mapping[str, str]], said: Mapping[str, str]) -> Iterable[str]:
    """What is not right: every verdict, the models and features that have it, and what was said of the first."""
    groups: dict[tuple[str, str], dict[tuple[str, ...], list[str]]] = {}
    for feature in FEATURES:
        names: dict[str, list[str]] = {}
        for name, row in table.items():
            names.setdefault(row[feature], []).append(name)
        for words in sorted(set(names) - {"ok", "PEFT none of it"}):
            reason = said.get(f"{feature}: {words}", "")
            groups.setdefault((words, reason), {}).setdefault(tuple(names[words]), []).append(feature)
    numbers = {feature: str(n + 1) for n, feature in enumerate(FEATURES)}
    for (words, reason), members in groups.items():
        yield f"- {words}" + (f": `{reason.replace('`', chr(39))}`" if reason else "")
        for models, features in members.items():
            shown = ", ".join(models) if 2 * len(models) < len(table) else f"{len(models)} models"
            yield f"  - {', '.join(f'{FEATURES[f].about} ({numbers[f]})' for f in features)}: {shown}"
