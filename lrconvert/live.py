"""A base folder as a live model with its tokenizer, loaded by transformers from local files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lrconvert.errors import BaseError, DataError


def load_model(base: Path, device: str = "cpu") -> nn.Module:
    """The model of a base folder, in the dtype it is stored in, in evaluation mode. Raises E-BASE with what
    transformers says if it cannot load it."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
        named = (getattr(config, "architectures", None) or [""])[0]
        kind: Any = getattr(transformers, named, transformers.AutoModel)
        model: nn.Module = kind.from_pretrained(base, local_files_only=True, dtype="auto")
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise BaseError(f"transformers cannot load the base: {said[0]}", path=base) from None
    return model.to(device).eval()


def load_tokenizer(base: Path) -> Any:
    """The tokenizer of a base folder. Raises E-DATA if it has none."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"the base has no tokenizer that transformers can load: {said[0]}",
            fix="give batches of model inputs through the Python API",
            path=base,
        ) from None


def kind_of(model: nn.Module) -> str:
    """How a model reads texts: ``decoder``, ``encoder`` or ``encoder-decoder``."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    name = type(model).__name__
    writes = bool(getattr(model, "can_generate", lambda: False)())
    return "decoder" if writes or "CausalLM" in name or "LMHead" in name else "encoder"


def longest_input(model: nn.Module, tokenizer: Any, length: int) -> int:
    """`length`, or what the model and its tokenizer take if that is less."""
    config: Any = getattr(model, "config", None)
    limits = [length]
    for found in (getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None)):
        if isinstance(found, int) and 0 < found < 1 << 30:
            limits.append(found)
    return min(limits)
