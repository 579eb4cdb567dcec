"""JSON as a tree that can also hold what JSON forbids: keys that repeat, numbers spelled in any way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

Node = Any  # Members, list, str, int, float, bool, None or Literal
Path = tuple[int, ...]  # positions from the root inwards: of members and of list items alike


class Members(list[tuple[str, Any]]):
    """A JSON object: (key, value) in order."""


class Literal(str):
    """Text that stands in the JSON as it is."""


def parsed(text: bytes | str) -> Node:
    """Return the tree of a text."""
    return json.loads(text, object_pairs_hook=Members)


def tree(value: Any) -> Node:
    """Return `value` with its objects as `Members`."""
    return parsed(json.dumps(value))


def spell(node: Node) -> str:
    """Return the text of a tree, without white space."""
    if isinstance(node, Literal):
        return str(node)
    if isinstance(node, Members):
        return "{" + ",".join(f"{spell(key)}:{spell(value)}" for key, value in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(spell, node)) + "]"
    return json.dumps(node, ensure_ascii=False)


def places(node: Node, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    """Yield every value in the tree with its path, the root first."""
    yield path, node
    if isinstance(node, list):
        for n, item in enumerate(node):
            yield from places(item[1] if isinstance(node, Members) else item, (*path, n))


def changed(node: Node, path: Path, change: Callable[[Node], Node]) -> Node:
    """Return a copy of the tree with `change` applied to the value at `path`."""
    if not path:
        return change(node)
    first, rest = path[0], path[1:]
    if isinstance(node, Members):
        key, value = node[first]
        return Members([*node[:first], (key, changed(value, rest, change)), *node[first + 1 :]])
    return [*node[:first], changed(node[first], rest, change), *node[first + 1 :]]


def keys_to(node: Node, path: Path) -> str:
    """Return the path in words: ``a.b[2]``."""
    words = ""
    for step in path:
        if isinstance(node, Members):
            key, node = node[step]
            words += f".{key}"
        else:
            words += f"[{step}]"
            node = node[step]
    return words.lstrip(".") or "the whole"
