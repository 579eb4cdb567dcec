"""Tasks for a chat model, as questions in its chat template, from data sets among the project's shared assets.

Defaults of lrconvert are tuned on `e2e` and `trec` only; `sst2`, `gsm8k` and `cola` are for testing. An instruction is
the system message, the input the user's, the answer the assistant's. Data is split once: `seen` trains the LoRA and is
all that refinement gets, `held` is from the data sets' own test files.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_MOST_SEEN = 8000  # more than 300 steps of 512 tokens read


@dataclass(frozen=True)
class Example:
    """An input, the answer that trains, and all answers that count as right."""

    text: str
    answer: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    seen: tuple[Example, ...]
    held: tuple[Example, ...]


@dataclass(frozen=True)
class Task:
    """`score` judges what was written: the mean over examples, or of all at once where `whole_score` is set.
    `classes` are the answers of a question with few of them; `longest` bounds the tokens that are written."""

    name: str
    title: str
    purpose: str
    instruction: str
    needed: tuple[str, ...]
    read: Callable[[Path], Split]
    score_name: str
    longest: int
    classes: tuple[str, ...] = ()


def messages(task: Task, text: str) -> list[dict[str, str]]:
    """Return the conversation that an answer follows."""
    return [{"role": "system", "content": task.instruction}, {"role": "user", "content": text}]


# --- data sets ------------------------------------------------------------------------------------------------------


def _split(seen: list[Example], held: list[Example]) -> Split:
    """Shuffle both; inputs that are held out are not among those seen."""
    for rows, seed in ((seen, 0), (held, 1)):
        random.Random(seed).shuffle(rows)
    known = {row.text for row in held}
    return Split(tuple(row for row in seen if row.text not in known)[:_MOST_SEEN], tuple(held))


def _labelled(pairs: Sequence[tuple[str, str]]) -> list[Example]:
    return [Example(text.strip(), label, (label,)) for text, label in pairs]


def _e2e(data: Path) -> Split:
    def pairs(name: str) -> list[tuple[str, str]]:
        lines = (data / "e2e_nlg" / f"{name}.txt").read_text().splitlines()
        return [(text.strip(), answer.strip()) for text, answer in (ln.split("||", 1) for ln in lines if "||" in ln)]

    references: dict[str, list[str]] = {}
    for text, answer in pairs("test"):
        references.setdefault(text, []).append(answer)
    held = [Example(text, answers[0], tuple(answers)) for text, answers in references.items()]
    return _split([Example(text, answer, (answer,)) for text, answer in pairs("valid")], held)


def _sst2(data: Path) -> Split:
    def pairs(name: str) -> list[tuple[str, str]]:
        lines = (data / "sst2" / f"{name}.tsv").read_text().splitlines()[1:]
        return [(text, ("negative", "positive")[int(n)]) for text, n in (line.rsplit("\t", 1) for line in lines)]

    # Whole sentences, as in the test file, not the phrases that they were cut into.
    seen = [(text, label) for text, label in pairs("train") if len(text.split()) >= 10]
    return _split(_labelled(seen), _labelled(pairs("test")))


_TREC_CLASSES = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}


def _trec(data: Path) -> Split:
    def pairs(name: str) -> list[tuple[str, str]]:
        lines = (data / "trec" / f"{name}.txt").read_text(encoding="latin-1").splitlines()
        return [(text, _TREC_CLASSES[label[: label.index(":")]]) for label, text in (ln.split(" ", 1) for ln in lines)]

    return _split(_labelled(pairs("train")), _labelled(pairs("test")))


def _gsm8k(data: Path) -> Split:
    def examples(name: str) -> list[Example]:
        rows = map(json.loads, (data / "gsm8k" / f"{name}.jsonl").read_text().splitlines())
        return [Example(row["question"].strip(), row["answer"], (row["answer"],)) for row in rows]

    return _split(examples("train"), examples("test"))


def _cola(data: Path) -> Split:
    def pairs(name: str) -> list[tuple[str, str]]:
        lines = (data / "glue_cola" / f"{name}.tsv").read_text().splitlines()
        fields = [line.split("\t") for line in lines if line.count("\t") == 3]
        return [(text, ("no", "yes")[int(label)]) for _, label, _, text in fields]

    return _split(_labelled(pairs("train")), _labelled(pairs("dev") + pairs("val")))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "e2e",
            "E2E: a description from attributes",
            "tuning",
            "Describe the restaurant with these attributes.",
            ("data/e2e_nlg/valid.txt", "data/e2e_nlg/test.txt"),
            _e2e,
            "BLEU",
            64,
        ),
        Task(
            "sst2",
            "SST-2 as a question",
            "test",
            "Is this sentence of a film review positive or negative? Answer with one word.",
            ("data/sst2/train.tsv", "data/sst2/test.tsv"),
            _sst2,
            "accuracy",
            4,
            ("negative", "positive"),
        ),
        Task(
            "trec",
            "TREC as a question",
            "tuning",
            "What does this question ask for? Answer with one word: abbreviation, description, entity, human, "
            "location or number.",
            ("data/trec/train.txt", "data/trec/test.txt"),
            _trec,
            "accuracy",
            4,
            tuple(_TREC_CLASSES.values()),
        ),
        Task(
            "gsm8k",
            "GSM8K: the form of an answer",
            "test",
            "Solve the problem step by step. End with a line of #### and the number.",
            ("data/gsm8k/train.jsonl", "data/gsm8k/test.jsonl"),
            _gsm8k,
            "answers in form",
            192,
        ),
        Task(
            "cola",
            "CoLA as a question",
            "test",
            "Is this sentence grammatical? Answer yes or no.",
            ("data/glue_cola/train.tsv", "data/glue_cola/dev.tsv", "data/glue_cola/val.tsv"),
            _cola,
            "accuracy",
            4,
            ("no", "yes"),
        ),
    )
}


def is_in_form(answer: str) -> bool:
    """Say whether an answer is written as GSM8K's are: every calculation repeated between << and >>, last a line of
    #### and a number."""
    lines = answer.strip().splitlines()
    return (
        len(lines) > 1
        and re.fullmatch(r"#### -?[\d,.]+", lines[-1]) is not None
        and re.search("<<.*>>", answer) is not None
    )
