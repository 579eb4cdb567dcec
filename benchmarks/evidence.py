"""What compact forms keep of LoRAs of a real chat model, beside what others do with the same bytes.

    python benchmarks/evidence.py --base BASE                         trains the LoRAs that are missing, measures cells
    python benchmarks/evidence.py --base BASE --only "sst2, 1.6.*lowrank"   some cells
    python benchmarks/evidence.py --render                            writes docs/evidence.md, its picture, README.md

BASE is SmolLM2-135M-Instruct as a Hugging Face folder (the script for it is among the project's shared assets). LoRAs,
refits and the teacher's answers are kept in ``--folder``; what is there is not made again, and a refinement that was
stopped goes on. A cell is measured again where anything differs that changes its numbers: `Setting`.

A size is that of the whole file as a share of the LoRA's factors at 16 bit. Refits use the statistics of texts that
trained the LoRA, and the strength that `compress` chooses without data; refinement sees as many of those texts as its
steps read once.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cells
import picture
from chat import answers, loras, tasks
from chat.page import FORMS, page, summary

NAME = "evidence"
SHARES = (4.0, 1.6, 0.8, 0.4, 0.2)
_PLAIN = " without statistics"
PEERS = ("SVD at int8", "SVD at int4", "SVD at 2 bit", "LoRAQuant", "LoRA-XS", "Uni-LoRA")
TRAINED_PEERS = ("LoRA-XS", "Uni-LoRA")
ORDER = ("e2e", "sst2", "trec", "gsm8k", "cola")  # of worth, as sizes below
SHARES_BY_WORTH = (1.6, 0.8, 0.4, 4.0, 0.2)
HALF = loras.STEPS // 2  # steps of refinement
_STATISTICS_TOKENS = 1 << 14
_OUT = cells.ROOT / "docs" / "evidence.md"


@dataclass(frozen=True)
class Run:
    """Where things are kept, and how large the measurement is. `held`: examples that are held out, at most."""

    base: Path
    folder: Path
    held: int
    steps: int = HALF
    batch_tokens: int = loras.BATCH_TOKENS


@dataclass(frozen=True)
class Setting:
    """All that a cell's numbers depend on: `code` is the commit that last changed the package or the peers."""

    task: str
    share: float
    form: str
    mode: str
    seed: int
    held: int
    steps: int
    batch_tokens: int
    statistics_tokens: int
    code: str
    base: str
    lora: str
    strength: str = "by the captured share"

    @property
    def cell(self) -> str:
        steps = f", {self.steps} steps" if self.mode == "refined" and self.steps != HALF else ""
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.task}, {self.share:g}%, {self.form}, {self.mode}{steps}{seed}"

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def refined_key(self) -> str:
        """The key of a refinement: how much is held out changes its measurement alone."""
        return replace(self, held=0).key


def code_commit() -> str:
    """Return the commit that last changed what is measured."""
    places = ("lrconvert", "benchmarks/chat", ":!benchmarks/chat/page.py")
    words = ["git", "log", "-1", "--format=%h", "--", *places]
    done = subprocess.run(words, cwd=cells.ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def lora_digest(run: Run, name: str) -> str:
    return digest_of(run.folder / "lora" / name / "adapter_model.safetensors")


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else "absent"


# --- teachers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Teacher:
    """A task with its LoRA. `seen`: what refinement gets."""

    task: tasks.Task
    folder: Path
    adapter: Path
    seen: Path
    split: tasks.Split


@functools.cache
def _tokenizer(base: Path) -> Any:
    from lrconvert.live.load_model import load_tokenizer

    return load_tokenizer(base)


def teacher_of(run: Run, name: str) -> Teacher | str:
    """Return the teacher of a task, trained where that is still to do; or why there is none."""
    task = tasks.TASKS[name]
    absent = [needed for needed in task.needed if not (cells.ASSETS / needed).exists()]
    if absent:
        return f"the shared asset {absent[0]} is not here"
    if not (run.base / "config.json").exists():
        return f"there is no base in {run.base.name}"
    split = task.read(cells.ASSETS / "data")
    adapter, kept = run.folder / "lora" / name, run.folder / "work" / name
    kept.mkdir(parents=True, exist_ok=True)
    loras.train(run.base, task, split.seen, adapter)
    seen = kept / f"seen-{run.steps}.jsonl"
    if not seen.exists():
        loras.write_examples(seen, _tokenizer(run.base), task, _once_read(run, task, split.seen))
    return Teacher(task, kept, adapter, seen, split)


def _once_read(run: Run, task: tasks.Task, examples: Sequence[tasks.Example]) -> list[tasks.Example]:
    """Return as many examples as all steps read once, and a tenth more, which is held out to choose the best step."""
    left, taken = 1.1 * run.steps * run.batch_tokens, []
    for example in examples:
        left -= len(loras.tokens_of(_tokenizer(run.base), task, example).ids)
        if left < 0:
            break
        taken.append(example)
    return taken


def statistics_of(run: Run, teacher: Teacher) -> Any:
    from lrconvert import api

    path = teacher.folder / f"seen-{_STATISTICS_TOKENS}.stats"
    if not path.exists():
        api.statistics(run.base, teacher.seen, path, adapter=teacher.adapter, max_tokens=_STATISTICS_TOKENS)
    return api.load_statistics(path)


# --- cells ----------------------------------------------------------------------------------------------------------


def _refit(run: Run, teacher: Teacher, lora: Any, setting: Setting) -> tuple[Any, dict[str, Any]]:
    """Return the refit, its method and its strength; kept by the code that made it."""
    from lrconvert import api
    from lrconvert.convert.strength import strength_without_data

    kept = teacher.folder / f"{setting.form.replace(' ', '-')}-{setting.share}-{setting.code}.lrc"
    about = kept.with_suffix(".json")
    if not about.exists():
        size = int(lora.half_bytes * setting.share / 100)
        form = setting.form.removesuffix(_PLAIN)
        methods: tuple[tuple[str, dict[str, Any]], ...] = ((form, {}),)
        if form == "sbora or bone":
            methods = (("sbora", {}), ("bone", {"shard": "auto"}))
        given = {"target_size": size, "statistics": statistics_of(run, teacher) if form == setting.form else None}
        made, refused = [], []
        for method, options in methods:
            try:
                made.append((api.convert(lora, method, **given, **options), method, options))
            except api.LrcError as error:
                refused.append(error)
        if not made:
            raise refused[0]
        best, method, options = max(made, key=lambda fit: fit[0].fidelity.captured)
        strength = strength_without_data(method, best.fidelity.captured)
        if strength != 1:
            best = api.convert(lora, method, **given, **options, strength=strength)
        api.write(best.compact, kept, overwrite=True)
        about.write_text(json.dumps({"method": best.compact.method, "strength": round(strength, 3)}))
    return api.read(kept), json.loads(about.read_text())


def _refined(run: Run, teacher: Teacher, lora: Any, compact: Any, setting: Setting) -> tuple[Any, dict[str, Any]]:
    from lrconvert import api

    out = teacher.folder / f"refined-{setting.refined_key}.lrc"
    if out.exists():
        return api.read(out), {"steps": run.steps}
    made = api.refine(
        compact, lora, run.base, teacher.seen, out,
        steps=run.steps, batch_tokens=run.batch_tokens, seed=setting.seed, layerwise=False, checkpoint_every=25,
        resume=Path(f"{out}.partial").exists(), overwrite=True,
    )  # fmt: skip
    return made.compact, {"steps": made.steps, "best_step": made.best_step}


def _peer(run: Run, teacher: Teacher, lora: Any, setting: Setting) -> tuple[Any, int, dict[str, Any]]:
    from chat.peers import distil, lora_xs, loraquant, svd_resize, uni_lora

    size = int(lora.half_bytes * setting.share / 100)
    if setting.form == "LoRAQuant":
        return *loraquant.quantized(lora, size), {}
    if setting.form not in TRAINED_PEERS:
        bits = {"int8": 8, "int4": 4, "2 bit": 2}[setting.form.removeprefix("SVD at ")]
        return *svd_resize.resized(lora, size, bits), {}
    schedule = distil.Schedule(run.steps, run.batch_tokens, uni_lora._RATE, setting.seed)
    if setting.form == "Uni-LoRA":
        return uni_lora.trained(lora, size, run.base, teacher.seen, schedule)
    schedule = distil.Schedule(run.steps, run.batch_tokens, lora_xs._RATE, setting.seed)
    return lora_xs.trained(lora, size, run.base, teacher.seen, schedule if setting.mode == "refined" else None)


def measured(run: Run, setting: Setting) -> dict[str, Any]:
    """Measure a cell."""
    from lrconvert import api
    from lrconvert.formats.lrc import file
    from lrconvert.live.load_model import load_model
    from lrconvert.live.zero_point import without_updates

    teacher = teacher_of(run, setting.task)
    if isinstance(teacher, str):
        return {"skipped": teacher}
    lora = api.load_lora(teacher.adapter)
    start, row = time.process_time(), dict[str, Any]()
    try:
        if setting.form in PEERS:
            adapter, nbytes, row = _peer(run, teacher, lora, setting)
        else:
            adapter, row = _refit(run, teacher, lora, setting)
            if setting.mode == "refined":
                adapter, more = _refined(run, teacher, lora, adapter, setting)
                row |= more
            nbytes = file.sizes(adapter).adapter
    except (api.LrcError, ValueError) as error:
        return {"refused": str(error).splitlines()[0]}
    row |= {"bytes": nbytes, "share": round(100 * nbytes / lora.half_bytes, 4)}
    row["bits_per_component"] = round(8 * nbytes / sum(pair.rank for pair in lora.targets), 2)
    row["cpu_seconds"] = round(time.process_time() - start, 1)
    model, tokenizer = load_model(run.base), _tokenizer(run.base)
    held = answers.Held.of(teacher.task, tokenizer, teacher.split.held[: setting.held])
    logs, base, goal = answers.reference(teacher.folder, model, tokenizer, held, without_updates(lora), lora)
    api.attach(model, adapter)
    from chat import metrics

    return row | metrics.measured(base, goal, answers.measure(model, tokenizer, held, logs))


def settings(run: Run) -> Iterator[Setting]:
    """All cells, in an order of worth: the first tasks, forms and sizes, refits before refinements, seeds last."""
    code, base = code_commit(), digest_of(run.base / "model.safetensors")

    def rows(
        names: Sequence[str], forms: Sequence[str], modes: Sequence[str], seeds: Sequence[int]
    ) -> Iterator[Setting]:
        for mode in modes:
            for name in names:
                lora = lora_digest(run, name)
                for share in SHARES_BY_WORTH:
                    for form in forms:
                        for seed in seeds:
                            yield Setting(
                                name, share, form, mode, seed, run.held, run.steps, run.batch_tokens,
                                _STATISTICS_TOKENS, code, base, lora,
                            )  # fmt: skip

    first, fixed = FORMS[:2], [peer for peer in PEERS if peer != "Uni-LoRA"]
    for names in (ORDER[:2], ORDER[2:]):
        yield from rows(names, first, ("refit",), (0,))
        yield from rows(names, fixed, ("refit",), (0,))
        yield from rows(names, [form + _PLAIN for form in first], ("refit",), (0,))
        yield from rows(names, first, ("refined",), (0,))
        yield from rows(names, FORMS[2:], ("refit",), (0,))
        yield from rows(names, TRAINED_PEERS, ("refined",), (0,))
        yield from rows(names, FORMS[2:], ("refined",), (0,))
    yield from rows(ORDER, first, ("refined",), (1, 2))


def missing(
    wanted: Iterator[Setting], done: dict[str, dict[str, Any]], only: str, any_commit: bool
) -> Iterator[Setting]:
    """Yield the settings that were not measured: no line has their key, nor with `any_commit` their name."""
    keys = {row["key"] for row in done.values()}
    for setting in wanted:
        is_done = setting.key in keys or (any_commit and setting.cell in done)
        if re.search(only, setting.cell) and not is_done:
            yield setting


def table() -> str:
    """Return the summary in README.md."""
    return summary(cells.read(NAME))


def rendered() -> str:
    """Return docs/evidence.md."""
    import encoder_evidence

    return page(cells.read(NAME), encoder_evidence.table())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=cells.HERE / ".cache" / "chat" / "base", help="the chat model")
    parser.add_argument("--folder", type=Path, default=cells.HERE / ".cache" / "chat", help="what is kept between runs")
    parser.add_argument("--held", type=int, default=100_000, help="examples that are held out, at most")
    parser.add_argument("--steps", type=int, default=HALF, help="of refinement; half of the LoRA's own if not given")
    parser.add_argument("--only", default="", help="a pattern that cell names must contain")
    parser.add_argument("--any-commit", action="store_true", help="what other commits measured is done, too")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no cell after so long")
    parser.add_argument("--render", action="store_true", help="write the tables and measure nothing")
    given = parser.parse_args()
    if given.render:
        _OUT.write_text(rendered())
        picture.write()
        cells.render(NAME, table())
        return
    run = Run(given.base, given.folder, given.held, given.steps)
    end = time.monotonic() + 60 * given.minutes
    for wanted in list(missing(settings(run), cells.read(NAME), given.only, given.any_commit)):
        if time.monotonic() > end:
            break
        teacher_of(run, wanted.task)  # trained now, at the latest: its digest is a part of the key
        setting, start = replace(wanted, lora=lora_digest(run, wanted.task)), time.perf_counter()
        row = {"cell": setting.cell, "key": setting.key, **measured(run, setting)}
        row |= {"wall_seconds": round(time.perf_counter() - start, 1), "setting": asdict(setting)}
        row |= {"commit": setting.code, "machine": cells.machine()}
        cells.RESULTS.mkdir(exist_ok=True)
        with (cells.RESULTS / f"{NAME}.jsonl").open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps({k: v for k, v in row.items() if k not in ("setting", "machine", "key")}), flush=True)


if __name__ == "__main__":
    main()
