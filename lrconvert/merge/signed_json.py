"""JSON objects that hold a digest of themselves: records and journals, and every line of a journal.

Normative text: ``formats/undo-v1.md``. Such a file may come from a stranger: its fields are checked when they are read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from lrconvert.core.errors import DigestError, JsonSyntaxError, VersionError
from lrconvert.core.limits import FOREIGN
from lrconvert.core.wording import spelled
from lrconvert.io import strictjson
from lrconvert.io.fields import By

VERSION = 1
_FLOAT = re.compile(r"-?0x[01]\.[0-9a-f]{1,13}p[+-][0-9]{1,4}")


def portable(name: str) -> str:
    """Return a file's name as text that JSON can hold: bytes that are no UTF-8 become escapes (``b\\xe4r``)."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def sign(value: Mapping[str, Any]) -> bytes:
    """Return an object as compact JSON, keys sorted; `digest` is the sha256 of the same text with an empty one."""
    return _dump({**value, "digest": hashlib.sha256(_dump({**value, "digest": ""})).hexdigest()})


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def verify(data: bytes, what: str, format: str = "", versions: Sequence[int] = (VERSION,)) -> dict[str, Any]:
    """Return the fields of a signed object beside its digest, format and version.

    Raises E-DIGEST if it is not as it was signed, E-VER if it is not of this `format` and one of the `versions`, and
    what strict JSON raises.
    """
    value = strictjson.parse(data, depth=FOREIGN.json_depth)
    if not isinstance(value, dict):
        raise JsonSyntaxError(f"{what} is not a JSON object")
    stated = value.get("format"), value.get("version")
    if format and (stated[0] != format or type(stated[1]) is not int or stated[1] not in versions):
        reads = " and ".join(map(str, versions))
        actual = f"{stated[0]!r:.40} version {stated[1]!r:.40}"
        raise VersionError(f"{what} is {actual}; this program reads {format} {reads}", fix="update lrconvert")
    if sign({key: item for key, item in value.items() if key != "digest"}) != data:
        raise DigestError(f"{what} is not what the merge wrote", fix=f"give the base: {spelled('from_base', ...)}")
    return {key: item for key, item in value.items() if key not in ("format", "version", "digest")}


def _read_float(value: Any, path: str) -> float:
    if not isinstance(value, str) or not _FLOAT.fullmatch(value):
        raise JsonSyntaxError(f"{path} is {value!r:.40}, expected a number in C99 hexadecimal")
    try:
        return float.fromhex(value)
    except OverflowError:
        raise JsonSyntaxError(f"{path} is {value!r:.40}, which is beyond float64") from None


HexFloat = Annotated[float, By(_read_float, float.hex)]
"""A float64 in C99 hexadecimal."""
