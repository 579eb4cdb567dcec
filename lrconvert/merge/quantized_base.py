"""Quantized checkpoints read as ordinary ones: weights appear as bf16, rounded once from what they stand for.

The methods are those of the folder ``lrconvert.io.quantized``. Normative text: ``formats/merge-v1.md``, section 7. No
weight is held: elements are computed as they are read, and so are their scales.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lrconvert.core import registry
from lrconvert.core.dtypes import STORAGE, Array, round_to
from lrconvert.core.errors import LrcError, QuantizedBaseError
from lrconvert.core.limits import MAX_CONFIG_BYTES
from lrconvert.core.wording import spelled
from lrconvert.io.checkpoint import (
    METHODS,
    QUANTIZATION,
    Checkpoint,
    dequantizer,
    open_checkpoint,
    quantization_name,
    quantized_base,
)
from lrconvert.io.container import ContainerFile, TensorInfo, encode_header, read_json
from lrconvert.io.quantized.base import FP8, Described, Weight, described

DTYPE = "BF16"
_CHUNK = 1 << 18  # elements that are computed at a time: they stay in the cache
_PANELS = 4  # that are kept of weights that are stored transposed: their rows are read one after the other
MODELOPT = "hf_quant_config.json"  # of ModelOpt, which may be all that says how a base is quantized
# The last segments of tensors that describe a quantized weight, whatever the method.
_OF_A_WEIGHT = re.compile(
    r"(?:weight|\w+_proj)_(?:scale\w*|packed|shape|zero_point|global_scale|g_idx)|\w+_scale_inv|\w+_(?:blocks|scales)|qweight|qzeros"
    r"|g_idx|SCB|qscale_weight|quant_map|absmax|nested_absmax"
)
# Files beside config.json that say of the stored weights how they are quantized.
_DESCRIPTIONS = frozenset({MODELOPT, "quantize_config.json", "quant_config.json"})


class Panels:
    """The rows of weights that were computed last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int], Array] = OrderedDict()

    def find(self, name: str, number: int) -> Array | None:
        return self._kept.get((name, number))

    def keep(self, name: str, number: int, codes: Array) -> None:
        self._kept[name, number] = codes
        while len(self._kept) > _PANELS:
            self._kept.popitem(last=False)


class DequantizedFile(ContainerFile):
    """The tensors `kept` of a weight file, quantized ones as bf16, with the header that it would have.
    `described_in` are the files that describe them: a checkpoint is cut between any two tensors."""

    def __init__(
        self,
        stored: ContainerFile,
        kept: Iterable[TensorInfo],
        weights: Mapping[str, Weight],
        described_in: Iterable[ContainerFile],
        panels: Panels,
    ) -> None:
        self.path, self.metadata = stored.path, stored.metadata
        self._stored, self._weights, self._sources = stored, weights, (stored, *described_in)
        self._panels = panels
        names = {weight.stored: name for name, weight in weights.items()}
        shown = [self._shown(info, names.get(info.name, "")) for info in kept]
        # Wider dtypes first, as safetensors lays tensors out, so that all stay aligned.
        shown.sort(key=lambda entry: -STORAGE[entry[1]].itemsize)
        self.header_bytes = encode_header(shown, self.metadata)
        tensors, end = [], len(self.header_bytes)
        for name, dtype, shape in shown:
            nbytes = math.prod(shape) * STORAGE[dtype].itemsize
            tensors.append(TensorInfo(name, dtype, shape, end, nbytes, self.path))
            end += nbytes
        self.tensors = tuple(tensors)
        self.by_name = {t.name: t for t in tensors}
        self._size = end

    @property
    def size(self) -> int:
        return self._size

    def _shown(self, info: TensorInfo, name: str) -> tuple[str, str, tuple[int, ...]]:
        return (name, DTYPE, self._weights[name].shape) if name else (info.name, info.dtype, info.shape)

    def read(self, info: TensorInfo, offset: int = 0, nbytes: int | None = None) -> bytearray:
        """Return bytes of a tensor, or `nbytes` of them from `offset`. Raises E-BASE-QUANT for scales that are NaN."""
        weight = self._weights.get(info.name)
        if weight is None:
            return self._stored.read(self._stored.by_name[info.name], offset, nbytes)
        out = bytearray(info.nbytes - offset if nbytes is None else nbytes)
        codes = np.frombuffer(out, STORAGE[DTYPE])
        try:
            if weight.panel:
                self._copy_panels(info.name, weight, offset // 2, codes)
            else:
                _compute(weight, offset // 2, codes)
        except LrcError as error:
            raise error.at(self.path) from None
        return out

    def _copy_panels(self, name: str, weight: Weight, first: int, codes: Array) -> None:
        done = 0
        while done < codes.size:
            number, start = divmod(first + done, weight.panel)
            panel = self._panels.find(name, number)
            if panel is None:
                panel = np.empty(min(weight.panel, math.prod(weight.shape) - number * weight.panel), STORAGE[DTYPE])
                _compute(weight, number * weight.panel, panel)
                self._panels.keep(name, number, panel)
            part = panel[start : start + codes.size - done]
            codes[done : done + part.size] = part
            done += part.size

    def read_into(self, info: TensorInfo, offset: int, view: memoryview) -> None:
        view[:] = self.read(info, offset, len(view))

    def fileno(self) -> int:
        raise NotImplementedError("the bytes of this file are not those on the disk")

    def check_unchanged(self) -> None:
        for file in self._sources:
            file.check_unchanged()

    def close(self) -> None:
        self._stored.close()


def _compute(weight: Weight, first: int, codes: Array) -> None:
    """Fill `codes` with the elements of a weight from number `first` on."""
    step = weight.panel or _CHUNK
    for start in range(0, codes.size, step):
        part = codes[start : start + step]
        values = weight.values(first + start, part.size)
        part[:] = round_to(values, DTYPE)
        weight.rounding.add(values, part, DTYPE)


@dataclass(frozen=True, eq=False)
class DequantizedCheckpoint(Checkpoint):
    """The checkpoint that `stored` stands for: `weights` are computed. `left_out` are tensors of activations."""

    stored: Checkpoint = field(kw_only=True)
    weights: Mapping[str, Weight] = field(kw_only=True)
    left_out: frozenset[str] = frozenset()

    @property
    def is_derived(self) -> bool:
        return True

    @property
    def note(self) -> str:
        """A line for the user, with what was measured if everything was read."""
        method = quantization_name(self.stored.config)
        lines = [f"{len(self.weights)} tensors are dequantized from {method} to bf16"]
        if self.left_out:
            lines.append(f"{len(self.left_out)} that quantize activations are left out")
        if all(weight.rounding.count for weight in self.weights.values()):
            largest, mean = self.rounding_error
            lines.append(f"at most {largest:.3g} and on average {mean:.3g} from their values")
        return f"{', '.join(lines)}; an unmerge restores these, not the quantized ones"

    @property
    def rounding_error(self) -> tuple[float, float]:
        """(largest, mean) of everything, however often a tensor was read."""
        sizes = [(math.prod(weight.shape), weight.rounding) for weight in self.weights.values()]
        mean = math.fsum(size * r.total / max(1, r.count) for size, r in sizes) / sum(size for size, _ in sizes)
        return max(r.largest for _, r in sizes), mean

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stored.__exit__(kind, error, trace)


def open_base(path: Path, *, dequantize: bool = False) -> Checkpoint:
    """Open a model folder, quantized layers as they are stored; with `dequantize` a quantized one as bf16.

    Raises what `open_checkpoint` raises; with `dequantize` E-BASE-QUANT for a method that is not read, for stored
    tensors that do not describe their weight, and for a base that is not quantized.
    """
    if not dequantize:
        return open_checkpoint(path, quantized=True)
    with ExitStack() as stack:
        stored = _with_settings(stack.enter_context(open_checkpoint(path, quantized=True)))
        method = dequantizer(stored.config)
        if not method and quantization_name(stored.config):
            raise _not_read(stored)
        content = described(method, stored) if method else Described({})
        if not content.weights:
            raise QuantizedBaseError(
                "the base holds no quantized tensor", fix=f"leave out {spelled('dequantize', True)}", path=path
            )
        _check_complete(stored, content)
        files = _files(stored, content)
        stack.pop_all()  # what is returned closes them
    return DequantizedCheckpoint(
        root=stored.root,
        config=_config(stored.config),
        files=files,
        index_path=stored.index_path,
        index=_index(stored.index, files),
        outdated=_DESCRIPTIONS,
        names=stored.names,
        stored=stored,
        weights=content.weights,
        left_out=content.left_out,
    )


def _with_settings(stored: Checkpoint) -> Checkpoint:
    """Return a checkpoint with what only a file of ModelOpt says of how it is quantized in its configuration."""
    if quantization_name(stored.config) or not (stored.root / MODELOPT).is_file():
        return stored
    read_json(stored.root / MODELOPT, MAX_CONFIG_BYTES)
    return replace(stored, config={**stored.config, QUANTIZATION: {"quant_method": "modelopt"}})


def _not_read(stored: Checkpoint) -> LrcError:
    """Return the error for a method that no module reads, with those that are."""
    known = ", ".join(name.replace("_", "-") for name in registry.names(METHODS))
    error = quantized_base(stored.config, stored.root)
    return QuantizedBaseError(
        error.what, fix=f"{error.fix}; {spelled('dequantize', True)} takes {known}", path=error.path
    )


def _check_complete(stored: Checkpoint, content: Described) -> None:
    """Raise E-BASE-QUANT if a weight takes the name of another tensor, or one is left that is not described."""
    taken = {part for weight in content.weights.values() for part in (weight.stored, *weight.parts)}
    for name, weight in content.weights.items():
        if weight.stored != name and name in stored.tensors:
            raise _unclear(stored, name, f"it is there, and so is {weight.stored!r}")
    for name, info in stored.tensors.items():
        if name in taken or name in content.left_out:
            continue
        is_weight = name.endswith("weight") and info.dtype in ("U8", "I8", "I32")
        if is_weight or info.dtype == "F8_E8M0" or (info.dtype in FP8 and len(info.shape) > 1):
            raise _unclear(stored, name, "nothing says how it is quantized")
        if _OF_A_WEIGHT.fullmatch(name.rpartition(".")[2]):
            raise _unclear(stored, name, "it describes none")


def _unclear(stored: Checkpoint, name: str, why: str) -> LrcError:
    writer = quantization_name(stored.config).partition(" ")[0]
    return QuantizedBaseError(
        f"the quantized weight {name!r} is not as {writer} writes it: {why}",
        fix="use the unquantized parent of this checkpoint",
        path=stored.root,
    )


def _files(stored: Checkpoint, content: Described) -> tuple[DequantizedFile, ...]:
    """Return the weight files as they appear, without those that hold nothing but descriptions."""
    hidden = set(content.left_out)
    described_in: dict[Path, set[ContainerFile]] = {}
    for weight in content.weights.values():
        hidden |= weight.parts
        files = described_in.setdefault(stored.tensors[weight.stored].file, set())
        files.update(stored.file_of(stored.tensors[part]) for part in weight.parts)
    kept = [(file, [info for info in file.tensors if info.name not in hidden]) for file in stored.files]
    panels = Panels()
    return tuple(
        DequantizedFile(file, infos, content.weights, described_in.get(file.path, ()), panels)
        for file, infos in kept
        if infos
    )


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the model as bf16."""
    kept = {key: value for key, value in config.items() if key != QUANTIZATION}
    text = kept.get("text_config")
    if isinstance(text, dict):
        kept["text_config"] = {key: value for key, value in text.items() if key != QUANTIZATION}
    names = [key for key in ("dtype", "torch_dtype") if key in kept] or ["dtype"]
    return kept | dict.fromkeys(names, "bfloat16")


def _index(index: Mapping[str, Any], files: Iterable[DequantizedFile]) -> dict[str, Any]:
    """Return the shard index of the model as bf16; empty if there is none."""
    if not index:
        return {}
    infos = [info for file in files for info in file.tensors]
    metadata = index.get("metadata")
    totals = {
        "total_size": sum(info.nbytes for info in infos),
        "total_parameters": sum(math.prod(info.shape) for info in infos),
    }
    stated = metadata if isinstance(metadata, dict) else {}
    return {
        **index,
        "metadata": {key: totals.get(key, value) for key, value in stated.items()},
        "weight_map": {info.name: info.file.name for info in infos},
    }
