"""The worth of a compact adapter made on a bf16 base where the base is served quantized.

    python benchmarks/served.py --base BASE --folder FOLDER     measures the cells that are missing
    python benchmarks/served.py --only "gsm8k, q4"              some of them
    python benchmarks/served.py --render                        writes the table in docs/quantized-bases.md

BASE and FOLDER are those of `benchmarks/evidence.py`: its LoRAs, and its refined files of 1.6 and 0.4 %. Bases in GGUF
run in llama.cpp, quantized by its own code; NF4 (bitsandbytes) and fp8 (torch) are weights of transformers' model,
rounded and read back, which computes in float32. All distances are from one reference: transformers in float32 on
the weights in bf16, with the LoRA that the compact file was made of. What is made is kept in ``--work``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
import intervals
import numpy as np
from chat import answers, llamacpp, tasks

NAME = "served"
TASKS = {"sst2": 40, "gsm8k": 20, "cola": 40}  # texts that are held out; 20 answers of GSM8K are 2,671 tokens
SHARES = (1.6, 0.4)
ADAPTERS = ("none", "LoRA", *(f"{share:g} %" for share in SHARES))
GGUF = ("bf16", "q8_0", "q4_k_m")
ROUNDED = ("fp8", "NF4")
BASES = (*GGUF, *ROUNDED)
_BLOCK = 64  # numbers that share a scale in NF4


@dataclass(frozen=True)
class Run:
    base: Path
    folder: Path
    work: Path


# --- bases and adapters ---------------------------------------------------------------------------------------------


@functools.cache
def _tokenizer(base: Path) -> Any:
    from lrconvert.live.load_model import load_tokenizer

    return load_tokenizer(base)


def _held(run: Run, task: str) -> answers.Held:
    split = tasks.TASKS[task].read(cells.ASSETS / "data")
    return answers.Held.of(tasks.TASKS[task], _tokenizer(run.base), split.held[: TASKS[task]])


def _adapter(run: Run, task: str, adapter: str) -> Path | None:
    """Return the folder of the LoRA, or the newest low-rank file that `evidence.py` refined to that share."""
    from lrconvert import api

    if adapter == "none":
        return None
    if adapter == "LoRA":
        return run.folder / "lora" / task
    most = api.load_lora(run.folder / "lora" / task).half_bytes * float(adapter.removesuffix(" %")) / 100
    made = sorted((run.folder / "work" / task).glob("refined-*.lrc"), key=lambda path: -path.stat().st_mtime)
    fitting = (path for path in made if 0.9 * most < path.stat().st_size <= most)
    path = next((path for path in fitting if api.read(path).method == "lowrank"), None)
    if path is None:
        raise FileNotFoundError(f"evidence.py has refined no file of {task} at {adapter}")
    return path


def _gguf_adapter(run: Run, task: str, adapter: str) -> Path | None:
    from lrconvert import api

    source = _adapter(run, task, adapter)
    if source is None:
        return None
    out = run.work / f"{task}-{adapter.removesuffix(' %')}"
    if not out.exists():
        api.export(source, out, to="gguf", base=run.base)
    return out / "adapter.gguf"


def _gguf_base(run: Run, base: str) -> Path:
    whole = llamacpp.convert(run.base, run.work / "base-bf16.gguf")
    if base == "bf16":
        return whole
    out = run.work / f"base-{base}.gguf"
    llamacpp.quantize(whole, out, base)
    return out


def _model(run: Run, base: str) -> Any:
    """Return transformers' model in float32, the linear layers of its blocks rounded to `base`."""
    import torch
    import transformers

    torch.set_num_threads(1)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32).eval()
    for name, layer in model.named_modules():
        if base != "bf16" and isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layer.weight.data = (_as_fp8 if base == "fp8" else _as_nf4)(layer.weight.data)
    return model


def _as_fp8(weight: Any) -> Any:
    """Round to float8 e4m3 with one scale for every row, as vLLM's FP8 does to weights."""
    import torch

    kind = torch.float8_e4m3fn
    scale = weight.abs().amax(1, keepdim=True) / torch.finfo(kind).max
    return (weight / scale).to(kind).to(weight.dtype) * scale


def _as_nf4(weight: Any) -> Any:
    import bitsandbytes.functional as bnb  # type: ignore[import-not-found,unused-ignore]

    quantized, state = bnb.quantize_4bit(weight, blocksize=_BLOCK, quant_type="nf4", compress_statistics=True)
    return bnb.dequantize_4bit(quantized, state).to(weight.dtype)


# --- cells ----------------------------------------------------------------------------------------------------------


def _reference(run: Run, task: str) -> np.ndarray:
    """Return log probabilities (items, vocabulary) on the base in bf16 with the LoRA."""
    from lrconvert import api

    kept = run.work / f"goal-{task}-{TASKS[task]}.npy"
    if not kept.exists():
        model = _model(run, "bf16")
        api.attach(model, api.load_lora(_adapter(run, task, "LoRA")))
        partial = kept.with_name(f"{kept.name}.partial.npy")
        np.save(partial, np.concatenate(list(answers.logs(model, _tokenizer(run.base), _held(run, task)))))
        partial.replace(kept)
    goal: np.ndarray = np.load(kept, mmap_mode="r")
    return goal


def _logs(run: Run, task: str, base: str, adapter: str) -> Iterator[np.ndarray]:
    """Yield log probabilities in the order of `Held`."""
    held = _held(run, task)
    if base in GGUF:
        texts = [(held.tokens[n].ids, held.tokens[n].prompt) for n in held.order]
        path = _gguf_adapter(run, task, adapter)
        with contextlib.closing(llamacpp.Model(_gguf_base(run, base), path)) as model:
            yield from llamacpp.logs(model, texts)
        return
    from lrconvert import api

    model, source = _model(run, base), _adapter(run, task, adapter)
    if source is not None:
        api.attach(model, api.load_lora(source) if adapter == "LoRA" else api.read(source))
    yield from answers.logs(model, _tokenizer(run.base), held)


def measured(run: Run, task: str, base: str, adapter: str) -> dict[str, Any]:
    """Return the mean KL from the reference and the share of equal first choices, each with its interval."""
    goal, held, at = _reference(run, task), _held(run, task), 0
    far, same = [], []
    for batch in _logs(run, task, base, adapter):
        wanted = goal[at : at + len(batch)]
        far.append(np.sum(np.exp(wanted) * (wanted - batch), axis=1, dtype=np.float64))
        same.append(batch.argmax(1) == wanted.argmax(1))
        at += len(batch)
    assert at == len(goal)
    texts = held.texts()
    by_text = functools.partial(np.bincount, texts, minlength=int(texts.max()) + 1)
    row: dict[str, Any] = {
        "kl": intervals.share(by_text(np.concatenate(far)), by_text(np.ones(at))),
        "agreement": intervals.share(by_text(np.concatenate(same).astype(np.float64)), by_text(np.ones(at))),
        "items": at,
        "texts": len(held.examples),
    }
    source = _adapter(run, task, adapter)
    return row | ({"bytes": source.stat().st_size} if source is not None and source.is_file() else {})


def wanted(run: Run) -> Iterator[cells.Cell]:
    for task in TASKS:
        for base in BASES:
            for adapter in ADAPTERS:
                yield f"{task}, {base}, {adapter}", functools.partial(measured, run, task, base, adapter)


def table() -> str:
    """Return the table of docs/quantized-bases.md."""
    done = cells.read(NAME)
    rows = []
    for task in TASKS:
        for base in BASES:
            row = [done.get(f"{task}, {base}, {adapter}") for adapter in ADAPTERS]
            if any(row):
                name = re.split(" as a|:", tasks.TASKS[task].title)[0]
                rows.append([f"{name}, {base}", *map(_shown, row)])
    return cells.markdown(["task, base", "base alone", "the LoRA", *(f"at {name}" for name in ADAPTERS[2:])], rows)


def _shown(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run"
    middle, low, high = row["kl"]
    digits = 2 if middle >= 1 else 3 if middle >= 0.1 else 4
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}], {100 * row['agreement'][0]:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = cells.HERE / ".cache" / "chat"
    parser.add_argument("--base", type=Path, default=cache / "base", help="the chat model")
    parser.add_argument("--folder", type=Path, default=cache, help="that of evidence.py")
    parser.add_argument("--work", type=Path, default=cache / "served", help="what is kept between runs")
    parser.add_argument("--only", default="", help="a pattern that cell names must contain")
    parser.add_argument("--again", action="store_true", help="measure cells that are there, too")
    parser.add_argument("--render", action="store_true", help="write the table and measure nothing")
    given = parser.parse_args()
    if given.render:
        cells.render(NAME, table())
        return
    if why := llamacpp.absent():
        raise SystemExit(f"{why}: python tests/peers/make.py llamacpp xllamacpp")
    given.work.mkdir(parents=True, exist_ok=True)
    cells.measure(NAME, wanted(Run(given.base, given.folder, given.work)), only=given.only, again=given.again)


if __name__ == "__main__":
    main()
