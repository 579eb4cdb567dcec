"""The batches of tokens that a model is given. A decoder reads running text in blocks of equal length, so that nothing
is padding; examples are read one by one, shortest first, padded to the longest of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lrconvert.core.errors import DataError
from lrconvert.core.wording import spelled
from lrconvert.live.texts.tally import Tally
from lrconvert.live.texts.text import Conversation, Text
from lrconvert.live.texts.tokens import IGNORED, Example, tokenize


@dataclass(frozen=True)
class Packing:
    """The form of batches: `kind` decoder, encoder, or encoder-decoder; tokens of a block (or at most of a text),
    of a batch, and at most of everything (0: no limit). With `answers` the batches of a decoder have `labels`, where
    some of their tokens do not count, and texts of which none counts are left out; with `labels` too, those of
    an encoder have the numbers of the `classes` of their texts."""

    kind: str
    length: int
    batch_tokens: int
    max_tokens: int = 0
    answers: bool = False
    labels: bool = False
    classes: Mapping[str, int] = field(default_factory=dict)


def batches(
    texts: Iterable[Text | Conversation], tokenizer: Any, packing: Packing, tally: Tally | None = None
) -> list[dict[str, Any]]:
    """Return the batches that a model is given, as torch tensors. The same texts give the same batches. Raises
    E-DATA."""
    running, examples = tokenize(
        texts,
        tokenizer,
        packing.kind,
        packing.length,
        packing.max_tokens,
        packing.classes,
        tally,
        answers_only=packing.answers,
    )
    examples.sort(key=lambda e: (len(e.ids), len(e.target)))
    groups = cut(range(len(examples)), [len(e.ids) for e in examples], packing.batch_tokens)
    pad = tokenizer.pad_token_id or 0
    packed = _blocks(running, packing)
    packed += [_padded([examples[n] for n in group], pad, packing.answers) for group in groups]
    if not packed:
        raise DataError("the data has no token", fix=f"is every prompt longer than {spelled('length')}?")
    return packed


def _blocks(stream: list[int], packing: Packing) -> list[dict[str, Any]]:
    """Running text in batches of blocks; what is left over is a batch of its own."""
    blocks = [stream[at : at + packing.length] for at in range(0, len(stream), packing.length)]
    rows = max(1, packing.batch_tokens // packing.length)
    full = [block for block in blocks if len(block) == packing.length]
    grouped = [full[at : at + rows] for at in range(0, len(full), rows)]
    if len(full) < len(blocks):
        grouped.append([blocks[-1]])
    return [{"input_ids": torch.tensor(group)} for group in grouped]


def cut(order: Iterable[int], sizes: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return numbers of examples, of rising size, in batches of at most that many tokens with their padding."""
    groups: list[list[int]] = []
    for n in order:
        if not groups or sizes[n] * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(n)
    return groups


def padded(rows: Sequence[Sequence[int]], fill: int, width: int = 0) -> Tensor:
    """Return rows in one tensor, filled up to the longest of them, or to `width`."""
    width = max(width, *map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def _padded(examples: Sequence[Example], pad: int, answers: bool) -> dict[str, Any]:
    read, written = [e.ids for e in examples], [e.target for e in examples]
    batch = {"input_ids": padded(read, pad), "attention_mask": padded([[1] * len(row) for row in read], 0)}
    if written[0]:
        widths = [max(map(len, rows)) for rows in (read, written)]
        batch["labels"] = padded(written, IGNORED, widths[1] + (widths[0] == widths[1]))  # known by its length
    elif answers and any(e.label is not None for e in examples):
        batch["labels"] = torch.tensor([IGNORED if e.label is None else e.label for e in examples])
    elif answers and any(e.is_masked for e in examples):
        batch["labels"] = padded([e.labels for e in examples], IGNORED)
    return batch
