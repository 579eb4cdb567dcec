"""The bytes that a student has: those of the budget that its file states, or those that the file takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lrconvert.formats.lrc import budgets, file
from lrconvert.lora.adapter import CompactAdapter
from lrconvert.methods.base import Budget

_NOTES = "refined_"  # what a refinement before has noted, which is written anew


def budget_of(compact: CompactAdapter) -> Budget:
    """Return the budget of a refinement of `compact`: the bytes of the file without extra tensors, with room for the
    shortest note where the file states a budget."""
    provenance = compact.provenance
    fields = {key: text for key, text in provenance.fields.items() if not key.startswith(_NOTES)}
    bare = replace(compact, provenance=replace(provenance, fields=fields))
    limit = budgets.stated(compact)
    if limit is None:
        limit = file.sizes(bare).adapter
    elif file.sizes(budgets.with_room(bare)).adapter <= limit:
        bare = budgets.with_room(bare)

    def size(config: Any) -> int:
        return file.sizes(replace(bare, config=config)).adapter

    return Budget(limit, size)
