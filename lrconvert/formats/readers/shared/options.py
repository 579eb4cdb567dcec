"""What a user may ask of every reader."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ReadOptions:
    """What a user may ask of every reader.

    `allow_pickle`: load ``.bin`` and ``.pt`` files, with torch's loader that builds tensors only. `base`: the folder of
    the base, for layouts that do not say how wide its layers are or that spell its names in their own way. `layout`:
    the id of the reader to use, whatever the content looks like. `alpha`: for layouts that do not state it; the scale
    of a module is alpha / r.
    """

    allow_pickle: bool = False
    base: Path | None = None
    layout: str | None = None
    alpha: float | None = None
