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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from lrconvert.core import errors
from lrconvert.core.dtypes import F32, Array
from lrconvert.core.limits import MAX_DIM, MAX_EXPAND_BYTES, MAX_RANK
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.shared.config import Count, check_known
from lrconvert.formats.readers.shared.folders import PEFT_WEIGHTS, config_path, peft_type, weights_in
from lrconvert.formats.readers.shared.notes import beside, notes_of
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import sort_extras
from lrconvert.formats.readers.shared.weights import Weights, load_extra, load_finite, open_weights, source_digest
from lrconvert.io import fields
from lrconvert.io.checkpoint import Checkpoint, open_checkpoint
from lrconvert.io.container import TensorInfo, read_json
from lrconvert.io.fields import Check
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
        *("auto_mapping", "bias", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform"),
        *("miss_dropout", "modules_to_save", "peft_type", "peft_version", "target_modules"),
    )
)

Widths = Callable[[str], tuple[int, int]]  # module -> (out, in)


@dataclass(frozen=True)
class _Settings:
    """The fields of the configuration that are read. `mini_r` counts only where `init_weights` is "mini"."""

    r: Annotated[Count, Check(lambda value: value <= MAX_RANK, f"at most {MAX_RANK}", errors.LimitError)]
    init_weights: Any = True
    mini_r: Any = 0
    base_model_name_or_path: str = ""
    revision: str = ""
    task_type: str = ""

    @property
    def is_bat(self) -> bool:
        return bool(self.init_weights == "bat")


@dataclass(frozen=True)
class _Mini:
    mini_r: Count


def recognises(path: Path) -> bool:
    """Return whether a folder's configuration says MISS or BONE, or a file has blocks of one of them."""
    if path.is_dir():
        return peft_type(path) in tuple(_BLOCKS)
    try:
        with open_weights(path, ReadOptions()) as file:
            return any(info.name.endswith(tuple(_BLOCKS.values())) for info in file.tensors)
    except errors.LrcError:
        return False


def read(path: Path, options: ReadOptions) -> CompactAdapter:
    """Read a MiSS or Bone. Raises E-BASE if nothing beside the file says how wide the layers are, E-CONFIG,
    E-LORA-FEATURE, E-TENSOR, E-PAIR, E-SHAPE, E-DTYPE, E-VALUE, E-LIMIT, E-EMPTY, E-PICKLE."""
    if options.base is not None:
        return read_on(path, options.base, options)
    beside = config_path(path).with_name(SHAPES_NAME)
    stated = read_json(beside) if beside.is_file() else {}
    return _read(path, options, _stated_widths(stated), lambda: _stated_content(stated))


def read_on(path: Path, base: Path, options: ReadOptions) -> CompactAdapter:
    """Read the same with widths from the base in the folder `base`: headers only but for "bat". Raises E-BASE as well
    for a layer that is not there or has another shape, and the errors of `open_checkpoint`."""
    with open_checkpoint(base) as checkpoint:
        return _read(path, options, _widths_of(checkpoint), checkpoint.content_digest)


def _read(path: Path, options: ReadOptions, widths: Widths, content: Callable[[], str]) -> CompactAdapter:
    config = read_json(config_path(path))
    try:
        kind, settings = _settings(config)
    except errors.LrcError as error:
        raise error.at(config_path(path)) from None
    rank, mini_rank, is_bat = settings.r, settings.mini_r, settings.is_bat
    with open_weights(weights_in(path, PEFT_WEIGHTS), options) as weights:
        modules, extras = _sort(weights, _BLOCKS[kind])
        blocks = {}
        for module, info in modules.items():
            out, inner = widths(module)
            _check_shape(module, info, settings, out, inner)
            values = _values(weights, info)
            blocks[Target(f"{module}.weight", (out, inner), MATRIX)] = values.reshape(out, rank).T if is_bat else values
        source, notes = source_digest(weights), notes_of(weights)
        notes += beside(extra.name for extra in extras)
    targets = tuple(sorted(blocks))
    expanded = sum(4 * rank * sum(target.matrix_shape) for target in targets)
    if expanded > MAX_EXPAND_BYTES:
        raise errors.LimitError(
            f"the file expands to {expanded} bytes of factors; at most {MAX_EXPAND_BYTES} are allowed"
        )
    bits, numbers = _stored(np.concatenate([blocks[target].reshape(-1) for target in targets]))
    form = complete(targets, [rank] * len(targets), bits=bits, mini_rank=mini_rank, bat=is_bat)
    hints = (settings.base_model_name_or_path, settings.revision, settings.task_type)
    provenance = Provenance(source, *hints, fields={"source_format": f"peft-{kind.lower()}"})
    base = replace(fingerprint(targets), content=content()) if is_bat else fingerprint(targets)
    return CompactAdapter("bone", form, targets, {"blocks": numbers}, extras, provenance, base, tuple(notes))


def _settings(config: Mapping[str, Any]) -> tuple[str, _Settings]:
    """Return MISS or BONE, and the settings, `mini_r` 0 where it does not count. Raises E-CONFIG, E-LORA-FEATURE,
    E-LIMIT."""
    kind = config.get("peft_type")
    if kind not in tuple(_BLOCKS):
        raise errors.ConfigError(f"peft_type is {kind!r:.60}, expected one of {', '.join(_BLOCKS)}")
    known = _NO_EFFECT | fields.names(_Settings)
    check_known(config, known if kind == "MISS" else known - {"mini_r"})
    settings = fields.read_config(_Settings, config)
    init = settings.init_weights
    if init == "mini" and kind == "MISS":
        return kind, replace(settings, mini_r=fields.read_config(_Mini, config).mini_r)
    if not isinstance(init, bool) and init != "bat":
        what = f"init_weights is {init!r:.60}, a variant of {kind} that is not known"
        raise errors.UnsupportedLoraError(what, fix="true, false, mini and bat are read")
    return kind, replace(settings, mini_r=0)


# --- widths of layers -----------------------------------------------------------------------------------------------


def _stated_content(stated: Mapping[str, Any]) -> str:
    """Return the digest of the base's contents that our own export wrote. Raises E-BASE, E-CONFIG."""
    content = stated.get("base_content")
    if content is None:
        what = "init_weights is 'bat': the updates depend on the weights of the base"
        raise errors.BaseError(what, fix="give the base that it was trained on")
    if not isinstance(content, str) or not re.fullmatch("[0-9a-f]{64}", content):
        raise errors.ConfigError(f"base_content in {SHAPES_NAME} is {content!r:.80}, no sha256 in hex")
    return content


def _stated_widths(stated: Mapping[str, Any]) -> Widths:
    """Return the widths that our own export wrote. They raise E-BASE, E-CONFIG, E-LIMIT."""
    shapes = stated.get("shapes")

    def widths(module: str) -> tuple[int, int]:
        shape = shapes.get(module) if isinstance(shapes, dict) else None
        if shape is None:
            fix = "give the base that it was trained on, or save it as a LoRA (PEFT: save_as_lora) and convert that"
            raise errors.BaseError(f"{module}: the file does not say how many inputs the layer has", fix=fix)
        if not isinstance(shape, list) or [type(n) for n in shape] != [int, int] or not min(shape) > 0:
            raise errors.ConfigError(f"{module}: the shape in {SHAPES_NAME} is {shape!r:.60}, expected [out, in]")
        if max(shape) > MAX_DIM:
            raise errors.LimitError(f"{module}: the shape in {SHAPES_NAME} is {shape!r:.60}, above {MAX_DIM}")
        return shape[0], shape[1]

    return widths


def _widths_of(checkpoint: Checkpoint) -> Widths:
    """Return the widths of the base; PEFT puts MiSS on linear layers only, which are stored (out, in)."""
    index = NameIndex.of(checkpoint)

    def widths(module: str) -> tuple[int, int]:
        name = f"{module}.weight"
        info = checkpoint.tensors.get(index.find(name) or tied_source(name, checkpoint) or "")
        if info is None:
            raise index.missing(name)
        if len(info.shape) != 2:
            raise errors.BaseError(f"{name!r} is {list(info.shape)} in the base, no linear layer", path=checkpoint.root)
        return info.shape[0], info.shape[1]

    return widths


# --- tensors --------------------------------------------------------------------------------------------------------


def _sort(weights: Weights, suffix: str) -> tuple[dict[str, TensorInfo], tuple[ExtraTensor, ...]]:
    """Return ({module: block}, extras), both sorted. Raises E-TENSOR for a name without a place, E-EMPTY."""
    modules, extras = {}, []
    for info in weights.tensors:
        name = info.name.removeprefix(_PREFIX)
        module = name.removesuffix(suffix)
        if name == info.name or (module == name and (".miss_" in name or ".bone_" in name)):
            what = f"tensor {info.name!r:.200} is no part of a PEFT {suffix[1:5]}"
            raise errors.TensorUnknownError(what, fix="is this a PEFT file?")
        if module != name:
            modules[module] = info
        else:
            extras.append(load_extra(name, info, weights))
    if not modules:
        raise errors.EmptyAdapterError("the file holds no block of any module", fix="was it saved empty?")
    return dict(sorted(modules.items())), sort_extras(extras)


def _check_shape(module: str, info: TensorInfo, settings: _Settings, out: int, inner: int) -> None:
    """Raise E-PAIR if the block is not of rank r, E-SHAPE if it does not fit the layer."""
    rank, columns = settings.r, settings.mini_r or out
    if settings.is_bat:
        if info.shape != (out // rank, rank, rank) or out % rank or inner % rank:
            what = f"{module}: the block is {list(info.shape)}, the layer {[out, inner]}"
            raise errors.ShapeError(f"{what}; a Bat of r = {rank} has [out / r, r, r] and divides both")
        return
    if len(info.shape) == 2 and info.shape[0] != rank:
        raise errors.PairError(f"{module}: the block has {info.shape[0]} rows, the configuration says r = {rank}")
    if info.shape != (rank, columns):
        raise errors.ShapeError(f"{module}: the block is {list(info.shape)}, expected {[rank, columns]}")
    if rank > inner:
        raise errors.ShapeError(f"{module}: r = {rank} is more than the {inner} inputs of the layer")
    if out % columns:
        raise errors.ShapeError(f"{module}: mini_r = {columns} does not divide the {out} outputs of the layer")


def _values(weights: Weights, info: TensorInfo) -> F32:
    """Return the numbers of a block, unchanged. Raises E-DTYPE, and E-VALUE for NaN and what float32 cannot hold."""
    wide: Array = load_finite(weights, info).decode()
    with np.errstate(over="ignore"):
        values = wide.astype(np.float32)
    if not np.array_equal(values, wide):
        what = f"tensor {info.name!r} holds numbers that float32 cannot"
        raise errors.ValueRangeError(what, fix="save it as float32")
    return values + np.float32(0)  # -0 becomes +0: one spelling of zero


def _stored(numbers: F32) -> tuple[int, F32]:
    """Return (bits, numbers): 16 bits where they hold every number, float32 otherwise."""
    try:
        if np.array_equal(packing.round_half(numbers), numbers):
            return 16, numbers
    except errors.ValueRangeError:  # too large for them
        pass
    return EXACT, numbers


READER = Reader("peft_miss", "PEFT MiSS or Bone folder", read, recognises)
