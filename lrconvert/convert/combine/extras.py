"""The extra tensors of several adapters: equal ones are carried, biases of LoRAs are summed, others need a decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lrconvert.convert.combine.options import CombineOptions
from lrconvert.convert.combine.weighted import Weighted
from lrconvert.core.dtypes import STORAGE, decode, round_to
from lrconvert.core.errors import PlacementError
from lrconvert.core.wording import spelled
from lrconvert.lora.adapter import ExtraTensor


@dataclass(frozen=True)
class CombinedExtras:
    """The extra tensors of a combination, and notes for the user, a line each."""

    extras: tuple[ExtraTensor, ...]
    notes: tuple[str, ...] = ()


def combined_extras(items: Sequence[Weighted], options: CombineOptions) -> CombinedExtras:
    """Return what is carried. Raises E-PLACE for tensors that differ, or that the mode does not combine, unless
    `options` decide."""
    by_place: dict[tuple[str, str], list[tuple[Weighted, ExtraTensor]]] = {}
    for item in items:
        for extra in item.adapter.extras:
            by_place.setdefault((extra.name, extra.use), []).append((item, extra))
    if not by_place:
        return CombinedExtras(())
    if options.extras == "drop":
        return CombinedExtras((), (f"{len(by_place)} extra tensors are left out as asked",))
    made, notes = [], []
    for (name, use), owned in by_place.items():
        if use == "add" and options.mode in ("sum", "svd", "linear"):
            made.append(_summed(owned))
            continue
        first = owned[0][1]
        if use == "add" or any(extra != first for _, extra in owned):
            if options.extras == "refuse":
                raise _undecided(name, use, owned, options)
            notes.append(f"{name!r:.100} is that of {owned[0][0].name}")
        made.append(first)
    return CombinedExtras(tuple(made), tuple(notes))


def _undecided(
    name: str, use: str, owned: Sequence[tuple[Weighted, ExtraTensor]], options: CombineOptions
) -> PlacementError:
    names = ", ".join(item.name for item, _ in owned[:3])
    what = f"the extra tensor {name!r:.100} is another one in {names}"
    if use == "add":
        what = f"{options.mode} says nothing of biases of LoRAs, and {name!r:.100} is one"
    fix = f"take that of {owned[0][0].name} with {spelled('extras', 'first')}, or none with {spelled('extras', 'drop')}"
    return PlacementError(what, fix=fix)


def _summed(owned: Sequence[tuple[Weighted, ExtraTensor]]) -> ExtraTensor:
    """The weighted sum of tensors that are added to a parameter, in F32."""
    first = owned[0][1]
    total = np.zeros(int(np.prod(first.shape)), np.float64)
    for item, extra in owned:
        if extra.shape != first.shape:
            raise PlacementError(f"{first.name!r:.100} is {list(first.shape)} and {list(extra.shape)}")
        total += item.weight * decode(np.frombuffer(extra.data, STORAGE[extra.dtype]), extra.dtype)
    return replace(first, dtype="F32", data=round_to(total, "F32").tobytes())
