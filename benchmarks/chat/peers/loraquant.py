"""LoRAQuant (arXiv 2510.26690): singular components in two parts, the larger at 2 bit, the rest as signs.

As published: the first part holds a share of 0.8 of a target's energy, rounded to the nearest in groups of 128, each of
its components moved by gradients through the rounding (straight-through, 300 steps of 0.01) to fit better; the rest is
1 bit and the mean size of 128. That takes some 1.65 bit a number; for a smaller budget the components with the least
energy a bit are left out, over all targets.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from chat.peers.components import Component, as_lora, components_of, dearest, nearest, nearest_bits, signs, signs_bits

_GROUP, _BITS, _SHARE, _STEPS, _RATE = 128, 2, 0.8, 300, 1e-2


def quantized(lora: Any, nbytes: int) -> tuple[Any, int]:
    """Return the LoRA of at most `nbytes`, and its bytes."""
    components, first = [], set[tuple[int, int]]()
    for row in components_of(lora):
        energies = np.cumsum([component.energy for component in row])
        high = max(1, int(np.searchsorted(energies, _SHARE * energies[-1])))
        first |= {(component.target, component.rank) for component in row[:high]}
        components += row

    def is_first(component: Component) -> bool:
        return (component.target, component.rank) in first

    def bits_of(component: Component) -> int:
        sizes = (len(component.a), len(component.b))
        if is_first(component):
            return sum(nearest_bits(size, _BITS, _GROUP) for size in sizes)
        return sum(signs_bits(size, _GROUP) for size in sizes)

    kept = dearest(components, bits_of, nbytes)
    made = [_moved(c) if is_first(c) else replace(c, a=signs(c.a, _GROUP), b=signs(c.b, _GROUP)) for c in kept]
    return as_lora(lora, made), -(-sum(map(bits_of, kept)) // 8)


def _moved(component: Component) -> Component:
    """The component at 2 bit after the descent of the norm of its error, or at once where that is better."""
    a, b = component.a.copy(), component.b.copy()
    best, least = component, np.inf
    for _ in range(_STEPS + 1):
        qa, qb = nearest(a, _BITS, _GROUP), nearest(b, _BITS, _GROUP)
        # || b a^T - qb qa^T ||_F and its gradients from inner products alone: the matrices are of rank one.
        square = component.energy - 2 * (component.b @ qb) * (component.a @ qa) + (qb @ qb) * (qa @ qa)
        error = float(np.sqrt(max(square, 1e-30)))
        if error < least:
            best, least = replace(component, a=qa, b=qb), error
        a -= _RATE * ((qb @ qb) * qa - (component.b @ qb) * component.a) / error
        b -= _RATE * ((qa @ qa) * qb - (component.a @ qa) * component.b) / error
    return best
