"""lrconvert makes LoRA adapters 10 to 200 times smaller, with the loss measured.

    import lrconvert
    lora = lrconvert.load_lora("my-adapter")
    result = lrconvert.convert(lora, "vblora", target_ratio=50)
    lrconvert.write(result.compact, "my-adapter.lrc")

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


_FOLDERS_OF_VERBS = ("convert", "merge", "refine")


def _api() -> ModuleType:
    return importlib.import_module("lrconvert.api")


def __getattr__(name: str) -> Any:
    is_folder = Path(__file__).with_name(name).is_dir() and name not in _FOLDERS_OF_VERBS
    if is_folder or (name.startswith("__") and name != "__all__") or name not in ("__all__", *_api().__all__):
        raise AttributeError(f"module 'lrconvert' has no attribute {name!r}")
    return getattr(_api(), name)


def __dir__() -> list[str]:
    """Return the verbs, and the types that they take and give."""
    return sorted({*(name for name in globals() if name.startswith("__")), *_api().__all__})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        """Keep `lrconvert.convert`, `merge` and `refine` the verbs: importing the folders of those names would bind
        their modules here."""
        if name not in _FOLDERS_OF_VERBS or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
