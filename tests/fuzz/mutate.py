"""Fast mutations of folders for the long run, each from a `random.Random` alone, so that a seed gives them again.

`lrconvert.testing.mutations` says what it did and shrinks, for tests; here some thousand mutations a second count.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from lrconvert.core.dtypes import STORAGE
from lrconvert.testing import json_trees
from lrconvert.testing.json_trees import Literal, Members, Node
from lrconvert.testing.raw_files import RawFile, header_and_data, spelled, tensor_digest, with_header

Folder = dict[str, bytes]
Tensor = tuple[str, list[int], bytes]  # dtype, shape, data

_INTEGERS = (0, 1, 2, 3, 4, 7, 8, 16, 31, 255, 256, 4096, 4097, 65537, 2**31 - 1, 2**31, 2**53 - 1, -1, -(2**31))
_SPELLED = ("9007199254740992", "1e999", "-0", "NaN", "0.5", "1.0", "-0.0", "1e-320", "1e300", "01", "9" * 400)
_VALUES: tuple[Node, ...] = (None, True, False, 0, 1, 0.5, "", "1", [], [[]], Members(), Members([("a", 1)]))
_TEXTS = ("", " ", "../x", "/etc/passwd", "a\nb", "a\x1b[2J", "x" * 300, "é", "\ud800", ".*", "(a+)+$", "a.b.c", "0")
_FLOATS = (b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\0\0\0\x80", b"\1\0\0\0", b"\xff\xff\x7f\x7f", b"\0\x7c", b"\0\x7e")
_HEX = "0123456789abcdef"


class Mutator:
    """Mutations with words of a `dictionary` that the program knows."""

    def __init__(self, random: Random, dictionary: Sequence[str]) -> None:
        self.random = random
        self.words = tuple(dictionary)

    # --- folders ---

    def folder(self, files: Folder, other: Folder, names: Sequence[str]) -> Folder:
        """One to four changes to files called `names`; `other` is a folder that parts may come from."""
        changed, random = dict(files), self.random
        for _ in range(1 + min(int(random.expovariate(1.0)), 3)):
            name = random.choice(names)
            if name in changed:
                changed[name] = self.file(changed[name], other.get(name, b""))
        return changed

    def file(self, data: bytes, other: bytes = b"") -> bytes:
        """A change that suits what the bytes are: JSON, a safetensors file, anything."""
        if self.random.random() < 0.8:
            try:
                if data[:1] in (b"{", b"["):
                    return self.json(data)
                if data[8:9] == b"{":
                    return self.container(data)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, UnicodeError):
                pass
        return self.bytes(data, other)

    def bytes(self, data: bytes, other: bytes = b"") -> bytes:
        """Bits, numbers and pieces of bytes changed."""
        random, out = self.random, bytearray(data)
        for _ in range(1 + min(int(random.expovariate(0.7)), 7)):
            at = random.randrange(len(out) + 1)
            kind = random.randrange(9)
            if kind == 0:
                out[at : at + 1] = bytes([random.randrange(256)])
            elif kind == 1 and at < len(out):
                out[at] ^= 1 << random.randrange(8)
            elif kind == 2:
                out[at:at] = random.randbytes(random.choice((1, 2, 4, 8, 32)))
            elif kind == 3:
                del out[at : at + random.choice((1, 2, 4, 8, 64))]
            elif kind == 4:
                size = random.choice((1, 2, 4, 8))
                number = random.choice((*_INTEGERS, len(out), len(out) - at, 2**32 - 1, 2**63, 2**64 - 1))
                out[at : at + size] = (number % 256**size).to_bytes(size, "little")
            elif kind == 5:
                size, by = random.choice((1, 4, 8)), random.choice((-32, -8, -1, 1, 8, 32))
                number = (int.from_bytes(out[at : at + size], "little") + by) % 256**size
                out[at : at + size] = number.to_bytes(size, "little")
            elif kind == 6:
                start = random.randrange(len(data) + 1)
                out[at:at] = data[start : start + random.choice((4, 16, 64))]
            elif kind == 7 and other:
                start = random.randrange(len(other))
                out[at : at + 16] = other[start : start + random.choice((4, 16, 64))]
            elif kind == 8:
                word = random.choice(self.words).encode("utf-8", "replace")
                out[at : at + random.choice((0, len(word)))] = word
        return bytes(out)

    # --- JSON ---

    def text(self, text: str) -> str:
        """Another text in the place of one."""
        random = self.random
        kind = random.randrange(7)
        if kind == 0:
            return random.choice(_TEXTS)
        if kind == 1:
            return random.choice(self.words)
        at = random.randrange(len(text) + 1)
        if kind == 2:
            return text[:at] + random.choice(self.words) + text[at:]
        if kind == 3:
            return text[:at] + text[at + random.choice((1, 2, 8)) :]
        if kind == 4 and text and all(c in _HEX for c in text):
            return text[:at] + random.choice(_HEX) + text[at + 1 :]
        parts = text.split(".")
        if kind == 5 and len(parts) > 1:
            n = random.randrange(len(parts))
            parts[n : n + 1] = random.choice(([], [random.choice(self.words)], [parts[n]] * 2, [str(n)]))
            return ".".join(parts)
        return text[:at] + chr(random.choice((0, 9, 32, 46, 48, 57, 97, 0x202E, 0x1F600))) + text[at:]

    def value(self, node: Node) -> Node:
        """Another value in the place of one."""
        random = self.random
        if random.random() < 0.1:
            return random.choice(_VALUES)
        if isinstance(node, bool) or node is None:
            return random.choice((not node, 0, "x", 1.5))
        if isinstance(node, int | float):
            return random.choice((random.choice(_INTEGERS), node + random.choice((-8, -1, 1, 8)), node * 2, float(node),
                                  Literal(random.choice(_SPELLED)), str(node)))  # fmt: skip
        if isinstance(node, str):
            return self.text(node)
        items = list(node)
        if isinstance(node, Members):
            kind = random.randrange(4)
            if kind == 0 or not items:
                items.append((random.choice(self.words), random.choice((*_VALUES, *_INTEGERS))))
            elif kind == 1:
                n = random.randrange(len(items))
                items[n] = (self.text(items[n][0]), items[n][1])
            elif kind == 2:
                del items[random.randrange(len(items))]
            else:
                n, m = random.randrange(len(items)), random.randrange(len(items))
                items[n] = (items[n][0], items[m][1])
            return Members(items)
        kind = random.randrange(5)
        if kind == 0 or not items:
            items.append(random.choice((*items, *_VALUES, random.choice(self.words))))
        elif kind == 1:
            del items[random.randrange(len(items))]
        elif kind == 2:
            items.reverse()
        elif kind == 3:
            items *= random.choice((2, 30))
        else:
            n, m = random.randrange(len(items)), random.randrange(len(items))
            items[n], items[m] = items[m], items[n]
        return items

    def tree(self, root: Node) -> Node:
        """One value of a JSON tree changed, or exchanged for another one of the tree."""
        paths = list(json_trees.places(root))
        path, _ = self.random.choice(paths)
        if self.random.random() < 0.1:
            other = self.random.choice(paths)[1]
            return json_trees.changed(root, path, lambda _: other)
        return json_trees.changed(root, path, self.value)

    def json(self, text: bytes) -> bytes:
        """A JSON text with one value changed."""
        return json_trees.spell(self.tree(json_trees.parsed(text))).encode("utf-8", "surrogatepass")

    # --- safetensors ---

    def container(self, file: bytes) -> bytes:
        """A safetensors file with another header, or another whole and valid file."""
        random = self.random
        text, data = header_and_data(file)
        if random.random() < 0.3 or len(text) > 1 << 16:
            return with_header(self.json(text), data, random.choice((None, None, None, len(text), len(file), 0)))
        header = json.loads(text)
        metadata = header.pop("__metadata__", None)
        tensors = {n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in header.items()}
        if metadata and random.random() < 0.15:
            changed = self.tree(json_trees.tree(metadata))
            metadata = json.loads(json_trees.spell(changed))
        else:
            self.tensors(tensors)
        return valid(tensors, metadata)

    def tensors(self, tensors: dict[str, Tensor]) -> None:
        """One tensor of a file changed, added, left out or renamed; what it has of bytes fits its shape."""
        random = self.random
        names = list(tensors) or [random.choice(self.words)]
        name = random.choice(names)
        dtype, shape, data = tensors.setdefault(name, ("F32", [1], bytes(4)))
        kind = random.randrange(7)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            tensors[self.text(name)] = tensors.pop(name) if random.random() < 0.5 else tensors[name]
        elif kind == 2:
            tensors[name] = tensors[random.choice(names)]
        elif kind == 3:
            tensors[name] = (dtype, shape, self.numbers(data))
        elif kind == 4:
            other = random.choice(sorted(STORAGE))
            tensors[name] = (other, shape, fitting(data, other, shape))
        elif kind == 5:
            sizes = list(shape)
            if sizes and random.random() < 0.6:
                n = random.randrange(len(sizes))
                sizes[n] = random.choice((sizes[n] + 1, max(sizes[n] - 1, 0), 1, 2, sizes[n] * 2))
            else:
                sizes = random.choice((sizes[::-1], [*sizes, 1], [1, *sizes], sizes[:-1], [math.prod(sizes[:8])], []))
            tensors[name] = (dtype, sizes, fitting(data, dtype, sizes))
        else:
            parts, taken = name.split("."), random.choice(names).split(".")
            n = random.randrange(len(parts))
            parts[n] = random.choice((random.choice(taken), random.choice(self.words)))
            tensors[".".join(parts)] = tensors.pop(name)

    def numbers(self, data: bytes) -> bytes:
        """The bytes of a tensor with some numbers changed, in place."""
        random, out = self.random, bytearray(data)
        for _ in range(random.randrange(1, 4)):
            if out:
                at = random.randrange(len(out)) & ~3
                new = random.choice((*_FLOATS, random.randbytes(4), random.randrange(16).to_bytes(8, "little")))
                out[at : at + len(new)] = new[: len(out) - at]
        return bytes(out)


def fitting(data: bytes, dtype: str, shape: Sequence[int]) -> bytes:
    """As many bytes as that shape takes, where that is little."""
    size = math.prod(shape[:64]) * (STORAGE[dtype].itemsize if dtype in STORAGE else 4)
    if not 0 <= size <= 1 << 16:
        return data
    return (data * (1 + size // max(len(data), 1)))[:size].ljust(size, b"\0")


def valid(tensors: dict[str, Tensor], metadata: Any = None) -> bytes:
    """A safetensors file without holes."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
    return with_header(text + b" " * (-len(text) % 8), b"".join(data for *_, data in tensors.values()))


# --- what is guarded by digests -------------------------------------------------------------------------------------


def signed_container(file: bytes, key: str, mutate: Callable[[Any, dict[str, Tensor]], Any]) -> bytes:
    """A file of ours with manifest `key`, after ``mutate(manifest, tensors)`` gave the new one, its digests right."""
    text, data = header_and_data(file)
    header = json.loads(text)
    if key in header:  # container version 2
        raw = RawFile.of(file)
        raw.manifest = mutate(raw.manifest, raw.tensors)
        return raw.sign().file()
    manifest = json.loads(header.pop("__metadata__")[key])
    tensors = {n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in header.items()}
    manifest = mutate(manifest, tensors)
    digests = {name: tensor_digest(name, *tensor) for name, tensor in tensors.items()}
    manifest["digests"] = {"content": content_digest(digests, manifest), "tensors": digests}
    return valid(tensors, {key: spelled(manifest, sort=True).decode()})


def content_digest(digests: dict[str, str], manifest: dict[str, Any]) -> str:
    """The digest of a manifest and its tensors, by section 10 of lrconvert-v1.md."""
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(digests.items()):
        digest.update(name.encode() + b"\0" + bytes.fromhex(value))
    digest.update(spelled({**manifest, "digests": {}}, sort=True))
    return digest.hexdigest()
