"""``lazy.st`` is `hypothesis.strategies`, imported when it is first used: the package itself does not need it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hypothesis import strategies as st
else:

    def __getattr__(name):
        if name != "st":
            raise AttributeError(name)
        try:
            from hypothesis import strategies
        except ImportError:
            from lrconvert.core.errors import DependencyError

            raise DependencyError("hypothesis is not installed", fix="run pip install 'lrconvert[test]'") from None
        return strategies


__all__ = ["st"]
