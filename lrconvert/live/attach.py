"""Adapters on a live model, unmerged: any compact adapter, any LoRA, several by name, for inference and training.

A layer that is adapted is wrapped (`AdaptedLayer`). The parameters of one adapter live in one module
(`AttachedAdapter`), which the methods' own `expand` reads: the one formula of a form serves files, merges and live
models alike. Stacks of experts are parameters without a layer of their own; their updates are added to the parameter as
it is used, as PEFT does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lrconvert.core.dtypes import STORAGE, TORCH_NAMES, decode
from lrconvert.core.errors import AttachError, PlacementError
from lrconvert.live.adapted_layer import ActiveAdapters, AdaptedLayer, TokenRows
from lrconvert.live.adapted_stack import AdaptedParameter
from lrconvert.live.attached_adapter import Adapter, AttachedAdapter, Update, targets_of
from lrconvert.live.layer_inputs import is_known_layer
from lrconvert.live.live_parameters import CHILD, LiveParameters, Slot
from lrconvert.live.task_class import advice
from lrconvert.lora.adapter import MAGNITUDES, ExtraTensor, Target

_STATE = "_lrconvert"  # the attribute of a model that holds its `Attachments`


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
    before = state.active.names
    state.activate(())  # so that it holds its own parameters, tied as they are
    try:
        parameters = LiveParameters(model)
        places = [parameters.place(target) for target in targets_of(adapter)]
        source = AttachedAdapter(adapter, scale, dtype, trainable)
        if places:
            source.to(parameters[places[0][0]].tensor.device)
        state.adapters[name] = source
        setattr(model, _STATE, state)
        state.install_extras(name, adapter, parameters)
        state.install_updates(name, places, adapter.extras, parameters)
    except BaseException:
        if name in state.adapters:
            detach(model, name)
        state.activate(before)
        raise
    state.activate((*before, name))
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
def temporarily(model: nn.Module, adapters: Mapping[str, Adapter], *, scale: float = 1.0) -> Iterator[None]:
    """Put adapters on a model by name, their updates times `scale`; afterwards they are gone, and active is what was
    active before."""
    before = active(model)
    names = []
    try:
        for name, adapter in adapters.items():
            attach(model, adapter, name=name, scale=scale)
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
    """Return those `extras` of the adapter `name` that take the place of parameters, each with the parameter that
    holds its values, and is in its place while the adapter is active."""
    values = {r.extra: r.value for r in _attachments(model).replaced.get(name, ())}
    pairs = ((extra, values.get(extra.name)) for extra in extras if extra.use == "replace")
    return [(extra, value) for extra, value in pairs if isinstance(value, nn.Parameter)]


# --- a model's adapters ---------------------------------------------------------------------------------------------


def _attachments(model: nn.Module) -> Attachments:
    """The adapters of a model, new ones that are not stored without any. They are stored as an attribute, so that they
    are copied and pickled with it; a wrapper that passes on the attributes of the model in it has none of its own."""
    state = getattr(model, _STATE, None)
    return state if isinstance(state, Attachments) and state.model is model else Attachments(model)


@dataclass(eq=False, repr=False)
class _Replacement:
    """A tensor of an adapter that takes the place of the one in a slot: of that module's alone, so that others that
    are tied to it keep theirs, as with the copy of the module that PEFT trains."""

    extra: str
    slot: Slot
    value: Tensor
    before: Tensor | None = None

    def put_in(self) -> None:
        self.before = self.slot.exchange(self.value)

    def put_back(self) -> None:
        if self.before is not None:
            self.slot.exchange(self.before)
            self.before = None


@dataclass(eq=False, repr=False)
class Attachments:
    """The adapters of `model` by name, which of them are active, and how everything was before."""

    model: nn.Module
    adapters: dict[str, AttachedAdapter] = field(default_factory=dict)
    active: ActiveAdapters = field(default_factory=ActiveAdapters)
    layers: dict[str, AdaptedLayer] = field(default_factory=dict)
    parameters: dict[str, tuple[AdaptedParameter, tuple[str, ...]]] = field(default_factory=dict)
    replaced: dict[str, list[_Replacement]] = field(default_factory=dict)
    copies: dict[str, tuple[nn.Module, nn.Module]] = field(default_factory=dict)  # modules of two paths, and their copy
    owners: dict[str, nn.Module] = field(default_factory=dict)  # which wrapper registers an adapter's parameters

    def check(self, names: Sequence[str]) -> None:
        """Raise E-ATTACH for a name that no adapter has."""
        for name in names:
            if name not in self.adapters:
                fix = f"there are: {', '.join(self.adapters)}" if self.adapters else ""
                raise AttachError(f"there is no adapter {name!r} on the model", fix=fix)

    def activate(self, names: tuple[str, ...]) -> None:
        """Make these adapters the active ones. Of two that replace one tensor the last one does; all that is replaced
        is put back first."""
        for name in reversed(dict.fromkeys(self.active.names)):
            for replacement in reversed(self.replaced.get(name, [])):
                replacement.put_back()
        for name in dict.fromkeys(names):
            for replacement in self.replaced.get(name, []):
                replacement.put_in()
        for added, _ in self.parameters.values():
            added.forget()
        self.active.names = names

    # --- updates ---

    def install_updates(
        self, name: str, places: Sequence[tuple[str, Target]], extras: Sequence[ExtraTensor], parameters: LiveParameters
    ) -> None:
        """Add every update of the adapter `name` to the parameter at its path, with the magnitude and the bias that
        belong to it. Raises E-ATTACH, E-PLACE."""
        beside = {(e.name, e.use): e for e in extras if e.use in (*MAGNITUDES, "add")}
        for which, (path, target) in enumerate(places):
            own = [beside.pop((target.name, use), None) for use in MAGNITUDES]
            own.append(beside.pop((f"{target.name.removesuffix('.weight')}.bias", "add"), None))
            device = parameters[path].tensor.device
            tensors = (None if extra is None else _tensor(extra, device) for extra in own)
            taker = self._add(path, Update(name, self.adapters[name], which, target, *tensors))
            if name not in self.owners:
                taker.add_module(f"{CHILD}{name}", self.adapters[name])
                self.owners[name] = taker
        for extra in beside.values():
            raise PlacementError(f"the adapter's {extra.name!r} ({extra.use}) belongs to no target of it")

    def _add(self, path: str, update: Update) -> nn.Module:
        """Let the layer, or the parameter, at `path` take an update; returns what takes it."""
        module, magnitudes = path.removesuffix(".weight"), (update.magnitude, update.input_magnitude)
        if path.endswith(".weight") and not update.target.view.kind.startswith("expert"):
            layer = self._wrap(module)
            if update.input_magnitude is not None and isinstance(layer.base_layer, nn.Embedding):
                raise AttachError(f"{path!r} is an embedding, where DoRA along the inputs is not defined")
            if is_known_layer(layer.base_layer):
                layer.updates.append(update)
                return layer
            self._unwrap(module)
        if any(tensor is not None for tensor in (*magnitudes, update.bias)):
            raise AttachError(f"{path!r} is no layer that takes a DoRA magnitude or a bias")
        if path not in self.parameters:
            owner, _, leaf = path.rpartition(".")
            parent, added = self.model.get_submodule(owner), AdaptedParameter(self.active)
            self.parameters[path] = added, tuple(parent._parameters)
            parametrize.register_parametrization(parent, leaf, added, unsafe=True)
            added.watch(parent)
        taker = self.parameters[path][0]
        taker.updates.setdefault(update.name, []).append(update)
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
            added.remove(name)
            if not added.updates:
                added.unwatch()
                owner, _, leaf = path.rpartition(".")
                own = self.model.get_submodule(owner)
                parametrize.remove_parametrizations(own, leaf, leave_parametrized=False)
                rest = {key: value for key, value in own._parameters.items() if key not in order}
                kept = {key: own._parameters[key] for key in order if key in own._parameters}
                own._parameters.clear()
                own._parameters.update(kept | rest)  # in the order they had
                del self.parameters[path]
        if name in self.owners:
            del self.owners.pop(name)._modules[f"{CHILD}{name}"]
        self.replaced.pop(name, None)
        in_use = {id(replacement.slot.layer) for others in self.replaced.values() for replacement in others}
        for module, (original, other) in list(self.copies.items()):
            if id(other) not in in_use:
                self._exchange(module, original)
                del self.copies[module]
        self.adapters.pop(name)

    # --- extra tensors ---

    def install_extras(self, name: str, adapter: Adapter, parameters: LiveParameters) -> None:
        """Install heads and trained token rows. Raises E-PLACE for what the model has no place for."""
        indices = {e.name: e for e in adapter.extras if e.use == "row_indices"}
        placed = [extra for extra in adapter.extras if extra.use in ("replace", "rows")]
        places = [(extra, _place_of(extra, adapter, parameters)) for extra in placed]
        own = {path for _, path in places}
        self.replaced[name] = []
        for extra, path in places:
            tensor = parameters[path].tensor
            value = _tensor(extra, tensor.device)
            if extra.use == "rows":
                index = _tensor(indices[extra.name], tensor.device).long()
                for taker in self._takers_of_rows(path, own, parameters):
                    self._wrap(taker.removesuffix(".weight")).rows.append(TokenRows(name, index, value))
                continue
            if value.shape != tensor.shape:
                raise PlacementError(
                    f"{extra.name!r} is {list(value.shape)}, {list(tensor.shape)} in the model", fix=advice(adapter)
                )
            value = value.to(tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=False)
            # The base's own weight, which PEFT stores beside an update, is that of all modules that are tied to it.
            tied = parameters.sharing(path)[1:] if "base_layer." in extra.name else []
            paths = [path, *(other for other in tied if other not in own)]
            self.replaced[name] += [_Replacement(extra.name, self._slot(p, parameters), value) for p in paths]

    def _slot(self, path: str, parameters: LiveParameters) -> Slot:
        """Return the place of the tensor at `path` for this path alone: a module at others, too, is copied, without
        its tensors."""
        slot, (module, _, leaf) = parameters[path], path.rpartition(".")
        if module not in self.copies:
            if parameters.paths_of(slot.layer) == 1:
                return slot
            other = copy.copy(slot.layer)
            other._parameters, other._buffers = dict(slot.layer._parameters), dict(slot.layer._buffers)
            self.copies[module] = slot.layer, other
            self._exchange(module, other)
        return Slot(self.copies[module][1], leaf)

    def _exchange(self, module: str, layer: nn.Module) -> None:
        """Put a layer at a path, in the wrapper that may be there."""
        if module in self.layers:
            self.layers[module].base_layer = layer
        else:
            owner, _, leaf = module.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, layer)

    def _takers_of_rows(self, path: str, own: Set[str], parameters: LiveParameters) -> list[str]:
        """The weights that get trained rows of the one at `path`: as PEFT does, those of the input embeddings are also
        the rows of every layer that is tied to them and has no tensor of its `own` in the adapter."""
        try:
            inputs = getattr(self.model, "get_input_embeddings", lambda: None)()
        except NotImplementedError:
            inputs = None
        inputs = inputs.base_layer if isinstance(inputs, AdaptedLayer) else inputs
        if parameters[path].layer is not inputs:
            return [path]
        others = parameters.sharing(path)[1:]
        return [path, *(p for p in others if p not in own and is_known_layer(parameters[p].layer))]


def _place_of(extra: ExtraTensor, adapter: Adapter, parameters: LiveParameters) -> str:
    """The parameter that an extra tensor belongs to. Raises E-PLACE."""
    path = parameters.index.find(extra.name.replace(".base_layer.", ".").replace("base_layer.", ""))
    if path is None:
        raise PlacementError(f"the model has no {extra.name!r}", fix=advice(adapter))
    return path


# --- numbers ----------------------------------------------------------------------------------------------


def _tensor(extra: ExtraTensor, device: torch.device) -> Tensor:
    """An extra tensor of floats as float32 or float64, of integers as they are; flat if it is a magnitude."""
    stored = np.frombuffer(extra.data, STORAGE[extra.dtype]).reshape(extra.shape)
    values = decode(stored, extra.dtype) if extra.dtype in TORCH_NAMES else stored
    tensor = torch.from_numpy(values.copy()).to(device)
    return tensor.reshape(-1) if extra.use in MAGNITUDES else tensor
