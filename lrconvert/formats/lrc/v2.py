"""Container version 2: one tensor with a packed manifest, the payload, and one digest over the whole file.

Normative text: ``formats/lrconvert-v2.md``. It is the version that is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from lrconvert.core import errors
from lrconvert.formats.lrc import packed
from lrconvert.formats.lrc.contents import EXTRA_PREFIX, Check, Contents
from lrconvert.formats.lrc.manifest import MANIFEST_BYTES
from lrconvert.io.container import ContainerFile, encode_header
from lrconvert.lora.packing import TensorSpec

TENSOR = "lrconvert"
VERSION = 2
LEAD_BYTES = 33  # version and digest


def header(nbytes: int, extras: Sequence[int]) -> bytes:
    """Return the header of a file whose manifest and payload have `nbytes`, its extra tensors as many as stated."""
    return encode_header([(name, "U8", (size,)) for name, size in _layout(nbytes, extras)], {})


def _layout(nbytes: int, extras: Sequence[int]) -> list[tuple[str, int]]:
    """(name, bytes) of every tensor in file order."""
    return sorted([(TENSOR, LEAD_BYTES + nbytes), *((f"{EXTRA_PREFIX}{n}", size) for n, size in enumerate(extras))])


def encode(manifest: bytes, payload: Sequence[bytes], extras: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the bytes of the file, in pieces."""
    nbytes, sizes = len(manifest) + sum(map(len, payload)), [len(extra) for extra in extras]
    version = bytes([VERSION])
    before = [header(nbytes, sizes)]
    before += [extras[int(name.removeprefix(EXTRA_PREFIX))] for name, _ in _layout(nbytes, sizes) if name != TENSOR]
    digest = hashlib.sha256()
    for piece in (*before, version, manifest, *payload):
        digest.update(piece)
    yield from before  # the names of extras come before that of the tensor
    yield version + digest.digest() + manifest
    yield from payload


class V2(Contents):
    """A file of this version. Raises E-UNKNOWN, E-DTYPE, E-SHAPE, E-VER, and what `packed.unpack` raises."""

    def __init__(self, file: ContainerFile) -> None:
        if file.metadata:
            raise errors.UnknownFieldError("the file has metadata, which container version 2 does not have")
        info = file.by_name[TENSOR]
        if info.dtype != "U8":
            raise errors.DtypeError(f"tensor {TENSOR!r} is {info.dtype}, expected U8")
        if len(info.shape) != 1:
            raise errors.ShapeError(f"tensor {TENSOR!r} has shape {list(info.shape)}, expected one dimension")
        super().__init__(file)
        del self.left[TENSOR]
        self._data = self.stored[TENSOR]
        version = self._data[0]
        if version > VERSION:
            raise errors.VersionError(
                f"the container version {version} is newer than {VERSION}", fix="update lrconvert"
            )
        if version < VERSION:
            raise errors.VersionError(f"no container version {version} is packed")
        if len(self._data) < LEAD_BYTES:
            raise errors.JsonSyntaxError("the data end before the manifest")
        value, self._at = packed.unpack(self._data, LEAD_BYTES, MANIFEST_BYTES)
        self._packed = self._data[LEAD_BYTES : self._at]
        if not isinstance(value, dict):
            raise errors.JsonSyntaxError("the manifest is not an object")
        self.manifest = value

    def checks(self) -> Iterator[tuple[str, Check]]:
        yield "semantics", self._check_digest

    def _check_digest(self) -> None:
        digest = hashlib.sha256(self.file.header_bytes)
        for info in self.file.tensors:
            data = memoryview(self.stored[info.name])
            if info.name == TENSOR:
                digest.update(data[:1])
                data = data[LEAD_BYTES:]
            digest.update(data)
        if digest.digest() != self._data[1:LEAD_BYTES]:
            raise errors.DigestError("the file does not match its digest", fix="the file is damaged; get it again")

    def take(self, spec: TensorSpec) -> bytes:
        if spec.nbytes > len(self._data) - self._at:
            raise errors.MissingFieldError(f"the data end before the end of the tensor {spec.name!r}")
        self._at += spec.nbytes
        return self._data[self._at - spec.nbytes : self._at]

    def check_nothing_left(self) -> None:
        super().check_nothing_left()
        if self._at < len(self._data):
            what = f"{len(self._data) - self._at} bytes follow the last tensor that the method declares"
            raise errors.UnknownFieldError(what)

    def check_canonical(self, manifest: dict[str, object]) -> None:
        extras = [self.file.by_name[f"{EXTRA_PREFIX}{n}"].nbytes for n in range(len(self.stored) - 1)]
        written = header(len(self._data) - LEAD_BYTES, extras)
        if packed.pack(manifest) != self._packed or written != self.file.header_bytes:
            raise errors.CanonicalError("the file is not spelled in the canonical way")
