"""Look-up of parameter names that are spelled in several ways: with a leading segment more or less, or as another
release of transformers does."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path

from lrconvert.core.errors import BaseError
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.lora import renamings

# Layers that some checkpoints keep as one tensor and others as several, by the last segment of their module.
_PARTS = frozenset(("q_proj", "k_proj", "v_proj", "query", "key", "value", "gate_proj", "up_proj", "q", "k", "v"))
_FUSED = frozenset(
    (
        *("qkv", "qkv_proj", "Wqkv", "w_qkv", "wqkv", "query_key_value", "in_proj", "att_proj", "c_attn", "gqkv_proj"),
        *("gate_up_proj", "up_gate_proj", "weights_in", "w12", "ff_proj"),
    )
)


class NameIndex:
    """Look-up of parameter names in a base, up to one leading segment and the renamings of its families."""

    def __init__(self, names: Collection[str], families: Iterable[str], root: Path | None = None) -> None:
        self._names, self._root = names, root
        self._rules = renamings.rules(families)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> NameIndex:
        return cls(checkpoint.tensors.keys(), renamings.families(checkpoint.config), checkpoint.root)

    def find(self, name: str) -> str | None:
        """Return the stored name that `name` means, or None. Raise E-BASE if several are possible."""
        if name in self._names:
            return name
        candidates = sorted({*self._plain.matches(name), *self._renamed.matches(self.canonical(name))})
        if len(candidates) > 1:
            raise BaseError(f"{name!r} may be any of {', '.join(candidates[:5])}", path=self._root)
        return candidates[0] if candidates else None

    def canonical(self, name: str) -> str:
        """Return `name` as the newest release of transformers spells it."""
        return renamings.canonical(name, self._rules)

    @cached_property
    def _plain(self) -> _Table:
        return _Table((name, name) for name in self._names)

    @cached_property
    def _renamed(self) -> _Table:
        return _Table((self.canonical(name), name) for name in self._names)

    def missing(self, name: str) -> BaseError:
        """Return the error for a name that is not stored: with similar names, or how the base stores its layer."""
        what = f"the target {name!r} is not in the base"
        parts = self.canonical(name).split(".")
        module = parts[-2] if len(parts) > 1 else ""
        other_forms = (
            ("experts" in parts, frozenset(("experts",)), "which stores its experts in another form"),
            (module in _PARTS, _FUSED, "which stores that layer fused with others"),
            (module in _FUSED, _PARTS, "which stores that layer in parts"),
        )
        for applies, modules, how in other_forms:
            stored = self._in_layer(name, modules) if applies else ""
            if stored:
                fix = "use a checkpoint in the form that the adapter was trained on"
                return BaseError(f"{what}, {how}: {stored}", fix=fix, path=self._root)
        similar = sorted(n for n in self._names if n.endswith(".".join(name.split(".")[-2:])))[:5]
        fix = f"similar names there: {', '.join(similar)}" if similar else "is this the adapter's own base?"
        return BaseError(what, fix=fix, path=self._root)

    def _in_layer(self, name: str, modules: frozenset[str]) -> str:
        """Up to three stored names of the same layer as `name` that have one of these `modules`, or ""."""
        layer = _layer(self.canonical(name))
        names = (n for n in self._names if not modules.isdisjoint(n.split(".")))
        return ", ".join(sorted(n for n in names if _layer(self.canonical(n)) == layer)[:3])


class _Table:
    """Stored names by a spelling, and by what follows its first segment."""

    def __init__(self, spelled: Iterable[tuple[str, str]]) -> None:
        self._whole: dict[str, list[str]] = {}
        self._tails: dict[str, list[str]] = {}
        for spelling, name in spelled:
            self._whole.setdefault(spelling, []).append(name)
            self._tails.setdefault(spelling.partition(".")[2], []).append(name)

    def matches(self, spelling: str) -> Iterable[str]:
        """Return the names spelled like this, or with one leading segment more or less."""
        shorter = spelling.partition(".")[2]
        return (
            *self._whole.get(spelling, ()),
            *(self._whole.get(shorter, ()) if shorter else ()),
            *self._tails.get(spelling, ()),
        )


def _layer(name: str) -> str:
    """The layer of a model that a name lies in, whatever is above it: ``layers.3``."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[max(0, at - 1) : at + 1])
