"""What adapters do to a model's outputs, on data: each layer's error, the distance of the answers, agreement.

Teacher (base + LoRA) and students (base + compact adapter) share one copy of the base. The teacher's layers say what
flows into each target; what a student's update would add there instead is exact for any width: the inputs are only seen
through the rows of A, so that a Gram matrix of a few dozen rows holds all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrconvert.core.dtypes import F64, Array
from lrconvert.core.errors import DataError
from lrconvert.formats.fidelity import Answers, Fidelity, target_key
from lrconvert.live import attach, collect_statistics
from lrconvert.live.attach import AdaptedLayer
from lrconvert.live.collect_statistics import Batch
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.methods import base as methods

_TEACHER = "teacher"
_CHUNK = 1 << 24  # logits that are compared at once


@dataclass(frozen=True)
class Measured:
    """`answers` of each student; `errors`: for each student, by number of the target, E||(delta - delta_hat) x||^2 and
    E||delta x||^2 with x as it flows in the teacher."""

    answers: tuple[Answers, ...]
    errors: tuple[dict[int, tuple[float, float]], ...]

    def told(self, which: int, fidelity: Fidelity) -> Fidelity:
        """The fidelity of student number `which`, with what was measured of it."""
        found = [(t, self.errors[which].get(n)) for n, t in enumerate(fidelity.targets)]
        rows = [t if some is None else replace(t, data_error=some[0], data_energy=some[1]) for t, some in found]
        return replace(fidelity, targets=tuple(rows), answers=self.answers[which])


def measure(
    model: nn.Module,
    teacher: LoraAdapter,
    students: Sequence[CompactAdapter],
    batches: Iterable[Batch],
    progress: Callable[[int], None] = lambda tokens: None,
) -> Measured:
    """Run teacher, students and base over `batches`. Adapters that are active on the model stay so, as a part of the
    base; the model is left as it was. Raises E-DATA for a model that gives
    neither logits nor hidden states, E-ATTACH, E-BASE."""
    device = next(iter(model.parameters())).device
    names = [f"student_{n}" for n in range(len(students))]
    training = [module for module in model.modules() if module.training]
    model.eval()
    before, attached = attach.active(model), []
    try:
        attach.attach(model, teacher, name=_TEACHER)
        attached.append(_TEACHER)
        for name, student in zip(names, students, strict=True):
            attach.attach(model, student, name=name)
            attached.append(name)
        inputs = _Inputs.of(model, teacher, dict(zip(names, students, strict=True)))
        sums = [_Sums() for _ in range(len(students) + 1)]
        with torch.no_grad():
            for batch in batches:
                given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                attach.set_active(model, (*before, _TEACHER))
                with inputs.watching(given, model):
                    goal = _outputs(model, given)
                for which, total in zip([*((name,) for name in names), ()], sums, strict=True):
                    attach.set_active(model, (*before, *which))
                    total.add(goal, _outputs(model, given))
                progress(collect_statistics.token_count(batch))
    finally:
        for name in attached:
            attach.detach(model, name)
        if attach.active(model) != before:
            attach.set_active(model, before)
        for module in training:
            module.training = True
    base = sums[-1]
    if base.count == 0:
        raise DataError("there is no output to compare", fix="is the data empty?")
    return Measured(tuple(s.answers(base) for s in sums[:-1]), inputs.errors())


# --- answers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Outputs:
    """One row for each item: logits (items, classes), or hidden states."""

    rows: Tensor
    are_logits: bool


def _outputs(model: nn.Module, batch: Batch) -> _Outputs:
    config: Any = getattr(model, "config", None)
    writes = bool(getattr(config, "is_encoder_decoder", False))
    found = model(**batch)
    logits, hidden = getattr(found, "logits", None), getattr(found, "last_hidden_state", None)
    value = logits if logits is not None else hidden
    if value is None:
        raise DataError("the model gives neither logits nor hidden states")
    mask = batch.get("attention_mask")
    if writes and batch.get("labels") is not None:
        mask = batch["labels"] != -100
    if isinstance(mask, Tensor) and mask.shape == value.shape[:-1]:
        return _Outputs(value[mask.bool()], logits is not None)
    return _Outputs(value.reshape(-1, value.shape[-1]), logits is not None)


@dataclass
class _Sums:
    """Sums over items of a student against the teacher."""

    count: int = 0
    distance: float = 0.0
    agreed: int = 0
    are_logits: bool = True

    def add(self, goal: _Outputs, found: _Outputs) -> None:
        self.are_logits = goal.are_logits
        self.count += len(goal.rows)
        step = max(1, _CHUNK // goal.rows.shape[-1])
        for start in range(0, len(goal.rows), step):
            p, q = goal.rows[start : start + step].float(), found.rows[start : start + step].float()
            if not goal.are_logits:
                self.distance += float(((p - q).square().sum(-1) / p.square().sum(-1).clamp(min=1e-30)).sum())
                continue
            self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            self.distance += float((p.exp() * (p - q)).sum(-1).double().sum())

    def answers(self, base: _Sums) -> Answers:
        share = (self.agreed / self.count, base.agreed / self.count) if self.are_logits else (None, None)
        kind = "KL" if self.are_logits else "hidden states"
        return Answers(kind, self.count, self.distance / self.count, base.distance / base.count, *share)


# --- layers ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Place:
    """A target, by its number: the layer it is on, the rows of all A that see its input (k, in), and the B that go with
    them: ``left[0] @ G @ left[0].T`` is the teacher's output, ``left[n]`` the error of student n - 1, each (out, k).
    Students without factors have an entry in `based` instead, and the sum of their squared errors in `lost`."""

    which: int
    layer: AdaptedLayer
    rows: Tensor
    left: list[F64]
    gram: F64
    based: dict[int, attach.Update]
    lost: dict[int, float]
    count: int = 0

    def add(self, x: Tensor) -> None:
        """x (tokens, in), or the tokens of an embedding, whose inputs are unit vectors."""
        z = self._seen(x, self.rows).double()
        self.gram += (z.T @ z).cpu().numpy()
        self.count += len(z)
        for n, update in self.based.items():
            own = torch.from_numpy(self.left[0]).to(z) @ self.rows.double()
            error = attach.dense_update(update, attach.dense_weight(self.layer.base_layer)).double() - own
            self.lost[n] += float(self._seen(x, error.float()).double().square().sum())

    def _seen(self, x: Tensor, rows: Tensor) -> Tensor:
        return rows.T[x] if isinstance(self.layer.base_layer, nn.Embedding) else x.float() @ rows.T


@dataclass(eq=False)
class _Inputs:
    """The targets that are layers of their own (experts are not), and what flows into them."""

    places: list[_Place]
    students: int

    @classmethod
    def of(cls, model: nn.Module, teacher: LoraAdapter, students: Mapping[str, CompactAdapter]) -> _Inputs:
        """`students` by the names that they are attached under."""
        layers = attach.layers_of(model, _TEACHER)
        device = next(iter(model.parameters())).device
        based = {n: name for n, (name, student) in enumerate(students.items()) if methods.needs_base(student)}
        known = [
            {} if n in based else {target_key(t): (a, b) for t, a, b in methods.expand_all(student)}
            for n, student in enumerate(students.values())
        ]
        places = []
        for n, pair in enumerate(teacher.targets):
            layer = layers.get(n)
            if layer is None:
                continue
            others = [table.get(target_key(pair.target)) for table in known]
            stacked: list[Array] = [pair.A, *(some[0] for some in others if some is not None)]
            rows = torch.from_numpy(np.concatenate(stacked).astype(np.float32)).to(device)
            own = pair.scale * pair.B.astype(np.float64)
            left = [_spread(own, 0, len(rows))]
            at = pair.rank
            for some in others:
                error = _spread(own, 0, len(rows))
                if some is not None:
                    error -= _spread(some[1].astype(np.float64), at, len(rows))
                    at += some[0].shape[0]
                left.append(error)
            found = {
                m: update
                for m, name in based.items()
                for update in layer.updates
                if update.name == name and target_key(update.target) == target_key(pair.target)
            }
            gram = np.zeros((len(rows), len(rows)))
            places.append(_Place(n, layer, rows, left, gram, found, dict.fromkeys(found, 0.0)))
        return cls(places, len(students))

    def watching(self, batch: Batch, model: nn.Module) -> ExitStack:
        """While the context lasts, what flows into the targets is counted."""
        stack = ExitStack()
        config: Any = getattr(model, "config", None)
        masks = collect_statistics.masks_of(batch, bool(getattr(config, "is_encoder_decoder", False)))
        for place in self.places:

            def look(module: Any, given: Any, named: Any, place: _Place = place) -> None:
                x = given[0] if given else next(iter(named.values()))
                place.add(collect_statistics.rows_of(place.layer.base_layer, x, masks))

            handle = place.layer.register_forward_pre_hook(look, with_kwargs=True)
            stack.callback(handle.remove)
        return stack

    def errors(self) -> tuple[dict[int, tuple[float, float]], ...]:
        found: list[dict[int, tuple[float, float]]] = [{} for _ in range(self.students)]
        for place in self.places:
            gram = place.gram / max(1, place.count)
            energy = _size(place.left[0], gram)
            for n, (table, left) in enumerate(zip(found, place.left[1:], strict=True)):
                lost = place.lost[n] / max(1, place.count) if n in place.lost else _size(left, gram)
                table[place.which] = lost, energy
        return tuple(found)


def _spread(b: F64, at: int, width: int) -> F64:
    """b (out, r) as columns `at` and after of (out, width)."""
    found = np.zeros((b.shape[0], width))
    found[:, at : at + b.shape[1]] = b
    return found


def _size(left: F64, gram: F64) -> float:
    """tr(left @ gram @ left^T), not negative."""
    return max(0.0, float(((left.T @ left) * gram).sum()))
