"""Reports of merges, unmerges and verifications: plain data for people and scripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lrconvert.merge.arithmetic.stats import MergeStats


@dataclass(frozen=True)
class MergedTensor:
    """One tensor that updates were added to; after a dry run its `stats` have only the elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    updates: int
    stats: MergeStats


@dataclass(frozen=True)
class MergeReport:
    """The report of a merge, or of a dry run.

    `files` are (name, bytes) of the output, without the record; `left_out` files of the base that are not in it;
    `placed`, `added`, `dropped` tensors that are not the base's any more; `config` the changed fields. `record` is the
    folder in the output that undoes the merge, `record_bytes` its size; `touched_bytes` those of changed tensors. With
    `already_done` the model held the merge of this `record` before, and nothing was changed.
    """

    tensors: tuple[MergedTensor, ...]
    placed: tuple[str, ...]
    added: tuple[str, ...]
    dropped: tuple[str, ...]
    config: Mapping[str, Any]
    files: tuple[tuple[str, int], ...]
    left_out: tuple[str, ...]
    dry_run: bool = False
    warnings: tuple[str, ...] = ()
    record: str = ""
    record_bytes: int = 0
    touched_bytes: int = 0
    can_undo: bool = False
    already_done: bool = False

    def __repr__(self) -> str:
        done = "dry run" if self.dry_run else "already done" if self.already_done else f"{self.stats.changed:,} changed"
        undo = "can be undone" if self.can_undo else "without an undo record"
        return f"<MergeReport: {len(self.tensors)} tensors, {self.total_bytes:,} bytes, {done}, {undo}>"

    @property
    def stats(self) -> MergeStats:
        """Elements of all tensors, how many changed, rounding errors."""
        return sum((t.stats for t in self.tensors), MergeStats())

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.files)


@dataclass(frozen=True)
class UnmergeReport:
    """The report of an unmerge. `restored` names tensors that the merge had changed, `removed` those that it had added;
    `files` (name, bytes) of the output; `remaining` merges that are still in it. `verified` says whether all tensors
    were compared with the digests of the base. With `already_done` the merge was undone before, and nothing changed."""

    record: str
    restored: tuple[str, ...]
    removed: tuple[str, ...]
    files: tuple[tuple[str, int], ...]
    remaining: int
    verified: bool
    warnings: tuple[str, ...] = ()
    already_done: bool = False

    def __repr__(self) -> str:
        verified = "verified" if self.verified else "not verified"
        return f"<UnmergeReport: {len(self.restored)} tensors restored, {verified}, {self.remaining} merges left>"

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.files)


@dataclass(frozen=True)
class Difference:
    """One way in which a model is not the merge of a base and adapters. `elements` differ, of all that there are."""

    name: str
    what: str
    elements: int = 0


@dataclass(frozen=True)
class VerifyReport:
    """The answer of a verification: every tensor of a merge was computed again and compared with the model's. `hint`:
    what the record of the merge says beside what was asked, where they differ."""

    tensors: int
    recomputed: int
    nbytes: int
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...] = ()
    hint: str = ""

    def __repr__(self) -> str:
        found = "equal to the bit" if self.ok else f"{len(self.differences)} differ"
        return f"<VerifyReport: {self.tensors} tensors, {self.recomputed} computed again, {found}>"

    @property
    def ok(self) -> bool:
        return not self.differences
