"""Results in memory as text and bytes, and back to the last bit: what a compression by answers keeps of itself.

The text is JSON in which every dataclass says its name and floats are exact; arrays and the bytes of extra tensors lie
beside it, by their digests, so that equal ones are kept once. Only the classes listed here are made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from lrconvert.convert.compress import Candidate
from lrconvert.convert.convert import Conversion
from lrconvert.convert.verdict import Judged
from lrconvert.core.errors import BudgetError, LrcError, OptionError
from lrconvert.formats.fidelity import Answers, Fidelity, Interval, Scores, TargetFidelity
from lrconvert.formats.lrc.file import Sizes
from lrconvert.live.texts import Example
from lrconvert.lora.adapter import BaseFingerprint, CompactAdapter, ExtraTensor, Provenance, Target, View
from lrconvert.methods import base as methods
from lrconvert.refine.checkpoint import State
from lrconvert.refine.run import RefineResult
from lrconvert.refine.self_generated_data import Written

_PLAIN = (
    *(Candidate, Conversion, Sizes, Fidelity, TargetFidelity, Answers, Interval, Scores, Judged, RefineResult, State),
    *(Written, Example, ExtraTensor, Provenance, Target, View, BaseFingerprint),
)
_KINDS: Mapping[str, type[Any]] = {kind.__name__: kind for kind in _PLAIN}
_REFUSALS = {kind.__name__: kind for kind in (BudgetError, OptionError)}  # what a form may answer with
Blobs = MutableMapping[str, bytes]  # by their sha256


def text_of(value: Any, blobs: Blobs) -> str:
    """Return `value` as JSON; what is long in it is put into `blobs`. Raises TypeError for what cannot be kept."""
    return json.dumps(_packed(value, blobs), separators=(",", ":"))


def of_text(text: str, blobs: Mapping[str, bytes]) -> Any:
    """Return the value that `text_of` made a text of. Raises ValueError, KeyError or TypeError for any other text."""
    return _unpacked(json.loads(text), blobs)


def digest(data: bytes) -> str:
    """Return the name of bytes among `Blobs`."""
    return hashlib.sha256(data).hexdigest()


# --- out ------------------------------------------------------------------------------------------------------------


def _packed(value: Any, blobs: Blobs) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray):
        return {"array": _blob(np.ascontiguousarray(value).tobytes(), blobs), "dtype": value.dtype.str,
                "shape": list(value.shape)}  # fmt: skip
    if isinstance(value, bytes):
        return {"bytes": _blob(value, blobs)}
    if isinstance(value, (tuple, list)):
        return {"tuple": [_packed(item, blobs) for item in value]}
    if isinstance(value, Mapping):
        return {"map": {str(key): _packed(item, blobs) for key, item in value.items()}}
    if isinstance(value, CompactAdapter):
        return {"adapter": _packed(_parts(value), blobs)}
    if type(value).__name__ in _REFUSALS:
        parts = {"what": value.what, "fix": value.fix, "path": value.path}
        more = {"smallest": value.smallest} if isinstance(value, BudgetError) else {}
        return {"refusal": type(value).__name__, "parts": {**parts, **more}}
    if is_dataclass(value) and type(value) in _PLAIN:
        held = {entry.name: _packed(getattr(value, entry.name), blobs) for entry in fields(value)}
        return {"kind": type(value).__name__, "fields": held}
    raise TypeError(f"{type(value).__name__} cannot be kept")


def _blob(data: bytes, blobs: Blobs) -> str:
    name = digest(data)
    blobs[name] = data
    return name


def _parts(compact: CompactAdapter) -> dict[str, Any]:
    """An adapter as values; its configuration as its form writes it."""
    method = methods.get(compact.method)
    return {
        "method": compact.method,
        "header": json.dumps(method.header(compact.config)),
        "layout": dict(method.layout(compact.config)),
        "tensors": dict(compact.tensors),
        **{name: getattr(compact, name) for name in ("targets", "extras", "provenance", "base", "warnings")},
    }


# --- in -------------------------------------------------------------------------------------------------------------


def _unpacked(value: Any, blobs: Mapping[str, bytes]) -> Any:
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return np.frombuffer(blobs[value["array"]], np.dtype(value["dtype"])).reshape(value["shape"]).copy()
    if "bytes" in value:
        return blobs[value["bytes"]]
    if "tuple" in value:
        return tuple(_unpacked(item, blobs) for item in value["tuple"])
    if "map" in value:
        return {key: _unpacked(item, blobs) for key, item in value["map"].items()}
    if "adapter" in value:
        return _adapter(_unpacked(value["adapter"], blobs))
    if "refusal" in value:
        refusal: LrcError = _REFUSALS[value["refusal"]](**value["parts"])
        return refusal
    return _KINDS[value["kind"]](**{name: _unpacked(item, blobs) for name, item in value["fields"].items()})


def _adapter(parts: dict[str, Any]) -> CompactAdapter:
    method = methods.get(parts["method"])
    try:
        config = method.config(json.loads(parts.pop("header")), parts.pop("layout"), parts["targets"])
    except LrcError as error:
        raise ValueError(error.what) from None
    return CompactAdapter(config=config, **parts)
