"""formats/methods/lowrank.md"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .parts import Factors, Manifest, Payload, Tensors, shapes_of


def expand(manifest: Manifest, tensors: Tensors) -> Factors:
    return {1: version_1, 2: version_2}[manifest["method"]["version"]](manifest, tensors)


def version_2(manifest: Manifest, tensors: Tensors) -> Factors:
    config, payload, shapes = manifest["method"]["config"], Payload(manifest, tensors), shapes_of(manifest)
    counts = payload.index("counts", config["max_count"] + 1, len(shapes)).tolist()
    assert max(counts) == config["max_count"] and sum(counts) == config["components"]
    models = payload.index("models", 64, config["components"], 2).tolist()
    gains = iter(payload.half("gains", config["components"]).astype(np.float32))
    sides = [(inner, out) for (out, inner), count in zip(shapes, counts, strict=True) for _ in range(count)]
    rows = [row for pair, lengths in zip(models, sides, strict=True) for row in zip(pair, lengths, strict=True)]
    numbers = payload.coded("codes", config["length"], rows).astype(np.float32)
    payload.end()
    factors, at = [], 0
    for (out, inner), count in zip(shapes, counts, strict=True):
        a, b = np.zeros((count, inner), np.float32), np.zeros((out, count), np.float32)
        for j in range(count):
            gain, half = next(gains), np.float32(1)
            while gain and abs(gain) >= 2 * half * half:
                half *= 2
            while gain and abs(gain) < half * half / 2:
                half /= 2
            a[j] = gain / half * numbers[at : at + inner]
            b[:, j] = half * numbers[at + inner : at + inner + out]
            at += inner + out
        factors.append((a, b))
    return factors


def version_1(manifest: Manifest, tensors: Tensors) -> Factors:
    config, payload, shapes = manifest["method"]["config"], Payload(manifest, tensors), shapes_of(manifest)
    levels, group = config["levels"], config["group_size"]
    counts = payload.index("counts", config["max_count"] + 1, len(shapes), len(levels)).tolist()
    numbers: dict[int, Iterator[float]] = {}
    sizes: list[int] = []  # of the rows and columns that have scales
    for level, q in enumerate(levels):
        total = sum(row[level] * sum(shape) for row, shape in zip(counts, shapes, strict=True))
        numbers[q] = iter((payload.half("half", total) if q == 16 else payload.code(f"codes.{q}", q, total)).tolist())
        if q < 16:
            sizes += [n for (out, inner), row in zip(shapes, counts, strict=True) for n in [inner, out] * row[level]]
    scales = iter(payload.half("scales", sum(-(-n // (group or n)) for n in sizes)).tolist())
    payload.end()

    def scaled(q: int, length: int) -> list[float]:
        row = [next(numbers[q]) for _ in range(length)]
        if q == 16:
            return row
        size = group or length
        own = [next(scales) for _ in range(0, length, size)]
        return [value * own[n // size] for n, value in enumerate(row)]

    factors = []
    for (out, inner), row in zip(shapes, counts, strict=True):
        a, b = np.zeros((sum(row), inner), np.float32), np.zeros((out, sum(row)), np.float32)
        component = 0
        for q, count in zip(levels, row, strict=True):
            for _ in range(count):
                a[component] = scaled(q, inner)
                b[:, component] = scaled(q, out)
                component += 1
        factors.append((a, b))
    assert next(scales, None) is None and all(next(rest, None) is None for rest in numbers.values())
    return factors
