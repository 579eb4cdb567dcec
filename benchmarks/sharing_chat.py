"""The chat model in `sharing.py`: six LoRAs of rank 16, those of `evidence.py` and one of `members.py --chat`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import cells
import intervals
import joint_basis
import members
import numpy as np
from joint_basis import Basis, Coded, Member

from lrconvert import api

_LAYERS = (2, 9, 16, 23, 29)  # that are looked at, 7 targets each; answers are of whole LoRAs
_RANK = 16
_TEXTS = 40


def _known() -> dict[str, Member]:
    """The LoRAs of the chat model, by task; those of `evidence.py` began at one A, "other" elsewhere."""
    folders = {path.parent.name: path.parent for path in sorted((members.CHAT / "lora").glob("*/done.json"))}
    other = members.FOLDER / "chat-trec-s1"
    folders |= {"other": other} if (other / "done.json").exists() else {}
    return {name: _member(folder) for name, folder in folders.items()}


@cache
def _member(folder: Path) -> Member:
    return Member.of(api.load_lora(folder), _LAYERS)


def pairs(kind: str) -> list[tuple[Member, Member]]:
    known = _known()
    other = known.pop("other")
    if kind == "the same start":
        return [(a, b) for a in known.values() for b in known.values() if a is not b]
    rest = [known["trec"]] if kind == "the same task" else [m for name, m in known.items() if name != "trec"]
    return [pair for member in rest for pair in ((member, other), (other, member))]


def starts() -> list[tuple[Member, Basis]]:
    """The LoRAs of one start, each with the common directions of the others' A."""
    known = _known()
    known.pop("other", None)
    return [
        (own, joint_basis.common([member for member in known.values() if member is not own], _RANK, 0))
        for own in known.values()
    ]


def task() -> list[tuple[Member, Basis]]:
    """The two LoRAs of TREC, each with the directions of the other, which began elsewhere."""
    one, other = _known()["trec"], _known()["other"]
    return [(a, joint_basis.common([b], _RANK, _RANK)) for a, b in ((one, other), (other, one))]


def on(share: float, cases: Callable[[], list[tuple[Member, Basis]]], shared: bool) -> dict[str, Any]:
    kept, once = [], 0
    for own, basis in cases():
        kept.append(Coded.of(own, basis if shared else None).best([own.half_bytes * share / 100])[0][0])
        once = basis.nbytes if shared else 0
    return {"captured": round(float(np.mean(kept)), 4), "once": once, "each": [round(x, 4) for x in kept]}


def answers(share: float, name: str) -> dict[str, Any]:
    """Low rank with the common directions of the other tasks' A beside low rank without, in answers."""
    import torch
    import transformers
    from chat import loras, tasks

    from lrconvert.live.zero_point import without_updates

    folders = {path.parent.name: path.parent for path in sorted((members.CHAT / "lora").glob("*/done.json"))}
    whole = {task: Member.of(api.load_lora(folder)) for task, folder in folders.items()}
    lora, own = api.load_lora(folders[name]), whole[name]
    start = joint_basis.common([member for task, member in whole.items() if task != name], _RANK, 0)
    limit = own.half_bytes * share / 100
    fits = [joint_basis.rebuilt(lora, own, basis, limit) for basis in (None, start)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(members.CHAT / "base")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(members.CHAT / "base", dtype=torch.float32)
    model.eval()
    asked = tasks.TASKS[name]
    held = [loras.tokens_of(tokenizer, asked, one) for one in asked.read(cells.ASSETS / "data").held[:_TEXTS]]

    def logs(adapter: Any) -> list[np.ndarray]:
        api.attach(model, adapter)
        with torch.no_grad():
            inputs = (loras.inputs_of([one], tokenizer.eos_token_id) for one in held)
            numbers = [loras.answer_logits(model, each).log_softmax(-1).numpy() for each in inputs]
        api.detach(model)
        return numbers

    goal = logs(lora)

    def distance(adapter: Any) -> np.ndarray:
        both = zip(goal, logs(adapter), strict=True)
        return np.array([float(np.sum(np.exp(a) * (a - b), dtype=np.float64)) for a, b in both])

    far, *near = (distance(adapter) for adapter in (without_updates(lora), fits[0][1], fits[1][1]))
    row = {key: intervals.share(x, far, one_minus=True) for key, x in zip(("without", "with"), near, strict=True)}
    captured = [round(kept, 4) for kept, _ in fits]
    return {**row, "more": intervals.share(near[0] - near[1], far), "captured": captured, "texts": len(held)}
