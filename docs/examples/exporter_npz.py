"""Plain arrays: ``factors.npz`` with ``<parameter>.A`` (r, in) and ``<parameter>.B`` (out, r) in float32; the update of
a parameter is B @ A.

A complete exporter. As ``lrconvert/formats/exporters/npz.py`` it is found by itself, as ``export --to npz``.
"""

from __future__ import annotations

import io

import numpy as np

from lrconvert.core.errors import ExportError
from lrconvert.formats.exporters.base import Exporter, ExportOptions, Files
from lrconvert.formats.exporters.shared.plain import module_of, pairs, refuse_extras
from lrconvert.lora.adapter import CompactAdapter

_LAYOUT = "a file of arrays"


def files(compact: CompactAdapter, options: ExportOptions) -> Files:
    """Return the files of the folder by name: a pure function, others write them. Raises E-EXPORT, naming it, for what
    the layout cannot express."""
    refuse_extras(compact, _LAYOUT)
    if options.dtype != "F32":
        raise ExportError(f"{_LAYOUT} holds F32, not {options.dtype}", fix="leave --dtype out")
    arrays = {}
    for pair in pairs(compact, options):  # one rank for all, the scale baked in
        module_of(pair.target, _LAYOUT)  # refuses slices, experts and bare parameters
        arrays |= {f"{pair.target.name}.A": pair.a, f"{pair.target.name}.B": pair.b}
    content = io.BytesIO()
    np.savez(content, **arrays)
    return {"factors.npz": [content.getvalue()]}


EXPORTER = Exporter("npz", "plain arrays", files, kind="plain arrays")
