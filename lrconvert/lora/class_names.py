"""The names that a base's parameters have in memory, in transformers' class of it.

Programs find a module by its whole name in the class, whatever a checkpoint calls it: PEFT, and most servers. Names of
adapters are brought to these. The class is asked (`architecture`), which costs seconds, only where the stored names do
not settle it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lrconvert.core.errors import LrcError
from lrconvert.lora import architecture, renamings
from lrconvert.lora.adapter import Target
from lrconvert.lora.name_index import NameIndex

# Names below these are the class's own where a checkpoint has them: no bare model's modules are called so.
_PLAIN = ("model.", "transformer.", "lm_head.")
_NUMBERED = re.compile(r"[^.]+\.\d+\..*")  # what a layer is called inside its model
# PEFT's task types, as transformers calls the tables of its Auto classes.
_TASKS = {
    "CAUSAL_LM": "FOR_CAUSAL_LM_",
    "SEQ_2_SEQ_LM": "FOR_SEQ_TO_SEQ_CAUSAL_LM_",
    "SEQ_CLS": "FOR_SEQUENCE_CLASSIFICATION_",
    "TOKEN_CLS": "FOR_TOKEN_CLASSIFICATION_",
    "QUESTION_ANS": "FOR_QUESTION_ANSWERING_",
    "FEATURE_EXTRACTION": "",
}


@dataclass(frozen=True)
class ClassNames:
    """The parameters of one class, `title`, by all their names with their shapes, and those of them that it stores
    transposed. `is_bare`: it is the model without a head."""

    title: str
    shapes: Mapping[str, tuple[int, ...]]
    transposed: Collection[str]
    families: tuple[str, ...]
    is_bare: bool = False

    @cached_property
    def modules(self) -> frozenset[str]:
        """The modules that have parameters of their own."""
        return frozenset(name.rpartition(".")[0] for name in self.shapes)

    @cached_property
    def _index(self) -> NameIndex:
        return NameIndex(self.shapes, self.families)

    def find(self, name: str) -> str | None:
        """Return the name in the class that `name` means; None if there is none, or if it may be one of several. A
        name that has a segment more than a bare model's is of a class with a head, and stays."""
        try:
            found = self._index.find(name)
        except LrcError:
            return None
        return name if self.is_bare and found == name.partition(".")[2] else found


def classes(config: Mapping[str, Any], task: str = "") -> Iterable[ClassNames]:
    """Yield the class that a configuration names, then the one that loads the base for PEFT's `task`; none that
    transformers does not know."""
    families = tuple(renamings.families(config))
    listed = config.get("architectures")
    named = listed[:1] if isinstance(listed, list) and listed and isinstance(listed[0], str) else None
    wanted = [each for each in (named, _of_task(config, task)) if each is not None]
    if not wanted or not isinstance(config.get("model_type"), str):
        return
    bare = architecture.of({**config, "architectures": None})
    seen = set[str]()
    for each in wanted:
        asked = architecture.of({**config, "architectures": each})
        if asked is not None and asked.name not in seen:
            seen.add(asked.name)
            is_bare = bare is not None and bare.name == asked.name
            yield ClassNames(asked.name, asked.shapes, asked.transposed, families, is_bare)


def _of_task(config: Mapping[str, Any], task: str) -> list[str] | None:
    """The `architectures` of the class that loads a model for a task; None without one."""
    if not isinstance(config.get("model_type"), str) or task not in _TASKS:
        return None
    from transformers.models.auto import modeling_auto

    table = getattr(modeling_auto, f"MODEL_{_TASKS[task]}MAPPING_NAMES", {})
    found = table.get(config["model_type"])
    return [found] if isinstance(found, str) else None


def settled(names: Iterable[str], stored: Collection[str], config: Mapping[str, Any]) -> bool:
    """Return True if the `stored` names of a base show that `names` are those of its class, without asking it."""
    rules = renamings.rules(renamings.families(config))
    return bool(stored) and all(
        name in stored and name.startswith(_PLAIN) and renamings.canonical(name, rules) == name for name in names
    )


@dataclass(frozen=True)
class Renaming:
    """The names of an adapter in a class: `new` by the old ones that change, `lost` those that the class lacks.
    `title` is the class, "" if transformers has none for the base, or if it was not asked."""

    title: str = ""
    new: Mapping[str, str] = field(default_factory=dict)
    lost: tuple[str, ...] = ()

    def __call__(self, name: str) -> str:
        return self.new.get(name, name)


def renaming(targets: Iterable[Target], config: Mapping[str, Any], task: str, stored: Collection[str] = ()) -> Renaming:
    """Return how the names of `targets` become those of the base's class.

    A class that has all of them as they are is preferred, so that an adapter of another class of the base keeps what is
    right for that. `stored` are the names that the base stores, if they are known: what means one of these means what
    the class calls that.
    """
    shapes = {target.name: target.shape for target in targets}
    names = shapes.keys()
    if settled(names, stored, config):
        return Renaming()
    known = list(classes(config, task))
    for one in known:
        if all(name in one.shapes for name in names):
            return Renaming(one.title)
    best = Renaming()
    checkpoint = ClassNames("", dict.fromkeys(stored, ()), (), tuple(renamings.families(config)))
    for one in known:
        found = {name: one.find(name) or one.find(checkpoint.find(name) or name) for name in names}
        found |= _below(one, {name: shapes[name] for name, new in found.items() if new is None})
        lost = tuple(sorted(name for name, new in found.items() if new is None))
        if not best.title or len(lost) < len(best.lost):
            new = {name: to for name, to in found.items() if to is not None and to != name}
            best = Renaming(one.title, new, lost)
    return best


def _below(one: ClassNames, lost: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The names of parameters `lost` in a part of the class, as a decoder's adapter has them that meets a model that
    sees: the one part that has all of them, of their shapes, below its name. Empty if there are several, or none."""
    rests = {name: match.group() for name in lost if (match := _NUMBERED.search(name))}
    if not rests or len(rests) < len(lost):
        return {}
    first = next(iter(rests.values()))
    parts = [name.removesuffix(first) for name in one.shapes if name.endswith(f".{first}")]
    fits = [part for part in parts if all(one.shapes.get(part + rests[name]) == lost[name] for name in lost)]
    return {name: fits[0] + rest for name, rest in rests.items()} if len(fits) == 1 else {}


def library(title: str) -> str:
    """Return the module of transformers that a class is from, as PEFT's `auto_mapping` names it, or ""."""
    import transformers

    found = getattr(transformers, title, None)
    return found.__module__ if isinstance(found, type) else ""


# --- a renaming as a short text, for a file -------------------------------------------------------------------------

_DIGITS = re.compile(r"(?<![^.])\d+(?![^.])")


def as_text(new: Mapping[str, str], names: Iterable[str]) -> str:
    """Return rules ``old>new;old>new`` on the beginnings of names, `#` for a number, that make of all `names` what
    `new` says; "" if no such rules do."""
    for shortened in (_without_tail, lambda old, name: (old, name)):
        rules = {tuple(_DIGITS.sub("#", part) for part in shortened(old, name)) for old, name in new.items()}
        text = ";".join(f"{old}>{name}" for old, name in sorted(rules, key=lambda rule: (-len(rule[0]), rule)))
        if text.count(">") == len(rules) and all(from_text(text, name) == new.get(name, name) for name in names):
            return text
    return ""


def _without_tail(old: str, new: str) -> tuple[str, str]:
    """Both names without the segments that they end with alike, but for the first of these."""
    one, two = old.split("."), new.split(".")
    while len(one) > 1 and len(two) > 1 and one[-2:] == two[-2:]:
        one, two = one[:-1], two[:-1]
    while len(two) > 1 and len(one) > 1 and _DIGITS.fullmatch(one[-1]) and one[-1] == two[-1]:
        one, two = one[:-1], two[:-1]
    return ".".join(one), ".".join(two)


def from_text(text: str, name: str) -> str:
    """Return `name` by the first rule of `as_text` that fits it."""
    for rule in filter(None, text.split(";")):
        old, _, new = rule.partition(">")
        match = re.match(re.escape(old).replace(r"\#", r"(\d+)") + r"(?![^.])", name)
        if match:
            first, *others = new.split("#")
            numbers = [*match.groups(), *("#" for _ in others)]
            return first + "".join(map(str.__add__, numbers, others)) + name[match.end() :]
    return name
