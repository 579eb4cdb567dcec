"""Running a chat model on what is held out: answers beside the teacher's, and what it writes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chat import loras, metrics, tasks
from chat.metrics import Answers

_BATCH_TOKENS, _WRITTEN_AT_ONCE = 1024, 50


@dataclass(frozen=True, eq=False)
class Held:
    """What is held out of a task: examples, and their tokens in order of length."""

    task: tasks.Task
    examples: tuple[tasks.Example, ...]
    tokens: tuple[loras.Tokens, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, task: tasks.Task, tokenizer: Any, examples: Sequence[tasks.Example]) -> Held:
        tokens = tuple(loras.tokens_of(tokenizer, task, example) for example in examples)
        order = sorted(range(len(tokens)), key=lambda n: len(tokens[n].ids))
        return cls(task, tuple(examples), tokens, tuple(order))

    def groups(self) -> Iterator[list[int]]:
        """Yield numbers of examples, of about equal length."""
        group: list[int] = []
        for n in self.order:
            if group and len(self.tokens[n].ids) * (len(group) + 1) > _BATCH_TOKENS:
                yield group
                group = []
            group.append(n)
        yield group

    def texts(self) -> np.ndarray:
        """Return which example each item is of, in the order that answers come in."""
        return np.repeat(self.order, [len(self.tokens[n].ids) - self.tokens[n].prompt for n in self.order])


def logs(model: Any, tokenizer: Any, held: Held) -> Iterator[np.ndarray]:
    """Yield log probabilities (items, vocabulary) of a batch after the other."""
    import torch

    for group in held.groups():
        with torch.no_grad():
            inputs = loras.inputs_of([held.tokens[n] for n in group], tokenizer.eos_token_id)
            yield loras.answer_logits(model, inputs).float().log_softmax(-1).numpy()


def measure(model: Any, tokenizer: Any, held: Held, goal: np.ndarray, *, scored: bool = True) -> Answers:
    """Return a model's answers, as far as they are from `goal` (items, vocabulary), the teacher's log probabilities."""
    far, first, score, at = [], [], np.zeros((len(held.examples), 2)), 0
    starts = np.concatenate([[0], np.cumsum([len(held.tokens[n].ids) - held.tokens[n].prompt for n in held.order])])
    rank_of_item = {int(start): n for start, n in zip(starts, held.order, strict=False)}
    choices = [tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in held.task.classes]
    if len(set(choices)) < len(choices):
        raise ValueError(f"two classes of {held.task.name} begin with the same token")
    for batch in logs(model, tokenizer, held):
        wanted = np.asarray(goal[at : at + len(batch)])
        far.append(np.sum(np.exp(wanted) * (wanted - batch), axis=1, dtype=np.float64))
        first.append(batch.argmax(1))
        for row in range(len(batch) if choices else 0):
            if at + row in rank_of_item:
                n = rank_of_item[at + row]
                chosen = held.task.classes[int(batch[row, choices].argmax())]
                score[n] = chosen in held.examples[n].references, 1.0
        at += len(batch)
    if scored and not choices:
        score = _score(held, written(model, tokenizer, held))
    return Answers(np.concatenate(far), np.concatenate(first), held.texts(), score if scored else np.empty((0, 2)))


def _score(held: Held, texts: Sequence[str]) -> np.ndarray:
    if held.task.score_name == "BLEU":
        return metrics.bleu_counts(texts, [example.references for example in held.examples])
    return metrics.hits([tasks.is_in_form(text) for text in texts])


def written(model: Any, tokenizer: Any, held: Held) -> list[str]:
    """Return what the model writes for every example, the likeliest token after the other."""
    import torch

    answers = [""] * len(held.examples)
    end = tokenizer.eos_token_id
    for at in range(0, len(held.order), _WRITTEN_AT_ONCE):
        group = held.order[at : at + _WRITTEN_AT_ONCE]
        prompts = [held.tokens[n].ids[: held.tokens[n].prompt] for n in group]
        width = max(map(len, prompts))
        ids = torch.tensor([[*[end] * (width - len(p)), *p] for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.no_grad():
            made = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=held.task.longest, do_sample=False, pad_token_id=end
            )
        for n, row in zip(group, made[:, width:].tolist(), strict=True):
            answers[n] = tokenizer.decode(row[: row.index(end)] if end in row else row, skip_special_tokens=True)
    return answers


def reference(
    folder: Path, model: Any, tokenizer: Any, held: Held, zero: Any, lora: Any
) -> tuple[np.ndarray, Answers, Answers]:
    """Return the teacher's log probabilities, the base's answers (`zero`: the LoRA without its updates) and the
    teacher's, kept in `folder`."""
    from lrconvert import api

    kept, marks = folder / f"goal-{len(held.examples)}.npy", folder / f"answers-{len(held.examples)}.npz"
    if not marks.exists():
        api.attach(model, lora)
        partial = folder / f"{kept.name}.{os.getpid()}.npy"  # another run may read the kept one
        np.save(partial, np.concatenate(list(logs(model, tokenizer, held))))
        partial.replace(kept)
        goal = measure(model, tokenizer, held, np.load(kept, mmap_mode="r"))
        api.detach(model)
        api.attach(model, zero)
        base = measure(model, tokenizer, held, np.load(kept, mmap_mode="r"))
        api.detach(model)
        parts = {
            f"{name}_{field}": value for name, a in (("base", base), ("goal", goal)) for field, value in vars(a).items()
        }
        np.savez(marks, **parts)
    saved = np.load(marks)
    base, goal = (
        Answers(*(saved[f"{name}_{field}"] for field in ("kl", "first", "texts", "score"))) for name in ("base", "goal")
    )
    return np.load(kept, mmap_mode="r"), base, goal
