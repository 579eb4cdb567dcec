"""Output of commands: text, JSON, warnings, progress."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from lrconvert.core.errors import printable
from lrconvert.core.notices import Notice
from lrconvert.io.durable import partial_path

SCHEMA_VERSION = 1
_FIRST_SECONDS, _LINE_SECONDS = 5, 30  # before the first line of progress, and between lines
_TELLING = 0.005  # of the work: less says nothing of what the rest takes
_REPOSITORIES = ("--base-model-id", "--push-to-hub")
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
    """A progress callback drawn by tqdm on stderr; without a terminal a line after some seconds, with a first estimate,
    and then every half minute; silent when quiet."""
    if quiet:
        yield lambda fraction, text: _notice(text, warnings_only=True)
        return
    if not sys.stderr.isatty():
        yield _progress_lines(title)
        return
    from tqdm import tqdm

    with tqdm(total=100, desc=title, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:

        def update(fraction: float, text: str) -> None:
            if isinstance(text, Notice):
                bar.clear()
                _notice(text)
                return
            bar.set_postfix_str(printable(text)[-40:], refresh=False)
            bar.update(min(int(100 * fraction), 100) - bar.n)

        yield update


def _progress_lines(title: str) -> Callable[[float, str], None]:
    """A progress callback that prints how much is done, and how long the rest will take at that speed."""
    start = time.monotonic()
    following = start + _FIRST_SECONDS

    def update(fraction: float, text: str) -> None:
        nonlocal following
        if isinstance(text, Notice):
            _notice(text)
            return
        now = time.monotonic()
        if now < following:
            return
        following = now + _LINE_SECONDS
        left = f", {_duration((now - start) * (1 / fraction - 1))} left" if fraction > _TELLING else ""
        say(f"{title}: {fraction:.0%} after {_duration(now - start)}{left}; {printable(text)}", err=True)

    return update


def _notice(text: str, warnings_only: bool = False) -> None:
    """Print a notice, as a warning if it is one where nothing else is printed."""
    if not isinstance(text, Notice):
        return
    if not warnings_only:
        say(printable(text, 2000), err=True)
    elif text.is_warning:
        warn([text])


@contextmanager
def unfinished_is_said(output: Path | None) -> Iterator[None]:
    """Say, after Ctrl-C, that unfinished work lies beside an output, if it does."""
    try:
        yield
    except KeyboardInterrupt:
        if isinstance(output, Path) and (kept := partial_path(output)).exists():
            say(f"{printable(str(kept))} has what was done: the same command goes on with --resume", err=True)
        raise


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def command_line() -> str:
    """Return the command as the user typed it, without private folders: hub ids, and only the last part of each
    path. A command that another one runs (`demo`) has its words as the context's object."""
    from lrconvert.io import hub

    context = click.get_current_context(silent=True)
    given = None if context is None else context.find_root().obj
    typed = sys.argv[1:] if given is None else list(given)
    named = zip(["", *typed], typed, strict=False)  # the word before each: what names a repository is no path
    words = [hub.hint(w) if "/" in w and option not in _REPOSITORIES else w for option, w in named]
    return shlex.join(["lrconvert", *words])
