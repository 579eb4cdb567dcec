"""Parameters that PEFT adapts themselves (`target_parameters`): stacks of experts, and single matrices.

PEFT wraps the module that holds the parameter, and wraps the wrapper for a second parameter of it, so the file names
the module alone: ``mlp.experts.base_layer.lora_A`` is the first adapted parameter of ``mlp.experts``,
``mlp.experts.lora_A`` the last. Which they are follows from the configuration and from their order in the module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from lrconvert.core.dtypes import Stored
from lrconvert.core.errors import ConfigError, LimitError, PairError, UnsupportedLoraError
from lrconvert.core.limits import FOREIGN
from lrconvert.formats.readers.peft.config import GROUPED, RANK_MAJOR, Settings
from lrconvert.formats.readers.peft.layers import Parts, halves, misfit
from lrconvert.formats.readers.peft.names import BASE_LAYER
from lrconvert.formats.readers.shared.folders import CONFIG_NAME
from lrconvert.formats.readers.shared.pairs import check_rank
from lrconvert.formats.readers.shared.weights import Weights, load_finite
from lrconvert.lora.adapter import MATRIX, LoraTarget, Target, View

# How transformers' modules of experts order their parameters.
ORDER = (
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
# Models whose experts are stored (experts, in, out) and say so to PEFT (`is_transposed`).
_TRANSPOSED_CLASSES = ("GptOss", "Aria", "OpenAIPrivacyFilter")
# The first PEFT that reads a stack as (experts, out, in) unless the model says otherwise; before, never.
_READS_OUT_IN = (0, 19)


def wrapped(modules: Iterable[str], settings: Settings) -> dict[str, str]:
    """Return {module of the file: parameter} for the modules that wrap a parameter. Raises E-CONFIG, E-PAIR,
    E-LORA-FEATURE."""
    depths: dict[str, list[str]] = {}
    for module in modules:
        depths.setdefault(_root(module), []).append(module)
    parameters = {}
    for root, levels in depths.items():
        names, is_named = _candidates(root, settings.parameters, len(levels))
        if not names or (not is_named and levels == [root] and settings.names_module(root)):
            continue
        levels.sort(key=len, reverse=True)  # the innermost wrapper first
        if levels != [root + BASE_LAYER * depth for depth in reversed(range(len(levels)))]:
            raise PairError(f"{root}: the wrapper of a parameter is missing", fix="the file is incomplete")
        for module, name in zip(levels, _in_order(root, names, len(levels)), strict=True):
            parameters[module] = f"{root}.{name}"
    return parameters


def read_parameter(module: str, name: str, parts: Parts, settings: Settings, weights: Weights) -> Iterator[LoraTarget]:
    """Yield a target for each expert of a stack; one for a matrix. `name` is the parameter's. Raises E-CONFIG, E-PAIR,
    E-LIMIT, E-DTYPE, E-VALUE."""
    if settings.dora or settings.lora_bias or settings.transposed:
        what = "target_parameters does not go together with use_dora, lora_bias and fan_in_fan_out; PEFT refuses that"
        raise ConfigError(what, fix=f"is this the {CONFIG_NAME} of the adapter?")
    a, b = halves(module, parts, "A", "B")
    if set(parts) != {"A", "B"}:
        raise PairError(f"{name}: the wrapper of a parameter has lora_A and lora_B only")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise misfit(name, a, b, settings)
    rank = settings.ranks.value(name)
    experts = a.shape[0] // int(rank) if rank >= 1 and rank == int(rank) else 0
    if not experts or experts * rank != a.shape[0]:
        raise PairError(f"{name}: {a.shape[0]} rows of lora_A are not a multiple of the rank {rank!s:.40}")
    check_rank(name, int(rank))
    scale = settings.scale(name, int(rank))
    stored = load_finite(weights, a), load_finite(weights, b)
    if experts == 1:
        target = Target(name, (b.shape[0], a.shape[1]), MATRIX)
        yield LoraTarget(target, *stored, scale)
    else:
        yield from _stack(name, experts, stored, scale, settings)


def _stack(
    name: str, experts: int, stored: tuple[Stored, Stored], scale: float, settings: Settings
) -> Iterator[LoraTarget]:
    """Yield the experts. Expert i has rows i * r to (i + 1) * r of A, and columns i, i + experts, ... of B; by
    Unsloth's trainer columns i * r to (i + 1) * r. Raises E-LORA-FEATURE if it is not clear whose they are."""
    if settings.b_layout == "" and settings.auto_mapping.unsloth:
        raise UnsupportedLoraError(
            f"{name}: the adapter was saved by Unsloth, which ordered the columns of lora_B by expert in some releases "
            "and as PEFT reads them in others, and does not say which",
            fix=f'add "lora_B_layout" to {CONFIG_NAME}: "{GROUPED}" if it was trained by Unsloth before it wrote that '
            f'field, "{RANK_MAJOR}" if PEFT gives the right answers with it',
        )
    a, b = stored
    in_out = reads_in_out(settings)
    rank, out, inner = a.shape[0] // experts, b.shape[0], a.shape[1]
    shape = (experts, inner, out) if in_out else (experts, out, inner)
    grouped = settings.b_layout == GROUPED
    for i in range(experts):
        view = View(f"{'expert_transposed' if in_out else 'expert'}:{i}")
        by_rank, by_expert = slice(i, None, experts), slice(i * rank, (i + 1) * rank)
        yield LoraTarget(
            Target(name, shape, view),
            Stored(a.dtype, a.array[i * rank : (i + 1) * rank]),
            Stored(b.dtype, np.ascontiguousarray(b.array[:, by_expert if grouped else by_rank])),
            scale,
        )


def check_count(parameters: Mapping[str, str], modules: Mapping[str, Parts], settings: Settings) -> None:
    """Raise E-LIMIT, before any is made, for more targets than a file may have tensors."""
    total = 0
    for module, name in parameters.items():
        info = modules[module].get("A")
        total += info.shape[0] // max(int(settings.ranks.value(name)), 1) if info is not None and info.shape else 0
    if total > FOREIGN.tensors:
        raise LimitError(f"the file adapts {total} experts; at most {FOREIGN.tensors} are read")


# --- which parameter ------------------------------------------------------------------------------------------------


def _root(module: str) -> str:
    """Return the wrapped module, without the wrappers around it."""
    while module.endswith(BASE_LAYER):
        module = module.removesuffix(BASE_LAYER)
    return module


def _candidates(root: str, parameters: Sequence[str], wrappers: int) -> tuple[list[str], bool]:
    """Return the parameters that the configuration may adapt in a module, and whether it names the module itself.

    Those that it names with the module go first; bare names may be those of any module.
    """
    named, bare = set(), set()
    for parameter in parameters:
        holder, _, name = parameter.rpartition(".")
        if not holder:
            bare.add(name)
        elif root == holder or root.endswith(f".{holder}"):
            named.add(name)
    return sorted(named if len(named) == wrappers else named | bare), bool(named)


def _in_order(root: str, names: Sequence[str], wrappers: int) -> list[str]:
    """Return the parameters of a module from the innermost wrapper to the outermost. Raises E-CONFIG,
    E-LORA-FEATURE."""
    listed = ", ".join(repr(name) for name in names)
    if len(names) != wrappers:
        what = f"{wrappers} of its parameters are adapted, target_parameters names {len(names)}: {listed:.300}"
        fix = "name in target_parameters the parameters that are adapted, each with its module"
        raise ConfigError(f"{root}: {what}", fix=fix)
    if wrappers > 1 and not set(names) <= set(ORDER):
        what = f"the order of its parameters {listed:.300} is not known, and the file does not tell it"
        raise UnsupportedLoraError(f"{root}: {what}", fix="adapt one of them alone")
    return sorted(names, key=ORDER.index) if wrappers > 1 else list(names)


# --- how a stack is stored ------------------------------------------------------------------------------------------


def reads_in_out(settings: Settings) -> bool:
    """Return whether PEFT reads the stack as (experts, in, out): always before 0.19, then where the model says so."""
    return settings.version < _READS_OUT_IN or says_transposed(settings.auto_mapping.base_class)


def says_transposed(base_class: str) -> bool:
    """Return whether a class tells PEFT that its experts are stored (experts, in, out), as far as its name shows."""
    return base_class.startswith(_TRANSPOSED_CLASSES)


def doubt(names: Sequence[str], settings: Settings) -> str:
    """Return a warning where only the base can tell how its experts are stored, else ""."""
    if not names or settings.auto_mapping.library.startswith("transformers.") or reads_in_out(settings):
        return ""
    return f"{names[0]} is taken as (experts, out, in), which the configuration does not say; check with the base"
