"""Adapters on a live model, unmerged: any compact adapter, any LoRA, several by name, for inference and training.

A layer that is adapted is wrapped (`AdaptedLayer`). The parameters of one adapter live in one module
(`AttachedAdapter`), which the methods' own `expand` reads: the one formula of a form serves files, merges and live
models alike. Stacks of experts are parameters without a layer of their own; their updates are added to the parameter as
it is used, as PEFT does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lrconvert.core.dtypes import STORAGE, TORCH_NAMES, decode
from lrconvert.core.errors import AttachError, BaseError, PlacementError
from lrconvert.live.adapted_layer import ActiveAdapters, AdaptedLayer, AdaptedParameter, TokenRows
from lrconvert.live.attached_adapter import Adapter, AttachedAdapter, Update, targets_of
from lrconvert.live.layer_inputs import is_known_layer
from lrconvert.live.load_model import families_of
from lrconvert.lora.adapter import ExtraTensor, Target
from lrconvert.lora.base_names import NameIndex

_STATE = "_lrconvert"  # the attribute of a model that holds its `Attachments`
_CHILD = "_adapter_"  # begins the name under which a wrapper registers an adapter


# --- verbs ----------------------------------------------------------------------------------------------------------


def attach(
    model: nn.Module,
    adapter: Adapter,
    *,
    name: str = "default",
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    trainable: bool = False,
) -> AttachedAdapter:
    """Put `adapter` on `model` under `name`, active beside those that are; the model's own weights stay as they are.

    `scale` multiplies its updates. Its numbers are kept in `dtype`, on the device of the first layer; with `trainable`
    their gradients are taken. Heads, biases and token rows that it carries are installed, frozen. Raises E-ATTACH (the
    name is taken, a layer of another kind), E-BASE (a target is not in the model, or has another shape), E-PLACE.
    """
    state = _attachments(model)
    if name in state.adapters or not name.isidentifier():
        what = "is taken" if name in state.adapters else "is no identifier"
        raise AttachError(f"the name {name!r} {what}", fix="attach it under another name, or detach the other first")
    parameters = _Parameters(model)
    places = [(target, parameters.path_of(target)) for target in targets_of(adapter)]
    source = AttachedAdapter(adapter, scale, dtype, trainable)
    if places:
        source.to(parameters[places[0][1]].device)
    state.adapters[name] = source
    setattr(model, _STATE, state)
    try:
        state.install_extras(name, adapter.extras, parameters)
        state.install_updates(name, places, adapter.extras, parameters)
    except BaseException:
        detach(model, name)
        raise
    state.activate((*state.active.names, name))
    return source


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take the adapter `name`, or all, off a model. With the last one the model is the object it was: every module in
    its place, every bit of its parameters. Raises E-ATTACH for a name that it does not have."""
    state = _attachments(model)
    if name is not None:
        state.check([name])
    for gone in list(state.adapters) if name is None else [name]:
        state.remove(gone)
    if not state.adapters and getattr(model, _STATE, None) is state:
        delattr(model, _STATE)


def set_active(model: nn.Module, names: str | Sequence[str]) -> None:
    """Make these adapters the active ones; their updates add up. Raises E-ATTACH."""
    state = _attachments(model)
    wanted = (names,) if isinstance(names, str) else tuple(names)
    state.check(wanted)
    state.activate(wanted)


def attached(model: nn.Module) -> tuple[str, ...]:
    """Return the names of all adapters that are on a model."""
    return tuple(_attachments(model).adapters)


def active(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters that a model computes with."""
    return _attachments(model).active.names


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Let a model compute without its adapters while the context lasts."""
    before = active(model)
    set_active(model, ())
    try:
        yield
    finally:
        set_active(model, before)


@contextmanager
def temporarily(model: nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[None]:
    """Put adapters on a model by name; afterwards they are gone, and active is what was active before."""
    before = active(model)
    names = []
    try:
        for name, adapter in adapters.items():
            attach(model, adapter, name=name)
            names.append(name)
        yield
    finally:
        for name in names:
            detach(model, name)
        if active(model) != before:
            set_active(model, before)


def layers_of(model: nn.Module, name: str) -> dict[int, AdaptedLayer]:
    """Return the layers that the adapter `name` updates, by the number of the target in it; stacks of experts are
    none."""
    layers = _attachments(model).layers.values()
    return {update.which: layer for layer in layers for update in layer.updates if update.name == name}


def replaced(model: nn.Module, name: str, extras: Sequence[ExtraTensor]) -> list[tuple[ExtraTensor, nn.Parameter]]:
    """Return those `extras` of the adapter `name` that take the place of parameters, each with its parameter, which
    holds its values while the adapter is active."""
    swaps = _attachments(model).replaced.get(name, [])
    return list(zip([e for e in extras if e.use == "replace"], [p for p, _ in swaps], strict=True))


# --- a model's adapters ---------------------------------------------------------------------------------------------


def _attachments(model: nn.Module) -> Attachments:
    """The adapters of a model, new ones that are not stored without any. They are stored as an attribute, so that they
    are copied and pickled with it; a wrapper that passes on the attributes of the model in it has none of its own."""
    state = getattr(model, _STATE, None)
    return state if isinstance(state, Attachments) and state.model is model else Attachments(model)


@dataclass(eq=False, repr=False)
class Attachments:
    """The adapters of `model` by name, which of them are active, and how everything was before."""

    model: nn.Module
    adapters: dict[str, AttachedAdapter] = field(default_factory=dict)
    active: ActiveAdapters = field(default_factory=ActiveAdapters)
    layers: dict[str, AdaptedLayer] = field(default_factory=dict)
    parameters: dict[str, tuple[AdaptedParameter, tuple[str, ...]]] = field(default_factory=dict)
    replaced: dict[str, list[tuple[nn.Parameter, Tensor]]] = field(default_factory=dict)
    owners: dict[str, nn.Module] = field(default_factory=dict)  # which wrapper registers an adapter's parameters

    def check(self, names: Sequence[str]) -> None:
        """Raise E-ATTACH for a name that no adapter has."""
        for name in names:
            if name not in self.adapters:
                fix = f"there are: {', '.join(self.adapters)}" if self.adapters else ""
                raise AttachError(f"there is no adapter {name!r} on the model", fix=fix)

    def activate(self, names: tuple[str, ...]) -> None:
        """Make these adapters the active ones. What they replace is put back last in, first out: each holds what the
        one before it had put there."""
        for name in reversed(dict.fromkeys(self.active.names)):
            self._swap(reversed(self.replaced.get(name, [])))
        for name in dict.fromkeys(names):
            self._swap(self.replaced.get(name, []))
        self.active.names = names

    @staticmethod
    def _swap(swaps: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Exchange values of parameters with those that replace them; a tied parameter may be in two of them."""
        for parameter, value in swaps:
            parameter.data, value.data = value.data, parameter.data

    # --- updates ---

    def install_updates(
        self, name: str, places: Sequence[tuple[Target, str]], extras: Sequence[ExtraTensor], parameters: _Parameters
    ) -> None:
        """Add every update of the adapter `name` to the parameter at its path, with the magnitude and the bias that
        belong to it. Raises E-ATTACH, E-PLACE."""
        beside = {(e.name, e.use): e for e in extras if e.use in ("magnitude", "add")}
        for which, (target, path) in enumerate(places):
            magnitude = beside.pop((target.name, "magnitude"), None)
            bias = beside.pop((f"{target.name.removesuffix('.weight')}.bias", "add"), None)
            device = parameters[path].device
            tensors = (None if extra is None else _tensor(extra, device) for extra in (magnitude, bias))
            taker = self._add(path, Update(name, self.adapters[name], which, target, *tensors))
            if name not in self.owners:
                taker.add_module(f"{_CHILD}{name}", self.adapters[name])
                self.owners[name] = taker
        for extra in beside.values():
            raise PlacementError(f"the adapter's {extra.name!r} ({extra.use}) belongs to no target of it")

    def _add(self, path: str, update: Update) -> nn.Module:
        """Let the layer, or the parameter, at `path` take an update; returns what takes it."""
        module = path.removesuffix(".weight")
        if path.endswith(".weight") and not update.target.view.kind.startswith("expert"):
            layer = self._wrap(module)
            if is_known_layer(layer.base_layer):
                layer.updates.append(update)
                return layer
            self._unwrap(module)
        if update.magnitude is not None or update.bias is not None:
            raise AttachError(f"{path!r} is no layer that takes a DoRA magnitude or a bias")
        if path not in self.parameters:
            owner, _, leaf = path.rpartition(".")
            parent, added = self.model.get_submodule(owner), AdaptedParameter(self.active)
            self.parameters[path] = added, tuple(parent._parameters)
            parametrize.register_parametrization(parent, leaf, added, unsafe=True)
        taker = self.parameters[path][0]
        taker.updates.append(update)
        return taker

    def _wrap(self, module: str) -> AdaptedLayer:
        """The wrapper around a module, made if there is none."""
        if module not in self.layers:
            owner, _, leaf = module.rpartition(".")
            parent = self.model.get_submodule(owner)
            wrapper = AdaptedLayer(getattr(parent, leaf), self.active)
            wrapper.train(wrapper.base_layer.training)
            setattr(parent, leaf, wrapper)
            self.layers[module] = wrapper
        return self.layers[module]

    def _unwrap(self, module: str) -> None:
        """Put a module back in place of its wrapper, if that has nothing left to do."""
        wrapper = self.layers[module]
        if not wrapper.updates and not wrapper.rows:
            owner, _, leaf = module.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, wrapper.base_layer)
            del self.layers[module]

    def remove(self, name: str) -> None:
        """Take the adapter `name` off every layer and parameter."""
        if name in self.active.names:
            self.activate(tuple(other for other in self.active.names if other != name))
        for module, wrapper in list(self.layers.items()):
            wrapper.updates = [u for u in wrapper.updates if u.name != name]
            wrapper.rows = [r for r in wrapper.rows if r.name != name]
            self._unwrap(module)
        for path, (added, order) in reversed(list(self.parameters.items())):
            added.updates = [u for u in added.updates if u.name != name]
            if not added.updates:
                owner, _, leaf = path.rpartition(".")
                own = self.model.get_submodule(owner)
                parametrize.remove_parametrizations(own, leaf, leave_parametrized=False)
                rest = {key: value for key, value in own._parameters.items() if key not in order}
                kept = {key: own._parameters[key] for key in order if key in own._parameters}
                own._parameters.clear()
                own._parameters.update(kept | rest)  # in the order they had
                del self.parameters[path]
        if name in self.owners:
            del self.owners.pop(name)._modules[f"{_CHILD}{name}"]
        self.replaced.pop(name, None)
        self.adapters.pop(name)

    # --- extra tensors ---

    def install_extras(self, name: str, extras: Sequence[ExtraTensor], parameters: _Parameters) -> None:
        """Install heads and trained token rows. Raises E-PLACE for what the model has no place for."""
        indices = {e.name: e for e in extras if e.use == "row_indices"}
        swaps: list[tuple[nn.Parameter, Tensor]] = []
        for extra in extras:
            if extra.use not in ("replace", "rows"):
                continue
            path = parameters.index.find(extra.name.replace(".base_layer.", ".").replace("base_layer.", ""))
            if path is None:
                raise PlacementError(
                    f"the model has no {extra.name!r}",
                    fix="load it with the class of the adapter's task, as AutoModelFor...",
                )
            parameter = parameters[path]
            value = _tensor(extra, parameter.device)
            if extra.use == "rows":
                index = _tensor(indices[extra.name], parameter.device).long()
                self._add_rows(path, name, index, value)
                continue
            if value.shape != parameter.shape or not isinstance(parameter, nn.Parameter):
                raise PlacementError(f"{extra.name!r} is {list(value.shape)}, {list(parameter.shape)} in the model")
            swaps.append((parameter, value.to(parameter.dtype)))
        self.replaced[name] = swaps

    def _add_rows(self, path: str, name: str, index: Tensor, values: Tensor) -> None:
        """Give trained rows to the layer at `path`, and to an output layer that is tied to it."""
        layer = self._wrap(path.removesuffix(".weight"))
        is_output = not isinstance(layer.base_layer, nn.Embedding)
        layer.rows.append(TokenRows(name, index, values, is_output))
        tied = getattr(self.model, "get_output_embeddings", lambda: None)()
        inner = tied.base_layer if isinstance(tied, AdaptedLayer) else tied
        if not is_output and inner is not None and inner.weight is layer.base_layer.weight:
            for other, module in self.model.named_modules():
                if module is tied:
                    self._wrap(other).rows.append(TokenRows(name, index, values, True))
                    break


# --- names and numbers ----------------------------------------------------------------------------------------------


class _Parameters:
    """Parameters and buffers of a live model by the names of their layers, whatever wraps these."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._tensors: dict[str, Tensor] = {}
        for path, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
            plain = path.replace(".base_layer.", ".").replace("parametrizations.", "").removesuffix(".original")
            if f".{_CHILD}" not in path:
                self._tensors[plain] = tensor
        self.index = NameIndex(self._tensors, families_of(model))

    def __getitem__(self, path: str) -> Tensor:
        return self._tensors[path]

    def path_of(self, target: Target) -> str:
        """The path of a target's parameter. Raises E-BASE if it is missing or of another shape."""
        path = self.index.find(target.name)
        if path is None:
            raise self.index.missing(target.name)
        state: Any = getattr(self[path], "quant_state", None)  # where its numbers are packed
        shape = tuple(self[path].shape if state is None else state.shape)
        if shape != tuple(target.shape):
            raise BaseError(f"the target {target.name!r} is {list(target.shape)}, {list(shape)} in the model")
        return path


def _tensor(extra: ExtraTensor, device: torch.device) -> Tensor:
    """An extra tensor of floats as float32 or float64, of integers as they are; (out,) if it is a magnitude."""
    stored = np.frombuffer(extra.data, STORAGE[extra.dtype]).reshape(extra.shape)
    values = decode(stored, extra.dtype) if extra.dtype in TORCH_NAMES else stored
    tensor = torch.from_numpy(values.copy()).to(device)
    return tensor.reshape(-1) if extra.use == "magnitude" else tensor
