"""A LoRA as singular components, those with the most energy a bit first, and back; rounding to few levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Component:
    """Component number `rank` of target number `target`: b (out,) times a (in,), each with the root of the singular
    value."""

    target: int
    rank: int
    b: np.ndarray
    a: np.ndarray

    @property
    def energy(self) -> float:
        return float((self.b @ self.b) * (self.a @ self.a))


def components_of(lora: Any) -> list[list[Component]]:
    """Return the singular components of every target, the largest first."""
    rows = []
    for n, pair in enumerate(lora.targets):
        left, upper = np.linalg.qr(pair.B.astype(np.float64) * pair.scale)
        right, lower = np.linalg.qr(pair.A.astype(np.float64).T)
        u, s, vt = np.linalg.svd(upper @ lower.T)
        b, a = left @ u * np.sqrt(s), (right @ vt.T) * np.sqrt(s)
        rows.append([Component(n, k, b[:, k], a[:, k]) for k in range(len(s))])
    return rows


def dearest(components: Sequence[Component], bits_of: Callable[[Component], int], nbytes: int) -> list[Component]:
    """Return the components with the most energy a bit that fit in `nbytes`."""
    kept, left = [], 8 * nbytes
    for component in sorted(components, key=lambda c: -c.energy / bits_of(c)):
        if bits_of(component) <= left:
            kept.append(component)
            left -= bits_of(component)
    return kept


def as_lora(lora: Any, components: Sequence[Component]) -> Any:
    """Return `lora` with these components in the place of its factors; targets without one are left out."""
    from lrconvert.core.dtypes import Stored

    by_target: dict[int, list[Component]] = {}
    for component in components:
        by_target.setdefault(component.target, []).append(component)
    pairs = []
    for n, own in sorted(by_target.items()):
        a = np.ascontiguousarray(np.stack([c.a for c in own]), np.float32)
        b = np.ascontiguousarray(np.stack([c.b for c in own], 1), np.float32)
        pairs.append(replace(lora.targets[n], a=Stored("F32", a), b=Stored("F32", b), scale=1.0))
    return replace(lora, targets=tuple(pairs))


# --- rounding -------------------------------------------------------------------------------------------------------


def groups_of(length: int, group: int) -> int:
    return -(-length // group)


def nearest(row: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Return `row` rounded to 2^bits even levels between least and most of every group of numbers, zero among them."""
    parts = []
    for at in range(0, len(row), group):
        part = row[at : at + group]
        low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
        step = float(np.float16((high - low) / (2**bits - 1))) or 1.0
        zero = np.clip(np.round(-low / step), 0, 2**bits - 1)
        parts.append((np.clip(np.round(part / step) + zero, 0, 2**bits - 1) - zero) * step)
    return np.concatenate(parts)


def nearest_bits(length: int, bits: int, group: int) -> int:
    """Bits of `nearest`: codes, and a step at 16 bit and a zero level for every group."""
    return length * bits + groups_of(length, group) * (16 + bits)


def signs(row: np.ndarray, group: int) -> np.ndarray:
    """Return the signs of `row` times the mean size of every group."""
    parts = [row[at : at + group] for at in range(0, len(row), group)]
    return np.concatenate([np.where(part < 0, -1.0, 1.0) * float(np.float16(np.abs(part).mean())) for part in parts])


def signs_bits(length: int, group: int) -> int:
    return length + groups_of(length, group) * 16
