"""PEFT VB-LoRA: the bank, and logits or top-k codes of every sub-vector, read as a compact adapter without loss.

The bank keeps its float32 numbers. Of full logits the top k count, softmax over them, as PEFT computes; of top-k files
the stored weights, and what they leave for the last vector. Paper: VB-LoRA, arXiv 2405.15179.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.core import errors
from lrconvert.core.dtypes import F32, Array
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.shared.config import Count, check_known
from lrconvert.formats.readers.shared.folders import PEFT_WEIGHTS, config_path, peft_type, weights_in
from lrconvert.formats.readers.shared.notes import beside, notes_of
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import sort_extras
from lrconvert.formats.readers.shared.weights import Weights, load_extra, open_weights, source_digest
from lrconvert.io import fields
from lrconvert.io.container import TensorInfo, read_json
from lrconvert.lora.adapter import MATRIX, TRANSPOSED, CompactAdapter, ExtraTensor, Provenance, Target
from lrconvert.lora.fingerprint import fingerprint
from lrconvert.methods.vblora import METHOD
from lrconvert.methods.vblora.form import EXACT, Form, canonical_codes, complete

BANK = "base_model.vblora_vector_bank"
_PREFIX = "base_model.model."
# Fields that say how the adapter was trained or placed, and not what its update is.
_NO_EFFECT = frozenset(
    (
        *("auto_mapping", "bias", "exclude_modules", "inference_mode", "init_logits_std", "init_vector_bank_bound"),
        *("layers_pattern", "layers_to_transform", "modules_to_save", "peft_type", "peft_version"),
        *("runtime_config", "save_only_topk_weights", "target_modules", "vblora_dropout"),
    )
)
_CODES = re.compile(r"(?P<module>.+)\.vblora_logits_(?P<half>[AB])(?P<kind>|_topk_indices|_topk_weights)")

Halves = dict[str, dict[str, TensorInfo]]  # {"A": {"": logits} or {"_topk_indices": ..., "_topk_weights": ...}, "B": }


@dataclass(frozen=True)
class _Settings:
    """The fields of the configuration that are read."""

    r: Count
    num_vectors: Count
    vector_length: Count
    topk: Count
    fan_in_fan_out: Any = False
    base_model_name_or_path: str = ""
    revision: str = ""
    task_type: str = ""


def recognises(path: Path) -> bool:
    """Return whether a folder's configuration says VBLORA, or a file has a vector bank."""
    if path.is_dir():
        return peft_type(path) == "VBLORA"
    try:
        with open_weights(path, ReadOptions()) as file:
            return any(info.name == BANK for info in file.tensors)
    except errors.LrcError:
        return False


def read(path: Path, options: ReadOptions) -> CompactAdapter:
    """Read a VB-LoRA. Raises E-CONFIG, E-PAIR, E-SHAPE, E-TENSOR, E-VALUE, E-INDEX, E-EMPTY."""
    config = read_json(config_path(path))
    try:
        check_known(config, _NO_EFFECT | fields.names(_Settings))
        settings = fields.read_config(_Settings, config)
    except errors.LrcError as error:
        raise error.at(config_path(path)) from None
    rank, length = settings.r, settings.vector_length
    with open_weights(weights_in(path, PEFT_WEIGHTS), options) as file:
        modules, extras = _sort(file)
        bank = _bank(file, (settings.num_vectors, length))
        codes = {}
        for module, halves in modules.items():
            a, b = (_codes(file, module, half, halves.get(half, {}), settings.topk) for half in "AB")
            if a[0].shape[0] != rank or b[0].shape[1] != rank:
                raise errors.PairError(f"{module}: the codes of A and B are not of rank {rank}, as r says")
            out, inner = b[0].shape[0] * length, a[0].shape[1] * length
            shape, view = ((inner, out), TRANSPOSED) if settings.fan_in_fan_out else ((out, inner), MATRIX)
            codes[Target(f"{module}.weight", shape, view)] = [
                np.concatenate([_rows(of_a), _rows(np.swapaxes(of_b, 0, 1))]) for of_a, of_b in zip(a, b, strict=True)
            ]
        source, notes = source_digest(file), notes_of(file)
    targets = tuple(sorted(codes))
    indices, weights = (np.concatenate([codes[target][part] for target in targets]) for part in (0, 1))
    form = Form(length, settings.num_vectors, settings.topk, EXACT, EXACT if settings.topk > 1 else 0, gains=False)
    tensors: dict[str, Array] = {"bank": bank, **_canonical(indices, weights)}
    adapter = complete(form, targets, [rank] * len(targets), [])
    METHOD.check(adapter, targets, tensors)
    hints = (settings.base_model_name_or_path, settings.revision, settings.task_type)
    provenance = Provenance(source, *hints, fields={"source_format": "peft-vblora"})
    names = fingerprint(targets)
    notes += beside(extra.name for extra in extras)
    return CompactAdapter("vblora", adapter, targets, tensors, extras, provenance, names, tuple(notes))


def _bank(file: Weights, shape: tuple[int, int]) -> F32:
    info = next((info for info in file.tensors if info.name == BANK), None)
    if info is None or info.shape != shape:
        stored = list(info.shape) if info else "missing"
        raise errors.ShapeError(f"the tensor {BANK!r} is {stored}; expected {list(shape)}")
    return _finite(file.load(info).decode(), BANK)


def _rows(part: Array) -> Array:
    """Return the codes of a half one after the other."""
    return np.ascontiguousarray(part).reshape(-1, part.shape[2])


def _sort(file: Weights) -> tuple[dict[str, Halves], tuple[ExtraTensor, ...]]:
    """Return ({module: halves}, extras), both sorted. Raises E-TENSOR for a name without a place."""
    modules: dict[str, Halves] = {}
    extras = []
    for info in file.tensors:
        name = info.name.removeprefix(_PREFIX)
        match = _CODES.fullmatch(name)
        if info.name == BANK:
            continue
        if name == info.name or (match is None and ".vblora_" in name):
            what = f"tensor {info.name!r:.200} is no part of a PEFT VB-LoRA"
            raise errors.TensorUnknownError(what, fix="is this a PEFT file?")
        if match:
            modules.setdefault(match["module"], {}).setdefault(match["half"], {})[match["kind"]] = info
        else:
            extras.append(load_extra(name, info, file))
    if not modules:
        raise errors.EmptyAdapterError("the file holds no codes of any module", fix="was it saved empty?")
    return dict(sorted(modules.items())), sort_extras(extras)


def _codes(file: Weights, module: str, half: str, parts: dict[str, TensorInfo], k: int) -> tuple[Array, F32]:
    """Return (indices (n, m, k), weights (n, m, k - 1) of all but the last) as PEFT stores them, in its order."""
    if set(parts) == {""}:
        logits = _finite(file.load(parts[""]).decode(), parts[""].name)
        if logits.ndim != 3 or logits.shape[2] < k:
            raise errors.ShapeError(f"{module}: the logits of {half} are {list(logits.shape)}")
        indices = np.argsort(-logits, axis=2, kind="stable")[:, :, :k]
        top = np.take_along_axis(logits, indices, 2)
        weights = np.exp(top - top[:, :, :1], dtype=np.float32)
        return indices, (weights / weights.sum(2, keepdims=True))[:, :, :-1]
    if set(parts) != {"_topk_indices", "_topk_weights"}:
        raise errors.PairError(f"{module}: {half} has neither full logits nor top-k indices and weights")
    indices = file.load(parts["_topk_indices"]).array.astype(np.int64)
    weights = _finite(file.load(parts["_topk_weights"]).decode(), parts["_topk_weights"].name)
    if indices.ndim != 3 or indices.shape[2] != k or weights.shape != (*indices.shape[:2], k - 1):
        raise errors.ShapeError(f"{module}: the codes of {half} are {list(indices.shape)} and {list(weights.shape)}")
    return indices, weights


def _finite(values: Array, name: str) -> F32:
    if values.dtype.kind != "f" or not np.isfinite(values).all():
        raise errors.ValueRangeError(f"tensor {name!r} holds NaN, infinity or no floats")
    return values.astype(np.float32)


def _canonical(indices: Array, weights: F32) -> dict[str, Array]:
    """Return codes as `vblora` spells them. PEFT's last vector, which takes what the others leave, comes first."""
    if indices.min() < 0:
        raise errors.ValueRangeError("an index is negative")
    if weights.shape[1] == 0:
        return {"indices": indices.astype(np.uint32)}
    over = np.maximum(weights.astype(np.float64).sum(1) - 1, 0)
    if over.max() > 1e-5 or weights.min() < 0:
        raise errors.ValueRangeError("the weights of a code are negative or add up to more than 1")
    weights = weights.copy()
    low = np.nextafter((weights[:, 0] - over).astype(np.float32), np.float32(0))
    weights[:, 0] = np.where(over > 0, low, weights[:, 0])  # rounding alone: the last vector has weight zero
    first = np.full((len(weights), 1), np.inf)
    indices, units = canonical_codes(np.roll(indices, 1, axis=1), np.concatenate([first, weights], axis=1))
    return {"indices": indices.astype(np.uint32), "weights": units[:, 1:].astype(np.float32)}


READER = Reader("peft_vblora", "PEFT VB-LoRA folder", read, recognises)
