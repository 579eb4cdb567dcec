"""The base of a merge in place that was broken off, as it was.

Of weight files that are merged already the headers come from the record; values, where a plan looks at some, are
restored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lrconvert.core.limits import FOREIGN, MAX_INDEX_BYTES
from lrconvert.io.checkpoint import Checkpoint, weight_names
from lrconvert.io.container import ContainerFile, TensorInfo, parse_header, read_json
from lrconvert.io.durable import Buffer
from lrconvert.merge.arithmetic.workspace import Workspace
from lrconvert.merge.in_place.commit import Commit
from lrconvert.merge.in_place.model_folder import OLD
from lrconvert.merge.in_place.patches import MERGED
from lrconvert.merge.plan.plan import CONFIG_NAME
from lrconvert.merge.undo.open_record import OpenRecord
from lrconvert.merge.undo.restoring import Restorer


@contextmanager
def reconstructed_base(commit: Commit) -> Iterator[Checkpoint]:
    """Open the base of a merge, read from the model that is between two states."""
    folder, states = commit.folder, commit.states()
    with ExitStack() as stack:
        files: list[ContainerFile] = []
        for number, change in enumerate(commit.plan.changes):
            path = folder.model / change.name
            if states.get(number) == MERGED:
                files.append(_Merged(path, commit.opened, number))
            else:
                files.append(stack.enter_context(ContainerFile(path)))
        names = weight_names(folder.model, folder.root / OLD)
        config, index = folder.text(CONFIG_NAME), folder.text(names.index)
        yield Checkpoint(
            folder.model,
            read_json(config) if config.exists() else {},
            tuple(files),
            index if index.exists() else None,
            read_json(index, MAX_INDEX_BYTES) if index.exists() else {},
            names=names,
        )


class _Merged(ContainerFile):
    """A weight file of the base that is not there any more, since the merged one has taken its place."""

    def __init__(self, path: Path, opened: OpenRecord, number: int) -> None:
        self.path, self._descriptor, self._opened = path, -1, opened
        self.header_bytes, _ = opened.headers[number]
        self._data_bytes = opened.record.files[number][1]
        self.metadata, tensors = parse_header(self.header_bytes[8:], self._data_bytes, FOREIGN, path)
        self.tensors = tuple(tensors)
        self.by_name = {t.name: t for t in tensors}

    @property
    def size(self) -> int:
        return len(self.header_bytes) + self._data_bytes

    def read(self, info: TensorInfo, offset: int = 0, nbytes: int | None = None) -> bytearray:
        """Return bytes of a tensor, restored as a whole: only small ones are looked at in planning."""
        restored = _Memory()
        with ContainerFile(self.path) as merged, Workspace() as workspace:
            checkpoint = Checkpoint(self.path.parent, {}, (merged,), None)
            with Restorer(self._opened, checkpoint, workspace) as restorer:
                restorer.tensor(self._opened.tensors[info.name], restored)
        stop = info.nbytes if nbytes is None else offset + nbytes
        return restored.data[offset:stop]

    def read_into(self, info: TensorInfo, offset: int, view: memoryview) -> None:
        view[:] = self.read(info, offset, len(view))

    def check_unchanged(self) -> None:
        """Do nothing: the file is gone, as it should be."""


class _Memory:
    """A file in memory."""

    def __init__(self) -> None:
        self.data, self.position = bytearray(), 0

    def write(self, data: Buffer) -> int:
        self.data += data
        self.position = len(self.data)
        return memoryview(data).nbytes
