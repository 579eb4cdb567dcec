"""Members of fleets in any number: one compact adapter with other numbers in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.lora.adapter import CompactAdapter
from lrconvert.lora.packing import TensorSpec
from lrconvert.methods import base as methods


def variants(compact: CompactAdapter, count: int, seed: int = 0) -> Iterator[CompactAdapter]:
    """Yield adapters of the same config with other codes and halves, another source and another share captured; what
    has an order or a length of its own (indices, coded integers) stays."""
    rng = np.random.default_rng(seed)
    specs = methods.get(compact.method).specs(compact.config, compact.targets)
    for n in range(count):
        tensors = {spec.name: _other(spec, compact.tensors[spec.name], rng) for spec in specs}
        source = hashlib.sha256(f"{seed} {n}".encode()).hexdigest()
        fields = {**compact.provenance.fields, "captured": f"{rng.random():.4f}"}
        provenance = replace(compact.provenance, source=source, fields=fields)
        yield replace(compact, tensors=tensors, provenance=provenance)


def _other(spec: TensorSpec, array: Array, rng: np.random.Generator) -> Array:
    if spec.kind == "code":
        return np.asarray(rng.integers(0, 1 << spec.bits, array.shape), array.dtype)
    if spec.kind in ("half", "single"):
        return np.asarray(array * rng.choice([0.5, 1.0], array.shape), array.dtype)
    return array
