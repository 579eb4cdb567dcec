"""Container version 1: a canonical JSON manifest in the metadata, a tensor for each that the method declares.

Normative text: ``formats/lrconvert-v1.md``. It is read forever, and no longer written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lrconvert.core import errors
from lrconvert.core.dtypes import itemsize
from lrconvert.core.limits import OWN
from lrconvert.formats.lrc import packed
from lrconvert.formats.lrc.contents import Check, Contents
from lrconvert.formats.lrc.manifest import MANIFEST_BYTES
from lrconvert.io import fields, strictjson
from lrconvert.io.container import ContainerFile, TensorInfo, encode_header, tensor_digest
from lrconvert.io.fields import Hex
from lrconvert.lora.fingerprint import content_digest
from lrconvert.lora.packing import TensorSpec

METADATA_KEY = "lrconvert"


@dataclass(frozen=True)
class _Manifest:
    """The fields of a manifest of version 1."""

    format: Any
    version: Any
    requires: Any
    method: Any
    targets: Any
    extras: Any
    base: Any
    provenance: Any
    digests: Any


@dataclass(frozen=True)
class _Stated:
    """Digests as they stand in a manifest, each still to be checked."""

    content: Any
    tensors: dict[str, Any]


@dataclass(frozen=True)
class _Digests:
    content: Hex
    tensors: Mapping[str, Hex]


class V1(Contents):
    """A file of this version. Raises E-MISSING, E-UNKNOWN, E-LIMIT, E-VER and the JSON errors."""

    def __init__(self, file: ContainerFile) -> None:
        self._stated = _read(file)
        super().__init__(file)
        base = self._stated.get("base")
        self._names = base.get("names") if isinstance(base, dict) else None
        newer = {key: value for key, value in self._stated.items() if key not in ("format", "version", "digests")}
        if isinstance(base, dict):
            newer["base"] = {key: value for key, value in base.items() if key != "names"}
        self.manifest = newer

    def checks(self) -> Iterator[tuple[str, Check]]:
        stated = self._stated.get("digests")
        yield "structure", partial(fields.read, _Manifest, self._stated, "the manifest")
        yield "structure", self._check_stated_names
        yield "structure", partial(fields.read, _Stated, stated, "digests")
        tensors = stated.get("tensors") if isinstance(stated, dict) else None
        declared: dict[str, Any] = tensors if isinstance(tensors, dict) else {}
        for info in self.file.tensors:
            yield "semantics", partial(_check_digest, info, self.stored[info.name], declared.get(info.name))
        for name in sorted(set(declared) - set(self.stored)):
            yield "semantics", partial(_fail, f"the digest of {name!r:.80} belongs to no tensor")
        yield "semantics", self._check_content

    def _check_stated_names(self) -> None:
        if self._names is None:
            raise errors.MissingFieldError("base lacks the field 'names'")
        fields.read(Hex, self._names, "base.names")

    def _check_content(self) -> None:
        stated = fields.read(_Digests, self._stated.get("digests"), "digests")
        if content_digest(stated.tensors, self._stated) != stated.content:
            what = "the manifest does not match the content digest"
            raise errors.DigestError(what, fix="the file is damaged; get it again")

    def check_names(self, names: str) -> None:
        if self._names != names:
            raise errors.DigestError("base.names is not the digest of the names and shapes of the targets")

    def take(self, spec: TensorSpec) -> bytes:
        info = self.left.pop(spec.name, None)
        if info is None:
            raise errors.MissingFieldError(f"the tensor {spec.name!r} is missing")
        if spec.kind == "coded":
            raise errors.VersionError(f"the tensor {spec.name!r} is coded; only containers of version 2 hold such ones")
        if info.dtype != spec.dtype:
            raise errors.DtypeError(f"tensor {spec.name!r} is {info.dtype}, its method stores {spec.dtype}")
        if info.shape != spec.stored_shape:
            raise errors.ShapeError(
                f"tensor {spec.name!r} has shape {list(info.shape)}, its method stores {list(spec.stored_shape)}"
            )
        return self.stored[spec.name]

    def check_canonical(self, manifest: dict[str, Any]) -> None:
        """... of a file whose metadata is canonical JSON."""
        entries = sorted(self.file.tensors, key=lambda info: (-itemsize(info.dtype), info.name))
        header = encode_header([(info.name, info.dtype, info.shape) for info in entries], self.file.metadata)
        if header != self.file.header_bytes or packed.pack(manifest) != packed.pack(self.manifest):
            raise errors.CanonicalError("the header is not the canonical one of its content")


def _read(file: ContainerFile) -> dict[str, Any]:
    """Return the manifest as it stands in the file."""
    if METADATA_KEY not in file.metadata:
        what = "the file has no lrconvert manifest"
        raise errors.MissingFieldError(what, fix="this is not an lrconvert file; try `inspect`")
    if len(file.metadata) != 1:
        raise errors.UnknownFieldError("the file has metadata besides the manifest")
    text = file.metadata[METADATA_KEY].encode()
    if len(text) > MANIFEST_BYTES:
        raise errors.LimitError(f"the manifest has {len(text)} bytes; at most {MANIFEST_BYTES} are read")
    manifest = strictjson.parse_canonical(text, depth=OWN.json_depth)
    if not isinstance(manifest, dict):
        raise errors.JsonSyntaxError("the manifest is not an object")
    if manifest.get("format") != "lrconvert":
        raise errors.VersionError("the manifest does not say format lrconvert")
    version = manifest.get("version")
    if type(version) is not int or version != 1:
        raise errors.VersionError(f"no container version {version!r:.40} has its manifest in the metadata")
    return manifest


def _fail(what: str) -> None:
    raise errors.MissingFieldError(what)


def _check_digest(info: TensorInfo, data: bytes, declared: Any) -> None:
    if declared is None:
        raise errors.MissingFieldError(f"tensor {info.name!r} has no digest")
    stated = fields.read(Hex, declared, f"digests.tensors[{info.name!r}]")
    if tensor_digest(info.name, info.dtype, info.shape, [data]) != stated:
        what = f"tensor {info.name!r} does not match its digest"
        raise errors.DigestError(what, fix="the file is damaged; get it again")
