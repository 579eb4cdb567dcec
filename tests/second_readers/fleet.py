"""formats/fleet-v1.md: every member of a fleet as its name and the bytes of its file, from whole files in memory."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import unicodedata
from collections.abc import Iterator
from typing import Any

from .container import packed_3, value_at

WIDE = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
WIDE |= {"U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
Files = dict[str, bytes]


def number(data: bytes, at: int) -> tuple[int, int]:
    """Section 3."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            assert shift == 7 or data[at - 1]
            return value, at


def text(data: bytes, at: int) -> tuple[bytes, int]:
    count, at = number(data, at)
    assert at + count <= len(data)
    return data[at : at + count], at + count


def head(files: Files) -> dict[str, Any]:
    """Section 2."""
    value = json.loads(files["fleet.json"])
    plain = {key: entry for key, entry in value.items() if key != "digest"}

    def spelled(of: Any) -> bytes:
        return json.dumps(of, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    assert spelled(value) == files["fleet.json"] and hashlib.sha256(spelled(plain)).hexdigest() == value["digest"]
    assert (value["format"], value["version"], value["requires"]) == ("lrconvert-fleet", 1, [])
    assert all(run["number"] < value["next"] for run in value["runs"])
    assert set(plain) == {"bytes", "dead", "format", "generation", "members", "next", "requires", "runs", "version"}
    assert len(files[f"members-{value['generation']}"]) >= value["bytes"]
    return value


def record(data: bytes, place: int, end: int) -> tuple[int, bytes, int]:
    """Kind, body and bytes of a record (section 3)."""
    count, at = number(data, place + 1)
    stop = at + count
    assert stop + 8 <= end and hashlib.sha256(data[place:stop]).digest()[:8] == data[stop : stop + 8]
    return data[place], data[at:stop], stop + 8 - place


def entries(
    data: bytes, start: int, stop: int, digest: bytes, level: int | None = None
) -> Iterator[tuple[bytes, int, int]]:
    """The entries of a node and of those below it (section 6)."""
    node = data[start:stop]
    assert hashlib.sha256(node).digest() == digest and level in (None, node[0])
    count, at = number(node, 1)
    key = before = b""
    for n in range(count):
        same, at = number(node, at)
        rest, at = text(node, at)
        key = before[:same] + rest
        assert not n or (key > before and (len(before) == same or key[: same + 1] != before[: same + 1]))
        place, at = number(node, at)
        length, at = number(node, at)
        if node[0]:
            below = list(entries(data, place, place + length, node[at : at + 32], node[0] - 1))
            at += 32
            assert below[0][0] == key
            yield from below
        else:
            yield key, place, length
        before = key
    assert at == len(node)


def index(files: Files) -> dict[bytes, tuple[int, int]]:
    """Places and lengths of all keys (section 6)."""
    known: dict[bytes, tuple[int, int]] = {}
    for run in head(files)["runs"]:
        data = files[f"index-{run['number']}"]
        assert len(data) == run["bytes"]
        listed = list(entries(data, len(data) - run["root"], len(data), bytes.fromhex(run["digest"])))
        assert len(listed) == run["entries"] and [key for key, *_ in listed] == sorted(key for key, *_ in listed)
        known |= {key: (place, length) for key, place, length in listed}
    return {key: entry for key, entry in known.items() if entry[1]}


def lengthened(data: bytes) -> bytes:
    """v3, 4, of all of `data`."""

    def at_bits(at: int, bits: int) -> tuple[int, int, int]:
        most = (1 << bits) - 1
        kind, value = data[at] >> bits, data[at] & most
        at += 1
        shift = 0
        while value >= most:
            value += (data[at] & 127) << shift
            shift += 7
            at += 1
            if data[at - 1] < 128:
                break
        return kind, value, at

    _, size, at = at_bits(0, 8)
    out = bytearray()
    while len(out) < size:
        kind, n, at = at_bits(at, 7)
        if kind == 0:
            out += data[at : at + n + 1]
            at += n + 1
        else:
            _, distance, at = at_bits(at, 8)
            for _ in range(n + 3):
                out.append(out[-distance - 1])
    assert at == len(data) and len(out) == size
    return bytes(out)


def applied(frame: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """Section 4."""
    made = dict(frame)
    for key, value in patch.items():
        if value == {} and isinstance(value, dict):
            made.pop(key, None)
        elif isinstance(value, dict):
            below = made.get(key)
            made[key] = applied(below if isinstance(below, dict) else {}, value)
        else:
            made[key] = value
    return made


def difference(frame: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """The one patch (section 4)."""
    made: dict[str, Any] = {key: {} for key in frame if key not in manifest}
    for key, value in manifest.items():
        if key in frame and isinstance(value, dict) and isinstance(frame[key], dict):
            if below := difference(frame[key], value):
                made[key] = below
        elif key not in frame or json.dumps(frame[key]) != json.dumps(value):
            made[key] = value
    return made


def lrconvert_file(manifest: dict[str, Any], payload: bytes, extras: list[bytes]) -> bytes:
    """v3, 2."""
    stored = packed_3(manifest) + payload
    sizes = {"lrconvert": 33 + len(stored), **{f"extra.{n}": len(data) for n, data in enumerate(extras)}}
    listed, at = [], 0
    for name in sorted(sizes):
        listed.append(f'"{name}":{{"dtype":"U8","shape":[{sizes[name]}],"data_offsets":[{at},{at + sizes[name]}]}}')
        at += sizes[name]
    text = ("{" + ",".join(listed) + "}").encode()
    text += b" " * (-len(text) % 8)
    before = struct.pack("<Q", len(text)) + text
    before += b"".join(extras[int(name[6:])] for name in sorted(sizes) if name != "lrconvert") + b"\3"
    return before + hashlib.sha256(before + stored).digest() + stored


def file_of(files: Files, name: bytes, place: int, length: int) -> bytes:
    """Section 5."""
    about = head(files)
    data, end = files[f"members-{about['generation']}"], about["bytes"]
    kind, body, nbytes = record(data, place, end)
    assert kind == 3 and nbytes == length
    fields, at = number(body, 0)
    own = body[at + fields :]
    stated, at = text(body, at)
    assert stated == name
    decoded = name.decode()
    parts = decoded.split("/")
    assert len(name) <= 255 and unicodedata.normalize("NFC", decoded) == decoded
    assert all(re.fullmatch(r"(?!\.)[\w.+=@:, -]{1,200}", part) for part in parts)
    digest, version = body[at : at + 32], body[at + 32]
    nbytes, at = number(body, at + 33)
    frame_at, at = number(body, at)
    patch_bytes, at = text(body, at)
    count, at = number(body, at)
    stream, begins, taken = bytearray(), 0, 0
    for _ in range(count):
        more, at = number(body, at)
        tensor_at, at = number(body, at)
        begins += more
        kind, tensor, _ = record(data, tensor_at, end)
        assert kind == 2 and tensor_at < place and begins >= len(stream)
        need = begins - len(stream)
        stream += own[taken : taken + need] + tensor
        taken += need
    assert at == len(body) - len(own) and version in (1, 2, 3) and taken <= len(own)
    stream += own[taken:]
    kind, frame, _ = record(data, frame_at, end)
    assert kind == 1 and frame_at < place
    packed = lengthened(frame)
    content, stop = value_at(packed, 0, True)
    patch, patch_stop = value_at(patch_bytes, 0, True)
    assert stop == len(packed) and patch_stop == len(patch_bytes)
    manifest = applied(content, patch)
    assert json.dumps(difference(content, manifest), sort_keys=True) == json.dumps(patch, sort_keys=True)
    extras: list[bytes] = []
    left = bytes(stream)
    for extra in reversed(manifest["extras"]):
        size = WIDE[extra["dtype"]]
        for n in extra["shape"]:
            size *= n
        extras.insert(0, left[len(left) - size :])
        left = left[: len(left) - size]
    made = lrconvert_file(manifest, left, extras)
    assert len(made) == nbytes and hashlib.sha256(made).digest() == digest
    return made


def members(files: Files) -> dict[str, bytes]:
    """Every member's file."""
    about = head(files)
    assert files[f"members-{about['generation']}"][:8] == bytes.fromhex("6c72666c65657401")
    known = {key: entry for key, entry in index(files).items() if key[:1] != b"\0"}
    assert len(known) == about["members"]
    return {key.decode(): file_of(files, key, *entry) for key, entry in known.items()}
