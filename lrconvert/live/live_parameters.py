"""Parameters of a live model by name, and the place of a target in one: the module itself says how it stores it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lrconvert.core.errors import BaseError, OrientationError, ShapeError
from lrconvert.live.load_model import families_of
from lrconvert.lora.adapter import MATRIX, TRANSPOSED, Target, View
from lrconvert.lora.base_names import NameIndex

CHILD = "_adapter_"  # begins the name under which a wrapper registers an adapter


@dataclass(frozen=True, eq=False)
class Slot:
    """The place of a tensor in a model: the parameter or buffer `leaf` of the module `layer`, parametrized or not."""

    layer: nn.Module
    leaf: str

    def _place(self) -> tuple[dict[str, Tensor | None], str]:
        """The table that holds the tensor now, and its key there."""
        owner: Any = self.layer
        leaf = self.leaf
        if parametrize.is_parametrized(owner, leaf):
            owner, leaf = owner.parametrizations[leaf], "original"
        return (owner._parameters if leaf in owner._parameters else owner._buffers), leaf

    @property
    def tensor(self) -> Tensor:
        """The tensor that is there now."""
        table, key = self._place()
        tensor = table[key]
        assert tensor is not None
        return tensor

    def exchange(self, tensor: Tensor) -> Tensor:
        """Put a tensor there and return the one that was."""
        before = self.tensor
        table, key = self._place()
        table[key] = tensor
        return before


class LiveParameters:
    """Parameters and buffers of a live model by the names of their layers, whatever wraps these."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._slots = dict(_slots(model))
        self.index = NameIndex(self._slots, families_of(model))

    def __getitem__(self, name: str) -> Slot:
        return self._slots[name]

    def sharing(self, name: str) -> list[str]:
        """Return the names of the tensor `name`, its own first, then those that are tied to it."""
        tensor = self[name].tensor
        return [name, *(other for other, slot in self._slots.items() if other != name and slot.tensor is tensor)]

    def paths_of(self, layer: nn.Module) -> int:
        """Return at how many paths a layer lies."""
        return sum(module is layer for _, module in self.model.named_modules(remove_duplicate=False))

    def place(self, target: Target) -> tuple[str, Target]:
        """Return the name of a target's parameter, and the target as its module stores it. Raises E-BASE if it is
        missing or of another shape, E-ORIENT for experts that may be stored either way round."""
        name = self.index.find(target.name)
        if name is None:
            raise self.index.missing(target.name)
        slot = self[name]
        packed: Any = getattr(slot.tensor, "quant_state", None)  # where its numbers are packed
        shape = tuple(slot.tensor.shape if packed is None else packed.shape)
        views = [view for view in _views(target, slot) if _fits(view, target, shape)]
        if not views:
            raise BaseError(f"the target {target.name!r} is {list(target.shape)}, {list(shape)} in the model")
        if views[0].kind.startswith("expert") and len(views) > 1:
            views = [_expert_view(target, slot)]
        return name, replace(target, shape=shape, view=views[0])


def _slots(model: nn.Module) -> Iterator[tuple[str, Slot]]:
    """Yield every parameter and buffer by each of its names, without what wraps it, but for the numbers of adapters."""
    for path, module in model.named_modules(remove_duplicate=False):
        if f".{CHILD}" in f".{path}" or isinstance(module, parametrize.ParametrizationList):
            continue
        tensors = {**module._parameters, **module._buffers}
        parametrized = dict(getattr(module, "parametrizations", {}))
        for leaf in (*(leaf for leaf, tensor in tensors.items() if tensor is not None), *parametrized):
            yield f"{path}.{leaf}".lstrip(".").replace(".base_layer.", "."), Slot(module, leaf)


# --- orientation ----------------------------------------------------------------------------------------------------


def _views(target: Target, slot: Slot) -> list[View]:
    """The views that may show a target in its parameter, the likeliest first."""
    kind, _, rest = target.view.text.partition(":")
    if kind.startswith("expert"):
        return [View(f"expert:{rest}"), View(f"expert_transposed:{rest}")]
    if kind not in ("matrix", "transposed"):
        return [target.view]
    if type(slot.layer).__name__ == "Conv1D":  # of transformers: (in, out)
        return [TRANSPOSED]
    if isinstance(slot.layer, nn.Linear):
        return [MATRIX]
    return [target.view, *({MATRIX, TRANSPOSED} - {target.view})]


def _fits(view: View, target: Target, shape: tuple[int, ...]) -> bool:
    try:
        fits = view.matrix_shape(shape) == target.matrix_shape
    except ShapeError:
        return False
    return fits and (view.kind != "rows" or shape == tuple(target.shape))


def _expert_view(target: Target, slot: Slot) -> View:
    """The view of a square expert, as the module says that it stores its stacks."""
    is_transposed = getattr(slot.layer, "is_transposed", None)
    if not isinstance(is_transposed, bool):
        raise OrientationError(
            f"the experts of {target.name!r} are square, and {type(slot.layer).__name__} does not say whether they are "
            "stored (experts, out, in)",
            fix="set `is_transposed` on that module: True if they are stored (experts, in, out)",
        )
    return View(f"expert{'_transposed' if is_transposed else ''}:{target.view.text.rpartition(':')[2]}")
