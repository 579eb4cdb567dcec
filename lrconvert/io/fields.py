"""Fields of JSON objects, declared once: a dataclass is read from an object and written back.

The annotations say what is allowed. A dataclass is an object: a field without a default is required, an unknown field
is refused. A `NamedTuple` is a list of its fields. ``Annotated`` narrows a type by a `Check` (`between`, `one_of`,
`matches`), or reads and writes it by functions of its own (`By`); `Key` names the field otherwise in the JSON.

    >>> @dataclass(frozen=True)
    ... class Entry:
    ...     name: str
    ...     shape: tuple[Annotated[int, between(1, 8)], ...]
    ...     view: Literal["matrix", "conv"] = "matrix"
    >>> entry = read(Entry, {"name": "q_proj", "shape": [4, 2]}, "targets[0]")
    >>> entry
    Entry(name='q_proj', shape=(4, 2), view='matrix')
    >>> as_json(entry)
    {'name': 'q_proj', 'shape': [4, 2]}
    >>> read(Entry, {"name": "q_proj", "shape": [9]}, "targets[0]")
    Traceback (most recent call last):
    lrconvert.core.errors.LimitError: E-LIMIT: targets[0].shape[0] is 9, expected 1 to 8
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from lrconvert.core.errors import (
    ConfigError,
    DigestError,
    JsonSyntaxError,
    LimitError,
    LrcError,
    MissingFieldError,
    UnknownFieldError,
)

T = TypeVar("T")
_Reader = Callable[[Any, str], Any]  # (JSON value, its path for messages) -> value

_SCALARS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    str: ((str,), "a string"),
}


# --- what annotations may hold --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A condition on a value. `error` is raised if `test` is false, and if a plain value is of another type."""

    test: Callable[[Any], bool]
    expected: str
    error: type[LrcError] = JsonSyntaxError


@dataclass(frozen=True)
class By:
    """Functions that read and write a value in place of its type. ``read(value, path)`` raises errors of its own;
    without `write` the type says how the value is written."""

    read: Callable[[Any, str], Any]
    write: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Key:
    """The name of a field in the JSON, where it is not that of the attribute."""

    name: str


def between(least: int, most: int, error: type[LrcError] = LimitError) -> Check:
    """Return the check that a number is in `least` to `most`, both included."""
    return Check(lambda value: least <= value <= most, f"{least} to {most}", error)


def one_of(choices: Sequence[Any], error: type[LrcError] = JsonSyntaxError) -> Check:
    """Return the check that a value is one of `choices`."""
    return Check(lambda value: value in choices, f"one of {', '.join(map(str, choices))}", error)


def matches(pattern: str, expected: str, error: type[LrcError] = JsonSyntaxError) -> Check:
    """Return the check that all of a string matches the regular expression `pattern`."""
    compiled = re.compile(pattern)
    return Check(lambda value: compiled.fullmatch(value) is not None, expected, error)


HEX = matches("[0-9a-f]{64}", "64 lower-case hexadecimal digits", DigestError)
Hex = Annotated[str, HEX]
"""A sha256 in hexadecimal; anything else raises E-DIGEST."""
Whole = Annotated[int, Check(lambda value: value >= 0, "an integer of at least 0")]
"""An integer of at least 0; anything else raises E-JSON-SYNTAX."""


# --- in -------------------------------------------------------------------------------------------------------------


def read(kind: type[T], value: Any, what: str) -> T:
    """Return the JSON `value` as a `kind`; `what` names it in messages, its fields as in ``what.name[3]``.

    Raises E-MISSING and E-UNKNOWN for fields, E-JSON-SYNTAX for a value of another type, and what checks raise.
    """
    return reader(kind)(value, what)


def reader(kind: type[T]) -> Callable[[Any, str], T]:
    """Return `read` for one kind, for many values."""
    form: Any = kind
    return _reader(form, False)


def read_config(kind: type[T], value: Any) -> T:
    """Return the configuration of another tool as a `kind`. Its other fields are ignored, and null is a field that is
    not there. Raises E-CONFIG where `read` raises E-MISSING or E-JSON-SYNTAX."""
    form: Any = kind
    return _reader(form, True)(value, "")  # type: ignore[no-any-return]


def names(kind: Any) -> frozenset[str]:
    """Return the names of the fields of `kind` in the JSON."""
    return frozenset(member.key for member in _members(kind))


@cache
def _hints(kind: Any) -> dict[str, Any]:
    # Names stand for those of the module of each class, also inside a lambda.
    return get_type_hints(kind, None, {}, include_extras=True)


class _Member(NamedTuple):
    name: str
    key: str
    kind: Any
    default: Any  # MISSING if the field is required


@cache
def _members(kind: Any) -> tuple[_Member, ...]:
    hints = _hints(kind)
    members = []
    for field in (field for field in fields(kind) if field.init):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        keys = [extra.name for extra in getattr(hints[field.name], "__metadata__", ()) if isinstance(extra, Key)]
        members.append(_Member(field.name, keys[0] if keys else field.name, hints[field.name], default))
    return tuple(members)


def _refusal(value: Any, path: str, expected: str, error: type[LrcError]) -> LrcError:
    fix = "correct it in the configuration" if error is ConfigError else ""
    return error(f"{path} is {value!r:.60}, expected {expected}", fix=fix)


@cache
def _reader(kind: Any, foreign: bool) -> _Reader:
    """The function that reads values of the annotation `kind`."""
    error = ConfigError if foreign else JsonSyntaxError
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value, path: value
    if kind in _SCALARS:
        types_, expected = _SCALARS[kind]
        return _simple(lambda value: type(value) in types_, expected, error)
    if origin is Literal:
        choices = {(type(choice), choice) for choice in arguments}
        expected = f"one of {', '.join(map(str, arguments))}"
        return _simple(lambda value: value.__hash__ is not None and (type(value), value) in choices, expected, error)
    if origin is Annotated:
        return _annotated(arguments[0], arguments[1:], foreign)
    if origin in (Union, types.UnionType):
        return _union([_reader(part, foreign) for part in arguments if part is not types.NoneType])
    if origin in (dict, Mapping):
        return _mapping(_reader(arguments[1], foreign), error)
    if origin is tuple and arguments[-1] is not ...:
        return _row([_reader(part, foreign) for part in arguments], tuple, error)
    if origin in (tuple, list, Sequence):
        return _list(_reader(arguments[0], foreign), error)
    if is_dataclass(kind):
        return _object(kind, foreign)
    return _row([_reader(hint, foreign) for hint in _hints(kind).values()], lambda values: kind(*values), error)


def _simple(test: Callable[[Any], bool], expected: str, error: type[LrcError]) -> _Reader:
    def reader(value: Any, path: str) -> Any:
        if not test(value):
            raise _refusal(value, path, expected, error)
        return value

    return reader


def _annotated(kind: Any, extras: Sequence[Any], foreign: bool) -> _Reader:
    conversions = [extra.read for extra in extras if isinstance(extra, By)]
    base: _Reader = conversions[0] if conversions else _reader(kind, foreign)
    checks = [extra for extra in extras if isinstance(extra, Check)]
    if not checks:
        return base

    def reader(value: Any, path: str) -> Any:
        try:
            converted = base(value, path)
        except (JsonSyntaxError, ConfigError):
            if conversions or kind not in _SCALARS:
                raise
            raise _refusal(value, path, checks[0].expected, checks[0].error) from None
        for check in checks:
            if not check.test(converted):
                raise _refusal(value, path, check.expected, check.error)
        return converted

    return reader


def _union(readers: Sequence[_Reader]) -> _Reader:
    def reader(value: Any, path: str) -> Any:
        for one in readers[:-1]:
            try:
                return one(value, path)
            except (JsonSyntaxError, ConfigError):
                continue
        return readers[-1](value, path)

    return reader


def _mapping(item: _Reader, error: type[LrcError]) -> _Reader:
    def reader(value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _refusal(value, path, "an object", error)
        return {key: item(entry, f"{path}[{key!r:.80}]") for key, entry in value.items()}

    return reader


def _list(item: _Reader, error: type[LrcError]) -> _Reader:
    def reader(value: Any, path: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _refusal(value, path, "a list", error)
        return tuple(item(entry, f"{path}[{n}]") for n, entry in enumerate(value))

    return reader


def _row(items: Sequence[_Reader], make: Callable[[Any], Any], error: type[LrcError]) -> _Reader:
    def reader(value: Any, path: str) -> Any:
        if not isinstance(value, list) or len(value) != len(items):
            raise _refusal(value, path, f"a list of {len(items)}", error)
        return make(item(entry, f"{path}[{n}]") for n, (item, entry) in enumerate(zip(items, value, strict=True)))

    return reader


def _object(kind: Any, foreign: bool) -> _Reader:
    members = _members(kind)
    readers = {member.key: _reader(member.kind, foreign) for member in members}

    def reader(value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            raise _refusal(value, path, "an object", ConfigError if foreign else JsonSyntaxError)
        if foreign:
            value = {key: entry for key, entry in value.items() if entry is not None}
        for member in members:
            if member.default is MISSING and member.key not in value:
                if foreign:
                    raise ConfigError(f"{member.key} is missing", fix="set it in the configuration")
                raise MissingFieldError(f"{path} lacks the field {member.key!r}")
        unknown = sorted(value.keys() - readers.keys())
        if unknown and not foreign:
            raise UnknownFieldError(f"{path} has the unknown field {unknown[0]!r:.80}")
        prefix = f"{path}." if path else ""
        return kind(**{m.name: readers[m.key](value[m.key], f"{prefix}{m.key}") for m in members if m.key in value})

    return reader


# --- out ------------------------------------------------------------------------------------------------------------


def as_json(value: Any) -> Any:
    """Return `value` as JSON: a dataclass as an object of its fields, less those that have their default."""
    form: Any = type(value)
    return _writer(form)(value)


def _same(value: Any) -> Any:
    return value


@cache
def _writer(kind: Any) -> Callable[[Any], Any]:
    """The function that makes JSON of a value of the annotation `kind`; `_same` if it is JSON already."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        conversions = [extra.write for extra in arguments[1:] if isinstance(extra, By) and extra.write]
        return conversions[0] if conversions else _writer(arguments[0])
    if origin in (Union, types.UnionType):
        parts = [_writer(part) for part in arguments if part is not types.NoneType]
        return lambda value: value if value is None else parts[0](value)
    if origin in (dict, Mapping):
        item = _writer(arguments[1])
        return lambda value: {key: item(entry) for key, entry in value.items()}
    if origin in (tuple, list, Sequence) and (origin is not tuple or arguments[-1] is ...):
        item = _writer(arguments[0])
        return list if item is _same else lambda value: [item(entry) for entry in value]
    if origin is tuple or hasattr(kind, "_fields"):
        items = [_writer(part) for part in arguments or _hints(kind).values()]
        return lambda value: [write(entry) for write, entry in zip(items, value, strict=True)]
    if not hasattr(kind, "__dataclass_fields__"):
        return _same
    writers = [(member, _writer(member.kind)) for member in _members(kind)]

    def writer(value: Any) -> dict[str, Any]:
        entries = [(member, write, getattr(value, member.name)) for member, write in writers]
        return {m.key: write(entry) for m, write, entry in entries if m.default is MISSING or entry != m.default}

    return writer
