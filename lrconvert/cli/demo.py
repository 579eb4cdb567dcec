"""`lrconvert demo`: every command of the main job on the bundled pair, then what it did to the model's answers."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from lrconvert.cli import flags
from lrconvert.cli.printing import say
from lrconvert.core.errors import printable
from lrconvert.io.durable import check_output, make_folder
from lrconvert.report.tables import table

HERE = Path(__file__).resolve().parent.parent / "demo"
RATIO, STEPS = 30, 100
_HELD_OUT = 100  # texts


@flags.command("demo", flags.output("Keep the files in this new folder.", required=False))
@click.pass_context
def demo(context: click.Context, output: Path | None) -> None:
    """Run the whole pipeline on the bundled model and LoRA, and print what it measures."""
    run(context.find_root().command, output, say)


def run(cli: click.Command, output: Path | None, echo: Callable[[str], None]) -> None:
    """Run the pipeline, printing each command of the group `cli` as a user would type it and what it answers.

    The files go to `output` (a new folder), or to a temporary one that is removed at the end.
    """
    with ExitStack() as stack:
        if output is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrconvert-demo-")))
        else:
            check_output(output, overwrite=False)
            make_folder(output)
            folder = output

        def step(*words: str | Path) -> None:
            shown = [_short(w, folder) for w in words]
            echo(f"\n$ lrconvert {printable(shlex.join(shown), 2000)}")
            cli.main(args=[str(w) for w in words], standalone_mode=False)

        base, adapter = HERE / "base", HERE / "adapter"
        vblora, lowrank, refined = (folder / f"{name}.lrc" for name in ("vblora", "lowrank", "refined"))
        train, seen = HERE / "train.jsonl", folder / "base.stats"
        step("inspect", adapter)
        step("statistics", base, "--data", train, "-o", seen)
        made = "--target-ratio", str(RATIO), "--base", base, "--statistics", seen
        step("lora-to-vblora", adapter, "-o", vblora, *made)
        step("lora-to-lowrank", adapter, "-o", lowrank, *made)
        step("validate", vblora, lowrank, "--base", base)
        step("compare", adapter, vblora, lowrank, "--statistics", seen)
        taught = "--base", base, "--teacher", adapter, "--data", train
        step("refine", vblora, *taught, "-o", refined, "--steps", str(STEPS))
        step("export", refined, "-o", folder / "exported", "--to", "peft-lora", "--source", adapter)
        merged = {"base": base}
        files = {"lowrank": lowrank, "vblora": vblora, "refined": refined}
        for name, source in {"LoRA": adapter, **files}.items():
            step("merge-into-base", base, source, "-o", folder / f"merged-{name}")
            merged[name] = folder / f"merged-{name}"
        echo(f"\nWhat the models answer, on {_HELD_OUT} texts that none of them was trained on:\n")
        echo(answers(merged, adapter_bytes={"LoRA": _factor_bytes(adapter), **files}))
        echo(
            "\nlowrank and vblora are fits alone, by what flows into the layers; low rank is the baseline to beat at "
            f"equal bytes. refined is vblora after {STEPS} steps of learning to answer as the LoRA does."
        )
        if output is not None:
            echo(f"\nThe files are in {printable(str(output))}")


def _short(word: str | Path, folder: Path) -> str:
    """A word as a user standing in `folder` would type it."""
    if isinstance(word, str):
        return word
    return str(word.relative_to(folder)) if word.is_relative_to(folder) else f"demo/{word.name}"


def _factor_bytes(adapter: Path) -> int:
    from lrconvert import api

    return api.load_lora(adapter).half_bytes


def answers(models: dict[str, Path], adapter_bytes: dict[str, Any]) -> str:
    """A table: held-out loss (nats per token), token accuracy, and agreement with the LoRA's own answers."""
    texts = [json.loads(line)["text"] for line in (HERE / "heldout.jsonl").read_text().splitlines()[:_HELD_OUT]]
    measured = {name: _measure(path, texts) for name, path in models.items()}
    teacher = measured["LoRA"][2]
    rows = []
    for name, (loss, accuracy, picks) in measured.items():
        size = adapter_bytes.get(name)
        shown = size.stat().st_size if isinstance(size, Path) else size
        agreement = sum(a == b for a, b in zip(picks, teacher, strict=True)) / len(teacher)
        rows.append([name, f"{shown:,}" if shown else "-", f"{loss:.3f}", f"{accuracy:.1%}", f"{agreement:.1%}"])
    return table(["model", "adapter bytes", "loss", "token accuracy", "agrees with the LoRA"], rows)


def _measure(model_path: Path, texts: Sequence[str]) -> tuple[float, float, list[int]]:
    """(mean loss, accuracy, predicted tokens) of next-token prediction on `texts`."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model.train(False)
    losses, hits, picks = [], [], []
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            logits = model(ids).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
            best = logits.argmax(-1)
            hits.append(best == ids[0, 1:])
            picks += best.tolist()
    return torch.cat(losses).mean().item(), torch.cat(hits).float().mean().item(), picks
