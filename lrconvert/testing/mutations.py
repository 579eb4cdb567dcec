"""One thing wrong at a time: valid material with a single structured change.

A reader must refuse a mutated file with one of our errors, or find in it what was in the valid one (a key of an
object moved, say), or what the changed place says (another alpha). Which of these holds is for the test to decide;
`Mutation.kind` and `Mutation.where` say what was done.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lrconvert.core.dtypes import STORAGE
from lrconvert.testing import json_trees, lazy
from lrconvert.testing.json_trees import Literal, Members, Node, Path
from lrconvert.testing.raw_files import V1, OneTensor, RawFile, header_and_data, spelled, with_header

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy


@dataclass(frozen=True)
class Mutation:
    """Mutated bytes, and what was done to which part. `name` is the file of a folder it was done to."""

    kind: str
    where: str
    data: bytes
    name: str = ""


# --- JSON -----------------------------------------------------------------------------------------------------------

_HOSTILE_TEXT = {
    "path": ("../../etc/passwd", "/etc/passwd", "C:\\x", "\\\\host\\x", "a/../../b", ".", "~/x", "file:///etc/passwd"),
    "control": ("a\x1b[2Jb", "a\0b", "a\nb", "a\rb", "a\N{RIGHT-TO-LEFT OVERRIDE}b"),
    "text": ("", " ", "e\N{COMBINING ACUTE ACCENT}", "x" * 5000, "__metadata__", "(a+)+$", "nan"),
}
_NUMBERS = {
    "huge": tuple(map(Literal, ("9007199254740992", "18446744073709551616", "9" * 400, "1" + "0" * 5000))),
    "negative": (-1, -(2**31), Literal("-0"), -(2**53)),
    "fraction": tuple(map(Literal, ("0.5", "1.0", "1e2", "1e999", "NaN", "Infinity", "-Infinity", "1E400"))),
    "spelling": tuple(map(Literal, ("01", "+1", "0x10", "1_0", ".5", "1.", "\N{ARABIC-INDIC DIGIT ONE}"))),
    "boundary": (0, 2**31 - 1, 2**31, 2**53 - 1, 4097, 65537),
}
_OTHER_TYPES: tuple[Node, ...] = (None, True, False, 0, 1, "1", [], [[]], Members(), Members([("a", 1)]))
_DTYPES = (*sorted(STORAGE), "F4", "f32", "float32", "C64")


def _json_changes(root: Node) -> dict[str, list[tuple[Path, Callable[[Node, Any], Node]]]]:
    """Return for each kind where it applies: the path, and a function of the value at it and of `draw`."""
    st = lazy.st
    changes: dict[str, list[tuple[Path, Callable[[Node, Any], Node]]]] = {}

    def offer(kind: str, path: Path, change: Callable[[Node, Any], Node]) -> None:
        changes.setdefault(kind, []).append((path, change))

    def one_of(values: tuple[Node, ...]) -> Callable[[Node, Any], Node]:
        return lambda node, draw: draw(st.sampled_from(values))

    for path, node in json_trees.places(root):
        offer("null", path, lambda node, draw: None)
        offer("type", path, one_of(_OTHER_TYPES))
        offer("nest", path, lambda node, draw: Literal("[" * (n := draw(st.sampled_from([8, 17, 3000]))) + "]" * n))
        if isinstance(node, bool):
            offer("flip", path, lambda node, draw: not node)
        elif isinstance(node, int | float):
            for kind, numbers in _NUMBERS.items():
                offer(kind, path, one_of(numbers))
            offer("shift", path, lambda node, draw: node + draw(st.sampled_from([-8, -4, -1, 1, 4, 8])))
        elif isinstance(node, str):
            for kind, texts in _HOSTILE_TEXT.items():
                offer(kind, path, one_of(texts))
            offer("escape", path, lambda node, draw: Literal('"' + "".join(f"\\u{ord(c):04x}" for c in node) + '"'))
            offer("surrogate", path, lambda node, draw: Literal('"\\ud800"'))
            if node in STORAGE:
                offer("dtype", path, one_of(_DTYPES))
        if isinstance(node, list) and node:
            offer("drop", path, lambda node, draw: _without(node, draw(st.integers(0, len(node) - 1))))
            offer("duplicate", path, lambda node, draw: _twice(node, draw(st.integers(0, len(node) - 1))))
            offer("reverse", path, lambda node, draw: type(node)(node[::-1]))
        if isinstance(node, Members):
            offer("more", path, lambda node, draw: Members([*node, ("more", 1)]))
            if node:
                offer("rename", path, _renamed)
                offer("duplicate key", path, _same_key)
    return changes


def _without(node: Node, n: int) -> Node:
    return type(node)([*node[:n], *node[n + 1 :]])


def _twice(node: Node, n: int) -> Node:
    return type(node)([*node[: n + 1], *node[n:]])


def _renamed(node: Members, draw: Any) -> Members:
    n = draw(lazy.st.integers(0, len(node) - 1))
    keys = [node[n][0].upper(), node[n][0] + "x", *_HOSTILE_TEXT["path"][:2], *_HOSTILE_TEXT["control"], ""]
    return Members([*node[:n], (draw(lazy.st.sampled_from(keys)), node[n][1]), *node[n + 1 :]])


def _same_key(node: Members, draw: Any) -> Members:
    """One key twice, with another value."""
    n = draw(lazy.st.integers(0, len(node) - 1))
    return Members([*node, (node[n][0], draw(lazy.st.sampled_from(_OTHER_TYPES)))])


_TEXT_CHANGES: dict[str, Callable[[bytes, int], bytes]] = {
    "cut": lambda text, at: text[:at],
    "byte": lambda text, at: text[:at] + bytes([text[at] ^ (1 << at % 8)]) + text[at + 1 :],
    "insert": lambda text, at: text[:at] + b"\0\xff\xc3("[at % 4 :] + text[at:],
    "repeat": lambda text, at: text[:at] + text[at : at + 7] + text[at:],
}
_FRAMES: dict[str, Callable[[bytes], bytes]] = {
    "space before": lambda text: b" " + text,
    "space after": lambda text: text + b"\n",
    "junk after": lambda text: text + b"x",
    "byte-order mark": lambda text: b"\xef\xbb\xbf" + text,
    "NUL": lambda text: text + b"\0",
    "in a list": lambda text: b"[" + text + b"]",
}


def _json_mutations(text: bytes) -> SearchStrategy[Mutation]:
    st = lazy.st
    root = json_trees.parsed(text)
    changes = _json_changes(root)

    @st.composite
    def structured(draw: DrawFn) -> Mutation:
        kind = draw(st.sampled_from(sorted(changes)))
        path, change = draw(st.sampled_from(changes[kind]))
        where = json_trees.keys_to(root, path)
        mutated = json_trees.spell(json_trees.changed(root, path, lambda node: change(node, draw)))
        return Mutation(kind, where, mutated.encode("utf-8"))

    frames = st.sampled_from(sorted(_FRAMES)).map(lambda kind: Mutation(kind, "the whole", _FRAMES[kind](text)))
    return st.one_of(structured(), structured(), structured(), frames, _text_mutations(text))


def _text_mutations(data: bytes) -> SearchStrategy[Mutation]:
    st = lazy.st
    if not data:
        return st.just(Mutation("insert", "byte 0", b"\0"))
    return st.builds(
        lambda kind, at: Mutation(kind, f"byte {at}", _TEXT_CHANGES[kind](data, at)),
        st.sampled_from(sorted(_TEXT_CHANGES)),
        st.integers(0, len(data) - 1),
    )


# --- files ----------------------------------------------------------------------------------------------------------

_LENGTHS = (0, 1, 2**31, 2**63 - 8, 2**63, 2**64 - 8, 2**64 - 1)


def _container_mutations(file: bytes) -> SearchStrategy[Mutation]:
    """Return mutations of the bytes, the frame, or the header of a safetensors file."""
    st = lazy.st
    header, data = header_and_data(file)

    def around(mutation: Mutation) -> Mutation:
        return Mutation(mutation.kind, f"header: {mutation.where}", with_header(mutation.data, data))

    lengths = st.sampled_from([*_LENGTHS, len(header) - 1, len(header) + 1, len(header) + len(data)]).map(
        lambda n: Mutation("length", f"header length {n}", with_header(header, data, n))
    )
    tails = st.binary(min_size=1, max_size=9).map(lambda tail: Mutation("append", "the end", file + tail))
    return st.one_of(_json_mutations(header).map(around), lengths, tails, _text_mutations(file))


def _manifest_mutations(file: bytes) -> SearchStrategy[Mutation]:
    """Return mutations of the manifest of an lrconvert file, with the digest of the content made right where that is
    possible, so that they get past the digests. `where` begins with ``manifest``."""

    def signed(mutation: Mutation) -> Mutation:
        raw = RawFile.of(file)
        text = mutation.data
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            value = json.loads(text)
            if spelled(value) == text:  # not for what is misspelled
                raw.manifest = value
                text = raw.sign_content().spelled()
        if text is mutation.data and isinstance(raw, OneTensor):  # has no packed form
            return Mutation("cut", "the end", file[:-1])
        try:
            return Mutation(mutation.kind, f"manifest: {mutation.where}", raw.file(text))
        except UnicodeError:  # no file can hold it as text
            return Mutation("cut", "the end", file[:-1])

    raw = RawFile.of(file)
    changes = _json_mutations(spelled(raw.manifest, sort=True)).map(signed)
    if isinstance(raw, V1):
        return changes
    raw.sign()
    misspelled = _text_mutations(raw.spelled())
    misspelled = misspelled.map(lambda m: Mutation(m.kind, f"packed manifest: {m.where}", raw.file(m.data)))
    return lazy.st.one_of(changes, misspelled)


def mutations(value: Any) -> SearchStrategy[Mutation]:
    """Return mutations of a file, by what its bytes are (lrconvert, safetensors, JSON, anything), or of the text of a
    JSON value."""
    if not isinstance(value, bytes):
        return _json_mutations(json_trees.spell(json_trees.tree(value)).encode())
    try:
        RawFile.of(value)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    else:
        return lazy.st.one_of(_manifest_mutations(value), _container_mutations(value))
    for strategy, part in ((_container_mutations, header_and_data(value)[0]), (_json_mutations, value)):
        if part[:1] == b"{" and _is_json(part):
            return strategy(value)
    return _text_mutations(value)


def _is_json(text: bytes) -> bool:
    try:
        json_trees.parsed(text)
    except ValueError:
        return False
    return True


def folder_mutations(folder: Mapping[str, bytes], names: Collection[str] = ()) -> SearchStrategy[Mutation]:
    """Return mutations of one file of a folder, one of `names` if there are any; `Mutation.name` is the file."""
    st = lazy.st

    @st.composite
    def of_one_file(draw: DrawFn) -> Mutation:
        name = draw(st.sampled_from(sorted(names or folder)))
        return replace(draw(mutations(folder[name])), name=name)

    return of_one_file()
