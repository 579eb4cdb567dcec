"""A compact adapter as a plain LoRA, for what takes nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lrconvert.core.dtypes import Stored
from lrconvert.core.errors import EmptyAdapterError
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, LoraTarget
from lrconvert.methods import base as methods


def plain_lora(compact: CompactAdapter) -> LoraAdapter:
    """Expand a compact adapter to a plain LoRA, its factors in float32, targets of rank 0 left out."""
    pairs = tuple(
        LoraTarget(target, Stored("F32", np.ascontiguousarray(a)), Stored("F32", np.ascontiguousarray(b)), 1.0)
        for target, a, b in methods.expand_all(compact)
        if a.shape[0]
    )
    if not pairs:
        raise EmptyAdapterError("every target of the file has rank 0")
    captured = compact.provenance.fields.get("captured")
    kept = f"a compact file that kept {captured} of its own source" if captured else "a compact adapter"
    warning = f"the source is {kept}: what is measured is against it"
    of_its_own = ("budget", "captured", "request")  # of that file, not of what is made from it
    fields = {key: text for key, text in compact.provenance.fields.items() if key not in of_its_own}
    return LoraAdapter(pairs, compact.extras, replace(compact.provenance, fields=fields), (*compact.warnings, warning))
