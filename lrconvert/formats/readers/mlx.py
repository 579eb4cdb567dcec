"""MLX (mlx-lm, and the older mlx-examples): ``<module>.lora_a`` (in, r) and ``<module>.lora_b`` (r, out) in
``adapters.safetensors`` or ``adapters.npz``, with an adapter_config.json that states the factor on their product
itself, ``scale``. Stacks of experts are (experts, r, in) and (experts, out, r); embeddings (tokens, r) and (r,
features).

Only the last `num_layers` layers are adapted; modules carry their numbers in the whole model. DoRA's norms
``<module>.m`` ride along as magnitudes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lrconvert.core.errors import ConfigError, LrcError, NotLoraError, OptionError, PairError
from lrconvert.core.wording import spelled
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.shared import naming, pairs
from lrconvert.formats.readers.shared.config import is_set
from lrconvert.formats.readers.shared.folders import CONFIG_NAME, config_path, weights_in
from lrconvert.formats.readers.shared.naming import Component
from lrconvert.formats.readers.shared.notes import unused
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import Labels, Parts
from lrconvert.formats.readers.shared.weights import Weights, load_finite, load_finite_extra, open_weights
from lrconvert.io.checkpoint import config_text
from lrconvert.io.container import read_json
from lrconvert.lora.adapter import MATRIX, TRANSPOSED, ExtraTensor, LoraAdapter, LoraTarget, Target
from lrconvert.lora.base_names import EMBEDDINGS

LABELS = Labels("lora_a", "lora_b")
WEIGHTS_NAMES = ("adapters.safetensors", "adapters.npz")
Scale = Callable[[int], float]  # by the rank
_PARTS = {"lora_a": "A", "lora_b": "B", "m": "magnitude"}
# Settings of mlx-lm's training that say nothing of the update, or that are read here.
_SETTINGS = frozenset(
    (
        *("adapter_path", "batch_size", "config", "data", "fine_tune_type", "grad_accumulation_steps"),
        *("grad_checkpoint", "hf_dataset", "iters", "learning_rate", "lora_layers", "lora_parameters", "lr_schedule"),
        *("mask_prompt", "max_seq_length", "model", "num_layers", "optimizer", "optimizer_config", "project_name"),
        *("prompt_feature", "completion_feature", "report_to", "resume_adapter_file", "save_every", "seed"),
        *("steps_per_eval", "steps_per_report", "test", "test_batches", "train", "train_type", "use_dora"),
        *("val_batches", "wandb", "chat_feature", "text_feature", "clear_cache_threshold", "quantized"),
    )
)
_PARAMETERS = frozenset(("alpha", "dropout", "keys", "rank", "scale"))
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def recognises(path: Path) -> bool:
    """Return whether a folder's adapter_config.json is of mlx-lm."""
    try:
        config = read_json(path / CONFIG_NAME) if path.is_dir() else {}
    except LrcError:
        return False
    return "peft_type" not in config and not config.keys().isdisjoint({"fine_tune_type", "lora_parameters"})


def knows(names: Sequence[str]) -> bool:
    """Return whether most tensors are factors in MLX's lower-case spelling."""
    return 2 * sum(name.endswith((".lora_a", ".lora_b")) for name in names) > len(names)


def _split(name: str) -> tuple[str, str] | None:
    module, _, leaf = name.rpartition(".")
    return (module, _PARTS[leaf]) if module and leaf in _PARTS else None


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read an adapter of mlx-lm. With a base, names are those of its parameters; without one they stay, with a
    warning. Raises E-CONFIG if nothing states the scale, E-NOT-LORA, E-TENSOR, E-PAIR, E-EMPTY, E-BASE, E-OPTION,
    E-LIMIT, E-DTYPE, E-VALUE, and the errors of broken files."""
    config = read_json(config_path(path)) if config_path(path).is_file() else {}
    if config.get("fine_tune_type") == "full":
        raise NotLoraError("the file holds whole weights (fine_tune_type is 'full')", fix="use it as a model")
    component = naming.base_component(options, ("language_model",))
    with open_weights(weights_in(path, WEIGHTS_NAMES), options) as weights:
        modules = pairs.sort_parts(weights, _split)
        pairs.check_both_halves(modules, LABELS)
        targets: list[LoraTarget] = []
        extras: list[ExtraTensor] = []
        notes: list[str] = []
        scale = _scale(config, options, notes)
        for module, parts in modules.items():
            own = list(_targets(module, parts, scale, config, weights))
            if component is not None:
                own = [_placed(pair, module, component) for pair in own]
            targets += own
            extras += _magnitude(own, module, parts, config, weights)
        if component is None:
            notes.append(naming.unnamed("MLX"))
        notes += _depth(modules, config, component)
        notes += unused({key: value for key, value in config.items() if is_set(value)}, _SETTINGS)
        table = config.get("lora_parameters")
        notes += unused({k: v for k, v in table.items() if is_set(v)} if isinstance(table, dict) else {}, _PARAMETERS)
        base_model = config_text(config, "model")
        return pairs.build_adapter(weights, targets, layout="mlx", extras=extras, warnings=notes, base_model=base_model)


# --- configuration --------------------------------------------------------------------------------------------------


def _scale(config: Mapping[str, Any], options: ReadOptions, notes: list[str]) -> Scale:
    """Return the factor on the product, as a function of the rank. Raises E-CONFIG, E-OPTION."""
    table = config.get("lora_parameters") or {}
    if not isinstance(table, dict):
        raise ConfigError(f"lora_parameters is {table!r:.60}, expected an object")
    scale, alpha = table.get("scale"), table.get("alpha")
    before = alpha is not None and "num_layers" not in config  # releases that still multiplied by alpha / rank
    if options.alpha is not None:
        if scale is not None and not before:
            what = f"the configuration states the scale {scale!r:.40}, an alpha was given"
            raise OptionError(what, fix="leave it out")
        stated = options.alpha
        return lambda rank: pairs.scale_of("the adapter", stated, rank)
    if scale is None:
        alpha_is = f"give {spelled('alpha', ...)}, the scale times the rank"
        fix = f"{alpha_is}; mlx-examples used a scale of 20 at first (rank 8: 160)"
        raise ConfigError(f"no {CONFIG_NAME} beside the weights states a scale", fix=fix)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ConfigError(f"scale is {scale!r:.60}, expected a number")
    if before:
        raise ConfigError(
            "lora_parameters has both scale and alpha, and the release that wrote it is not known: up to some release "
            "the factor was scale * alpha / rank, later scale alone",
            fix=f"give {spelled('alpha', ...)}: the factor that the training used, times the rank",
        )
    if alpha is not None:
        notes.append(f"lora_parameters.alpha ({alpha!r:.40}) has no meaning in mlx-lm; the scale {scale:g} is used")
    factor = pairs.check_scale("the adapter", float(scale), is_zero=scale == 0)
    return lambda rank: factor


def _depth(modules: Mapping[str, Parts], config: Mapping[str, Any], component: Component | None) -> Iterator[str]:
    """Yield warnings for layers that are not the last `num_layers`, all that mlx-lm itself would load."""
    numbers = {int(match[1]) for module in modules if (match := _LAYER.search(module))}
    count = config.get("num_layers")
    if type(count) is not int or count <= 0 or not numbers:
        return
    if len(numbers) != count:
        yield f"num_layers is {count}, the file adapts {len(numbers)} layers"
    depth = None if component is None else component.config.get("num_hidden_layers")
    if type(depth) is int and min(numbers) < depth - count:
        yield f"num_layers is {count} of {depth}, the file adapts layer {min(numbers)} as well"


# --- tensors --------------------------------------------------------------------------------------------------------


def _targets(
    module: str, parts: Parts, scale: Scale, config: Mapping[str, Any], weights: Weights
) -> Iterator[LoraTarget]:
    """Yield the targets of one module. Raises E-PAIR, E-LIMIT, E-DTYPE, E-VALUE."""
    a, b = pairs.halves(module, parts, LABELS)
    if len(b.shape) == 3:
        yield from _experts(module, parts, scale, weights)
        return
    flat = len(a.shape) == len(b.shape) == 2
    fits = flat and a.shape[1] == b.shape[0]
    if not fits or a.shape[0] == b.shape[1] < a.shape[1]:  # or with a rank above both sides
        shown = f"lora_a {list(a.shape)} and lora_b {list(b.shape)}"
        if flat and a.shape[0] == b.shape[1]:
            raise PairError(
                f"{module}: {shown} are transposed or swapped; MLX stores (in, r) and (r, out)",
                fix="if they are PEFT's (r, in) and (out, r), transpose both; only if the model computes x @ lora_b @ "
                "lora_a, exchange their names",
            )
        raise PairError(f"{module}: {shown} do not fit; expected (in, r) and (r, out)")
    (inner, rank), out = a.shape, b.shape[1]
    table = config.get("lora_parameters")
    stated = table.get("rank") if isinstance(table, dict) else None
    if type(stated) is int and stated != rank:
        raise PairError(f"{module}: the tensors have rank {rank}, lora_parameters says {stated}")
    pairs.check_rank(module, rank)
    if f"{module}.weight".endswith(EMBEDDINGS):
        target = Target(f"{module}.weight", (inner, out), TRANSPOSED)
    else:
        target = Target(f"{module}.weight", (out, inner), MATRIX)
    left, right = pairs.transpose(load_finite(weights, a)), pairs.transpose(load_finite(weights, b))
    yield LoraTarget(target, left, right, scale(rank))


def _experts(module: str, parts: Parts, scale: Scale, weights: Weights) -> Iterator[LoraTarget]:
    """Yield the targets of a stack: A (experts, r, in), of early releases (experts * r, in), B (experts, out, r)."""
    a, b = parts["A"], parts["B"]
    experts, _, rank = b.shape
    if math.prod(a.shape[:-1]) != experts * rank or a.shape[:-1] not in ((experts, rank), (experts * rank,)):
        raise PairError(f"{module}: lora_a {list(a.shape)} and lora_b {list(b.shape)} do not fit")
    pairs.check_rank(module, rank)
    stored_a = pairs.reshape(load_finite(weights, a), (experts, rank, a.shape[-1]))
    yield from pairs.read_experts(f"{module}.weight", stored_a, load_finite(weights, b), scale(rank))


def _placed(pair: LoraTarget, module: str, component: Component) -> LoraTarget:
    """Put a target on the base. A stack of experts, which MLX makes out of the base's single ones, keeps its name."""
    if pair.target.view.kind == "expert" and f"{module}.weight" not in component.shapes:
        return pair
    return component.placed(pair, component.dotted(module))


def _magnitude(
    targets: Sequence[LoraTarget], module: str, parts: Parts, config: Mapping[str, Any], weights: Weights
) -> Iterator[ExtraTensor]:
    info = parts.get("magnitude")
    if info is None:
        if config.get("fine_tune_type") == "dora":
            raise PairError(f"{module}: fine_tune_type is 'dora', but there is no m", fix="the file is incomplete")
        return
    target = targets[0].target
    out = target.out_features
    if len(targets) != 1 or math.prod(info.shape) != out or target.view == TRANSPOSED:
        raise PairError(f"{module}: {info.name!r} is {list(info.shape)}, no norms of a linear layer of {out} outputs")
    yield load_finite_extra(target.name, info, weights, "magnitude")


READER = Reader("mlx", "MLX adapters folder or .npz", read, recognises, knows, takes_alpha=True)
