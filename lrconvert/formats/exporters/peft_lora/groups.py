"""Modules that servers fuse into one layer: an adapter has all of a group or none.

SGLang takes q_proj with v_proj and up_proj with gate_proj only; vLLM and PEFT take groups and parts of them alike. So
what is pruned beside an adapted member, or was never adapted, gets factors of zeros.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from lrconvert.formats.exporters.shared.plain import Pair
from lrconvert.lora import class_names
from lrconvert.lora.adapter import Target

# The members of each group by the last part of their names, and those without which an adapter is refused.
_GROUPS = (
    (("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj")),
    (("gate_proj", "up_proj"), ("gate_proj",)),
    (("q_a_proj", "kv_a_proj_with_mqa"), ("q_a_proj",)),
    (("in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z"), ("in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z")),
)


def partners(modules: Iterable[str]) -> set[str]:
    """Return the modules of all groups that one of `modules` is in."""
    return {name for module in modules for name in _others(module, 0)}


def missing(modules: Collection[str], targets: Collection[Target], config: Mapping[str, Any] | None) -> list[Pair]:
    """Return pairs of rank 0 for what groups of `modules` need beside the `targets`, if the class of a base with this
    config.json is known and has it."""
    adapted = {target.name for target in targets}
    wanted = {f"{name}.weight" for module in modules for name in _others(module, 1)} - adapted
    known = next(iter(class_names.classes(config)), None) if wanted and config is not None else None
    if known is None:
        return []
    shapes = {name: known.shapes[name] for name in sorted(wanted) if len(known.shapes.get(name, ())) == 2}
    return [
        Pair(Target(name, (out, inner)), np.zeros((0, inner), np.float32), np.zeros((out, 0), np.float32))
        for name, (out, inner) in shapes.items()
    ]


def _others(module: str, which: int) -> Iterable[str]:
    """The members of a module's group: all, or those that an adapter needs (`which` 1)."""
    above, _, leaf = module.rpartition(".")
    return [f"{above}.{name}" for group in _GROUPS if leaf in group[0] for name in group[which]]
