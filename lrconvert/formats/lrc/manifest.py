"""The manifest of an lrconvert file: what stands in it, and its parsing.

Normative text: ``formats/lrconvert-v2.md``, section 4, and ``formats/lrconvert-v1.md``, sections 5 to 8. Each section
parses on its own, so that a validator can report every finding; what holds between sections is checked in `file`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any

from lrconvert.core import errors
from lrconvert.core.dtypes import FLOATS, itemsize
from lrconvert.core.limits import MAX_DIM, OWN
from lrconvert.io import fields
from lrconvert.io.fields import By, Check, Hex
from lrconvert.lora import packing
from lrconvert.lora.adapter import MAGNITUDES, USES, CompactAdapter, ExtraTensor, Provenance, Target, View
from lrconvert.methods import base as methods
from lrconvert.methods.base import Method

MANIFEST_BYTES = 1 << 20
Features = frozenset[str]
_CONV3D = "conv3d"
FEATURES = (_CONV3D, "input_magnitude", "textual_inversion")  # views and uses that release 0.1.0 does not know

_INTEGER_SEGMENT = re.compile(r"(?:(?<=\.)|^)(0|[1-9][0-9]{0,8})(?=\.|$)")
_FIELD = re.compile(r"[a-z][a-z0-9_]{0,62}")


# --- fields ---------------------------------------------------------------------------------------------------------


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise errors.JsonSyntaxError(f"{path} is not a string")
    if len(value.encode()) > OWN.string_bytes:
        raise errors.LimitError(f"{path} has more than {OWN.string_bytes} bytes")
    return value


def _shape(value: Any, path: str, most: int = OWN.ndim) -> tuple[int, ...]:
    """A shape of 1 to 4 dimensions, 1 to MAX_DIM each."""
    if not isinstance(value, list):
        raise errors.JsonSyntaxError(f"{path} is not a list")
    if not 1 <= len(value) <= most or any(type(n) is not int or not 1 <= n <= MAX_DIM for n in value):
        allowed = f"1 to {most} dimensions of 1 to {MAX_DIM} are allowed"
        raise errors.ShapeError(f"{path} is {value!s:.60}; {allowed}")
    return tuple(value)


def _pairs(value: Any, path: str) -> tuple[int, ...]:
    integers = isinstance(value, list) and all(type(n) is int and 0 <= n < 10**9 for n in value)
    if not integers or len(value) % 2:
        raise errors.JsonSyntaxError(f"{path} is {value!r:.60}, expected first and last of each range")
    return tuple(value)


def _strings(value: Any, path: str) -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        raise errors.CanonicalError(f"{path} is {value!r:.60}, expected an object with a field, or nothing")
    for key, text in value.items():
        if not _FIELD.fullmatch(key):
            raise errors.TensorNameError(f"the field {key!r} of {path} is not of [a-z][a-z0-9_]*")
        _text(text, f"{path}.{key}")
    return value


def _exponents(value: Any, path: str) -> list[int]:
    if not re.fullmatch(r"(?:[0-9a-f]{2})*", _text(value, path)):
        raise errors.JsonSyntaxError(f"{path} is not pairs of lower-case hexadecimal digits")
    exponents = [n - 256 if n > 127 else n for n in bytes.fromhex(value)]
    low, high = packing.EXPONENT_RANGE
    if any(not low <= n <= high for n in exponents):
        raise errors.LimitError(f"{path} holds an exponent outside {low} to {high}")
    return exponents


_Text = Annotated[str, By(_text)]
_Name = Annotated[_Text, Check(bool, "a name", errors.TensorNameError)]
_Filled = Annotated[_Text, Check(bool, "some text, or no such field", errors.CanonicalError)]
_Shape = Annotated[tuple[int, ...], By(lambda value, path: _shape(value, path, OWN.ndim + 1))]  # of a parameter


@dataclass(frozen=True)
class _Single:
    """A target whose name has no number."""

    name: _Name
    shape: _Shape
    view: _Text = "matrix"


@dataclass(frozen=True)
class _Member:
    suffix: _Text
    shape: _Shape
    view: _Text = "matrix"


@dataclass(frozen=True)
class _Group:
    """Targets with the same names but for one number each: every member for every number of the ranges."""

    prefix: _Text
    ranges: Annotated[tuple[int, ...], By(_pairs)]
    members: tuple[_Member, ...]

    def count(self) -> int:
        return len(self.members) * sum(max(b - a + 1, 0) for a, b in self.pairs())

    def pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.ranges[::2], self.ranges[1::2], strict=True))


@dataclass(frozen=True)
class _Extra:
    name: _Name
    dtype: _Text
    shape: Annotated[tuple[int, ...], By(lambda value, path: () if value == [] else _shape(value, path))]
    use: Annotated[str, fields.one_of([use for use in USES if use != "replace"], errors.UnknownFieldError)] = "replace"


@dataclass(frozen=True)
class _Base:
    content: Hex = ""


@dataclass(frozen=True)
class _Provenance:
    source: Annotated[_Filled, fields.HEX] = ""
    base_model: _Filled = ""
    revision: _Filled = ""
    task_type: _Filled = ""
    fields: Annotated[Mapping[str, str], By(_strings)] = field(default_factory=dict)


@dataclass(frozen=True)
class _Method:
    id: _Text
    version: Any
    config: dict[str, Any]
    exponents: Annotated[list[int], By(_exponents)]


@dataclass(frozen=True)
class Manifest:
    """The fields of the object itself, each with a parser of its own (`SECTIONS`, `check_requires`)."""

    requires: Any
    method: Any
    targets: Any
    extras: Any
    base: Any
    provenance: Any


# --- out ------------------------------------------------------------------------------------------------------------


def group_targets(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Return the manifest's target list. Names are cut at their first integer segment into prefix, number, suffix;
    targets with one prefix and one set of numbers share an entry, whose members differ in suffix, shape and view.

    A function of the set of targets alone: entries and members sorted, ranges ascending, maximal and inclusive.
    """
    numbers: dict[tuple[str, str, tuple[int, ...], str], list[int]] = {}
    entries: list[tuple[tuple[Any, ...], _Single | _Group]] = []
    for target in targets:
        segment = _INTEGER_SEGMENT.search(target.name)
        if segment:
            key = (target.name[: segment.start()], target.name[segment.end() :], target.shape, target.view.text)
            numbers.setdefault(key, []).append(int(segment[0]))
        else:
            single = _Single(target.name, target.shape, target.view.text)
            entries.append(((target.name, (), target.shape, target.view.text), single))
    groups: dict[tuple[str, tuple[int, ...]], list[_Member]] = {}
    for (prefix, suffix, shape, view), occurring in sorted(numbers.items()):
        groups.setdefault((prefix, _ranges(occurring)), []).append(_Member(suffix, shape, view))
    for (prefix, ranges), members in groups.items():
        entries.append(((prefix, ranges), _Group(prefix, ranges, tuple(members))))
    return [fields.as_json(entry) for _, entry in sorted(entries, key=lambda e: e[0])]


def _ranges(numbers: Sequence[int]) -> tuple[int, ...]:
    """First and last of each maximal run of the sorted numbers: (0, 3, 7, 7)."""
    ranges: list[int] = []
    for n in sorted(numbers):
        if ranges and ranges[-1] == n - 1:
            ranges[-1] = n
        else:
            ranges += [n, n]
    return tuple(ranges)


def build(compact: CompactAdapter, exponents: str) -> dict[str, Any]:
    """Return the manifest of a compact adapter, as a JSON value."""
    return frame(compact) | {"method": method_entry(compact.method, compact.config, exponents)}


def frame(compact: CompactAdapter) -> dict[str, Any]:
    """Return the manifest with an empty method: all that does not depend on the configuration."""
    manifest = Manifest(
        requires=features(compact.targets, compact.extras),
        method={},
        targets=group_targets(compact.targets),
        extras=[fields.as_json(_Extra(e.name, e.dtype, e.shape, e.use)) for e in compact.extras],
        base=fields.as_json(_Base(compact.base.content)),
        provenance=fields.as_json(compact.provenance),
    )
    return fields.as_json(manifest)  # type: ignore[no-any-return]


def features(targets: Iterable[Target], extras: Iterable[ExtraTensor]) -> list[str]:
    """Return the features that a file of these needs, sorted: what the first release did not know."""
    needed = {_CONV3D for target in targets if _is_conv3d(target.view)}
    return sorted(needed | {extra.use for extra in extras if extra.use in FEATURES})


def _is_conv3d(view: View) -> bool:
    return view.kind == "conv" and view.text.count("x") == 2


def method_entry(name: str, config: Any, exponents: str) -> dict[str, Any]:
    """Return the manifest's ``method``."""
    method = methods.get(name)
    header = method.header(config)
    return {"id": method.id, "version": method.version, "config": header, "exponents": exponents}


# --- in -------------------------------------------------------------------------------------------------------------


def count_targets(entries: Sequence[Mapping[str, Any]]) -> int:
    """Return how many targets the entries of a manifest's target list stand for, without making them."""
    groups = (fields.read(_Group, entry, "targets") for entry in entries if "name" not in entry)
    return sum("name" in entry for entry in entries) + sum(group.count() for group in groups)


def _targets(value: Any, required: Features = frozenset()) -> tuple[Target, ...]:
    """The expanded target list. Counts before it expands; refuses any grouping but the canonical one."""
    if not isinstance(value, list):
        raise errors.JsonSyntaxError("targets is not a list")
    entries: list[_Single | _Group] = []
    count = 0
    for n, entry in enumerate(value):
        is_single = isinstance(entry, dict) and "name" in entry
        kind: type[_Single | _Group] = _Single if is_single else _Group
        entries.append(fields.read(kind, entry, f"targets[{n}]"))
        count += entries[-1].count() if isinstance(entries[-1], _Group) else 1
        if count > OWN.tensors:
            raise errors.LimitError(f"the file declares more than {OWN.tensors} targets")
    targets: list[Target] = []
    for entry in entries:
        if isinstance(entry, _Single):
            targets += _same([entry.name], entry, required)
            continue
        for member in entry.members:
            numbers = [n for first, last in entry.pairs() for n in range(first, last + 1)]
            targets += _same([f"{entry.prefix}{n}{member.suffix}" for n in numbers], member, required)
    targets.sort(key=lambda target: (target.name, target.shape, target.view.text))
    if not targets:
        raise errors.MissingFieldError("the file has no targets")
    for one, two in pairwise(targets):
        if one.name != two.name:
            continue
        whole = {"matrix", "transposed", "conv"} & {one.view.kind, two.view.kind} or one.view.kind != two.view.kind
        if whole or one.shape != two.shape or one.view == two.view:
            raise errors.IndexRangeError(f"the target {one.name!r} is declared twice")
    if group_targets(targets) != value:
        raise errors.CanonicalError("the target list is not grouped and sorted in the one canonical way")
    return tuple(targets)


def _same(names: Sequence[str], entry: _Single | _Member, required: Features) -> list[Target]:
    """Targets that differ in their names alone."""
    view, read = View(entry.view), fields.reader(_Name)
    if _is_conv3d(view) and _CONV3D not in required:
        raise errors.JsonSyntaxError(f"{entry.view!r:.80} is a view of the feature {_CONV3D}, which is not required")
    view.matrix_shape(entry.shape)
    return [Target(read(name, "the name of a target"), entry.shape, view) for name in names]


def _extras(value: Any, required: Features) -> tuple[ExtraTensor, ...]:
    """Declared extras, still without data."""
    extras = tuple(map(_extra, fields.read(tuple[_Extra, ...], value, "extras")))
    unrequired = [extra for extra in extras if extra.use in FEATURES and extra.use not in required]
    if unrequired:
        raise errors.UnknownFieldError(f"the use {unrequired[0].use!r} is a feature that the file does not require")
    keys = [(e.name, e.use) for e in extras]
    if keys != sorted(set(keys)):
        raise errors.CanonicalError("the extras are not sorted by name, or one is named twice")
    by_key = dict(zip(keys, extras, strict=True))
    for (name, use), extra in by_key.items():
        partner = by_key.get((name, "row_indices" if use == "rows" else "rows"))
        if use in ("rows", "row_indices") and (partner is None or partner.shape[:1] != extra.shape[:1]):
            raise errors.ShapeError(f"the extra {name!r:.80} has {use} without as many of their other half")
    return extras


def _extra(entry: _Extra) -> ExtraTensor:
    name, dtype, shape, use = entry.name, entry.dtype, entry.shape, entry.use
    itemsize(dtype)
    stored = f"{dtype} {list(shape)}"
    if use == "row_indices" and (dtype != "I64" or len(shape) != 1):
        raise errors.DtypeError(f"the row indices of {name!r:.80} are {stored}; I64 in one dimension is stored")
    if use in ("add", *MAGNITUDES, "rows", "textual_inversion") and (dtype not in FLOATS or not shape):
        raise errors.DtypeError(f"the extra {name!r:.80} for {use} is {stored}; floats are stored")
    return ExtraTensor(name, dtype, shape, b"", use)  # type: ignore[arg-type]


def extra_sizes(manifest: Mapping[str, Any]) -> list[int]:
    """Return the bytes of each extra tensor that a manifest declares. Raises what reading them raises."""
    entries = fields.read(tuple[_Extra, ...], manifest.get("extras"), "extras")
    return [itemsize(extra.dtype) * math.prod(extra.shape) for extra in entries]


def check_extra_bytes(declared: ExtraTensor, nbytes: int) -> None:
    """Raise E-SHAPE unless `nbytes` are those of the declared dtype and shape."""
    expected = itemsize(declared.dtype) * math.prod(declared.shape)
    if nbytes != expected:
        raise errors.ShapeError(f"the extra {declared.name!r:.80} has {nbytes} bytes, declared {expected}")


def check_requires(value: Any, allowed: Sequence[str] = FEATURES) -> Features:
    """Return the features that a file requires. Raises E-VER for those that its version does not have, or no sorted
    list."""
    known = value if isinstance(value, list) and all(isinstance(one, str) for one in value) else None
    if known is None or not {*known} <= {*allowed} or known != sorted({*known}):
        raise errors.VersionError(
            f"the file requires features that are not known: {value!r:.80}", fix="update lrconvert"
        )
    return frozenset(known)


def _method(value: Any) -> tuple[Method, dict[str, Any], list[int]]:
    """(method, header, exponents of the half tensors)."""
    entry = fields.read(_Method, value, "method")
    method = methods.get(methods.name_of(entry.id, entry.version))
    return method, entry.config, entry.exponents


# The sections of a manifest that stand for themselves, by their value and the required features; on the rest see
# `file`.
SECTIONS: dict[str, Callable[[Any, Features], Any]] = {
    "targets": _targets,
    "extras": _extras,
    "base": lambda value, _: fields.read(_Base, value, "base").content,
    "provenance": lambda value, _: Provenance(**vars(fields.read(_Provenance, value, "provenance"))),
    "method": lambda value, _: _method(value),
}
