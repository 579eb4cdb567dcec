"""Files of every container version. The older ones are written here alone, to test that they are read."""

from __future__ import annotations

from typing import Any

from lrconvert.formats.lrc import file, one_tensor
from lrconvert.formats.lrc import manifest as manifests
from lrconvert.lora import packing
from lrconvert.lora.adapter import CompactAdapter
from lrconvert.methods import base as methods
from lrconvert.testing.raw_files import V1, OneTensor, RawFile

VERSIONS = (1, *one_tensor.VERSIONS)
_BYTES = {"F32": 4, "F16": 2, "U8": 1}


def raw_version_1(compact: CompactAdapter) -> V1:
    """Return the file of an adapter, in pieces."""
    method = methods.get(compact.method)
    specs = method.layout_specs(method.header(compact.config), compact.targets)
    specs = (*specs, *method.specs(compact.config, compact.targets))
    arrays = {**method.layout(compact.config), **compact.tensors}
    tensors: dict[str, tuple[str, list[int], bytes]] = {}
    exponents = ""
    for spec in specs:
        stored, exponent = packing.encode(spec, arrays[spec.name])
        tensors[spec.name] = spec.dtype, list(stored.shape), stored.tobytes()
        exponents += f"{exponent & 255:02x}" if spec.kind == "half" else ""
    for n, extra in enumerate(compact.extras):
        tensors[f"extra.{n}"] = "U8", [len(extra.data)], extra.data
    order = sorted(tensors, key=lambda name: (-_BYTES[tensors[name][0]], name))
    manifest: dict[str, Any] = manifests.build(compact, exponents)
    manifest |= {"format": "lrconvert", "version": 1, "base": {**manifest["base"], "names": compact.base.names}}
    raw = V1(manifest, {name: tensors[name] for name in order})
    raw.sign()
    return raw


def versions(compact: CompactAdapter) -> tuple[int, ...]:
    """Return the container versions that can hold an adapter: coded tensors are not of the first, what a file states as
    required is of the newest alone."""
    if manifests.features(compact.targets, compact.extras):
        return VERSIONS[-1:]
    specs = methods.get(compact.method).specs(compact.config, compact.targets)
    return VERSIONS[any(spec.kind == "coded" for spec in specs) :]


def encoded(compact: CompactAdapter, version: int) -> bytes:
    """Return the bytes of the file of an adapter in a container version."""
    if version == 1:
        return raw_version_1(compact).file()
    raw = RawFile.of(b"".join(file.encode(compact)))
    assert isinstance(raw, OneTensor)
    raw.version = version
    return raw.sign().file()


def version_of(data: bytes) -> int:
    """Return the container version of a file."""
    raw = RawFile.of(data)
    return raw.version if isinstance(raw, OneTensor) else 1
