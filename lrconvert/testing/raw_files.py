"""Files taken apart and put together without any check, to make what the real writer refuses to make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


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


@dataclass
class RawFile:
    """An lrconvert file in pieces that may be changed at will. `tensors` are (dtype, shape, data) in file order."""

    manifest: Any
    tensors: dict[str, tuple[str, list[int], bytes]]

    @classmethod
    def of(cls, file: bytes) -> RawFile:
        """Take a file apart."""
        text, data = header_and_data(file)
        header = json.loads(text)
        manifest = json.loads(header.pop("__metadata__")["lrconvert"])
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        cut = {n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in entries}
        return cls(manifest, cut)

    def sign(self) -> RawFile:
        """Make every digest right again that has a place."""
        digests = {name: tensor_digest(name, *tensor) for name, tensor in self.tensors.items()}
        self.manifest["digests"] = {"content": "", "tensors": digests}
        return self.sign_content()

    def sign_content(self) -> RawFile:
        """Make ``digests.content`` right; the digests of the tensors stay as they are."""
        digest = hashlib.sha256()
        for name, value in sorted(self.manifest["digests"]["tensors"].items()):
            digest.update(name.encode() + b"\0" + bytes.fromhex(value))
        digest.update(spelled({**self.manifest, "digests": {}}, sort=True))
        self.manifest["digests"]["content"] = digest.hexdigest()
        return self

    def file(self, manifest: bytes | None = None) -> bytes:
        """Return the file, its manifest spelled canonically, or as `manifest`."""
        text = spelled(self.manifest, sort=True) if manifest is None else manifest
        header: dict[str, Any] = {"__metadata__": {"lrconvert": text.decode()}}
        at = 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        whole = spelled(header)
        whole += b" " * (-len(whole) % 8)
        return with_header(whole, b"".join(data for _, _, data in self.tensors.values()))
