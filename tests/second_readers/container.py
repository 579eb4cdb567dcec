"""formats/lrconvert-v1.md to formats/lrconvert-v3.md: a file as its manifest and its tensors."""

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
    """Manifest and tensors of a file, its framing, digests and spelling checked. Of version 2 and later the tensor
    `lrconvert` is the payload alone."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return _one_tensor(data, length, header) if "lrconvert" in header else _version_1(data, length, header)


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


# --- versions 2 and 3 -----------------------------------------------------------------------------------------------


def _one_tensor(data: bytes, length: int, header: dict[str, Any]) -> Contents:
    """Sections 2 and 5 of both pages."""
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
    assert whole[0] in (2, 3)
    assert hashlib.sha256(data[: start + 1] + data[start + 33 :]).digest() == whole[1:33]
    manifest, end = (manifest_of_3 if whole[0] == 3 else value_at)(whole, 33)
    assert (packed_3(manifest) if whole[0] == 3 else packed(manifest)) == whole[33:end]
    return manifest, {**tensors, "lrconvert": whole[end:]}


@cache
def words() -> tuple[list[str], list[str]]:
    """The two tables of section 3: of whole texts, of parts."""
    tables = re.findall(r"```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    whole, parts = (dict(entry.split("=", 1) for entry in table.split()) for table in tables[:2])
    for table in (whole, parts):
        assert [int(n) for n in table] == list(range(len(table)))
    return list(whole.values()), list(parts.values())


def number_at(data: bytes, at: int, bits: int) -> tuple[int, int, int]:
    """The bits above the lower `bits` of the byte `at`, the number that begins in these, and where it ends."""
    kind, number = data[at] >> bits, data[at] % (1 << bits)
    at += 1
    if number == (1 << bits) - 1:
        shift = 0
        while True:
            number += data[at] % 128 << shift
            shift += 7
            at += 1
            if data[at - 1] < 128:
                break
    return kind, number, at


def value_at(data: bytes, at: int, tables: bool = False) -> tuple[Any, int]:
    """The value that begins at byte `at`, and where it ends (section 3)."""
    kind, number, at = number_at(data, at, 5)
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
            item, at = value_at(data, at, tables)
            items.append(item)
        return items, at
    if kind == 5:
        members = {}
        for _ in range(number):
            key, at = value_at(data, at)
            members[key], at = value_at(data, at, tables)
        return members, at
    if kind == 7 and number > 1 and tables:
        keys, at = data[at] % 32, at + 1
        rows: list[dict[str, Any]] = [{} for _ in range(number)]
        for _ in range(keys):
            key, at = value_at(data, at)
            for row in rows:
                row[key], at = value_at(data, at, tables)
        return rows, at
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


def packed(value: Any, tables: bool = False) -> bytes:
    """The one spelling of a value."""
    if isinstance(value, bool):
        return head(7, value)
    if isinstance(value, int):
        return head(0, value) if value >= 0 else head(1, -1 - value)
    if isinstance(value, list):
        if (
            tables
            and len(value) > 1
            and all(isinstance(row, dict) and row and set(row) == set(value[0]) for row in value)
        ):
            columns = [[key, *(row[key] for row in value)] for key in sorted(value[0], key=str.encode)]
            start = head(7, len(value)) + head(5, len(columns))
            return start + b"".join(packed(item, tables) for column in columns for item in column)
        return head(4, len(value)) + b"".join(packed(item, tables) for item in value)
    if isinstance(value, dict):
        members = [(packed(k), packed(value[k], tables)) for k in sorted(value, key=str.encode)]
        return head(5, len(value)) + b"".join(map(b"".join, members))
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


def head(kind: int, number: int, bits: int = 5) -> bytes:
    most = (1 << bits) - 1
    if number < most:
        return bytes([(most + 1) * kind + number])
    out, number = [(most + 1) * kind + most], number - most
    while number >= 128:
        out.append(128 + number % 128)
        number //= 128
    return bytes([*out, number])


# --- version 3: sections 3 and 4 ------------------------------------------------------------------------------------


def manifest_of_3(data: bytes, at: int) -> tuple[dict[str, Any], int]:
    method, at = value_at(data, at, tables=True)
    plain, at = lengthened(data, at)
    others, end = value_at(plain, 0, tables=True)
    assert end == len(plain) and "method" not in others
    return {**others, "method": method}, at


def packed_3(manifest: dict[str, Any]) -> bytes:
    others = {key: value for key, value in manifest.items() if key != "method"}
    return packed(manifest["method"], tables=True) + shortened(packed(others, tables=True))


def lengthened(data: bytes, at: int) -> tuple[bytes, int]:
    _, size, at = number_at(data, at, 8)
    out: list[int] = []
    while len(out) < size:
        copies, number, at = number_at(data, at, 7)
        if copies:
            _, back, at = number_at(data, at, 8)
            for _ in range(number + 3):
                out.append(out[-1 - back])
        else:
            out += data[at : at + number + 1]
            at += number + 1
    assert len(out) == size
    return bytes(out), at


def shortened(plain: bytes) -> bytes:
    out, literal, at = head(0, len(plain), 8), b"", 0
    while at < len(plain):
        three = plain[at : at + 3]
        places = [n for n in range(at) if len(three) == 3 and plain[n : n + 3] == three][-32:]
        best = max(places, key=lambda n: (common(plain, n, at), n), default=None)
        if best is None:
            literal += plain[at : at + 1]
            at += 1
            continue
        if literal:
            out, literal = out + head(0, len(literal) - 1, 7) + literal, b""
        length = common(plain, best, at)
        out += head(1, length - 3, 7) + head(0, at - best - 1, 8)
        at += length
    return out + (head(0, len(literal) - 1, 7) + literal if literal else b"")


def common(plain: bytes, one: int, other: int) -> int:
    length = 0
    while other + length < len(plain) and plain[one + length] == plain[other + length]:
        length += 1
    return length
