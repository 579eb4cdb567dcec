"""The view of a file that every container version offers: a manifest as the newest version has it, and the tensors
behind it, taken out one by one; what is left over at the end is unknown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from lrconvert.core import errors
from lrconvert.io.container import ContainerFile
from lrconvert.lora.packing import TensorSpec

EXTRA_PREFIX = "extra."
Check = Callable[[], object]


class Contents(ABC):
    """An open file of one container version. Made of a file whose manifest can be read; raises if it cannot."""

    manifest: dict[str, Any]
    features: tuple[str, ...] = ()  # that a file of this version may require

    def __init__(self, file: ContainerFile) -> None:
        self.file = file
        self.stored = {info.name: bytes(file.read(info)) for info in file.tensors}
        self.left = dict(file.by_name)

    @abstractmethod
    def checks(self) -> Iterator[tuple[str, Check]]:
        """Checks of the version's own, each with its level: the digests above all."""

    def check_names(self, names: str) -> None:  # noqa: B027 -- most state none
        """Raise E-DIGEST unless the digest of the targets' names and shapes is the one stated, if one is."""

    @abstractmethod
    def take(self, spec: TensorSpec) -> bytes:
        """The bytes of a declared tensor; each is taken once, in the order of their declaration. Raises E-MISSING,
        E-DTYPE or E-SHAPE if it is not there as its spec says."""

    def extra(self, number: int) -> bytes:
        """The bytes of an extra tensor. Raises E-MISSING or E-SHAPE."""
        name = f"{EXTRA_PREFIX}{number}"
        info = self.left.pop(name, None)
        if info is None:
            raise errors.MissingFieldError(f"the tensor {name!r} of an extra is missing")
        if info.dtype != "U8" or len(info.shape) != 1:
            raise errors.ShapeError(
                f"tensor {name!r} is {info.dtype} {list(info.shape)}; an extra is stored as plain U8"
            )
        return self.stored[name]

    def check_nothing_left(self) -> None:
        """Raise E-UNKNOWN for a tensor that was not taken."""
        if self.left:
            raise errors.UnknownFieldError(f"the file holds the unknown tensor {sorted(self.left)[0]!r}")

    @abstractmethod
    def check_canonical(self, manifest: dict[str, Any]) -> None:
        """Raise E-CANON unless the file is spelled as the one of this manifest, which its content leads to."""
