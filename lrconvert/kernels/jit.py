"""Compiling with numba, which the extra `fast` installs: only for work that pays for it.

A module of kernels is plain Python and can be imported without numba; its functions are then merely slow. `load` hands
out the compiled ones where numba is and there is enough to do. Their machine code is kept on disk: `machine_code`.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

from lrconvert.kernels import machine_code

Loop = TypeVar("Loop", bound=Callable[..., Any])

_LOADING = 0.25  # seconds that a kernel must save: loading its code takes a tenth of that, and compiling is for once


def load(name: str, seconds: float, *, exact: bool = False) -> Any:
    """Return the loops of the module ``lrconvert.kernels.<name>``, attributes by their names, if numba is installed and
    the `seconds` that they save pay for loading them; else None. What was loaded before counts only for loops that are
    `exact`, so that the same work has the same outcome."""
    loaded = exact and _loops.cache_info().currsize > 0
    if (seconds < _LOADING and not loaded) or find_spec("numba") is None:
        return None
    return _loops(name)


@lru_cache
def _loops(name: str) -> Any:
    """The loops of a module: their machine code, which is made where there is none; the module, where it is none."""
    if (kept := machine_code.load(name)) is not None:
        return kept
    if "numba" not in sys.modules:
        atexit.register(gc.freeze)  # a last search for garbage in all that numba has loaded would take 0.2 s
    module = import_module(f"lrconvert.kernels.{name}")
    return machine_code.compiled(name, module) or module


def compiled(*, reassociate: bool = False) -> Callable[[Loop], Loop]:
    """Return a decorator that compiles a function at its first call, and leaves it as it is without numba.
    `reassociate`: sums of floats may be taken in any order, and minima need not mind a NaN."""

    def compile_loop(function: Loop) -> Loop:
        try:
            import numba
        except ImportError:
            return function
        fast = {"reassoc", "nsz", "nnan"} if reassociate else False
        options = {"nogil": True, "error_model": "numpy", "fastmath": fast}
        njit: Any = numba.njit
        try:
            return njit(cache=True, **options)(function)  # type: ignore[no-any-return]
        except RuntimeError:  # there is no folder for the machine code
            return njit(**options)(function)  # type: ignore[no-any-return]

    return compile_loop
