"""Data where there is none: a decoder with its LoRA writes texts of its own, as in LLM-QAT (arXiv 2305.17888)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lrconvert.core.errors import DataError
from lrconvert.core.wording import spelled
from lrconvert.live.texts import Example

_TRIES = 3  # times the wanted number of rounds before it is enough that there are some texts
_LEAST = 4


@torch.no_grad()
def sample(
    model: nn.Module,
    tokenizer: Any,
    *,
    length: int,
    tokens: int,
    batch_tokens: int,
    seed: int,
    progress: Callable[[float, str], None],
) -> list[Example]:
    """Return about `tokens` tokens of texts, each at most `length` long and none twice, sampled from the model as it
    is. The first token is the one that begins texts, or any one where there is none. Raises E-DATA if hardly a text
    differs from another."""
    device = next(iter(model.parameters())).device
    generator = torch.Generator(device=device).manual_seed(seed)
    count = max(1, min(64, batch_tokens // length))
    texts: dict[tuple[int, ...], None] = {}
    done, rounds = 0, max(1, tokens // (count * length))
    for number in range(1, _TRIES * rounds + 1):
        for ids in _sampled(model, tokenizer, count, length, generator):
            if len(ids) > 1 and ids not in texts:
                texts[ids] = None
                done += len(ids)
        progress(min(1.0, done / tokens), f"{len(texts)} texts of the teacher's own")
        if done >= tokens or (number >= rounds and done >= tokens // 2):
            break
    if len(texts) < _LEAST:
        raise DataError(
            f"the teacher wrote {len(texts)} different texts, too few to learn from",
            fix=f"give data with {spelled('data', ...)}",
        )
    return [Example(ids) for ids in texts]


def _sampled(
    model: nn.Module, tokenizer: Any, count: int, length: int, generator: torch.Generator
) -> list[tuple[int, ...]]:
    device, end = generator.device, tokenizer.eos_token_id
    first = next((t for t in (tokenizer.bos_token_id, end) if t is not None), None)
    if first is None:
        rows = torch.randint(len(tokenizer), (count, 1), generator=generator, device=device)
    else:
        rows = torch.full((count, 1), first, device=device)
    cache: Any = None
    is_open = torch.ones(count, dtype=torch.bool, device=device)
    inputs = rows
    while rows.shape[1] < length and bool(is_open.any()):
        output: Any = model(input_ids=inputs, past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        probabilities = output.logits[:, -1].float().softmax(-1)
        chosen: Tensor = torch.multinomial(probabilities, 1, generator=generator)
        rows = torch.cat([rows, chosen], 1)
        if end is not None:
            is_open &= chosen[:, 0] != end
        inputs = chosen if cache is not None else rows
    return [_until(row, end) for row in rows.tolist()]


def _until(row: list[int], end: int | None) -> tuple[int, ...]:
    """A text up to its end, the end included; what begins it may be that same token."""
    for n, token in enumerate(row[1:], 1):
        if token == end:
            return tuple(row[: n + 1])
    return tuple(row)
