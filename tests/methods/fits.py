"""What tests of methods share: budgets of payload bytes, random payloads, what a fit keeps, a written-out matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lrconvert.lora import packing, svd
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, Target
from lrconvert.lora.fingerprint import fingerprint
from lrconvert.methods import base as methods
from lrconvert.methods.base import Budget, FitContext, Method

RNG = np.random.default_rng


def convert(method: Method, lora: LoraAdapter, seed: int = 0, **options: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """(config, payload) that options lead to without a budget."""
    context = FitContext(seed=seed)
    config = method.plan(lora, method.Options(**options), None, context)
    return config, method.fit(lora, config, context)


def payload_budget(method: Method, lora: LoraAdapter, limit: int) -> Budget:
    """Bytes of tensors and 500 for a header."""

    def size(config: Any) -> int:
        layout = method.layout_specs(method.header(config), lora.shapes())
        return 500 + sum(s.nbytes for s in (*layout, *method.specs(config, lora.shapes())))

    return Budget(limit, size)


def lost(lora: LoraAdapter, compact: CompactAdapter, context: FitContext | None = None) -> float:
    """Share of the energy that a fit measures and loses."""
    error = energy = 0.0
    for pair, (_, a, b) in zip(lora.targets, methods.expand_all(compact), strict=True):
        own_error, own_energy = svd.distance(pair, a, b, (context or FitContext()).metric(pair))
        error, energy = error + own_error, energy + own_energy
    return error / energy


def captured(method: Method, lora: LoraAdapter, config: Any, tensors: Mapping[str, np.ndarray]) -> float:
    """Share of the energy that a payload holds."""
    return 1 - lost(lora, CompactAdapter(method.id, config, lora.shapes(), tensors))


def kept_by(method: Method, lora: LoraAdapter, **options: Any) -> float:
    """Share of the energy that the fit under these options keeps."""
    return captured(method, lora, *convert(method, lora, **options))


def random_compact(method: Method, config: Any, targets: tuple[Target, ...], seed: int = 0) -> CompactAdapter:
    """Any payload of a config without coded tensors; nothing checks the rules of the method on values."""
    rng, tensors = RNG(seed), {}
    for spec in method.specs(config, targets):
        numbers = rng.standard_normal(spec.shape).astype(np.float32)
        if spec.kind in ("code", "index"):
            dtype = np.uint8 if spec.kind == "code" else np.uint32
            tensors[spec.name] = rng.integers(0, spec.limit or 1 << spec.bits, spec.shape).astype(dtype)
        else:
            tensors[spec.name] = packing.round_half(numbers) if spec.kind == "half" else numbers
    name = methods.name_of(method.id, method.version)
    return CompactAdapter(name, config, targets, tensors, base=fingerprint(targets))


def written_transform(d: int) -> np.ndarray:
    """T(d) of formats/methods/nola.md, element by element."""

    def sylvester(a: int) -> np.ndarray:
        x = np.arange(1 << a)
        return 1 - 2 * (np.bitwise_count(x[:, None] & x) & 1).astype(np.int64)

    a = (d & -d).bit_length() - 1
    m = d >> a
    if m <= 127:
        odd = m * np.eye(m, dtype=np.int64) - 2 if m > 1 else np.ones((1, 1), np.int64)
        return np.kron(sylvester(a), odd)
    matrix = np.zeros((d, d), np.int64)
    powers = [p for p in range(d.bit_length() - 1, -1, -1) if d >> p & 1]
    at = 0
    for p in powers:
        matrix[at : at + (1 << p), at : at + (1 << p)] = sylvester(p) << (powers[0] - p) // 2
        at += 1 << p
    return matrix
