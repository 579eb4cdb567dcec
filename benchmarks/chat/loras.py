"""The LoRAs of a chat model: rank 16 on all linear layers, 300 steps of 512 tokens, trained with PEFT on the answers.

A run is cut into steps that are planned before it begins, and kept every 25 of them, so that one that was stopped goes
on where it was. ``FOLDER/lora/TASK`` is the adapter once it is done.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chat.tasks import Example, Task, messages

RANK, STEPS, BATCH_TOKENS, RATE, WARMUP, KEPT_EVERY = 16, 300, 512, 1e-3, 30, 25


@dataclass(frozen=True)
class Tokens:
    """The tokens of an example; the first `prompt` of them are not answers."""

    ids: tuple[int, ...]
    prompt: int


def prompt_of(tokenizer: Any, task: Task, text: str) -> str:
    """Return the conversation up to where the answer begins, as the model's chat template writes it."""
    prompt: str = tokenizer.apply_chat_template(messages(task, text), tokenize=False, add_generation_prompt=True)
    return prompt


def write_examples(path: Path, tokenizer: Any, task: Task, examples: Sequence[Example]) -> None:
    """Write examples as lrconvert reads them: a prompt and a completion a line."""
    rows = [{"prompt": prompt_of(tokenizer, task, e.text), "completion": e.answer} for e in examples]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tokens_of(tokenizer: Any, task: Task, example: Example) -> Tokens:
    """Return an example in tokens, the end of the turn being the last of them."""
    prompt = tokenizer(prompt_of(tokenizer, task, example.text), add_special_tokens=False)["input_ids"]
    answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
    return Tokens((*prompt, *answer, tokenizer.eos_token_id), len(prompt))


def plan(examples: Sequence[Tokens], steps: int, batch_tokens: int, seed: int) -> Iterator[list[Tokens]]:
    """Yield `steps` batches of at most `batch_tokens` with their padding, epoch after epoch in random order."""
    rng, left = random.Random(seed), list[Tokens]()
    usable = [e for e in examples if len(e.ids) <= batch_tokens]
    for _ in range(steps):
        batch: list[Tokens] = []
        while True:
            left = left or rng.sample(usable, len(usable))
            if max(len(e.ids) for e in (*batch, left[-1])) * (len(batch) + 1) > batch_tokens:
                break
            batch.append(left.pop())
        yield batch


def inputs_of(batch: Sequence[Tokens], pad: int) -> dict[str, Any]:
    """Return input ids, attention mask, and `answers`: the places whose next token is a part of an answer."""
    import torch

    width = max(len(e.ids) for e in batch)
    ids = torch.tensor([[*e.ids, *[pad] * (width - len(e.ids))] for e in batch])
    mask = torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in batch])
    answers = torch.tensor([[e.prompt - 1 <= n < len(e.ids) - 1 for n in range(width)] for e in batch])
    return {"input_ids": ids, "attention_mask": mask, "answers": answers}


def answer_logits(model: Any, inputs: dict[str, Any]) -> Any:
    """Return the logits of a causal model where answers are, (items, vocabulary): the head sees no other place."""
    body = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = body.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    return body.lm_head(hidden[inputs["answers"]])


def train(
    base: Path,
    task: Task,
    examples: Sequence[Example],
    folder: Path,
    *,
    rank: int = RANK,
    steps: int = STEPS,
    seed: int = 0,
) -> Path:
    """Train the LoRA of a task, from where an earlier run was stopped; return its folder. `seed`: of A's start and of
    the order of examples."""
    import peft
    import torch
    import transformers

    if (folder / "done.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)  # bf16, as it is stored
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped: Any = peft.get_peft_model(model, config)  # the LoRA itself is fp32
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / WARMUP, max(0.0, (steps - n) / (steps - WARMUP)))
    )
    batches = list(plan([tokens_of(tokenizer, task, e) for e in examples], steps, BATCH_TOKENS, seed))
    state, losses, seconds = folder / "training.pt", list[float](), 0.0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        peft.set_peft_model_state_dict(wrapped, kept["adapter"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        losses, seconds = kept["losses"], kept["seconds"]
    wrapped.train()
    for n in range(len(losses), steps):
        start, inputs = time.perf_counter(), inputs_of(batches[n], tokenizer.eos_token_id)
        goal = inputs["input_ids"][:, 1:][inputs["answers"][:, :-1]]
        loss = torch.nn.functional.cross_entropy(answer_logits(wrapped, inputs).float(), goal)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
        seconds += time.perf_counter() - start
        if (n + 1) % KEPT_EVERY == 0 or n + 1 == steps:
            adapter = peft.get_peft_model_state_dict(wrapped)
            kept = {"adapter": adapter, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save({**kept, "losses": losses, "seconds": seconds}, folder / "training.tmp")
            (folder / "training.tmp").replace(state)
            recent = sum(losses[-KEPT_EVERY:]) / KEPT_EVERY
            print(f"{task.name}: step {n + 1} of {steps}, loss {recent:.4f}, {seconds:.0f} s", flush=True)
    wrapped.save_pretrained(folder)
    done = {"steps": steps, "rank": rank, "rate": RATE, "batch_tokens": BATCH_TOKENS, "seconds": round(seconds)}
    (folder / "done.json").write_text(json.dumps({**done, "losses": [round(x, 4) for x in losses]}))
    return folder
