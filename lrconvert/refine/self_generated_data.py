"""Data where there is none: a decoder with its LoRA writes texts of its own, as in LLM-QAT (arXiv 2305.17888)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lrconvert.core.errors import DataError
from lrconvert.refine.data import Example

_TRIES = 3  # rounds over the wanted number of texts before it is enough that some are there
_LEAST = 4


@torch.no_grad()
def written(
    model: nn.Module,
    tokenizer: Any,
    *,
    length: int,
    tokens: int,
    batch_tokens: int,
    seed: int,
    progress: Callable[[float, str], None],
) -> list[Example]:
    """About `tokens` tokens of texts, each at most `length` long and none twice, sampled from the model as it is.

    The first token is the one that begins texts, or any one where there is none. Raises E-DATA if hardly a text
    differs from another.
    """
    device = next(iter(model.parameters())).device
    draw = torch.Generator(device=device).manual_seed(seed)
    count = max(1, min(64, batch_tokens // length))
    found: dict[tuple[int, ...], None] = {}
    done, rounds = 0, max(1, tokens // (count * length))
    for turn in range(_TRIES * rounds):
        for ids in _sampled(model, tokenizer, count, length, draw, device):
            if len(ids) > 1 and ids not in found:
                found[ids] = None
                done += len(ids)
        progress(min(1.0, done / tokens), f"{len(found)} texts of the teacher's own")
        if done >= tokens or (turn + 1 >= rounds and done >= tokens // 2):
            break
    if len(found) < _LEAST:
        raise DataError(
            f"the teacher wrote {len(found)} different texts, too few to learn from", fix="give data with --data"
        )
    return [Example(ids) for ids in found]


def _sampled(
    model: nn.Module, tokenizer: Any, count: int, length: int, draw: torch.Generator, device: torch.device
) -> list[tuple[int, ...]]:
    first = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    end = tokenizer.eos_token_id
    if first is None:
        rows = torch.randint(len(tokenizer), (count, 1), generator=draw, device=device)
    else:
        rows = torch.full((count, 1), first, device=device)
    cache: Any = None
    open_rows = torch.ones(count, dtype=torch.bool, device=device)
    given = rows
    while rows.shape[1] < length and bool(open_rows.any()):
        answer: Any = model(input_ids=given, past_key_values=cache, use_cache=True)
        cache = getattr(answer, "past_key_values", None)
        shares = answer.logits[:, -1].float().softmax(-1)
        chosen: Tensor = torch.multinomial(shares, 1, generator=draw)
        rows = torch.cat([rows, chosen], 1)
        if end is not None:
            open_rows &= chosen[:, 0] != end
        given = chosen if cache is not None else rows
    return [_until(row, end) for row in rows.tolist()]


def _until(row: list[int], end: int | None) -> tuple[int, ...]:
    """A text up to its end, the end included; what begins it may be that same token."""
    for n, token in enumerate(row[1:], 1):
        if token == end:
            return tuple(row[: n + 1])
    return tuple(row)
