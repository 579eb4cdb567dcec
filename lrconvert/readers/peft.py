"""PEFT LoRA: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or that file alone beside its
config. The update is ``scale * B @ A`` with scale alpha / r (rsLoRA: alpha / sqrt(r)), ranks and alphas by pattern.

Everything of PEFT's LoRA that changes the update in another way is refused by name here, never ignored.
"""

from __future__ import annotations

import math
import re
import re._constants as _sre  # type: ignore[import-not-found]
import re._parser as _sre_parser  # type: ignore[import-not-found]
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.adapter import MATRIX, TRANSPOSED, ExtraTensor, LoraAdapter, LoraTarget, Provenance, Target
from lrconvert.container import (
    ContainerFile,
    TensorInfo,
    combined_digest,
    config_text,
    read_json,
    tensor_digest,
)
from lrconvert.dtypes import FLOATS, Stored
from lrconvert.errors import (
    ConfigError,
    DtypeError,
    EmptyAdapterError,
    FileKindError,
    LimitError,
    LrcError,
    NotLoraError,
    PairError,
    PatternError,
    PickleError,
    TensorUnknownError,
    UnsupportedLoraError,
    ValueRangeError,
)
from lrconvert.limits import MAX_PATTERN_LENGTH, MAX_PATTERNS, MAX_RANK
from lrconvert.readers.base import Reader

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])\.weight")

# Fields of LoraConfig that say how the adapter was trained or placed, and not what its update is.
_NO_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "monteclora_config",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "velora_config",
    }
)
_READ_HERE = frozenset({"r", "lora_alpha", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"})
# Fields whose presence changes the update, with the reason of the refusal.
_REFUSED = {
    "use_dora": "DoRA rescales the merged weight by trained magnitudes",
    "lora_bias": "lora_B carries a bias of its own",
    "use_qalora": "QA-LoRA pools its inputs",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "alora_invocation_tokens": "Activated LoRA acts only after its invocation tokens",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA changes the base weight as well",
    "layer_replication": "layers of the base are replicated",
    "target_parameters": "parameters are adapted directly (expert stacks)",
    "trainable_token_indices": "single token embeddings were trained",
    "enable_lora": "a fused layer is adapted in part (PEFT 0.2 and older)",
}
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


# --- configuration --------------------------------------------------------------------------------------------------


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse what is not a plain LoRA: E-NOT-LORA for other adapter kinds, E-LORA-FEATURE for features that change the
    update, and for unknown fields that are set."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise NotLoraError(
            f"the adapter is {kind if isinstance(kind, str) else 'of no stated kind'}, not LORA",
            fix="only plain LoRA adapters are converted",
        )
    for key, reason in _REFUSED.items():
        if config.get(key) not in (None, False, [], {}):
            raise UnsupportedLoraError(f"{key} is set: {reason}", fix="this adapter cannot be converted yet")
    init = config.get("init_lora_weights")
    if not (init is None or isinstance(init, (bool, str))) or init not in _PLAIN_INITS:
        raise UnsupportedLoraError(
            f"init_lora_weights is {init!r}: such an initialization changes the base weights",
            fix="save it as a plain LoRA first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)",
        )
    for key in sorted(set(config) - _NO_EFFECT - _READ_HERE - set(_REFUSED)):
        if config[key] not in (None, False, "", [], {}):
            raise UnsupportedLoraError(
                f"the configuration field {key!r} is not known and is set to {config[key]!r:.60}",
                fix="remove the field if it does not change the update",
            )


def _number(config: Mapping[str, Any], key: str, default: float | None) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{key} is {value!r:.60}, expected a number", fix=f"set {key} in {CONFIG_NAME}")
    return value


def _simple_repeats(parsed: Any) -> int:
    """Unbounded repeats of a parsed pattern, each over one character; raises E-PATTERN for anything that could
    backtrack exponentially or that has no business in a module name."""
    repeats = 0
    for op, argument in parsed:
        if op in (_sre.MAX_REPEAT, _sre.MIN_REPEAT):
            _, most, body = argument
            one_character = len(body) == 1 and body[0][0] in (
                _sre.LITERAL,
                _sre.NOT_LITERAL,
                _sre.ANY,
                _sre.IN,
            )
            if most > 1 and not one_character:
                raise PatternError("a pattern repeats a group", fix="write the pattern without a repeated group")
            repeats += (most > 1) + (0 if one_character else _simple_repeats(body))
        elif op is _sre.SUBPATTERN:
            repeats += _simple_repeats(argument[-1])
        elif op is _sre.BRANCH:
            repeats += sum(_simple_repeats(branch) for branch in argument[1])
        elif op not in (
            _sre.LITERAL,
            _sre.NOT_LITERAL,
            _sre.ANY,
            _sre.IN,
            _sre.AT,
        ):
            raise PatternError(f"a pattern uses {str(op).lower()}, which is not allowed here")
    return repeats


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """PEFT's rule for keys of rank_pattern and alpha_pattern, ``re.match(r"(.*\\.)?(KEY)$", module)``, compiled after a
    look at the pattern's structure: hostile ones (E-PATTERN) never reach the matcher."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise PatternError(f"a pattern has {len(pattern)} characters; at most {MAX_PATTERN_LENGTH} are allowed")
    try:
        if _simple_repeats(_sre_parser.parse(pattern)) > 3:
            raise PatternError(f"the pattern {pattern!r:.80} has more than three unbounded repeats")
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(f"the pattern {pattern!r:.80} is not a regular expression: {error}") from None
    except LrcError as error:
        error.what = f"{error.what}: {pattern!r:.80}"
        raise


def _pattern_lookup(config: Mapping[str, Any], key: str, default: float) -> tuple[Callable[[str], float], set[str]]:
    """A function module -> value by PEFT's first-match rule, and the shrinking set of patterns without a match."""
    table = config.get(key) or {}
    if not isinstance(table, dict) or len(table) > MAX_PATTERNS:
        raise ConfigError(f"{key} is not an object of at most {MAX_PATTERNS} patterns")
    rules = [(text, compile_pattern(text), _number(table, text, None)) for text in table]
    unmatched = set(table)

    def lookup(module: str) -> float:
        for text, rule, value in rules:
            if text == module or rule.match(module):
                unmatched.discard(text)
                return value
        return default

    return lookup, unmatched


# --- tensors --------------------------------------------------------------------------------------------------------


def _sort_tensors(tensors: Sequence[TensorInfo]) -> tuple[dict[str, dict[str, TensorInfo]], list[TensorInfo]]:
    """({module: {"A": info, "B": info}}, extras). Raises E-TENSOR or E-LORA-FEATURE for names without a place."""
    pairs: dict[str, dict[str, TensorInfo]] = {}
    extras = []
    for info in tensors:
        if not info.name.startswith(_PREFIX):
            raise TensorUnknownError(
                f"tensor {info.name!r} does not begin with {_PREFIX!r}", fix="is this a PEFT file?"
            )
        name = info.name.removeprefix(_PREFIX)
        found = _FACTOR.fullmatch(name)
        if found:
            pairs.setdefault(found["module"], {})[found["half"]] = info
        elif ".lora_" in name:
            raise UnsupportedLoraError(_why_refused(name), fix="this adapter cannot be converted yet")
        else:
            extras.append(info)
    return pairs, extras


def _why_refused(name: str) -> str:
    if "lora_embedding_" in name:
        return f"tensor {name!r} adapts an embedding"
    if "lora_magnitude_vector" in name:
        return f"tensor {name!r} is a DoRA magnitude"
    if name.endswith(".bias"):
        return f"tensor {name!r} is a bias of lora_B"
    if re.fullmatch(r".+\.lora_[AB]\.[^.]+\.weight", name):
        return f"tensor {name!r} belongs to an adapter saved under another name than 'default'"
    return f"tensor {name!r} is not one of lora_A.weight, lora_B.weight"


def _load_factor(file: ContainerFile, info: TensorInfo) -> Stored:
    if info.dtype not in FLOATS:
        raise DtypeError(f"tensor {info.name!r} is {info.dtype}, expected one of {', '.join(FLOATS)}")
    stored = file.load(info)
    if not np.isfinite(stored.decode()).all():
        raise ValueRangeError(
            f"tensor {info.name!r} holds NaN or infinity", fix="the training diverged; use an earlier checkpoint"
        )
    return stored


def _pair_shapes(module: str, halves: dict[str, TensorInfo]) -> tuple[int, int, int]:
    """(out, in, r) of a pair. Raises E-PAIR or E-LORA-FEATURE."""
    for half, other in (("A", "B"), ("B", "A")):
        if half not in halves:
            raise PairError(f"{module}: lora_{other}.weight has no lora_{half}.weight", fix="the file is incomplete")
    a, b = halves["A"].shape, halves["B"].shape
    if len(a) in (3, 4, 5) and len(a) == len(b):
        raise UnsupportedLoraError(
            f"{module}: lora_A has shape {list(a)}, a convolution or a stack of experts",
            fix="this adapter cannot be converted yet",
        )
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise PairError(f"{module}: lora_A {list(a)} and lora_B {list(b)} do not fit; expected (r, in) and (out, r)")
    if a[0] > MAX_RANK:
        raise LimitError(f"{module}: rank {a[0]} is above {MAX_RANK}")
    return b[0], a[1], a[0]


# --- reading --------------------------------------------------------------------------------------------------------


def _find_config(path: Path) -> Path:
    config = (path if path.is_dir() else path.parent) / CONFIG_NAME
    if not config.exists():
        raise ConfigError(
            f"there is no {CONFIG_NAME} beside the weights; without it alpha is unknown",
            fix=f"put the adapter's {CONFIG_NAME} into the same folder",
            path=path,
        )
    return config


def _find_weights(path: Path) -> Path:
    weights = path / WEIGHTS_NAME if path.is_dir() else path
    if not weights.exists():
        pickled = path / "adapter_model.bin"
        if pickled.exists():
            raise PickleError(
                "the adapter is stored as a pickle, which can run code when it is loaded",
                fix="load it with PEFT and save_pretrained it again: that writes safetensors",
                path=pickled,
            )
        raise FileKindError(f"the folder has no {WEIGHTS_NAME}", path=path)
    return weights


def recognises(path: Path) -> bool:
    """A folder with an adapter_config.json that is not MLX's, or a safetensors file with PEFT's tensor names."""
    if path.is_dir():
        try:
            config = read_json(path / CONFIG_NAME)
        except LrcError:
            return (path / CONFIG_NAME).exists()
        return "peft_type" in config or not {"fine_tune_type", "lora_parameters"} & set(config)
    try:
        with ContainerFile(path) as file:
            return any(info.name.startswith(_PREFIX) for info in file.tensors)
    except LrcError:
        return path.name == WEIGHTS_NAME


def read(path: Path) -> LoraAdapter:
    """A PEFT LoRA as a `LoraAdapter`: factors with their stored bits, scales folded, other tensors as extras.

    Names are ``<module>.weight``; the orientation is what the configuration claims, to be settled when the adapter
    meets a base. Raises E-NOT-LORA, E-LORA-FEATURE, E-CONFIG, E-PATTERN, E-PAIR, E-TENSOR, E-VALUE, E-EMPTY, E-DTYPE.
    """
    config_path = _find_config(path)
    config = read_json(config_path)
    try:
        check_config(config)
        rank_of, unmatched_ranks = _pattern_lookup(config, "rank_pattern", _number(config, "r", None))
        alpha_of, unmatched_alphas = _pattern_lookup(config, "alpha_pattern", _number(config, "lora_alpha", None))
        provenance_fields = _provenance_fields(config)
        base_model, revision, task = (
            config_text(config, k) for k in ("base_model_name_or_path", "revision", "task_type")
        )
    except LrcError as error:
        raise error.at(config_path) from None
    weights = _find_weights(path)
    with ContainerFile(weights) as file:
        try:
            pairs, other = _sort_tensors(file.tensors)
            if not pairs:
                raise EmptyAdapterError(
                    "the file holds no lora_A / lora_B pair", fix="is it an adapter that was saved empty?"
                )
            targets = tuple(
                _read_pair(file, module, halves, config, rank_of, alpha_of) for module, halves in sorted(pairs.items())
            )
            extras = tuple(
                ExtraTensor(i.name.removeprefix(_PREFIX), i.dtype, i.shape, bytes(file.read(i)))
                for i in sorted(other, key=lambda i: i.name)
            )
            source = combined_digest(
                (i.name, tensor_digest(i.name, i.dtype, i.shape, [file.read(i)])) for i in file.tensors
            )
            file.check_unchanged()
        except LrcError as error:
            raise error.at(weights) from None
    return LoraAdapter(
        targets=tuple(sorted(targets, key=lambda t: t.target)),
        extras=extras,
        provenance=Provenance(source, base_model, revision, task, provenance_fields),
        warnings=_warnings(targets, unmatched_ranks | unmatched_alphas, extras, config),
    )


def _read_pair(
    file: ContainerFile,
    module: str,
    halves: dict[str, TensorInfo],
    config: Mapping[str, Any],
    rank_of: Callable[[str], float],
    alpha_of: Callable[[str], float],
) -> LoraTarget:
    out_features, in_features, rank = _pair_shapes(module, halves)
    if rank_of(module) != rank:
        raise PairError(
            f"{module}: the tensors have rank {rank}, the configuration says {rank_of(module):g}",
            fix=f"correct r or rank_pattern in {CONFIG_NAME}",
        )
    alpha = alpha_of(module)
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    if not math.isfinite(scale):
        raise ConfigError(f"{module}: the scale alpha / r is not finite")
    a, b = _load_factor(file, halves["A"]), _load_factor(file, halves["B"])
    stored_transposed = bool(config.get("fan_in_fan_out"))
    shape = (in_features, out_features) if stored_transposed else (out_features, in_features)
    target = Target(f"{module}.weight", shape, TRANSPOSED if stored_transposed else MATRIX)
    return LoraTarget(target, a, b, scale)


def _provenance_fields(config: Mapping[str, Any]) -> dict[str, str]:
    fields = {"source_format": "peft"}
    if isinstance(config.get("peft_version"), str):
        fields["peft_version"] = config["peft_version"]
    mapping = config.get("auto_mapping")
    if isinstance(mapping, dict) and isinstance(mapping.get("base_model_class"), str):
        fields["base_model_class"] = mapping["base_model_class"]
    saved = config.get("modules_to_save")
    if isinstance(saved, list) and saved and all(isinstance(m, str) and "," not in m for m in saved):
        fields["modules_to_save"] = ",".join(saved)
    return fields


def _warnings(
    targets: Sequence[LoraTarget], unmatched: set[str], extras: Sequence[ExtraTensor], config: Mapping[str, Any]
) -> tuple[str, ...]:
    found = []
    idle = [t.target.name for t in targets if t.scale == 0 or not np.any(t.b.decode()) or not np.any(t.a.decode())]
    if idle:
        found.append(f"{len(idle)} of {len(targets)} targets have an all-zero update, {idle[0]} for one")
    if unmatched:
        found.append(f"patterns of the configuration match no module: {', '.join(sorted(unmatched))}")
    saved = config.get("modules_to_save") or []
    names = [extra.name for extra in extras]
    if isinstance(saved, list):
        absent = [m for m in saved if not any(f".{m}." in f".{name}" for name in names)]
        if absent and len(absent) == len(saved):
            found.append(f"modules_to_save names {', '.join(map(str, absent))}, but the file holds no such tensors")
    return tuple(found)


READER = Reader("peft", "PEFT LoRA folder or adapter_model.safetensors", recognises, read)
