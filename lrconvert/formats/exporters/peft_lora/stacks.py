"""Stacks of experts, in the order of axes in which PEFT takes them: the model's class says it, (experts, out, in) or
(experts, in, out)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lrconvert.core.errors import ExportError
from lrconvert.core.wording import spelled
from lrconvert.formats.exporters.shared.plain import Pair
from lrconvert.formats.readers.peft.experts import says_transposed
from lrconvert.lora import class_names
from lrconvert.lora.adapter import Adapter, View

_KINDS = {"expert": False, "expert_transposed": True}


def as_peft_stacks(adapter: Adapter, pairs: Iterable[Pair], config: Mapping[str, Any] | None) -> list[Pair]:
    """Return the pairs, those of experts as today's PEFT reads them of the base with this config.json, or of that which
    the file notes.

    The update of a stack is `b @ a` for one order of its axes, and the transpose of that for the other; releases of
    PEFT before 0.19 took all stacks for (experts, in, out). Raises E-EXPORT where nothing tells the base's class, and
    the file claims another order than names do.
    """
    listed = list(pairs)
    stacks = {pair.target.name for pair in listed if pair.target.view.kind in _KINDS}
    if not stacks:
        return listed
    base_class = adapter.provenance.fields.get("base_model_class", "")
    known = next(iter(class_names.classes(config)), None) if config is not None else None
    if known is not None:
        transposed = {name: name in known.transposed for name in stacks}
    else:
        transposed = dict.fromkeys(stacks, says_transposed(base_class))
    is_known = bool(known or base_class)
    return [_settled(pair, transposed.get(pair.target.name), is_known) for pair in listed]


def _settled(pair: Pair, transposed: bool | None, is_known: bool) -> Pair:
    """The pair for the order of axes of its stack; as it is where it is of none."""
    if _KINDS.get(kind := pair.target.view.kind) in (None, transposed):
        return pair
    if not is_known:
        layout = "(experts, in, out)" if _KINDS[kind] else "(experts, out, in)"
        raise ExportError(
            f"the experts of {pair.target.name!r:.120} are stored {layout}, and which order PEFT takes is for the "
            "base's class to say",
            fix=f"give {spelled('base', ...)}; its config.json is enough",
        )
    return turned(pair)


def in_order(pair: Pair, transposed: bool) -> Pair:
    """Return the pair of a stack as of (experts, in, out) if it is `transposed`, else as of (experts, out, in); one of
    no stack as it is."""
    return pair if _KINDS.get(pair.target.view.kind) in (None, transposed) else turned(pair)


def turned(pair: Pair) -> Pair:
    """Return the same update of a stack for the other order of axes."""
    kind, _, number = pair.target.view.text.partition(":")
    other = View(f"{'expert' if _KINDS[kind] else 'expert_transposed'}:{number}")
    a, b = np.ascontiguousarray(pair.b.T), np.ascontiguousarray(pair.a.T)
    return replace(pair, target=replace(pair.target, view=other), a=a, b=b)
