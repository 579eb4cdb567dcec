"""An extension of mkdocs.yml for the reference of Python: what our docstrings have that the site would not show.

A field of an options class says what it is for in `option(default, "help")`: that becomes its docstring, and its
default its value. A doctest becomes a block of code.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from griffe import Attribute, Class, Docstring, Extension, Object

_DOCTEST = re.compile(r"(?:^[ ]*>>> .*\n?(?:^[ ]*\S.*\n?)*\n?)+", re.MULTILINE)


class Options(Extension):
    """Fields of options, and doctests."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None and ">>> " in obj.docstring.value:
            obj.docstring.value = _DOCTEST.sub(
                lambda found: f"\n```pycon\n{found[0].rstrip()}\n```\n", obj.docstring.value
            )

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        for member in cls.members.values():
            if isinstance(member, Attribute) and str(member.value).startswith("option("):
                call = ast.parse(str(member.value), mode="eval").body
                assert isinstance(call, ast.Call)
                default, text = call.args[:2]
                written = text.value if isinstance(text, ast.Constant) else ast.unparse(text)[2:-1]  # f'...'
                member.value = ast.unparse(default)
                member.docstring = Docstring(str(written), parent=member)
