"""The one place that maps an adapter's targets onto a base.

Names: a hub checkpoint may be saved with or without its architecture's prefix (``transformer.h.0`` / ``h.0``), and
releases of transformers rename modules (`renamings`). Orientation: Conv1D stores (in, out); configurations get that
flag wrong, so the stored shape decides, and for square weights the architecture or the non-square siblings do. What
stays undecided is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

from lrconvert.core.errors import BaseError, LrcError, OptionError, OrientationError, ShapeError
from lrconvert.core.wording import spelled
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.lora import architecture, quantized_layers, renamings, ties
from lrconvert.lora.adapter import MATRIX, TRANSPOSED, CompactAdapter, LoraAdapter, Target, View
from lrconvert.lora.architecture import TIE
from lrconvert.lora.name_index import NameIndex as NameIndex

Adapter = TypeVar("Adapter", LoraAdapter, CompactAdapter)

# Families of transformers whose linear layers are Conv1D, stored (in, out), and one with layers of both kinds.
CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_MIXED_FAMILIES = frozenset({"clvp", "clvp_decoder"})
# Modules of those families that are ordinary linear layers all the same.
_LINEAR_IN_CONV1D = ("lm_head", "score", "classifier", "wte", "wpe")

# Stacks of experts as models hold them, and what checkpoints keep for each expert; rows one after the other.
_EXPERT_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")
# Layers that are stored in one way whatever their model does with the others.
_OF_THEIR_OWN = (*EMBEDDINGS, *(f".{module}.weight" for module in _LINEAR_IN_CONV1D))


def tied_source(name: str, checkpoint: Checkpoint) -> str | None:
    """Return the stored tensor that the unstored parameter `name` shares its values with, or None.

    transformers' class of the base is asked; where it has none, an output head of a usual name shares them with the
    input embedding."""
    return _tied(name, checkpoint)[1]


def _tied(name: str, checkpoint: Checkpoint) -> tuple[str, str | None]:
    """The name that an unstored parameter has in the class of the base, and the stored tensor that it shares."""
    found = ties.shared(name, checkpoint)
    if found is not None:
        return found
    is_known = name in checkpoint.tensors or (name.endswith(HEADS) and ties.of(checkpoint.config) is not None)
    if is_known or not name.endswith(HEADS) or not ties_embeddings(checkpoint.config):
        return name, None
    stored = [n for n in checkpoint.tensors if n.endswith(EMBEDDINGS) and n.count(".") <= 3]
    return name, stored[0] if len(stored) == 1 else None


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Return whether a model of this config shares input and output embeddings: as it says, else as its class does."""
    text = config.get("text_config")
    nested = text.get(TIE) if isinstance(text, dict) else None
    value = config.get(TIE, nested)
    if isinstance(value, bool):
        return value
    found = architecture.of(config)
    return found is not None and found.is_tied


def _family(config: Mapping[str, Any]) -> str:
    """The model type of a config, or "" if it states none."""
    family = config.get("model_type")
    return family if isinstance(family, str) else ""


def _orientation(target: Target, stored: tuple[int, ...]) -> View | None:
    """The view of a 2-D parameter that its shape decides, or None for a square one. Raises E-BASE on a mismatch."""
    wanted = target.matrix_shape
    if len(stored) != 2 or stored not in (wanted, wanted[::-1]):
        raise BaseError(f"{target.name!r} is {list(wanted)} (out, in) in the adapter, {list(stored)} in the base")
    if wanted[0] == wanted[1]:
        return None
    return MATRIX if stored == wanted else TRANSPOSED


def unfolding(target: Target, stored: tuple[int, ...]) -> View | None:
    """Return the view of a convolution of shape `stored` whose unfolded matrix the target is: layouts that keep no
    shape of the kernel give (out, in * K * L). None if the target is no such matrix."""
    unfolded = len(stored) in (3, 4) and target.view == MATRIX and target.shape == (stored[0], math.prod(stored[1:]))
    return View(f"conv:{'x'.join(map(str, stored[2:]))}:1") if unfolded else None


def _fitting_view(target: Target, stored: tuple[int, ...]) -> View | None:
    """The view with which `target` has its matrix in a parameter of shape `stored`; None for an undecided square one.

    Experts keep the layout that they claim where it fits, and take the other one where only that does. One that is
    square keeps (experts, in, out), which is claimed where it is known alone. Raises E-BASE.
    """
    kind, _, rest = target.view.text.partition(":")
    if kind in ("matrix", "transposed"):
        return unfolding(target, stored) or _orientation(target, stored)
    others = {"expert": "expert_transposed", "expert_transposed": "expert"}
    views = [target.view, *([View(f"{others[kind]}:{rest}")] if kind in others else [])]
    for view in views:
        try:
            fits = view.matrix_shape(stored) == target.matrix_shape and (kind in others or stored == target.shape)
        except ShapeError:
            continue
        if fits:
            return None if view.kind == "expert" and stored[1] == stored[2] else view
    raise BaseError(
        f"{target.name!r} is {list(target.matrix_shape)} (out, in) as {target.view.text} in the adapter, "
        f"{list(stored)} in the base"
    )


def _square_stack(target: Target, siblings: set[str], config: Mapping[str, Any]) -> View:
    """The view of an entry of a stack of square matrices: from the base's class, else from what all stacks that are not
    square agree on. Raises E-ORIENT."""
    known, number = ties.of(config), target.view.text.partition(":")[2]
    place = None if known is None else known.find(target.name)
    if known is not None and place is not None:
        siblings = {"expert_transposed" if place in known.architecture.transposed else "expert"}
    if len(siblings) == 1:
        return View(f"{next(iter(siblings))}:{number}")
    raise OrientationError(
        f"the matrices of {target.name!r} are square, and neither the base's class nor other stacks tell whether they "
        "are stored (out, in)",
        fix="give a base with its own config.json, of a class that transformers has",
    )


def _square_view(name: str, siblings: set[View], config: Mapping[str, Any]) -> View:
    """The view of a square parameter: from the family, where its other targets bear that out; else from the class of
    the base, or from what all non-square targets agree on. Raises E-ORIENT."""
    family = _family(config)
    if "_diffusers_version" in config and not siblings - {MATRIX}:
        return MATRIX  # no model of diffusers has Conv1D
    if family in CONV1D_FAMILIES:
        return MATRIX if name.split(".")[-2] in _LINEAR_IN_CONV1D else TRANSPOSED
    is_alike = (CONV1D_FAMILIES | _MIXED_FAMILIES).isdisjoint(renamings.families(config))  # in all its parts
    if is_alike and (siblings == {MATRIX} or (family and "auto_map" not in config and not siblings - {MATRIX})):
        return MATRIX
    known = ties.of(config)
    place = None if known is None else known.find(name)
    if known is not None and place is not None:
        return TRANSPOSED if place in known.architecture.transposed else MATRIX
    if siblings == {TRANSPOSED} and not family:
        return TRANSPOSED
    raise OrientationError(
        f"{name!r} is square, and neither the architecture nor other targets tell whether it is stored (out, in)",
        fix="give a base with its config.json, or convert with at least one non-square target of the same kind",
    )


def is_stored_transposed(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether a base stores a parameter (in, out), a stack of experts (experts, in, out): by its family where
    that is one of Conv1D, else by its class."""
    families = set(renamings.families(config))
    if families & CONV1D_FAMILIES and "experts" not in name:
        return name.split(".")[-2] not in _LINEAR_IN_CONV1D
    known = ties.of(config)
    place = None if known is None else known.find(name)
    return known is not None and place is not None and place in known.architecture.transposed


def may_be_transposed(config: Mapping[str, Any]) -> bool:
    """Return whether a base has, in one of its parts, layers that are stored (in, out)."""
    return not (CONV1D_FAMILIES | _MIXED_FAMILIES).isdisjoint(renamings.families(config))


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


@dataclass(frozen=True)
class StackRows:
    """The layer of one expert in the stack that a base stores all experts in: rows `start` to `stop` of the parameter
    `name`, whose matrices lie one below the other, `cols` wide; transposed where it stores them (in, out)."""

    name: str
    start: int
    stop: int
    cols: int
    is_transposed: bool


def stack_rows(target: Target, index: NameIndex, checkpoint: Checkpoint) -> StackRows | None:
    """Return where the layer of one expert is in a stack: ``experts.3.up_proj`` in ``experts.gate_up_proj``, and
    ``experts.down_projs.3`` in ``experts.down_proj``. None if the base has no such stack. Raises E-BASE, E-ORIENT."""
    owner = target.name.removesuffix(".weight").split(".")
    first, second = owner[-2:] if len(owner) > 2 else ("", "")
    if target.view != MATRIX or first.isdecimal() == second.isdecimal():
        return None
    number, leaf = (int(first), second) if first.isdecimal() else (int(second), first.removesuffix("s"))
    for stack, forms in _EXPERT_PARTS.items():
        leaves = ((stack,), *forms) if second.isdecimal() else forms
        siblings = next((names for names in leaves if leaf in names), ())
        name = index.find(".".join((*owner[:-2], stack))) if siblings else None
        shape = () if name is None else checkpoint.tensors[name].shape
        if name is None or len(shape) != 3:
            continue
        out, inner = target.matrix_shape
        if sorted(shape[1:]) != sorted((len(siblings) * out, inner)) or number >= shape[0]:
            raise BaseError(
                f"{target.name!r} is {[out, inner]} (out, in) in the adapter, {name!r} {[*shape]} in the base"
            )
        is_transposed = shape[1] == inner
        if shape[1] == shape[2]:
            whole = Target(name, shape, View(f"expert:{number}"))
            is_transposed = _square_stack(whole, set(), checkpoint.config).kind == "expert_transposed"
        if is_transposed and len(siblings) > 1:
            return None  # columns, in an order that only the model's code tells
        start = number * shape[1] + (0 if is_transposed else siblings.index(leaf) * out)
        return StackRows(name, start, start + (inner if is_transposed else out), shape[2], is_transposed)
    return None


def _resolve_targets(
    targets: Iterable[Target], checkpoint: Checkpoint, resized: Mapping[str, tuple[int, ...]]
) -> list[Target]:
    index = NameIndex.of(checkpoint)
    placed: list[tuple[Target, tuple[int, ...], View | None]] = []
    siblings: set[View] = set()
    stacks: set[str] = set()
    quantized = quantized_layers.of(checkpoint)
    for target in targets:
        name = index.find(target.name)
        place, stored = (name, name) if name else _tied(target.name, checkpoint)
        info = checkpoint.tensors.get(stored or "")
        shape = None if info is None else info.shape
        if quantized is not None and quantized.holds(stored or target.name):
            shape = quantized.shape(target.name)
        if shape is None:
            if not parts(target, index, checkpoint) and stack_rows(target, index, checkpoint) is None:
                raise index.missing(target.name)
            placed.append((target, target.shape, target.view))
            continue
        named = replace(target, name=place)
        if len(shape) == 2 and shape[1:] == resized.get(target.name, ())[1:]:
            shape = resized[target.name]
        try:
            view = _fitting_view(target, shape)
        except LrcError as error:
            raise error.at(checkpoint.root) from None
        plain = not f".{named.name}".endswith(_OF_THEIR_OWN)
        if view in (MATRIX, TRANSPOSED) and plain:
            siblings.add(view)
        if view is not None and view.kind.startswith("expert") and shape[1] != shape[2]:
            stacks.add(view.kind)
        placed.append((named, shape, view))

    def decided(target: Target) -> View:
        if target.view.kind.startswith("expert"):
            return _square_stack(target, stacks, checkpoint.config)
        return _square_view(target.name, siblings, checkpoint.config)

    try:
        return [Target(t.name, shape, view or decided(t)) for t, shape, view in placed]
    except OrientationError as error:
        raise error.at(checkpoint.root) from None


def resolve(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """Return `adapter` with every target named, shaped and viewed as the base stores it, in the order it had; entries
    of a stack that the base stores in `parts`, and layers of experts that it stores as a stack, stay as they are; so do
    shapes of embeddings that were resized, whose own weights the adapter has beside them.

    Raises E-BASE (missing, ambiguous, other shape, two targets on one matrix), E-ORIENT (an undecided square weight).
    """
    own = adapter.shapes() if isinstance(adapter, LoraAdapter) else adapter.targets
    beside = {e.name.replace("base_layer.", ""): e.shape for e in adapter.extras if ".base_layer." in f".{e.name}"}
    targets = _resolve_targets(own, checkpoint, beside)
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
        raise OptionError(
            f"{spelled('include')} / {spelled('exclude')}: {error.pattern!r} is not a regular expression: {error}"
        ) from None
    return lambda name: (
        (not wanted or any(p.search(name) for p in wanted)) and not any(p.search(name) for p in unwanted)
    )
