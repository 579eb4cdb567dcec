"""The facts of adapters, compact files and statistics, as JSON values: what `inspect` shows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lrconvert.core.dtypes import Array, Stored
from lrconvert.formats.expansions.ranks import needed, vllm_rank
from lrconvert.formats.lrc import file
from lrconvert.lora import svd
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, LoraTarget, Target
from lrconvert.lora.input_statistics import InputStatistics
from lrconvert.methods import base as methods

_SHARES = {"90": 0.9, "99": 0.99, "99.9": 0.999}  # of a spectrum's energy


def inspect_lora(lora: LoraAdapter) -> dict[str, Any]:
    """Return the facts of a LoRA as JSON values."""
    rows, spectra = [], svd.spectra(lora.targets)
    for pair, s in zip(lora.targets, spectra, strict=True):
        row = _target_row(pair.target) | {"rank": pair.rank, "scale": pair.scale, "dtype": pair.a.dtype}
        row["norm"] = math.sqrt(np.add.reduce(s * s))
        row["spectrum"] = dict(zip(_SHARES, svd.energy_ranks(s, tuple(_SHARES.values())), strict=True))
        row["singular_values"] = [float(f"{v:.6g}") for v in s.tolist()]
        if pair.lost:
            energy = float(np.add.reduce(s * s))
            row["held"] = energy / (energy + pair.lost)
        rows.append(row)
    by_dtype: Counter[str] = Counter()
    for pair in lora.targets:
        for factor in (pair.a, pair.b):
            by_dtype[factor.dtype] += factor.nbytes
    return {
        "kind": "lora",
        "layout": lora.provenance.fields.get("source_format", ""),
        "targets": rows,
        "parameters": lora.numel,
        "bytes_by_dtype": dict(sorted(by_dtype.items())),
        "bytes_at_16_bit": lora.half_bytes,
        "serving": _serving(spectra, max((pair.rank for pair in lora.targets), default=0)),
        **_common(lora.extras, lora.provenance.base_model, lora.provenance.task_type),
        "warnings": list(lora.warnings),
    }


_NO_NORM = "the updates depend on the base's weights: they have no norm without it"


def inspect_statistics(statistics: InputStatistics, nbytes: int) -> dict[str, Any]:
    """Return the facts of input statistics as JSON values."""
    return {
        "kind": "statistics",
        "tokens": statistics.tokens,
        "bytes": nbytes,
        "base": statistics.content,
        "data": statistics.data,
        "inputs": [{**vars(i), "names": list(i.names)} for i in statistics.inputs],
        "warnings": [],
    }


def inspect_compact(compact: CompactAdapter) -> dict[str, Any]:
    """Return the facts of an lrconvert file as JSON values."""
    method, (form, title) = methods.get(compact.method), methods.form(compact)
    size = file.sizes(compact)
    ranks, serving = method.ranks(compact.config, compact.targets), None
    norms: list[float | None] = [None] * len(ranks)
    if not methods.needs_base(compact):
        spectra = _spectra(compact)
        norms = [math.sqrt(np.add.reduce(s * s)) for s in spectra]
        serving = _serving(spectra, max(ranks, default=0))
    rows = [{**_target_row(t), "rank": r, "norm": n} for t, r, n in zip(compact.targets, ranks, norms, strict=True)]
    return {
        "kind": "lrconvert",
        "method": {
            "id": method.id,
            "version": method.version,
            "form": form,
            "title": title,
            "config": method.header(compact.config),
        },
        "targets": rows,
        "bytes": {"total": size.total, "payload": size.payload, "overhead": size.overhead, "extras": size.extras},
        "base": {"names": compact.base.names, "content": compact.base.content},
        "serving": serving,
        "source": compact.provenance.source,
        **_common(compact.extras, compact.provenance.base_model, compact.provenance.task_type),
        "warnings": [*compact.warnings, *([_NO_NORM] if methods.needs_base(compact) else [])],
    }


def _spectra(compact: CompactAdapter) -> list[Array]:
    """The singular values of the updates of a compact adapter that has factors."""
    pairs = [
        LoraTarget(target, Stored("F32", a), Stored("F32", b), 1.0) for target, a, b in methods.expand_all(compact)
    ]
    updated = [pair for pair in pairs if pair.rank]
    values = iter(svd.spectra(updated))
    return [next(values) if pair.rank else np.zeros(0) for pair in pairs]


def _serving(spectra: Sequence[Array], rank: int) -> dict[str, Any] | None:
    """The rank that a server needs, as JSON values; None if nothing is updated."""
    need = needed(spectra, rank)
    return None if need is None else vars(need) | {"vllm_max_lora_rank": vllm_rank(need.stored) or None}


def _target_row(target: Target) -> dict[str, Any]:
    out, inner = target.matrix_shape
    return {"name": target.name, "out": out, "in": inner, "shape": list(target.shape), "view": target.view.text}


def _common(extras: Sequence[Any], base_model: str, task_type: str) -> dict[str, Any]:
    return {
        "extras": [{"name": e.name, "dtype": e.dtype, "shape": list(e.shape), "bytes": len(e.data)} for e in extras],
        "base_model": base_model,
        "task_type": task_type,
    }
