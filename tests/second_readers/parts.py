"""What formats/lrconvert-v1.md says about targets and payload, for all second readers; it holds in version 2 as well.
Nothing here is of lrconvert."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from . import coded

Manifest = Mapping[str, Any]
Tensors = Mapping[str, bytes]
Factors = list[tuple[np.ndarray, np.ndarray]]
Reader = Callable[[Manifest, Tensors], Factors]


def list_targets(manifest: Manifest) -> list[tuple[str, list[int], str]]:
    """(name, shape, view) in target order (section 6)."""
    targets = []
    for entry in manifest["targets"]:
        if "name" in entry:
            targets.append((entry["name"], entry["shape"], entry.get("view", "matrix")))
            continue
        for first, last in zip(entry["ranges"][::2], entry["ranges"][1::2], strict=True):
            for number in range(first, last + 1):
                for member in entry["members"]:
                    name = f"{entry['prefix']}{number}{member['suffix']}"
                    targets.append((name, member["shape"], member.get("view", "matrix")))
    return sorted(targets, key=lambda t: (t[0].encode(), t[1], t[2]))


def out_in(shape: Sequence[int], view: str) -> tuple[int, int]:
    """The matrix that a view shows (section 6.2)."""
    kind, *numbers = view.split(":")
    if kind == "transposed":
        return shape[1], shape[0]
    if kind == "rows":
        return int(numbers[1]) - int(numbers[0]), shape[1]
    if kind == "expert":
        return shape[1], shape[2]
    if kind == "expert_transposed":
        return shape[2], shape[1]
    return shape[0], math.prod(shape[1:])


def shapes_of(manifest: Manifest) -> list[tuple[int, int]]:
    """(out, in) of all targets."""
    return [out_in(shape, view) for _, shape, view in list_targets(manifest)]


def width_of(limit: int) -> int:
    """max(1, ceil(log2 limit))"""
    width = 1
    while 2**width < limit:
        width += 1
    return width


def unpack(data: bytes, width: int, count: int) -> np.ndarray:
    """`count` integers of `width` bits (section 9.1)."""
    assert len(data) == -(-count * width // 8)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    assert not bits[count * width :].any()
    rows = bits[: count * width].reshape(count, width).astype(np.int64)
    values: np.ndarray = rows @ (1 << np.arange(width, dtype=np.int64))
    return values


class Payload:
    """The tensors of the method, each taken once and in the order of the page: exponents stand in that order too, and
    in version 2 of the container the tensors themselves."""

    def __init__(self, manifest: Manifest, tensors: Tensors) -> None:
        self.left = {name: data for name, data in tensors.items() if not name.startswith("extra.")}
        self.exponents = [n - 256 if n > 127 else n for n in bytes.fromhex(manifest["method"]["exponents"])]

    def take(self, name: str, nbytes: int) -> bytes:
        """What has no elements is left out, so it has to be absent."""
        if not nbytes:
            return b""
        if "lrconvert" in self.left:
            data, self.left["lrconvert"] = self.left["lrconvert"][:nbytes], self.left["lrconvert"][nbytes:]
        else:
            data = self.left.pop(name)
        assert len(data) == nbytes
        return data

    def packed(self, name: str, width: int, count: int) -> np.ndarray:
        """`count` integers of `width` bits (section 9.1)."""
        return unpack(self.take(name, -(-count * width // 8)), width, count)

    def index(self, name: str, limit: int, *shape: int) -> np.ndarray:
        values = self.packed(name, width_of(limit), math.prod(shape))
        assert (values < limit).all()
        return values.reshape(shape)

    def code(self, name: str, bits: int, *shape: int) -> np.ndarray:
        """Odd integers."""
        codes: np.ndarray = 2 * self.packed(name, bits, math.prod(shape)) + 1 - 2**bits
        return codes.reshape(shape)

    def half(self, name: str, *shape: int) -> np.ndarray:
        """In float64."""
        if not math.prod(shape):
            return np.zeros(shape)
        stored = np.frombuffer(self.take(name, 2 * math.prod(shape)), "<f2").astype(np.float64)
        exponent = self.exponents.pop(0)
        assert np.isfinite(stored).all() and not (np.signbit(stored) & (stored == 0)).any()
        largest = float(np.abs(stored).max())
        spelled = math.frexp(largest)[1] - 1 - 14 + exponent  # floor(log2 m) - 14
        assert exponent == (max(-96, min(96, spelled)) if largest else 0)
        return (stored * 2.0**exponent).reshape(shape)

    def coded(self, name: str, length: int, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """The values of rows (model, how many): integers (coded-v1.md)."""
        return np.array([coded.value(q) for q in coded.decode(self.take(name, length), rows)], np.int64)

    def single(self, name: str, *shape: int) -> np.ndarray:
        """In float64."""
        stored = np.frombuffer(self.take(name, 4 * math.prod(shape)), "<f4").astype(np.float64)
        assert np.isfinite(stored).all() and not (np.signbit(stored) & (stored == 0)).any()
        return stored.reshape(shape)

    def end(self) -> None:
        """Nothing is left."""
        assert not any(self.left.values()) and not self.exponents
