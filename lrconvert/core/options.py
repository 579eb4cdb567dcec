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

import math
import typing
from collections.abc import Mapping, MutableMapping
from dataclasses import field, fields
from functools import cache
from numbers import Real
from typing import Any, TypeVar

from lrconvert.core.byte_sizes import byte_count
from lrconvert.core.errors import OptionError

T = TypeVar("T")


def option(
    default: Any, help: str, *, choices: tuple[str, ...] = (), least: int | None = None, kind: str = "", flag: str = ""
) -> Any:
    """Declare a field that a user may set.

    `help` is one sentence for the command line; a field without this function is no option there. `choices` and `least`
    bound the value. `kind` "size" takes texts such as 200KB, "path" and "paths" read paths. `flag` is the name of
    the option where it is not the field's own, ``--no-undo`` of a field ``undo``.
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
    choice, a number below the least, infinite or NaN where there is a least, and one that is not whole where it must.
    """
    known = {entry.name: entry for entry in fields(options)}  # type: ignore[arg-type]
    refuse_unknown(set(values) - set(known), owner, list(known))
    hints: dict[str, Any] = _hints(options)  # type: ignore[arg-type]
    chosen: dict[str, Any] = {}
    for name, value in values.items():
        chosen[name] = value
        if known[name].metadata.get("kind") == "size" and isinstance(value, str):
            chosen[name] = value = byte_count(value)
        choices, least = known[name].metadata.get("choices"), known[name].metadata.get("least")
        if choices and value is not None:
            chosen[name] = str(value)
            if chosen[name] not in choices:
                raise OptionError(f"{name} is {value!r:.40}; {owner} takes {', '.join(choices)}")
        if least is not None and value is not None and not least <= value < math.inf:
            raise OptionError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        if not choices:
            chosen[name] = _typed(name, value, hints[name], owner)
    return options(**chosen)


@cache
def _hints(options: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(options)


def _typed(name: str, value: Any, hint: Any, owner: str) -> Any:
    """A number in the type of its field, a list for a tuple as one; everything else as it is."""
    kinds: tuple[Any, ...] = typing.get_args(hint) or (hint,)
    origins = {typing.get_origin(kind) for kind in (hint, *kinds)}
    if isinstance(value, list) and tuple in origins:
        return tuple(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    number: Any = value
    try:
        if float in kinds:
            return float(number)
        if int in kinds and int(number) == number:
            return int(number)
    except (OverflowError, ValueError):
        raise OptionError(f"{name} is {value!r:.40}; {owner} takes a finite number") from None
    if int in kinds:
        raise OptionError(f"{name} is {value!r:.40}; {owner} takes a whole number")
    return value


def take(options: type[T], given: T | None, keywords: MutableMapping[str, Any], owner: str) -> T:
    """Remove the fields of `options` from `keywords`, and return `given`, or the defaults, with their values. Raises
    what `make` raises."""
    own = {name: keywords.pop(name) for name in names(options) if name in keywords}
    before = {} if given is None else {name: getattr(given, name) for name in names(options)}
    return make(options, {**before, **own}, owner)


def refuse_unknown(unknown: set[str], owner: str, known: list[str]) -> None:
    """Raise E-OPTION for the first of the `unknown` names; `known` are those that `owner` has."""
    if unknown:
        raise OptionError(f"{owner} has no option {min(unknown)!r:.40}", fix=f"it has: {', '.join(sorted(known))}")
