"""lrconvert makes LoRA adapters 10 to 100 times smaller, with the loss measured.

    import lrconvert
    lora = lrconvert.load_lora("my-adapter")
    result = lrconvert.convert(lora, "vblora", target_ratio=50)
    lrconvert.write(result.compact, "my-adapter.lrc")

Importing this package is cheap: the verbs live in `lrconvert.api` and are loaded at first use; torch and transformers
only by what computes with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.0.1"
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
    from lrconvert.consumers.base import Finding
    from lrconvert.converting import Conversion
    from lrconvert.errors import LrcError
    from lrconvert.many.run import Batch, allocate_many, compress_many, convert_many
    from lrconvert.merging import Scaled


def __getattr__(name: str) -> Any:
    if name == "LrcError":
        from lrconvert.errors import LrcError

        return LrcError
    if name in _MANY:
        from lrconvert.many import run

        return getattr(run, name)
    if name in __all__:
        from lrconvert import api

        return getattr(api, name)
    raise AttributeError(f"module 'lrconvert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
