"""docs/evidence.md: what was measured, cell by cell, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cells

from chat.tasks import TASKS

AIMS = {4.0: (99, 97), 1.6: (98, 95), 0.8: (95, 88), 0.4: (91, 80), 0.2: (85, 70)}  # KL closed, gain, per cent
FORMS = ("lowrank", "vblora", "nola", "sbora or bone")
Rows = Mapping[str, dict[str, Any]]

_HEAD = """# Evidence on a chat model

SmolLM2-135M-Instruct (Llama architecture, tied embeddings, bf16) with LoRAs of rank 16 on all linear layers, trained
for 300 steps of 512 tokens, the loss on the answers alone. Tasks are questions in its chat template, the instruction as
the system message. **Defaults of lrconvert are tuned on E2E and TREC only; SST-2, GSM8K and CoLA are for testing.**

- *share*: bytes of the whole file (of a peer: of its numbers alone, without header and names) as a share of the LoRA's
  factors at 16 bit. A share does not carry across ranks, so *bits a component* stands beside it: the file's bits over
  the components of all targets of the LoRA.
- *refit*: with the statistics of texts that trained the LoRA, where the form does not say without; *times*: the
  strength, where it is not 1, that `compress` chooses without data ([strength.md](strength.md)); *refined*: and
  {steps} steps of distillation (half of the LoRA's own are 150). Trained peers get the same steps, the same
  distillation, and the best of three rates, whose trial is a part of the steps. Peers by refit use no data.
- *KL closed*: the share of the KL distance between base and LoRA that is closed, at the tokens of the answers of what
  is held out; in brackets its 95 % interval (1,000 paired bootstrap samples of the texts). *agreement*: how often the
  first choice is the LoRA's. *gain*: the share of the LoRA's gain in score, with its interval.
- Scores: BLEU of E2E on lower case words; accuracy among the classes by the first token of the answer; GSM8K:
  whether an answer has that data set's form (this model is too small to be often right).

Run: `python benchmarks/evidence.py --base BASE`{held}, one thread; this page: `--render`.
{machine}, shared with other work. Commits of the package: {commits}.

A cell that is in no table was not run; nothing is said of it. "(40 texts)": a row on fewer than the others. "LoRA 2": a
row of another training by the same recipe, whose figures stand above the table; KL closed is of each row's own LoRA.

## Aims

Low rank, refined by half of the LoRA's own steps: the lower bounds of the intervals on the test tasks beside what was
aimed at.

{aims}

Much of what a chat model learns in tasks of classes is to answer with one word at all, which a few components carry: a
refit alone closes 99 % and more of TREC at every size.
The [encoder](#an-encoder-loras-of-rank-4-8-and-32) below has nothing of the kind to learn: files of the same share
close less there, and miss the aims. GSM8K's gain is a count of greedy answers of 120 texts: its interval is some 11
points to either side.

{forms}

SBoRA misses the two largest sizes of GSM8K. Bytes are not what it lacks there: five times as many, 4 % for 0.8, close
half a point more.
"""


_ENCODER = """## An encoder, LoRAs of rank 4, 8 and 32

TREC in 50 classes (for tuning) and SST-2 (for testing) with a sentence encoder of 22 M parameters, its classifier
trained before the LoRA; files as above, whole, at equal shares of LoRAs of different rank. Refined: half of the LoRA's
500 steps, where no other number is named; the seed is 0 where none is. `python benchmarks/encoder_evidence.py`.

Bytes are what the smallest files lack here, not steps: SST-2 at 0.4 % closes hardly more after 1,000 steps than after
250. A share does not carry across ranks: the 10.6 KB that are 1.6 % of a LoRA of rank 8 are 0.4 % of one of rank 32;
refined they close 91.5 % of the one and 93.5 % of the other on SST-2, 93.3 % and 89.5 % on TREC. Nor do bits a
component: at 294 of them refined files close 92.6 % at rank 4, 91.5 % at rank 8 and 98.0 % at rank 32 on SST-2. Its
LoRA of rank 32 was trained on another machine, and is the weakest: its accuracy is 79.8 %, that of rank 8 87.9 %, and
of the base 68.3 %.

Three seeds of refinement, at 1.6 % of SST-2's rank 8: low rank closes 91.5, 90.8 and 90.6 %, VB-LoRA 89.2, 89.5 and
88.6 %. The form matters by two points there, the seed by less than one.
"""


def page(done: Rows, encoder: str = "Not run.") -> str:
    """Return the page of these cells, and of the table of encoders."""
    shown = {name: row for name, row in done.items() if "closed" in row or "refused" in row}
    settings = [row["setting"] for row in shown.values()]
    held: dict[int, set[str]] = {}
    for setting in settings:
        held.setdefault(setting["held"], set()).add(setting["task"])
    head = _HEAD.format(
        steps=" or ".join(map(str, sorted({s["steps"] for s in settings if s["mode"] == "refined"}))) or "150",
        held=f" ({', '.join(f'`--held {n}` for ' + ', '.join(sorted(names)) for n, names in sorted(held.items()))})"
        * bool(held),
        machine="; ".join(sorted({row["machine"] for row in shown.values()})) or "Nothing was run",
        commits=", ".join(sorted({f"`{row['commit']}`" for row in shown.values()})) or "none",
        aims=_aims(shown),
        forms="\n\n".join(_aims_of_forms(name, shown) for name in TASKS if _forms_of(name, shown)[1:]),
    )
    sections = [part for name in TASKS for part in _section(name, shown)]
    return "\n".join([head, *sections, _ENCODER, encoder]).rstrip() + "\n"


def _aims(shown: Rows) -> str:
    """Return the table of lower bounds, of KL closed and of the gain, beside the aims."""
    names = [name for name, task in TASKS.items() if task.purpose == "test"]
    rows = []
    for share, aims in AIMS.items():
        row = [f"{share:g} %"]
        for measure, aim in zip(("closed", "gain"), aims, strict=True):
            cells_of = [shown.get(f"{name}, {share:g}%, lowrank, refined", {}) for name in names]
            row += [f"{aim}%", *(f"{cell[measure][1]:.1%}" if measure in cell else "not run" for cell in cells_of)]
        rows.append(row)
    short = [_short(name) for name in names]
    return cells.markdown(["size", "KL closed, aim", *short, "gain, aim", *short], rows)


def _forms_of(name: str, shown: Rows) -> list[str]:
    """Return the forms that were refined on a task for testing."""
    if TASKS[name].purpose != "test":
        return []
    return [form for form in FORMS if any(f"{name}, {share:g}%, {form}, refined" in shown for share in AIMS)]


def _aims_of_forms(name: str, shown: Rows) -> str:
    """Return the table of the lower bounds of KL closed on a task, a line for each form, below the aims."""
    rows = [["aim", *(f"{aim}%" for aim, _ in AIMS.values())]]
    for form in _forms_of(name, shown):
        refined = [shown.get(f"{name}, {share:g}%, {form}, refined", {}) for share in AIMS]
        rows.append([form, *(f"{cell['closed'][1]:.1%}" if "closed" in cell else "not run" for cell in refined)])
    table = cells.markdown(["", *(f"{share:g} %" for share in AIMS)], rows)
    return f"All forms on {_short(name)}, refined alike, the lower bounds of KL closed:\n\n{table}"


def _short(name: str) -> str:
    return TASKS[name].title.split(" as ")[0].split(":")[0]


def summary(done: Rows) -> str:
    """Return the table of README: coded low rank on the tasks for testing, refit and refined by half of the steps."""
    names = [name for name, task in TASKS.items() if task.purpose == "test"]
    refined = {
        (row["setting"]["share"], row["setting"]["task"]): row
        for row in done.values()
        if "closed" in row and row["cell"].endswith("lowrank, refined")
    }
    rows = []
    for share in AIMS:
        if not any((share, name) in refined for name in names):
            continue
        row = [f"{share:g} %"]
        for name in names:
            before, after = done.get(f"{name}, {share:g}%, lowrank, refit", {}), refined.get((share, name))
            row.append(f"{before['closed'][0]:.1%}" if "closed" in before else "not run")
            row.append("not run" if after is None else _interval(after["closed"]))
        rows.append(row)
    head = [part for name in names for part in (f"{_short(name)}, refit", "refined")]
    return cells.markdown(["size", *head], rows)


def _section(name: str, done: Rows) -> list[str]:
    task = TASKS[name]
    own = sorted((row for row in done.values() if row["setting"]["task"] == name), key=_place)
    title = f"## {task.title} ({'for testing' if task.purpose == 'test' else 'for tuning'})\n"
    if not own:
        return [title, "Not run.\n"]
    measured: dict[str, dict[str, Any]] = {}  # of each LoRA the row on most texts
    for row in (row for row in done.values() if row["setting"]["task"] == name and "closed" in row):
        best = measured.setdefault(row["setting"]["lora"], row)
        if row["texts"] > best["texts"]:
            measured[row["setting"]["lora"]] = row
    texts = max((row["texts"] for row in measured.values()), default=0)
    about = "\n\n".join(_about(task.score_name, row, number) for number, row in enumerate(measured.values(), 1))
    numbers = {lora: number for number, lora in enumerate(measured, 1)}
    rows = [_row(task.score_name, row, texts, numbers.get(row["setting"]["lora"], 1)) for row in own]
    head = ["size, form", "bytes", "bits a component", "KL closed", "agreement", task.score_name, "gain"]
    return [title, f"{about}\n", *_glance(own), cells.markdown(head, rows) + "\n"]


def _glance(rows: list[dict[str, Any]]) -> list[str]:
    """Return the means of KL closed, a line for each way to make a file and a column for each size, of seed 0 and all
    steps; nothing where few ways were measured."""
    ways: dict[str, dict[float, float]] = {}
    for row in rows:
        setting = row["setting"]
        if "closed" in row and setting["seed"] == 0 and (setting["mode"] == "refit" or setting["steps"] == 150):
            ways.setdefault(f"{setting['form']}, {setting['mode']}", {})[setting["share"]] = row["closed"][0]
    if len(ways) < 6:
        return []
    best_first = sorted(ways, key=lambda way: (way.endswith("refit"), -ways[way].get(0.8, 0.0)))
    lines = [
        [way, *(f"{ways[way][share]:.1%}" if share in ways[way] else "not run" for share in AIMS)] for way in best_first
    ]
    return ["KL closed, of what is below:\n", cells.markdown(["", *(f"{share:g} %" for share in AIMS)], lines) + "\n"]


def _about(score_name: str, row: dict[str, Any], number: int) -> str:
    """Return what is known of a LoRA and what is held out; the number is that of its training, from 1."""
    base, goal, _ = row["scores"]
    again = f"LoRA {number}, another training by the same recipe: " if number > 1 else ""
    return (
        f"{again}{row['texts']} texts held out, {row['items']:,} tokens of answers; {score_name} of the "
        f"base {_score(score_name, base)}, with the LoRA {_score(score_name, goal)}; the base's first "
        f"choice is the LoRA's at {row['base_agreement']:.1%}, their KL is {row['base_kl']:.3f} nats."
    )


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    setting = row["setting"]
    return (-setting["share"], setting["mode"] != "refit", -row.get("closed", [-9.0])[0], setting["seed"])


def _row(score_name: str, row: dict[str, Any], texts: int, number: int) -> list[str]:
    setting = row["setting"]
    steps = f" with {setting['steps']} steps" if setting["mode"] == "refined" else ""
    seed = f", seed {setting['seed']}" if setting["seed"] else ""
    strength = f" times {row['strength']:g}" if row.get("strength", 1) != 1 else ""
    title = f"{setting['share']:g} %, {setting['form']}{strength}, {setting['mode']}{steps}{seed}"
    if "closed" not in row:
        return [title, "too small", "", "", "", "", ""]
    if row["texts"] != texts:
        title += f" ({row['texts']} texts)"
    if number > 1:
        title += f", LoRA {number}"
    closed, gain = (_interval(row[name]) for name in ("closed", "gain"))
    shown = [f"{row['bytes']:,}", f"{row['bits_per_component']:.1f}", closed, f"{row['agreement'][0]:.1%}"]
    return [title, *shown, _score(score_name, row["scores"][2]), gain]


def _interval(values: list[float]) -> str:
    share, low, high = values
    return f"{share:.1%} ({low:.1%} to {high:.1%})"


def _score(name: str, value: float) -> str:
    return f"{100 * value:.1f}" if name == "BLEU" else f"{value:.1%}"
