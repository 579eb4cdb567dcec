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
from lrconvert.live.attach import attached
from lrconvert.live.attached_adapter import Adapter
from lrconvert.live.task_class import advice
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
    wrapped: PeftModel | None = model if isinstance(model, peft.PeftModel) else None
    if not name or "." in name:
        raise AttachError(f"the name {name!r:.80} is none that PEFT takes", fix="give one without dots")
    if wrapped is not None and name in wrapped.peft_config:
        raise AttachError(f"the name {name!r:.80} is taken", fix="give another name")
    if attached(model):
        fix = "take them off with lrconvert.detach(model)"
        raise AttachError("the model has adapters that lrconvert attached", fix=fix)
    named, base = _in_class(adapter, model)
    _check_places(named, model if wrapped is None else wrapped.get_base_model())
    settings, tensors = _in_memory(named, base)
    settings |= _base_of(model)
    config = peft.get_peft_config({**settings, "inference_mode": not trainable})
    try:
        if wrapped is not None:
            wrapped.add_adapter(name, config)
        else:
            wrapped = peft.get_peft_model(model, config, adapter_name=name)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise AttachError(f"PEFT does not take the adapter: {said:.300}", fix=advice(adapter)) from None
    _load(wrapped, name, tensors)
    wrapped.set_adapter(name, inference_mode=not trainable)
    return wrapped


def _in_class(adapter: Adapter, model: nn.Module) -> tuple[Adapter, dict[str, Any] | None]:
    """Return the adapter under the names of the model's class, and the model's configuration as a config.json has it:
    other types than JSON's, and keys that are numbers, are texts."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    base = None if to_dict is None else json.loads(json.dumps(to_dict(), default=str))
    return base_class.renamed(adapter, base)[0], base


def _check_places(adapter: Adapter, model: nn.Module) -> None:
    """Raise E-ATTACH if the model lacks a parameter that the adapter changes, or has a head of another size: PEFT would
    say so after it has changed the model, which may carry adapters of PEFT's already."""
    shapes = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): list(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    replaced = [extra for extra in adapter.extras if extra.use == "replace"]
    heads = {extra.name.replace(".base_layer.", "."): list(extra.shape) for extra in replaced}
    lacking = [name for name in (*(target.name for target in adapter.shapes()), *heads) if name not in shapes]
    title = type(model).__name__
    if lacking:
        more = f", nor {len(lacking) - 1} other parameters that the adapter changes" if len(lacking) > 1 else ""
        raise AttachError(f"{title} has no {lacking[0]!r:.160}{more}", fix=advice(adapter))
    for name, shape in heads.items():
        if shapes[name] != shape:
            raise AttachError(f"{name!r:.160} is {shape}, {shapes[name]} in {title}", fix=advice(adapter))


def _in_memory(named: Adapter, base: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings and the tensors of an adapter as PEFT stores them, every module with its own rank."""
    exporter = _exporter(named)
    made = exporter.files(named, ExportOptions(keep_ranks=exporter is PEFT_LORA, base_config=base))
    files = made.files if isinstance(made, Folder) else made
    content = {file: b"".join(pieces) for file, pieces in files.items()}
    settings: dict[str, Any] = json.loads(content["adapter_config.json"])
    return settings, safetensors.torch.load(content["adapter_model.safetensors"])


def _base_of(model: nn.Module) -> dict[str, str]:
    """Return the setting that names the base, as PEFT would set it itself with a warning; none without a name."""
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    return {"base_model_name_or_path": name} if name else {}


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
