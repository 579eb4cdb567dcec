"""Options of commands: those that many have, and those that dataclasses declare."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Collection, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Literal

import click
from click.shell_completion import CompletionItem

from lrconvert.cli.printing import say
from lrconvert.core.byte_sizes import byte_count, share
from lrconvert.core.errors import OptionError
from lrconvert.core.redaction import redacted
from lrconvert.io import remote

Part = Literal["adapter", "base", "config"]  # of a repository, as `hub_transfer.download` takes it


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


class Share(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A share such as 5% or 0.05."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return share(str(value))
        except OptionError as error:
            self.fail(f"{error.what}; {error.fix}", param, ctx)


class LocalPath(click.Path):
    """A path of this machine; a URL is refused, but for ``file://``."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and remote.is_url(value):
            try:
                value = remote.local_path(value)
            except OptionError as error:
                self.fail(f"{error.what}; {error.fix}", param, ctx)
            if value is None:
                self.fail(
                    "this is no place for a URL: only adapters are read from URLs, and written to them", param, ctx
                )
        return super().convert(value, param, ctx)


class PlacePath(LocalPath):
    """A path, or a URL of an adapter or for one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, remote.Url):
            return value
        if isinstance(value, str) and remote.is_url(value) and not value.startswith(("file://", "local://")):
            return remote.Url(value)
        return super().convert(value, param, ctx)


class HubPath(PlacePath):
    """A path, a hub id, or the URL of an adapter; `part` is what of a repository is needed for it where it is
    downloaded."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return (PlacePath if self.part == "adapter" else LocalPath).convert(self, value, param, ctx)

    def id_of(self, value: Any) -> str:
        """Return the hub id that a value names, if it is one."""
        return str(value)


class ScaledPath(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """An adapter with a scale or without: ``ADAPTER`` or ``ADAPTER=SCALE``."""

    name = "adapter"
    part: Part = "adapter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        path, equals, number = str(value).rpartition("=")
        if not equals or Path(value).exists():
            return str(value), 1.0
        try:
            return path, float(number)
        except ValueError:
            if remote.is_url(value) and "?" in value:
                return str(value), 1.0
            self.fail(f"{redacted(str(value))!r}: what follows the last '=' is not a scale", param, ctx)

    def id_of(self, value: tuple[str, float]) -> str:
        return value[0]

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return PATH.shell_complete(ctx, param, incomplete)


AS_JSON = click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object instead of text.")
OVERWRITE = click.Option(["--overwrite"], is_flag=True, help="Replace the output if it exists.")
QUIET = click.Option(["-q", "--quiet"], is_flag=True, help="No progress bar, no report.")
VERBOSE = click.Option(["-v", "--verbose"], is_flag=True, help="One line per target.")
PATH, PLACE = LocalPath(), PlacePath()
ADAPTER, BASE, CONFIG = HubPath("adapter"), HubPath("base"), HubPath("config")
DOWNLOAD = click.Option(
    ["--download"], is_flag=True, help="Fetch hub ids (org/name, org/name@revision) that are not here from the hub."
)
DATA_HELP = (
    "What trainers take: .txt, .jsonl, .json, .csv, .tsv, .parquet, a folder, or a data set in the Hugging Face cache; "
    "rows of `messages`, `prompt` and `completion`, Alpaca, ShareGPT, or `text` (docs/guides/data.md). Repeatable."
)


def output(help: str, required: bool = True, is_local: bool = False) -> click.Option:
    return click.Option(["-o", "--output"], required=required, type=PATH if is_local else PLACE, help=help)


def base(help: str, required: bool = False, config_only: bool = False) -> click.Option:
    return click.Option(["--base"], required=required, type=CONFIG if config_only else BASE, help=help)


def data(help: str = DATA_HELP, required: bool = False) -> click.Option:
    return click.Option(["--data"], multiple=True, required=required, type=PATH, help=help)


def command(name: str, *params: click.Parameter, help: str = "") -> Callable[[Callable[..., None]], click.Command]:
    """Make a command of a function, whose docstring is the help where none is given. One that takes adapters or a base
    has `--download`."""
    from_hub = [param for param in params if isinstance(param.type, (HubPath, ScaledPath))]

    def made(callback: Callable[..., None]) -> click.Command:
        run = _downloading(callback, from_hub) if from_hub else callback
        every = [*params, DOWNLOAD] if from_hub else list(params)
        return click.Command(name, params=every, callback=run, help=help or callback.__doc__)

    return made


def _downloading(callback: Callable[..., None], params: Collection[click.Parameter]) -> Callable[..., None]:
    """Return a callback that first fetches the hub ids among its arguments, if `--download` is given."""

    @functools.wraps(callback)
    def run(download: bool, **given: Any) -> None:
        if download:
            _download(params, given)
        callback(**given)

    return run


def _download(params: Collection[click.Parameter], given: Mapping[str, Any]) -> None:
    from lrconvert.io import hub, hub_transfer

    wanted: dict[str, Part] = {}
    for param in params:
        assert isinstance(param.type, (HubPath, ScaledPath)) and param.name is not None
        value = given[param.name]
        several = param.multiple if isinstance(param, click.Option) else param.nargs != 1
        for item in value if several else [value]:
            name = "" if item is None else param.type.id_of(item)
            if name and hub.parse(name) is not None and not Path(name).exists():
                wanted.setdefault(name, param.type.part)
    if not wanted:
        raise OptionError("--download is for hub ids (org/name), and there is none", fix="leave it out")
    for name, part in wanted.items():
        report = _silent if given.get("quiet") else _say_on_stderr
        hub_transfer.download(name, part, pickles=bool(given.get("allow_pickle")), report=report)


def _say_on_stderr(line: str) -> None:
    say(line, err=True)


def _silent(line: str) -> None:
    """Print nothing."""


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
    if kind == "share":
        return Share()
    if kind == "path" and field.name in ("base", "from_base"):
        return BASE
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
