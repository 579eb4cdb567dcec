"""Files taken apart and put together without any check, to make what the real writer refuses to make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lrconvert.formats.lrc import one_tensor, packed, shortened


def header_and_data(file: bytes) -> tuple[bytes, bytes]:
    """Return the header text and the data of a safetensors file."""
    length = int.from_bytes(file[:8], "little")
    return file[8 : 8 + length], file[8 + length :]


def with_header(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file with this header (text, or an object), valid or not; `length` may lie about it."""
    text = header if isinstance(header, bytes) else spelled(header)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def spelled(value: Any, *, sort: bool = False) -> bytes:
    """Return JSON without white space; with `sort` the canonical spelling of a value that has one."""
    return json.dumps(value, sort_keys=sort, separators=(",", ":"), ensure_ascii=False).encode()


def tensor_digest(name: str, dtype: str, shape: Sequence[int], data: bytes) -> str:
    """Return the digest of a tensor, by section 10.1 of lrconvert-v1.md."""
    parts = name.encode(), dtype.encode(), b"".join(n.to_bytes(8, "little") for n in shape)
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hashlib.sha256(framed + data).hexdigest()


class RawFile:
    """An lrconvert file in pieces that may be changed at will. `tensors` are (dtype, shape, data) in file order; of
    container version 2 and later its extras, and the payload."""

    manifest: Any
    tensors: dict[str, tuple[str, list[int], bytes]]

    @staticmethod
    def of(file: bytes) -> RawFile:
        """Take a file apart."""
        text, data = header_and_data(file)
        header = json.loads(text)
        kind = OneTensor if "lrconvert" in header else V1
        metadata = header.pop("__metadata__", {})
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        cut = {n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in entries}
        return kind.from_tensors(metadata, cut)

    def sign(self) -> RawFile:
        """Make every digest right again that has a place."""
        raise NotImplementedError

    def sign_content(self) -> RawFile:
        """Make the digest of the content right; those of single tensors stay as they are."""
        raise NotImplementedError

    def spelled(self) -> bytes:
        """Return the manifest as it is stored."""
        raise NotImplementedError

    def file(self, manifest: bytes | None = None) -> bytes:
        """Return the file, its manifest spelled canonically, or as `manifest`."""
        raise NotImplementedError


@dataclass
class V1(RawFile):
    """A file of container version 1."""

    manifest: Any
    tensors: dict[str, tuple[str, list[int], bytes]]

    @classmethod
    def from_tensors(cls, metadata: dict[str, str], tensors: dict[str, tuple[str, list[int], bytes]]) -> V1:
        return cls(json.loads(metadata["lrconvert"]), tensors)

    def sign(self) -> RawFile:
        digests = {name: tensor_digest(name, *tensor) for name, tensor in self.tensors.items()}
        self.manifest["digests"] = {"content": "", "tensors": digests}
        return self.sign_content()

    def sign_content(self) -> RawFile:
        digest = hashlib.sha256()
        for name, value in sorted(self.manifest["digests"]["tensors"].items()):
            digest.update(name.encode() + b"\0" + bytes.fromhex(value))
        digest.update(spelled({**self.manifest, "digests": {}}, sort=True))
        self.manifest["digests"]["content"] = digest.hexdigest()
        return self

    def spelled(self) -> bytes:
        return spelled(self.manifest, sort=True)

    def file(self, manifest: bytes | None = None) -> bytes:
        text = self.spelled() if manifest is None else manifest
        return laid_out(self.tensors, {"lrconvert": text.decode()})


@dataclass
class OneTensor(RawFile):
    """A file of container version 2 or later. `digest` is the one stated, or empty for the right one."""

    manifest: Any
    tensors: dict[str, tuple[str, list[int], bytes]]
    digest: bytes
    version: int

    @classmethod
    def from_tensors(cls, metadata: dict[str, str], tensors: dict[str, tuple[str, list[int], bytes]]) -> OneTensor:
        *_, data = tensors["lrconvert"]
        if data[0] not in one_tensor.VERSIONS:
            raise ValueError(f"no container version {data[0]}")
        manifest, end = one_tensor.unpack(data, 33, data[0])
        payload = data[end:]
        return cls(manifest, {**tensors, "lrconvert": ("U8", [len(payload)], payload)}, data[1:33], data[0])

    def sign(self) -> RawFile:
        self.digest = b""
        return self

    sign_content = sign

    def spelled(self) -> bytes:
        if self.version == 2:
            return packed.spell(self.manifest)
        method, others = {}, self.manifest
        if isinstance(others, dict):
            method, others = others.get("method", {}), {k: v for k, v in others.items() if k != "method"}
        return packed.spell(method, tables=True) + shortened.shorten(packed.spell(others, tables=True))

    def file(self, manifest: bytes | None = None) -> bytes:
        body = (self.spelled() if manifest is None else manifest) + self.tensors["lrconvert"][2]
        lead = bytes([self.version])
        digest = self.digest or hashlib.sha256(self._around(lead + bytes(32) + body, lead + body)).digest()
        return self._around(lead + digest + body, lead + digest + body)

    def _around(self, sized: bytes, data: bytes) -> bytes:
        """The file of `data`, with the header that `sized` calls for."""
        header = header_of({**self.tensors, "lrconvert": ("U8", [len(sized)], sized)}, {})
        parts = {name: content for name, (_, _, content) in self.tensors.items()}
        return header + b"".join({**parts, "lrconvert": data}.values())


def header_of(tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str]) -> bytes:
    """Return length and text of a header, padded."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    whole = spelled(header)
    return with_header(whole + b" " * (-len(whole) % 8))


def laid_out(tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str]) -> bytes:
    """Return a file of these tensors, one after the other."""
    return header_of(tensors, metadata) + b"".join(data for _, _, data in tensors.values())
