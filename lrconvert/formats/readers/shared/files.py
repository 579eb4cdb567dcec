"""A file of tensors in another format than safetensors: how it is opened, and the checks of names and shapes."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lrconvert.core.dtypes import STORAGE, Stored
from lrconvert.core.errors import LimitError, LrcError, ShapeError, TensorNameError
from lrconvert.core.limits import FOREIGN, Limits
from lrconvert.io.container import OpenFile, TensorInfo


class ForeignFile(OpenFile, ABC):
    """An open file of tensors. A context manager; `metadata` are the texts that the file holds beside them."""

    metadata: Mapping[str, str] = {}
    tensors: tuple[TensorInfo, ...]

    def __init__(self, path: Path) -> None:
        """Raises E-LIMIT for a file that is too large, E-IO-KIND, E-IO-READ, and what reading the header raises."""
        super().__init__(path)
        self._file = os.fdopen(self._descriptor, "rb")
        size = self._stat.st_size
        try:
            if size > FOREIGN.file_bytes:
                raise LimitError(f"the file has {size} bytes; at most {FOREIGN.file_bytes} are read")
            self.tensors = self._read_header(size)
        except LrcError as error:
            self.close()
            raise error.at(path) from None
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _read_header(self, size: int) -> tuple[TensorInfo, ...]: ...

    @abstractmethod
    def read(self, info: TensorInfo) -> bytes:
        """Return the bytes of a tensor, rows first, as a safetensors file would hold them."""

    def load(self, info: TensorInfo) -> Stored:
        """Return a tensor with its stored bits."""
        return Stored(info.dtype, np.frombuffer(self.read(info), STORAGE[info.dtype]).reshape(info.shape))

    def close(self) -> None:
        self._file.close()
        self._descriptor = -1


def check_name(name: str, kind: str = "tensor") -> None:
    """Raise E-NAME for a name that is empty, too long or not printable."""
    if not name or not name.isprintable() or len(name.encode("utf-8", "replace")) > FOREIGN.name_bytes:
        raise TensorNameError(f"the {kind} name {name!r:.120} is empty, too long or has control characters")


def check_shape(name: str, shape: Sequence[int], limits: Limits = FOREIGN) -> None:
    """Raise E-SHAPE for too many dimensions, and for a dimension that is too small or too large."""
    if len(shape) > limits.ndim or any(not limits.least_dim <= n <= limits.dim for n in shape):
        raise ShapeError(f"tensor {name!r:.120} has shape {list(shape)!s:.80}")
