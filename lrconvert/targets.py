"""The one place that maps an adapter's targets onto a base.

Names: a hub checkpoint may be saved with or without its architecture's prefix (``transformer.h.0`` / ``h.0``), and
newer releases move modules (``language_model.model`` / ``model.language_model``). Orientation: Conv1D stores (in, out);
configurations get that flag wrong, so the stored shape decides, and for square weights the architecture or the
non-square siblings do. What stays undecided is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from lrconvert.adapter import MATRIX, TRANSPOSED, CompactAdapter, LoraAdapter, Target, View
from lrconvert.container import Checkpoint
from lrconvert.errors import BaseError, OrientationError

Adapter = TypeVar("Adapter", LoraAdapter, CompactAdapter)

# Families of transformers whose linear layers are Conv1D, stored (in, out).
CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
# Modules of those families that are ordinary linear layers all the same.
_LINEAR_IN_CONV1D = ("lm_head", "score", "classifier", "wte", "wpe")

# Module renamings between releases of transformers: equal prefixes of parameter names.
RENAMINGS = (
    ("model.language_model.", "language_model.model."),
    ("model.visual.", "visual."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")


def _spellings(name: str) -> Iterable[str]:
    """`name` and its declared renamings."""
    yield name
    for old, new in RENAMINGS:
        for this, other in ((old, new), (new, old)):
            if name.startswith(this):
                yield other + name[len(this) :]


class NameIndex:
    """Look-up of parameter names in a base, up to one leading segment and the declared renamings."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._without_prefix: dict[str, list[str]] = {}
        for name in sorted(self._names):
            self._without_prefix.setdefault(name.partition(".")[2], []).append(name)

    def candidates(self, name: str) -> list[str]:
        """Stored names that `name` may mean; the exact name alone if it is stored."""
        if name in self._names:
            return [name]
        found: set[str] = set()
        for spelling in _spellings(name):
            shorter = spelling.partition(".")[2]
            found.update({spelling, shorter} & self._names)
            found.update(self._without_prefix.get(spelling, []))
        return sorted(found)

    def similar(self, name: str) -> list[str]:
        """Up to five stored names with the same last two segments, for messages."""
        tail = ".".join(name.split(".")[-2:])
        return sorted(n for n in self._names if n.endswith(tail))[:5]


def resolve_name(name: str, checkpoint: Checkpoint) -> str | None:
    """The stored name that `name` means, or None. Raises E-BASE if several are possible."""
    return _resolve_one(name, NameIndex(checkpoint.tensors), checkpoint)


def _resolve_one(name: str, index: NameIndex, checkpoint: Checkpoint) -> str | None:
    found = index.candidates(name)
    if len(found) > 1:
        raise BaseError(f"{name!r} may be any of {', '.join(found[:5])}", path=checkpoint.root)
    return found[0] if found else None


def tied_source(name: str, checkpoint: Checkpoint) -> str | None:
    """The stored input embedding that an unstored output head `name` shares its weights with, or None."""
    if not name.endswith(HEADS) or name in checkpoint.tensors or not ties_embeddings(checkpoint.config):
        return None
    stored = [n for n in checkpoint.tensors if n.endswith(EMBEDDINGS) and n.count(".") <= 3]
    return stored[0] if len(stored) == 1 else None


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config shares input and output embeddings (transformers' default: yes, but for the
    families that write the field)."""
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    value = config.get("tie_word_embeddings", nested)
    return value if isinstance(value, bool) else config.get("model_type") in TIED_BY_DEFAULT


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


def _square_view(name: str, siblings: set[View], config: Mapping[str, Any]) -> View:
    """The view of a square parameter, from the architecture, else from what all non-square targets agree on."""
    family = config.get("model_type")
    if family in CONV1D_FAMILIES:
        return MATRIX if name.split(".")[-2] in _LINEAR_IN_CONV1D else TRANSPOSED
    if siblings == {MATRIX} or (isinstance(family, str) and "auto_map" not in config and not siblings - {MATRIX}):
        return MATRIX
    if siblings == {TRANSPOSED} and not isinstance(family, str):
        return TRANSPOSED
    raise OrientationError(
        f"{name!r} is square, and neither the architecture nor other targets tell whether it is stored (out, in)",
        fix="give a base with its config.json, or convert with at least one non-square target of the same kind",
    )


def _resolve_targets(targets: Iterable[Target], checkpoint: Checkpoint) -> list[Target]:
    index = NameIndex(checkpoint.tensors)
    placed: list[tuple[Target, tuple[int, ...], View | None]] = []
    siblings: set[View] = set()
    for target in targets:
        name = _resolve_one(target.name, index, checkpoint)
        info = checkpoint.tensors.get(name or tied_source(target.name, checkpoint) or "")
        if info is None:
            hint = index.similar(target.name)
            raise BaseError(
                f"the target {target.name!r} is not in the base",
                fix=f"similar names there: {', '.join(hint)}" if hint else "is this the adapter's own base?",
                path=checkpoint.root,
            )
        named = replace(target, name=name or target.name)
        if target.view.kind not in ("matrix", "transposed"):
            target.view.matrix_shape(info.shape)
            placed.append((named, info.shape, target.view))
            continue
        try:
            view = _orientation(target, info.shape)
        except BaseError as error:
            raise error.at(checkpoint.root) from None
        if view is not None and named.name.split(".")[-2:-1] not in [[n] for n in _LINEAR_IN_CONV1D]:
            siblings.add(view)
        placed.append((named, info.shape, view))
    return [
        Target(t.name, shape, view or _square_view(t.name, siblings, checkpoint.config)) for t, shape, view in placed
    ]


def resolve(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """`adapter` with every target named, shaped and viewed as the base stores it, in the order it had.

    Raises E-BASE (missing, ambiguous, other shape, two targets on one matrix), E-ORIENT (an undecided square weight).
    """
    if isinstance(adapter, LoraAdapter):
        found = _resolve_targets(adapter.shapes(), checkpoint)
        _distinct(found, checkpoint)
        pairs = tuple(replace(pair, target=target) for pair, target in zip(adapter.targets, found, strict=True))
        return replace(adapter, targets=pairs)
    found = _resolve_targets(adapter.targets, checkpoint)
    _distinct(found, checkpoint)
    return replace(adapter, targets=tuple(found))


def _distinct(targets: list[Target], checkpoint: Checkpoint) -> None:
    seen: set[tuple[str, str]] = set()
    for target in targets:
        key = (target.name, target.view.text)
        if key in seen:
            raise BaseError(f"two targets of the adapter mean the same parameter {target.name!r}", path=checkpoint.root)
        seen.add(key)
