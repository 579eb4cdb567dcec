"""The one place that maps an adapter's targets onto a base.

Names: a hub checkpoint may be saved with or without its architecture's prefix (``transformer.h.0`` / ``h.0``), and
releases of transformers rename modules (`renamings`). Orientation: Conv1D stores (in, out); configurations get that
flag wrong, so the stored shape decides, and for square weights the architecture or the non-square siblings do. What
stays undecided is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from lrconvert.core.errors import BaseError, LrcError, OptionError, OrientationError, ShapeError
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.lora import renamings
from lrconvert.lora.adapter import MATRIX, TRANSPOSED, CompactAdapter, LoraAdapter, Target, View

Adapter = TypeVar("Adapter", LoraAdapter, CompactAdapter)

# Families of transformers whose linear layers are Conv1D, stored (in, out).
CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
# Modules of those families that are ordinary linear layers all the same.
_LINEAR_IN_CONV1D = ("lm_head", "score", "classifier", "wte", "wpe")

# Layers that some checkpoints keep as one tensor and others as several, by the last segment of their module.
_PARTS = frozenset(("q_proj", "k_proj", "v_proj", "query", "key", "value", "gate_proj", "up_proj", "q", "k", "v"))
_FUSED = frozenset(
    (
        *("qkv", "qkv_proj", "Wqkv", "w_qkv", "wqkv", "query_key_value", "in_proj", "att_proj", "c_attn", "gqkv_proj"),
        *("gate_up_proj", "up_gate_proj", "weights_in", "w12", "ff_proj"),
    )
)

# Stacks of experts as models hold them, and what checkpoints keep for each expert; rows one after the other.
_EXPERT_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")
# Layers that are stored in one way whatever their model does with the others.
_OF_THEIR_OWN = (*EMBEDDINGS, *(f".{module}.weight" for module in _LINEAR_IN_CONV1D))


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


def tied_source(name: str, checkpoint: Checkpoint) -> str | None:
    """Return the stored input embedding that an unstored output head `name` shares its weights with, or None."""
    if not name.endswith(HEADS) or name in checkpoint.tensors or not ties_embeddings(checkpoint.config):
        return None
    stored = [n for n in checkpoint.tensors if n.endswith(EMBEDDINGS) and n.count(".") <= 3]
    return stored[0] if len(stored) == 1 else None


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Return whether a model of this config shares input and output embeddings (transformers' default: yes, but for
    the families that write the field)."""
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    value = config.get("tie_word_embeddings", nested)
    return value if isinstance(value, bool) else _family(config) in TIED_BY_DEFAULT


def _family(config: Mapping[str, Any]) -> str:
    """The model type of a config, or "" if it states none."""
    family = config.get("model_type")
    return family if isinstance(family, str) else ""


# Families whose configuration class ties embeddings unless told otherwise, as their config.json may not say so.
TIED_BY_DEFAULT = frozenset(
    {"gpt2", "openai-gpt", "bloom", "gpt_bigcode", "gemma", "gemma2", "gemma3_text", "opt", "t5"}
)


def _orientation(target: Target, stored: tuple[int, ...]) -> View | None:
    """The view of a 2-D parameter that its shape decides, or None for a square one. Raises E-BASE on a mismatch."""
    wanted = target.matrix_shape
    if len(stored) != 2 or stored not in (wanted, wanted[::-1]):
        raise BaseError(f"{target.name!r} is {list(wanted)} (out, in) in the adapter, {list(stored)} in the base")
    if wanted[0] == wanted[1]:
        return None
    return MATRIX if stored == wanted else TRANSPOSED


def _fitting_view(target: Target, stored: tuple[int, ...]) -> View | None:
    """The view with which `target` has its matrix in a parameter of shape `stored`; None for an undecided square one.

    Experts keep the layout that they claim where it fits, and take the other one where only that does. Raises E-BASE.
    """
    kind, _, rest = target.view.text.partition(":")
    if kind in ("matrix", "transposed"):
        return _orientation(target, stored)
    others = {"expert": "expert_transposed", "expert_transposed": "expert"}
    views = [target.view, *([View(f"{others[kind]}:{rest}")] if kind in others else [])]
    for view in views:
        try:
            if view.matrix_shape(stored) == target.matrix_shape and (kind in others or stored == target.shape):
                return view
        except ShapeError:
            continue
    raise BaseError(
        f"{target.name!r} is {list(target.matrix_shape)} (out, in) as {target.view.text} in the adapter, "
        f"{list(stored)} in the base"
    )


def _square_view(name: str, siblings: set[View], config: Mapping[str, Any]) -> View:
    """The view of a square parameter, from the architecture, else from what all non-square targets agree on."""
    family = _family(config)
    if family in CONV1D_FAMILIES:
        return MATRIX if name.split(".")[-2] in _LINEAR_IN_CONV1D else TRANSPOSED
    if siblings == {MATRIX} or (family and "auto_map" not in config and not siblings - {MATRIX}):
        return MATRIX
    if siblings == {TRANSPOSED} and not family:
        return TRANSPOSED
    raise OrientationError(
        f"{name!r} is square, and neither the architecture nor other targets tell whether it is stored (out, in)",
        fix="give a base with its config.json, or convert with at least one non-square target of the same kind",
    )


@dataclass(frozen=True)
class Part:
    """A stored parameter that is the rows `start` to `stop` of a target's matrix."""

    target: Target
    start: int
    stop: int


def parts(target: Target, index: NameIndex, checkpoint: Checkpoint) -> tuple[Part, ...]:
    """Return the parameters of one expert that the base stores apart, while `target` is an entry of a stack:
    ``gate_up_proj`` of expert 3 is ``3.gate_proj.weight`` above ``3.up_proj.weight``. Empty if it does not. Raises
    E-BASE."""
    if not target.view.kind.startswith("expert"):
        return ()
    stack, _, leaf = target.name.rpartition(".")
    number = target.view.text.rpartition(":")[2]
    for leaves in _EXPERT_PARTS.get(leaf, ()):
        names = [index.find(f"{stack}.{number}.{part}.weight") for part in leaves]
        stored = [Target(name, checkpoint.tensors[name].shape) for name in names if name is not None]
        if len(stored) < len(leaves):
            continue
        rows, cols = target.matrix_shape
        ends = [0, *accumulate(t.shape[0] for t in stored)]
        if ends[-1] != rows or any(len(t.shape) != 2 or t.shape[1] != cols for t in stored):
            shapes = " and ".join(str(list(t.shape)) for t in stored)
            raise BaseError(f"{target.name!r} is {[rows, cols]} (out, in) in the adapter, {shapes} in the base")
        return tuple(Part(t, *ends[n : n + 2]) for n, t in enumerate(stored))
    return ()


def _resolve_targets(targets: Iterable[Target], checkpoint: Checkpoint) -> list[Target]:
    index = NameIndex.of(checkpoint)
    placed: list[tuple[Target, tuple[int, ...], View | None]] = []
    siblings: set[View] = set()
    for target in targets:
        name = index.find(target.name)
        info = checkpoint.tensors.get(name or tied_source(target.name, checkpoint) or "")
        if info is None:
            if not parts(target, index, checkpoint):
                raise index.missing(target.name)
            placed.append((target, target.shape, target.view))
            continue
        named = replace(target, name=name or target.name)
        try:
            view = _fitting_view(target, info.shape)
        except LrcError as error:
            raise error.at(checkpoint.root) from None
        plain = not f".{named.name}".endswith(_OF_THEIR_OWN)
        if view in (MATRIX, TRANSPOSED) and plain:
            siblings.add(view)
        placed.append((named, info.shape, view))
    try:
        return [
            Target(t.name, shape, view or _square_view(t.name, siblings, checkpoint.config))
            for t, shape, view in placed
        ]
    except OrientationError as error:
        raise error.at(checkpoint.root) from None


def resolve(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """Return `adapter` with every target named, shaped and viewed as the base stores it, in the order it had; entries
    of a stack that the base stores in `parts` stay as they are.

    Raises E-BASE (missing, ambiguous, other shape, two targets on one matrix), E-ORIENT (an undecided square weight).
    """
    targets = _resolve_targets(adapter.shapes() if isinstance(adapter, LoraAdapter) else adapter.targets, checkpoint)
    names: set[tuple[str, str]] = set()
    for target in targets:
        key = (target.name, target.view.text)
        if key in names:
            raise BaseError(f"two targets of the adapter mean the same parameter {target.name!r}", path=checkpoint.root)
        names.add(key)
    if isinstance(adapter, LoraAdapter):
        pairs = tuple(replace(pair, target=target) for pair, target in zip(adapter.targets, targets, strict=True))
        return replace(adapter, targets=pairs)
    return replace(adapter, targets=tuple(targets))


def name_filter(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    """Return the test whether a name is one of those that the patterns choose. Raise E-OPTION for an invalid
    pattern."""
    try:
        wanted, unwanted = [[re.compile(p) for p in patterns] for patterns in (include, exclude)]
    except re.error as error:
        raise OptionError(f"--include / --exclude: {error.pattern!r} is not a regular expression: {error}") from None
    return lambda name: (
        (not wanted or any(p.search(name) for p in wanted)) and not any(p.search(name) for p in unwanted)
    )
