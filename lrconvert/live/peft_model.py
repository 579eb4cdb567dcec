"""Any adapter as an adapter of PEFT's on a live model, in memory.

The exporter says what PEFT calls everything and which settings that needs; nothing is written to a disk. PEFT computes
``x + alpha / r * B (A x)`` with alpha = r, so that its outputs are ours up to the order of sums.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import safetensors.torch
from torch import nn

from lrconvert.core.errors import AttachError, DependencyError, ExportError
from lrconvert.formats import base_class
from lrconvert.formats.exporters.base import Exporter, ExportOptions, Folder
from lrconvert.formats.exporters.peft_lora import EXPORTER as PEFT_LORA
from lrconvert.formats.exporters.peft_miss import EXPORTER as PEFT_MISS
from lrconvert.live.attached_adapter import Adapter
from lrconvert.lora.adapter import CompactAdapter
from lrconvert.methods import base as methods

if TYPE_CHECKING:
    from peft import PeftModel


def peft_model(model: nn.Module, adapter: Adapter, name: str, trainable: bool) -> PeftModel:
    """Return a `PeftModel` around `model`, or the one that it is, with `adapter` under `name`, active. See
    `lrconvert.api.peft_model`."""
    try:
        import peft
    except ImportError:
        raise DependencyError("PEFT is not installed", fix="pip install 'lrconvert[peft]'") from None
    settings, tensors = _in_memory(adapter, model)
    peft_type = settings.pop("peft_type")
    config = peft.get_peft_config({"peft_type": peft_type, **settings, "inference_mode": not trainable})
    wrapped: PeftModel | None = model if isinstance(model, peft.PeftModel) else None
    if wrapped is not None and name in wrapped.peft_config:
        raise AttachError(f"the name {name!r:.80} is taken", fix="give another name")
    try:
        if wrapped is not None:
            wrapped.add_adapter(name, config)
        else:
            wrapped = peft.get_peft_model(model, config, adapter_name=name)
    except (TypeError, ValueError) as error:
        raise AttachError(f"PEFT does not take the adapter: {error!s:.400}") from None
    _load(wrapped, name, tensors)
    wrapped.set_adapter(name, inference_mode=not trainable)
    return wrapped


def _in_memory(adapter: Adapter, model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings and the tensors of the adapter as PEFT stores them, every module with its own rank."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    # As it is in a config.json: of other types than JSON's, and of keys that are numbers, a text.
    base = None if to_dict is None else json.loads(json.dumps(to_dict(), default=str))
    named, _ = base_class.renamed(adapter, base)
    exporter = _exporter(named)
    made = exporter.files(named, ExportOptions(keep_ranks=exporter is PEFT_LORA, base_config=base))
    files = made.files if isinstance(made, Folder) else made
    content = {file: b"".join(pieces) for file, pieces in files.items()}
    settings: dict[str, Any] = json.loads(content["adapter_config.json"])
    return settings, safetensors.torch.load(content["adapter_model.safetensors"])


def _exporter(adapter: Adapter) -> Exporter:
    """Return the layout for an adapter: PEFT's LoRA, or for updates that depend on the base's weights its MiSS."""
    return PEFT_MISS if isinstance(adapter, CompactAdapter) and methods.needs_base(adapter) else PEFT_LORA


def _load(wrapped: PeftModel, name: str, tensors: dict[str, Any]) -> None:
    """Put the tensors into the adapter that PEFT has made; all of both sides are used, or E-EXPORT says which not."""
    import peft

    loaded: Any = peft.set_peft_model_state_dict(wrapped, tensors, adapter_name=name)
    lacking = [key for key in loaded.missing_keys if f".{name}." in key or key.endswith(f".{name}")]
    for what, keys in (("has no place for", loaded.unexpected_keys), ("got no values for", lacking)):
        if keys:
            wrapped.delete_adapter(name)
            raise ExportError(f"PEFT {what} {keys[0]!r:.160}", fix="attach it with lrconvert.attach instead")
