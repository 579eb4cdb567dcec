"""The fingerprint of a base: a digest over target names and shapes, and one over all contents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from lrconvert.core.errors import TensorNameError
from lrconvert.io import strictjson
from lrconvert.lora.adapter import BaseFingerprint, Target


def names_digest(targets: Iterable[Target]) -> str:
    """Return sha256 in hex over the sorted (name, stored shape) list of the targets' parameters. Raise E-NAME for a
    name that is no text."""
    parts = []
    for name, shape in sorted({(t.name, t.shape) for t in targets}):
        try:
            encoded = name.encode()
        except UnicodeEncodeError:
            raise TensorNameError(f"the target {name!r:.80} has half of a surrogate pair in its name") from None
        parts += [len(encoded).to_bytes(8, "little"), encoded]
        parts += [n.to_bytes(8, "little") for n in (len(shape), *shape)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def fingerprint(targets: Iterable[Target]) -> BaseFingerprint:
    """Return the fingerprint of a base by the names and shapes of targets alone; its contents are not known."""
    return BaseFingerprint(names_digest(targets))


def content_digest(tensors: Mapping[str, str], manifest: Mapping[str, Any]) -> str:
    """Return sha256 over the sorted tensor digests and the canonical manifest with empty ``digests``: the file's true
    name."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + b"\0" + bytes.fromhex(value))
    digest.update(strictjson.dump_canonical({**manifest, "digests": {}}))
    return digest.hexdigest()
