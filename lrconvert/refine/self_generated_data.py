"""Data where there is none: a decoder with its LoRA writes texts of its own, as in LLM-QAT (arXiv 2305.17888)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import DataError
from lrconvert.core.wording import spelled
from lrconvert.live.texts import Example

_TRIES = 3  # times the wanted number of rounds before it is enough that there are some texts
_LEAST = 4


@dataclass(frozen=True)
class Written:
    """Texts that are written so far, in so many `rounds`, and the state of the random numbers, (n,) bytes."""

    texts: tuple[tuple[int, ...], ...]
    rounds: int
    generator: Array


class Store(Protocol):
    """The place in which texts written so far are kept now and then."""

    def read(self) -> Any:
        """Return the last `Written`, None if there is none."""

    def write(self, state: Callable[[], Any]) -> None:
        """Keep the `Written` that `state` gives, if it is time."""


@dataclass(frozen=True)
class OwnTexts:
    """In the place of data: texts that the teacher writes. `keep` returns those that are kept, or what it is given
    computes; `store` keeps them on the way."""

    keep: Callable[[Callable[[], Any]], Any]
    store: Store


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
    store: Store | None = None,
) -> list[Example]:
    """Return about `tokens` tokens of texts, each at most `length` long and none twice, sampled from the model as it
    is. The first token is the one that begins texts, or any one where there is none. With a `store` it goes on from
    what is kept there. Raises E-DATA if hardly a text differs from another."""
    device = next(iter(model.parameters())).device
    generator = torch.Generator(device=device).manual_seed(seed)
    count = max(1, min(64, batch_tokens // length))
    texts: dict[tuple[int, ...], None] = {}
    done, first, rounds = 0, 1, max(1, tokens // (count * length))
    if store is not None and (written := store.read()) is not None:
        texts, first = dict.fromkeys(written.texts), written.rounds + 1
        done = sum(map(len, texts))
        generator.set_state(torch.from_numpy(written.generator))

    def state(number: int) -> Written:
        return Written(tuple(texts), number, generator.get_state().numpy())

    for number in range(first, _TRIES * rounds + 1):
        for ids in _sampled(model, tokenizer, count, length, generator):
            if len(ids) > 1 and ids not in texts:
                texts[ids] = None
                done += len(ids)
        progress(min(1.0, done / tokens), f"{len(texts)} texts of the teacher's own")
        if done >= tokens or (number >= rounds and done >= tokens // 2):
            break
        if store is not None:
            store.write(partial(state, number))
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
