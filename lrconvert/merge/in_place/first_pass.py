"""The first pass over a model that is changed in place: what is computed is kept only where that pays."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np

from lrconvert.core.dtypes import STORAGE, Array
from lrconvert.io.durable import CONTENT, Work, Writer
from lrconvert.merge.in_place.model_folder import PATCH, SAME, SWAP, Change
from lrconvert.merge.in_place.patches import PATCH_SHARE, Patches, is_whole
from lrconvert.merge.journal import Done, Patch
from lrconvert.merge.plan.plan import Output, Plan, Shard
from lrconvert.merge.plan.updates import NonlinearPiece
from lrconvert.merge.sinks import Nowhere, has_digests


@dataclass
class InPlaceSink:
    """Keeps patches where few rows change, and the weight file that is replaced first; the rest is computed again when
    its turn comes."""

    work: Work
    plan: Plan
    is_copy: bool = False
    _ahead: str = ""
    _changes: dict[str, Change] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.patches = Patches(self.work.files, [shard.size for shard in self.plan.shards])
        last = self.plan.shards[-1]
        if any(not o.is_copy for o in last.outputs) and not self._is_sparse(last):
            self._ahead = last.name

    def open(self, shard: Shard) -> AbstractContextManager[Writer]:
        if _may_be_patched(shard) and any(o.is_touched for o in shard.outputs) and shard.name != self._ahead:
            self.patches.open(self.plan.shards.index(shard))
        return self.work.content.create(shard.name) if shard.name == self._ahead else Nowhere()

    def change(self, output: Output, first: int, before: Array, after: Array) -> None:
        if output.base is not None:
            width = before.shape[1] * before.dtype.itemsize
            self.patches.change(output.base.start + first * width, before, after)

    def finish(self, shard: Shard) -> Patch | None:
        return self.patches.finish()

    def note(self, done: Done, shard: Shard) -> None:
        """Settle how a finished file is changed."""
        is_same = shard.has_header_of_base and not done.added and all(t.before == t.after for t in done.tensors)
        mode = SAME if is_same else SWAP if done.patch is None else PATCH
        self._changes[shard.name] = Change(shard.name, mode, done.patch)

    def kept(self, done: Done, shard: Shard) -> list[str] | None:
        if done.patch is not None:
            if not is_whole(self.work.files.root / done.patch.name, done.patch):
                return None
            self.patches.nbytes += done.patch.nbytes
            return [done.patch.name]
        path = self.work.content.root / shard.name
        return [f"{CONTENT}/{shard.name}"] if path.exists() and has_digests(path, shard, done.digests) else []

    def changes(self) -> tuple[Change, ...]:
        """Return how every weight file is changed."""
        return tuple(self._changes[shard.name] for shard in self.plan.shards)

    def _is_sparse(self, shard: Shard) -> bool:
        """Return whether the factors show that few rows of a file change, so that it is not worth writing it ahead."""
        if not _may_be_patched(shard):
            return False
        nbytes = 0
        for output in shard.outputs:
            nbytes += 0 if output.rows is None else output.rows.values.nbytes
            for piece in output.pieces:
                left = self.plan.sources[piece.adapter].term(piece).left
                is_dora = isinstance(piece, NonlinearPiece) and piece.magnitude is not None
                rows = left.shape[0] if is_dora else np.count_nonzero(np.any(left, axis=1))
                nbytes += int(rows) * piece.cols * STORAGE[output.dtype].itemsize
                if 2 * nbytes > shard.size // PATCH_SHARE:
                    return False
        return True


def _may_be_patched(shard: Shard) -> bool:
    """Return whether a file keeps its header and whatever is not computed."""
    return shard.has_header_of_base and all(o.is_copy or o.is_touched for o in shard.outputs)
