"""The words of messages: to who calls from Python an option is a keyword, to who typed a command it is a flag.

    >>> f"pass {spelled('overwrite', True)}"
    'pass overwrite=True'
    >>> with on_command_line():
    ...     f"pass {spelled('overwrite', True)}"
    'pass --overwrite'

The command line says so once, around a whole command; a message is made in the words of where it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_is_command: ContextVar[bool] = ContextVar("is_command", default=False)


@contextmanager
def on_command_line(is_command: bool = True) -> Iterator[None]:
    """Let messages that are made while the context lasts speak of flags and commands."""
    token = _is_command.set(is_command)
    try:
        yield
    finally:
        _is_command.reset(token)


def is_on_command_line() -> bool:
    """Return true if messages speak of flags and commands here, as a worker process must be told."""
    return _is_command.get()


def either(python: str, command: str) -> str:
    """Return `python`, or on the command line `command`."""
    return command if _is_command.get() else python


def spelled(name: str, value: object = None, flag: str = "") -> str:
    """Return the name of an option, or with a value how it is set: ``bits=4`` and ``--bits 4``. `...` stands for a
    value that the user knows (``base=...``, ``--base``). `flag` is for options with a flag that is not their name."""
    flag = flag or "--" + name.replace("_", "-")
    if value is None:
        return either(name, flag)
    shown = "..." if value is ... else repr(value)
    return either(f"{name}={shown}", flag if value is ... or isinstance(value, bool) else f"{flag} {value}")


def verb(name: str, command: str = "") -> str:
    """Return how a verb is called: ``lrconvert.recover`` and ``lrconvert recover``."""
    return either(f"lrconvert.{name}", f"lrconvert {command or name}")
