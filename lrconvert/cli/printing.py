"""Output of commands: text, JSON, warnings, progress."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from lrconvert.core.errors import printable

SCHEMA_VERSION = 1
_LONGEST = 10  # characters of an escaped one: \\U0010ffff


def say(text: str, err: bool = False, nl: bool = True) -> None:
    """Print lines of text: all output of commands goes through here.

    Names, paths and settings come from strangers. What moves a cursor, colours, or reorders is escaped here whoever
    made the text; line breaks are the text's own, so whoever puts a name in it takes `printable`.
    """
    lines = text.split("\n")
    click.echo("\n".join(printable(line, len(line) * _LONGEST) for line in lines), err=err, nl=nl)


def emit(value: dict[str, Any]) -> None:
    say(json.dumps({"schema": SCHEMA_VERSION, **value}, indent=1))


def emit_line(value: dict[str, Any]) -> None:
    """Print one of several JSON objects, a line for each."""
    say(json.dumps({"schema": SCHEMA_VERSION, **value}))


def warn(warnings: Iterable[str]) -> None:
    for line in warnings:
        say(f"warning: {printable(line, 1000)}", err=True)


@contextmanager
def progress_bar(title: str, quiet: bool) -> Iterator[Callable[[float, str], None]]:
    """A progress callback drawn by tqdm on stderr; silent when quiet or not on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda fraction, text: None
        return
    from tqdm import tqdm

    with tqdm(total=100, desc=title, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:

        def update(fraction: float, text: str) -> None:
            bar.set_postfix_str(printable(text)[-40:], refresh=False)
            bar.update(min(int(100 * fraction), 100) - bar.n)

        yield update


def command_line() -> str:
    """Return the command as the user typed it, without private folders: hub ids, and only the last part of each
    path."""
    from lrconvert.io import hub

    words = [hub.hint(w) if "/" in w else w for w in sys.argv[1:]]
    return shlex.join(["lrconvert", *words])
