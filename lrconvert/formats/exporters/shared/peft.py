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
from lrconvert.lora.adapter import CompactAdapter, Target

_EMBEDDING = re.compile(r"embed|^wte$|^wpe$")


def folder(compact: CompactAdapter, settings: dict[str, Any], tensors: Iterable[Entry]) -> Files:
    """Return the two files of a PEFT folder."""
    return {"adapter_config.json": json_file(settings), "adapter_model.safetensors": weights_file(tensors, compact)}


def base_settings(compact: CompactAdapter, modules: Sequence[str]) -> dict[str, Any]:
    """Return the fields that every PEFT configuration has."""
    provenance = compact.provenance
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


def is_embedding(compact: CompactAdapter, target: Target) -> bool:
    """Return True for an embedding: the source says so, or its name does; stored transposed may be a Conv1D too."""
    module = target.name.removesuffix(".weight")
    listed = module in compact.provenance.fields.get("embeddings", "").split(",")
    return target.view.kind == "transposed" and (listed or _EMBEDDING.search(module.rpartition(".")[2]) is not None)


# --- compact forms --------------------------------------------------------------------------------------------------


def check_method(compact: CompactAdapter, method: str) -> None:
    """Raise E-EXPORT for an adapter of another method."""
    if compact.method != method:
        raise ExportError(f"the file holds a {compact.method} adapter, not {method}", fix="export it to peft-lora")


def check_form(compact: CompactAdapter, layout: str, features: Mapping[str, bool], method: str) -> None:
    """Raise E-EXPORT for parts of an update beside the form, and for `features` that it has and `layout` has not;
    `method` makes one without."""
    beside = [e.name for e in compact.extras if e.use != "replace"]
    if beside:
        what = f"{layout} has no place for a part of the update: {beside[0]!r}"
        raise ExportError(what, fix="export to peft-lora")
    present = [feature for feature, is_present in features.items() if is_present]
    if present:
        again = either(f"convert(..., {method!r}, peft_compatible=True)", f"`lora-to-{method} --peft-compatible`")
        fix = f"convert again with {again}, or export to peft-lora"
        raise ExportError(f"{layout} has no {', no '.join(present)}", fix=fix)


def linear_module(target: Target, layout: str, is_linear: bool) -> str:
    """Return the module of a linear layer. Raises E-EXPORT for any other target."""
    if not is_linear:
        raise ExportError(
            f"{target.name!r} ({target.view.text}) is no linear layer; {layout} has these only",
            fix=f"export to peft-lora, or convert again with {spelled('exclude', ...)} for these targets",
        )
    return module_of(target, layout)
