"""kohya's sd-scripts and what writes its layout: ``lora_unet_<module>.lora_down.weight`` (r, in), ``.lora_up.weight``
(out, r) and ``.alpha``, the dots of the module written as underscores; convolutions of one pixel or of several, with
LyCORIS' ``.lora_mid.weight`` or without; ``.dora_scale``, its DoRA, of outputs (out, 1) or of inputs (1, in).

The scale is alpha / r; without an alpha it is 1, as sd-scripts has it. ``lora_unet`` is a pipeline's ``unet`` or
``transformer``, ``lora_te`` and ``lora_te1`` its ``text_encoder``, ``lora_te2`` its ``text_encoder_2``, ``lora_te3``
its ``text_encoder_3``, or FLUX's ``text_encoder_2``; ``lycoris_`` without a model's name is the one that is trained. On
a base of diffusers, modules with the names of the model's own code are those that they are there (`formats.families`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lrconvert.core.errors import OptionError
from lrconvert.core.wording import spelled
from lrconvert.formats.families.shared import spelling
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.kohya import doubled, sgm
from lrconvert.formats.readers.shared import naming, on_base, pairs, products
from lrconvert.formats.readers.shared.naming import BaseNames, Component
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import Labels, Parts
from lrconvert.formats.readers.shared.weights import Weights, open_weights
from lrconvert.lora.adapter import LoraAdapter, LoraTarget

LABELS = Labels("lora_down", "lora_up")
# Role in a module's name -> the models of a pipeline that it may mean.
ROLES = {
    "unet": ("unet", "transformer"),
    "transformer": ("transformer",),
    "prior_unet": ("prior",),
    "te": ("text_encoder",),
    "te1": ("text_encoder",),
    "te2": ("text_encoder_2",),
    "te3": ("text_encoder_3", "text_encoder_2"),  # T5: the third of SD 3, and of FLUX, which has no third, the second
}
_MODULE = re.compile(rf"(?:lora|lycoris)_(?P<role>{'|'.join(sorted(ROLES, key=len, reverse=True))})_(?P<inside>[^.]+)")
_SIMPLE = ("lycoris_transformer_blocks_", "lycoris_single_transformer_blocks_")
_ANY = re.compile(r"(?:lora|lycoris)_[A-Za-z0-9]+_[^.]+\.[^.]")
_PARTS = {
    **{"lora_down.weight": "A", "lora_up.weight": "B", "lora_mid.weight": "mid"},
    **{"lora_A.weight": "A", "lora_B.weight": "B", "alpha": "alpha", "diff": "diff", "diff_b": "diff_b"},
    "dora_scale": "dora_scale",
}


def knows(names: Sequence[str]) -> bool:
    """Return whether most tensors are parts of modules that begin with ``lora_<model>_`` and have no dots."""
    known = sum(_ANY.match(name) is not None for name in names)
    return 2 * known > len(names) and not products.are_products(names)


def _split(name: str) -> tuple[str, str] | None:
    module, _, rest = name.partition(".")
    return (module, _PARTS[rest]) if rest in _PARTS and _ANY.match(name) else None


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read a file of sd-scripts. With a base, names are those of its parameters, after the model's name in a pipeline;
    without one they stay, with a warning. Raises E-NOT-LORA, E-LORA-FEATURE, E-TENSOR, E-PAIR, E-EMPTY, E-BASE,
    E-OPTION, E-LIMIT, E-DTYPE, E-VALUE."""
    with open_weights(path, options) as weights:
        return read_weights(weights, options)


def read_weights(weights: Weights, options: ReadOptions) -> LoraAdapter:
    """Read such a file that is open. Raises the same."""
    base = None if options.base is None else naming.base_names(options.base)
    modules = pairs.sort_parts(weights, _split)
    pairs.check_both_halves(modules, LABELS)
    modules, notes = doubled.once(modules)
    targets, extras = [], []
    for module, parts in modules.items():
        component, name = (None, module) if base is None else _place(module, base)
        if pairs.is_pair(parts):
            pair = _pair(module, parts, weights, options)
            targets.append(pair if component is None else component.placed(pair, name))
            extras += pairs.dora_scales(parts, targets[-1], weights)
        extras += pairs.differences(name if component is None else component.full(name), parts, weights)
    scheme = ""
    if base is not None:
        targets, extras, scheme = on_base.translated(targets, extras, base)
    unstated = [module for module, parts in modules.items() if "alpha" not in parts and pairs.is_pair(parts)]
    warnings = [*notes, *([naming.unnamed("kohya")] if base is None else ())]
    if unstated and options.alpha is None:
        line = f"{len(unstated)} modules state no alpha, {unstated[0]} for one: their scale is 1"
        said = weights.metadata.get("ss_network_alpha")
        warnings.append(
            line if said is None else f"{line}, as sd-scripts has it, though ss_network_alpha is {said:.40}"
        )
    used = ("ss_network_alpha", "ss_network_dim")  # as the tensors have them
    name = weights.metadata.get("ss_sd_model_name") or weights.metadata.get("ss_base_model_version", "")
    own = spelling.fields((info.name for info in weights.tensors), scheme)
    return pairs.build_adapter(
        weights, targets, layout="kohya", extras=extras, warnings=warnings, base_model=name, used=used, fields=own
    )


def _pair(module: str, parts: Parts, weights: Weights, options: ReadOptions) -> LoraTarget:
    alpha = options.alpha
    if "alpha" in parts:
        if alpha is not None:
            raise OptionError(f"{module} states its alpha, another was given", fix=f"leave {spelled('alpha')} out")
        alpha = pairs.stated_alpha(weights, parts["alpha"])

    def scale(rank: int) -> float:
        return 1.0 if alpha is None else pairs.scale_of(module, alpha, rank)

    return pairs.read_pair(module, parts, scale, weights, LABELS)


def _place(module: str, base: BaseNames) -> tuple[Component, str]:
    """Return the model of the base that a module is in, and its name there. Raises E-BASE."""
    match = _MODULE.fullmatch(module)
    whole = module.removeprefix("lycoris_")
    if whole != module and (component := base.holding(whole)) is not None:  # LyCORIS' own name of one model's modules
        return component, component.flattened(whole, naming.VOCABULARY)
    if module.startswith(_SIMPLE):  # SimpleTuner's, which has no word for the model
        inside, models = module.removeprefix("lycoris_"), ROLES["unet"]
    elif match is not None:
        inside, models = match["inside"].removeprefix("_"), ROLES[match["role"]]
    else:
        role, _, inside = module.partition("_")[2].partition("_")
        models = (role,)
    component = base.component(models, module)
    own = on_base.own_name(inside, component, is_flat=True)
    if own is not None:
        return component, own
    spelled = sgm.renamed(inside, component)
    return component, component.flattened(spelled, naming.VOCABULARY)


READER = Reader("kohya", "kohya / sd-scripts file", read, knows=knows, takes_alpha=True, read_weights=read_weights)
