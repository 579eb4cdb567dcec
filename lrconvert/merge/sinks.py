"""Sinks of the weight files of a merge: a folder under construction or, in place, mostly nowhere yet."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import LrcError
from lrconvert.io.container import ContainerFile
from lrconvert.io.durable import CONTENT, Buffer, Work, Writer
from lrconvert.merge.hashing import stored_digest
from lrconvert.merge.journal import Done, Patch
from lrconvert.merge.plan.plan import Output, Shard


class Sink(Protocol):
    """Takes the weight files of a merge."""

    work: Work
    is_copy: bool  # whether the output is a folder of its own, with all other files of the base in it

    def open(self, shard: Shard) -> AbstractContextManager[Writer]:
        """Return what the bytes of a weight file are written to."""
        ...

    def change(self, output: Output, first: int, before: Array, after: Array) -> None:
        """Take the rows from `first` on of a touched tensor; called in the background, in order."""
        ...

    def finish(self, shard: Shard) -> Patch | None:
        """Take the end of a file; return the patch that changes it, if that is how it is done."""
        ...

    def note(self, done: Done, shard: Shard) -> None:
        """Take a finished file, also of an earlier run."""
        ...

    def kept(self, done: Done, shard: Shard) -> list[str] | None:
        """Return the names, in the folder of the work, that an earlier run left of a finished file; None if they have
        changed since."""
        ...


@dataclass
class FolderSink:
    """A new folder: every weight file is written into it."""

    work: Work
    is_copy: bool = True

    def open(self, shard: Shard) -> AbstractContextManager[Writer]:
        return self.work.content.create(shard.name)

    def change(self, output: Output, first: int, before: Array, after: Array) -> None:
        """Do nothing: the file itself has them."""

    def finish(self, shard: Shard) -> Patch | None:
        return None

    def note(self, done: Done, shard: Shard) -> None:
        """Do nothing: the folder has it."""

    def kept(self, done: Done, shard: Shard) -> list[str] | None:
        path = self.work.content.root / shard.name
        return [f"{CONTENT}/{shard.name}"] if has_digests(path, shard, done.digests) else None


class Nowhere:
    """Takes bytes, and counts them."""

    def __init__(self) -> None:
        self.position = 0

    def write(self, data: Buffer) -> int:
        self.position += memoryview(data).nbytes
        return memoryview(data).nbytes

    def __enter__(self) -> Nowhere:
        return self

    def __exit__(self, *_: object) -> None:
        """There is nothing to close."""


def has_digests(path: Path, shard: Shard, digests: Mapping[str, str]) -> bool:
    """Return whether a weight file has the header of `shard` and tensors with these digests."""
    try:
        with ContainerFile(path) as file:
            return file.header_bytes == shard.header and all(
                digests.get(info.name) == stored_digest(file, info) for info in file.tensors
            )
    except LrcError:
        return False
