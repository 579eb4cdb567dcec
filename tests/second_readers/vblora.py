"""formats/methods/vblora.md, one row at a time."""

from __future__ import annotations

import numpy as np

from .parts import Factors, Manifest, Payload, Tensors, shapes_of


def expand(manifest: Manifest, tensors: Tensors) -> Factors:
    config, payload, shapes = manifest["method"]["config"], Payload(manifest, tensors), shapes_of(manifest)
    h, b, k, m = config["num_vectors"], config["vector_length"], config["top_k"], config["weight_bits"]
    ranks = [config["rank"]] * len(shapes)
    if not config["uniform"]:
        ranks = payload.index("ranks", config["rank"] + 1, len(shapes)).tolist()
    passes = [1] * config["rows"]
    if config["passes"] > 1:
        passes = (payload.index("passes", config["passes"], config["rows"]) + 1).tolist()
    if config["bits"] == 32:
        bank = payload.single("bank", h, b)
    elif config["bits"] == 16:
        bank = payload.half("bank", h, b)
    else:
        bank = payload.code("bank", config["bits"], h, b) * payload.half("scales", h)[:, None]
    sizes = [n for (out, inner), rank in zip(shapes, ranks, strict=True) for n in [inner] * rank + [out] * rank]
    total = sum(p * -(-n // b) for n, p in zip(sizes, passes, strict=True))
    indices = payload.index("indices", h, total, k)
    if m == 32:
        weights = payload.single("weights", total, k - 1)
    else:
        weights = payload.index("weights", 2**m, total, k - 1) / 2.0 ** (m + 1)
    gains = iter(payload.half("gains", sum(passes)).tolist()) if config["gains"] else None
    payload.end()
    code, rows = 0, []
    for n, turns in zip(sizes, passes, strict=True):
        row = None
        for _ in range(turns):
            pieces = []
            for _ in range(-(-n // b)):
                first = 1.0
                for weight in weights[code]:
                    first = first - weight
                piece = bank[indices[code, 0]] * first
                for s in range(1, k):
                    piece = piece + bank[indices[code, s]] * weights[code, s - 1]
                pieces.append(piece)
                code += 1
            value = np.concatenate(pieces)[:n]
            value = value if gains is None else value * next(gains)
            row = value if row is None else row + value
        assert row is not None
        rows.append(row.astype(np.float32))
    assert code == total and (gains is None or next(gains, None) is None)
    factors, at = [], 0
    for (out, inner), rank in zip(shapes, ranks, strict=True):
        a = np.array(rows[at : at + rank], np.float32).reshape(rank, inner)
        right = np.array(rows[at + rank : at + 2 * rank], np.float32).reshape(rank, out)
        factors.append((a, right.T))
        at += 2 * rank
    return factors
