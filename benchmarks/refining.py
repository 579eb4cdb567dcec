"""What a step of refinement costs beside a plain distillation into a LoRA with PEFT: seconds, memory, tokens a second.

    python benchmarks/refining.py             measures what is missing, each cell in a process of its own
    python benchmarks/refining.py --render    writes the table

Random models in the shape of a decoder: a small one in float32, of whose texts every token counts; and one in the
shape of SmolLM2-135M in bf16, of whose texts the last four tokens count, as of prompts with short answers (`gpu.py`
has larger ones). The teacher: a LoRA of rank 16 on all linear layers. PEFT's step: the teacher's logits without
gradients, the KL of a student of rank 8 on the tokens that count, backward, Adam. Ours: `refine` as it comes, with
the error of hidden states and the quantizers in the loop, at 4 % of the LoRA's bytes, in the first epoch and in later
ones, for which the teacher's answers are kept. Seconds are the median of steps after the first; on a CPU processor
time on one thread.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cells
import numpy as np
from decoders import Decoder


@dataclass(frozen=True)
class Model:
    """A model to train on: its decoder, the rows and tokens of a batch, how many of the last `answers` count (0: all),
    and where it computes."""

    decoder: Decoder
    batch: tuple[int, int]
    answers: int = 0
    device: str = "cpu"


MODELS = {
    "cpu": Model(Decoder(512, 1408, 8, 8000, (8, 4)), (4, 256)),
    "135m": Model(Decoder(576, 1536, 30, 49152, (9, 3), tied=True), (8, 64), answers=4),
}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "lowrank": ("lowrank", {}),
    "vblora": ("vblora", {}),
    "nola": ("nola", {}),
    "sbora": ("sbora", {}),
    "bone": ("bone", {}),
}
RANK, STUDENT, SHARE = 16, 8, 4.0
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_EPOCH, _STEPS = 4, 10  # batches that are trained on, and steps: the later ones meet them again


def _model(name: str) -> Any:
    import torch
    import transformers

    config = transformers.LlamaConfig(**MODELS[name].decoder.config)
    torch.manual_seed(0)
    with torch.device(MODELS[name].device):
        kind = torch.float32 if name == "cpu" else torch.bfloat16
        return transformers.AutoModelForCausalLM.from_config(config, dtype=kind).eval()


def _batches(name: str) -> list[dict[str, Any]]:
    """Random tokens, with labels for those that count where these are not all; one batch will be held out."""
    import torch

    model = MODELS[name]
    draw = torch.Generator().manual_seed(0)
    made = []
    for _ in range(_EPOCH + 1):
        batch = {"input_ids": torch.randint(0, model.decoder.words, model.batch, generator=draw)}
        if model.answers:
            batch["labels"] = batch["input_ids"].clone()
            batch["labels"][:, : -model.answers] = -100
        made.append(batch)
    return made


def _teacher(model: Any, folder: Path) -> None:
    """Write a LoRA whose update is about a tenth of the weights."""
    import peft
    import torch

    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=_ALL, task_type="CAUSAL_LM")
    made = peft.get_peft_model(model, config)
    with torch.no_grad():
        for key, value in made.named_parameters():
            if "lora_B" in key:
                value.normal_(0, 0.005)
    made.save_pretrained(folder)
    made.unload()


def plain(name: str) -> dict[str, Any]:
    """Time PEFT's own: two adapters on one model."""
    import peft
    import torch

    model, batches = _model(name), _batches(name)
    with TemporaryDirectory() as kept:
        _teacher(model, Path(kept))
        both = peft.PeftModel.from_pretrained(model, kept, adapter_name="teacher")
    config = peft.LoraConfig(r=STUDENT, lora_alpha=STUDENT, target_modules=_ALL, task_type="CAUSAL_LM")
    both.add_adapter("student", config)
    both.set_adapter("student")
    trained = [p for p in both.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    device, times = MODELS[name].device, []
    answers = MODELS[name].answers
    places = slice(-answers - 1, -1) if answers else slice(None)
    for batch in batches:
        start = _now(device)
        ids = batch["input_ids"].to(device)
        both.set_adapter("teacher", inference_mode=True)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            goal = both(input_ids=ids).logits[:, places].float().log_softmax(-1)
        both.set_adapter("student")
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = both(input_ids=ids).logits[:, places]
        loss = (goal.exp() * (goal - logits.float().log_softmax(-1))).sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(_now(device) - start)
    return _row(name, times, times[1:])


def ours(name: str, form: str) -> dict[str, Any]:
    from lrconvert import api

    model, batches = _model(name), _batches(name)
    with TemporaryDirectory() as kept:
        _teacher(model, Path(kept))
        lora = api.load_lora(Path(kept))
    method, options = FORMS[form]
    device = MODELS[name].device
    compact = api.convert(lora, method, target_ratio=100 / SHARE, device=device, **options).compact
    ends: list[float] = []

    def progress(share: float, text: str) -> None:
        if text.startswith("loss"):
            ends.append(_now(device))

    few = {"steps": _STEPS, "eval_every": _STEPS, "layerwise": False, "device": device}
    api.refine(compact, lora, model, batches, progress=progress, **few)
    times = [b - a for a, b in itertools.pairwise(ends)]  # of all steps but the first
    return _row(name, times, times[: _EPOCH - 1]) | {"again": round(float(np.median(times[_EPOCH - 1 :])), 4)}


def _now(device: str) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _row(name: str, times: list[float], first: list[float]) -> dict[str, Any]:
    """The row of a cell, of whose steps the `first` ask the teacher."""
    import torch

    model = MODELS[name]
    seconds = float(np.median(first))
    if model.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10
    tokens = model.batch[0] * model.batch[1]
    gpu = {"gpu": torch.cuda.get_device_name()} if model.device == "cuda" else {}
    return {"seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds), "peak_bytes": peak, **gpu}


def _child(name: str, form: str) -> dict[str, Any]:
    return cells.child(__file__, "--child", name, form)


def all_cells() -> Iterator[cells.Cell]:
    for name in MODELS:
        for form in ("PEFT LoRA", *FORMS):
            yield f"{name}, {form}", lambda a=(name, form): _child(*a)


def table() -> str:
    done = cells.read("refining")
    rows = []
    for name in MODELS:
        plain = done.get(f"{name}, PEFT LoRA", {}).get("seconds")
        for form in ("PEFT LoRA", *FORMS):
            cell = done.get(f"{name}, {form}")
            if cell is None or "seconds" not in cell:
                rows.append([f"{name}, {form}", "not run" if cell is None else "skipped", "", "", ""])
                continue
            both = [cell["seconds"], cell.get("again", cell["seconds"])]
            shown = [f"{seconds:.2f} s" + (f", {seconds / plain:.2f}" if plain else "") for seconds in both]
            rows.append([f"{name}, {form}", *shown, f"{cell['peak_bytes'] / 2**20:,.0f} MiB"])
    head = ["model, form", "a step of the first epoch, of PEFT's", "of a later one, of PEFT's", "peak memory"]
    return cells.markdown(head, rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        model_name, form_name = sys.argv[2:]
        print(json.dumps(plain(model_name) if form_name == "PEFT LoRA" else ours(model_name, form_name)))
    else:
        cells.main("refining", __doc__, all_cells, table)
