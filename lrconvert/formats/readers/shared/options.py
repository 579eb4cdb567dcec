"""The options that every reader takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lrconvert.core.options import option


@dataclass(frozen=True)
class ReadOptions:
    """The options that every reader takes.

    `allow_pickle`: load ``.bin`` and ``.pt`` files, with torch's loader that builds tensors only. `base`: the folder of
    the base, for layouts that do not say how wide its layers are or that spell its names in their own way. `layout`:
    the id of the reader to use, whatever the content looks like. `alpha`: for layouts that do not state it; the scale
    of a module is alpha / r.
    """

    allow_pickle: bool = option(
        False, "Read .bin and .pt adapters too, with torch's tensors-only loader; only files that you trust."
    )
    base: Path | None = None
    layout: str | None = option(None, "The layout of the source, whatever it looks like.", kind="layout", flag="--from")
    alpha: float | None = option(None, "Alpha of a source that does not state it; a module's scale is alpha / r.")
