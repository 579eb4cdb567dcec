"""PEFT: ``PeftModel.from_pretrained(model, FOLDER)``. The reference, and lenient: it ignores tensors without a
place silently, and only warns of those that it misses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from lrconvert.core.errors import OptionError, PatternError
from lrconvert.formats.compat.base import Consumer, Finding, verdicts
from lrconvert.formats.compat.shared import rules, whole_names
from lrconvert.formats.compat.shared.rules import right_base, words
from lrconvert.formats.compat.shared.subject import PEFT_PREFIX, Subject, example, leaf
from lrconvert.formats.readers.peft.patterns import check_work, compile_pattern

VERSION = "0.21.2"
refuses, wrong, warns = verdicts("peft", VERSION)

CONFIG = "peft/config.py PeftConfigMixin"
LOAD = "peft/utils/save_and_load.py load_peft_weights"
SET = "peft/utils/save_and_load.py set_peft_model_state_dict"
CONVERSION = "peft/utils/transformers_weight_conversion.py build_peft_weight_mapping"
TUNERS = "peft/tuners/tuners_utils.py"

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
    """Facts about the PEFT that will load the adapter."""

    peft_version: str | None = field(
        default=None, metadata={"help": f"peft: the release that will load it, 0.13 or newer (facts are of {VERSION})."}
    )


def examine(subject: Subject, options: Options) -> Iterator[Finding]:
    fields = _known_fields(options.peft_version)
    if (problem := rules.not_a_peft_folder(subject)) is not None:
        yield refuses("layout", *problem, f"{CONFIG}._get_peft_type")
        return
    if subject.pickle == "adapter_model.bin":
        yield rules.pickled(subject, warns, LOAD)
    elif not subject.weights:
        yield rules.unweighted(refuses, LOAD)
    kinds = list(_kind(subject))
    yield from kinds
    if kinds or subject.kind != "LORA":
        return
    yield from _fields(subject, options.peft_version, fields)
    yield from _config(subject)
    yield from _factors(subject)
    yield from _extras(subject)


def _known_fields(version: str | None) -> frozenset[str]:
    """Return the fields of LoraConfig in a release. Raises E-OPTION for one before 0.13."""
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


def _kind(subject: Subject) -> Iterator[Finding]:
    if "peft_type" not in subject.config:
        yield refuses("kind", "peft_type is missing", 'write "peft_type": "LORA"', f"{CONFIG}._get_peft_type")
    elif subject.kind == "BONE":
        fix = "convert it to MISS with PEFT's scripts/convert-bone-to-miss.py, or use peft 0.18"
        yield refuses("kind", "BONE was removed in 0.19", fix, "peft/utils/peft_types.py PeftType")
    elif subject.kind not in KINDS:
        what = f"peft_type {subject.config['peft_type']!r:.60} is not known"
        yield refuses("kind", what, "upgrade PEFT if it is newer", "peft/mapping.py PEFT_TYPE_TO_CONFIG_MAPPING")


def _fields(subject: Subject, version: str | None, fields: frozenset[str]) -> Iterator[Finding]:
    unknown = sorted(set(subject.config) - fields)
    source = f"{CONFIG}.from_peft_type"
    if unknown and version is not None and version.split(".")[:2] == ["0", "13"]:
        what = f"PEFT {version} refuses fields that it does not know"
        fix = "remove the fields, or upgrade to 0.14, which ignores them"
        yield from refuses.of("fields", unknown, what, fix, source)
    else:
        what = f"fields that PEFT {version or VERSION} does not know, ignored with a warning"
        fix = "upgrade PEFT, or remove the fields if they do not change the update"
        yield from warns.of("fields", [key for key in unknown if subject.flag(key)], what, fix, source)


def _config(subject: Subject) -> Iterator[Finding]:
    task = subject.config.get("task_type")
    if task is not None and not (isinstance(task, str) and task in TASKS):
        fix = f"use one of {', '.join(sorted(TASKS))} or null"
        yield refuses("task", f"task_type {task!r:.60} is not known", fix, f"{CONFIG}.__post_init__")
    source = "peft/tuners/lora/layer.py LoraLayer.update_layer"
    fix = "use a positive integer; a module of rank 0 is left out of target_modules instead"
    yield from rules.bad_rank(subject, refuses, fix, source, default=8)
    yield from rules.bad_alpha(subject, refuses, source, default=8)
    if subject.config.get("target_modules") is None and not subject.flag("target_parameters"):
        what = "target_modules is not set: PEFT guesses it from the base's model type, or refuses an unknown type"
        source = f"{TUNERS} BaseTuner._prepare_adapter_config"
        yield warns("targets", what, "write the names of the adapted modules", source)


def _factors(subject: Subject) -> Iterator[Finding]:
    yield from whole_names.wrappers(subject, wrong, "their tensors are ignored", SET)
    if bare := [info.name for info in subject.tensors if not info.name.startswith("base_model.")]:
        fix = f"put {PEFT_PREFIX} before every name"
        if not _converts(subject):
            what = f"names do not begin with {PEFT_PREFIX}, their tensors are ignored"
            yield from wrong.of("prefix", bare, what, fix, SET)
            return
        what = (
            f"names do not begin with {PEFT_PREFIX}, which is read where transformers converts names, as of this base"
        )
        yield from warns.of("prefix", bare, what, fix, CONVERSION)
    if odd := rules.ranks_at_odds(subject):
        module = odd[0]
        what = (
            f"{len(odd)} modules have another rank than the configuration says, {module!r:.120} "
            f"{subject.pairs[module].rank} instead of {subject.rank(module):g}"
        )
        yield refuses("shape", what, "correct r or rank_pattern", "torch load_state_dict, size mismatch")
    yield from rules.incomplete_pairs(subject, wrong, SET, aside=", PEFT only warns or stops")
    unnamed = [module for module in subject.pairs if not _targeted(subject, module)]
    what = "modules that target_modules does not name, their tensors are ignored"
    yield from wrong.of("targets", unnamed, what, "name them there", f"{TUNERS} check_target_module_exists")
    yield from rules.integer_factors(subject, wrong, SET)
    task = str(subject.config.get("task_type"))
    place = whole_names.placement(subject, task=task)
    what = f"{len(place.lacking)} modules are not in the base, their tensors are ignored"
    yield from wrong.of("modules", place.lacking, what, right_base(), SET)
    what = f"names fit the bare model, not {subject.architecture or 'this one'}"
    fix = "load the base with AutoModel, or add the missing part to every name"
    with_head = task in TASKS - {"FEATURE_EXTRACTION"}
    yield from (wrong if with_head else warns).of("modules", place.shorter, what, fix, SET)
    unnamed = [module for module, name in place.renamed.items() if not _targeted(subject, name)]
    what = "target_modules has the names of an older release, in which no module is found"
    yield from wrong.of("targets", unnamed, what, "write the new names there", f"{TUNERS} check_target_module_exists")
    if subject.base is None:
        yield from whole_names.doubled(subject, warns, SET)


def _converts(subject: Subject) -> bool:
    """Return whether transformers converts names of the base's checkpoints: PEFT converts an adapter's along then, and
    puts its prefix before them."""
    if subject.base is None:
        return False
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping as conversions
    except ImportError:  # an older release, which has none
        return False
    kind = subject.base.get("model_type")  # of the whole model: those of its parts are not asked
    return isinstance(kind, str) and bool(conversions(kind))  # type: ignore[no-untyped-call]


def _targeted(subject: Subject, module: str) -> bool:
    """Return True if target_modules names a module, or if that cannot be told from the names."""
    targets = subject.config.get("target_modules")
    if subject.flag("target_parameters"):
        return True
    if _is_tied_end(subject, module):
        return True
    if isinstance(targets, list):
        parts = module.split(".")  # one of its ends must be a name: there may be as many names as modules
        return any(".".join(parts[first:]) in subject.targets for first in range(len(parts)))
    if not isinstance(targets, str) or targets == "all-linear":
        return True
    try:
        pattern = compile_pattern(targets)
        check_work([targets], subject.pairs)
        return pattern.match(module) is not None
    except PatternError:
        return True


def _is_tied_end(subject: Subject, module: str) -> bool:
    """Return whether a module may be the other end of tied embeddings, which `ensure_weight_tying` adapts along."""
    return subject.flag("ensure_weight_tying") and not any(part.isdecimal() for part in module.split("."))


def _extras(subject: Subject) -> Iterator[Finding]:
    saved = subject.names("modules_to_save")
    heads = [*saved, *TASK_HEADS.get(str(subject.config.get("task_type")), ())]
    ignored = [name for name in subject.others if not _placed(subject, name, heads)]
    fix = "say in the configuration what they are, or remove them"
    yield from wrong.of("extra", ignored, "tensors without a place are ignored without a word", fix, SET)
    # A wrapped module whose tensors are absent is a KeyError, a name that matches no module is none.
    if saved and subject.tensors and not any(_owned(name, saved) for name in subject.others):
        what = f"modules_to_save names {example(saved)}, but the file holds no such tensors"
        yield refuses("saved", what, "remove modules_to_save, or save the adapter again with them", SET)


def _owned(name: str, modules: list[str]) -> bool:
    """Return True if a tensor lies in one of `modules`, by PEFT's rule: the module's path ends with a listed name."""
    parts = name.split(".")[:-1]
    paths = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(path.endswith(module) for path in paths for module in modules)


def _placed(subject: Subject, name: str, heads: list[str]) -> bool:
    if ".lora_" in name:
        return (
            (name.endswith(".lora_magnitude_vector") and subject.flag("use_dora"))
            or (name.endswith(".lora_B.bias") and subject.flag("lora_bias"))
            or name.endswith((".lora_A.default.weight", ".lora_B.default.weight"))
        )
    if _owned(name, heads) or ".base_layer." in name or "token_adapter." in name:
        return True
    owner, parameter = name.removeprefix(PEFT_PREFIX).rpartition(".")[::2]
    if _is_tied_end(subject, owner):
        return True
    if owner in subject.pairs:  # the module is wrapped: its own tensors are base_layer.<name> now
        return False
    # Any other tensor replaces the base's own of that name, if there is one.
    return not subject.base_modules or owner in subject.base_modules or parameter == "bias" or leaf(owner) == "lm_head"


CONSUMER = Consumer("peft", "PEFT", VERSION, examine, Options)
