"""What the commands have in common: sizes, options, output."""

from __future__ import annotations

import json
import shlex
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from lrconvert.core.errors import printable

SCHEMA_VERSION = 1
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


class ByteSize(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A size such as 200KB, 1.5MiB or 4096. KB = 1000 bytes, KiB = 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip().lower()
        number = text.rstrip("bikmg")
        try:
            return int(float(number) * _UNITS[text[len(number) :].strip()])
        except (ValueError, KeyError, OverflowError):
            self.fail(f"{value!r} is not a size; write 200KB, 1.5MiB or 4096", param, ctx)


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress bar, no report.")
verbose_option = click.option("-v", "--verbose", is_flag=True, help="One line per target.")
source_argument = click.argument("source", type=click.Path(path_type=Path))
PICKLE = ["--allow-pickle"]
PICKLE_HELP = "Read .bin and .pt adapters too, with torch's tensors-only loader; only files that you trust."
pickle_option = click.option(*PICKLE, is_flag=True, help=PICKLE_HELP)


FROM = ["--from", "layout"]
FROM_HELP = "The layout of the source, whatever it looks like: {}."
ALPHA = ["--alpha"]
ALPHA_HELP = "Alpha of a source that does not state it; a module's scale is alpha / r."


def _from_option() -> dict[str, Any]:
    from lrconvert.formats.readers.base import ids

    known = ids()
    return {"type": click.Choice(known), "metavar": "LAYOUT", "help": FROM_HELP.format(", ".join(known))}


def layout_options() -> list[click.Option]:
    """What a user may say about the layout of a source."""
    return [click.Option(FROM, **_from_option()), click.Option(ALPHA, type=float, help=ALPHA_HELP)]


def takes_layout(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same options, as a decorator."""
    return click.option(*FROM, **_from_option())(click.option(*ALPHA, type=float, help=ALPHA_HELP)(command))


def takes_adapters(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a user may say of adapters that a command reads, by the names of the verbs' parameters: `allow_pickle`,
    `layout`, `alpha`."""
    return takes_layout(pickle_option(command))


DEVICE = ["--device"]
DEVICE_OPTION: dict[str, Any] = {
    "type": click.Choice(["auto", "cpu", "cuda"]),
    "default": "auto",
    "show_default": True,
}
device_option = click.option(*DEVICE, help="Where the model runs.", **DEVICE_OPTION)


def device_of(name: str) -> str:
    """`auto` means CUDA if torch has been asked for and sees a GPU; plain CPU fits need no torch, so it is not loaded
    to find out where no driver is installed. Raises E-OPTION if a GPU is asked for and there is none."""
    if name == "cuda":
        from lrconvert.core.devices import torch_device

        return str(torch_device(name))
    if name != "auto":
        return name
    if not (Path("/proc/driver/nvidia").exists() or Path("/dev/nvidia0").exists()):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def emit(value: dict[str, Any]) -> None:
    click.echo(json.dumps({"schema": SCHEMA_VERSION, **value}, indent=1))


def warn(warnings: typing.Iterable[str]) -> None:
    for line in warnings:
        click.echo(f"warning: {printable(line, 1000)}", err=True)


@contextmanager
def progress_bar(title: str, quiet: bool) -> Iterator[Callable[[float, str], None]]:
    """A progress callback drawn by tqdm on stderr; silent when quiet or not on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda fraction, text: None
        return
    from tqdm import tqdm

    with tqdm(total=100, desc=title, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:

        def update(fraction: float, text: str) -> None:
            bar.set_postfix_str(text[-40:], refresh=False)
            bar.update(min(int(100 * fraction), 100) - bar.n)

        yield update


def command_line() -> str:
    """What the user typed, without private folders: hub ids, and only the last part of each path."""
    from lrconvert.io import hub

    words = [hub.hint(w) if "/" in w else w for w in sys.argv[1:]]
    return shlex.join(["lrconvert", *words])
