"""The class of a base, asked about it: names, shapes, ties, orientation. No weight is loaded.

The class is built from the base's configuration on torch's meta device, where tensors have shapes and no numbers, and
asked: nothing here lists architectures. It costs the import of torch and transformers (seconds), so commands ask only
where the answer decides something.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

TIE = "tie_word_embeddings"
_MOST = 4096  # layers of a model, and experts of a layer


@dataclass(frozen=True)
class Architecture:
    """The class of a base, built without weights.

    `name` is its name. `shapes` has every name of its state dict, those of tied tensors too. `ties` are the groups of
    names that share one tensor, `sources` the names in them that stand for another where a checkpoint lacks them.
    `inputs` and `outputs` are the weights of its input and output embeddings. `transposed` are the weights that it
    stores (in, out), or for a stack of experts (experts, in, out), as the class says of itself; that is what PEFT asks,
    too. `is_tied` says that its configuration ties embeddings, `computes_by_tie` that what it computes depends on that.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    ties: tuple[frozenset[str], ...]
    inputs: frozenset[str]
    outputs: frozenset[str]
    transposed: frozenset[str]
    sources: Mapping[str, str] = field(default_factory=dict)
    is_tied: bool = False
    computes_by_tie: bool = False

    def shared_with(self, name: str) -> frozenset[str]:
        """Return the other names of the tensor `name`."""
        return next((group - {name} for group in self.ties if name in group), frozenset())


def of(config: Mapping[str, Any]) -> Architecture | None:
    """Return the architecture of a base with this config.json, or None if transformers has no class for it.

    Code that a configuration names (`auto_map`) is never run. One that asks for more layers than any model has is of no
    class: building it would not end.
    """
    if not config.get("model_type") or _is_endless(config):
        return None
    try:
        return _built(json.dumps(config, sort_keys=True))
    except _Unknown:
        return None


def _is_endless(config: Mapping[str, Any], depth: int = 3) -> bool:
    """Return whether a configuration, or one in it, asks for more modules than any model has."""
    return any(
        _is_endless(value, depth - 1)
        if isinstance(value, dict) and depth
        else isinstance(value, int) and value > _MOST and any(word in key for word in ("layer", "block", "expert"))
        for key, value in config.items()
        if "size" not in key and "dim" not in key
    )


class _Unknown(Exception):
    """transformers cannot build the class."""


@lru_cache(maxsize=8)
def _built(text: str) -> Architecture:
    import torch
    import transformers

    config = json.loads(text, object_hook=_number)
    family, named = config.pop("model_type"), (config.get("architectures") or [""])[0]
    config.pop("quantization_config", None)  # the class of the model is the same, its layers are the plain ones
    kind: Any = getattr(transformers, named, None) if isinstance(named, str) else None
    with quiet():
        try:
            settings = _settings(family, config)
            with torch.device("meta"):
                if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
                    model: Any = kind(settings)
                else:
                    model = transformers.AutoModel.from_config(settings)  # type: ignore[no-untyped-call]
                model.tie_weights()
            depends = _reads_tie(model) or _derives_from_tie(family, config)
        except Exception as error:  # a stranger's configuration may fail anywhere in transformers
            raise _Unknown(str(error)) from None
    return replace(_asked(model), is_tied=getattr(settings, TIE, False) is True, computes_by_tie=depends)


def _settings(family: str, config: Mapping[str, Any]) -> Any:
    """The configuration as transformers' class, made of a copy: some classes take parts out of what they are given."""
    import transformers

    return transformers.AutoConfig.for_model(family, **deepcopy(dict(config)))


def _number(value: dict[str, Any]) -> Any:
    """A number that JSON has no word for, as transformers writes it: ``{"__float__": "Infinity"}``."""
    words = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
    return words.get(value["__float__"], value) if value.keys() == {"__float__"} else value


def _reads_tie(model: Any) -> bool:
    """Return whether a forward pass of the model looks at the field that ties embeddings: those that scale then do."""
    kinds = {type(module) for module in model.modules()}
    codes = [getattr(inspect.unwrap(kind.forward), "__code__", None) for kind in kinds]
    return any(code is not None and TIE in code.co_names for code in codes)


def _derives_from_tie(family: str, config: Mapping[str, Any]) -> bool:
    """Return whether a configuration sets other fields by the one that ties embeddings."""
    fields = [_settings(family, {**config, TIE: tie}).to_dict() for tie in (True, False)]
    own = [{key: value for key, value in each.items() if key != TIE} for each in fields]
    return own[0] != own[1]


def _asked(model: Any) -> Architecture:
    """The facts of a model, on whatever device."""
    names: dict[int, set[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), set()).add(name)
    transposed = {name for name, owner, tensor in _parameters(model) if _is_transposed(owner, tensor)}
    return Architecture(
        name=type(model).__name__,
        shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        ties=tuple(sorted((frozenset(group) for group in names.values() if len(group) > 1), key=sorted)),
        inputs=_weights(model, model.get_input_embeddings, names),
        outputs=_weights(model, model.get_output_embeddings, names),
        transposed=frozenset(transposed),
        sources=dict(getattr(model, "all_tied_weights_keys", None) or {}),
    )


def _parameters(model: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, module, parameter) of every parameter, under all its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{path}.{leaf}".lstrip("."), module, tensor


def _is_transposed(module: Any, parameter: Any) -> bool:
    """Return whether a module stores its weight (in, out), or its stack of experts (experts, in, out)."""
    from transformers.pytorch_utils import Conv1D

    if parameter.ndim == 3:
        return getattr(module, "is_transposed", False) is True
    return parameter.ndim == 2 and isinstance(module, Conv1D)


def _weights(model: Any, ask: Any, names: Mapping[int, set[str]]) -> frozenset[str]:
    """The names under which the weight of the module that `ask` returns is known as that module's own."""
    try:
        module = ask()
    except (NotImplementedError, AttributeError):
        return frozenset()
    weight = getattr(module, "weight", None)
    if weight is None:
        return frozenset()
    paths = [path for path, other in model.named_modules(remove_duplicate=False) if other is module]
    return frozenset(f"{path}.weight".lstrip(".") for path in paths) & frozenset(names.get(id(weight), ()))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' log, while a class is built from a configuration that may be odd."""
    import transformers

    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
