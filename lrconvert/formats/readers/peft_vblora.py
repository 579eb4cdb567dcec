"""PEFT VB-LoRA: the bank, and logits or top-k codes of every sub-vector, read as a compact adapter without loss.

The bank keeps its float32 numbers. Of full logits the top k count, softmax over them, as PEFT computes; of top-k files
the stored weights, and what they leave for the last vector. Paper: VB-LoRA, arXiv 2405.15179.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.core.dtypes import F32, Array
from lrconvert.core.errors import (
    ConfigError,
    EmptyAdapterError,
    LrcError,
    PairError,
    ShapeError,
    TensorUnknownError,
    ValueRangeError,
)
from lrconvert.formats.readers.base import CONFIG_NAME, Reader
from lrconvert.formats.readers.peft import WEIGHTS_NAME
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.io.container import ContainerFile, TensorInfo, combined_digest, config_text, read_json, tensor_digest
from lrconvert.lora.adapter import MATRIX, TRANSPOSED, CompactAdapter, ExtraTensor, Provenance, Target
from lrconvert.lora.fingerprint import fingerprint
from lrconvert.methods.vblora import METHOD
from lrconvert.methods.vblora.form import EXACT, Form, canonical_codes, complete

BANK = "base_model.vblora_vector_bank"
_PREFIX = "base_model.model."
_CODES = re.compile(r"(?P<module>.+)\.vblora_logits_(?P<half>[AB])(?P<kind>|_topk_indices|_topk_weights)")
_NUMBERS = ("r", "num_vectors", "vector_length", "topk")

Halves = dict[
    str, dict[str, TensorInfo]
]  # {"A": {"": info} or {"_topk_indices": info, "_topk_weights": info}, "B": ...}


def recognises(path: Path) -> bool:
    """A folder whose configuration says VBLORA, or a file with a vector bank."""
    try:
        if path.is_dir():
            return read_json(path / CONFIG_NAME).get("peft_type") == "VBLORA"
        with ContainerFile(path) as file:
            return BANK in file.by_name
    except LrcError:
        return False


def read(path: Path, options: ReadOptions) -> CompactAdapter:
    """See the module's docstring. Raises E-CONFIG, E-PAIR, E-SHAPE, E-TENSOR, E-VALUE, E-INDEX, E-EMPTY."""
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / CONFIG_NAME)
    try:
        rank, h, b, k = (_integer(config, key) for key in _NUMBERS)
    except LrcError as error:
        raise error.at(folder / CONFIG_NAME) from None
    with ContainerFile(folder / WEIGHTS_NAME if path.is_dir() else path) as file:
        modules, extras = _sort(file)
        info = file.by_name.get(BANK)
        if info is None or info.shape != (h, b):
            raise ShapeError(f"the tensor {BANK!r} is {list(info.shape) if info else 'missing'}; expected {[h, b]}")
        bank = _finite(file.load(info).decode(), BANK)
        targets, codes = [], []
        for module, halves in modules.items():
            a, right = (_codes(file, module, half, halves.get(half, {}), k) for half in "AB")
            if a[0].shape[0] != rank or right[0].shape[1] != rank:
                raise PairError(f"{module}: the codes of A and B are not of rank {rank}, as r says")
            out, inner = right[0].shape[0] * b, a[0].shape[1] * b
            turned = bool(config.get("fan_in_fan_out"))
            shape, view = ((inner, out), TRANSPOSED) if turned else ((out, inner), MATRIX)
            rows = [[part.reshape(-1, part.shape[2]) for part in a]]
            rows.append([np.ascontiguousarray(part.swapaxes(0, 1)).reshape(-1, part.shape[2]) for part in right])
            targets.append(Target(f"{module}.weight", shape, view))
            codes.append(tuple(np.concatenate(parts) for parts in zip(*rows, strict=True)))
        source = combined_digest(
            (i.name, tensor_digest(i.name, i.dtype, i.shape, [file.read(i)])) for i in file.tensors
        )
        file.check_unchanged()
    order = sorted(range(len(targets)), key=lambda n: targets[n])
    listed = tuple(targets[n] for n in order)
    indices, weights = (np.concatenate([codes[n][part] for n in order]) for part in (0, 1))
    form = Form(b, h, k, EXACT, EXACT if k > 1 else 0, gains=False)
    tensors: dict[str, Array] = {"bank": bank, **_canonical(indices, weights)}
    adapter = complete(form, listed, [rank] * len(listed), [])
    METHOD.check(adapter, listed, tensors)
    base_model, revision, task = (config_text(config, k) for k in ("base_model_name_or_path", "revision", "task_type"))
    came = Provenance(source, base_model, revision, task, {"source_format": "peft-vblora"})
    return CompactAdapter("vblora", adapter, listed, tensors, extras, came, fingerprint(listed))


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ConfigError(f"{key} is {value!r:.60}, expected a positive integer", fix=f"correct {CONFIG_NAME}")
    return value


def _sort(file: ContainerFile) -> tuple[dict[str, Halves], tuple[ExtraTensor, ...]]:
    """({module: halves}, extras), both sorted. Raises E-TENSOR for a name without a place."""
    modules: dict[str, Halves] = {}
    extras = []
    for info in file.tensors:
        name = info.name.removeprefix(_PREFIX)
        found = _CODES.fullmatch(name)
        if info.name == BANK:
            continue
        if name == info.name or (found is None and ".vblora_" in name):
            raise TensorUnknownError(
                f"tensor {info.name!r:.200} is no part of a PEFT VB-LoRA", fix="is this a PEFT file?"
            )
        if found:
            modules.setdefault(found["module"], {}).setdefault(found["half"], {})[found["kind"]] = info
        else:
            extras.append(ExtraTensor(name, info.dtype, info.shape, bytes(file.read(info))))
    if not modules:
        raise EmptyAdapterError("the file holds no codes of any module", fix="is it an adapter that was saved empty?")
    return dict(sorted(modules.items())), tuple(sorted(extras, key=lambda extra: extra.name))


def _codes(file: ContainerFile, module: str, half: str, parts: dict[str, TensorInfo], k: int) -> tuple[Array, F32]:
    """(indices (n, m, k), weights (n, m, k - 1) of all but the last) as PEFT stores them, n and m in its order."""
    if set(parts) == {""}:
        logits = _finite(file.load(parts[""]).decode(), parts[""].name)
        if logits.ndim != 3 or logits.shape[2] < k:
            raise ShapeError(f"{module}: the logits of {half} are {list(logits.shape)}")
        indices = np.argsort(-logits, axis=2, kind="stable")[:, :, :k]
        top = np.take_along_axis(logits, indices, 2)
        weights = np.exp(top - top[:, :, :1], dtype=np.float32)
        return indices, (weights / weights.sum(2, keepdims=True))[:, :, :-1]
    if set(parts) != {"_topk_indices", "_topk_weights"}:
        raise PairError(f"{module}: {half} has neither full logits nor top-k indices and weights")
    indices = file.load(parts["_topk_indices"]).array.astype(np.int64)
    weights = _finite(file.load(parts["_topk_weights"]).decode(), parts["_topk_weights"].name)
    if indices.ndim != 3 or indices.shape[2] != k or weights.shape != (*indices.shape[:2], k - 1):
        raise ShapeError(f"{module}: the codes of {half} are {list(indices.shape)} and {list(weights.shape)}")
    return indices, weights


def _finite(values: Array, name: str) -> F32:
    if values.dtype.kind != "f" or not np.isfinite(values).all():
        raise ValueRangeError(f"tensor {name!r} holds NaN, infinity or no floats")
    return values.astype(np.float32)


def _canonical(indices: Array, weights: F32) -> dict[str, Array]:
    """Codes as `vblora` spells them. PEFT's last vector, which takes what the others leave, comes first."""
    if indices.min() < 0:
        raise ValueRangeError("an index is negative")
    if weights.shape[1] == 0:
        return {"indices": indices.astype(np.uint32)}
    over = np.maximum(weights.astype(np.float64).sum(1) - 1, 0)
    if over.max() > 1e-5 or weights.min() < 0:
        raise ValueRangeError("the weights of a code are negative or add up to more than 1")
    weights = weights.copy()
    low = np.nextafter((weights[:, 0] - over).astype(np.float32), np.float32(0))
    weights[:, 0] = np.where(over > 0, low, weights[:, 0])  # rounding alone: the last vector has weight zero
    first = np.full((len(weights), 1), np.inf)
    indices, units = canonical_codes(np.roll(indices, 1, axis=1), np.concatenate([first, weights], axis=1))
    return {"indices": indices.astype(np.uint32), "weights": units[:, 1:].astype(np.float32)}


READER = Reader("peft_vblora", "PEFT VB-LoRA folder", recognises, read)
