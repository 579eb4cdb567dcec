"""The zero point of measurements: the base without updates, but with the heads and trained rows of its adapters.

A classifier that an adapter carries was trained with it; in the base that head is random. A distance that starts at
random answers would be closed by the head alone, whatever the updates are worth. So heads and rows that teacher and
student both carry stay, and only updates are away: factors, DoRA's magnitudes, and the biases of a LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from lrconvert.core.dtypes import FLOATS, STORAGE, decode, round_to
from lrconvert.lora.adapter import CompactAdapter, ExtraTensor, LoraAdapter

Extras = Mapping[tuple[str, str], ExtraTensor]  # by name and use
_STAYS = ("replace", "rows", "row_indices")


def without_updates(teacher: LoraAdapter, student: CompactAdapter | None = None) -> LoraAdapter:
    """Return what is left of `teacher` without its updates: the heads and trained rows that `student` carries, too;
    all of them if there is no student."""
    kept = _stays(teacher)
    if student is not None:
        theirs = _stays(student)
        kept = {key: extra for key, extra in kept.items() if key in theirs}
    return replace(teacher, targets=(), extras=tuple(kept.values()))


def differences(teacher: LoraAdapter, student: CompactAdapter) -> tuple[str, ...]:
    """Return warnings: heads and trained rows that only one side carries, or that are not the same in both, so that
    what they do to the answers is counted with the updates. One that was only narrowed is the same."""
    return tuple(_differences(_stays(teacher), _stays(student)))


def _differences(teacher: Extras, student: Extras) -> Iterator[str]:
    away = "the base without an adapter has its own there, and the effect counts as one of updates"
    if missing := teacher.keys() - student.keys():
        yield f"the LoRA carries {_names(missing)}, which the file lacks: {away}"
    if added := student.keys() - teacher.keys():
        yield f"the file carries {_names(added)}, which the LoRA lacks: {away}"
    if other := {key for key in teacher.keys() & student.keys() if not _are_same(teacher[key], student[key])}:
        yield (
            f"the file's {_names(other)} has other values than the LoRA's: the base without an adapter has the LoRA's "
            "there, and the effect counts as one of updates"
        )


def _stays(adapter: LoraAdapter | CompactAdapter) -> Extras:
    """The extra tensors that are no part of an update."""
    return {
        (extra.name.replace("base_layer.", ""), extra.use): extra for extra in adapter.extras if extra.use in _STAYS
    }


def _names(keys: Iterable[tuple[str, str]]) -> str:
    names = sorted({name for name, _ in keys})
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more


def _are_same(teacher: ExtraTensor, student: ExtraTensor) -> bool:
    """Return whether a student's tensor is the teacher's own, or it in a narrower dtype."""
    if (teacher.dtype, teacher.shape, teacher.data) == (student.dtype, student.shape, student.data):
        return True
    if teacher.shape != student.shape or not {teacher.dtype, student.dtype} <= set(FLOATS):
        return False
    values = decode(np.frombuffer(teacher.data, STORAGE[teacher.dtype]), teacher.dtype)
    return round_to(values, student.dtype).tobytes() == student.data
