"""Targets under PEFT's names and in its shapes; the reader of these is `lrconvert.formats.readers.peft`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import ExportError
from lrconvert.lora.adapter import CompactAdapter, Target

PREFIX = "base_model.model."
BASE_LAYER = ".base_layer"
# How PEFT orders the parameters of a module that it wraps several times: the first is innermost.
_PARAMETERS = (
    "gate_up_proj",
    "gate_up_proj_bias",
    "gate_proj",
    "up_proj",
    "w1",
    "v1",
    "w2",
    "down_proj",
    "down_proj_bias",
)
_EMBEDDING = re.compile(r"embed|^wte$|^wpe$")
_EXPERTS = ("expert", "expert_transposed")

Factors = tuple[Target, Array, Array]  # A (r, in), B (out, r)


@dataclass(frozen=True)
class Half:
    """One stored factor: its name in the file, and its values."""

    name: str
    values: Array


@dataclass(frozen=True)
class Layer:
    """One adapted module (`name`), or parameter of one, of PEFT, with the `rank` that all of its factors have."""

    name: str
    rank: int
    halves: tuple[Half, Half]
    is_parameter: bool = False
    is_embedding: bool = False
    target: str = ""  # the parameter's name


def endings(name: str) -> Iterator[str]:
    """What PEFT takes for a shorter spelling of a name: ``a.b.c`` ends with ``b.c`` and ``c``."""
    parts = name.split(".")
    return (".".join(parts[n:]) for n in range(1, len(parts)))


def module_name(target: Target) -> str:
    """The module of a layer. Raises E-EXPORT for a parameter that is no module's weight."""
    module = target.name.removesuffix(".weight")
    if module == target.name:
        raise ExportError(
            f"{target.name!r} is a parameter of its own, not the weight of a layer",
            fix="convert again with --exclude for it, or merge it into the base",
        )
    return module


def is_embedding(compact: CompactAdapter, target: Target) -> bool:
    """Whether a target is an embedding: the source says so, or its name does; stored transposed may be a Conv1D too."""
    module = target.name.removesuffix(".weight")
    named = module in compact.provenance.fields.get("embeddings", "").split(",")
    return target.view.kind == "transposed" and (named or _EMBEDDING.search(module.rpartition(".")[2]) is not None)


def is_parameter(compact: CompactAdapter, target: Target) -> bool:
    """Whether PEFT adapts a target as a parameter: a stack of experts, what the source named so, and whatever is no
    module's weight."""
    named = [n for n in compact.provenance.fields.get("target_parameters", "").split(",") if n]
    alone = not target.name.endswith(".weight") or any(f".{target.name}".endswith(f".{n}") for n in named)
    return target.view.kind in _EXPERTS or (target.view.kind == "matrix" and alone)


def adapted_layers(compact: CompactAdapter, factors: Iterable[Factors], rank: Callable[[int], int]) -> list[Layer]:
    """Every target with its factors as PEFT stores them, padded with zeros to ``rank(their own rank)``.

    Raises E-EXPORT for slices of fused layers and convolutions in groups.
    """
    found: list[Layer] = []
    parameters: dict[str, list[Factors]] = {}
    for target, a, b in factors:
        if is_parameter(compact, target):
            parameters.setdefault(target.name, []).append((target, a, b))
        else:
            found.append(_layer(target, is_embedding(compact, target), *_padded(a, b, rank(a.shape[0]))))
    return [*found, *_wrapped(parameters, rank)]


def _padded(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """The same product with zero rows of A and columns of B up to `rank`."""
    more = rank - a.shape[0]
    return np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))


def _layer(target: Target, embedding: bool, a: Array, b: Array) -> Layer:
    kind, rank = target.view.kind, a.shape[0]
    if kind == "rows":
        raise ExportError(
            f"{target.name!r} is updated in rows {target.view.text.partition(':')[2]} only, which PEFT cannot express",
            fix="merge it into the base, or convert again with --exclude for it",
        )
    module = module_name(target)
    if embedding:
        names = [f"{PREFIX}{module}.lora_embedding_{half}" for half in "AB"]
        return Layer(module, rank, (Half(names[0], a), Half(names[1], b)), is_embedding=True, target=target.name)
    if kind == "conv":
        kernel = target.shape[2:]
        if target.view.text.rpartition(":")[2] != "1":
            raise ExportError(f"{target.name!r} is a convolution in groups, which PEFT cannot express", fix="merge it")
        a, b = a.reshape(rank, -1, *kernel), b.reshape(-1, rank, *(1 for _ in kernel))
    names = [f"{PREFIX}{module}.lora_{half}.weight" for half in "AB"]
    return Layer(module, rank, (Half(names[0], a), Half(names[1], b)), target=target.name)


# --- parameters -----------------------------------------------------------------------------------------------------


def _wrapped(parameters: Mapping[str, Sequence[Factors]], rank: Callable[[int], int]) -> list[Layer]:
    """Parameters with the wrappers that PEFT puts around their modules. Raises E-EXPORT if their order is unknown."""
    roots: dict[str, list[str]] = {}
    for name in parameters:
        roots.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    found = []
    for root, leaves in sorted(roots.items()):
        if len(leaves) > 1 and not set(leaves) <= set(_PARAMETERS):
            raise ExportError(f"the order in which PEFT wraps {', '.join(leaves)} of {root!r} is not known")
        leaves.sort(key=_PARAMETERS.index if len(leaves) > 1 else str)
        for depth, leaf in zip(reversed(range(len(leaves))), leaves, strict=True):
            name = f"{root}.{leaf}"
            a, b, common = _stacked(parameters[name], rank)
            names = [f"{PREFIX}{root}{BASE_LAYER * depth}.lora_{half}.weight" for half in "AB"]
            found.append(Layer(name, common, (Half(names[0], a), Half(names[1], b)), is_parameter=True, target=name))
    return found


def _stacked(entries: Sequence[Factors], rank: Callable[[int], int]) -> tuple[Array, Array, int]:
    """A (experts * r, in), B (out, experts * r) and r. Expert i has rows i * r to (i + 1) * r of A, and columns i,
    i + experts, ... of B; experts without an update have zeros."""
    target = entries[0][0]
    common = rank(max(a.shape[0] for _, a, _ in entries))
    if target.view.kind not in _EXPERTS:
        a, b = _padded(*entries[0][1:], common)
        return a, b, common
    experts, (out, inner) = target.shape[0], target.matrix_shape
    whole_a, whole_b = np.zeros((experts, common, inner), np.float32), np.zeros((out, common, experts), np.float32)
    for entry, a, b in entries:
        which = int(entry.view.text.rpartition(":")[2])
        whole_a[which, : a.shape[0]], whole_b[:, : b.shape[1], which] = a, b
    return whole_a.reshape(-1, inner), whole_b.reshape(out, -1), common
