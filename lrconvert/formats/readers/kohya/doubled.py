"""Names that a conversion script has prefixed twice: it puts ``lora_unet_`` before names that begin with the model's
already, ``lora_unet_unet_down_blocks_...``, ``lora_te_text_encoder_text_model_...``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

Parts = TypeVar("Parts")
# Modules of diffusion transformers begin with `transformer_blocks`, which is no prefix.
_TWICE = re.compile(
    r"(?P<front>(?:lora|lycoris)_(?:prior_unet|unet|transformer|te[123]?)_)"
    r"(?:(?P=front)|prior_unet_|unet_|transformer_(?!blocks)|te[123]?_|text_encoder(?:_[123])?_)+"
)


def once(modules: Mapping[str, Parts]) -> tuple[dict[str, Parts], list[str]]:
    """Return the modules under names with one prefix, sorted, and a warning if they had two. Names of which some have
    one and some two stay: one of them may be the name of a module."""
    renamed: dict[str, str] = {}
    fronts: dict[str, list[str]] = {}
    for module in modules:
        fronts.setdefault("_".join(module.split("_")[:2]), []).append(module)
    for names in fronts.values():
        twice = [_TWICE.match(name) for name in names]
        if all(match is not None and match.end() < len(name) for match, name in zip(twice, names, strict=True)):
            renamed |= {m.string: m["front"] + m.string[m.end() :] for m in twice if m is not None}
    if not renamed or len({renamed.get(name, name) for name in modules}) < len(modules):
        return dict(modules), []
    name, new = next(iter(renamed.items()))
    note = (
        f"{len(renamed)} modules have the prefix of their model twice, as some conversion scripts leave it: "
        f"{name:.160} is read as {new:.160}"
    )
    once_named = {renamed.get(name, name): parts for name, parts in modules.items()}
    return {name: once_named[name] for name in sorted(once_named)}, [note]
