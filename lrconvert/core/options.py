"""Options declared once, as fields of a frozen dataclass: the keyword of the Python API, the option of the command
line, its help and its checks follow from the declaration.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Options:
    ...     rank: int = option(4, "Keep this rank.", least=1)
    >>> make(Options, {"rank": 2}, "the form")
    Options(rank=2)
"""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Mapping, MutableMapping
from dataclasses import Field, field, fields
from functools import cache
from numbers import Real
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

from lrconvert.core.byte_sizes import byte_count, share
from lrconvert.core.errors import ArgumentError, OptionError
from lrconvert.core.wording import spelled

T = TypeVar("T")


def option(
    default: Any, help: str, *, choices: tuple[str, ...] = (), least: int | None = None, kind: str = "", flag: str = ""
) -> Any:
    """Declare a field that a user may set.

    `help` is one sentence for the command line; a field without this function is no option there. `choices` and `least`
    bound the value. `kind` "size" takes texts such as 200KB, "share" such as 5%, "path" and "paths" read paths. `flag`
    is the name of the option where it is not the field's own, ``--no-undo`` of a field ``undo``.
    """
    return field(
        default=default, metadata={"help": help, "choices": choices, "least": least, "kind": kind, "flag": flag}
    )


def names(options: type[Any]) -> tuple[str, ...]:
    """Return the names of the fields of `options`."""
    return tuple(entry.name for entry in fields(options))


def make(options: type[T], values: Mapping[str, Any], owner: str) -> T:
    """Return `options` with these values, in the types of their fields, so that equal options are equal however they
    were spelled (20 and 20.0). Raises E-OPTION, naming the `owner`, for a name that is no field, a value that is no
    choice or of another kind than its field, a number below the least, infinite or NaN where there is a least, and one
    that is not whole where it must.
    """
    known = {entry.name: entry for entry in fields(options)}  # type: ignore[arg-type]
    refuse_unknown(set(values) - set(known), owner, list(known))
    hints: dict[str, Any] = _hints(options)  # type: ignore[arg-type]
    return options(**{name: _checked(known[name], value, hints[name], owner) for name, value in values.items()})


def _checked(entry: Field[Any], value: Any, hint: Any, owner: str) -> Any:
    """Return the value of a field in its type. Raises what `make` raises."""
    metadata = entry.metadata
    name = spelled(entry.name, flag=metadata.get("flag", ""))
    if metadata.get("kind") == "size" and isinstance(value, str):
        value = byte_count(value)
    if metadata.get("kind") == "share" and isinstance(value, str):
        value = share(value)
    if choices := metadata.get("choices"):
        if value is None and type(None) in _members(hint):
            return value
        if str(value) not in choices:
            raise OptionError(f"{name} is {value!r:.40}; {owner} takes {', '.join(choices)}")
        return str(value)
    try:
        typed = _typed(value, hint)
    except _KindError as error:
        raise OptionError(f"{name} is {value!r:.40}; {owner} takes {error}") from None
    least = metadata.get("least")
    if least is not None and typed is not None and not least <= typed < math.inf:
        raise OptionError(f"{name} is {value}; it must be at least {least}")
    return typed


@cache
def _hints(options: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(options)


def _members(hint: Any) -> tuple[Any, ...]:
    """The types that a field takes, a union's one by one."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)


class _KindError(ValueError):
    """The text says what kind of value a field takes."""


def _typed(value: Any, hint: Any) -> Any:
    """Return a number in the type of its field, one text or a list as the tuple that a field holds, and what is of a
    type of its field as it is. Raises `_KindError`."""
    kinds = _members(hint)
    tuples = [kind for kind in kinds if typing.get_origin(kind) is tuple]
    if value is None and type(None) in kinds:
        return value
    if tuples and isinstance(value, (str, PathLike, list, tuple)):
        items = (value,) if isinstance(value, (str, PathLike)) else tuple(value)
        return tuple(_typed(item, typing.get_args(tuples[0])[0]) for item in items)
    if float in kinds or int in kinds:
        return _number(value, float in kinds)
    if bool in kinds:
        if str(value) in ("True", "False", "0", "1"):  # numpy's, too
            return bool(value)
        raise _KindError("True or False")
    if Path in kinds and isinstance(value, (str, PathLike)):
        return value
    if str in kinds and type(value).__module__ == "torch" and type(value).__name__ == "device":
        return str(value)
    others = [kind for kind in kinds if kind is not type(None) and kind not in tuples]
    classes = [kind for kind in others if isinstance(kind, type) and kind is not Any]
    if len(classes) < len(others) or isinstance(value, tuple(classes)):
        return value  # of a type that it has, or of one that cannot be asked, as a callback's
    raise _KindError(_described(tuples[0] if tuples else classes[0]))


def _number(value: Any, is_float: bool) -> float | int:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _KindError("a number" if is_float else "a whole number")
    number: Any = value
    try:
        whole = float(number) if is_float else int(number)
    except (OverflowError, ValueError):
        raise _KindError("a finite number") from None
    if not is_float and whole != number:
        raise _KindError("a whole number")
    return whole


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return "a list of " + ("paths" if Path in typing.get_args(kind) else "texts")
    return {str: "a text", Path: "a path"}.get(kind, f"a {getattr(kind, '__name__', kind)}")


def take(options: type[T], given: T | None, keywords: MutableMapping[str, Any], owner: str) -> T:
    """Remove the fields of `options` from `keywords`, and return `given`, or the defaults, with their values. Raises
    what `make` raises."""
    if given is not None and not isinstance(given, options):
        raise ArgumentError(
            f"{owner} takes its options as {options.__name__}, and got {described(given)}",
            fix="give single options by name, such as target_size='8KB'",
        )
    own = {name: keywords.pop(name) for name in names(options) if name in keywords}
    before = {} if given is None else {name: getattr(given, name) for name in names(options)}
    return make(options, {**before, **own}, owner)


def refuse_unknown(unknown: set[str], owner: str, known: list[str]) -> None:
    """Raise E-OPTION for the first of the `unknown` names; `known` are those that `owner` has."""
    if unknown:
        name = min(unknown)
        near = difflib.get_close_matches(name, known, 1)
        guess = f"is it {near[0]!r}? It" if near else "it"
        raise OptionError(f"{owner} has no option {name!r:.40}", fix=f"{guess} has: {', '.join(sorted(known))}")


def described(value: object) -> str:
    """Return what a value is, short, for a message: ``the text '8KB'``, ``the number 8``, ``None``, ``a list``."""
    if value is None:
        return "None"
    if isinstance(value, str):
        return f"the text {value!r:.40}"
    if isinstance(value, Real):
        return f"{value!r:.40}"
    name = type(value).__name__
    if name == "bytes":
        return "bytes"
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name:.40}"
