"""adapter_config.json of a PEFT LoRA: what it says about the update, and what is refused because of what it says."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrconvert.core.errors import ConfigError, NotLoraError, PairError, PatternError, UnsupportedLoraError
from lrconvert.core.limits import MAX_DIM, MAX_PATTERNS
from lrconvert.formats.readers.base import CONFIG_NAME
from lrconvert.formats.readers.peft.patterns import Lookup, check_work, compile_pattern
from lrconvert.io.container import config_text

# Fields of LoraConfig that say how the adapter was trained or placed, and not what its update is.
_NO_EFFECT = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config"),
        *("exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
        *("loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "merge_weights"),
        *("modules_to_save", "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "revision"),
        *("runtime_config", "target_modules", "task_type", "velora_config"),
    )
)
_READ_HERE = frozenset(
    (
        *("alpha_pattern", "enable_lora", "fan_in_fan_out", "lora_alpha", "lora_bias", "r", "rank_pattern"),
        *("target_parameters", "trainable_token_indices", "use_dora", "use_rslora"),
    )
)
_AS_PLAIN = "train it as a plain LoRA, or merge it into its base with PEFT and use the merged model"
# Fields whose presence makes the update another one than scale * B @ A: what they do, and what to do.
_REFUSED = {
    "use_qalora": ("QA-LoRA pools its inputs", _AS_PLAIN),
    "use_bdlora": ("BD-LoRA stores the blocks of block-diagonal factors", _AS_PLAIN),
    "alora_invocation_tokens": (
        "Activated LoRA acts only after its invocation tokens, which no weight can hold",
        "use it with PEFT as it is",
    ),
    "arrow_config": ("Arrow routes tokens between several adapters", "convert the adapters that it routes between"),
    "kasa_config": ("KaSA takes components out of the base weight and scales the factors by a diagonal", _AS_PLAIN),
    "layer_replication": (
        "layers of the base are replicated, so names of targets are not names of the base",
        "save a base with the replicated layers first, and train or rename the adapter on it",
    ),
}
_ALL_LINEAR = "all-linear"
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_UNCONVERTED = (
    "convert it to a plain LoRA when it is saved (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
)
# Initializations that move components of the base weight into the factors: the stored update is relative to that base.
_CHANGE_THE_BASE = {
    "pissa": ("PiSSA", _UNCONVERTED),
    "olora": ("OLoRA", _UNCONVERTED),
    "corda": ("CorDA", _UNCONVERTED),
    "lora_ga": ("LoRA-GA", _UNCONVERTED),
    "loftq": ("LoftQ", "merge it with PEFT into the base that it was trained on, which LoftQ quantized"),
}

# Other kinds of adapters (peft_type), with what to do. A kind that a reader of its own takes over leaves this table.
_AS_LORA = "PEFT's save_as_lora writes an approximation of it as a LoRA; convert that"
_NO_WEIGHTS = "it changes no weight of the base, so there is nothing to convert"
_SCALES = "merge it into its base with PEFT and use the merged model"
OTHER_KINDS = {
    **dict.fromkeys(("LOHA", "LOKR", "VERA", "RANDLORA", "FOURIERFT", "C3A", "UNILORA", "TINYLORA"), _AS_LORA),
    **dict.fromkeys(("ADALORA", "IA3", "OFT", "BOFT", "HRA", "HIRA", "LN_TUNING", "XLORA"), _SCALES),
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"), _NO_WEIGHTS),
    **dict.fromkeys(("ADAPTION_PROMPT", "CPT", "CARTRIDGE"), _NO_WEIGHTS),
}


@dataclass(frozen=True)
class Settings:
    """What a configuration says about the update.

    `tokens`: embedding module -> rows that were trained; "" stands for the input embedding. `parameters`: names of
    parameters that are adapted themselves. `enable_lora`: which slices of a fused layer are adapted (PEFT 0.2).
    `version`: (major, minor) of the PEFT that wrote it, (0, 0) if it does not say.
    """

    ranks: Lookup
    alphas: Lookup
    rslora: bool
    transposed: bool
    dora: bool
    lora_bias: bool
    enable_lora: tuple[bool, ...]
    parameters: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    modules: str | tuple[str, ...]
    saved: tuple[str, ...]
    version: tuple[int, int]
    base_model: str
    base_class: str
    base_library: str
    revision: str
    task_type: str
    fields: Mapping[str, str]

    def scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r). Raises E-PAIR if the stored rank is not that of the configuration."""
        wanted = self.ranks.value(module)
        if wanted != rank:
            raise PairError(
                f"{module}: the tensors have rank {rank}, the configuration says {wanted!s:.40}",
                fix=f"correct r or rank_pattern in {CONFIG_NAME}",
            )
        alpha = self.alphas.value(module)
        try:
            scale = alpha / math.sqrt(rank) if self.rslora else alpha / rank
        except OverflowError:  # an integer beyond the range of floats
            scale = math.inf
        if not math.isfinite(scale):
            raise ConfigError(f"{module}: the scale alpha / r is not finite")
        return scale

    def names_module(self, module: str) -> bool:
        """Whether target_modules names a module, as far as that shows without the model."""
        if self.modules == _ALL_LINEAR:
            return True
        if isinstance(self.modules, tuple):
            return any(module == name or module.endswith(f".{name}") for name in self.modules)
        try:
            found = compile_pattern(self.modules)
            check_work([self.modules], [module])
            return bool(self.modules) and found.match(module) is not None
        except PatternError:
            return False


def parse(config: Mapping[str, Any]) -> Settings:
    """The settings of a LoRA's configuration. Raises E-NOT-LORA, E-LORA-FEATURE, E-CONFIG, E-PATTERN."""
    check_config(config)
    enabled = _enabled(config)
    later = [key for key in ("use_dora", "lora_bias", "target_parameters") if enabled and _is_set(config.get(key))]
    if later:
        raise ConfigError(f"enable_lora is of PEFT 0.2, which had no {later[0]}; both are set")
    mapping = config.get("auto_mapping")
    mapped = mapping if isinstance(mapping, dict) else {}
    base_class = _string(mapped.get("base_model_class"))
    library = _string(mapped.get("parent_library"))
    saved = _names(config, "modules_to_save")
    modules = config.get("target_modules")
    return Settings(
        ranks=_lookup(config, "rank_pattern", _number(config, "r")),
        alphas=_lookup(config, "alpha_pattern", _number(config, "lora_alpha")),
        rslora=_flag(config, "use_rslora"),
        transposed=_flag(config, "fan_in_fan_out"),
        dora=_flag(config, "use_dora"),
        lora_bias=_flag(config, "lora_bias"),
        enable_lora=enabled,
        parameters=_parameters(config),
        tokens=_tokens(config.get("trainable_token_indices")),
        modules=modules if isinstance(modules, str) else _names(config, "target_modules"),
        saved=saved,
        version=_version(config.get("peft_version")),
        base_model=config_text(config, "base_model_name_or_path"),
        base_class=base_class,
        base_library=library,
        revision=config_text(config, "revision"),
        task_type=config_text(config, "task_type"),
        fields=_fields(config, base_class, library, saved),
    )


# --- what is refused ------------------------------------------------------------------------------------------------


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse what is not scale * B @ A: E-NOT-LORA for other adapter kinds, E-LORA-FEATURE for features that change the
    update, for initializations that changed the base, and for unknown fields that are set."""
    kind = config.get("peft_type")
    if kind != "LORA":
        name = kind if isinstance(kind, str) else "of no stated kind"
        raise NotLoraError(
            f"the adapter is {name}, not LORA",
            fix=OTHER_KINDS.get(name, "only LoRA adapters are converted")
            if isinstance(kind, str)
            else f"if it is a LoRA, {CONFIG_NAME} needs peft_type LORA, r and lora_alpha as it was trained",
        )
    for key, (reason, advice) in _REFUSED.items():
        if _is_set(config.get(key)):
            raise UnsupportedLoraError(f"{key} is set: {reason}", fix=advice)
    _check_init(config.get("init_lora_weights"))
    for key in sorted(set(config) - _NO_EFFECT - _READ_HERE - set(_REFUSED)):
        if _is_set(config[key]):
            raise UnsupportedLoraError(
                f"the configuration field {key!r} is not known and is set to {config[key]!r:.60}",
                fix="remove the field if it does not change the update",
            )


def _is_set(value: Any) -> bool:
    return value not in (None, False, "", [], {})


def _check_init(init: Any) -> None:
    name = init.lower() if isinstance(init, str) else init
    if (name is None or isinstance(name, (bool, str))) and name in _PLAIN_INITS:
        return
    for prefix, (title, advice) in _CHANGE_THE_BASE.items():
        if isinstance(name, str) and name.startswith(prefix):
            raise UnsupportedLoraError(
                f"init_lora_weights is {init!r:.60}: the initialization {title} changes the base weights, and the "
                "adapter was saved without undoing that",
                fix=advice,
            )
    raise UnsupportedLoraError(
        f"init_lora_weights is {init!r:.60}, an initialization that is not known",
        fix="set it to true if it does not change the base weights",
    )


# --- single fields --------------------------------------------------------------------------------------------------


def _number(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{key} is {value!r:.60}, expected a number", fix=f"set {key} in {CONFIG_NAME}")
    return value


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r:.60}, expected true or false")
    return bool(value)


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _names(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of names; what is no such list says nothing about the update and counts as empty."""
    value = config.get(key)
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list) else ()


def _lookup(config: Mapping[str, Any], key: str, default: float) -> Lookup:
    table = config.get(key) or {}
    if not isinstance(table, dict) or len(table) > MAX_PATTERNS:
        raise ConfigError(f"{key} is not an object of at most {MAX_PATTERNS} patterns")
    return Lookup.of({text: _number(table, text) for text in table}, default)


def _parameters(config: Mapping[str, Any]) -> tuple[str, ...]:
    value = config.get("target_parameters") or []
    if not isinstance(value, list) or len(value) > MAX_PATTERNS or not all(isinstance(v, str) and v for v in value):
        raise ConfigError(f"target_parameters is not a list of at most {MAX_PATTERNS} names")
    return tuple(value)


def _enabled(config: Mapping[str, Any]) -> tuple[bool, ...]:
    value = config.get("enable_lora")
    if value is None or value == []:
        return ()
    if not isinstance(value, list) or len(value) > MAX_PATTERNS or not all(isinstance(v, bool) for v in value):
        raise ConfigError(f"enable_lora is {value!r:.60}, expected a list of true and false")
    if not any(value):
        raise ConfigError("enable_lora adapts no slice")
    return tuple(value)


def _tokens(value: Any) -> dict[str, tuple[int, ...]]:
    table = value if isinstance(value, dict) else {"": value or []}
    for rows in table.values():
        if not isinstance(rows, list) or not all(type(row) is int and 0 <= row <= MAX_DIM for row in rows):
            raise ConfigError("trainable_token_indices are not lists of numbers of rows")
    return {module: tuple(rows) for module, rows in table.items() if rows}


def _version(value: Any) -> tuple[int, int]:
    found = re.match(r"(\d{1,6})\.(\d{1,6})", _string(value))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _fields(config: Mapping[str, Any], base_class: str, library: str, saved: Sequence[str]) -> dict[str, str]:
    """The few strings that an export needs."""
    fields = {"source_format": "peft"}
    if isinstance(config.get("peft_version"), str):
        fields["peft_version"] = config["peft_version"]
    if base_class:
        fields["base_model_class"] = base_class
    named = config.get("modules_to_save")
    if saved and saved == tuple(named or ()) and all("," not in name for name in saved):
        fields["modules_to_save"] = ",".join(saved)
    parameters = _names(config, "target_parameters")
    if parameters and all("," not in name for name in parameters):
        fields["target_parameters"] = ",".join(parameters)
        if library:
            fields["parent_library"] = library
    return fields
