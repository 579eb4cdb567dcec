"""The options that every reader takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lrconvert.core.options import option

MOST_RANK = 256  # VeRA's usual one, and that of a LoHa or LoKr of 16


@dataclass(frozen=True)
class ReadOptions:
    """The options that every reader takes.

    `allow_pickle`: load ``.bin`` and ``.pt`` files, with torch's loader that builds tensors only. `base`: the folder of
    the base, for layouts that do not say how wide its layers are or that spell its names in their own way. `layout`:
    the id of the reader to use, whatever the content looks like. `alpha`: for layouts that do not state it; the scale
    of a module is alpha / r. `source_rank`: the largest rank of the LoRA that an adapter of another kind becomes; what
    is above is cut by the SVD.
    """

    allow_pickle: bool = option(
        False, "Read .bin and .pt adapters too, with torch's tensors-only loader; only files that you trust."
    )
    base: Path | None = None
    layout: str | None = option(None, "The layout of the source, whatever it looks like.", kind="layout", flag="--from")
    alpha: float | None = option(None, "Alpha of a source that does not state it; a module's scale is alpha / r.")
    source_rank: int | None = option(
        None, "The largest rank of the LoRA that an adapter of another kind becomes (256).", least=1
    )

    @property
    def most_rank(self) -> int:
        return MOST_RANK if self.source_rank is None else self.source_rank

    def for_ours(self) -> ReadOptions:
        """Return the options that an lrconvert file takes, too."""
        return replace(self, layout=None, alpha=None, source_rank=None)
