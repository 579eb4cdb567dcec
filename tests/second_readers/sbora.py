"""formats/methods/sbora.md"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .parts import Factors, Manifest, Payload, Tensors, shapes_of


def expand(manifest: Manifest, tensors: Tensors) -> Factors:
    config, payload, shapes = manifest["method"]["config"], Payload(manifest, tensors), shapes_of(manifest)
    levels, variant = config["levels"], config["variant"]
    counts = payload.index("counts", config["max_count"] + 1, len(shapes), len(levels)).tolist()
    assert max(map(max, counts)) == config["max_count"] and all(map(sum, zip(*counts, strict=True)))
    ranks = [sum(row) for row in counts]
    turned = [int(variant == "fb")] * len(shapes)  # 1 for FB
    if variant == "mixed":
        turned = payload.index("variants", 2, len(shapes)).tolist()
        assert {v for v, rank in zip(turned, ranks, strict=True) if rank} == {0, 1}
        assert not any(v for v, rank in zip(turned, ranks, strict=True) if not rank)
    places = [out if v else inner for (out, inner), v in zip(shapes, turned, strict=True)]
    lengths = [inner if v else out for (out, inner), v in zip(shapes, turned, strict=True)]
    most = max(n for n, rank in zip(places, ranks, strict=True) if rank)
    indices = iter(payload.index("indices", most, sum(ranks)).tolist())
    numbers: dict[int, Iterator[float]] = {}
    for level, q in enumerate(levels):
        total = sum(row[level] * length for row, length in zip(counts, lengths, strict=True))
        numbers[q] = iter((payload.half("half", total) if q == 16 else payload.code(f"codes.{q}", q, total)).tolist())
    scaled = sum(row[level] for row in counts for level, q in enumerate(levels) if q < 16)
    scales = iter(payload.half("scales", scaled).tolist())
    payload.end()
    factors = []
    for row, rank, fb, limit, length in zip(counts, ranks, turned, places, lengths, strict=True):
        assert rank <= limit
        units, lines = np.zeros((rank, limit), np.float32), np.zeros((rank, length), np.float32)
        used_places: set[int] = set()
        j = 0
        for q, count in zip(levels, row, strict=True):
            own = [next(indices) for _ in range(count)]
            assert own == sorted(own) and not used_places & set(own) and len(set(own)) == count
            assert all(place < limit for place in own)
            used_places |= set(own)
            for place in own:
                scale = 1.0 if q == 16 else next(scales)
                units[j, place] = 1
                lines[j] = [scale * next(numbers[q]) for _ in range(length)]
                j += 1
        factors.append((lines, units.T) if fb else (units, lines.T))
    assert all(next(rest, None) is None for rest in (indices, scales, *numbers.values()))
    return factors
