"""PEFT LoHa: ``base_model.model.<module>.hada_w1_a`` (out, r), ``hada_w1_b`` (r, in) and the same of ``w2``, with cores
``hada_t1`` and ``hada_t2`` of a convolution. The update is ``alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b)``, element by
element: a LoRA of rank r * r. Paper: arXiv 2108.06098.
"""

from __future__ import annotations

from pathlib import Path

from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.shared import peft_kinds, products
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.lora.adapter import LoraAdapter

_UNREAD = ("module_dropout", "rank_dropout", "use_effective_conv2d")


def recognises(path: Path) -> bool:
    """Return whether the configuration says LOHA."""
    return peft_kinds.is_of_kind(path, "LOHA")


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read a LoHa. Raises E-CONFIG, E-LORA-FEATURE, E-PATTERN, E-TENSOR, E-PAIR, E-EMPTY, E-LIMIT, E-DTYPE, E-VALUE."""
    return products.read_peft(path, options, "LOHA", products.LOHA, _UNREAD)


READER = Reader("peft_loha", "PEFT LoHa folder", read, recognises, takes_rank=True)
