"""A base folder as a live model with its tokenizer, loaded by transformers from local files alone, and what its
configuration says of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from lrconvert.core.devices import resolved, torch_device
from lrconvert.core.errors import BaseError, DataError, DependencyError
from lrconvert.core.wording import either
from lrconvert.io import mistaken
from lrconvert.live import task_class
from lrconvert.live.attached_adapter import Adapter
from lrconvert.lora import renamings
from lrconvert.lora.architecture import quiet
from lrconvert.lora.base_names import NameIndex


def load_model(base: Path, device: str = "cpu", *, four_bit: bool = False, adapter: Adapter | None = None) -> nn.Module:
    """Return the model of a base folder, in the dtype it is stored in, in evaluation mode; with `four_bit` its linear
    layers are quantized to NF4. With an `adapter` of a task that carries a head, it has the class of that task, and as
    many labels as that head. Raises E-BASE with what transformers says if it cannot load it, E-PLACE if that class
    needs weights that neither has, E-OPTION for a device that the machine lacks, E-DEPENDENCY without bitsandbytes."""
    import transformers

    device = resolved(device)
    torch_device(device)
    mistaken.check_base(base)
    if four_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise DependencyError("4-bit bases need bitsandbytes", fix="pip install 'lrconvert[gpu]'")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
        named = (getattr(config, "architectures", None) or [""])[0]
        kind: Any = getattr(transformers, named, transformers.AutoModel)
        options: dict[str, Any] = {"dtype": "auto"}
        task = None if adapter is None else task_class.needed(adapter, config, named)
        if task is not None:
            kind = getattr(transformers, task.name)
            options |= {"num_labels": task.labels, "ignore_mismatched_sizes": True, "output_loading_info": True}
        if four_bit:
            quantization: Any = transformers.BitsAndBytesConfig
            options["quantization_config"] = quantization(load_in_4bit=True, bnb_4bit_quant_type="nf4")
            options["device_map"] = {"": device}
        with quiet() if task is not None else nullcontext():  # the head that is made up here is not used
            loaded = kind.from_pretrained(base, local_files_only=True, **options)
        model: nn.Module = loaded if task is None else loaded[0]
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise BaseError(f"transformers cannot load the base: {_first_line(error)}", path=base) from None
    if adapter is not None and task is not None:
        info = loaded[1]
        made_up = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
        task_class.check(adapter, NameIndex(dict(model.state_dict()), families_of(model)), made_up, base)
        settings: Any = model.config
        if getattr(settings, "pad_token_id", None) is None:  # by which a decoder finds the end of each text
            settings.pad_token_id = _pad_of(base)
    if not four_bit:
        return model.to(device).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # a layout for inference alone, and not of all widths
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 -- unknown to torch's stubs
    return model.eval()


def _pad_of(base: Path) -> int:
    """The token that texts are padded with: that of the tokenizer, or 0."""
    try:
        return int(load_tokenizer(base).pad_token_id or 0)
    except DataError:
        return 0


def load_tokenizer(base: Path) -> Any:
    """Return the tokenizer of a base folder. Raises E-DATA if it has none."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            f"the base has no tokenizer that transformers can load: {_first_line(error)}",
            fix=either("give batches of model inputs instead of texts", "give batches of model inputs, in Python"),
            path=base,
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def tokenizer_of(model: nn.Module, base: Path | None) -> Any:
    """Return the tokenizer of a base folder, or of the one that a live model names. Raises E-DATA."""
    return load_tokenizer(base or Path(str(getattr(getattr(model, "config", None), "name_or_path", ""))))


# --- facts about a model --------------------------------------------------------------------------------------------


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether a model's configuration says that it has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def kind_of(model: nn.Module) -> str:
    """Return how a model reads texts: ``decoder``, ``encoder`` or ``encoder-decoder``."""
    if is_encoder_decoder(model):
        return "encoder-decoder"
    name = type(model).__name__
    writes = bool(getattr(model, "can_generate", lambda: False)())
    return "decoder" if writes or "CausalLM" in name or "LMHead" in name else "encoder"


def longest_input(model: nn.Module, tokenizer: Any, length: int) -> int:
    """Return `length`, or what the model and its tokenizer take if that is less."""
    config: Any = getattr(model, "config", None)
    limits = (getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None))
    return min([length, *(limit for limit in limits if isinstance(limit, int) and 0 < limit < 1 << 30)])


def families_of(model: nn.Module) -> tuple[str, ...]:
    """Return the model types that a live model's configuration names."""
    config: Any = getattr(model, "config", None)
    return tuple(dict.fromkeys(renamings.families(config.to_dict() if hasattr(config, "to_dict") else {})))


def classes_of(model: nn.Module) -> dict[str, int]:
    """Return the numbers of the classes that a model's configuration names (`label2id`)."""
    config: Any = getattr(model, "config", None)
    return {str(name): int(n) for name, n in (getattr(config, "label2id", None) or {}).items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; afterwards the modules that were in training mode are so again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
