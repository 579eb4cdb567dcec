"""The table at the end of `lrconvert demo`: what base, LoRA and files answer to tickets that none of them has seen."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrconvert import api
from lrconvert.core.errors import printable
from lrconvert.live import attach
from lrconvert.live.load_model import load_model, load_tokenizer
from lrconvert.live.texts import IGNORED
from lrconvert.report.tables import table

_BATCH = 40  # texts
_LONGEST = 60  # tokens of an answer
_COLUMNS = 84  # of an answer in the table


@dataclass(frozen=True)
class Asked:
    """Texts as tokens: the prompts, and batches of (ids, labels), whose labels are those of the answers alone."""

    prompts: Sequence[str]
    batches: Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Answered:
    """Of one model: mean loss of the answers' tokens in nats, its first choice for each of them, and whether all of an
    answer's are right, by text."""

    loss: float
    choices: Tensor
    right: Tensor


def answers(base: Path, lora: Path, files: Mapping[str, Path], held_out: Path) -> str:
    """Return the table, a row for the base, the LoRA and each file, and one text with the answer of each."""
    model, tokenizer = load_model(base).float(), load_tokenizer(base)
    asked = _tokens(held_out, tokenizer)
    adapters: dict[str, Any] = {"LoRA": api.load_lora(lora), **{name: api.load(path) for name, path in files.items()}}
    names = {name: f"adapter_{n}" for n, name in enumerate(adapters)}
    sizes = {"LoRA": adapters["LoRA"].half_bytes, **{name: path.stat().st_size for name, path in files.items()}}
    with attach.temporarily(model, {names[name]: adapter for name, adapter in adapters.items()}), torch.no_grad():

        def activate(name: str) -> None:
            attach.set_active(model, names.get(name, ()))

        measured = {}
        for name in ("base", *adapters):
            activate(name)
            measured[name] = _measured(model, asked)
        goal = measured["LoRA"]
        differ = [not all(m.right[n] for name, m in measured.items() if name != "base") for n in range(len(goal.right))]
        which = differ.index(True) if any(differ) else 0
        written = {}
        for name in measured:
            activate(name)
            written[name] = _written(model, tokenizer, asked.prompts[which])
    rows = [
        [
            name,
            f"{sizes[name]:,}" if name in sizes else "-",
            f"{sizes['LoRA'] / sizes[name]:.1f}" if name in sizes else "-",
            f"{m.loss:.3f}",
            f"{(m.choices == goal.choices).float().mean():.1%}",
            f"{m.right.float().mean():.1%}",
        ]
        for name, m in measured.items()
    ]
    head = ["", "bytes", "times smaller", "loss", "agrees with the LoRA", "answers right"]
    title = f"Answers to {len(goal.right)} tickets that nothing was trained on. An answer is right if every word is:"
    example = "The first ticket that one of the files gets wrong" if any(differ) else "The first ticket"
    shown = [f"{name:<11} {text}" for name, text in written.items()]
    ticket = textwrap.fill(printable(f"{example}: {asked.prompts[which].strip()}", 1000), 100)
    return "\n".join([title, table(head, rows), ticket, *shown])


def _tokens(path: Path, tokenizer: Any) -> Asked:
    pairs = [(row["prompt"], row["completion"]) for row in map(json.loads, path.read_text("utf-8").splitlines())]
    starts = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
    whole = [[*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id] for prompt, answer in pairs]
    batches = []
    for at in range(0, len(pairs), _BATCH):
        rows = whole[at : at + _BATCH]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for n, row in enumerate(rows):  # what follows a text is not seen from it: it needs no mask
            ids[n, : len(row)] = torch.tensor(row)
            start = len(starts[at + n])
            labels[n, start : len(row)] = ids[n, start : len(row)]
        batches.append((ids, labels[:, 1:]))
    return Asked([prompt for prompt, _ in pairs], batches)


def _measured(model: nn.Module, asked: Asked) -> Answered:
    losses, choices, right = [], [], []
    for ids, labels in asked.batches:
        logits, counts = model(ids).logits[:, :-1], labels != IGNORED
        losses.append(nn.functional.cross_entropy(logits[counts], labels[counts], reduction="none"))
        best = logits.argmax(-1)
        choices.append(best[counts])
        right.append(((best == labels) | ~counts).all(1))
    return Answered(torch.cat(losses).mean().item(), torch.cat(choices), torch.cat(right))


def _written(model: nn.Module, tokenizer: Any, prompt: str) -> str:
    """Return the text that a model writes after a prompt, always the likeliest token, as one line."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    start = ids.shape[1]
    while ids.shape[1] < start + _LONGEST:
        best = model(ids).logits[0, -1].argmax()
        if best == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, best.reshape(1, 1)], 1)
    text = printable(" ".join(tokenizer.decode(ids[0, start:]).split()), 1000)
    return text if len(text) <= _COLUMNS else f"{text[: _COLUMNS - 3]}..."
