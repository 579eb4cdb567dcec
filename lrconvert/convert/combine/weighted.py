"""An adapter of a combination."""

from __future__ import annotations

from dataclasses import dataclass

from lrconvert.lora.adapter import CompactAdapter, LoraAdapter


@dataclass(frozen=True)
class Weighted:
    """An adapter of a combination, its weight, and how the user calls it."""

    adapter: LoraAdapter | CompactAdapter
    weight: float
    name: str = ""
