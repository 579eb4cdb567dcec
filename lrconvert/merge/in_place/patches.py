"""Changing a few rows of a weight file where they lie: both versions of every changed row are on the disk before.

A patch is a list of entries: offset in the weight file and length (u64, little endian), the bytes of the base, those of
the merge. Applying either side again gives the same file, so a crash between does no harm.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import DigestError, FileWriteError
from lrconvert.io.container import open_regular, pread
from lrconvert.io.durable import File, StagedDirectory, overwrite_bytes
from lrconvert.merge.arithmetic.rounding import bits
from lrconvert.merge.hashing import file_digest
from lrconvert.merge.journal import Patch

BASE, MERGED = 0, 1
PATCH_SHARE = 8  # a patch has at most this part of its weight file
_DENSE_BYTES = 1 << 20  # a block of this size of which more than half has changed is no matter of a few rows
_ENTRY_BYTES = 1 << 24


class PatchWriter:
    """Collects the changed rows of one weight file in `name` of a folder, until they are more than `limit` bytes."""

    def __init__(self, folder: StagedDirectory, name: str, limit: int) -> None:
        self.folder, self.name, self.limit = folder, name, limit
        self.nbytes = 0
        self._hash = hashlib.sha256()
        self._file: File | None = folder.create(name)

    def change(self, offset: int, base: Array, merged: Array) -> None:
        """Take rows (n, cols) that begin at byte `offset` of the file: stored bits before and after the merge."""
        if self._file is None:
            return
        changed = np.flatnonzero((bits(base) != bits(merged)).any(axis=1))
        width = base.shape[1] * base.dtype.itemsize
        cost = 2 * changed.size * width
        if self.nbytes + cost > self.limit or (base.nbytes > _DENSE_BYTES and cost > base.nbytes):
            self.give_up()
            return
        height = max(1, _ENTRY_BYTES // width)
        runs = np.split(changed, np.flatnonzero(np.diff(changed) > 1) + 1) if changed.size else []
        for run in runs:
            for first in range(int(run[0]), int(run[-1]) + 1, height):
                rows = slice(first, min(first + height, int(run[-1]) + 1))
                parts = [np.ascontiguousarray(side[rows]).tobytes() for side in (base, merged)]
                head = np.array([offset + first * width, len(parts[0])], "<u8").tobytes()
                for part in (head, *parts):
                    self._hash.update(part)
                    self.nbytes += self._file.write(part)

    def close(self) -> None:
        """Let go of the file after a failure, whatever it is."""
        if self._file is not None:
            with suppress(FileWriteError):
                self._file.close()
            self._file = None

    def give_up(self) -> None:
        """Make no patch of this file."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self.folder.remove(self.name)

    def finish(self) -> Patch | None:
        """Return the patch, synced; None if there is none, or nothing has changed."""
        if self._file is None:
            return None
        if not self.nbytes:
            self.give_up()
            return None
        with self._file:
            pass
        return Patch(self.name, self.nbytes, self._hash.hexdigest())


@dataclass
class Patches:
    """The patches of one pass over weight files of these sizes: each has at most an eighth of its weight file, all
    together half of the largest."""

    folder: StagedDirectory
    sizes: Sequence[int]
    nbytes: int = 0
    _writer: PatchWriter | None = None

    def open(self, number: int) -> None:
        """Begin the patch of weight file `number`; without it changes are not kept."""
        limit = min(self.sizes[number] // PATCH_SHARE, max(self.sizes) // 2 - self.nbytes)
        self._writer = PatchWriter(self.folder, f"patch-{number}.tmp", limit)

    def change(self, offset: int, base: Array, merged: Array) -> None:
        """Take changed rows, see `PatchWriter.change`."""
        if self._writer is not None:
            self._writer.change(offset, base, merged)

    def finish(self) -> Patch | None:
        """Return the patch of the weight file, None if there is none."""
        patch = None if self._writer is None else self._writer.finish()
        self.nbytes += 0 if patch is None else patch.nbytes
        self._writer = None
        return patch

    def close(self) -> None:
        """Let go of what a failure has left open."""
        if self._writer is not None:
            self._writer.close()


def is_whole(path: Path, patch: Patch) -> bool:
    """Return whether a file is that patch."""
    return path.is_file() and path.stat().st_size == patch.nbytes and file_digest(path) == patch.sha256


def apply(path: Path, patch: Patch, weights: Path, side: int) -> None:
    """Put one side of every row of a patch into a weight file. Raises E-DIGEST, E-OUT-PATH, E-IO-WRITE."""
    if not is_whole(path, patch):
        raise DigestError("the rows that are to be put back are damaged", path=path)
    with closing(_entries(path, patch, side, weights.stat().st_size)) as entries:
        overwrite_bytes(weights, entries)


def _entries(path: Path, patch: Patch, side: int, size: int) -> Generator[tuple[int, bytes], None, None]:
    descriptor, _ = open_regular(path)
    try:
        head = 0
        while head < patch.nbytes:
            offset, length = (int(n) for n in np.frombuffer(pread(descriptor, 16, head, path), "<u8"))
            if offset + length > size or head + 16 + 2 * length > patch.nbytes:
                raise DigestError("the rows that are to be put back do not lie in the file", path=path)
            yield offset, bytes(pread(descriptor, length, head + 16 + side * length, path))
            head += 16 + 2 * length
    finally:
        os.close(descriptor)
