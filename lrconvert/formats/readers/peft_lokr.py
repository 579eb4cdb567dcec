"""PEFT LoKr: ``base_model.model.<module>.lokr_w1`` and ``lokr_w2``, each whole or as ``_a`` and ``_b``, with a core
``lokr_t2`` of a convolution. The update is ``alpha / r`` times their Kronecker product, whose rank is the product of
their ranks. Paper: arXiv 2212.10650, 2309.14859.
"""

from __future__ import annotations

from pathlib import Path

from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.shared import peft_kinds, products
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.lora.adapter import LoraAdapter

_UNREAD = (
    *("decompose_both", "decompose_factor", "module_dropout", "rank_dropout", "rank_dropout_scale"),
    "use_effective_conv2d",
)


def recognises(path: Path) -> bool:
    """Return whether the configuration says LOKR."""
    return peft_kinds.is_of_kind(path, "LOKR")


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read a LoKr. Raises E-CONFIG, E-LORA-FEATURE, E-PATTERN, E-TENSOR, E-PAIR, E-EMPTY, E-LIMIT, E-DTYPE, E-VALUE."""
    return products.read_peft(path, options, "LOKR", products.LOKR, _UNREAD)


READER = Reader("peft_lokr", "PEFT LoKr folder", read, recognises, takes_rank=True)
