"""The budget that a file was made under, in its provenance: what is done to the file later holds it, too.

Budgets bound a file without its extra tensors. A conversion leaves room for the shortest note of a refinement.
"""

from __future__ import annotations

from dataclasses import replace

from lrconvert.formats.lrc import file
from lrconvert.lora.adapter import CompactAdapter

FIELD = "budget"
ROOM = {"refined_steps": "0" * 7}  # the fields of the shortest note; an odd number of digits takes more than one more


def text(limit: int) -> str:
    """Return a budget as a file states it: always of one length, so that the smallest possible file has one size,
    whatever was asked for."""
    return f"{limit:010d}"


def stated(compact: CompactAdapter) -> int | None:
    """Return the bytes that a file was to have at most; None if it was made without a budget."""
    text = compact.provenance.fields.get(FIELD, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


def is_kept(compact: CompactAdapter) -> bool:
    """Return whether a file is within the budget that it states, if it states one."""
    limit = stated(compact)
    return limit is None or file.sizes(compact).adapter <= limit


def with_room(compact: CompactAdapter) -> CompactAdapter:
    """Return `compact` as it is with the shortest note of a refinement."""
    provenance = compact.provenance
    return replace(compact, provenance=replace(provenance, fields={**provenance.fields, **ROOM}))
