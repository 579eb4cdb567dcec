"""torchtune's own files: ``layers.3.attn.q_proj.lora_a.weight`` (r, in) and ``.lora_b.weight`` (out, r), with
``.magnitude`` of a DoRA, in ``adapter_0.pt`` or safetensors. The scale is alpha / r; alpha stands in the
adapter_config.json that torchtune writes beside, or the user states it.

Names become those of transformers, as torchtune's own export for PEFT has them. For Llama, Mistral and Gemma it keeps
the rows of queries and keys as pairs of a head next to each other, which the base's number of heads puts back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from lrconvert.core.errors import BaseError, ConfigError, OptionError, UnsupportedLoraError
from lrconvert.core.wording import spelled
from lrconvert.formats import gguf_names
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.gguf.names import in_order
from lrconvert.formats.readers.shared import naming, pairs, stated
from lrconvert.formats.readers.shared.config import is_set
from lrconvert.formats.readers.shared.folders import config_path
from lrconvert.formats.readers.shared.naming import Component
from lrconvert.formats.readers.shared.notes import unused
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import Labels
from lrconvert.formats.readers.shared.weights import load_finite_extra, open_weights
from lrconvert.io.container import read_json
from lrconvert.lora.adapter import LoraAdapter, LoraTarget

LABELS = Labels("lora_a", "lora_b")
_NAME = re.compile(r"(?P<module>.+)\.(?:lora_(?P<half>[ab])\.weight|(?P<magnitude>magnitude)(?:\.weight)?)")
_MODULES = {
    **{f"attn.{name}": f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")},
    **{"attn.output_proj": "self_attn.o_proj"},
    **{"mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj"},
}
_WHOLE = {"output": "lm_head"}
# Families of bases: with rows in pairs, and with rows as transformers has them.
_IN_PAIRS = ("llama", "mistral", "gemma", "gemma2")
_AS_THEY_ARE = ("qwen2", "qwen3")
_CONFIG = ("target_modules", "peft_type", "base_model_name_or_path")
_ORDERS = {"q_proj": gguf_names.QUERIES, "k_proj": gguf_names.KEYS}
_BY_PEFT = "let torchtune save the adapter in PEFT's format (its checkpointer for Hugging Face does) and convert that"


def knows(names: Sequence[str]) -> bool:
    """Return whether most tensors are factors in torchtune's spelling."""
    return 2 * sum(name.endswith((".lora_a.weight", ".lora_b.weight")) for name in names) > len(names)


def _split(name: str) -> tuple[str, str] | None:
    match = _NAME.fullmatch(name)
    return None if match is None else (match["module"], (match["half"] or "magnitude").upper())


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read a file of torchtune. Raises E-CONFIG without an alpha, E-BASE without a base that says how many heads there
    are, E-OPTION, E-TENSOR, E-PAIR, E-EMPTY, E-LIMIT, E-DTYPE, E-VALUE."""
    component = naming.base_component(options)
    beside = read_json(config_path(path)) if config_path(path).is_file() else {}
    with open_weights(path, options) as weights:
        modules = pairs.sort_parts(weights, _split)
        pairs.check_both_halves(modules, LABELS)
        settings = stated.settings({**{key: str(value) for key, value in beside.items()}, **weights.metadata})
        alpha = _alpha(settings, options)
        targets, extras = [], []
        for module, parts in modules.items():
            scale = partial(settings.scale, module, alpha)
            pair = pairs.read_pair(_renamed(module), parts, scale, weights, LABELS)
            if pair.target.name.removesuffix(".weight").rpartition(".")[2] in _ORDERS:
                if "MAGNITUDE" in parts:
                    what = f"{module}: a DoRA on queries or keys, whose rows torchtune keeps in another order"
                    raise UnsupportedLoraError(what, fix="merge it with torchtune and use the merged model")
                pair = _in_order(pair, component)
            if component is not None:
                pair = component.placed(pair, component.dotted(pair.target.name.removesuffix(".weight")))
            targets.append(pair)
            if "MAGNITUDE" in parts:
                pairs.check_outputs(parts["MAGNITUDE"], pair)
                extras.append(load_finite_extra(pair.target.name, parts["MAGNITUDE"], weights, "magnitude"))
        notes = unused({key: value for key, value in beside.items() if is_set(value)}, {*_CONFIG, *settings.used})
        if component is None:
            notes.append(naming.unnamed("torchtune"))
        return pairs.build_adapter(
            weights, targets, layout="torchtune", extras=extras, warnings=notes, used=settings.used
        )


def _alpha(settings: stated.Settings, options: ReadOptions) -> float:
    """Return the one alpha. Raises E-OPTION for two, E-CONFIG for none."""
    if settings.alpha is not None and options.alpha is not None:
        what = f"the adapter's files state alpha ({settings.used[0]:.80}), another was given"
        raise OptionError(what, fix=f"leave {spelled('alpha')} out")
    alpha = options.alpha if settings.alpha is None else settings.alpha
    if alpha is None:
        fix = f"put torchtune's adapter_config.json beside it, or give {spelled('alpha', ...)}, the recipe's lora_alpha"
        raise ConfigError("nothing in or beside the file states alpha, which the scale alpha / r needs", fix=fix)
    return alpha


def _renamed(module: str) -> str:
    """Return transformers' name of a module. Raises E-BASE."""
    match = re.fullmatch(r"layers\.(\d{1,5})\.(.+)", module)
    if match and match[2] in _MODULES:
        return f"model.layers.{match[1]}.{_MODULES[match[2]]}"
    if module in _WHOLE:
        return _WHOLE[module]
    raise BaseError(f"torchtune's module {module!r:.160} has no known name in transformers", fix=_BY_PEFT)


def _in_order(pair: LoraTarget, component: Component | None) -> LoraTarget:
    """Put the rows of queries or keys in transformers' order. Raises E-BASE."""
    name = pair.target.name
    if component is None:
        what = f"{name}: torchtune keeps the rows of queries and keys in an order that depends on the number of heads"
        raise BaseError(
            what, fix=f"give the base that it was trained on ({spelled('base', ...)}; its config.json is enough)"
        )
    text = component.config.get("text_config")
    settings: Mapping[str, object] = {**component.config, **(text if isinstance(text, dict) else {})}
    family = settings.get("model_type")
    if family in _AS_THEY_ARE:
        return pair
    if family not in _IN_PAIRS:
        what = f"{name}: the order of torchtune's rows is not known here for a base of the family {family!r:.60}"
        raise BaseError(what, fix=_BY_PEFT, path=component.root)
    return in_order(pair, _ORDERS[name.split(".")[-2]], component)


READER = Reader("torchtune", "torchtune adapter file", read, knows=knows, takes_alpha=True)
