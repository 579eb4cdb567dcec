"""Factors of all experts in one tensor, as Tinker and others save them in PEFT's files:
``mlp.experts.w1.lora_A.weight`` (experts, r, in) and ``.lora_B.weight`` (experts, out, r); one of the two may be
shared, with a first dimension of 1.

``w1``, ``w2``, ``w3`` (or gate_proj, down_proj, up_proj) are the layers of single experts: ``mlp.experts.7.gate_proj``.
``gate_up_proj``, and ``down_proj`` beside it, are stacks as the model holds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from lrconvert.core.dtypes import Stored
from lrconvert.core.errors import LimitError, PairError, UnsupportedLoraError
from lrconvert.core.limits import FOREIGN
from lrconvert.formats.readers.peft.config import Settings
from lrconvert.formats.readers.peft.layers import Parts, halves
from lrconvert.formats.readers.shared.pairs import check_rank, read_experts
from lrconvert.formats.readers.shared.weights import Weights, load_finite
from lrconvert.lora.adapter import MATRIX, LoraTarget, Target

_LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_FUSED = "gate_up_proj"


def find(modules: Mapping[str, Parts]) -> frozenset[str]:
    """Return the modules whose factors are those of all experts. Raises E-LIMIT, E-PAIR, E-LORA-FEATURE."""
    found = frozenset(module for module, parts in modules.items() if _is_stack(module, parts))
    counts: dict[str, int] = {}
    for module in sorted(found):
        experts = _experts(modules[module])
        if counts.setdefault(module.rpartition(".")[0], experts) != experts:
            what = f"{module}: lora_A and lora_B are those of {experts} experts, other layers have others"
            raise PairError(what, fix="the file is incomplete")
    total = sum(_experts(modules[module]) for module in found)
    if total > FOREIGN.tensors:
        raise LimitError(f"the file adapts {total} experts; at most {FOREIGN.tensors} are read")
    # Tinker calls the attention `attn` for gpt-oss alone, whose base keeps the rows of gate and up by turns.
    if any(module.endswith((".w1", ".w3")) for module in found) and any(".attn." in module for module in modules):
        raise UnsupportedLoraError(
            f"{min(found)}: Tinker's experts of gpt-oss, whose base keeps the rows of w1 and w3 by turns in one stack",
            fix="merge it with tinker-cookbook, or let that export it for PEFT and convert the result",
        )
    return found


def read(
    module: str, parts: Parts, stacks: frozenset[str], settings: Settings, weights: Weights
) -> Iterator[LoraTarget]:
    """Yield a target for each expert of one of the `stacks`. Raises E-PAIR, E-LIMIT, E-CONFIG, E-DTYPE, E-VALUE."""
    a, b = halves(module, parts, "A", "B")
    if set(parts) != {"A", "B"}:
        raise PairError(f"{module}: the factors of all experts have lora_A and lora_B only")
    rank, experts = a.shape[1], _experts(parts)
    check_rank(module, rank)
    scale = settings.scale(module, rank)
    stored_a, stored_b = (
        Stored(half.dtype, np.broadcast_to(half.array, (experts, *half.array.shape[1:])))
        for half in (load_finite(weights, a), load_finite(weights, b))
    )
    root, _, leaf = module.rpartition(".")
    if f"{root}.{_FUSED}" in stacks:
        yield from read_experts(module, stored_a, stored_b, scale)
        return
    for number in range(experts):
        name = f"{root}.{number}.{_LEAVES.get(leaf, leaf)}.weight"
        one_a, one_b = (Stored(half.dtype, np.ascontiguousarray(half.array[number])) for half in (stored_a, stored_b))
        yield LoraTarget(Target(name, (b.shape[1], a.shape[2]), MATRIX), one_a, one_b, scale)


def _is_stack(module: str, parts: Parts) -> bool:
    a, b = parts.get("A"), parts.get("B")
    if a is None or b is None or len(a.shape) != 3 or len(b.shape) != 3 or ".experts." not in f".{module}":
        return False
    return a.shape[1] == b.shape[2] and (a.shape[0] == b.shape[0] or 1 in (a.shape[0], b.shape[0]))


def _experts(parts: Parts) -> int:
    return max(parts["A"].shape[0], parts["B"].shape[0])
