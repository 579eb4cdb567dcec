"""formats/lrconvert-v1.md and formats/lrconvert-v2.md: a file as its manifest and its tensors."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from functools import cache
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "formats" / "lrconvert-v2.md"
Contents = tuple[dict[str, Any], dict[str, bytes]]


def open_file(data: bytes) -> Contents:
    """Manifest and tensors of a file, its framing, digests and spelling checked. Of version 2 the tensor `lrconvert`
    is the payload alone."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return _version_2(data, length, header) if "lrconvert" in header else _version_1(data, length, header)


# --- version 1 (sections 2, 3, 4, 10) -------------------------------------------------------------------------------


def _version_1(data: bytes, length: int, header: dict[str, Any]) -> Contents:
    text = header.pop("__metadata__")["lrconvert"]
    manifest = json.loads(text)
    assert text == json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    wide = {"F32": 4, "F16": 2, "U8": 1}
    names = sorted(header, key=lambda name: (-wide[header[name]["dtype"]], name.encode()))
    tensors, entries, at = {}, {}, 0
    for name in names:
        dtype, (numel,) = header[name]["dtype"], header[name]["shape"]
        entries[name] = {"dtype": dtype, "shape": [numel], "data_offsets": [at, at + wide[dtype] * numel]}
        tensors[name] = data[8 + length + at :][: wide[dtype] * numel]
        at += wide[dtype] * numel
        parts = (name.encode(), dtype.encode(), struct.pack("<Q", numel))
        digest = b"".join(struct.pack("<Q", len(part)) + part for part in parts) + tensors[name]
        assert hashlib.sha256(digest).hexdigest() == manifest["digests"]["tensors"][name]
    spelled = json.dumps({"__metadata__": {"lrconvert": text}, **entries}, separators=(",", ":"), ensure_ascii=False)
    assert data[8 : 8 + length] == spelled.encode() + b" " * (-len(spelled.encode()) % 8)
    assert len(data) == 8 + length + at and set(manifest["digests"]["tensors"]) == set(names)
    listed = b"".join(n.encode() + b"\0" + bytes.fromhex(d) for n, d in sorted(manifest["digests"]["tensors"].items()))
    emptied = json.dumps({**manifest, "digests": {}}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(listed + emptied.encode()).hexdigest() == manifest["digests"]["content"]
    return manifest, tensors


# --- version 2 ------------------------------------------------------------------------------------------------------


def _version_2(data: bytes, length: int, header: dict[str, Any]) -> Contents:
    """Sections 2 and 5."""
    names = sorted(header, key=str.encode)
    assert set(names) == {"lrconvert", *(f"extra.{n}" for n in range(len(names) - 1))}
    tensors, entries, start, at = {}, [], 0, 0
    for name in names:
        (size,) = header[name]["shape"]
        entries.append(f'"{name}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{at},{at + size}]}}')
        tensors[name] = data[8 + length + at :][:size]
        start = 8 + length + at if name == "lrconvert" else start
        at += size
    spelled = "{" + ",".join(entries) + "}"
    assert data[8 : 8 + length] == spelled.encode() + b" " * (-len(spelled) % 8) and len(data) == 8 + length + at
    whole = tensors["lrconvert"]
    assert whole[0] == 2
    assert hashlib.sha256(data[: start + 1] + data[start + 33 :]).digest() == whole[1:33]
    manifest, end = value_at(whole, 33)
    assert packed(manifest) == whole[33:end]
    return manifest, {**tensors, "lrconvert": whole[end:]}


@cache
def words() -> tuple[list[str], list[str]]:
    """The two tables of section 3: of whole texts, of parts."""
    tables = re.findall(r"```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    whole, parts = (dict(entry.split("=", 1) for entry in table.split()) for table in tables[:2])
    for table in (whole, parts):
        assert [int(n) for n in table] == list(range(len(table)))
    return list(whole.values()), list(parts.values())


def value_at(data: bytes, at: int) -> tuple[Any, int]:
    """The value that begins at byte `at`, and where it ends (section 3)."""
    kind, number = data[at] // 32, data[at] % 32
    at += 1
    if number == 31:
        shift = 0
        while True:
            number += data[at] % 128 << shift
            shift += 7
            at += 1
            if data[at - 1] < 128:
                break
    if kind == 0:
        return number, at
    if kind == 1:
        return -1 - number, at
    if kind == 2:
        return text_of(data[at : at + number]), at + number
    if kind == 3:
        return data[at : at + number].hex(), at + number
    if kind == 4:
        items = []
        for _ in range(number):
            item, at = value_at(data, at)
            items.append(item)
        return items, at
    if kind == 5:
        members = {}
        for _ in range(number):
            key, at = value_at(data, at)
            members[key], at = value_at(data, at)
        return members, at
    return (words()[0][number] if kind == 6 else [False, True][number]), at


def text_of(stored: bytes) -> str:
    parts, out, at = words()[1], "", 0
    while at < len(stored):
        first = stored[at]
        if first < 32 or 128 <= first < 192:
            out += parts[first if first < 32 else first - 96]
            at += 1
            continue
        size = 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)
        out += stored[at : at + size].decode()
        at += size
    return out


def packed(value: Any) -> bytes:
    """The one spelling of a value."""
    if isinstance(value, bool):
        return head(7, value)
    if isinstance(value, int):
        return head(0, value) if value >= 0 else head(1, -1 - value)
    if isinstance(value, list):
        return head(4, len(value)) + b"".join(map(packed, value))
    if isinstance(value, dict):
        return head(5, len(value)) + b"".join(packed(k) + packed(value[k]) for k in sorted(value, key=str.encode))
    whole, parts = words()
    if value in whole:
        return head(6, whole.index(value))
    if value and len(value) % 2 == 0 and set(value) <= set("0123456789abcdef"):
        return head(3, len(value) // 2) + bytes.fromhex(value)
    stored, at = b"", 0
    while at < len(value):
        longest = max((part for part in parts if value.startswith(part, at)), key=len, default="")
        number = parts.index(longest) if longest else 0
        stored += bytes([number if number < 32 else number + 96]) if longest else value[at].encode()
        at += len(longest) or 1
    return head(2, len(stored)) + stored


def head(kind: int, number: int) -> bytes:
    if number < 31:
        return bytes([32 * kind + number])
    out, number = [32 * kind + 31], number - 31
    while number >= 128:
        out.append(128 + number % 128)
        number //= 128
    return bytes([*out, number])
