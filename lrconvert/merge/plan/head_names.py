"""Heads of tasks by their names, classes and labels, as transformers has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lrconvert.merge.plan.updates import Adapter

# The class of a task, as transformers names it after the architecture.
CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_STEM = re.compile(r"(.+?)(?:PreTrainedModel|Model|LMHeadModel|DoubleHeadsModel|For[A-Z]\w*)")
_NAME_LENGTH = 256  # of a class; the patterns here take quadratic time
_LANGUAGE_MODEL = re.compile(r".*(?:LMHeadModel|DoubleHeadsModel|ForCausalLM|ForConditionalGeneration)")
_HEADLESS = re.compile(r".*(?:Model|ForSequenceClassification|ForTokenClassification|ForQuestionAnswering)")
# First segments of names that are a head, where a checkpoint was saved without its architecture's prefix.
HEAD_MODULES = frozenset(
    (
        *("lm_head", "embed_out", "cls", "predictions", "final_logits_bias", "vocab_projector", "vocab_transform"),
        *("vocab_layer_norm", "generator_predictions", "generator_lm_head", "discriminator_predictions"),
        *("classifier", "score", "qa_outputs", "classification_head", "multiple_choice_head", "pre_classifier"),
        *("sop_classifier", "lm_predictions", "mask_predictions", "logits_proj"),
    )
)
TASK_HEADS = HEAD_MODULES - {"lm_head", "embed_out"}
# Parts of a task's class beside its base model and its last layer: those of the base serve, as they do for PEFT.
_SEQUENCES = ("ForSequenceClassification",)
_PARTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "bert": ("bert.pooler.", _SEQUENCES),
    "albert": ("albert.pooler.", _SEQUENCES),
    "deberta": ("pooler.", _SEQUENCES),
    "deberta-v2": ("pooler.", _SEQUENCES),
    "modernbert": ("head.", tuple(CLASSES.values())),
    **dict.fromkeys(("t5", "mt5", "umt5", "bart", "mbart"), ("classification_head.", _SEQUENCES)),
}
# The last layer of a head: its rows are the labels.
LAST_LAYERS = ("out_proj.weight", "classifier.weight", "score.weight", "qa_outputs.weight")
# Families of encoders and decoders whose classes for tokens have the encoder alone.
_T5_LIKE = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers"})


def class_of(adapter: Adapter, architecture: str) -> str:
    """Return the class that an adapter names, else that of its task for a base of this architecture; "" if unknown."""
    named = adapter.provenance.fields.get("base_model_class", "")
    if named:
        return named
    suffix = CLASSES.get(adapter.provenance.task_type)
    stem = _STEM.fullmatch(architecture[:_NAME_LENGTH])
    return f"{stem[1]}{suffix}" if suffix and stem else ""


def is_headless(architecture: str) -> bool:
    """Return whether a class is known to have no output head."""
    return not _LANGUAGE_MODEL.fullmatch(architecture) and _HEADLESS.fullmatch(architecture) is not None


def is_bare(architecture: str) -> bool:
    """Return whether a class is a base model without any head."""
    return architecture.endswith("Model") and not _LANGUAGE_MODEL.fullmatch(architecture)


def has_no_decoder(architecture: str, config: Mapping[str, Any]) -> bool:
    """Return whether the class has no decoder although others of its family do."""
    return architecture.endswith("ForTokenClassification") and config.get("model_type") in _T5_LIKE


def part_of(architecture: str, config: Mapping[str, Any]) -> str:
    """Return the beginning of names that a class has beside its base model and last layer; "." for none."""
    part, classes = _PARTS.get(str(config.get("model_type")), (".", ()))
    return part if architecture.endswith(classes) else "."


def is_inside(name: str, prefix: str) -> bool:
    """Return whether a name lies inside the base model, stored with or without its prefix."""
    return name.startswith(prefix) if prefix else name.partition(".")[0] not in HEAD_MODULES


def labels(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the fields for that many labels as transformers writes them: two is its default, not written."""
    named = config.get("id2label")
    before = len(named) if isinstance(named, dict) else config.get("num_labels", 2)
    if count == before:
        return {}
    if count == 2:
        return {"id2label": None, "label2id": None, "num_labels": None}
    names = [f"LABEL_{i}" for i in range(count)]
    return {
        "id2label": {str(i): label for i, label in enumerate(names)},
        "label2id": {label: i for i, label in enumerate(names)},
        "num_labels": None,
    }
