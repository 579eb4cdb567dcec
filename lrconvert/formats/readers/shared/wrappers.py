"""Names of tensors without the modules that a training put around the model: compiled, sharded, checkpointed, parallel.

They hold one module each and no weight of their own, so a name means the same without them. Those that begin with an
underscore are nobody else's and go wherever they stand. ``module.`` is a plain word: it goes where every tensor of the
file has it, in front or right behind PEFT's prefix, as DistributedDataParallel leaves it. What PEFT's own prefix has in
front of it, or stands twice, goes too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PEFT_PREFIX = "base_model.model."
# Compiled; sharded, today and at first; checkpointed activations; wrapped by Lightning or DeepSpeed.
SEGMENTS = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module")
_WRAPPER = re.compile(rf"(?<![^.])({'|'.join(SEGMENTS)})\.")
_FLAT = re.compile(r"(?<=_)(_orig_mod)_")  # in sd-scripts' names, where dots are underscores
_PARALLEL = "module."
_PART = re.compile(r"lora_(?:[AB]|embedding_[AB]|magnitude_vector|down|up)\b")
_TWICE = re.compile(rf"(?<![^.])(?:{re.escape(PEFT_PREFIX)})+")


def plain(stored: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names without wrappers, in their order, and warnings that name what was taken out."""
    found: dict[str, int] = {}
    names = [_without_segments(name, found) for name in stored]
    before: list[str] = []
    while names != before:
        before = names
        for front in ("", PEFT_PREFIX):
            names = _without_front(names, f"{front}{_PARALLEL}", front, found)
    notes = [f"{wrapper} is taken out of {count} names: a training wrapped the model in it" for wrapper, count in
             sorted(found.items())]  # fmt: skip
    plainer = _once(names)
    changed = [(name, new) for name, new in zip(names, plainer, strict=True) if name != new]
    if changed:
        name, new = changed[0]
        notes.append(
            f"PEFT's prefix is not once in front of {len(changed)} names: {name!r:.160} is read as {new!r:.160}"
        )
    return plainer, notes


def _without_segments(name: str, found: dict[str, int]) -> str:
    def note(match: re.Match[str]) -> str:
        found[match[1]] = found.get(match[1], 0) + 1
        return ""

    name = _WRAPPER.sub(note, name)
    return _FLAT.sub(note, name) if name.startswith(("lora_", "lycoris_")) else name


def _without_front(names: list[str], front: str, instead: str, found: dict[str, int]) -> list[str]:
    """Return the names with `instead` for a `front` that all of them have."""
    if not names or not all(name.startswith(front) and name != front for name in names):
        return names
    if any(_PART.match(name, len(front)) for name in names):  # the adapted module itself is called so
        return names
    found[_PARALLEL.rstrip(".")] = len(names)
    return [instead + name.removeprefix(front) for name in names]


def _once(names: list[str]) -> list[str]:
    """Return the names with PEFT's prefix in front alone where it is in them. What stands before it goes, unless that
    differs from name to name."""
    fronts = {name[: match.start()] for name in names if (match := _TWICE.search(name))}
    gone = max(fronts, key=len, default="") if len(fronts - {""}) == 1 else ""
    plainer = []
    for name in names:
        match = _TWICE.search(name)
        front, rest = (name[: match.start()], name[match.start() :]) if match else ("", name)
        without = ("" if front == gone else front) + _TWICE.sub("", rest)
        plainer.append(name if match is None or not without else PEFT_PREFIX + without)
    return plainer
