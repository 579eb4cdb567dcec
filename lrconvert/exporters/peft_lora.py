"""PEFT LoRA: the one form that every server loads. The scale is baked in, and all modules get one rank by default
(alpha = r, zero-padded, no patterns), because several servers ignore rank_pattern, alpha_pattern or rsLoRA.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from lrconvert import __version__
from lrconvert.adapter import CompactAdapter, Target
from lrconvert.container import encode_header
from lrconvert.dtypes import Array, round_to
from lrconvert.errors import ExportError
from lrconvert.exporters.base import Exporter, ExportOptions, Files
from lrconvert.methods import base as methods
from lrconvert.modelcard import model_card
from lrconvert.report import Fidelity

PREFIX = "base_model.model."


_EMBEDDING = re.compile(r"embed|^wte$|^wpe$")
_USE_NAMES = {
    "add": "trained bias of its LoRA",
    "magnitude": "DoRA magnitude",
    "rows": "list of trained token rows",
    "row_indices": "list of trained token rows",
}


def module_name(target: Target) -> str:
    """The module of a linear layer. Raises E-EXPORT for what PEFT stores in another way than lora_A and lora_B."""
    module = target.name.removesuffix(".weight")
    embedding = target.view.kind == "transposed" and _EMBEDDING.search(module.rpartition(".")[2])
    if target.view.kind not in ("matrix", "transposed") or embedding or module == target.name:
        raise ExportError(
            f"{target.name!r} ({target.view.text}) is no linear layer; this export writes linear layers only",
            fix="convert again with --exclude for these targets",
        )
    return module


def base_config(compact: CompactAdapter, modules: list[str]) -> dict[str, Any]:
    """Fields that every PEFT configuration has."""
    came = compact.provenance
    return {
        "base_model_name_or_path": came.base_model or None,
        "revision": came.revision or None,
        "task_type": came.task_type or None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": any(t.view.kind == "transposed" for t in compact.targets),
        "target_modules": sorted(modules),
        "modules_to_save": saved_modules(compact) or None,
    }


def saved_modules(compact: CompactAdapter) -> list[str]:
    """The modules_to_save that place every extra: the source's own list if it does, else the extras' modules."""
    owners = sorted({e.name.rpartition(".")[0] for e in compact.extras})
    if "" in owners:
        raise ExportError("an extra tensor belongs to no module, PEFT cannot place it")
    listed = [m for m in compact.provenance.fields.get("modules_to_save", "").split(",") if m]
    return listed if all(_placed(owner, listed) for owner in owners) else owners


def _placed(owner: str, modules: list[str]) -> bool:
    """Whether PEFT's rule (a module's path ends with a listed name) saves the module `owner` or one around it."""
    parts = owner.split(".")
    paths = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(path.endswith(m) for path in paths for m in modules)


def extra_tensors(compact: CompactAdapter) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """The extras under PEFT's names. Raises E-EXPORT for parts of the update that stand beside the factors."""
    for extra in compact.extras:
        if extra.use != "replace":
            raise ExportError(
                f"{extra.name!r} has a {_USE_NAMES[extra.use]}, which this export does not write yet",
                fix="keep the lrconvert file; without this tensor the model would answer otherwise",
            )
    return [(PREFIX + e.name, e.dtype, e.shape, e.data) for e in compact.extras]


def weights_file(tensors: list[tuple[str, str, tuple[int, ...], bytes]]) -> Iterator[bytes]:
    """A safetensors file in pieces."""
    yield encode_header([(name, dtype, shape) for name, dtype, shape, _ in tensors], {"format": "pt"})
    for *_, data in tensors:
        yield data


def config_file(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def files(compact: CompactAdapter, options: ExportOptions, fidelity: Fidelity | None) -> Files:
    """See the module's docstring. Raises E-EXPORT if nothing is left or a target is no linear layer."""
    factors = [(module_name(t), a, b) for t, a, b in methods.expand_all(compact) if a.shape[0]]
    if not factors:
        raise ExportError("every target has rank 0, there is nothing to export")
    top = max(a.shape[0] for _, a, _ in factors)
    tensors = extra_tensors(compact)
    for module, a, b in factors:
        rank = a.shape[0] if options.keep_ranks else top
        for half, factor in (("A", _pad(a, rank, 0)), ("B", _pad(b, rank, 1))):
            data = round_to(factor, options.dtype).tobytes()
            tensors.append((f"{PREFIX}{module}.lora_{half}.weight", options.dtype, factor.shape, data))
    ranks = {m: a.shape[0] for m, a, _ in factors if options.keep_ranks and a.shape[0] != top}
    config = {
        **base_config(compact, [m for m, _, _ in factors]),
        "peft_type": "LORA",
        "r": top,
        "lora_alpha": top,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
    }
    return {
        "adapter_config.json": [config_file(config)],
        "adapter_model.safetensors": weights_file(sorted(tensors)),
        "README.md": [model_card(compact, "LoRA", options.command, fidelity)],
        "lrconvert.json": [config_file({"tool": f"lrconvert {__version__}", "source": compact.provenance.source})],
    }


def _pad(factor: Array, rank: int, axis: int) -> Array:
    """`factor` with zero rows or columns up to `rank`."""
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, rank - factor.shape[axis])
    return np.ascontiguousarray(np.pad(factor, widths))


EXPORTER = Exporter("peft-lora", "PEFT LoRA folder, scale baked in, one rank", files)
