"""Load a few real modules of a package whose other modules need a GPU stack: those become empty stand-ins."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str, root: Path, real: frozenset[str], names: Mapping[str, Mapping[str, Any]]) -> None:
        self.package, self.root, self.real, self.names = package, root, real, names

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != self.package or name in self.real:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _Empty(spec.name)
        module.__path__ = [str(self.root / spec.name.replace(".", "/"))]
        module.__dict__.update(self.names.get(spec.name, {}))
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing of a stand-in is run."""


def install(
    package: str, root: Path, real: Sequence[str], names: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Import `real` modules of `package` from `root`, and stand-ins for all others; `names` are what stand-ins hold."""
    sys.meta_path.insert(0, _Finder(package, root, frozenset(real), names or {}))
