"""The manifest of an lrconvert file: what stands in it, its one spelling, and its parsing.

Normative text: ``formats/lrconvert-v1.md``, sections 4 to 8. Each section parses on its own, so that a validator can
report every finding; what holds between sections is checked in `file`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lrconvert.core.dtypes import FLOATS, itemsize
from lrconvert.core.errors import (
    CanonicalError,
    DtypeError,
    IndexRangeError,
    JsonSyntaxError,
    LimitError,
    MissingFieldError,
    ShapeError,
    TensorNameError,
    UnknownFieldError,
    VersionError,
)
from lrconvert.core.limits import MAX_DIM, OWN
from lrconvert.io.strictjson import as_hex, as_object
from lrconvert.lora import packing
from lrconvert.lora.adapter import USES, BaseFingerprint, CompactAdapter, ExtraTensor, Provenance, Target, View
from lrconvert.methods import base as methods
from lrconvert.methods.base import Method

FORMAT = "lrconvert"
VERSION = 1
MANIFEST_BYTES = 1 << 20

# In-memory upgrades of older manifests: UPGRADES[n] turns a version n manifest into version n + 1.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

_INTEGER_SEGMENT = re.compile(r"(?:(?<=\.)|^)(0|[1-9][0-9]{0,8})(?=\.|$)")
_FIELD = re.compile(r"[a-z][a-z0-9_]{0,62}")


# --- out ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digests:
    """Digests of the content and of every stored tensor, in hex."""

    content: str
    tensors: Mapping[str, str]


def group_targets(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """The manifest's target list. Names are cut at their first integer segment into prefix, number, suffix; targets
    with one prefix and one set of numbers share an entry, whose members differ in suffix, shape and view.

    A function of the set of targets alone: entries and members sorted, ranges ascending, maximal and inclusive.
    """
    numbers: dict[tuple[str, str, tuple[int, ...], str], list[int]] = {}
    entries: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for target in targets:
        found = _INTEGER_SEGMENT.search(target.name)
        if found:
            key = (target.name[: found.start()], target.name[found.end() :], target.shape, target.view.text)
            numbers.setdefault(key, []).append(int(found[0]))
        else:
            entry = {"name": target.name, **_shape_and_view(target.shape, target.view.text)}
            entries.append(((target.name, (), target.shape, target.view.text), entry))
    groups: dict[tuple[str, tuple[int, ...]], list[dict[str, Any]]] = {}
    for (prefix, suffix, shape, view), found_numbers in sorted(numbers.items()):
        member = {"suffix": suffix, **_shape_and_view(shape, view)}
        groups.setdefault((prefix, tuple(_ranges(found_numbers))), []).append(member)
    for (prefix, ranges), members in groups.items():
        entries.append(((prefix, ranges), {"prefix": prefix, "ranges": list(ranges), "members": members}))
    return [entry for _, entry in sorted(entries, key=lambda e: e[0])]


def _shape_and_view(shape: tuple[int, ...], view: str) -> dict[str, Any]:
    return {"shape": list(shape)} if view == "matrix" else {"shape": list(shape), "view": view}


def _ranges(numbers: Sequence[int]) -> list[int]:
    """First and last of each maximal run of the sorted numbers: [0, 3, 7, 7]."""
    ranges: list[int] = []
    for n in sorted(numbers):
        if ranges and ranges[-1] == n - 1:
            ranges[-1] = n
        else:
            ranges += [n, n]
    return ranges


def build(compact: CompactAdapter, digests: Digests | None, exponents: str) -> dict[str, Any]:
    """The manifest of a compact adapter; without `digests` the one that the content digest is taken of."""
    method = methods.get(compact.method)
    base = {"names": compact.base.names}
    if compact.base.content:
        base["content"] = compact.base.content
    came = compact.provenance
    named = {
        "source": came.source,
        "base_model": came.base_model,
        "revision": came.revision,
        "task_type": came.task_type,
    }
    provenance: dict[str, Any] = {key: value for key, value in named.items() if value}
    if came.fields:
        provenance["fields"] = dict(came.fields)
    return {
        "format": FORMAT,
        "version": VERSION,
        "requires": [],
        "method": {
            "id": method.id,
            "version": method.version,
            "config": method.header(compact.config),
            "exponents": exponents,
        },
        "targets": group_targets(compact.targets),
        "extras": [_extra_entry(extra) for extra in compact.extras],
        "base": base,
        "provenance": provenance,
        "digests": {} if digests is None else {"content": digests.content, "tensors": dict(digests.tensors)},
    }


def _extra_entry(extra: ExtraTensor) -> dict[str, Any]:
    entry = {"name": extra.name, "dtype": extra.dtype, "shape": list(extra.shape)}
    return entry if extra.use == "replace" else {**entry, "use": extra.use}


# --- in -------------------------------------------------------------------------------------------------------------


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise JsonSyntaxError(f"{what} is not a string")
    if len(value.encode()) > OWN.string_bytes:
        raise LimitError(f"{what} has more than {OWN.string_bytes} bytes")
    return value


def _name(value: Any, what: str) -> str:
    text = _text(value, what)
    if not text:
        raise TensorNameError(f"{what} is empty")
    return text


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise JsonSyntaxError(f"{what} is not a list")
    return value


def _shape(value: Any, what: str) -> tuple[int, ...]:
    """A shape of 1 to 4 dimensions, 1 to MAX_DIM each."""
    items = _list(value, what)
    if not 1 <= len(items) <= OWN.ndim or any(type(n) is not int or not 1 <= n <= MAX_DIM for n in items):
        raise ShapeError(f"{what} is {items!s:.60}; 1 to {OWN.ndim} dimensions of 1 to {MAX_DIM} are allowed")
    return tuple(items)


def _targets(value: Any) -> tuple[Target, ...]:
    """The expanded target list. Counts before it expands; refuses any grouping but the canonical one."""
    groups = _list(value, "targets")
    count = 0
    for group in groups:
        if isinstance(group, dict) and "name" in group:
            as_object(group, "a target entry", ["name", "shape"], ["view"])
            count += 1
            continue
        as_object(group, "a target entry", ["prefix", "ranges", "members"])
        ranges = _list(group["ranges"], "ranges")
        if len(ranges) % 2 or any(type(n) is not int or not 0 <= n < 10**9 for n in ranges):
            raise JsonSyntaxError("the ranges of a target entry are not pairs of integers")
        numbers = sum(max(b - a + 1, 0) for a, b in zip(ranges[::2], ranges[1::2], strict=True))
        count += numbers * len(_list(group["members"], "members"))
        if count > OWN.tensors:
            break
    if count > OWN.tensors:
        raise LimitError(f"the file declares more than {OWN.tensors} targets")
    targets = []
    for group in groups:
        if "name" in group:
            targets.append(_target(group["name"], group))
            continue
        prefix = _text(group["prefix"], "a target prefix")
        for member in group["members"]:
            suffix = _text(as_object(member, "a member", ["suffix", "shape"], ["view"])["suffix"], "a target suffix")
            for first, last in zip(group["ranges"][::2], group["ranges"][1::2], strict=True):
                targets += [_target(f"{prefix}{n}{suffix}", member) for n in range(first, last + 1)]
    targets.sort()
    if not targets:
        raise MissingFieldError("the file has no targets")
    for one, two in pairwise(targets):
        whole = {"matrix", "transposed", "conv"} & {one.view.kind, two.view.kind} or one.view.kind != two.view.kind
        if one.name == two.name and (whole or one.shape != two.shape or one.view == two.view):
            raise IndexRangeError(f"the target {one.name!r} is declared twice")
    if group_targets(targets) != groups:
        raise CanonicalError("the target list is not grouped and sorted in the one canonical way")
    return tuple(targets)


def _target(name: Any, fields: Mapping[str, Any]) -> Target:
    """A target of this name from the fields shape and view."""
    shape = _shape(fields["shape"], "the shape of a target")
    view = View(_text(fields.get("view", "matrix"), "a view"))
    view.matrix_shape(shape)
    return Target(_name(name, "a target name"), shape, view)


def _extras(value: Any) -> tuple[ExtraTensor, ...]:
    """Declared extras, still without data."""
    found = tuple(map(_extra, _list(value, "extras")))
    keys = [(e.name, e.use) for e in found]
    if keys != sorted(set(keys)):
        raise CanonicalError("the extras are not sorted by name, or one is named twice")
    by_key = dict(zip(keys, found, strict=True))
    for (name, use), extra in by_key.items():
        partner = by_key.get((name, "row_indices" if use == "rows" else "rows"))
        if use in ("rows", "row_indices") and (partner is None or partner.shape[:1] != extra.shape[:1]):
            raise ShapeError(f"the extra {name!r:.80} has {use} without as many of their other half")
    return found


def _extra(value: Any) -> ExtraTensor:
    item = as_object(value, "an extra", ["name", "dtype", "shape"], ["use"])
    name = _name(item["name"], "the name of an extra")
    dtype = _text(item["dtype"], "the dtype of an extra")
    shape = tuple(item["shape"]) if item["shape"] == [] else _shape(item["shape"], "the shape of an extra")
    itemsize(dtype)
    use = item.get("use", "replace")
    if use not in USES or ("use" in item and use == "replace"):
        raise UnknownFieldError(f"the extra {name!r:.80} has the unknown use {use!r:.40}")
    if use == "row_indices" and (dtype != "I64" or len(shape) != 1):
        raise DtypeError(f"the row indices of {name!r:.80} are {dtype} {list(shape)}; I64 in one dimension is stored")
    if use in ("add", "magnitude", "rows") and (dtype not in FLOATS or not shape):
        raise DtypeError(f"the extra {name!r:.80} for {use} is {dtype} {list(shape)}; floats are stored")
    return ExtraTensor(name, dtype, shape, b"", use)


def _extra_bytes(extra: ExtraTensor) -> int:
    return itemsize(extra.dtype) * math.prod(extra.shape)


def check_extra_bytes(declared: ExtraTensor, found: int) -> None:
    if found != _extra_bytes(declared):
        raise ShapeError(f"the extra {declared.name!r:.80} has {found} bytes, declared {_extra_bytes(declared)}")


def _base(value: Any) -> BaseFingerprint:
    item = as_object(value, "base", ["names"], ["content"])
    content = as_hex(item["content"], "base.content") if "content" in item else ""
    return BaseFingerprint(as_hex(item["names"], "base.names"), content)


def _provenance(value: Any) -> Provenance:
    item = as_object(value, "provenance", [], ["source", "base_model", "revision", "task_type", "fields"])
    texts = {key: _text(item[key], f"provenance.{key}") for key in item if key != "fields"}
    fields = item.get("fields", {})
    if not isinstance(fields, dict) or ("fields" in item and not fields) or "" in texts.values():
        raise CanonicalError("provenance holds an empty field or fields that are no object")
    if "source" in texts:
        as_hex(texts["source"], "provenance.source")
    for key, text in fields.items():
        if not _FIELD.fullmatch(key):
            raise TensorNameError(f"the provenance field {key!r} is not of [a-z][a-z0-9_]*")
        _text(text, f"provenance.fields.{key}")
    return Provenance(fields=fields, **texts)


def upgraded(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest at the current version, upgraded in memory. Raises E-VER."""
    if manifest.get("format") != FORMAT:
        raise VersionError("the manifest does not say format lrconvert")
    version = manifest.get("version")
    if type(version) is not int or version < min([VERSION, *UPGRADES]):
        raise VersionError(f"the container version {version!r:.40} is none")
    if version > VERSION:
        raise VersionError(f"the container version {version} is newer than {VERSION}", fix="update lrconvert")
    for step in range(version, VERSION):
        manifest = UPGRADES[step](manifest)
    requires = manifest.get("requires")
    if requires != []:
        raise VersionError(f"the file requires features that are not known: {requires!r:.80}", fix="update lrconvert")
    return manifest


def _method(value: Any) -> tuple[Method, dict[str, Any], list[int]]:
    """(method, header, exponents of the half tensors)."""
    item = as_object(value, "method", ["id", "version", "config", "exponents"])
    method = methods.get(_text(item["id"], "method.id"))
    if type(item["version"]) is not int or item["version"] != method.version:
        raise VersionError(
            f"method {method.id} has version {item['version']!r:.20} in the file, this program knows {method.version}",
            fix="update lrconvert",
        )
    if not isinstance(item["config"], dict):
        raise JsonSyntaxError("method.config is not an object")
    text = _text(item["exponents"], "method.exponents")
    if not re.fullmatch(r"(?:[0-9a-f]{2})*", text):
        raise JsonSyntaxError("method.exponents is not pairs of lower-case hexadecimal digits")
    exponents = [n - 256 if n > 127 else n for n in bytes.fromhex(text)]
    low, high = packing.EXPONENT_RANGE
    if any(not low <= n <= high for n in exponents):
        raise LimitError(f"an exponent is outside {low} to {high}")
    return method, item["config"], exponents


# The sections of a manifest that stand for themselves; on the rest see `_examine`.
SECTIONS: dict[str, Callable[[Any], Any]] = {
    "targets": _targets,
    "extras": _extras,
    "base": _base,
    "provenance": _provenance,
    "method": _method,
}
