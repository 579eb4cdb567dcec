"""Finding what lies in a folder: methods, readers, exporters and consumers are files there, and no list names them."""

from __future__ import annotations

import ast
import importlib
from functools import lru_cache
from pathlib import Path
from typing import Any

_NOT_ENTRIES = ("__init__", "base", "shared")  # the contract, and the subfolder of what entries share


def names(folder: str) -> list[str]:
    """List the modules and packages that lie in the package `folder`, sorted: every one is an entry, but for
    ``base.py`` and the subfolder ``shared``."""
    return sorted(name for name in _sources(folder) if name not in _NOT_ENTRIES)


def load(folder: str, name: str, attribute: str) -> Any:
    """Return what the entry `name` of `folder` binds to `attribute`; the module is imported at first use."""
    return getattr(importlib.import_module(f"{folder}.{name}"), attribute)


def calls(folder: str, name: str, function: str) -> list[tuple[Any, ...]]:
    """Read the constant arguments of every call of `function` in the source of the entry `name`, without importing it:
    a list of commands needs no numerics."""
    tree = ast.parse(_sources(folder)[name].read_text("utf-8"))
    return [
        tuple(argument.value for argument in node.args if isinstance(argument, ast.Constant))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function
    ]


def _sources(folder: str) -> dict[str, Path]:
    """Return the source file of every module and package directly in a package."""
    return _scan(tuple((path, Path(path).stat().st_mtime_ns) for path in importlib.import_module(folder).__path__))


@lru_cache  # one adapter of a batch asks some thirty times
def _scan(folders: tuple[tuple[str, int], ...]) -> dict[str, Path]:
    """Return the sources in these folders, each as it was changed last."""
    sources: dict[str, Path] = {}
    for path in (Path(path) for path, _ in folders):
        sources |= {file.stem: file for file in path.glob("*.py")}
        sources |= {file.parent.name: file for file in path.glob("*/__init__.py")}
    return sources
