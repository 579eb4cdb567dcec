"""Facts about an adapter that several consumers ask for, and findings that several have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lrconvert.core.wording import either, spelled
from lrconvert.formats.compat.base import Finding, Verdict
from lrconvert.formats.compat.shared.subject import CONFIG_NAME, PEFT_WEIGHTS, Subject, as_number

EXPAND = "expand it to plain LoRA first"

_UNREAD = {
    "use_qalora": ("qalora", "the factors of QA-LoRA have other shapes"),
    "use_bdlora": ("bdlora", "the factors of block-diagonal LoRA have other shapes"),
    "layer_replication": ("replication", "the replicated layers do not exist"),
    "target_parameters": ("experts", "expert stacks as PEFT stores them (target_parameters) are not read"),
}


@dataclass(frozen=True)
class ServerOptions:
    """Settings of a server."""

    max_lora_rank: int | None = field(
        default=None, metadata={"help": "The server's own --max-lora-rank. vllm: 16 if not given; sglang: no limit."}
    )


def export_call(layout: str = "peft-lora") -> str:
    """Return how an adapter is exported."""
    return either(f"lrconvert.export(FILE, DIR, to={layout!r})", f"`lrconvert export FILE -o DIR --to {layout}`")


def bake() -> str:
    """Return the advice for a scale that a program gets wrong."""
    how = either("lrconvert.export(..., to='peft-lora')", "`lrconvert export --to peft-lora`")
    return f"bake the scale into lora_B and write lora_alpha = r without patterns, as {how} does"


def right_base() -> str:
    """Return the advice for names that the base does not have."""
    return (
        f"if this is the right base, convert and export with {spelled('base', ...)}: that writes the names that it has"
    )


def check_base() -> str:
    """Return the advice for what depends on a base that was not given."""
    return f"give {spelled('base', ...)} to have it checked"


def words(text: str) -> frozenset[str]:
    """Return a set of names, written as a text of words."""
    return frozenset(text.split())


# --- facts ----------------------------------------------------------------------------------------------------------


def not_a_peft_folder(subject: Subject) -> tuple[str, str] | None:
    """Return what is wrong and what to do, if the input is no PEFT folder at all."""
    if subject.foreign:
        return f"an adapter in the layout {subject.foreign}: its names and scales are its own", (
            f"convert it, and export the result: {export_call()}"
        )
    if subject.layout == "lrconvert":
        return "a compact lrconvert file: no server loads one", (f"export it first: {export_call()}")
    if subject.layout == "mlx":
        return "an mlx-lm adapter: its names, shapes and configuration are its own", "convert it to PEFT's layout first"
    if CONFIG_NAME not in subject.files:
        return f"there is no {CONFIG_NAME}", (
            f"give a folder that holds {CONFIG_NAME} and {PEFT_WEIGHTS}; without the first, alpha is unknown"
        )
    return None


def missing_fields(subject: Subject) -> list[str]:
    """Return the fields without which servers refuse a configuration."""
    return [key for key in ("r", "lora_alpha", "target_modules") if key not in subject.config]


def stated_ranks(subject: Subject, default: int | None = None) -> dict[str, Any]:
    """Return the ranks that the configuration states, unchecked: r, and those of patterns."""
    return {"r": subject.config.get("r", default), **subject.pattern("rank_pattern")}


def rescaled(subject: Subject, scale: Callable[[str, int], float]) -> str:
    """Return the modules whose scale a consumer computes otherwise than PEFT, as text; "" if there is none.

    `scale(module, rank)` is what the consumer multiplies B @ A by.
    """
    wrong = []
    for module, pair in subject.pairs.items():
        right = subject.scale(module)
        if right is None or pair.rank is None or pair.rank != subject.rank(module):
            continue  # a contradiction is a finding of its own
        used = scale(module, pair.rank)
        if not math.isclose(used, right, rel_tol=1e-6):
            wrong.append((module, right, used))
    if not wrong:
        return ""
    module, right, used = wrong[0]
    return f"{len(wrong)} of {len(subject.pairs)} modules, {module!r:.120} by {used:g} instead of {right:g}"


def ranks_at_odds(subject: Subject) -> list[str]:
    """Return the modules whose factors have another rank than the configuration says."""
    odd = [m for m, pair in subject.pairs.items() if pair.rank and subject.rank(m) not in (None, pair.rank)]
    # PEFT stores the factors of all experts of a stack as one, of rank r * experts.
    return [m for m in odd if all((subject.pairs[m].rank or 0) % rank for rank in _stack_ranks(subject, m))]


def _stack_ranks(subject: Subject, module: str) -> list[int]:
    """Return the ranks that one expert may have, if target_parameters adapts a stack in `module`. Patterns go by the
    names of parameters, and which of several a pair of factors is for does not show here."""
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    names = [name.rpartition(".") for name in subject.names("target_parameters")]
    parameters = [last for holder, _, last in names if not holder or f".{module}".endswith(f".{holder}")]
    ranks = {subject.rank(f"{module}.{parameter}") for parameter in parameters}
    return [int(rank) for rank in ranks if rank is not None and rank >= 1 and rank == int(rank)]


def changes_base(subject: Subject) -> bool:
    """Return True if the initialization moved part of the base's weights into the factors (PiSSA, OLoRA, CorDA)."""
    init = subject.config.get("init_lora_weights")
    return isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal", "mica", "lora_ga", "true")


# --- findings -------------------------------------------------------------------------------------------------------


def pickled(subject: Subject, warns: Verdict, source: str) -> Finding:
    fix = "load it with PEFT and save_pretrained it again: that writes safetensors"
    return warns("pickle", f"the weights are a pickle, {subject.pickle}, and were not looked at", fix, source)


def unweighted(refuses: Verdict, source: str) -> Finding:
    return refuses("weights", f"there is no {PEFT_WEIGHTS}", "put the weights there under this name", source)


def bad_rank(
    subject: Subject, refuses: Verdict, fix: str, source: str, default: int | None = None
) -> Iterator[Finding]:
    """Yield a finding on the first rank of the configuration that is no positive integer."""
    for key, value in stated_ranks(subject, default).items():
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            yield refuses("rank", f"the rank {key!r:.80} is {value!r:.40}", fix, source)
            return


def bad_alpha(subject: Subject, refuses: Verdict, source: str, default: int | None = None) -> Iterator[Finding]:
    """Yield a finding on the first alpha of the configuration that is no number."""
    alphas = {"lora_alpha": subject.config.get("lora_alpha", default), **subject.pattern("alpha_pattern")}
    for key, value in alphas.items():
        if as_number(value) is None:
            yield refuses("alpha", f"the alpha {key!r:.80} is {value!r:.40}", "use a number", source)
            return


def set_features(
    subject: Subject, verdict: Verdict, fix: str, source: str, features: Mapping[str, tuple[str, str]] = _UNREAD
) -> Iterator[Finding]:
    """Yield a finding on each field that is set; `features` are by field: (rule, what). Without them they are those
    whose tensors no other program reads."""
    for key, (rule, what) in features.items():
        if subject.flag(key):
            yield verdict(rule, what, fix, source)


def ignored_init(subject: Subject, wrong: Verdict, source: str) -> Iterator[Finding]:
    if changes_base(subject):
        init: Any = subject.config["init_lora_weights"]
        fix = "convert it to plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        yield wrong(
            "init", f"the initialization {init!r:.60} changes the base's weights, which is ignored", fix, source
        )


def incomplete_pairs(subject: Subject, verdict: Verdict, source: str, aside: str = "") -> Iterator[Finding]:
    """Yield a finding on modules with one factor only, or with factors that do not fit."""
    modules = [module for module, pair in subject.pairs.items() if pair.rank is None]
    what = f"lora_A or lora_B is missing or does not fit{aside}"
    return verdict.of("pair", modules, what, "the file is incomplete: save it again", source)


def integer_factors(subject: Subject, wrong: Verdict, source: str) -> Iterator[Finding]:
    """Yield a finding on factors of an integer type: codes of some quantization, which no LoRA loader undoes."""
    halves = [half for pair in subject.pairs.values() for half in (pair.a, pair.b) if half is not None]
    codes = [info.name for info in halves if not info.dtype.startswith(("F", "BF"))]
    what = "factors that are no floats are read as plain numbers"
    return wrong.of("dtype", codes, what, "store them as F32, F16 or BF16", source)
