"""Shared tensors of which a merge changes one name: each name gets a tensor of its own, as the class loads them.

What PEFT computes is what counts: a LoRA, or a module that was saved whole, is that of one module, and others that
share its weight keep the base's values. Trained tokens of the input embedding count wherever it is shared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lrconvert.core.errors import PlacementError
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.lora import base_names, ties
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.lora.ties import BaseClass, Tie
from lrconvert.merge.plan.updates import Adapter, is_transposed

_ADVICE = "use an adapter that changes all of them alike, or none"


@dataclass(frozen=True)
class Untied:
    """`copies`: new name -> stored tensor that it starts from; `config`: fields to set."""

    copies: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def untie(
    known: BaseClass, shared: Sequence[Tie], broken: Sequence[Tie], checkpoint: Checkpoint, added: Collection[str]
) -> Untied:
    """Return how the `shared` tensors of a base are stored if the names of `broken` ones get different values; `added`
    are those that the adapter brings. Raises E-PLACE where the class cannot load them apart, or computes something else
    then."""
    if not broken:
        return Untied()
    changes = ties.untied(checkpoint.config, broken)
    if changes is None:
        names = ", ".join(repr(name) for name in broken[0].names[:4])
        what = f"{names} are one tensor, of which only one end changes"
        raise PlacementError(f"{what}, and {known.architecture.name} cannot be saved without this tie", fix=_ADVICE)
    after = ties.of({**checkpoint.config, **changes})
    assert after is not None
    copies: dict[str, str] = {}
    for tie in shared:
        there = {name for name in tie.names if name in tie.stored or name in added}
        for name in tie.names:
            if name not in there and after.architecture.shared_with(name).isdisjoint(there):
                copies[name] = tie.origin
                there.add(name)
    return Untied(dict(sorted(copies.items())), changes)


def factors(name: str, adapters: Sequence[Adapter]) -> Any:
    """Return what is equal for two names of one tensor that get the same update from the same factors, as PEFT stores
    it for an adapter that keeps the tie: the head's are those of the embedding, transposed."""
    parts: list[Any] = []
    for number, adapter in enumerate(adapters):
        if not isinstance(adapter, LoraAdapter):
            if any(target.name == name for target in adapter.targets):
                return name
            continue
        for pair in adapter.targets:
            if pair.target.name == name:
                left, right = (pair.A.T, pair.B.T) if is_transposed(pair.target) else (pair.B, pair.A)
                parts.append((number, pair.scale, left.shape, right.shape, left.tobytes(), right.tobytes()))
    return tuple(parts)


def vocabulary(known: BaseClass | None, checkpoint: Checkpoint) -> list[str]:
    """Return the stored tensors that are embeddings or output heads, if only by their names and shapes."""
    if known is not None:
        facts = known.architecture
        ends = {other for name in facts.inputs | facts.outputs for other in (name, *facts.shared_with(name))}
        return [name for name in checkpoint.tensors if known.find(name) in ends]
    text = checkpoint.config.get("text_config")
    rows = {each.get("vocab_size") for each in (checkpoint.config, text) if isinstance(each, dict)} - {None}
    usual = base_names.EMBEDDINGS + base_names.HEADS
    return [
        name
        for name, info in checkpoint.tensors.items()
        if len(info.shape) == 2
        and ties.may_be_tied(name, {})
        and ((name.endswith(usual) and name.count(".") <= 3) or info.shape[0] in rows)
    ]
