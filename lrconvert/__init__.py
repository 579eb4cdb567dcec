"""lrconvert makes LoRA adapters 10 to 200 times smaller, with the loss measured.

    import lrconvert
    small = lrconvert.compress("my-adapter", target_ratio=50)
    lrconvert.write(small, "my-adapter.lrc")

The verbs; `help(lrconvert.compress)` and so on say what each takes and gives:

    read           load, load_lora, load_all, read, load_statistics, download
    look           inspect, validate, check, compare
    make           extract, combine
    make smaller   compress, convert, allocate; compress_many, convert_many, allocate_many; batch_jobs, convert_one
    win back       statistics, refine
    write          write, upgrade, export
    keep many      Fleet
    serve          expanded
    use            attach, detach, set_active, disabled, peft_model
    bake in        merge, verify, unmerge, recover

An adapter is a path, a hub id in the local cache, an adapter in memory, or the result of a verb. Every error is an
`LrcError` with a stable code; its subclasses are attributes of this package, such as `lrconvert.BudgetError`.

Importing this package is cheap: its names are those of `lrconvert.api`, which is loaded at first use; torch and
transformers are loaded only by what computes with them.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lrconvert.core.version import __version__ as __version__

if TYPE_CHECKING:
    from lrconvert.api import *  # noqa: F403
    from lrconvert.api import convert as convert  # a type checker would take the folder of that name
    from lrconvert.api import merge as merge
    from lrconvert.api import refine as refine
    from lrconvert.core.errors import *  # noqa: F403


_FOLDERS_OF_VERBS = ("convert", "merge", "refine")


def _api() -> ModuleType:
    return importlib.import_module("lrconvert.api")


def __getattr__(name: str) -> Any:
    is_folder = Path(__file__).with_name(name).is_dir() and name not in _FOLDERS_OF_VERBS
    is_private = name.startswith("_") and name != "__all__"
    if is_folder or is_private or name not in {"__all__", *_names()}:
        raise AttributeError(f"module 'lrconvert' has no attribute {name!r}")
    return getattr(_api(), name)


def __dir__() -> list[str]:
    """Return the verbs, the types that they take and give, and the errors."""
    return sorted({*(name for name in globals() if name.startswith("__")), *_names()})


def _names() -> set[str]:
    api = _api()
    return {*api.__all__, *(name for name in dir(api) if name.endswith("Error"))}


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        """Keep `lrconvert.convert`, `merge` and `refine` the verbs: importing the folders of those names would bind
        their modules here."""
        if name not in _FOLDERS_OF_VERBS or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
