"""Lines for whoever follows the work through its progress callback, which are to stay on the screen."""

from __future__ import annotations


class Notice(str):
    """A whole line to print. `is_warning`: something was left out, which is said in every mode."""

    __slots__ = ("is_warning",)

    is_warning: bool

    def __new__(cls, line: str, is_warning: bool = False) -> Notice:
        self = super().__new__(cls, line)
        self.is_warning = is_warning
        return self
