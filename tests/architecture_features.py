"""What PEFT can train on a model, by feature: its configuration, and what becomes of the saved folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import VOCABULARY, Architecture
from safetensors.torch import load_file, save_file
from torch import nn

NEW_TOKENS = 8
"""By how many tokens resized embeddings are longer."""

ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Feature:
    """A kind of adapter.

    `options(architecture, model)` are those of a `LoraConfig`, or None where the model has nothing of the kind.
    `rewrite` changes the names in the folder that PEFT saved, as other programs write them: what the adapter means
    stays the same. `resized` models have `NEW_TOKENS` more than their base.
    """

    name: str
    about: str
    options: Callable[[Architecture, Any], Mapping[str, Any] | None]
    rewrite: Callable[[Path, Any], None] | None = None
    resized: bool = False

    def prepare(self, model: Any, seed: int = 3) -> Any:
        """Make of a base the model on which the adapter lies. New rows are random."""
        if self.resized:
            torch.manual_seed(seed)
            model.resize_token_embeddings(VOCABULARY + NEW_TOKENS, mean_resizing=False)
        return model


# --- where things are, asked of the model ---------------------------------------------------------------------------


def path_of(model: nn.Module, module: nn.Module | None) -> str | None:
    """Return the name under which PEFT meets a module."""
    return next((name for name, other in model.named_modules() if other is module), None)


def embedding(model: Any) -> str:
    return str(path_of(model, model.get_input_embeddings()))


def head(model: Any) -> str | None:
    """Return the output embedding; of a classifier its last linear layer."""
    found = path_of(model, model.get_output_embeddings())
    if found is None and "Classification" in type(model).__name__:
        found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    return found


def saved_head(model: Any) -> str | None:
    """Return the module that PEFT saves whole for the head: of a classifier of several layers all of it."""
    found = head(model)
    return found if model.get_output_embeddings() is not None or found is None else found.partition(".")[0]


def is_tied(model: Any) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


# --- configurations -------------------------------------------------------------------------------------------------


def _linear(**more: Any) -> Callable[[Architecture, Any], Mapping[str, Any] | None]:
    return lambda architecture, model: {"target_modules": list(architecture.linear), **more}


def _ends(*ends: Callable[[Any], str | None], **more: Any) -> Callable[[Architecture, Any], Mapping[str, Any] | None]:
    """LoRA on the first kind of linear layer and on these modules."""

    def options(architecture: Architecture, model: Any) -> Mapping[str, Any] | None:
        places = [end(model) for end in ends]
        if None in places:
            return None
        return {"target_modules": [architecture.linear[0], *places], **more}

    return options


def _saved(*ends: Callable[[Any], str | None], **more: Any) -> Callable[[Architecture, Any], Mapping[str, Any] | None]:
    """LoRA on linear layers, and these modules saved whole."""

    def options(architecture: Architecture, model: Any) -> Mapping[str, Any] | None:
        places = [end(model) for end in ends]
        if None in places:
            return None
        return {"target_modules": list(architecture.linear), "modules_to_save": places, **more}

    return options


def _if_tied(
    inner: Callable[[Architecture, Any], Mapping[str, Any] | None],
) -> Callable[[Architecture, Any], Mapping[str, Any] | None]:
    return lambda architecture, model: inner(architecture, model) if is_tied(model) else None


def _tokens(indices: list[int]) -> Callable[[Architecture, Any], Mapping[str, Any] | None]:
    return lambda architecture, model: {
        "target_modules": list(architecture.linear),
        "trainable_token_indices": {embedding(model): indices},
    }


def _experts(**more: Any) -> Callable[[Architecture, Any], Mapping[str, Any] | None]:
    def options(architecture: Architecture, model: Any) -> Mapping[str, Any] | None:
        if not architecture.experts:
            return None
        return {
            "target_modules": list(architecture.linear[:1]),
            "target_parameters": list(architecture.experts),
            **more,
        }

    return options


def _patterns(architecture: Architecture, model: Any) -> Mapping[str, Any]:
    first, *others = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in architecture.linear]
    patterns: dict[str, Any] = {"rank_pattern": {f"^{re.escape(first)}": 2}, "alpha_pattern": {first: 5}}
    if others:
        patterns["rank_pattern"][others[-1].rpartition(".")[2]] = 3
        patterns["alpha_pattern"][others[-1].rpartition(".")[2]] = 1
    return {"target_modules": list(architecture.linear), **patterns}


def _excluded(architecture: Architecture, model: Any) -> Mapping[str, Any]:
    return {"target_modules": "all-linear", "exclude_modules": list(architecture.linear[:1])}


def _bias(kind: str) -> Callable[[Architecture, Any], Mapping[str, Any] | None]:
    def options(architecture: Architecture, model: Any) -> Mapping[str, Any] | None:
        if not any(name.endswith("bias") for name, _ in model.named_parameters()):
            return None
        return {"target_modules": list(architecture.linear), "bias": kind}

    return options


def _with_task(architecture: Architecture, model: Any) -> Mapping[str, Any]:
    """With the task of the class, which says that it has a head."""
    tasks = {"CausalLM": "CAUSAL_LM", "ConditionalGeneration": "SEQ_2_SEQ_LM", "SequenceClassification": "SEQ_CLS"}
    if architecture.inputs == "speech":
        tasks = {}  # PEFT would call it with tokens
    task = next((name for end, name in tasks.items() if architecture.model.endswith(f"For{end}")), None)
    return {"target_modules": list(architecture.linear), **({"task_type": task} if task else {})}


# --- how other programs write it ------------------------------------------------------------------------------------


def _renamed(change: Callable[[str, Any], str]) -> Callable[[Path, Any], None]:
    def rewrite(folder: Path, model: Any) -> None:
        tensors = load_file(folder / ADAPTER)
        save_file({change(name, model): value for name, value in tensors.items()}, folder / ADAPTER, {"format": "pt"})

    return rewrite


def _inside(word: str) -> Callable[[str, Any], str]:
    """A wrapper around every layer of a stack."""
    return lambda name, model: re.sub(r"(\.\d+\.)(?!.*\.\d+\.)", rf"\1{word}.", name, count=1)


def _headless(name: str, model: Any) -> str:
    """As where the model without its head was trained."""
    return name.replace(f"base_model.model.{model.base_model_prefix}.", "base_model.model.")


def _sharded(folder: Path, model: Any) -> None:
    tensors = load_file(folder / ADAPTER)
    (folder / ADAPTER).unlink()
    names = sorted(tensors)
    files = {f"adapter_model-{n + 1:05}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": {name: file for file, part in files.items() for name in part},
    }
    (folder / f"{ADAPTER}.index.json").write_text(json.dumps(index))


FEATURES: Mapping[str, Feature] = {
    feature.name: feature
    for feature in [
        Feature("linear", "LoRA on linear layers", _linear()),
        Feature("all-linear", 'target_modules="all-linear" with exclude_modules', _excluded),
        Feature("embedding", "LoRA on the input embedding", _ends(embedding)),
        Feature("head", "LoRA on the head", _ends(head)),
        Feature("both-ends", "LoRA on input embedding and head", _ends(embedding, head)),
        Feature(
            "tied-ends",
            "LoRA on a tied embedding with ensure_weight_tying",
            _if_tied(_ends(embedding, ensure_weight_tying=True)),
        ),
        Feature("saved-embedding", "modules_to_save: the input embedding", _saved(embedding)),
        Feature("saved-head", "modules_to_save: the head", _saved(saved_head)),
        Feature("saved-both", "modules_to_save: both", _saved(embedding, saved_head)),
        Feature(
            "saved-tied",
            "modules_to_save of a tied embedding with ensure_weight_tying",
            _if_tied(_saved(embedding, ensure_weight_tying=True)),
        ),
        Feature("tokens", "trainable_token_indices", _tokens([3, 5, 11])),
        Feature("experts", "target_parameters: stacks of experts", _experts()),
        Feature("patterns", "rank_pattern and alpha_pattern, with and without anchors", _patterns),
        Feature("rslora", "use_rslora", _linear(use_rslora=True)),
        Feature("dora", "use_dora", _linear(use_dora=True)),
        Feature("dora-ends", "use_dora on embedding and head", _ends(embedding, head, use_dora=True)),
        Feature("bias", 'bias="all"', _bias("all")),
        Feature("lora-bias", "lora_bias", _linear(lora_bias=True)),
        Feature(
            "resized",
            "LoRA on linear layers of a model with more tokens, embeddings saved by PEFT",
            _linear(),
            resized=True,
        ),
        Feature(
            "resized-saved",
            "modules_to_save: both ends of a model with more tokens",
            _saved(embedding, saved_head),
            resized=True,
        ),
        Feature(
            "resized-tokens",
            "trainable_token_indices: the new tokens",
            _tokens(list(range(VOCABULARY, VOCABULARY + NEW_TOKENS))),
            resized=True,
        ),
        Feature("resized-lora", "LoRA on both ends of a model with more tokens", _ends(embedding, head), resized=True),
        Feature(
            "compiled", "names begin with _orig_mod.", _linear(), _renamed(lambda name, model: f"_orig_mod.{name}")
        ),
        Feature("parallel", "names begin with module.", _linear(), _renamed(lambda name, model: f"module.{name}")),
        Feature(
            "fsdp", "_fsdp_wrapped_module in every layer's name", _linear(), _renamed(_inside("_fsdp_wrapped_module"))
        ),
        Feature(
            "checkpointed",
            "_checkpoint_wrapped_module in every layer's name",
            _linear(),
            _renamed(_inside("_checkpoint_wrapped_module")),
        ),
        Feature(
            "bare",
            "names without base_model.model.",
            _linear(),
            _renamed(lambda name, model: name.removeprefix("base_model.model.")),
        ),
        Feature(
            "doubled",
            "base_model.model. twice in the names",
            _linear(),
            _renamed(lambda name, model: f"base_model.model.{name}"),
        ),
        Feature(
            "named",
            "an adapter's name in the names",
            _linear(),
            _renamed(lambda name, model: re.sub(r"(lora_[AB])\.", r"\1.vision.", name)),
        ),
        Feature("headless", "names of the model without its head", _with_task, _renamed(_headless)),
        Feature("sharded", "several files and an index", _linear(), _sharded),
    ]
}
