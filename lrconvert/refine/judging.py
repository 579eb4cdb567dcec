"""Answers of a file, text by text, beside those of base and LoRA, with intervals: the numbers of `compress`'s verdict.

Texts that chose a form or a strength flatter it. So a part of what would be trained on is set aside first, where there
is enough of it, and measures the winner alone. Intervals are of paired bootstrap samples of texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lrconvert.convert.verdict import FEWEST, Interval, Judged, Scores
from lrconvert.core.dtypes import F64
from lrconvert.live import attach, intervals
from lrconvert.live.answers import Outputs, row_distances
from lrconvert.live.texts import IGNORED
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.refine.attached_student import NAME
from lrconvert.refine.data import Pool
from lrconvert.refine.evaluation import TEACHER, ZERO
from lrconvert.refine.losses import Batch
from lrconvert.refine.session import RefineSession

_MOST = 0.2  # of what is trained on, which may be set aside
_CHUNK = 1 << 24  # logits that are compared at once


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
        sums = _sums(session, pool, batch_tokens)
    base, ours, goal = sums[ZERO], sums[NAME], sums[TEACHER]
    items = base.of("items")
    is_logits = base.are_logits
    agreements = [_interval(s.of("agreed"), items) if is_logits else None for s in (ours, base)]
    answered = base.of("labelled")
    has_answers = bool(answered.sum()) and is_logits and not by_lora
    is_class = has_answers and pool.kind == "encoder"

    def scores(name: str) -> Scores:
        of = [s.of(name) for s in (base, goal, ours)]
        return Scores(*(_interval(values, answered) for values in (*of, of[2] - of[1])))

    return Judged(
        kind="KL" if is_logits else "hidden states",
        texts=len(items),
        items=int(items.sum()),
        distance=_interval(ours.of("distance"), items),
        base_distance=_interval(base.of("distance"), items),
        closed=Interval(*intervals.share(ours.of("distance"), base.of("distance"), one_minus=True)),
        agreement=agreements[0],
        base_agreement=agreements[1],
        loss=scores("loss") if has_answers else None,
        accuracy=scores("correct") if is_class else None,
        is_fresh=is_fresh,
        by_lora=by_lora,
    )


def _interval(over: F64, under: F64) -> Interval:
    return Interval(*intervals.share(over, under))


@dataclass
class _Sums:
    """Sums of one adapter over the places of each text, by what they are of, text after text."""

    parts: dict[str, list[F64]] = field(default_factory=dict)
    are_logits: bool = True

    def of(self, name: str) -> F64:
        """Return one sum of each text (texts,)."""
        return np.concatenate(self.parts[name])

    def add(self, goal: Outputs, ours: Outputs, labels: Tensor | None, owners: Tensor, texts: int) -> None:
        """Count a batch of `texts`; `owners` (items,) says which of them each row of the answers is of."""
        self.are_logits = goal.are_logits
        rows: dict[str, list[Tensor]] = {}
        step = max(1, _CHUNK // max(1, goal.rows.shape[-1]))
        for start in range(0, len(goal.rows), step):
            part = slice(start, start + step)
            p, q = goal.rows[part].float(), ours.rows[part].float()
            distance, agreed = row_distances(p, q, goal.are_logits)
            values = {"items": torch.ones_like(distance), "distance": distance, "agreed": agreed}
            for name, value in (values | _task(q, None if labels is None else labels[part])).items():
                rows.setdefault(name, []).append(value.double())
        for name, pieces in rows.items():
            total = torch.zeros(texts, dtype=torch.float64, device=owners.device)
            self.parts.setdefault(name, []).append(total.index_add_(0, owners, torch.cat(pieces)).cpu().numpy())


def _task(rows: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """Return scores of rows (items, classes) on the task: each (items,), zero where there is no label."""
    if labels is None:
        nothing = torch.zeros(len(rows), device=rows.device)
        return dict.fromkeys(("labelled", "loss", "correct"), nothing)
    known = labels != IGNORED
    loss = F.cross_entropy(rows, labels, reduction="none", ignore_index=IGNORED)
    return {"labelled": known, "loss": loss, "correct": known & (rows.argmax(-1) == labels)}


def _sums(session: RefineSession, pool: Pool, batch_tokens: int) -> dict[str, _Sums]:
    """Run base, LoRA and file over a pool."""
    teacher_model, sums = session.teacher_model, {name: _Sums() for name in (TEACHER, ZERO, NAME)}
    for numbers in pool.plan(0, -1, batch_tokens):
        batch = pool.batch(numbers).to(teacher_model.device)
        goal = teacher_model.teacher(batch, hidden=False)
        owners, texts = _owners(batch, len(goal.rows))
        labels = _labels(batch, goal)
        for name, total in sums.items():
            teacher_model.activate(name)
            ours = goal if name == TEACHER else teacher_model.answers(batch, hidden=False)
            total.add(goal, ours, labels, owners, texts)
    return sums


def _owners(batch: Batch, items: int) -> tuple[Tensor, int]:
    """Return which text of a batch each row of its answers is of (items,), and how many there are."""
    texts, scored = batch.rows, batch.scored
    if scored is not None and scored.dim() == 2 and int(scored.sum()) == items and len(scored) == texts:
        return scored.nonzero()[:, 0], texts
    each = items // texts if texts and items % texts == 0 else 0
    device = None if scored is None else scored.device
    if not each:
        return torch.zeros(items, dtype=torch.long, device=device), 1
    return torch.arange(texts, device=device).repeat_interleave(each), texts


def _labels(batch: Batch, goal: Outputs) -> Tensor | None:
    """Return the right class of each row (items,), -100 where there is none; None without any that fit."""
    labels = batch.labels
    if labels is None or not goal.are_logits:
        return None
    if batch.scored is not None and batch.scored.shape == labels.shape:
        labels = labels[batch.scored]
    labels = labels.reshape(-1)
    return labels if len(labels) == len(goal.rows) else None
