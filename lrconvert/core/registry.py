"""Finding what lies in a folder: methods, readers, exporters and consumers are files there, and no list names them."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

_NOT_ENTRIES = ("base", "shared")  # of every such folder: the contract, and the subfolder of what entries share


def names(folder: str) -> list[str]:
    """The modules and packages that lie in the package `folder`, sorted: every one is an entry, but for ``base.py`` and
    the subfolder ``shared``."""
    where = importlib.import_module(folder).__path__
    return sorted(module.name for module in pkgutil.iter_modules(where) if module.name not in _NOT_ENTRIES)


def load(folder: str, name: str, attribute: str) -> Any:
    """What the entry `name` of `folder` binds to `attribute`; the module is imported at first use."""
    return getattr(importlib.import_module(f"{folder}.{name}"), attribute)
