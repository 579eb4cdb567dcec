"""Answers of a file, text by text, beside those of base and LoRA, with intervals: the numbers of `compress`'s verdict.

Texts that chose a form or a strength flatter it. So a part of what would be trained on is set aside first, where there
is enough of it, and measures the winner alone. Intervals are of paired bootstrap samples of texts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lrconvert.convert.verdict import Judged
from lrconvert.formats.fidelity import FEWEST
from lrconvert.live import attach
from lrconvert.live.answers import AnswerSums, Outputs
from lrconvert.live.text_sums import TextSums, scores, share
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.refine.attached_student import NAME
from lrconvert.refine.data import Pool
from lrconvert.refine.evaluation import TEACHER, ZERO
from lrconvert.refine.losses import Batch
from lrconvert.refine.session import RefineSession

_MOST = 0.2  # of what is trained on, which may be set aside


def set_aside(session: RefineSession, seed: int) -> tuple[RefineSession, Pool | None]:
    """Return the session without a part of its training texts, and that part: as many as are held out, or `FEWEST`,
    within a fifth; None where that is none. Equal texts stay on one side."""
    pool = session.split.train
    groups: dict[object, list[int]] = {}
    for n in range(len(pool)):
        groups.setdefault(pool.examples[n].ids if pool.examples else n, []).append(n)
    wanted = min(int(_MOST * len(pool)), max(FEWEST, len(session.split.held_out)))
    apart: list[int] = []
    order = np.random.default_rng((seed, 0xFAC7)).permutation(len(groups))
    rows = list(groups.values())
    for n in map(int, order):
        if len(apart) + len(rows[n]) <= wanted:
            apart += rows[n]
    if not apart:
        return session, None
    kept = sorted(set(range(len(pool))) - set(apart))
    split = replace(session.split, train=pool.subset(kept))
    return replace(session, split=split), pool.subset(sorted(apart))


def judge(
    session: RefineSession,
    pool: Pool,
    adapter: CompactAdapter | LoraAdapter,
    batch_tokens: int,
    *,
    is_fresh: bool,
    by_lora: bool = False,
) -> Judged:
    """Measure an adapter's answers on the texts of `pool` beside those of base and LoRA."""
    model = session.teacher_model.model
    with attach.temporarily(model, {NAME: adapter}), torch.no_grad():
        sums, is_logits = _sums(session, pool, batch_tokens)
    base, ours, goal = (sums[name] for name in (ZERO, NAME, TEACHER))
    items = base.of("items")
    agreements = [share(s.of("agreed"), items) if is_logits else None for s in (ours, base)]
    answered = base.of("labelled")
    has_answers = bool(answered.sum()) and is_logits and not by_lora
    is_class = has_answers and pool.kind == "encoder"
    return Judged(
        kind="KL" if is_logits else "hidden states",
        texts=len(items),
        items=int(items.sum()),
        distance=share(ours.of("distance"), items),
        base_distance=share(base.of("distance"), items),
        closed=share(ours.of("distance"), base.of("distance"), one_minus=True),
        agreement=agreements[0],
        base_agreement=agreements[1],
        loss=scores("loss", base, goal, ours) if has_answers else None,
        accuracy=scores("correct", base, goal, ours) if is_class else None,
        is_fresh=is_fresh,
        by_lora=by_lora,
    )


def _sums(session: RefineSession, pool: Pool, batch_tokens: int) -> tuple[dict[str, TextSums], bool]:
    """Run base, LoRA and file over a pool; return the sums of each, and whether its answers are logits."""
    teacher_model, sums = session.teacher_model, {name: AnswerSums() for name in (TEACHER, ZERO, NAME)}
    for numbers in pool.plan(0, -1, batch_tokens):
        batch = pool.batch(numbers).to(teacher_model.device)
        goal = teacher_model.teacher(batch, hidden=False)
        goal = replace(goal, texts=_owners(batch, len(goal.rows)), labels=_labels(batch, goal))
        for name, total in sums.items():
            teacher_model.activate(name)
            total.add(goal, goal if name == TEACHER else teacher_model.answers(batch, hidden=False))
    return {name: total.by_text for name, total in sums.items()}, sums[ZERO].are_logits


def _owners(batch: Batch, items: int) -> Tensor:
    """Return which text of a batch each row of its answers is of (items,)."""
    texts, scored = batch.rows, batch.scored
    if scored is not None and scored.dim() == 2 and int(scored.sum()) == items and len(scored) == texts:
        return scored.nonzero()[:, 0]
    each = items // texts if texts and items % texts == 0 else 0
    device = None if scored is None else scored.device
    if not each:
        return torch.zeros(items, dtype=torch.long, device=device)
    return torch.arange(texts, device=device).repeat_interleave(each)


def _labels(batch: Batch, goal: Outputs) -> Tensor | None:
    """Return the right class of each row (items,), -100 where there is none; None without any that fit."""
    labels = batch.labels
    if labels is None or not goal.are_logits:
        return None
    if batch.scored is not None and batch.scored.shape == labels.shape:
        labels = labels[batch.scored]
    labels = labels.reshape(-1)
    return labels if len(labels) == len(goal.rows) else None
