"""Container versions 2 and 3: one tensor with a packed manifest, the payload, and one digest over the whole file.

Normative text: ``formats/lrconvert-v3.md``, which is written, and ``formats/lrconvert-v2.md``. They differ in how the
manifest is packed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lrconvert.core import errors
from lrconvert.formats.lrc import packed, shortened
from lrconvert.formats.lrc.contents import EXTRA_PREFIX, Check, Contents
from lrconvert.formats.lrc.manifest import FEATURES, MANIFEST_BYTES
from lrconvert.io.container import ContainerFile, encode_header
from lrconvert.lora.packing import TensorSpec

TENSOR = "lrconvert"
VERSIONS = (2, 3)
VERSION = VERSIONS[-1]  # that is written
LEAD_BYTES = 33  # version and digest
METHOD = "method"


# --- manifests ------------------------------------------------------------------------------------------------------


def packed_method(method: Any) -> bytes:
    """Return the bytes of the manifest's ``method``. Raises E-LIMIT."""
    return _checked(packed.pack(method, tables=True))


def method_bytes(method: Any) -> int:
    """Return how many bytes `packed_method` makes, without its checks of values: for searches over sizes."""
    return len(_checked(packed.spell(method, tables=True)))


def packed_others(manifest: Mapping[str, Any]) -> bytes:
    """Return the bytes of a manifest without its ``method``. Raises E-LIMIT."""
    others = {key: value for key, value in manifest.items() if key != METHOD}
    return shortened.shorten(_checked(packed.pack(others, tables=True)))


def _checked(data: bytes) -> bytes:
    if len(data) > MANIFEST_BYTES:
        raise errors.LimitError(f"the manifest has {len(data)} bytes; at most {MANIFEST_BYTES} are allowed")
    return data


def _unpack_3(data: bytes, start: int) -> tuple[Any, int]:
    method, at = packed.unpack(data, start, MANIFEST_BYTES, tables=True)
    plain, at = shortened.lengthen(data, at, MANIFEST_BYTES)
    others, end = packed.unpack(plain, 0, MANIFEST_BYTES, tables=True)
    if end < len(plain):
        raise errors.JsonSyntaxError(f"{len(plain) - end} bytes follow the manifest")
    if not isinstance(others, dict):
        raise errors.JsonSyntaxError("the manifest is not an object")
    if METHOD in others:
        raise errors.JsonDuplicateError("the manifest states its method twice")
    return {**others, METHOD: method}, at


def pack(manifest: Mapping[str, Any], version: int = VERSION) -> bytes:
    """Return the bytes of a manifest in a container version. Raises E-LIMIT."""
    if version == 2:
        return _checked(packed.pack(manifest))
    return packed_method(manifest[METHOD]) + packed_others(manifest)


def unpack(data: bytes, start: int, version: int = VERSION) -> tuple[Any, int]:
    """Return the manifest that is packed in `data` from byte `start` on, and where it ends. Raises what
    `packed.unpack` raises."""
    if version == 2:
        return packed.unpack(data, start, MANIFEST_BYTES)
    return _unpack_3(data, start)


# --- files ----------------------------------------------------------------------------------------------------------


def header(nbytes: int, extras: Sequence[int]) -> bytes:
    """Return the header of a file whose manifest and payload have `nbytes`, its extra tensors as many as stated."""
    return encode_header([(name, "U8", (size,)) for name, size in _layout(nbytes, extras)], {})


def _layout(nbytes: int, extras: Sequence[int]) -> list[tuple[str, int]]:
    """(name, bytes) of every tensor in file order."""
    return sorted([(TENSOR, LEAD_BYTES + nbytes), *((f"{EXTRA_PREFIX}{n}", size) for n, size in enumerate(extras))])


def encode(
    manifest: Mapping[str, Any], payload: Sequence[bytes], extras: Sequence[bytes], version: int = VERSION
) -> Iterator[bytes]:
    """Yield the bytes of the file, in pieces. Raises E-LIMIT for a manifest that is too long."""
    stored = pack(manifest, version)
    nbytes, sizes = len(stored) + sum(map(len, payload)), [len(extra) for extra in extras]
    first = bytes([version])
    before = [header(nbytes, sizes)]
    before += [extras[int(name.removeprefix(EXTRA_PREFIX))] for name, _ in _layout(nbytes, sizes) if name != TENSOR]
    digest = hashlib.sha256()
    for piece in (*before, first, stored, *payload):
        digest.update(piece)
    yield from before  # the names of extras come before that of the tensor
    yield first + digest.digest() + stored
    yield from payload


class OneTensor(Contents):
    """A file of these versions. Raises E-UNKNOWN, E-DTYPE, E-SHAPE, E-VER, and what `unpack` raises."""

    def __init__(self, file: ContainerFile) -> None:
        if file.metadata:
            raise errors.UnknownFieldError("the file has metadata, which container version 2 and later do not have")
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
        if version not in VERSIONS:
            raise errors.VersionError(f"no container version {version} is packed")
        if len(self._data) < LEAD_BYTES:
            raise errors.JsonSyntaxError("the data end before the manifest")
        self.version = version
        self.features = FEATURES if version == VERSION else ()
        value, self._at = unpack(self._data, LEAD_BYTES, version)
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

    def check_canonical(self, manifest: dict[str, Any]) -> None:
        extras = [self.file.by_name[f"{EXTRA_PREFIX}{n}"].nbytes for n in range(len(self.stored) - 1)]
        written = header(len(self._data) - LEAD_BYTES, extras)
        if pack(manifest, self.version) != self._packed or written != self.file.header_bytes:
            raise errors.CanonicalError("the file is not spelled in the canonical way")
