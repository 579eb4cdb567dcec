"""A base folder as a live model with its tokenizer, loaded by transformers from local files alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn

from lrconvert.core.devices import torch_device
from lrconvert.core.errors import BaseError, DataError, DependencyError


def load_model(base: Path, device: str = "cpu", *, four_bit: bool = False) -> nn.Module:
    """The model of a base folder, in the dtype it is stored in, in evaluation mode. With `four_bit` its linear
    layers are quantized to NF4. Raises E-BASE with what transformers says if it cannot load it, E-OPTION for a device
    that is not there, E-DEPENDENCY without bitsandbytes."""
    import transformers

    torch_device(device)

    if four_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise DependencyError("4-bit bases need bitsandbytes", fix="pip install 'lrconvert[gpu]'")

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
        named = (getattr(config, "architectures", None) or [""])[0]
        kind: Any = getattr(transformers, named, transformers.AutoModel)
        how: dict[str, Any] = {"dtype": "auto"}
        if four_bit:
            packed: Any = transformers.BitsAndBytesConfig
            how["quantization_config"] = packed(load_in_4bit=True, bnb_4bit_quant_type="nf4")
            how["device_map"] = {"": device}
        model: nn.Module = kind.from_pretrained(base, local_files_only=True, **how)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise BaseError(f"transformers cannot load the base: {said[0]}", path=base) from None
    if not four_bit:
        return model.to(device).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # a layout for inference alone, and not of all widths
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 -- unknown to torch's stubs
    return model.eval()


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
