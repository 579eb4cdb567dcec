"""Plain arrays: ``factors.npz`` with ``<parameter>.A`` (r, in) and ``<parameter>.B`` (out, r) in float32; the update of
a parameter is B @ A.

A complete exporter. As ``lrconvert/formats/exporters/npz.py`` it is found by itself, as ``export --to npz``.
"""

from __future__ import annotations

import io

import numpy as np

from lrconvert.core.errors import ExportError
from lrconvert.formats.exporters.base import Exporter, ExportOptions, Files
from lrconvert.formats.exporters.shared.plain import factors, module_of, refuse_extras, unscaled
from lrconvert.lora.adapter import Adapter

_LAYOUT = "a file of arrays"


def files(adapter: Adapter, options: ExportOptions) -> Files:
    """Return the files of the folder by name, of a compact adapter or a LoRA: a pure function, others write them.
    Raises E-EXPORT, naming it, for what the layout cannot express."""
    refuse_extras(adapter, _LAYOUT)
    if options.dtype not in (None, "F32"):
        raise ExportError(f"{_LAYOUT} holds F32, not {options.dtype}", fix="leave --dtype out")
    arrays = {}
    for pair in factors(adapter, options, unscaled).pairs:  # one rank for all, scales multiplied into B
        module_of(pair.target, _LAYOUT)  # refuses slices, experts and bare parameters
        arrays |= {f"{pair.target.name}.A": pair.a, f"{pair.target.name}.B": pair.b.astype(np.float32)}
    content = io.BytesIO()
    np.savez(content, **arrays)
    return {"factors.npz": [content.getvalue()]}


EXPORTER = Exporter("npz", "plain arrays", files, kind="plain arrays")
