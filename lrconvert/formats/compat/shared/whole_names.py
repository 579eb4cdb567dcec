"""Whole names of modules: which of an adapter's the base has, as the class of it calls them in memory.

A program finds a module by its whole name, so that one segment too many makes an update a dead one, which most programs
do not say. Names are those of the stored tensors where these settle it, else the class is asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

from lrconvert.formats.compat.base import Finding, Verdict
from lrconvert.formats.compat.shared.rules import check_base
from lrconvert.formats.compat.shared.subject import Subject
from lrconvert.formats.readers.shared.wrappers import SEGMENTS
from lrconvert.lora import class_names, renamings

STRIP = "take them out of every name; `lrconvert` reads the adapter without them and exports it right"
# What a training puts around modules; DistributedDataParallel's plain word counts in front only.
_WRAPPER = re.compile(rf"(?<![^.])(?:{'|'.join(SEGMENTS)})(?![^.])|^module(?=\.)")
_TWICE = re.compile(r"base_model\.model\.|([^.]+)\.\1\.")
_NUMBERED = re.compile(r"(?:^|\.)\d+(?:\.|$)")


def wrapped(modules: Iterable[str]) -> list[str]:
    """Return the names that have segments of wrappers."""
    return [module for module in modules if _WRAPPER.search(module)]


def wrappers(
    subject: Subject, verdict: Verdict, what: str, source: str, modules: Iterable[str] | None = None
) -> Iterator[Finding]:
    """Yield a finding on names with wrappers; `what` becomes of them. `modules` are those of the pairs."""
    found = wrapped(subject.pairs if modules is None else modules)
    yield from verdict.of("wrapper", found, f"a training's wrapper is in the names, {what}", STRIP, source)


def doubled(
    subject: Subject,
    warns: Verdict,
    source: str,
    spelled: Callable[[str], str] = str,
    modules: Iterable[str] | None = None,
) -> Iterator[Finding]:
    """Yield a finding on names that begin with one segment twice, or with PEFT's prefix once more. `spelled` and
    `modules` as in `placement`."""
    twice = [module for module in modules or subject.pairs if _TWICE.match(spelled(module))]
    yield from warns.of("twice", twice, "names begin with the same twice, which few models have", check_base(), source)


@dataclass(frozen=True)
class Placement:
    """Modules that the base does not have under their names: `lacking` are in no place, `shorter` lack the beginning of
    the name. `renamed` are called otherwise in the newest release of transformers, {module: name}."""

    lacking: tuple[str, ...] = ()
    shorter: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)


def placement(
    subject: Subject, spelled: Callable[[str], str] = str, task: str = "", modules: Iterable[str] | None = None
) -> Placement:
    """Return the place of every numbered module in the base, as far as its names are known. `spelled` is what a
    program makes of a module's name first; `modules` are those of the pairs.

    Names without a number are not judged: tied and renamed heads are stored in too many ways. Nor are those with
    wrappers, which have a finding of their own.
    """
    numbered = [module for module in modules or subject.pairs if _NUMBERED.search(module)]
    called = {module: spelled(module) for module in numbered if not _WRAPPER.search(module)}
    config, stored = subject.base, subject.base_modules
    if config is None or not called:
        return Placement()
    names = {f"{name}.weight" for name in called.values()}
    if class_names.settled(names, {f"{name}.weight" for name in stored}, config):
        return Placement()
    known = list(class_names.classes(config, task))
    if not known and not stored:
        return Placement()
    rules = renamings.rules(renamings.families(config))
    canonical = {renamings.canonical(name, rules) for name in stored}
    lacking, shorter, renamed = [], [], {}
    for module, name in called.items():
        bare = _without_wrappers(name)
        found = _in_classes(bare, known) if known else _in_stored(bare, stored)
        if found is None and (name in stored or renamings.canonical(name, rules) in canonical):
            continue
        if found is None or (found != bare and bare.endswith(f".{found}")):
            lacking.append(module)
        elif found.endswith(f".{bare}"):
            shorter.append(module)
        elif found != bare:
            renamed[module] = found
    return Placement(tuple(lacking), tuple(shorter), renamed)


def _without_wrappers(module: str) -> str:
    """The module that PEFT's wrappers of parameters stand around."""
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module


def _in_classes(module: str, known: Iterable[class_names.ClassNames]) -> str | None:
    """The module's name in the first class that has it, or else in one that has it otherwise."""
    known = list(known)
    if any(module in one.modules for one in known):
        return module
    found = (one.find(f"{module}.weight") for one in known)
    return next((name.removesuffix(".weight") for name in found if name is not None), None)


def _in_stored(module: str, stored: Collection[str]) -> str | None:
    """The same by the stored names. A base that was saved from the bare model lacks the first segment of all names;
    that is no difference."""
    first, _, rest = module.partition(".")
    if module in stored or (rest in stored and not any(name.startswith(f"{first}.") for name in stored)):
        return module
    if rest in stored:
        return rest
    return next((name for name in sorted(stored) if name.endswith(f".{module}")), None)
