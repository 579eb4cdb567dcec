"""Bytes of exported files: tensors, safetensors files, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from lrconvert.core.dtypes import Array, round_to
from lrconvert.core.errors import ExportError
from lrconvert.core.wording import spelled
from lrconvert.formats.model_card import origin
from lrconvert.io.container import encode_header
from lrconvert.lora.adapter import Adapter

Entry = tuple[str, str, tuple[int, ...], bytes]  # name, dtype, shape, data


def json_file(value: Any) -> list[bytes]:
    """Return a JSON file, its keys sorted."""
    return [(json.dumps(value, indent=2, sort_keys=True) + "\n").encode()]


def weights_file(tensors: Iterable[Entry], adapter: Adapter, **notes: str) -> Iterator[bytes]:
    """Yield a safetensors file of sorted tensors in pieces; its metadata are `notes`, and where the factors come
    from."""
    entries = sorted(tensors)
    metadata = {"format": "pt", **origin(adapter), **notes}
    yield encode_header([(name, dtype, shape) for name, dtype, shape, _ in entries], metadata)
    for *_, data in entries:
        yield data


def entry(name: str, dtype: str, values: Array) -> Entry:
    """Return a tensor of a file. Raises E-EXPORT for values beyond the range of `dtype`."""
    return name, dtype, values.shape, stored(name, dtype, values)


def stored(name: str, dtype: str, values: Array) -> bytes:
    """Return values in row-major order, rounded once to `dtype`. Raises E-EXPORT for those beyond its range."""
    bits = round_to(np.ascontiguousarray(values), dtype)
    if dtype == "F16" and not np.isfinite(bits).all():
        raise ExportError(
            f"{name!r:.120} has values beyond the range of F16", fix=f"take {spelled('dtype', 'BF16')} or F32"
        )
    return bits.tobytes()
