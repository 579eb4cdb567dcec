"""Tensors of a base that several names share: which, by asking transformers' class of the base.

A checkpoint stores a shared tensor once, as a rule, under any of its names. The class is asked only about names that
may be shared, as asking costs seconds: parameters of numbered layers never are, but in families that are known for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lrconvert.core.errors import LrcError
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.lora import architecture, renamings
from lrconvert.lora.architecture import TIE, Architecture
from lrconvert.lora.name_index import NameIndex

_NUMBERED = re.compile(r"\.(?:0|[1-9][0-9]*)\.")
# Families that share parameters of numbered layers; a test asks all of transformers' classes.
TIED_LAYERS = frozenset(
    (
        *("d_fine", "deformable_detr", "deimv2", "grounding-dino", "mm-grounding-dino", "rt_detr", "rt_detr_v2"),
        *("dab-detr", "conditional_detr", "pp_doclayout_v2", "pp_doclayout_v3", "udop", "diffusion_gemma"),
        *("pe_audio_video",),
    )
)


def may_be_tied(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether only the class of a base tells if its parameter `name` is shared."""
    return not _NUMBERED.search(name) or not TIED_LAYERS.isdisjoint(renamings.families(config))


@dataclass(frozen=True)
class Tie:
    """One tensor of a model. `names` are those that the class has for it, `stored` those of them that a checkpoint
    has, with its own names for them. `is_input` says that the embedding of the input is one of them."""

    names: tuple[str, ...]
    stored: Mapping[str, str]
    is_input: bool = False

    @property
    def origin(self) -> str:
        """The stored name that all have their values from."""
        return next(iter(self.stored.values()))


@dataclass(frozen=True)
class BaseClass:
    """transformers' class of a base."""

    architecture: Architecture
    index: NameIndex

    def find(self, name: str) -> str | None:
        """Return the name in the class that a name of a base or of an adapter means, or None."""
        try:
            return self.index.find(name)
        except LrcError:
            return None

    def ties(self, checkpoint: Checkpoint) -> tuple[Tie, ...]:
        """Return the shared tensors that the checkpoint has. Names that it stores with different values are not shared:
        transformers leaves such a tie out, whatever the configuration says."""
        stored: dict[str, str] = {}
        for name in checkpoint.tensors:
            place = self.find(name)
            if place is not None:
                stored.setdefault(place, name)
        return tuple(tie for group in self.architecture.ties for tie in self._split(sorted(group), stored, checkpoint))

    def _split(self, group: list[str], stored: Mapping[str, str], checkpoint: Checkpoint) -> Iterable[Tie]:
        own = {name: stored[name] for name in group if name in stored}
        first = next(iter(own), None)
        if first is None:
            return
        members = {name: [name] for name in own}
        if len(own) == 1 or all(_equal(checkpoint, own[first], other) for other in own.values()):
            members = {first: group}
        else:
            for name in group:
                source = self.architecture.sources.get(name, first)
                if name not in own:
                    members[source if source in own else first].append(name)
        for names in members.values():
            if len(names) > 1:
                kept = {name: own[name] for name in names if name in own}
                yield Tie(tuple(names), kept, not self.architecture.inputs.isdisjoint(names))


def shared(name: str, checkpoint: Checkpoint) -> tuple[str, str] | None:
    """Return (its name in the class, the stored tensor that it has its values from) of an unstored parameter `name`, as
    the class of the base says; None if there is none."""
    known = of(checkpoint.config) if name not in checkpoint.tensors and may_be_tied(name, checkpoint.config) else None
    place = None if known is None else known.find(name)
    if known is None or place is None or not known.architecture.shared_with(place):
        return None
    return next(((place, tie.origin) for tie in known.ties(checkpoint) if place in tie.names), None)


def of(config: Mapping[str, Any]) -> BaseClass | None:
    """Return the class of a base, or None where the configuration names none, or one that transformers does not
    have."""
    named = config.get("architectures")
    if not (isinstance(named, list) and named and isinstance(named[0], str)):
        return None
    found = architecture.of(config)
    if found is None or found.name != named[0]:
        return None
    return BaseClass(found, _index(json.dumps(config, sort_keys=True)))


@lru_cache(maxsize=8)
def _index(text: str) -> NameIndex:
    config = json.loads(text)
    found = architecture.of(config)
    return NameIndex(found.shapes.keys() if found else (), renamings.families(config))


def untied(config: Mapping[str, Any], groups: Iterable[Tie]) -> dict[str, Any] | None:
    """Return the fields to change in a configuration so that the class shares none of `groups`; None if it shares them
    all the same, or computes differently then."""
    wanted = [set(group.names) for group in groups]
    before = architecture.of(config)
    if before is None or before.computes_by_tie:
        return None
    text = config.get("text_config")
    nested = {key: value for key, value in config.items() if isinstance(value, dict) and TIE in value}
    inner = {"text_config": text} if isinstance(text, dict) and TIE in text else {}
    parts = {key: value for key, value in config.items() if isinstance(value, dict) and "model_type" in value}
    for chosen in (inner, nested, parts):
        changes = {TIE: False} | {key: {**value, TIE: False} for key, value in chosen.items()}
        after = architecture.of({**config, **changes})
        if after is not None and not any(len(names & group) > 1 for names in wanted for group in after.ties):
            return changes
    return None


def states_no_tie(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration says that its embeddings are not shared."""
    text = config.get("text_config")
    return config.get(TIE, text.get(TIE) if isinstance(text, dict) else None) is False


def shares_nothing(config: Mapping[str, Any]) -> bool:
    """Return whether no class has shared tensors with this configuration: that of a causal language model which says so
    itself. A test asks all of transformers' classes."""
    named = config.get("architectures")
    is_causal = isinstance(named, list) and len(named) == 1 and str(named[0]).endswith("ForCausalLM")
    has_parts = any(isinstance(value, dict) and "model_type" in value for value in config.values())
    return is_causal and not has_parts and config.get(TIE) is False


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Return whether two stored tensors have the same bytes."""
    first, second = checkpoint.tensors[one], checkpoint.tensors[other]
    if one == other:
        return True
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    step = 1 << 22
    return all(
        checkpoint.read(first, start, min(step, first.nbytes - start))
        == checkpoint.read(second, start, min(step, first.nbytes - start))
        for start in range(0, first.nbytes, step)
    )
