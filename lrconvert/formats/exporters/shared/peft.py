"""Pieces that PEFT's layouts share: the names of modules, the configuration, the checks of its compact forms."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lrconvert.core.errors import ExportError
from lrconvert.core.wording import either, spelled
from lrconvert.formats.exporters.base import Files
from lrconvert.formats.exporters.shared.files import Entry, json_file, weights_file
from lrconvert.formats.exporters.shared.plain import module_of
from lrconvert.lora.adapter import Adapter, CompactAdapter, LoraAdapter, Target

USAGE = """python
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{adapter}")"""
_EMBEDDING = re.compile(r"embed|^wte$|^wpe$")


def folder(adapter: Adapter, settings: dict[str, Any], tensors: Iterable[Entry]) -> Files:
    """Return the two files of a PEFT folder."""
    return {"adapter_config.json": json_file(settings), "adapter_model.safetensors": weights_file(tensors, adapter)}


def base_settings(adapter: Adapter, modules: Sequence[str]) -> dict[str, Any]:
    """Return the fields that every PEFT configuration has."""
    provenance = adapter.provenance
    return {
        "base_model_name_or_path": provenance.base_model or None,
        "revision": provenance.revision or None,
        "task_type": provenance.task_type or None,
        "inference_mode": True,
        "bias": "none",
        "target_modules": sorted(modules),
        "modules_to_save": None,
    }


def endings(name: str) -> Iterator[str]:
    """Yield what PEFT takes for a shorter spelling of a name: ``a.b.c`` ends with ``b.c`` and ``c``."""
    parts = name.split(".")
    return (".".join(parts[n:]) for n in range(1, len(parts)))


def is_embedding(adapter: Adapter, target: Target) -> bool:
    """Return True for an embedding: the source says so, or its name does; stored transposed may be a Conv1D too."""
    module = target.name.removesuffix(".weight")
    listed = module in adapter.provenance.fields.get("embeddings", "").split(",")
    return target.view.kind == "transposed" and (listed or _EMBEDDING.search(module.rpartition(".")[2]) is not None)


# --- compact forms --------------------------------------------------------------------------------------------------


def of_method(adapter: Adapter, method: str, layout: str) -> CompactAdapter:
    """Return the adapter if it is of this method. Raises E-EXPORT for any other."""
    if isinstance(adapter, LoraAdapter):
        fix = f"convert it with {_compatible(method)}, or export to peft-lora"
        raise ExportError(f"{layout} is a form of its own, and this is a plain LoRA", fix=fix)
    if adapter.method != method:
        raise ExportError(f"the file holds a {adapter.method} adapter, not {method}", fix="export it to peft-lora")
    return adapter


def _compatible(method: str) -> str:
    """The making of a form that PEFT has."""
    return either(f"convert(..., {method!r}, peft_compatible=True)", f"`lora-to-{method} --peft-compatible`")


def check_form(adapter: Adapter, layout: str, features: Mapping[str, bool], method: str) -> None:
    """Raise E-EXPORT for parts of an update beside the form, and for `features` that it has and `layout` has not;
    `method` makes one without."""
    beside = [e.name for e in adapter.extras if e.use != "replace"]
    if beside:
        what = f"{layout} has no place for a part of the update: {beside[0]!r}"
        raise ExportError(what, fix="export to peft-lora")
    present = [feature for feature, is_present in features.items() if is_present]
    if present:
        fix = f"convert again with {_compatible(method)}, or export to peft-lora"
        raise ExportError(f"{layout} has no {', no '.join(present)}", fix=fix)


def linear_module(target: Target, layout: str, is_linear: bool) -> str:
    """Return the module of a linear layer. Raises E-EXPORT for any other target."""
    if not is_linear:
        raise ExportError(
            f"{target.name!r} ({target.view.text}) is no linear layer; {layout} has these only",
            fix=f"export to peft-lora, or convert it with {spelled('exclude', ...)} for these targets",
        )
    return module_of(target, layout)
