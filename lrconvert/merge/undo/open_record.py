"""The record of a merge on the disk: what it takes to undo it, in a folder of its own inside the merged model.

Normative text: ``formats/undo-v1.md``. A record is complete by itself: the adapters, the headers and small files of the
base as they were, digests of every tensor before and after, and undo codes (`residual`) of all that was changed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from lrconvert.core.errors import DigestError, LrcError, UndoError, UndoOrderError
from lrconvert.core.limits import FOREIGN, MAX_INDEX_BYTES
from lrconvert.core.wording import spelled
from lrconvert.io.container import TensorInfo, combined_digest, open_regular, parse_header, pread, read_small
from lrconvert.merge.hashing import file_digest
from lrconvert.merge.plan.other_files import RECORDS
from lrconvert.merge.plan.updates import Source
from lrconvert.merge.undo import adapters, record
from lrconvert.merge.undo.record import CODES_NAME

RECORD_NAME = "record.json"
_FOLDER = re.compile(r"merge-([1-9][0-9]{0,5})-[0-9a-f]{12}")


def _advice() -> str:
    return f"give the base: {spelled('from_base', ...)}"


# --- finding records ------------------------------------------------------------------------------------------------


def folder_name(number: int, inputs: Iterable[tuple[str, float]]) -> str:
    """Return the folder, in the model's, of merge number `number` of adapters with these digests and scales."""
    digest = hashlib.sha256("".join(f"{text} {scale.hex()}\n" for text, scale in inputs).encode()).hexdigest()
    return f"{RECORDS}/merge-{number}-{digest[:12]}"


def number_of(place: str) -> int:
    """Return the number of the merge whose record is the folder `place`; 0 if that is not the name of one."""
    match = _FOLDER.fullmatch(Path(place).name)
    return int(match[1]) if match else 0


def numbered(model: Path) -> dict[int, Path]:
    """Return the records of a model by number. Raises E-UNDO if two have the same one."""
    folders: dict[int, Path] = {}
    root = model / RECORDS
    for path in sorted(root.iterdir()) if root.is_dir() and not root.is_symlink() else ():
        match = _FOLDER.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            number = int(match[1])
            if number in folders:
                raise UndoError(f"two records have the number {number}", fix="remove the one that is a copy", path=path)
            folders[number] = path
    return folders


def latest(model: Path, number: int | None = None) -> Path:
    """Return the folder of the last record of a model. Raises E-UNDO if there is none, E-UNDO-ORDER if `number` is
    another."""
    folders = numbered(model)
    if not folders:
        from_base = spelled("from_base", ...)
        fix = f"if it was undone, nothing is left to do; otherwise give the base it was merged from: {from_base}"
        raise UndoError("holds no record of a merge", fix=fix, path=model)
    last = max(folders)
    if number in folders and number != last:
        what = f"merge {last} was made on top of merge {number}"
        raise UndoOrderError(what, fix=f"undo merge {last} first", path=model)
    if number not in (None, last):
        what = f"there is no record of a merge {number}; the last is {last}"
        raise UndoError(what, fix="if it was undone, nothing is left to do", path=model)
    return folders[last]


# --- reading one ----------------------------------------------------------------------------------------------------


class OpenRecord:
    """A record whose files were all compared with their digests. A context manager, since undo.bin stays open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / RECORD_NAME
        for path in (self.path, folder / "base"):
            if path.is_symlink():
                raise UndoError("is a link, and not the record that the merge wrote", fix=_advice(), path=path)
        if not self.path.is_file():
            raise UndoError(f"the record has no {RECORD_NAME}", fix=_advice(), path=folder)
        try:
            self.record = record.parse(read_small(self.path, MAX_INDEX_BYTES))
            self.tensors = {t.name: t for t in self.record.tensors}
            for name, digest in self.record.stored.items():
                self._check_file(name, digest)
            self.headers = [self._header(n, name, size) for n, (name, size) in enumerate(self.record.files)]
        except LrcError as error:
            raise error.at(self.path) from None
        self._codes, self._size = -1, 0
        if self.record.can_undo:
            self._codes, info = open_regular(folder / CODES_NAME)
            self._size = info.st_size

    def _check_file(self, name: str, digest: str) -> None:
        path = self.folder / name
        if not path.is_file() or path.is_symlink():
            raise UndoError(f"the record's file {name!r} is missing", fix=_advice(), path=path)
        if file_digest(path) != digest:
            raise DigestError("the file is not the one that the merge wrote", fix=_advice(), path=path)

    def _header(self, number: int, name: str, nbytes: int) -> tuple[bytes, list[TensorInfo]]:
        data = self.text(f"base/{number}.header")
        if int.from_bytes(data[:8], "little") != len(data) - 8:
            raise UndoError(f"the header of {name!r} in the record has another length than it says")
        _, infos = parse_header(data[8:], nbytes, FOREIGN, self.path)
        for info in infos:
            tensor = self.tensors.get(info.name)
            if tensor is None or (tensor.dtype, tensor.shape) != (info.dtype, info.shape):
                raise UndoError(f"the record does not describe the tensor {info.name!r} of {name!r}")
        return data, infos

    def check_content(self) -> None:
        """Raise E-DIGEST unless the digests of the tensors make up that of the base."""
        if combined_digest((t.name, t.before) for t in self.record.tensors) != self.record.content:
            raise DigestError("the digests of the record do not agree with each other", path=self.path)

    @property
    def place(self) -> str:
        """The folder of the record, in the model's."""
        return f"{RECORDS}/{self.folder.name}"

    def holds(self, name: str) -> bool:
        """Return whether a file of the model, named from its folder, is one of the record."""
        return name.startswith(f"{self.place}/")

    def text(self, name: str) -> bytes:
        """Return a small file of the record."""
        return read_small(self.folder / name, MAX_INDEX_BYTES)

    def sources(self) -> tuple[Source, ...]:
        """Return the adapters of the merge."""
        return tuple(Source(adapters.load(self.folder, n, entry)) for n, entry in enumerate(self.record.adapters))

    def code(self, offset: int, nbytes: int) -> bytes:
        """Return bytes of undo.bin. Raises E-UNDO if it does not have them."""
        if offset + nbytes > self._size:
            what = f"{CODES_NAME} has {self._size} bytes, a code is to end at {offset + nbytes}"
            raise UndoError(what, path=self.path)
        return bytes(pread(self._codes, nbytes, offset, self.folder / CODES_NAME))

    def close(self) -> None:
        if self._codes >= 0:
            os.close(self._codes)
            self._codes = -1

    def __enter__(self) -> OpenRecord:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
