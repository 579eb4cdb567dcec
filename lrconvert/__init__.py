"""lrconvert makes LoRA adapters 10 to 100 times smaller, with the loss measured.

    import lrconvert
    lora = lrconvert.load_lora("my-adapter")
    result = lrconvert.convert(lora, "vblora", target_ratio=50)
    lrconvert.write(result.compact, "my-adapter.lrc")

Importing this package is cheap: the verbs live in `lrconvert.api` and are loaded at first use; torch and transformers
only by what computes with them.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lrconvert.core.version import __version__ as __version__

__all__ = [
    "Batch",
    "Conversion",
    "Finding",
    "LrcError",
    "Scaled",
    "allocate",
    "allocate_many",
    "attach",
    "check",
    "compare",
    "compress",
    "compress_many",
    "convert",
    "convert_many",
    "detach",
    "disabled",
    "export",
    "inspect",
    "load",
    "load_all",
    "load_lora",
    "load_statistics",
    "merge",
    "read",
    "recover",
    "refine",
    "set_active",
    "statistics",
    "unmerge",
    "upgrade",
    "validate",
    "verify",
    "write",
]

_MANY = ("Batch", "allocate_many", "compress_many", "convert_many")

if TYPE_CHECKING:
    from lrconvert.api import (
        allocate,
        attach,
        check,
        compare,
        compress,
        convert,
        detach,
        disabled,
        export,
        inspect,
        load,
        load_all,
        load_lora,
        load_statistics,
        merge,
        read,
        recover,
        refine,
        set_active,
        statistics,
        unmerge,
        upgrade,
        validate,
        verify,
        write,
    )
    from lrconvert.api.batch.run import Batch, allocate_many, compress_many, convert_many
    from lrconvert.convert.convert import Conversion
    from lrconvert.core.errors import LrcError
    from lrconvert.formats.compat.base import Finding
    from lrconvert.merge import Scaled


def __getattr__(name: str) -> Any:
    if name == "LrcError":
        from lrconvert.core.errors import LrcError

        return LrcError
    if name in _MANY:
        from lrconvert.api.batch import run

        return getattr(run, name)
    if name in __all__:
        from lrconvert import api

        return getattr(api, name)
    raise AttributeError(f"module 'lrconvert' has no attribute {name!r}")


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        """Keep `lrconvert.convert`, `merge` and `refine` the verbs: importing the folders of those names would bind
        their modules here."""
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
