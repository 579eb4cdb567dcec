"""Adapters on a live model, unmerged: any compact adapter, any LoRA, several by name, for inference and training.

A layer that is adapted is wrapped (`AdaptedLayer`): its output plus the updates of the active adapters, computed
through the factors, never as a dense update. The parameters of one adapter live in one module (`AttachedAdapter`),
which the methods' own `expand` reads: the one formula of a form serves files, merges and live models alike. Stacks of
experts are parameters without a layer of their own; their updates are added to the parameter as it is used, as PEFT
does.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lrconvert.core.dtypes import STORAGE, TORCH_NAMES, decode
from lrconvert.core.errors import AttachError, BaseError, LrcError, PlacementError
from lrconvert.lora import renamings
from lrconvert.lora.adapter import CompactAdapter, ExtraTensor, LoraAdapter, Target
from lrconvert.methods import base as methods

Adapter = LoraAdapter | CompactAdapter

_STATE = "_lrconvert"  # the attribute of a model that holds its `Attachments`
_CHILD = "_adapter_"  # begins the name under which a wrapper registers an adapter
_DTYPES = {name: getattr(torch, torch_name) for name, torch_name in TORCH_NAMES.items()}


# --- the parameters of one adapter ----------------------------------------------------------------------------------


class AttachedAdapter(nn.Module):
    """One adapter's numbers: parameters, and for a compact form that is trained, its codes and indices as buffers.

    `factors(which)` gives A (r, in) and B (out, r) of a target; the update is ``scale * B @ A``. A compact adapter that
    is not trained is expanded once. Where updates depend on the base (`needs_base`), `update_on` takes its place.
    """

    def __init__(self, adapter: Adapter, scale: float, dtype: torch.dtype, trainable: bool) -> None:
        super().__init__()
        self.scale = scale
        self.needs_base = methods.needs_base(adapter)
        self._form = adapter if isinstance(adapter, CompactAdapter) else None
        self._compact = self._form if trainable else None
        self._own_scales = [1.0] * len(_targets(adapter))
        if self._compact is not None:
            self._hold(self._compact, dtype)
        elif isinstance(adapter, LoraAdapter):
            self._own_scales = [pair.scale for pair in adapter.targets]
            for n, pair in enumerate(adapter.targets):
                self._hold_factors(n, torch.from_numpy(pair.A.copy()), torch.from_numpy(pair.B.copy()), dtype)
        else:
            for n, (_, a, b) in enumerate(methods.without_base(adapter, torch)):
                self._hold_factors(n, a, b, dtype)
        self.requires_grad_(trainable)

    def _hold_factors(self, n: int, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
        self.register_parameter(f"A_{n}", nn.Parameter(a.to(dtype)))
        self.register_parameter(f"B_{n}", nn.Parameter(b.to(dtype)))

    def _hold(self, compact: CompactAdapter, dtype: torch.dtype) -> None:
        """The payload: numbers of finite precision as parameters, codes and indices as buffers."""
        method = methods.get(compact.method)
        kinds = {spec.name: spec.kind for spec in method.specs(compact.config, compact.targets)}
        self._names = tuple(kinds)
        for name, value in methods.values(method, compact, torch).items():
            if kinds[name] in ("half", "single"):
                self.register_parameter(_plain(name), nn.Parameter(value.to(dtype)))
            else:
                fixed = value if value.dtype == torch.int64 else value.to(dtype)
                self.register_buffer(_plain(name), fixed, persistent=False)

    def factors(self, which: int) -> tuple[Tensor, Tensor]:
        if self._compact is None:
            return getattr(self, f"A_{which}"), getattr(self, f"B_{which}")
        method, compact = methods.get(self._compact.method), self._compact
        values = {name: getattr(self, _plain(name)) for name in self._names}
        a, b = method.expand(compact.config, compact.targets, values, which, torch)
        return a, b

    def update_on(self, which: int, weight: Tensor) -> Tensor:
        """The update (out, in) of a target on the base's `weight` (out, in), without `factor_of`."""
        assert self._form is not None
        method, form = methods.get(self._form.method), self._form
        found: Tensor = method.rows_on(form.config, form.targets, which, self.factors(which), weight, 0)
        return found

    def factor_of(self, which: int) -> float:
        """What B @ A is multiplied with."""
        return self.scale * self._own_scales[which]


def _plain(name: str) -> str:
    """The name of a payload tensor as torch takes it, apart from those of modules."""
    return f"_{name.replace('.', '__')}"


@dataclass(frozen=True, eq=False)
class Update:
    """The update of one target by one adapter; `magnitude` for DoRA (out,), `bias` of its LoRA (out,)."""

    name: str
    source: AttachedAdapter
    which: int
    target: Target
    magnitude: Tensor | None = None
    bias: Tensor | None = None


# --- layers ---------------------------------------------------------------------------------------------------------


class AdaptedLayer(nn.Module):
    """A layer with the updates of the adapters that are active. What is asked of it and is not here is the layer's own
    (`weight`, `in_features`, ...)."""

    def __init__(self, layer: nn.Module, state: Attachments) -> None:
        super().__init__()
        self.base_layer = layer
        self.updates: list[Update] = []
        self.rows: list[_Rows] = []
        self.state = state

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Any:
        own = y = self.base_layer(x, *arguments, **named)
        for update in self.updates:
            if update.name in self.state.active:
                y = y + self._change(update, x, own)
        y = y.to(own.dtype)  # rounded once, after all was added
        for rows in self.rows:
            if rows.name in self.state.active:
                y = rows.apply(x, y)
        return y

    def _change(self, update: Update, x: Tensor, own: Tensor) -> Tensor:
        """What an update adds to the output `own` of the layer itself."""
        if update.source.needs_base:
            dense = dense_update(update, dense_weight(self.base_layer))
            change = _dense_product(self.base_layer, update.target, x, dense)
        else:
            change = self._through_factors(update, x, own)
        if update.bias is not None:
            change = change + _shaped(self.base_layer, update.bias).to(change.dtype) * update.source.scale
        return change

    def _through_factors(self, update: Update, x: Tensor, own: Tensor) -> Tensor:
        a, b = update.source.factors(update.which)
        change = _product(self.base_layer, update.target, x, a, b) * update.source.factor_of(update.which)
        if update.magnitude is None:
            return change
        bias: Any = getattr(self.base_layer, "bias", None)
        plain = own if bias is None else own - _shaped(self.base_layer, bias)
        factor = _dora_factor(self.base_layer, update, a, b)
        factor = _shaped(self.base_layer, factor).to(change.dtype)
        return (factor - 1) * plain.to(change.dtype) + factor * change


def _product(layer: nn.Module, target: Target, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``B @ A`` applied to the input of `layer`, through the factors."""
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, a.T, layer.padding_idx, layer.max_norm, layer.norm_type, False) @ b.T
    x = x.to(a.dtype)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        kernel = layer.weight.shape[2:]
        first = layer._conv_forward(x, a.reshape(a.shape[0], -1, *kernel), None)
        ones = [1] * len(kernel)
        second = F.conv1d if len(kernel) == 1 else F.conv2d
        return second(first, b.reshape(*b.shape, *ones))
    return _among_outputs(F.linear(F.linear(x, a), b), target)


def _dense_product(layer: nn.Module, target: Target, x: Tensor, dense: Tensor) -> Tensor:
    """A dense update (out, in) applied to the input of `layer`."""
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, dense.T, layer.padding_idx, layer.max_norm, layer.norm_type, False)
    x = x.to(dense.dtype)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        found: Tensor = layer._conv_forward(x, dense.reshape(layer.weight.shape), None)
        return found
    return _among_outputs(F.linear(x, dense), target)


def _among_outputs(change: Tensor, target: Target) -> Tensor:
    """What a target adds, spread over all outputs of its layer: a slice of a fused one has some of them."""
    if target.view.kind != "rows":
        return change
    start, stop = (int(n) for n in target.view.text.split(":")[1:])
    return F.pad(change, (start, target.shape[0] - stop))


def _matrix(weight: Tensor, target: Target) -> Tensor:
    """The matrix (out, in) that a target is in its parameter."""
    kind, _, rest = target.view.text.partition(":")
    if kind.startswith("expert"):
        weight = weight[int(rest)]
    if kind.endswith("transposed"):
        return weight.T
    if kind == "rows":
        start, stop = (int(n) for n in rest.split(":"))
        return weight[start:stop]
    return weight.flatten(1)


def _shaped(layer: nn.Module, values: Tensor) -> Tensor:
    """One value per output, so that it spreads over the outputs of `layer`."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return values.reshape(-1, *(1 for _ in layer.weight.shape[2:]))
    return values


def _dora_factor(layer: nn.Module, update: Update, a: Tensor, b: Tensor) -> Tensor:
    """magnitude / ||W + s B A|| along in, (out,), by Gram matrices: no dense sum is formed."""
    weight = dense_weight(layer)
    matrix = _matrix(weight, update.target).to(a.dtype)
    scale = update.source.factor_of(update.which)
    cross = ((matrix @ a.T) * b).sum(1)
    square = matrix.square().sum(1) + 2 * scale * cross + scale * scale * ((b @ (a @ a.T)) * b).sum(1)
    assert update.magnitude is not None
    return update.magnitude.to(a.dtype) / square.sqrt()


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer; of a 4-bit or 8-bit layer of bitsandbytes, dequantized."""
    weight: Any = layer.weight
    state: Any = getattr(weight, "quant_state", None)
    if state is not None:
        functional: Any = importlib.import_module("bitsandbytes.functional")  # it made the layer, so it is there
        found: Tensor = functional.dequantize_4bit(weight.data, state)
        return found
    if weight.dtype == torch.int8:
        quantized: Any = layer
        found = weight.data * quantized.state.SCB[:, None] / 127
        return found
    plain: Tensor = weight
    return plain


@dataclass(frozen=True, eq=False)
class _Rows:
    """Trained token rows of an embedding, or of the output layer that is tied to it."""

    name: str
    index: Tensor  # (n,), rising
    values: Tensor  # (n, features)
    is_output: bool

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        index, values = self.index.to(x.device), self.values.to(device=y.device, dtype=y.dtype)
        if self.is_output:
            return y.index_copy(-1, index.to(y.device), F.linear(x.to(y.dtype), values))
        place = torch.searchsorted(index, x).clamp(max=index.numel() - 1)
        return torch.where((index[place] == x)[..., None], values[place], y)


class _AddedToParameter(nn.Module):
    """A parametrization: a stack of experts with the updates of the active adapters."""

    def __init__(self, state: Attachments) -> None:
        super().__init__()
        self.updates: list[Update] = []
        self.state = state

    def forward(self, weight: Tensor) -> Tensor:
        own = weight
        for update in self.updates:
            if update.name in self.state.active:
                delta = dense_update(update, own)
                weight = weight + _placed(delta, update.target, weight).to(weight.dtype)
        return weight


def dense_update(update: Update, weight: Tensor) -> Tensor:
    """An update (out, in) of the base's parameter `weight`, as it is stored."""
    if update.source.needs_base:
        found = update.source.update_on(update.which, _matrix(weight, update.target).float())
    else:
        a, b = update.source.factors(update.which)
        found = b @ a
    return found * update.source.factor_of(update.which)


def _placed(delta: Tensor, target: Target, weight: Tensor) -> Tensor:
    """A dense update (out, in) of one expert, or of a matrix, in the shape of its parameter."""
    if not target.view.kind.startswith("expert"):
        return delta.T if target.view.kind == "transposed" else delta.reshape(weight.shape)
    which = int(target.view.text.rpartition(":")[2])
    some = delta.T if target.view.kind == "expert_transposed" else delta
    return F.pad(some[None], (0, 0, 0, 0, which, weight.shape[0] - which - 1))


# --- a model's adapters ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Attachments:
    """What is attached to a model: adapters by name, which of them are active, and how everything was before."""

    adapters: dict[str, AttachedAdapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    layers: dict[str, AdaptedLayer] = field(default_factory=dict)
    parameters: dict[str, tuple[_AddedToParameter, tuple[str, ...]]] = field(default_factory=dict)
    replaced: dict[str, list[tuple[nn.Parameter, Tensor]]] = field(default_factory=dict)
    owners: dict[str, nn.Module] = field(default_factory=dict)  # which wrapper registers an adapter's parameters


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

    `scale` multiplies its updates. Its numbers are held in `dtype`, on the device of the first layer; with `trainable`
    their gradients are taken. Heads, biases and token rows that it carries are installed, frozen. Raises E-ATTACH (the
    name is taken, a layer of another kind), E-BASE (a target is not in the model, or has another shape), E-PLACE.
    """
    state = _attachments(model)
    try:
        if name in state.adapters or not name.isidentifier():
            what = "is taken" if name in state.adapters else "is no identifier"
            raise AttachError(
                f"the name {name!r} {what}", fix="attach it under another name, or detach the other first"
            )
        names = _Names(model)
        found = [(target, *names.parameter(target)) for target in _targets(adapter)]
    except LrcError:
        _drop_empty(model, state)
        raise
    source = AttachedAdapter(adapter, scale, dtype, trainable)
    if found:
        source.to(found[0][2].device)
    state.adapters[name] = source
    try:
        _install_extras(model, names, adapter.extras, name, state)
        _install_updates(model, found, adapter.extras, source, name, state)
    except BaseException:
        detach(model, name)
        raise
    _swap(state, name, True)
    state.active = (*state.active, name)
    return source


def _targets(adapter: Adapter) -> tuple[Target, ...]:
    return adapter.shapes() if isinstance(adapter, LoraAdapter) else adapter.targets


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take the adapter `name` (all without it) off again. With the last one the model is the object it was: every
    module in its place, every bit of its parameters. Raises E-ATTACH for a name that is not there."""
    state = model.__dict__.get(_STATE)
    if state is None:
        if name is None:
            return
        raise AttachError(f"there is no adapter {name!r} on the model")
    if name is not None and name not in state.adapters:
        raise AttachError(f"there is no adapter {name!r} on the model", fix=f"there are: {', '.join(state.adapters)}")
    for gone in list(state.adapters) if name is None else [name]:
        _remove(model, state, gone)
    _drop_empty(model, state)


def set_active(model: nn.Module, names: str | Sequence[str]) -> None:
    """Make these adapters the active ones; their updates add up. Raises E-ATTACH."""
    state = _attachments(model)
    wanted = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in wanted if name not in state.adapters]
    if unknown:
        raise AttachError(f"there is no adapter {unknown[0]!r}", fix=f"there are: {', '.join(state.adapters)}")
    _activate(state, wanted)


def active(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that a model computes with."""
    state: Attachments | None = model.__dict__.get(_STATE)
    return () if state is None else state.active


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The model as it is without its adapters, while the context lasts."""
    state = _attachments(model)
    before = state.active
    set_active(model, ())
    try:
        yield
    finally:
        set_active(model, before)


def layers_of(model: nn.Module, name: str) -> dict[int, AdaptedLayer]:
    """The layers that the adapter `name` updates, by the number of the target in it; stacks of experts are none."""
    layers = _attachments(model).layers.values()
    return {update.which: layer for layer in layers for update in layer.updates if update.name == name}


def replaced(model: nn.Module, name: str, extras: Sequence[ExtraTensor]) -> list[tuple[ExtraTensor, nn.Parameter]]:
    """The `extras` of the adapter `name` that take the place of parameters, each with its parameter, which holds its
    values while the adapter is active."""
    swaps = _attachments(model).replaced.get(name, [])
    return list(zip([e for e in extras if e.use == "replace"], [p for p, _ in swaps], strict=True))


# --- installing -----------------------------------------------------------------------------------------------------


def _attachments(model: nn.Module) -> Attachments:
    """What is attached to a model; a plain attribute, since a child of an nn.Sequential would be a step of it."""
    found: Attachments = model.__dict__.setdefault(_STATE, Attachments())
    return found


def _drop_empty(model: nn.Module, state: Attachments) -> None:
    if not state.adapters:
        del model.__dict__[_STATE]


class _Names:
    """Parameters of a live model by the names that adapters use: up to one leading segment and renamings."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        config: Any = getattr(model, "config", None)
        self._rules = renamings.rules(config.to_dict() if hasattr(config, "to_dict") else {})
        self._parameters: dict[str, Tensor] = {}
        for path, parameter in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
            plain = path.replace(".base_layer.", ".").replace("parametrizations.", "").removesuffix(".original")
            if f".{_CHILD}" not in path:
                self._parameters[plain] = parameter
        self._canonical: dict[str, list[str]] = {}
        for path in self._parameters:
            spelled = renamings.canonical(path, self._rules)
            for key in {spelled, spelled.partition(".")[2]}:
                self._canonical.setdefault(key, []).append(path)

    def find(self, name: str) -> str | None:
        """The parameter's path, None if there is none. Raises E-BASE if there are several."""
        if name in self._parameters:
            return name
        spelled = renamings.canonical(name, self._rules)
        tries = (spelled, spelled.partition(".")[2])
        found = sorted({path for key in tries if key for path in self._canonical.get(key, ())})
        if len(found) > 1:
            raise BaseError(f"{name!r} may be any of {', '.join(found[:5])} of the model")
        return found[0] if found else None

    def __getitem__(self, path: str) -> Tensor:
        return self._parameters[path]

    def parameter(self, target: Target) -> tuple[str, Tensor]:
        """Path and parameter of a target. Raises E-BASE if it is missing or of another shape."""
        path = self.find(target.name)
        if path is None:
            raise BaseError(f"the target {target.name!r} is not in the model", fix="is this the adapter's own base?")
        module = self.model.get_submodule(path.rpartition(".")[0])
        layer = module.base_layer if isinstance(module, AdaptedLayer) else module
        shape = _shape(layer, self._parameters[path])
        if shape != tuple(target.shape):
            raise BaseError(f"the target {target.name!r} is {list(target.shape)}, {list(shape)} in the model")
        return path, self._parameters[path]


def _shape(layer: nn.Module, parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, also where its numbers are packed."""
    if hasattr(parameter, "quant_state") and parameter.quant_state is not None:
        return tuple(parameter.quant_state.shape)
    return tuple(parameter.shape)


def _install_updates(
    model: nn.Module,
    found: Sequence[tuple[Target, str, Tensor]],
    extras: Sequence[ExtraTensor],
    source: AttachedAdapter,
    name: str,
    state: Attachments,
) -> None:
    """Every update with what stands beside it. Raises E-ATTACH, E-PLACE."""
    beside = {(e.name, e.use): e for e in extras if e.use in ("magnitude", "add")}
    for which, (target, path, parameter) in enumerate(found):
        magnitude = beside.pop((target.name, "magnitude"), None)
        bias = beside.pop((f"{target.name.removesuffix('.weight')}.bias", "add"), None)
        parts = (_tensor(extra, parameter.device) for extra in (magnitude, bias))
        taker = _add(model, state, path, Update(name, source, which, target, *parts))
        if name not in state.owners:
            taker.add_module(f"{_CHILD}{name}", source)
            state.owners[name] = taker
    for extra in beside.values():
        raise PlacementError(f"the adapter's {extra.name!r} ({extra.use}) belongs to no target of it")


def _add(model: nn.Module, state: Attachments, path: str, update: Update) -> nn.Module:
    """Make the layer, or the parameter, at `path` take an update; returns what takes it."""
    module = path.removesuffix(".weight")
    is_layer = path.endswith(".weight") and not update.target.view.kind.startswith("expert")
    if is_layer:
        layer = _layer(model, state, module)
        if _known(layer.base_layer):
            layer.updates.append(update)
            return layer
        _unwrap(model, state, module)
    if update.magnitude is not None or update.bias is not None:
        raise AttachError(f"{path!r} is no layer that takes a DoRA magnitude or a bias")
    if path not in state.parameters:
        owner, _, leaf = path.rpartition(".")
        holder, added = model.get_submodule(owner), _AddedToParameter(state)
        state.parameters[path] = added, tuple(holder._parameters)
        parametrize.register_parametrization(holder, leaf, added, unsafe=True)
    taker = state.parameters[path][0]
    taker.updates.append(update)
    return taker


def _known(layer: nn.Module) -> bool:
    """Whether the layer's forward is one of those that `_product` knows."""
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)
    return isinstance(layer, kinds) or type(layer).__name__ == "Conv1D"


def _layer(model: nn.Module, state: Attachments, module: str) -> AdaptedLayer:
    """The wrapper around a module, made if it is not there."""
    if module not in state.layers:
        owner, _, leaf = module.rpartition(".")
        parent = model.get_submodule(owner)
        wrapper = AdaptedLayer(getattr(parent, leaf), state)
        wrapper.train(wrapper.base_layer.training)
        setattr(parent, leaf, wrapper)
        state.layers[module] = wrapper
    return state.layers[module]


def _unwrap(model: nn.Module, state: Attachments, module: str) -> None:
    """Put a module back in place of its wrapper, if that has nothing left to do."""
    wrapper = state.layers[module]
    if not wrapper.updates and not wrapper.rows:
        owner, _, leaf = module.rpartition(".")
        setattr(model.get_submodule(owner), leaf, wrapper.base_layer)
        del state.layers[module]


def _remove(model: nn.Module, state: Attachments, name: str) -> None:
    if name in state.active:
        _activate(state, tuple(other for other in state.active if other != name))
    for module, wrapper in list(state.layers.items()):
        wrapper.updates = [u for u in wrapper.updates if u.name != name]
        wrapper.rows = [r for r in wrapper.rows if r.name != name]
        _unwrap(model, state, module)
    for path, (added, order) in reversed(list(state.parameters.items())):
        added.updates = [u for u in added.updates if u.name != name]
        if not added.updates:
            owner, _, leaf = path.rpartition(".")
            own = model.get_submodule(owner)
            parametrize.remove_parametrizations(own, leaf, leave_parametrized=False)
            rest = {key: value for key, value in own._parameters.items() if key not in order}
            kept = {key: own._parameters[key] for key in order if key in own._parameters}
            own._parameters.clear()
            own._parameters.update(kept | rest)  # in the order they had
            del state.parameters[path]
    if name in state.owners:
        del state.owners.pop(name)._modules[f"{_CHILD}{name}"]
    state.replaced.pop(name, None)
    state.adapters.pop(name)


# --- extra tensors --------------------------------------------------------------------------------------------------


def _install_extras(
    model: nn.Module, names: _Names, extras: Sequence[ExtraTensor], name: str, state: Attachments
) -> None:
    """Heads and trained rows. Raises E-PLACE for what the model has no place for."""
    index = {e.name: e for e in extras if e.use == "row_indices"}
    swaps: list[tuple[nn.Parameter, Tensor]] = []
    for extra in extras:
        if extra.use not in ("replace", "rows"):
            continue
        path = names.find(extra.name.replace(".base_layer.", ".").replace("base_layer.", ""))
        if path is None:
            raise PlacementError(
                f"the model has no {extra.name!r}",
                fix="load it with the class of the adapter's task, as AutoModelFor...",
            )
        parameter = names[path]
        value = _tensor(extra, parameter.device)
        assert value is not None
        if extra.use == "rows":
            where = _tensor(index[extra.name], parameter.device)
            assert where is not None
            _add_rows(model, state, path, _Rows(name, where.long(), value, False))
            continue
        if value.shape != parameter.shape or not isinstance(parameter, nn.Parameter):
            raise PlacementError(f"{extra.name!r} is {list(value.shape)}, {list(parameter.shape)} in the model")
        swaps.append((parameter, value.to(parameter.dtype)))
    state.replaced[name] = swaps


def _add_rows(model: nn.Module, state: Attachments, path: str, rows: _Rows) -> None:
    module = path.removesuffix(".weight")
    layer = _layer(model, state, module)
    is_output = not isinstance(layer.base_layer, nn.Embedding)
    layer.rows.append(_Rows(rows.name, rows.index, rows.values, is_output))
    tied = getattr(model, "get_output_embeddings", lambda: None)()
    inner = tied.base_layer if isinstance(tied, AdaptedLayer) else tied
    if not is_output and inner is not None and inner.weight is layer.base_layer.weight:
        for other, found in model.named_modules():
            if found is tied:
                _layer(model, state, other).rows.append(_Rows(rows.name, rows.index, rows.values, True))
                break


def _activate(state: Attachments, wanted: tuple[str, ...]) -> None:
    """Make these adapters the active ones. What they replace is put back last in, first out: each holds what the one
    before it had put there."""
    for name in reversed(state.active):
        _swap(state, name, False)
    state.active = ()
    for name in dict.fromkeys(wanted):
        _swap(state, name, True)
    state.active = wanted


def _swap(state: Attachments, name: str, active: bool) -> None:
    """Exchange the values of the parameters that an adapter replaces, if it becomes active or ceases to be."""
    if (name in state.active) != active:
        swaps = state.replaced.get(name, [])
        for parameter, value in swaps if active else reversed(swaps):  # a tied parameter may be in two of them
            parameter.data, value.data = value.data, parameter.data


def _tensor(extra: ExtraTensor | None, device: torch.device) -> Tensor | None:
    """An extra tensor of floats as float32 or float64, of integers as they are; (out,) if it is a magnitude."""
    if extra is None:
        return None
    stored = np.frombuffer(extra.data, STORAGE[extra.dtype]).reshape(extra.shape)
    values = decode(stored, extra.dtype) if extra.dtype in _DTYPES else stored
    found = torch.from_numpy(values.copy()).to(device)
    return found.reshape(-1) if extra.use == "magnitude" else found
