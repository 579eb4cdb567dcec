"""PEFT: ``PeftModel.from_pretrained(model, FOLDER)``. The reference, and lenient: it ignores tensors without a
place silently, and only warns of those that it misses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from lrconvert.core.errors import OptionError, PatternError
from lrconvert.formats.compat import base
from lrconvert.formats.compat.base import RESAVE, Consumer, Finding, Subject, example, leaf, words
from lrconvert.formats.readers.peft.patterns import check_work, compile_pattern

VERSION = "0.21.2"
refuses = partial(Finding, "refuses", "peft", VERSION)
wrong = partial(Finding, "wrong", "peft", VERSION)
warns = partial(Finding, "warns", "peft", VERSION)

# peft/utils/peft_types.py PeftType, at VERSION.
KINDS = words(
    """
    ADALORA ADAMSS ADAPTION_PROMPT BEFT BOFT C3A CARTRIDGE CPT DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3
    LILY LN_TUNING LOHA LOKR LORA MISS MULTITASK_PROMPT_TUNING OFT OSF PEANUT POLY PREFIX_TUNING PROMPT_TUNING PSOFT
    PVERA P_TUNING RANDLORA ROAD SHADOW SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT XLORA
    """
)
TASKS = words("CAUSAL_LM FEATURE_EXTRACTION QUESTION_ANS SEQ_2_SEQ_LM SEQ_CLS TOKEN_CLS")
# Heads that a task saves without being asked (peft/peft_model.py, PeftModelForSequenceClassification and others).
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# Fields of LoraConfig by the release that brought them; the first row is what 0.13 has.
FIELDS = {
    "0.13": "alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights "
    "layer_replication layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout megatron_config "
    "megatron_core modules_to_save peft_type r rank_pattern revision runtime_config target_modules task_type use_dora "
    "use_rslora",
    "0.14": "eva_config exclude_modules lora_bias",
    "0.15": "corda_config trainable_token_indices",
    "0.16": "qalora_group_size use_qalora",
    "0.17": "target_parameters",
    "0.18": "alora_invocation_tokens arrow_config ensure_weight_tying peft_version",
    "0.19": "lora_ga_config use_bdlora",
    "0.20": "monteclora_config velora_config",
    "0.21": "kasa_config",
}


@dataclass(frozen=True)
class Options:
    """What a user may say about the PEFT that will load the adapter."""

    peft_version: str | None = field(
        default=None, metadata={"help": f"peft: the release that will load it, 0.13 or newer (facts are of {VERSION})."}
    )


def examine(subject: Subject, options: Options) -> Iterator[Finding]:
    known = _known_fields(options.peft_version)
    if (found := base.not_a_peft_folder(subject)) is not None:
        yield refuses("layout", *found, "peft/config.py PeftConfigMixin._get_peft_type")
        return
    yield from _files(subject)
    kinds = list(_kind(subject))
    yield from kinds
    if kinds or subject.kind != "LORA":
        return
    yield from _config(subject, options.peft_version, known)
    yield from _factors(subject)
    yield from _extras(subject)


def _known_fields(version: str | None) -> frozenset[str]:
    """Fields of LoraConfig in a release. Raises E-OPTION for one before 0.13."""
    rows = list(FIELDS.items())
    if version is not None:
        parts = version.split(".")
        if len(parts) < 2 or not (parts[0].isdecimal() and parts[1].isdecimal()):
            raise OptionError(f"{version!r:.40} is not a release of PEFT", fix="write it as 0.17 or 0.17.1")
        minor = (int(parts[0]), int(parts[1]))
        rows = [(since, text) for since, text in rows if tuple(map(int, since.split("."))) <= minor]
        if not rows:
            raise OptionError(f"nothing is recorded about PEFT {version}", fix="the oldest release recorded is 0.13")
    return frozenset(name for _, text in rows for name in text.split())


def _files(subject: Subject) -> Iterator[Finding]:
    source = "peft/utils/save_and_load.py load_peft_weights"
    if subject.pickle == "adapter_model.bin":
        yield warns("pickle", f"the weights are a pickle, {subject.pickle}, and were not looked at", RESAVE, source)
    elif not subject.weights:
        yield refuses("weights", f"there is no {base.PEFT_WEIGHTS}", "put the weights there under this name", source)


def _kind(subject: Subject) -> Iterator[Finding]:
    if "peft_type" not in subject.config:
        source = "peft/config.py PeftConfigMixin._get_peft_type"
        yield refuses("kind", "peft_type is missing", 'write "peft_type": "LORA"', source)
    elif subject.kind == "BONE":
        fix = "convert it to MISS with PEFT's scripts/convert-bone-to-miss.py, or use peft 0.18"
        yield refuses("kind", "BONE was removed in 0.19", fix, "peft/utils/peft_types.py PeftType")
    elif subject.kind not in KINDS:
        what = f"peft_type {subject.config['peft_type']!r:.60} is not known"
        yield refuses("kind", what, "upgrade PEFT if it is newer", "peft/mapping.py PEFT_TYPE_TO_CONFIG_MAPPING")


def _config(subject: Subject, version: str | None, known: frozenset[str]) -> Iterator[Finding]:
    unknown = sorted(set(subject.config) - known)
    source = "peft/config.py PeftConfigMixin.from_peft_type"
    if unknown and version is not None and version.split(".")[:2] == ["0", "13"]:
        what = f"PEFT {version} refuses fields that it does not know: {example(unknown)}"
        yield refuses("fields", what, "remove the fields, or upgrade to 0.14, which ignores them", source)
    elif set_fields := [key for key in unknown if subject.flag(key)]:
        what = f"fields that PEFT {version or VERSION} does not know, ignored with a warning: {example(set_fields)}"
        yield warns("fields", what, "upgrade PEFT, or remove the fields if they do not change the update", source)
    task = subject.config.get("task_type")
    if task is not None and not (isinstance(task, str) and task in TASKS):
        fix = f"use one of {', '.join(sorted(TASKS))} or null"
        source = "peft/config.py PeftConfigMixin.__post_init__"
        yield refuses("task", f"task_type {task!r:.60} is not known", fix, source)
    source = "peft/tuners/lora/layer.py LoraLayer.update_layer"
    ranks = {"r": subject.config.get("r", 8), **subject.pattern("rank_pattern")}
    for key, value in ranks.items():
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            fix = "use a positive integer; a module of rank 0 is left out of target_modules instead"
            yield refuses("rank", f"the rank {key!r:.80} is {value!r:.40}", fix, source)
            break
    alphas = {"lora_alpha": subject.config.get("lora_alpha", 8), **subject.pattern("alpha_pattern")}
    for key, value in alphas.items():
        if base.as_number(value) is None:
            yield refuses("alpha", f"the alpha {key!r:.80} is {value!r:.40}", "use a number", source)
            break
    if subject.config.get("target_modules") is None and not subject.flag("target_parameters"):
        what = "target_modules is not set: PEFT guesses it from the base's model type, or refuses an unknown type"
        source = "peft/tuners/tuners_utils.py BaseTuner._prepare_adapter_config"
        yield warns("targets", what, "write the names of the adapted modules", source)


def _factors(subject: Subject) -> Iterator[Finding]:
    source = "peft/utils/save_and_load.py set_peft_model_state_dict"
    names = [info.name for info in subject.tensors]
    if bare := [name for name in names if not name.startswith("base_model.")]:
        what = f"names do not begin with {base.PEFT_PREFIX}, their tensors are ignored: {example(bare)}"
        yield wrong("prefix", what, f"put {base.PEFT_PREFIX} before every name", source)
        return
    if odd := base.ranks_at_odds(subject):
        module = odd[0]
        what = (
            f"{len(odd)} modules have another rank than the configuration says, {module!r:.120} "
            f"{subject.pairs[module].rank} instead of {subject.rank(module):g}"
        )
        yield refuses("shape", what, "correct r or rank_pattern", "torch load_state_dict, size mismatch")
    if halves := base.incomplete(subject):
        what = f"lora_A or lora_B is missing or does not fit, PEFT only warns or stops: {example(halves)}"
        yield wrong("pair", what, "the file is incomplete: save it again", source)
    if loose := [module for module in subject.pairs if not _targeted(subject, module)]:
        what = f"modules that target_modules does not name, their tensors are ignored: {example(loose)}"
        yield wrong("targets", what, "name them there", "peft/tuners/tuners_utils.py check_target_module_exists")
    if codes := base.not_floats(subject):
        what = f"factors that are no floats are read as plain numbers: {example(codes)}"
        yield wrong("dtype", what, "store them as F32, F16 or BF16", source)
    lacking, shorter = base.outside_base(subject)
    if lacking:
        what = f"{len(lacking)} modules are not in the base, their tensors are ignored: {example(lacking)}"
        yield wrong("modules", what, "is this the right base?", source)
    if shorter:
        what = f"names fit the bare model, not {subject.architecture or 'this one'}: {example(shorter)}"
        yield warns("modules", what, "load the base with AutoModel, or add the missing part to every name", source)


def _targeted(subject: Subject, module: str) -> bool:
    """Whether target_modules names a module; True where that cannot be told from the names."""
    targets = subject.config.get("target_modules")
    if subject.flag("target_parameters"):
        return True
    if isinstance(targets, list):
        return any(module == name or module.endswith(f".{name}") for name in subject.names("target_modules"))
    if not isinstance(targets, str) or targets == "all-linear":
        return True
    try:
        found = compile_pattern(targets)
        check_work([targets], subject.pairs)
        return found.match(module) is not None
    except PatternError:
        return True


def _extras(subject: Subject) -> Iterator[Finding]:
    source = "peft/utils/save_and_load.py set_peft_model_state_dict"
    saved = subject.names("modules_to_save")
    heads = [*saved, *TASK_HEADS.get(str(subject.config.get("task_type")), ())]
    ignored = [info.name for info in subject.others if not _placed(subject, info.name, heads)]
    if ignored:
        what = f"tensors without a place are ignored without a word: {example(ignored)}"
        yield wrong("extra", what, "say in the configuration what they are, or remove them", source)
    # A wrapped module whose tensors are absent is a KeyError, a name that matches no module is none.
    if saved and subject.tensors and not any(_owned(info.name, saved) for info in subject.others):
        what = f"modules_to_save names {example(saved)}, but the file holds no such tensors"
        yield refuses("saved", what, "remove modules_to_save, or save the adapter again with them", source)


def _owned(name: str, modules: list[str]) -> bool:
    """Whether a tensor lies in one of `modules`, by PEFT's rule: the module's path ends with a listed name."""
    parts = name.split(".")[:-1]
    paths = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(path == m or path.endswith(m) for path in paths for m in modules)


def _placed(subject: Subject, name: str, heads: list[str]) -> bool:
    if ".lora_" in name:
        return (
            (name.endswith(".lora_magnitude_vector") and subject.flag("use_dora"))
            or (name.endswith(".lora_B.bias") and subject.flag("lora_bias"))
            or name.endswith((".lora_A.default.weight", ".lora_B.default.weight"))
        )
    if _owned(name, heads) or ".base_layer." in name or "token_adapter." in name:
        return True
    owner, parameter = name.removeprefix(base.PEFT_PREFIX).rpartition(".")[::2]
    if owner in subject.pairs:  # the module is wrapped: its own tensors are base_layer.<name> now
        return False
    # Any other tensor replaces the base's own of that name, if there is one.
    return not subject.base_modules or owner in subject.base_modules or parameter == "bias" or leaf(owner) == "lm_head"


CONSUMER = Consumer("peft", "PEFT", VERSION, examine, Options)
