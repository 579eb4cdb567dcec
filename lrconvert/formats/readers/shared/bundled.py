"""Embeddings of words that a LoRA was trained with and that its file bundles: ``bundle_emb.<word>.<key>``, where the
key says for which text encoder (OneTrainer: ``clip_l``, ``clip_g``; or ``string_to_param.*``). They are no weights of
the base: a program that reads prompts adds them to its words (textual inversion; Gal et al., 2022).
"""

from __future__ import annotations

from lrconvert.formats.readers.shared.weights import Weights, load_finite_extra
from lrconvert.lora.adapter import ExtraTensor

PREFIX = "bundle_emb."


def is_bundled(name: str) -> bool:
    """Return whether a tensor is the embedding of a word."""
    return name.startswith(PREFIX)


def extras(weights: Weights) -> list[ExtraTensor]:
    """Return the embeddings as extra tensors, under their own names. Raises E-DTYPE, E-VALUE."""
    return [
        load_finite_extra(info.name, info, weights, "textual_inversion")
        for info in weights.tensors
        if is_bundled(info.name)
    ]


def notes(embeddings: list[ExtraTensor]) -> list[str]:
    """Return the warning, if any, of what is carried along."""
    words = sorted({extra.name.removeprefix(PREFIX).partition(".")[0] for extra in embeddings})
    if not words:
        return []
    shown = ", ".join(f"{word!r:.40}" for word in words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")
    return [
        f"the file bundles embeddings of {shown} (textual inversion): they are carried along and written back by "
        "exports to kohya and diffusers; merging and attaching leave them to the program that reads the prompts"
    ]
