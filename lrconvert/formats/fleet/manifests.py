"""What a member's manifest has in common with others, its frame, and what it has of its own.

Normative text: ``formats/fleet-v1.md``, section 4. A member states its own as a JSON Merge Patch (RFC 7396) of the
frame, in which an empty object stands for null: it removes what the frame has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from lrconvert.core import errors
from lrconvert.formats.lrc import packed, shortened
from lrconvert.formats.lrc.manifest import MANIFEST_BYTES

Manifest = Mapping[str, Any]
_DIFFERING = ("method", "provenance")  # the sections in which members of one frame may differ
_ALONE = (("method", "exponents"), ("provenance", "source"))  # what no two members have in common but by chance


def patch(frame: Manifest, manifest: Manifest) -> dict[str, Any]:
    """Return what makes `manifest` of `frame`. Raises E-CANON if nothing does: an empty object that is new there."""
    out: dict[str, Any] = {}
    for key in manifest.keys() | frame.keys():
        if key not in manifest:
            out[key] = {}
        elif key not in frame or not (isinstance(frame[key], dict) and isinstance(manifest[key], dict)):
            if key not in frame or not _same(frame[key], manifest[key]):
                _check_filled(manifest[key], key)
                out[key] = manifest[key]
        elif inner := patch(frame[key], manifest[key]):
            out[key] = inner
    return out


def _same(one: Any, other: Any) -> bool:
    """Return true if two values are spelled the same: true is not 1."""
    return one is other or (bool(one == other) and packed.spell(one, tables=True) == packed.spell(other, tables=True))


def _check_filled(value: Any, key: str) -> None:
    if isinstance(value, dict):
        if not value:
            raise errors.CanonicalError(f"the manifest has an empty object {key!r:.80}, which its frame lacks")
        for name, inner in value.items():
            _check_filled(inner, name)


def patched(frame: Manifest, own: Manifest) -> dict[str, Any]:
    """Return the manifest that a patch makes of a frame."""
    out = dict(frame)
    for key, value in own.items():
        if isinstance(value, dict):
            before = out.get(key)
            if value:
                out[key] = patched(before if isinstance(before, dict) else {}, value)
            else:
                out.pop(key, None)
        else:
            out[key] = value
    return out


def whole(frame: Manifest, own: bytes) -> dict[str, Any]:
    """Return a member's manifest, from its frame and the bytes of its patch. Raises what unpacking raises, E-CANON for
    a patch that is not the one that leads there."""
    value, end = packed.unpack(own, 0, MANIFEST_BYTES, tables=True)
    if end < len(own) or not isinstance(value, dict):
        raise errors.JsonSyntaxError("what a member's manifest has of its own is not one object")
    manifest = patched(frame, value)
    if not _same(patch(frame, manifest), value):
        raise errors.CanonicalError("what a member's manifest has of its own is not spelled in the one way")
    return manifest


def packed_patch(frame: Manifest, manifest: Manifest) -> bytes:
    """Return the bytes of what makes `manifest` of `frame`."""
    return packed.pack(patch(frame, manifest), tables=True)


# --- frames ---------------------------------------------------------------------------------------------------------


def pack_frame(frame: Manifest) -> bytes:
    """Return the bytes of a frame."""
    return shortened.shorten(packed.pack(frame, tables=True))


def unpack_frame(data: bytes) -> dict[str, Any]:
    """Return the frame that some bytes are. Raises what unpacking raises."""
    plain, end = shortened.lengthen(data, 0, MANIFEST_BYTES)
    frame, at = packed.unpack(plain, 0, MANIFEST_BYTES, tables=True)
    if end < len(data) or at < len(plain):
        raise errors.JsonSyntaxError("bytes follow a frame of the fleet")
    if not isinstance(frame, dict):
        raise errors.JsonSyntaxError("a frame of the fleet is no object")
    return frame


def common(one: Manifest, other: Manifest) -> dict[str, Any]:
    """Return what two manifests have in common."""
    out: dict[str, Any] = {}
    for key in one.keys() & other.keys():
        if isinstance(one[key], dict) and isinstance(other[key], dict):
            out[key] = common(one[key], other[key])
        elif _same(one[key], other[key]):
            out[key] = one[key]
    return out


def first_frame(manifest: Manifest) -> dict[str, Any]:
    """Return the frame of a member that is alone: its manifest without what is its own by nature."""
    out = {key: dict(value) if isinstance(value, dict) else value for key, value in manifest.items()}
    for section, key in _ALONE:
        out[section].pop(key, None)
    return out


def group_key(manifest: Manifest) -> bytes:
    """Return a digest of what members of one frame have to have in common: base, targets, extra tensors, the method."""
    method = manifest["method"]
    about = {key: value for key, value in manifest.items() if key not in _DIFFERING}
    named = [method.get("id"), method.get("version")]
    return hashlib.sha256(packed.spell({**about, "method": named}, tables=True)).digest()


def with_parts_of(frame: Manifest, manifest: Manifest) -> dict[str, Any]:
    """Return a manifest of the frame's group that holds the very objects of the frame which are equal in both: what is
    one object need not be compared."""
    return {key: value if key in _DIFFERING else frame[key] for key, value in manifest.items()}
