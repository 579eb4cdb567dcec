"""formats/methods/nola.md and, for the seeded numbers, formats/prng-v1.md: term by term, without fast transforms."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator

import numpy as np

from .parts import Factors, Manifest, Payload, Tensors, shapes_of

LOW = 2**32 - 1
MAPS = {"u8": (8, 4, 8, 0), "u24": (24, 1, 0, 8), "sign": (1, 32, 1, 0)}  # q, L, s, t
UNITS = {"u8": 2.0**-8, "u24": 2.0**-24, "sign": 1.0}


# --- prng-v1.md -----------------------------------------------------------------------------------------------------


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Section 1."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xCD9E8D57 * x2, 0xD2511F53 * x0
        x0, x1, x2, x3 = (first >> 32) ^ x1 ^ k0, first & LOW, (second >> 32) ^ x3 ^ k1, second & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return x0, x1, x2, x3


def stream_id(label: str) -> int:
    return int.from_bytes(hashlib.sha256(b"lrconvert/basis/v1\0" + label.encode()).digest()[:8], "little")


def words(seed: int, label: str, k: int, count: int) -> list[int]:
    """The first `count` words of basis k of a stream (section 2)."""
    stream = stream_id(label)
    numbers: list[int] = []
    for block in range(-(-count // 4)):
        numbers += philox((block, k, stream & LOW, stream >> 32), (seed & LOW, seed >> 32))
    return numbers[:count]


def numerators(seed: int, label: str, kind: str, k: int, count: int) -> np.ndarray:
    """Of the first `count` elements of basis k under a map (section 3)."""
    q, lanes, s, t = MAPS[kind]
    drawn = words(seed, label, k, -(-count // lanes))
    codes = [(drawn[e // lanes] >> (s * (e % lanes) + t)) % 2**q for e in range(count)]
    return np.array([2 * c + 1 - 2**q for c in codes], np.int64)


# --- nola.md --------------------------------------------------------------------------------------------------------


def odd_part(d: int) -> int:
    return d // (d & -d)


def blocks_of(d: int) -> list[tuple[int, int]]:
    """(a_j, factor) of the blocks of T(d) where its odd part is above 127."""
    powers = [a for a in reversed(range(d.bit_length())) if d >> a & 1]
    return [(a, 2 ** ((powers[0] - a) // 2)) for a in powers]


def sylvester(x: int, count: int) -> np.ndarray:
    """Row x of the Sylvester-Hadamard matrix of that many columns."""
    return np.array([-1 if (x & y).bit_count() % 2 else 1 for y in range(count)], np.int64)


def row_of(d: int, row: int) -> np.ndarray:
    """A row of T(d)."""
    m = odd_part(d)
    if m == 1:
        return sylvester(row, d)
    if m <= 127:
        inner = np.full(m, -2, np.int64)
        inner[row % m] = m - 2
        return np.kron(sylvester(row // m, d // m), inner)
    row_values, at = np.zeros(d, np.int64), 0
    for a, factor in blocks_of(d):
        if at <= row < at + 2**a:
            row_values[at : at + 2**a] = factor * sylvester(row - at, 2**a)
        at += 2**a
    return row_values


def order(seed: int, role: str, d: int) -> Iterator[int]:
    """The rows of T(d) in the order of their use."""
    b = (d - 1).bit_length()
    w = words(seed, f"nola/{role}/{d}/order", 0, 8)
    for start in range(2**b):
        x = start
        for j in range(4):
            y = (x * (2 * w[2 * j] + 1) + w[2 * j + 1]) % 2**b
            x = y ^ (y >> -(-b // 2))
        if x < d:
            yield x


def expand(manifest: Manifest, tensors: Tensors) -> Factors:
    return {1: version_1, 2: version_2}[manifest["method"]["version"]](manifest, tensors)


def row_on_basis(role: str, seed: int, numbers: list[int]) -> np.ndarray:
    """S(n) / 2^p of version 2 for one row, in float64."""
    d = len(numbers)
    m = odd_part(d)
    assert d * (m + 2 if 3 <= m <= 127 else 1) < 2**29
    whole = sum((c * row_of(d, i) for i, c in enumerate(numbers)), np.zeros(d, np.int64))
    square = m * d if m <= 127 else 1 << d.bit_length() - 1
    p = max(p for p in range(40) if 4**p <= square)
    return numerators(seed, f"nola/{role}/{d}/signs", "sign", 0, d) * whole.astype(np.float64) / 2.0**p


def version_2(manifest: Manifest, tensors: Tensors) -> Factors:
    config, payload, shapes = manifest["method"]["config"], Payload(manifest, tensors), shapes_of(manifest)
    seed = int(config["seed"])
    assert config["seed"] == str(seed) and 0 <= seed < 2**64
    counts = payload.index("counts", config["max_count"] + 1, len(shapes)).tolist()
    assert max(counts) == config["max_count"] and sum(counts) == config["components"]
    models = payload.index("models", 64, config["components"], 2).tolist()
    gains = iter(payload.half("gains", config["components"]).tolist())
    sides = [(inner, out) for (out, inner), count in zip(shapes, counts, strict=True) for _ in range(count)]
    rows = [row for pair, lengths in zip(models, sides, strict=True) for row in zip(pair, lengths, strict=True)]
    numbers = iter(payload.coded("codes", config["length"], rows).tolist())
    payload.end()
    factors = []
    for (out, inner), count in zip(shapes, counts, strict=True):
        a, b = np.zeros((count, inner), np.float32), np.zeros((out, count), np.float32)
        for j in range(count):
            gain = next(gains)
            h = math.floor(math.frexp(gain)[1] / 2)
            a[j] = row_on_basis("A", seed, [next(numbers) for _ in range(inner)]) * (gain / 2.0**h)
            b[:, j] = row_on_basis("B", seed, [next(numbers) for _ in range(out)]) * 2.0**h
        factors.append((a, b))
    return factors


def version_1(manifest: Manifest, tensors: Tensors) -> Factors:
    config, payload, shapes = manifest["method"]["config"], Payload(manifest, tensors), shapes_of(manifest)
    hadamard, kind, bits, base = config["family"] == "hadamard", config["map"], config["bits"], config["base_term"]
    seed = int(config["seed"])
    assert config["seed"] == str(seed) and 0 <= seed < 2**64 and (kind == "sign" or not hadamard)

    plain = [min(config["rank"], out, inner) for out, inner in shapes]
    ranks = payload.index("ranks", config["rank"] + 1, len(shapes)).tolist() if config["ranks"] else plain
    assert max(ranks) == config["rank"] and config["ranks"] == (ranks != plain)
    assert all(rank <= min(shape) for rank, shape in zip(ranks, shapes, strict=True))
    sizes = [(r * inner, out * r) for (out, inner), r in zip(shapes, ranks, strict=True)]
    most = config["num_basis"]
    usual = [[min(most or d, d) for d in pair] for pair in sizes]
    used = usual
    if config["counts"]:
        stored = payload.index("counts", most + 1, len(shapes), 2).tolist()
        assert all(
            k < max(d, 1) for row, pair in zip(stored, sizes, strict=True) for k, d in zip(row, pair, strict=True)
        )
        used = [[k or d for k, d in zip(row, pair, strict=True)] for row, pair in zip(stored, sizes, strict=True)]
    assert config["counts"] == (used != usual)
    flat = [(k, d) for row, pair in zip(used, sizes, strict=True) for k, d in zip(row, pair, strict=True)]
    assert most == max(0 if k == d else k for k, d in flat)

    total, live = sum(k for k, _ in flat), sum(rank > 0 for rank in ranks)
    if bits == 16:
        codes = 2 * payload.index("codes", 2**16, total) + 1 - 2**16
    else:
        codes = payload.code("codes", bits, total)
    scales = iter(payload.half("scales", live, 2).tolist())
    base_scales = iter(payload.half("base_scales", live).tolist() if base else ())
    payload.end()
    coefficients = iter(codes.tolist())

    def factor(role: str, d: int, k: int, scale: float, term: float | None) -> np.ndarray:
        """vec of a factor."""
        m = odd_part(d)
        growth = (m + 2 if 3 <= m <= 127 else 1) if hadamard else 2 ** MAPS[kind][0]
        assert k * growth * 2**bits < 2**53 and k <= 2**32 and d <= 2**32 * 4 * MAPS[kind][1]
        largest = 1 if not hadamard or m == 1 else m if m <= 127 else blocks_of(d)[-1][1]
        assert abs(scale) * k * largest * 2.0**bits + abs(term or 0.0) < 2.0**127
        whole = np.zeros(d, np.int64)
        rows = itertools.islice(order(seed, role, d), k) if hadamard else range(k)
        for row in rows:
            n = next(coefficients)
            whole += n * (row_of(d, row) if hadamard else numerators(seed, f"nola/{role}/{d}/basis", kind, row, d))
        if hadamard:
            whole *= numerators(seed, f"nola/{role}/{d}/signs", "sign", 0, d)
        assert (np.abs(whole) < 2**53).all()
        values = whole.astype(np.float64) * (1.0 if hadamard else UNITS[kind]) * scale
        if term is not None and role == "A":
            own = numerators(seed, f"nola/A/{d}/base", kind, 0, d).astype(np.float64) * UNITS[kind]
            values = values + own * term
        return values.astype(np.float32)

    factors = []
    for (out, inner), rank, (d_a, d_b), (k_a, k_b) in zip(shapes, ranks, sizes, used, strict=True):
        if not rank:
            factors.append((np.zeros((0, inner), np.float32), np.zeros((out, 0), np.float32)))
            continue
        s_a, s_b = next(scales)
        term = next(base_scales) if base else None
        a = factor("A", d_a, k_a, s_a, term).reshape(rank, inner)
        factors.append((a, factor("B", d_b, k_b, s_b, term).reshape(out, rank)))
    assert next(coefficients, None) is None and next(scales, None) is None and next(base_scales, None) is None
    return factors
