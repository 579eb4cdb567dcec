"""PEFT MiSS, and the Bone that it was before PEFT 0.19: blocks (r, out), or (r, mini_r) of the variant "mini", or
(out / r, r, r) of "bat", which repeat along inputs, read as a compact adapter without loss. Paper: arXiv 2409.15371.

The file says how many outputs a layer has (of "mini" not even that), never how many inputs. They are those of the base
(`read_on`: the headers of its files), or stand in the lrconvert.json that `export` writes beside; so does the digest of
the contents of the base, which "bat" depends on. A base that a configuration names is a text of a stranger and is not
opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.core.dtypes import F32, Array
from lrconvert.core.errors import (
    BaseError,
    ConfigError,
    EmptyAdapterError,
    LimitError,
    LrcError,
    PairError,
    ShapeError,
    TensorUnknownError,
    UnsupportedLoraError,
    ValueRangeError,
)
from lrconvert.core.limits import MAX_DIM, MAX_EXPAND_BYTES, MAX_RANK
from lrconvert.formats.readers.base import CONFIG_NAME, Reader
from lrconvert.formats.readers.peft import PICKLE_NAME, WEIGHTS_NAME
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.weights import Weights, load_finite, open_weights, weights_in
from lrconvert.io.container import (
    Checkpoint,
    ContainerFile,
    TensorInfo,
    combined_digest,
    config_text,
    open_checkpoint,
    read_json,
    tensor_digest,
)
from lrconvert.lora import packing
from lrconvert.lora.adapter import MATRIX, CompactAdapter, ExtraTensor, Provenance, Target
from lrconvert.lora.base_names import NameIndex, tied_source
from lrconvert.lora.fingerprint import fingerprint
from lrconvert.methods.bone.form import EXACT, complete

SHAPES_NAME = "lrconvert.json"
_PREFIX = "base_model.model."
_BLOCKS = {"MISS": ".miss_block", "BONE": ".bone_block"}
# Fields that say how the adapter was trained or placed, and not what its update is.
_NO_EFFECT = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode", "layers_pattern"),
        *("layers_to_transform", "miss_dropout", "modules_to_save", "peft_type", "peft_version", "revision"),
        *("target_modules", "task_type"),
    )
)
_READ_HERE = ("init_weights", "mini_r", "r")

Widths = Callable[[str], tuple[int, int]]  # module -> (out, in)


def recognises(path: Path) -> bool:
    """A folder whose configuration says MISS or BONE, or a file with blocks of one of them."""
    try:
        if path.is_dir():
            return read_json(path / CONFIG_NAME).get("peft_type") in _BLOCKS
        with ContainerFile(path) as file:
            return any(info.name.endswith(tuple(_BLOCKS.values())) for info in file.tensors)
    except LrcError:
        return False


def read(path: Path, options: ReadOptions) -> CompactAdapter:
    """See the module's docstring. Raises E-BASE if nothing beside the file says how wide the layers are, E-CONFIG,
    E-LORA-FEATURE, E-TENSOR, E-PAIR, E-SHAPE, E-DTYPE, E-VALUE, E-LIMIT, E-EMPTY, E-PICKLE."""
    if options.base is not None:
        return read_on(path, options.base, options)
    stated = _stated(_folder(path))
    return _read(path, options, _stated_widths(stated), lambda: _stated_content(stated))


def read_on(path: Path, base: Path, options: ReadOptions) -> CompactAdapter:
    """The same, with widths from the base in the folder `base`: headers only but for "bat". Raises E-BASE as well for a
    layer that is not there or has another shape, and the errors of `open_checkpoint`."""
    with open_checkpoint(base) as checkpoint:
        return _read(path, options, _widths_of(checkpoint), checkpoint.content_digest)


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _read(path: Path, options: ReadOptions, widths: Widths, content: Callable[[], str]) -> CompactAdapter:
    folder = _folder(path)
    config = read_json(folder / CONFIG_NAME)
    try:
        kind, rank, mini_rank, is_bat = _settings(config)
        base_model, revision, task = (
            config_text(config, key) for key in ("base_model_name_or_path", "revision", "task_type")
        )
    except LrcError as error:
        raise error.at(folder / CONFIG_NAME) from None
    with open_weights(weights_in(path, (WEIGHTS_NAME, PICKLE_NAME)), options) as weights:
        modules, extras = _sort(weights, _BLOCKS[kind])
        blocks = {}
        for module, info in modules.items():
            out, inner = widths(module)
            _check_shape(module, info, rank, mini_rank, (out, inner), is_bat)
            values = _values(weights, info)
            blocks[Target(f"{module}.weight", (out, inner), MATRIX)] = values.reshape(out, rank).T if is_bat else values
        source = combined_digest(
            (i.name, tensor_digest(i.name, i.dtype, i.shape, [weights.read(i)])) for i in weights.tensors
        )
        weights.check_unchanged()
    targets = tuple(sorted(blocks))
    expanded = sum(4 * rank * sum(target.matrix_shape) for target in targets)
    if expanded > MAX_EXPAND_BYTES:
        raise LimitError(f"the file expands to {expanded} bytes of factors; at most {MAX_EXPAND_BYTES} are allowed")
    bits, numbers = _stored(np.concatenate([blocks[target].reshape(-1) for target in targets]))
    form = complete(targets, [rank] * len(targets), bits=bits, mini_rank=mini_rank, bat=is_bat)
    came = Provenance(source, base_model, revision, task, {"source_format": f"peft-{kind.lower()}"})
    base = replace(fingerprint(targets), content=content()) if is_bat else fingerprint(targets)
    return CompactAdapter("bone", form, targets, {"blocks": numbers}, extras, came, base)


# --- configuration --------------------------------------------------------------------------------------------------


def _settings(config: Mapping[str, Any]) -> tuple[str, int, int, bool]:
    """(MISS or BONE, r, mini_r or 0, whether it is a Bat). Raises E-CONFIG, E-LORA-FEATURE, E-LIMIT."""
    kind = config.get("peft_type")
    if kind not in _BLOCKS:
        raise ConfigError(f"peft_type is {kind!r:.60}, expected one of {', '.join(_BLOCKS)}")
    known = _NO_EFFECT | set(_READ_HERE if kind == "MISS" else ("init_weights", "r"))
    for key in sorted(set(config) - known):
        if config[key] not in (None, False, "", [], {}):
            raise UnsupportedLoraError(
                f"the configuration field {key!r} is not known and is set to {config[key]!r:.60}",
                fix="remove the field if it does not change the update",
            )
    rank = _integer(config, "r")
    if rank > MAX_RANK:
        raise LimitError(f"r is {rank}, above {MAX_RANK}")
    init = config.get("init_weights", True)
    if init == "mini" and kind == "MISS":
        return kind, rank, _integer(config, "mini_r"), False
    if init is not None and not isinstance(init, bool) and init != "bat":
        raise UnsupportedLoraError(
            f"init_weights is {init!r:.60}, a variant of {kind} that is not known",
            fix="true, false, mini and bat are read",
        )
    return kind, rank, 0, init == "bat"


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ConfigError(f"{key} is {value!r:.60}, expected a positive integer", fix=f"correct {CONFIG_NAME}")
    return value


# --- widths of layers -----------------------------------------------------------------------------------------------


def _stated(folder: Path) -> Mapping[str, Any]:
    """What our own export wrote beside the weights."""
    return read_json(folder / SHAPES_NAME) if (folder / SHAPES_NAME).is_file() else {}


def _stated_content(found: Mapping[str, Any]) -> str:
    """The digest of the base's contents. Raises E-BASE, E-CONFIG."""
    content = found.get("base_content")
    if content is None:
        raise BaseError(
            "init_weights is 'bat': the updates depend on the weights of the base",
            fix="give the base that it was trained on",
        )
    if not isinstance(content, str) or not re.fullmatch("[0-9a-f]{64}", content):
        raise ConfigError(f"base_content in {SHAPES_NAME} is {content!r:.80}, no sha256 in hex")
    return content


def _stated_widths(found: Mapping[str, Any]) -> Widths:
    stated = found.get("shapes", {})

    def widths(module: str) -> tuple[int, int]:
        shape = stated.get(module) if isinstance(stated, dict) else None
        if shape is None:
            raise BaseError(
                f"{module}: the file does not say how many inputs the layer has, the base does",
                fix="give the base that it was trained on, or save it as a LoRA (PEFT: save_as_lora) and convert that",
            )
        if not isinstance(shape, list) or [type(n) for n in shape] != [int, int] or not 0 < min(shape) <= max(shape):
            raise ConfigError(f"{module}: the shape in {SHAPES_NAME} is {shape!r:.60}, expected [out, in]")
        if max(shape) > MAX_DIM:
            raise LimitError(f"{module}: the shape in {SHAPES_NAME} is {shape!r:.60}; at most {MAX_DIM} are allowed")
        return shape[0], shape[1]

    return widths


def _widths_of(checkpoint: Checkpoint) -> Widths:
    """What the base has; PEFT puts MiSS on linear layers only, which are stored (out, in)."""
    index = NameIndex.of(checkpoint)

    def widths(module: str) -> tuple[int, int]:
        name = f"{module}.weight"
        info = checkpoint.tensors.get(index.find(name) or tied_source(name, checkpoint) or "")
        if info is None:
            raise index.missing(name)
        if len(info.shape) != 2:
            raise BaseError(f"{name!r} is {list(info.shape)} in the base, no linear layer", path=checkpoint.root)
        return info.shape[0], info.shape[1]

    return widths


# --- tensors --------------------------------------------------------------------------------------------------------


def _sort(weights: Weights, suffix: str) -> tuple[dict[str, TensorInfo], tuple[ExtraTensor, ...]]:
    """({module: block}, extras), both sorted. Raises E-TENSOR for a name without a place, E-EMPTY."""
    modules, extras = {}, []
    for info in weights.tensors:
        name = info.name.removeprefix(_PREFIX)
        module = name.removesuffix(suffix)
        if name == info.name or (module == name and (".miss_" in name or ".bone_" in name)):
            raise TensorUnknownError(
                f"tensor {info.name!r:.200} is no part of a PEFT {suffix[1:5]}", fix="is this a PEFT file?"
            )
        if module != name:
            modules[module] = info
        else:
            extras.append(ExtraTensor(name, info.dtype, info.shape, bytes(weights.read(info))))
    if not modules:
        raise EmptyAdapterError("the file holds no block of any module", fix="is it an adapter that was saved empty?")
    return dict(sorted(modules.items())), tuple(sorted(extras, key=lambda extra: extra.name))


def _check_shape(
    module: str, info: TensorInfo, rank: int, mini_rank: int, widths: tuple[int, int], is_bat: bool
) -> None:
    """Raises E-PAIR if the block is not of rank r, E-SHAPE if it does not fit the layer."""
    out, inner = widths
    columns = mini_rank or out
    if is_bat:
        if info.shape != (out // rank, rank, rank) or out % rank or inner % rank:
            what = f"{module}: the block is {list(info.shape)}, the layer {[out, inner]}"
            raise ShapeError(f"{what}; a Bat of r = {rank} has [out / r, r, r] and divides both")
        return
    if len(info.shape) == 2 and info.shape[0] != rank:
        raise PairError(f"{module}: the block has {info.shape[0]} rows, the configuration says r = {rank}")
    if info.shape != (rank, columns):
        raise ShapeError(f"{module}: the block is {list(info.shape)}, expected {[rank, columns]}")
    if rank > inner:
        raise ShapeError(f"{module}: r = {rank} is more than the {inner} inputs of the layer")
    if out % columns:
        raise ShapeError(f"{module}: mini_r = {mini_rank} does not divide the {out} outputs of the layer")


def _values(weights: Weights, info: TensorInfo) -> F32:
    """The numbers of a block, unchanged. Raises E-DTYPE, and E-VALUE for NaN and what float32 cannot hold."""
    wide: Array = load_finite(weights, info).decode()
    with np.errstate(over="ignore"):
        values = wide.astype(np.float32)
    if not np.array_equal(values, wide):
        raise ValueRangeError(f"tensor {info.name!r} holds numbers that float32 cannot", fix="save it as float32")
    return values + np.float32(0)  # -0 becomes +0: one spelling of zero


def _stored(numbers: F32) -> tuple[int, F32]:
    """(bits, numbers): 16 bits where they hold every number, float32 otherwise."""
    try:
        if np.array_equal(packing.round_half(numbers), numbers):
            return 16, numbers
    except ValueRangeError:  # too large for them
        pass
    return EXACT, numbers


READER = Reader("peft_miss", "PEFT MiSS or Bone folder", recognises, read)
