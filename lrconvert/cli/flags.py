"""Options of commands: those that many have, and those that dataclasses declare."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Collection, MutableMapping
from pathlib import Path
from typing import Any

import click

from lrconvert.core.byte_sizes import byte_count
from lrconvert.core.errors import OptionError


class ByteSize(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A size such as 200KB, 1.5MiB or 4096. KB = 1000 bytes, KiB = 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return byte_count(str(value))
        except OptionError as error:
            self.fail(f"{error.what}; {error.fix}", param, ctx)


AS_JSON = click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object instead of text.")
OVERWRITE = click.Option(["--overwrite"], is_flag=True, help="Replace the output if it exists.")
QUIET = click.Option(["-q", "--quiet"], is_flag=True, help="No progress bar, no report.")
VERBOSE = click.Option(["-v", "--verbose"], is_flag=True, help="One line per target.")
PATH = click.Path(path_type=Path)
DATA_HELP = "Texts: .txt (running text) or .jsonl (`text`; `prompt` and `completion`; `text` and `label`); repeatable."


def output(help: str, required: bool = True) -> click.Option:
    return click.Option(["-o", "--output"], required=required, type=PATH, help=help)


def base(help: str, required: bool = False) -> click.Option:
    return click.Option(["--base"], required=required, type=PATH, help=help)


def data(help: str = DATA_HELP, required: bool = False) -> click.Option:
    return click.Option(["--data"], multiple=True, required=required, type=PATH, help=help)


def command(name: str, *params: click.Parameter, help: str = "") -> Callable[[Callable[..., None]], click.Command]:
    """Make a command of a function, whose docstring is the help where none is given."""

    def made(callback: Callable[..., None]) -> click.Command:
        return click.Command(name, params=list(params), callback=callback, help=help or callback.__doc__)

    return made


# --- options declared in dataclasses --------------------------------------------------------------------------------


def of(*kinds: type[Any], skip: Collection[str] = (), **help: str) -> list[click.Option]:
    """Make a click option of every field of the dataclasses `kinds` that has a help text, but for those to `skip`.
    `help` replaces the text of a field. What a user does not give stays out of `chosen`: defaults are the dataclass's.
    """
    options: dict[str, click.Option] = {}
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            about = help.get(field.name, field.metadata.get("help"))
            if about and field.name not in skip:
                options.setdefault(field.name, _option(field, hints[field.name], about))
    return list(options.values())


def _option(field: dataclasses.Field[Any], hint: Any, help: str) -> click.Option:
    kind, names = field.metadata.get("kind"), [_flag(field), field.name]
    if isinstance(field.default, bool):
        return click.Option(names, is_flag=True, help=help)
    default = field.default
    return click.Option(
        names,
        type=_type(field, hint),
        multiple=kind == "paths" or typing.get_origin(hint) is tuple,
        metavar="LAYOUT" if kind == "layout" else None,
        help=help if default in (None, ()) else f"{help}  [default: {default}]",
    )


def _flag(field: dataclasses.Field[Any]) -> str:
    return field.metadata.get("flag") or "--" + field.name.replace("_", "-")


def _type(field: dataclasses.Field[Any], hint: Any) -> Any:
    """Return the click type of a field that is no switch."""
    kind, choices, least = (field.metadata.get(key) for key in ("kind", "choices", "least"))
    if kind == "size":
        return ByteSize()
    if kind in ("path", "paths"):
        return PATH
    if kind == "device":
        return click.Choice(["auto", "cpu", "cuda"])
    if kind == "layout":
        from lrconvert.formats.readers.base import ids

        return click.Choice(ids())
    if choices:
        return click.Choice(choices)
    plain = next(member for member in (typing.get_args(hint) or (hint,)) if member is not type(None))
    return click.IntRange(least) if plain is int and least is not None else plain


def chosen(given: MutableMapping[str, Any], *kinds: type[Any]) -> dict[str, Any]:
    """Remove the fields of the dataclasses `kinds` from what a command was `given`; return those that a user set."""
    values: dict[str, Any] = {}
    for field in (field for kind in kinds for field in dataclasses.fields(kind) if field.name in given):
        value = given.pop(field.name)
        if value is not None and value is not False and value != ():
            values[field.name] = not value if field.default is True else value
    return values


def reading() -> list[click.Option]:
    """Return the options that say how adapters are read; `chosen(given, ReadOptions)` takes them."""
    from lrconvert.formats.readers.base import ids
    from lrconvert.formats.readers.shared.options import ReadOptions

    known = ", ".join(ids())
    return of(ReadOptions, layout=f"The layout of the source, whatever it looks like: {known}.")
