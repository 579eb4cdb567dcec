"""A compact adapter as arrays of a checkpoint: its payload, its configuration, which training may change, its heads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.lora.adapter import CompactAdapter
from lrconvert.methods import base as methods

_PAYLOAD, _LAYOUT, _EXTRA, _HEADER = "best.", "layout.", "extra.", "header"


def arrays_of(compact: CompactAdapter) -> dict[str, Array]:
    """Return all of an adapter that a refinement changes, by name."""
    method = methods.get(compact.method)
    arrays = {f"{_PAYLOAD}{name}": array for name, array in compact.tensors.items()}
    arrays |= {f"{_LAYOUT}{name}": array for name, array in method.layout(compact.config).items()}
    arrays[_HEADER] = np.frombuffer(json.dumps(method.header(compact.config)).encode(), np.uint8)
    for n, extra in enumerate(compact.extras):
        arrays[f"{_EXTRA}{n}"] = np.frombuffer(extra.data, np.uint8)
    return arrays


def of_arrays(arrays: Mapping[str, Array], source: CompactAdapter) -> CompactAdapter:
    """Return the adapter that `arrays` was made of; `source` is what the refinement began with."""
    method = methods.get(source.method)
    tensors, layout = (
        {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        for prefix in (_PAYLOAD, _LAYOUT)
    )
    config = method.config(json.loads(arrays[_HEADER].tobytes()), layout, source.targets)
    extras = tuple(replace(e, data=arrays[f"{_EXTRA}{n}"].tobytes()) for n, e in enumerate(source.extras))
    return replace(source, config=config, tensors=tensors, extras=extras)
