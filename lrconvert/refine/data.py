"""What a refinement reads: texts or model inputs, split into what is trained on and what is held out.

A decoder reads running text in blocks of equal length; examples are batched with others of about their length, so that
little is padding. Of prompt and completion only the completion counts. Which batches come when is a pure function of
the seed and the epoch, so that work can be resumed anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrconvert.core.errors import DataError
from lrconvert.live import collect_statistics
from lrconvert.live.texts import Text
from lrconvert.refine.losses import Batch

HELD_SHARE = 0.1
_HELD_MOST = 1000  # examples
_HELD_TOKENS = 1 << 16
_WINDOW = 16  # batches whose examples are sorted by length together
_IGNORED = -100


@dataclass(frozen=True)
class Example:
    """Tokens of one text, how many of them are a prompt, what an encoder-decoder writes, and the class of its label."""

    ids: tuple[int, ...]
    prompt: int = 0
    target: tuple[int, ...] = ()
    label: int | None = None


@dataclass(frozen=True, eq=False)
class Pool:
    """Examples of one `kind` of model, or batches of model inputs as they were given."""

    kind: str
    examples: tuple[Example, ...] = ()
    given: tuple[Mapping[str, Any], ...] = ()
    pad: int = 0

    def __len__(self) -> int:
        return len(self.examples) or len(self.given)

    def of(self, which: Sequence[int]) -> Pool:
        some = tuple(self.examples[n] for n in which) if self.examples else ()
        return Pool(self.kind, some, () if some else tuple(self.given[n] for n in which), self.pad)

    def inputs(self, which: Sequence[int]) -> Mapping[str, Any]:
        """The model inputs, with labels where there are some: the examples with these numbers, padded; or the one batch
        that was given under it."""
        if not self.examples:
            return self.given[which[0]]
        return _padded([self.examples[n] for n in which], self.kind, self.pad)

    def batch(self, which: Sequence[int]) -> Batch:
        """`inputs`, and what of their answers counts."""
        return as_batch(self.kind, self.inputs(which))

    def plan(self, seed: int, epoch: int, batch_tokens: int) -> list[list[int]]:
        """The batches of an epoch, as numbers of examples. Epoch -1 is in order, for measuring."""
        count = len(self)
        rng = np.random.default_rng((seed, epoch + 1))
        order = list(range(count)) if epoch < 0 else rng.permutation(count).tolist()
        if not self.examples:
            return [[n] for n in order]
        sizes = [len(e.ids) for e in self.examples]
        mean = max(1, round(batch_tokens * count / max(1, sum(sizes))))
        window = count if epoch < 0 else max(1, _WINDOW * mean)
        found: list[list[int]] = []
        for start in range(0, count, window):
            batches = _cut(sorted(order[start : start + window], key=lambda n: (sizes[n], n)), sizes, batch_tokens)
            found += batches if epoch < 0 else [batches[n] for n in rng.permutation(len(batches))]
        return found

    def some(self, seed: int, batch_tokens: int, tokens: int) -> Iterator[list[int]]:
        """The batches that the first epoch begins with, until what counts in them is `tokens` (0: all of them)."""
        seen = 0
        for which in self.plan(seed, 0, batch_tokens):
            yield which
            seen += int(self.batch(which).weight)
            if tokens and seen >= tokens:
                return

    def digest(self) -> str:
        """sha256 over all that is in it, in order."""
        hasher = hashlib.sha256()
        for example in self.examples:
            head = (
                len(example.ids),
                example.prompt,
                len(example.target),
                -1 if example.label is None else example.label,
            )
            hasher.update(np.array([*head, *example.ids, *example.target], "<i8").tobytes())
        for batch in self.given:
            collect_statistics.add_digest(hasher, batch)
        return hasher.hexdigest()


def _cut(order: Sequence[int], sizes: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Examples of rising length in batches of at most that many tokens with their padding."""
    found: list[list[int]] = []
    for n in order:
        if not found or sizes[n] * (len(found[-1]) + 1) > batch_tokens:
            found.append([])
        found[-1].append(n)
    return found


def _padded(rows: Sequence[Example], kind: str, pad: int) -> dict[str, Tensor]:
    def filled(values: Sequence[Sequence[int]], fill: int) -> Tensor:
        width = max(map(len, values))
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in values])

    batch = {"input_ids": filled([r.ids for r in rows], pad)}
    if len({len(r.ids) for r in rows}) > 1 or kind != "decoder":
        batch["attention_mask"] = filled([[1] * len(r.ids) for r in rows], 0)
    if kind == "encoder-decoder":
        batch["labels"] = filled([r.target for r in rows], _IGNORED)
    elif kind == "decoder" and any(r.prompt for r in rows):
        batch["labels"] = filled([[*[_IGNORED] * r.prompt, *r.ids[r.prompt :]] for r in rows], _IGNORED)
    elif kind == "encoder" and any(r.label is not None for r in rows):
        batch["labels"] = torch.tensor([_IGNORED if r.label is None else r.label for r in rows])
    return batch


def as_batch(kind: str, given: Mapping[str, Any]) -> Batch:
    """Model inputs as a batch: labels are taken out, as the model's own loss is not needed, except where a model reads
    what it is to write from them."""
    labels = given.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        labels = None
    mask = given.get("attention_mask")
    scored = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if kind == "encoder-decoder":
        return Batch(given, None if labels is None else labels != _IGNORED, labels, labels is not None)
    inputs = {name: value for name, value in given.items() if name != "labels"}
    ids = inputs.get("input_ids")
    if kind == "decoder" and isinstance(ids, Tensor):
        told = labels is not None and labels.shape == ids.shape
        source = labels if labels is not None and told else ids
        following = torch.full_like(ids, _IGNORED)
        following[:, :-1] = source[:, 1:]
        if scored is not None:
            following[:, :-1][~scored[:, 1:]] = _IGNORED
        return Batch(inputs, following != _IGNORED if told else scored, following, by_place=True)
    return Batch(inputs, scored, labels)


# --- from texts -----------------------------------------------------------------------------------------------------


def examples(
    texts: Iterable[Text], tokenizer: Any, kind: str, length: int, max_tokens: int, classes: Mapping[str, int]
) -> list[Example]:
    """Texts in tokens; `classes` numbers the labels. Raises E-DATA if there is none."""
    running: list[int] = []
    found: list[Example] = []
    tokens = 0
    for text in texts:
        if max_tokens and tokens >= max_tokens:
            break
        if text.running and kind == "decoder":
            ids = tokenizer(text.completion, add_special_tokens=not running, verbose=False)["input_ids"]
            running += ids
            tokens += len(ids)
            continue
        found.append(_example(text, tokenizer, kind, length, classes))
        tokens += len(found[-1].ids)
    blocks = [tuple(running[at : at + length]) for at in range(0, len(running), length)]
    kept = [example for example in found if len(example.ids) > example.prompt]
    kept += [Example(block) for block in blocks if len(block) > 1]
    if not kept:
        raise DataError("the data has no token to learn from", fix="is every text longer than --length?")
    return kept


def _example(text: Text, tokenizer: Any, kind: str, length: int, classes: Mapping[str, int]) -> Example:
    def ids(*parts: str, **named: Any) -> tuple[int, ...]:
        return tuple(tokenizer(*parts, truncation=True, max_length=length, **named)["input_ids"])

    if kind == "encoder-decoder":
        return Example(ids(text.prompt or text.completion), target=ids(text_target=text.completion))
    if kind == "encoder":
        return Example(ids(*filter(None, (text.prompt, text.completion))), label=_class(text.label, classes))
    read, end = ids(text.prompt + text.completion), tokenizer.eos_token_id
    if end is not None and read[-1:] != (end,):
        read = (*read, end)[:length]
    return Example(read, prompt=_shared(read, ids(text.prompt)) if text.prompt else 0)


def _shared(read: tuple[int, ...], prompt: tuple[int, ...]) -> int:
    """How many tokens of a prompt begin the whole text: a token may reach over its end."""
    count = 0
    while count < min(len(read), len(prompt)) and read[count] == prompt[count]:
        count += 1
    return count


def _class(label: str | None, classes: Mapping[str, int]) -> int | None:
    if label is None:
        return None
    return classes.get(label, int(label) if label.isdecimal() and int(label) in classes.values() else None)


# --- splitting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Split:
    """What is trained on, what is held out, and the digest of all."""

    train: Pool
    held: Pool
    digest: str


def split(pool: Pool, seed: int) -> Split:
    """Hold out a tenth, drawn by the seed; equal texts stay on one side. Raises E-DATA if nothing would be left."""
    if len(pool) == 1 and pool.given:
        pool = Pool(pool.kind, given=tuple(part.inputs for part in Batch(pool.given[0]).parts(2)))
    groups: dict[Any, list[int]] = {}
    for n in range(len(pool)):
        groups.setdefault(pool.examples[n].ids if pool.examples else n, []).append(n)
    if len(groups) < 2:
        raise DataError("there is one text: nothing could be held out", fix="give more data")
    order = [list(groups.values())[n] for n in np.random.default_rng((seed, 0x5EED)).permutation(len(groups))]
    goal = min(_HELD_MOST, max(1, round(HELD_SHARE * len(pool))))
    held: list[int] = []
    tokens, at = 0, 0
    while at < len(order) - 1 and (not held or (len(held) < goal and tokens < _HELD_TOKENS)):
        held += order[at]
        tokens += sum(len(pool.examples[n].ids) for n in order[at]) if pool.examples else 0
        at += 1
    train = sorted(n for group in order[at:] for n in group)
    return Split(pool.of(train), pool.of(sorted(held)), pool.digest())
