"""Data of a refinement: texts or model inputs, split into a part to train on and one that is held out.

A decoder reads running text in blocks of equal length; examples are batched with others of about their length, so that
little is padding. Of prompt and completion only the completion counts, of a conversation the assistant's turns. Which
batches come when is a pure function of the seed and the epoch, so that a run can be resumed anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrconvert.core.errors import DataError
from lrconvert.core.wording import spelled
from lrconvert.live.layer_inputs import add_digest
from lrconvert.live.texts import IGNORED, Conversation, Example, Tally, Text, cut, padded, tokenize
from lrconvert.refine.losses import Batch

_HELD_OUT_SHARE = 0.1
_HELD_OUT_EXAMPLES = 1000
_HELD_OUT_TOKENS = 1 << 16
_WINDOW = 16  # batches whose examples are sorted by length together


@dataclass(frozen=True, eq=False)
class Pool:
    """Examples of one `kind` of model, or batches of `model_inputs`."""

    kind: str
    examples: tuple[Example, ...] = ()
    model_inputs: tuple[Mapping[str, Any], ...] = ()
    pad: int = 0

    def __len__(self) -> int:
        return len(self.examples) or len(self.model_inputs)

    def subset(self, numbers: Sequence[int]) -> Pool:
        """Return the pool of the examples, or batches, with these numbers."""
        if self.examples:
            return Pool(self.kind, tuple(self.examples[n] for n in numbers), (), self.pad)
        return Pool(self.kind, (), tuple(self.model_inputs[n] for n in numbers), self.pad)

    def inputs(self, numbers: Sequence[int]) -> Mapping[str, Any]:
        """Return model inputs, with labels where there are some: the examples with these numbers, padded; or the one
        batch with that number."""
        if not self.examples:
            return self.model_inputs[numbers[0]]
        return _padded([self.examples[n] for n in numbers], self.kind, self.pad)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return `inputs`, and what of their answers counts."""
        return as_batch(self.kind, self.inputs(numbers))

    def plan(self, seed: int, epoch: int, batch_tokens: int) -> list[list[int]]:
        """Return the batches of an epoch, as numbers of examples. Epoch -1 is in order, for evaluations."""
        count = len(self)
        rng = np.random.default_rng((seed, epoch + 1))
        order = list(range(count)) if epoch < 0 else rng.permutation(count).tolist()
        if not self.examples:
            return [[n] for n in order]
        if epoch > 0:
            first = self.plan(seed, 0, batch_tokens)
            return [first[n] for n in rng.permutation(len(first))]
        sizes = [len(e.ids) for e in self.examples]
        mean = max(1, round(batch_tokens * count / max(1, sum(sizes))))
        window = count if epoch < 0 else max(1, _WINDOW * mean)
        plan: list[list[int]] = []
        for start in range(0, count, window):
            batches = cut(sorted(order[start : start + window], key=lambda n: (sizes[n], n)), sizes, batch_tokens)
            plan += batches if epoch < 0 else [batches[n] for n in rng.permutation(len(batches))]
        return plan

    def first_batches(self, seed: int, batch_tokens: int, tokens: int) -> Iterator[list[int]]:
        """Yield the batches that the first epoch begins with, until what counts in them is `tokens` (0: all)."""
        seen = 0
        for numbers in self.plan(seed, 0, batch_tokens):
            yield numbers
            seen += int(self.batch(numbers).weight)
            if tokens and seen >= tokens:
                return

    def digest(self) -> str:
        """Return the sha256 of all that is in it, in order."""
        hasher = hashlib.sha256()
        for example in self.examples:
            label = -1 if example.label is None else example.label
            head = (len(example.ids), example.prompt, len(example.target), label)
            hasher.update(np.array([*head, *example.ids, *example.target], "<i8").tobytes())
            if example.answers:
                hasher.update(np.array([-2, len(example.answers), *chain(*example.answers)], "<i8").tobytes())
        for batch in self.model_inputs:
            add_digest(hasher, batch)
        return hasher.hexdigest()


def _padded(examples: Sequence[Example], kind: str, pad: int) -> dict[str, Tensor]:
    batch = {"input_ids": padded([e.ids for e in examples], pad)}
    if len({len(e.ids) for e in examples}) > 1 or kind != "decoder":
        batch["attention_mask"] = padded([[1] * len(e.ids) for e in examples], 0)
    if kind == "encoder-decoder":
        batch["labels"] = padded([e.target for e in examples], IGNORED)
    elif kind == "decoder" and any(e.is_masked for e in examples):
        batch["labels"] = padded([e.labels for e in examples], IGNORED)
    elif kind == "encoder" and any(e.label is not None for e in examples):
        batch["labels"] = torch.tensor([IGNORED if e.label is None else e.label for e in examples])
    return batch


def as_batch(kind: str, model_inputs: Mapping[str, Any]) -> Batch:
    """Return model inputs as a batch: labels are taken out, as the model's own loss is not needed, except where a model
    reads what it is to write from them."""
    labels = model_inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        labels = None
    mask = model_inputs.get("attention_mask")
    scored = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if kind == "encoder-decoder":
        return Batch(model_inputs, None if labels is None else labels != IGNORED, labels, labels is not None)
    inputs = {name: value for name, value in model_inputs.items() if name != "labels"}
    ids = inputs.get("input_ids")
    if kind == "decoder" and isinstance(ids, Tensor):
        is_labelled = labels is not None and labels.shape == ids.shape
        source = labels if labels is not None and is_labelled else ids
        following = torch.full_like(ids, IGNORED)
        following[:, :-1] = source[:, 1:]
        if scored is not None:
            following[:, :-1][~scored[:, 1:]] = IGNORED
        return Batch(inputs, following != IGNORED if is_labelled else scored, following, by_place=True)
    return Batch(inputs, scored, labels)


def tokenized(
    texts: Iterable[Text | Conversation],
    tokenizer: Any,
    kind: str,
    length: int,
    max_tokens: int,
    classes: Mapping[str, int],
    tally: Tally | None = None,
) -> Pool:
    """Return texts in tokens; `classes` numbers the labels. Texts whose prompt leaves no room for what follows it are
    left out, and counted in `tally`. Raises E-DATA if there is none."""
    running, kept = tokenize(texts, tokenizer, kind, length, max_tokens, classes, tally, answers_only=True)
    blocks = [tuple(running[at : at + length]) for at in range(0, len(running), length)]
    kept += [Example(block) for block in blocks if len(block) > 1]
    if not kept:
        raise DataError("the data has no token to learn from", fix=f"is every text longer than {spelled('length')}?")
    return Pool(kind, tuple(kept), pad=tokenizer.pad_token_id or 0)


# --- splitting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Split:
    """The data to train on, the data that is held out, and the digest of both."""

    train: Pool
    held_out: Pool
    digest: str


def split(pool: Pool, seed: int, path: Path | None = None) -> Split:
    """Hold out a tenth, drawn by the seed; equal texts stay on one side. Raises E-DATA, naming `path`, where the data
    comes from, if nothing would be left."""
    if len(pool) == 1 and pool.model_inputs:
        parts = Batch(pool.model_inputs[0]).parts(2)
        pool = Pool(pool.kind, model_inputs=tuple(part.inputs for part in parts))
    groups: dict[Any, list[int]] = {}
    for n in range(len(pool)):
        groups.setdefault(pool.examples[n].ids if pool.examples else n, []).append(n)
    if len(groups) < 2:
        many = f" {len(pool)} times" if len(pool) > 1 else ""
        what = f"holds one text{many}, and a part has to be held out"
        raise DataError(
            what, fix=f"give at least two different ones, or running text of more than {spelled('length')}", path=path
        )
    order = [list(groups.values())[n] for n in np.random.default_rng((seed, 0x5EED)).permutation(len(groups))]
    goal = min(_HELD_OUT_EXAMPLES, max(1, round(_HELD_OUT_SHARE * len(pool))))
    held_out: list[int] = []
    tokens, at = 0, 0
    while at < len(order) - 1 and (not held_out or (len(held_out) < goal and tokens < _HELD_OUT_TOKENS)):
        held_out += order[at]
        tokens += sum(len(pool.examples[n].ids) for n in order[at]) if pool.examples else 0
        at += 1
    train = sorted(n for group in order[at:] for n in group)
    return Split(pool.subset(train), pool.subset(sorted(held_out)), pool.digest())
