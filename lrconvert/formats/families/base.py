"""The contract of a family of diffusion transformers, and the registry that finds families by scanning this folder.

A family is one file here that binds ``FAMILY``: what its modules are called by diffusers, by the model's own code
(which ComfyUI, sd-scripts and musubi-tuner follow) and by others. The form is that of `shared.table`. Readers and
exporters use the same lines, in either direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache

from lrconvert.core import registry
from lrconvert.formats.families.shared.table import Line, Scheme, parse

_FOLDER = "lrconvert.formats.families"
DIFFUSERS, ORIGINAL = "diffusers", "original"


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    `classes` are diffusers' (``_class_name`` of a config.json). `original` are lines of names in the model's own code,
    `same` names that are one in both, `others` further schemes by their name. `depths` are the numbers of blocks that
    published models have, by the first word of diffusers' names: they tell families apart where names do not.
    """

    title: str
    classes: tuple[str, ...]
    original: str = ""
    same: str = ""
    others: Mapping[str, str] = field(default_factory=dict)
    depths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @cached_property
    def schemes(self) -> Mapping[str, Scheme]:
        """All schemes by their names, ``diffusers`` and ``original`` among them."""
        own = (*parse(self.original), *parse(self.same))
        modules = dict.fromkeys((part, line.rows[n] if len(line.parts) > 1 else None)
                                for line in own for n, part in enumerate(line.parts))  # fmt: skip
        plain = tuple(Line(part, (part,), (rows,)) for part, rows in modules)
        others = {name: Scheme(parse(text)) for name, text in self.others.items()}
        return {ORIGINAL: Scheme(own), DIFFUSERS: Scheme(plain), **others}


@cache
def families() -> Mapping[str, Family]:
    """Return all families by their ids, sorted."""
    return {name: registry.load(_FOLDER, name, "FAMILY") for name in registry.names(_FOLDER)}


def of_class(class_name: object) -> Family | None:
    """Return the family of a class of diffusers, or None."""
    return next((family for family in families().values() if class_name in family.classes), None)


@lru_cache(4096)  # a module of many is asked for more than once
def is_known(module: str, scheme: str = "") -> bool:
    """Return whether any family has a module of this name, with dots, in that scheme or in any."""
    every = (pair for one in families().values() for pair in one.schemes.items())
    return any(names.find(module, False) for name, names in every if scheme in ("", name))
