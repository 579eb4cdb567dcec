"""Digests of tensors and files as they are read and written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.io.container import ContainerFile, TensorInfo, open_regular, pread_into, tensor_digest
from lrconvert.io.durable import Buffer, Writer

CHUNK = 1 << 19  # bytes that are read and hashed at a time: they stay in the cache of a core


class Digest(Protocol):
    """A hash of `hashlib`."""

    def update(self, data: Buffer, /) -> None: ...

    def hexdigest(self) -> str: ...


def chunks(source: Checkpoint | ContainerFile, info: TensorInfo, nbytes: int = CHUNK) -> Iterator[memoryview]:
    """Return the bytes of a stored tensor in pieces of `nbytes`, each in the memory of the one before."""
    buffer = memoryview(bytearray(min(nbytes, info.nbytes)))
    for offset in range(0, info.nbytes, nbytes):
        view = buffer[: min(nbytes, info.nbytes - offset)]
        source.read_into(info, offset, view)
        yield view


def stored_digest(source: Checkpoint | ContainerFile, info: TensorInfo) -> str:
    """Return the digest of a stored tensor."""
    return tensor_digest(info.name, info.dtype, info.shape, chunks(source, info))


def emit(file: Writer, data: Array | bytes, digest: Digest) -> None:
    """Write rows or bytes to a file, and hash them, piece by piece: a file grows several times faster by small ones."""
    view = memoryview(data) if isinstance(data, bytes) else np.ascontiguousarray(data).data.cast("B")
    for start in range(0, len(view), CHUNK):
        piece = view[start : start + CHUNK]
        digest.update(piece)
        file.write(piece)


def copy_hashed(
    source: Checkpoint | ContainerFile, info: TensorInfo, file: Writer, digests: Collection[Digest]
) -> None:
    """Append a stored tensor to a file and hash it, read once: inside the kernel alone it would take a second time."""
    for data in chunks(source, info):
        for digest in digests:
            digest.update(data)
        file.write(data)


def hash_file(digest: Digest, path: Path, start: int = 0, stop: int | None = None) -> None:
    """Hash the bytes of a file from `start` to `stop`, its end by default."""
    if stop is not None and stop <= start:
        return
    descriptor, info = open_regular(path)
    try:
        end = info.st_size if stop is None else stop
        buffer = memoryview(bytearray(min(CHUNK, max(0, end - start))))
        for offset in range(start, end, CHUNK):
            view = buffer[: min(CHUNK, end - offset)]
            pread_into(descriptor, view, offset, path)
            digest.update(view)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    digest = hashlib.sha256()
    hash_file(digest, path)
    return digest.hexdigest()
