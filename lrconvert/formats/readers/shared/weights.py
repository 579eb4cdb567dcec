"""The tensors of a foreign adapter, from a safetensors or npz file, or from a pickle if the user allows it."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from lrconvert.core.dtypes import FLOATS, STORAGE, Stored
from lrconvert.core.errors import DependencyError, DtypeError, LimitError, PickleError, ValueRangeError
from lrconvert.formats.readers.shared.files import ForeignFile, check_name, check_shape
from lrconvert.formats.readers.shared.npz import NpzFile
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.io.container import ContainerFile, TensorInfo, combined_digest, tensor_digest
from lrconvert.lora.adapter import ExtraTensor, Use

if TYPE_CHECKING:
    import torch

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# torch's tensors-only loader could be made to run code before this release (CVE-2025-32434, CVE-2026-24747).
_SAFE_TORCH = (2, 10)
_SHARED = 4  # tensors may share memory, so that they are larger than their file; not by more than this
_DTYPES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
}


Weights = ContainerFile | ForeignFile


def open_weights(path: Path, options: ReadOptions) -> Weights:
    """Open a file of tensors. Raises E-PICKLE for a ``.bin`` or ``.pt`` unless pickles are allowed."""
    if path.suffix == ".npz":
        return NpzFile(path)
    if path.suffix not in _PICKLE_SUFFIXES:
        return ContainerFile(path)
    if not options.allow_pickle:
        raise PickleError(
            "the adapter is stored as a pickle, which can run code when it is loaded",
            fix="save it again as safetensors (PEFT: load it and save_pretrained it), or pass --allow-pickle "
            "(allow_pickle=True) if you trust it",
            path=path,
        )
    return PickledFile(path)


def load_finite(weights: Weights, info: TensorInfo) -> Stored:
    """Return a tensor of real numbers with its stored bits. Raises E-DTYPE, and E-VALUE for NaN and infinity."""
    if info.dtype not in FLOATS:
        raise DtypeError(f"tensor {info.name!r} is {info.dtype}, expected one of {', '.join(FLOATS)}")
    stored = weights.load(info)
    if not np.isfinite(stored.decode()).all():
        fix = "the training diverged; use an earlier checkpoint"
        raise ValueRangeError(f"tensor {info.name!r} holds NaN or infinity", fix=fix)
    return stored


def load_extra(name: str, info: TensorInfo, weights: Weights) -> ExtraTensor:
    """Return a tensor of any kind as an extra, byte for byte."""
    return ExtraTensor(name, info.dtype, info.shape, bytes(weights.read(info)))


def load_finite_extra(name: str, info: TensorInfo, weights: Weights, use: Use) -> ExtraTensor:
    """Return a tensor of finite numbers as an extra, with its stored bits. Raises E-DTYPE, E-VALUE."""
    stored = load_finite(weights, info)
    return ExtraTensor(name, stored.dtype, stored.shape, stored.array.tobytes(), use)


def source_digest(weights: Weights) -> str:
    """Return the sha256 over all tensors of the file, in hex. Raises E-IO-CHANGED if the file changed meanwhile."""
    digest = combined_digest(
        (info.name, tensor_digest(info.name, info.dtype, info.shape, [weights.read(info)])) for info in weights.tensors
    )
    weights.check_unchanged()
    return digest


# --- pickles --------------------------------------------------------------------------------------------------------


class PickledFile(ForeignFile):
    """A pickled dict of tensors, as ``torch.save`` writes it. The same tensors as a safetensors file of them gives.
    Those of a pickled list are named by their places: ``0``, ``1``."""

    def _read_header(self, size: int) -> tuple[TensorInfo, ...]:
        _check_zip(self._file, size)
        state = _unpickle(self._file)
        self._values = {name: value.detach() for name, value in state.items()}
        tensors = tuple(_info(name, value, self.path) for name, value in state.items())
        nbytes = sum(info.nbytes for info in tensors)
        if nbytes > _SHARED * size:
            raise LimitError(f"the tensors have {nbytes} bytes, the file {size}")
        return tensors

    def read(self, info: TensorInfo) -> bytes:
        """Return the bytes of a tensor, as a safetensors file would hold them."""
        import torch

        return self._values[info.name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _check_zip(file: IO[bytes], size: int) -> None:
    """Refuse a zip that would grow when it is unpacked; torch writes its own uncompressed. Older files are no zips."""
    if file.read(2) == b"PK":
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise PickleError(f"the zip cannot be read: {error}", fix="was a download cut off?") from None
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
            raise PickleError("the zip is compressed, which torch.save does not do")
    file.seek(0)


def _unpickle(file: IO[bytes]) -> dict[str, torch.Tensor]:
    """Return the dict of tensors in a pickle, by torch's loader that builds nothing else. Raises E-PICKLE,
    E-DEPENDENCY."""
    try:
        import torch
    except ImportError:
        raise DependencyError("a pickle is read with torch, which is not installed", fix="pip install torch") from None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _SAFE_TORCH:
        raise DependencyError(f"the pickle loader of torch {torch.__version__} has known holes", fix="use torch 2.10")
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a stranger's bytes provoke in there
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PickleError(f"the pickle holds more than tensors, or is damaged: {reason[0]:.200}") from None
    if isinstance(state, list):
        state = {str(place): value for place, value in enumerate(state)}
    if not isinstance(state, dict):
        raise PickleError(f"the pickle holds a {type(state).__name__}, not a dict of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise PickleError(f"the pickle's entry {name!r:.120} is a {type(value).__name__}, not a named tensor")
    return state


def _info(name: str, value: torch.Tensor, path: Path) -> TensorInfo:
    """Describe one tensor, by the rules of `container`. Raises E-NAME, E-DTYPE, E-SHAPE, E-LIMIT."""
    check_name(name)
    dtype = _DTYPES.get(str(value.dtype).removeprefix("torch."))
    if dtype is None or str(value.layout) != "torch.strided" or value.is_quantized or value.device.type != "cpu":
        raise DtypeError(f"tensor {name!r} is a {value.dtype} ({value.layout}), which is not read")
    shape = tuple(value.shape)
    check_shape(name, shape)
    nbytes = math.prod(shape) * STORAGE[dtype].itemsize
    if nbytes > value.untyped_storage().nbytes():  # a repeating view: a few bytes that claim to be many
        raise LimitError(f"tensor {name!r} has {nbytes} bytes, of which {value.untyped_storage().nbytes()} are stored")
    return TensorInfo(name, dtype, shape, 0, nbytes, path)
