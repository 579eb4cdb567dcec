"""formats/methods/bone.md"""

from __future__ import annotations

import numpy as np

from .parts import Factors, Manifest, Payload, Tensors, shapes_of


def expand(manifest: Manifest, tensors: Tensors) -> Factors:
    config, payload, shapes = manifest["method"]["config"], Payload(manifest, tensors), shapes_of(manifest)
    bits, mini = config["bits"], config["variant"] == "mini"
    ranks = [config["rank"]] * len(shapes)
    if not config["uniform"]:
        ranks = payload.index("ranks", config["rank"] + 1, len(shapes)).tolist()
        assert max(ranks) == config["rank"] and len(set(ranks)) > 1
    shards = [int(config["shard"] == "out")] * len(shapes)  # 1 along outputs
    if config["shard"] == "mixed":
        shards = payload.index("shards", 2, len(shapes)).tolist()
        assert {side for side, r in zip(shards, ranks, strict=True) if r} == {0, 1}
        assert not any(side for side, r in zip(shards, ranks, strict=True) if not r)
    blocks = []  # (r, m)
    for (out, inner), r, along_out in zip(shapes, ranks, shards, strict=True):
        m = config["mini_rank"] if mini else inner if along_out else out
        assert not r or (r <= (out if along_out else inner) and not (mini and (along_out or out % m)))
        blocks.append((r, m))
    assert mini == (config["mini_rank"] > 0)
    count = sum(r * m for r, m in blocks)
    if bits == 32:
        numbers = payload.single("blocks", count)
    elif bits == 16:
        numbers = payload.half("blocks", count)
    else:
        numbers = payload.code("blocks", bits, count).astype(np.float64)
        group = config["group_size"]
        assert not group or max(m for r, m in blocks if r) > group
        sizes = [min(group or m, m - at) for r, m in blocks for _ in range(r) for at in range(0, m, group or m)]
        numbers *= np.repeat(payload.half("scales", len(sizes)), sizes)
    payload.end()
    factors, at = [], 0
    for (out, inner), (r, m), along_out in zip(shapes, blocks, shards, strict=True):
        d = numbers[at : at + r * m].reshape(r, m)
        at += r * m
        a, b = np.zeros((r, inner), np.float32), np.zeros((out, r), np.float32)
        for k in range(r):
            for i in range(inner):
                a[k, i] = d[k, i % m] if along_out else i % r == k
            for o in range(out):
                b[o, k] = o % r == k if along_out else d[k, o % m]
        factors.append((a, b))
    return factors


def update_on(manifest: Manifest, factors: tuple[np.ndarray, np.ndarray], weight: np.ndarray) -> np.ndarray:
    """The variant "bat": the update (out, in) on the base's matrix, one operation after the other in binary64."""
    assert manifest["method"]["config"]["variant"] == "bat" and len(manifest["base"]["content"]) == 64
    b = factors[1].astype(np.float64)  # (out, r): column c is row c of D
    (out, inner), r = weight.shape, b.shape[1]
    update = np.zeros_like(weight)
    if r == 0:
        return update
    assert out % r == 0 and inner % r == 0
    for o in range(out):
        for n in range(inner):
            j, c = n - n % r, n % r
            total = b[o, c]
            for k in range(r):
                total = total + weight[o, j + k] * b[o - o % r + k, c]
            update[o, n] = total
    return update
