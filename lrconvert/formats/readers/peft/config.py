"""adapter_config.json of a PEFT LoRA: what it says about the update, and what is refused because of what it says."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple

from lrconvert.core.errors import ConfigError, NotLoraError, PairError, PatternError, UnsupportedLoraError
from lrconvert.core.limits import MAX_DIM, MAX_PATTERNS
from lrconvert.formats.readers.peft.patterns import Lookup, Rules, check_work, compile_pattern, rules
from lrconvert.formats.readers.shared.config import check_known, is_set
from lrconvert.formats.readers.shared.folders import CONFIG_NAME
from lrconvert.formats.readers.shared.pairs import scale_of
from lrconvert.io import fields
from lrconvert.io.fields import By, Key

# Fields of LoraConfig that say how the adapter was trained or placed, and not what its update is.
NO_EFFECT = frozenset(
    (
        *("bias", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode"),
        *("init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout"),
        *("lora_ga_config", "megatron_config", "megatron_core", "merge_weights", "monteclora_config", "peft_type"),
        *("qalora_group_size", "runtime_config", "velora_config"),
    )
)
_AS_PLAIN = "train it as a plain LoRA, or merge it into its base with PEFT and use the merged model"
# Fields that make the update another one than scale * B @ A: what they do, and what to do.
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
    **dict.fromkeys(("RANDLORA", "FOURIERFT", "C3A", "UNILORA", "TINYLORA"), _AS_LORA),
    **dict.fromkeys(("OFT", "BOFT", "HRA", "HIRA", "LN_TUNING", "XLORA"), _SCALES),
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"), _NO_WEIGHTS),
    **dict.fromkeys(("ADAPTION_PROMPT", "CPT", "CARTRIDGE"), _NO_WEIGHTS),
}


# --- single fields --------------------------------------------------------------------------------------------------


class AutoMapping(NamedTuple):
    """The class of the base and the library it is from, "" where the configuration does not say them, and whether
    Unsloth wrote it."""

    base_class: str = ""
    library: str = ""
    unsloth: bool = False


_NO_MAPPING = AutoMapping()


def _auto_mapping(value: Any, path: str) -> AutoMapping:
    table = value if isinstance(value, dict) else {}
    base_class, library = (_text(table.get(key), path) for key in ("base_model_class", "parent_library"))
    return AutoMapping(base_class, library, table.get("unsloth_fixed") is True)


def _text(value: Any, path: str) -> str:
    return value if isinstance(value, str) else ""


def _names(value: Any, path: str) -> tuple[str, ...]:
    """Return a list of names; what is no such list says nothing about the update and counts as empty."""
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list) else ()


def _modules(value: Any, path: str) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else _names(value, path)


def _rules(value: Any, path: str) -> Rules:
    table = value or {}
    if not isinstance(table, dict) or len(table) > MAX_PATTERNS:
        raise ConfigError(f"{path} is not an object of at most {MAX_PATTERNS} patterns")
    for pattern, number in table.items():
        if type(number) not in (int, float):
            raise ConfigError(f"{pattern} is {number!r:.60}, expected a number", fix=f"correct {path} in {CONFIG_NAME}")
    return rules(table)


def _parameters(value: Any, path: str) -> tuple[str, ...]:
    names = value or []
    if not isinstance(names, list) or len(names) > MAX_PATTERNS or not all(isinstance(v, str) and v for v in names):
        raise ConfigError(f"{path} is not a list of at most {MAX_PATTERNS} names")
    return tuple(names)


def _enabled(value: Any, path: str) -> tuple[bool, ...]:
    if not isinstance(value, list) or len(value) > MAX_PATTERNS or not all(isinstance(v, bool) for v in value):
        raise ConfigError(f"{path} is {value!r:.60}, expected a list of true and false")
    if value and not any(value):
        raise ConfigError(f"{path} adapts no slice")
    return tuple(value)


RANK_MAJOR, GROUPED = "rank_major", "grouped_by_expert"


def _layout(value: Any, path: str) -> str:
    if value not in (None, "", RANK_MAJOR, GROUPED):
        what = f"{path} is {value!r:.60}: an order of the columns of lora_B that is not known"
        raise UnsupportedLoraError(what, fix=f"{RANK_MAJOR} and {GROUPED} are read")
    return value or ""


def _tokens(value: Any, path: str) -> dict[str, tuple[int, ...]]:
    table = value if isinstance(value, dict) else {"": value or []}
    for rows in table.values():
        if not isinstance(rows, list) or not all(type(row) is int and 0 <= row <= MAX_DIM for row in rows):
            raise ConfigError(f"{path} are not lists of numbers of rows")
    return {module: tuple(rows) for module, rows in table.items() if rows}


# --- all of them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The fields of a configuration that say what the update is, and what an export needs.

    `tokens`: embedding module -> rows that were trained; "" stands for the input embedding. `parameters`: names of
    parameters that are adapted themselves. `b_layout`: how the columns of lora_B of a stack are ordered. `enable_lora`:
    which slices of a fused layer are adapted (PEFT 0.2).
    """

    r: float
    lora_alpha: float
    rank_rules: Annotated[Rules, Key("rank_pattern"), By(_rules)] = ()
    alpha_rules: Annotated[Rules, Key("alpha_pattern"), By(_rules)] = ()
    rslora: Annotated[bool, Key("use_rslora")] = False
    transposed: Annotated[bool, Key("fan_in_fan_out")] = False
    dora: Annotated[bool, Key("use_dora")] = False
    lora_bias: bool = False
    enable_lora: Annotated[tuple[bool, ...], By(_enabled)] = ()
    parameters: Annotated[tuple[str, ...], Key("target_parameters"), By(_parameters)] = ()
    b_layout: Annotated[str, Key("lora_B_layout"), By(_layout)] = ""
    tokens: Annotated[Mapping[str, tuple[int, ...]], Key("trainable_token_indices"), By(_tokens)] = field(
        default_factory=dict
    )
    modules: Annotated[str | tuple[str, ...], Key("target_modules"), By(_modules)] = ()
    saved: Annotated[tuple[str, ...], Key("modules_to_save"), By(_names)] = ()
    peft_version: Annotated[str, By(_text)] = ""
    auto_mapping: Annotated[AutoMapping, By(_auto_mapping)] = _NO_MAPPING
    base_model: Annotated[str, Key("base_model_name_or_path")] = ""
    revision: str = ""
    task_type: str = ""

    @property
    def ranks(self) -> Lookup:
        return Lookup(self.rank_rules, self.r)

    @property
    def alphas(self) -> Lookup:
        return Lookup(self.alpha_rules, self.lora_alpha)

    @property
    def version(self) -> tuple[int, int]:
        """(major, minor) of the PEFT that wrote the configuration, (0, 0) if it does not say."""
        match = re.match(r"(\d{1,6})\.(\d{1,6})", self.peft_version)
        return (int(match[1]), int(match[2])) if match else (0, 0)

    def scale(self, module: str, rank: int) -> float:
        """Return alpha / r, or alpha / sqrt(r). Raises E-PAIR if the stored rank is not that of the configuration,
        E-CONFIG for a scale that is not finite."""
        wanted = self.ranks.value(module)
        if wanted != rank:
            what = f"{module}: the tensors have rank {rank}, the configuration says {wanted!s:.40}"
            raise PairError(what, fix=f"correct r or rank_pattern in {CONFIG_NAME}")
        return scale_of(module, self.alphas.value(module), math.sqrt(rank) if self.rslora else rank)

    def names_module(self, module: str) -> bool:
        """Return whether target_modules names a module, as far as that shows without the model."""
        if self.modules == _ALL_LINEAR:
            return True
        if isinstance(self.modules, tuple):
            return any(module == name or module.endswith(f".{name}") for name in self.modules)
        try:
            pattern = compile_pattern(self.modules)
            check_work([self.modules], [module])
            return bool(self.modules) and pattern.match(module) is not None
        except PatternError:
            return False


def parse(config: Mapping[str, Any]) -> Settings:
    """Return the settings of a LoRA's configuration. Raises E-NOT-LORA, E-LORA-FEATURE, E-CONFIG, E-PATTERN."""
    check_config(config)
    settings = fields.read_config(Settings, config)
    later = [key for key in ("use_dora", "lora_bias", "target_parameters") if is_set(config.get(key))]
    if "unsloth" in settings.base_model.lower():
        settings = replace(settings, auto_mapping=settings.auto_mapping._replace(unsloth=True))
    if settings.enable_lora and later:
        raise ConfigError(f"enable_lora is of PEFT 0.2, which had no {later[0]}; both are set")
    return settings


def provenance_fields(config: Mapping[str, Any], settings: Settings) -> dict[str, str]:
    """Return the few strings of a configuration that an export needs."""
    mapping = settings.auto_mapping
    texts = {"source_format": "peft"}
    if isinstance(config.get("peft_version"), str):
        texts["peft_version"] = settings.peft_version
    if mapping.base_class:
        texts["base_model_class"] = mapping.base_class
    saved = settings.saved
    if saved and len(saved) == len(config["modules_to_save"]) and all("," not in name for name in saved):
        texts["modules_to_save"] = ",".join(saved)
    if settings.parameters and all("," not in name for name in settings.parameters):
        texts["target_parameters"] = ",".join(settings.parameters)
        if mapping.library:
            texts["parent_library"] = mapping.library
    return texts


# --- what is refused ------------------------------------------------------------------------------------------------


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse what is not scale * B @ A: E-NOT-LORA for other adapter kinds, E-LORA-FEATURE for features that change the
    update, for initializations that changed the base, and for unknown fields that are set."""
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        fix = f"if it is a LoRA, {CONFIG_NAME} needs peft_type LORA, r and lora_alpha as it was trained"
        raise NotLoraError("the adapter is of no stated kind, not LORA", fix=fix)
    if kind != "LORA":
        fix = OTHER_KINDS.get(kind, "only LoRA adapters are converted")
        raise NotLoraError(f"the adapter is {kind}, not LORA", fix=fix)
    for key, (reason, advice) in _REFUSED.items():
        if is_set(config.get(key)):
            raise UnsupportedLoraError(f"{key} is set: {reason}", fix=advice)
    _check_init(config.get("init_lora_weights"))
    check_known(config, NO_EFFECT | fields.names(Settings) | _REFUSED.keys())


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
    what = f"init_lora_weights is {init!r:.60}, an initialization that is not known"
    raise UnsupportedLoraError(what, fix="set it to true if it does not change the base weights")
