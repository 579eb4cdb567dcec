"""SVD resize: the largest singular components, each row rounded to the nearest of 2^bits levels (groups of 128).

That is what resizing tools and weight quantizers do one after the other; the ranks are best for the budget here, where
tools take one rank for all.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

from chat.peers.components import as_lora, components_of, dearest, nearest, nearest_bits

_GROUP = 128


def resized(lora: Any, nbytes: int, bits: int) -> tuple[Any, int]:
    """Return the LoRA of at most `nbytes`, and its bytes."""

    def bits_of(component: Any) -> int:
        return nearest_bits(len(component.a), bits, _GROUP) + nearest_bits(len(component.b), bits, _GROUP)

    kept = dearest(list(chain(*components_of(lora))), bits_of, nbytes)
    rounded = [replace(c, a=nearest(c.a, bits, _GROUP), b=nearest(c.b, bits, _GROUP)) for c in kept]
    return as_lora(lora, rounded), -(-sum(map(bits_of, kept)) // 8)
