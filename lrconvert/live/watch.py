"""Hooks that show a collector what flows into the layers and experts of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lrconvert.core.errors import StatisticsError
from lrconvert.core.wording import spelled
from lrconvert.live.collector import Collector, Key
from lrconvert.live.layer_inputs import expert_stacks, known_layers
from lrconvert.live.load_model import evaluating

_PRODUCTS = (F.linear, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__)


@contextmanager
def watched(model: nn.Module, collector: Collector, wanted: Iterable[str] | None = None) -> Iterator[tuple[str, ...]]:
    """Put a model in evaluation mode and count, while the context lasts, in each forward pass that `collector` runs the
    inputs of its layers: all, or those whose parameters are `wanted`. Gives their names. Raises E-STATS for none."""
    chosen = None if wanted is None else set(wanted)
    layers = {name: layer for name, layer in known_layers(model).items() if chosen is None or name in chosen}
    stacks = {name: module for name, module in expert_stacks(model).items() if chosen is None or name in chosen}
    if not layers and not stacks:
        raise StatisticsError(
            "no layer of the model is asked for", fix=f"see the names with `inspect`, or leave out {spelled('include')}"
        )
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, layer in layers.items():

            def count(module: Any, arguments: Any, named: Any, key: Key = (name, None)) -> None:
                collector.add_layer(key, module, first_input(arguments, named))

            stack.callback(layer.register_forward_pre_hook(count, with_kwargs=True).remove)
        if stacks:
            stack.enter_context(_one_by_one(model))
            for module in dict.fromkeys(stacks.values()):
                names = {name.rpartition(".")[2]: name for name, owner in stacks.items() if owner is module}
                _hook_experts(module, names, collector, stack)
        yield (*layers, *stacks)


def first_input(arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Return the first input of a forward pass, by place or by name."""
    return arguments[0] if arguments else next(iter(named.values()))


# --- experts --------------------------------------------------------------------------------------------------------


@contextmanager
def _one_by_one(model: nn.Module) -> Iterator[None]:
    """Experts computed one after the other, each by matrix products of its own, which can be watched."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(c, c._experts_implementation) for c in configs.values() if hasattr(c, "_experts_implementation")]
    for config, _ in before:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, value in before:
            config._experts_implementation = value


class _ProductsOfExperts(TorchFunctionMode):
    """Counts the inputs of products with an entry of a stack."""

    def __init__(self, stacks: Mapping[str, Tensor], collector: Collector, routed: Tensor | None) -> None:
        super().__init__()
        self.stacks, self.collector, self.routed = stacks, collector, routed

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if len(args) > 1 and func in _PRODUCTS:
            x, weight = args[0], args[1]
            for name, stack in self.stacks.items():
                expert = _entry(weight, stack)
                if expert is not None:
                    self.collector.add_matrix((name, expert), x, self._real(x, expert))
                elif func is torch.bmm and weight is stack:  # all tokens for all experts, zero where not routed
                    for expert, tokens in enumerate(x):
                        self.collector.add_matrix((name, expert), tokens, tokens[tokens.any(1)])
        return func(*args, **(kwargs or {}))

    def _real(self, x: Tensor, expert: int) -> Tensor:
        """x without the rows of padding, where the experts' module said which tokens go to which expert."""
        masks = self.collector.masks
        if self.routed is None or not masks:
            return x
        tokens = torch.where((self.routed == expert).T)[1]  # by rank among a token's experts, then by token
        for mask in masks:
            if mask.numel() == len(self.routed) and len(tokens) == len(x):
                return x[mask.reshape(-1).to(x.device)[tokens]]
        return x


def _entry(weight: Any, stack: Tensor) -> int | None:
    """Return the number of the entry of a stack that a weight is a view of, or None."""
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.device != stack.device:
        return None
    if weight.untyped_storage().data_ptr() != stack.untyped_storage().data_ptr():
        return None
    place = (weight.storage_offset() - stack.storage_offset()) // stack.stride(0)
    return place if 0 <= place < len(stack) and sorted(weight.shape) == sorted(stack.shape[1:]) else None


def _hook_experts(module: nn.Module, names: Mapping[str, str], collector: Collector, stack: ExitStack) -> None:
    """Watch the products of a module's stacks until `stack` is closed; `names` of the stacks by their attribute."""
    modes: list[_ProductsOfExperts] = []

    def enter(owner: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        values = [*arguments, *named.values()]
        routed = next((v for v in values if isinstance(v, Tensor) and v.dim() == 2 and not v.is_floating_point()), None)
        stacks = {name: getattr(owner, leaf) for leaf, name in names.items()}
        modes.append(_ProductsOfExperts(stacks, collector, routed))
        modes[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(owner: nn.Module, arguments: Any, output: Any) -> None:
        modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
    stack.callback(module.register_forward_hook(leave, always_call=True).remove)
