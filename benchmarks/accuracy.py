"""What refinement wins back: every form at equal bytes, refitted, refined, and trained from a random start.

    python benchmarks/accuracy.py                          measures what is missing (teachers are trained at first)
    python benchmarks/accuracy.py --only "trec, 1.6.*lowrank"   some cells
    python benchmarks/accuracy.py --render                 writes the table of docs/benchmarks.md

A size is the payload's share of the LoRA's factors at 16 bit. Refinement sees the texts that trained the LoRA, at most
half as many steps of as many tokens; what it holds out to choose the best of its steps is a part of these. All numbers
are of texts that neither has seen: the share of the KL distance between base and LoRA that is closed (heads that the
LoRA carries are on the base, too), how often the first choice is the LoRA's, and for classes the share of the LoRA's
gain in accuracy. Intervals are of 1,000 paired bootstrap samples of the texts, 95 %. "From scratch" is the same file
with random numbers of a tenth of their size in the place of the fitted ones, trained on the same goals for as many
steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cells
import forms
import intervals
import numpy as np
import teachers
from forms import converted, statistics_of

SHARES = {"trec": (8.0, 4.0, 1.6), "sst2": (4.0, 1.6), "e2e": (8.0, 4.0)}
STEPS = {"trec": 250, "sst2": 250, "e2e": 450}  # half of the teachers'
BATCH_TOKENS = {
    "trec": 448,
    "sst2": 768,
    "e2e": 1024,
}  # 32 questions or sentences, 12 descriptions: the teachers' batches
FORMS = {name: forms.FORMS[name] for name in ("lowrank", "vblora", "nola", "sbora", "bone")}
MODES = ("refit", "refined", "from scratch")
VIT_SHARE = 8.0  # a LoRA of 1,024 numbers
VIT_FORMS = ("lowrank", "vblora", "nola")
_FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


# --- answers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Answers:
    """Log probabilities (items, classes) of a model, the text that each item is of, and its class (-1: none)."""

    logs: np.ndarray
    texts: np.ndarray
    labels: np.ndarray


def _answers(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, str]]) -> Answers:
    """What a model answers: a class for each text, or a token after each token."""
    import torch

    classes = {str(k): int(n) for k, n in (model.config.label2id or {}).items()}
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    logs, texts, labels = [], [], []
    with torch.no_grad():
        for at in range(0, len(rows), 50):
            part = rows[at : at + 50]
            batch = tokenizer(
                [r["text"] for r in part], return_tensors="pt", padding=True, truncation=True, max_length=160
            )
            answers = model(**batch).logits.float().log_softmax(-1)
            if answers.dim() == 2:
                where = torch.arange(len(part))
                labels.append(np.array([classes.get(r.get("label", ""), -1) for r in part]))
            else:
                mask = batch["attention_mask"].bool()
                where, answers = torch.nonzero(mask)[:, 0], answers[mask]
                labels.append(np.full(len(answers), -1))
            logs.append(answers.numpy())
            texts.append(at + where.numpy())
    return Answers(np.concatenate(logs), np.concatenate(texts), np.concatenate(labels))


def _model(teacher: teachers.Teacher) -> tuple[Any, Any]:
    from lrconvert.live.load_model import load_model, load_tokenizer

    return load_model(teacher.base), load_tokenizer(teacher.base)


def _held(teacher: teachers.Teacher) -> list[dict[str, str]]:
    return [json.loads(line) for line in teacher.held.read_text().splitlines()]


def _reference(teacher: teachers.Teacher) -> tuple[Answers, Answers]:
    """Return the answers of the base and of the base with the LoRA, kept in the cache."""
    from lrconvert import api
    from lrconvert.live.zero_point import without_updates

    path = teacher.base.parent / "answers.npz"
    if not path.exists():
        model, tokenizer = _model(teacher)
        lora = api.load_lora(teacher.adapter)
        api.attach(model, without_updates(lora))
        base = _answers(model, tokenizer, _held(teacher))
        api.detach(model)
        api.attach(model, lora)
        goal = _answers(model, tokenizer, _held(teacher))
        np.savez(path, base=base.logs, goal=goal.logs, texts=base.texts, labels=base.labels)
    kept = np.load(path)
    return tuple(Answers(kept[name], kept["texts"], kept["labels"]) for name in ("base", "goal"))  # type: ignore[return-value]


def _scores(base: Answers, goal: Answers, ours: Answers) -> dict[str, Any]:
    """Return the share of the KL closed, agreement, accuracy gain, each with its interval."""

    def kl(answers: Answers) -> np.ndarray:
        return (np.exp(goal.logs) * (goal.logs - answers.logs)).sum(axis=1, dtype=np.float64)

    def hits(answers: Answers) -> np.ndarray:
        return (answers.logs.argmax(1) == answers.labels).astype(np.float64)

    texts = int(base.texts.max()) + 1

    def by_text(values: np.ndarray) -> np.ndarray:
        return np.bincount(base.texts, values, texts)

    items = by_text(np.ones(len(base.texts)))
    far, near = by_text(kl(base)), by_text(kl(ours))
    same = by_text((ours.logs.argmax(1) == goal.logs.argmax(1)).astype(np.float64))
    scores: dict[str, Any] = {"closed": intervals.share(near, far, one_minus=True)}
    scores |= {"agreement": intervals.share(same, items), "items": len(base.texts)}
    if (base.labels >= 0).all():
        before, after, now = (by_text(hits(answers)) for answers in (base, goal, ours))
        scores |= {
            "gain": intervals.share(now - before, after - before),
            "accuracy": round(float(now.sum() / texts), 4),
        }
        scores |= {"accuracies": [round(float(x.sum() / texts), 4) for x in (before, after)]}
    return scores


# --- what is compared -----------------------------------------------------------------------------------------------


def _random_start(compact: Any, seed: int) -> Any:
    """The same file with random numbers."""
    from lrconvert.lora import packing
    from lrconvert.methods import base as methods

    rng, tensors = np.random.default_rng(seed), {}
    for spec in methods.get(compact.method).specs(compact.config, compact.targets):
        old = compact.tensors[spec.name]
        if spec.kind == "code":
            tensors[spec.name] = rng.integers(1 << spec.bits, size=old.shape).astype(old.dtype)
        elif spec.kind == "coded":  # as large as they were, so that they are coded as before
            tensors[spec.name] = rng.permutation(old) * rng.choice(np.array([-1, 1], old.dtype), old.shape)
        elif spec.kind != "index":
            size = 0.1 * np.sqrt(np.mean(np.square(old, dtype=np.float64)))
            even = spec.name in ("scales", "gains", "base_scales")
            numbers = np.full(old.shape, size) if even else size * rng.standard_normal(old.shape)
            tensors[spec.name] = packing.round_half(numbers.astype(np.float32))
        elif compact.method == "sbora":
            tensors[spec.name] = _random_places(compact, rng)
        else:
            tensors[spec.name] = rng.integers(spec.limit, size=old.shape).astype(old.dtype)
    return replace(compact, tensors=tensors)


def _random_places(compact: Any, rng: np.random.Generator) -> np.ndarray:
    """SBoRA's columns and rows as published: random ones."""
    places_of_all: list[int] = []
    for target, row, by_rows in zip(compact.targets, compact.config.counts, compact.config.by_rows, strict=True):
        places = rng.permutation(target.matrix_shape[not by_rows]).tolist()
        for count in row:
            places_of_all += sorted(places[:count])
            places = places[count:]
    return np.array(places_of_all, np.uint32)


def _fitted(teacher: teachers.Teacher, lora: Any, form: str, share: float) -> Any:
    """The refit, kept in the cache."""
    from lrconvert import api

    path = teacher.base.parent / f"{form}-{share}.lrc"
    if not path.exists():
        method, options = FORMS[form]
        api.write(converted(lora, method, options, share, statistics_of(teacher, teacher.seen)).compact, path)
    return api.read(path)


def _cell(name: str, form: str, share: float, mode: str, seed: int) -> dict[str, Any]:
    from lrconvert import api
    from lrconvert.core.errors import BudgetError
    from lrconvert.formats.lrc import file

    teacher = teachers.get(name)
    if isinstance(teacher, str):
        return {"skipped": teacher}
    lora = api.load_lora(teacher.adapter)
    try:
        compact = _fitted(teacher, lora, form, share)
    except BudgetError as error:
        return {"refused": str(error)}
    sizes = file.sizes(compact)
    row: dict[str, Any] = {"payload": sizes.payload, "overhead": sizes.overhead}
    start = time.process_time()
    if mode != "refit":
        made = api.refine(
            compact if mode == "refined" else _random_start(compact, seed),
            lora,
            teacher.base,
            teacher.seen,
            steps=STEPS[name],
            batch_tokens=BATCH_TOKENS[name],
            layerwise=mode == "refined",
            seed=seed,
        )
        compact = made.compact
        row |= {"steps": made.steps, "best_step": made.best_step, "layerwise": made.layerwise}
    row["cpu_seconds"] = round(time.process_time() - start, 1)
    return row | scores_of(teacher, compact)


def scores_of(teacher: teachers.Teacher, compact: Any) -> dict[str, Any]:
    """Return what a compact adapter keeps of the teacher's answers on what is held out."""
    from lrconvert import api

    model, tokenizer = _model(teacher)
    base, goal = _reference(teacher)
    api.attach(model, compact)
    return _scores(base, goal, _answers(model, tokenizer, _held(teacher)))


def _vit_images(seed: int, count: int) -> list[dict[str, Any]]:
    """Batches of 16 images of noise, as the fixture's model takes them."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(16, 3, 16, 16, generator=draw)} for _ in range(count)]


def _vit(form: str, mode: str) -> dict[str, Any]:
    """A vision transformer at the size of a fixture, through batches of model inputs."""
    import torch

    from lrconvert import api
    from lrconvert.formats.lrc import file
    from lrconvert.live.load_model import load_model
    from lrconvert.live.zero_point import without_updates

    base, lora = _FIXTURES / "bases/tiny-vit", api.load_lora(_FIXTURES / "adapters/vit-plain")
    model, held = load_model(base), _vit_images(1, 32)

    def answers() -> Answers:
        with torch.no_grad():
            logs = torch.cat([model(**batch).logits.log_softmax(-1) for batch in held]).numpy()
        return Answers(logs, np.arange(len(logs)), np.full(len(logs), -1))

    api.attach(model, without_updates(lora))
    plain = answers()
    api.detach(model)
    api.attach(model, lora)
    goal = answers()
    api.detach(model)
    method, options = FORMS[form]
    goal_bytes, size = int(lora.half_bytes * VIT_SHARE / 100), 3000  # most of such a file is overhead
    while (done := api.convert(lora, method, target_size=size, **options)).sizes.payload > goal_bytes:
        size -= done.sizes.payload - goal_bytes
    compact = done.compact
    if mode != "refit":
        start = compact if mode == "refined" else _random_start(compact, 0)
        compact = api.refine(start, lora, base, _vit_images(0, 64), steps=200, layerwise=mode == "refined").compact
    api.attach(model, compact)
    return {"payload": file.sizes(compact).payload, **_scores(plain, goal, answers())}


def all_cells() -> Iterator[cells.Cell]:
    """The sizes of the issue first, the best forms' further seeds last."""
    wanted = [
        (name, form, share, mode, 0)
        for mode in MODES
        for name in teachers.names()
        for share in sorted(SHARES[name], key=lambda s: s == 8.0)
        for form in FORMS
    ]
    wanted += [("trec", form, share, "refined", seed) for seed in (1, 2) for share in (1.6, 4.0) for form in FORMS]
    for name, form, share, mode, seed in wanted:
        label = f"{name}, {share}%, {form}, {mode}" + (f", seed {seed}" if seed else "")
        yield label, lambda a=(name, form, share, mode, seed): _cell(*a)
    for form in VIT_FORMS:
        for mode in MODES:
            yield f"vit, {VIT_SHARE}%, {form}, {mode}", lambda a=(form, mode): _vit(*a)


# --- the table ------------------------------------------------------------------------------------------------------


def _shown(cell: dict[str, Any] | None, others: Sequence[dict[str, Any]] = ()) -> str:
    """A cell, and what `others` of other seeds have closed."""
    if cell is None:
        return "not run"
    if "closed" not in cell:
        return "too small" if "refused" in cell else "skipped"
    share, low, high = cell["closed"]
    also = "".join(f"; {other['closed'][0]:.1%}" for other in others)
    text = f"{share:.1%} ({low:.1%} to {high:.1%}{also}), {cell['agreement'][0]:.1%}"
    return text + (f", {cell['gain'][0]:.0%}" if "gain" in cell else "")


def table() -> str:
    done = cells.read("accuracy")
    rows, missing = [], []
    for name, shares in {**SHARES, "vit": (VIT_SHARE,)}.items():
        for share in shares:
            for form in FORMS if name != "vit" else VIT_FORMS:
                label = f"{name}, {share}%, {form}"
                by_mode = [done.get(f"{label}, {mode}") for mode in MODES]
                title = f"{name}, {share:g} %, {form}"
                if not any(by_mode):
                    missing.append(title)
                    continue
                seeds = [c for n in (1, 2) if (c := done.get(f"{label}, refined, seed {n}")) is not None]
                seconds = f"{by_mode[1]['cpu_seconds']:.0f} s" if by_mode[1] and "cpu_seconds" in by_mode[1] else ""
                rows.append([title, _shown(by_mode[0]), _shown(by_mode[1], seeds), _shown(by_mode[2]), seconds])
    head = ["model, size, form", "refit", "refit and refined", "from scratch", "CPU time of refining"]
    absent = f"\n\nNot run: {'; '.join(missing)}." if missing else ""
    return cells.markdown(head, rows) + absent


if __name__ == "__main__":
    cells.main("accuracy", __doc__, all_cells, table)
