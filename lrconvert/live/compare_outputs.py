"""The effect of adapters on a model's outputs, on data: each layer's error, the distance of the answers, agreement.

Teacher (base + LoRA) and students (base + compact adapter) share one copy of the base. The teacher's layers say what
flows into each target; what a student's update would add there instead is exact for any width: the inputs are only seen
through the rows of A, so that a Gram matrix of a few dozen rows holds all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrconvert.core.dtypes import F64, Array
from lrconvert.core.errors import DataError
from lrconvert.formats.fidelity import Answers, Fidelity, target_key
from lrconvert.live import attach, zero_point
from lrconvert.live.adapted_layer import AdaptedLayer, dense_update, dense_weight
from lrconvert.live.answers import AnswerSums, Outputs, answer_of, masked_rows
from lrconvert.live.attached_adapter import Update
from lrconvert.live.layer_inputs import Batch, masks_of, on_device, rows_of, token_count
from lrconvert.live.load_model import evaluating, is_encoder_decoder, kind_of
from lrconvert.live.texts import IGNORED
from lrconvert.live.watch import first_input
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.methods import base as methods

_TEACHER, _ZERO = "teacher", "zero_point"


@dataclass(frozen=True)
class Measured:
    """`answers` of each student; `errors`: for each student, by number of the target, E||(delta - delta_hat) x||^2 and
    E||delta x||^2 with x as it flows in the teacher; `warnings` of each student."""

    answers: tuple[Answers, ...]
    errors: tuple[dict[int, tuple[float, float]], ...]
    warnings: tuple[tuple[str, ...], ...]

    def added_to(self, fidelity: Fidelity, which: int) -> Fidelity:
        """Return the fidelity of student number `which` with what was measured of it."""
        errors = self.errors[which]
        targets = [
            replace(target, data_error=errors[n][0], data_energy=errors[n][1]) if n in errors else target
            for n, target in enumerate(fidelity.targets)
        ]
        return replace(
            fidelity,
            targets=tuple(targets),
            answers=self.answers[which],
            warnings=(*fidelity.warnings, *self.warnings[which]),
        )


def measure(
    model: nn.Module,
    teacher: LoraAdapter,
    students: Sequence[CompactAdapter],
    batches: Iterable[Batch],
    progress: Callable[[int], None] = lambda tokens: None,
) -> Measured:
    """Run teacher, students and base over `batches`. Adapters that are active on the model stay so, as a part of the
    base, and so do heads that teacher and student carry (`zero_point`); the model is left as it was. Raises E-DATA for
    a model that gives neither logits nor hidden states, E-ATTACH, E-BASE."""
    device = next(iter(model.parameters())).device
    named = {f"student_{n}": student for n, student in enumerate(students)}
    zero_of_each = [zero_point.without_updates(teacher, student) for student in students]
    zeros = {extras: f"{_ZERO}_{n}" for n, extras in enumerate(dict.fromkeys(zero.extras for zero in zero_of_each))}
    bases = {name: replace(teacher, targets=(), extras=extras) for extras, name in zeros.items()}
    before = attach.active(model)
    with evaluating(model), attach.temporarily(model, {_TEACHER: teacher, **named, **bases}), torch.no_grad():
        targets = _target_inputs(model, teacher, named)
        are_classes = kind_of(model) == "encoder"
        sums = {name: AnswerSums(are_classes=are_classes) for name in (_TEACHER, *named, *bases)}
        for batch in batches:
            moved = on_device(batch, device)
            attach.set_active(model, (*before, _TEACHER))
            with _watching(targets, masks_of(model, moved)):
                goal = _outputs(model, moved)
            for name, total in sums.items():
                attach.set_active(model, (*before, name))
                total.add(goal, goal if name == _TEACHER else _outputs(model, moved))
            progress(token_count(batch))
    if not all(total.items for total in sums.values()):
        raise DataError("there is no output to compare", fix="is the data empty?")
    errors = {target.which: target.errors() for target in targets}
    by_student = tuple({which: pairs[n] for which, pairs in errors.items()} for n in range(len(students)))
    answers = [
        sums[name].answers(sums[zeros[zero.extras]], sums[_TEACHER])
        for name, zero in zip(named, zero_of_each, strict=True)
    ]
    warnings = (zero_point.differences(teacher, student) for student in students)
    return Measured(tuple(answers), by_student, tuple(warnings))


def _outputs(model: nn.Module, batch: Batch) -> Outputs:
    counted = _answered(model, batch)
    # A model's own loss is not needed; an encoder-decoder reads what it is to write from its labels.
    reads_labels = is_encoder_decoder(model)
    given = batch if reads_labels else {name: value for name, value in batch.items() if name != "labels"}
    value, are_logits = answer_of(model(**given))
    mask = batch.get("attention_mask")
    if reads_labels and batch.get("labels") is not None:
        mask = batch["labels"] != IGNORED
    counts = mask if counted is None else counted
    rows = masked_rows(value, (counts,))
    labels = _right_answers(model, batch, value, counts) if are_logits else None
    return Outputs(rows, are_logits, texts=_texts_of(value, counts), labels=labels)


def _right_answers(model: nn.Module, batch: Batch, value: Tensor, counts: Any) -> Tensor | None:
    """The right answer of each row of `masked_rows` (items,), IGNORED where there is none: the next token of a decoder,
    what an encoder-decoder is to write, the class of a text or a token; None where the batch has none that fit."""
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if kind_of(model) == "decoder":
        source = ids if labels is None or ids is None or labels.shape != ids.shape else labels
        mask = batch.get("attention_mask")
        if source is None or source.shape != value.shape[:-1]:
            return None
        following = torch.full_like(source, IGNORED)
        following[:, :-1] = source[:, 1:]
        if mask is not None:
            following[:, :-1][~mask[:, 1:].bool()] = IGNORED
        labels = following
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != value.shape[:-1]:
        return None
    return masked_rows(labels[..., None], (counts,)).flatten()


def _texts_of(value: Tensor, mask: Any) -> Tensor:
    """The number in its batch of the text that each row of `masked_rows` is of: `value` is (texts, ..., n)."""
    numbers = torch.arange(len(value), device=value.device)
    return masked_rows(numbers.reshape(-1, *[1] * (value.dim() - 1)).expand(*value.shape[:-1], 1), (mask,)).flatten()


def _answered(model: nn.Module, batch: Batch) -> Tensor | None:
    """The places of a decoder whose next token counts, (batch, length), as `refine` has them; None if its labels leave
    out no real token, or there are none."""
    labels, ids, mask = (batch.get(name) for name in ("labels", "input_ids", "attention_mask"))
    if labels is None or ids is None or labels.shape != ids.shape or kind_of(model) != "decoder":
        return None
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if not bool((real & (labels == IGNORED)).any()):
        return None
    counted = torch.zeros_like(real)
    counted[:, :-1] = (labels[:, 1:] != IGNORED) & real[:, 1:]
    return counted


# --- layers ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _TargetInput:
    """A target, by its number: the layer it is on, the rows of all A that see its input (k, in), and the B that go with
    them: ``left[0] @ gram @ left[0].T`` is the teacher's output, ``left[n]`` the error of student n - 1, each (out, k).
    Students without factors have an entry in `updates` instead, and the sum of their squared errors in `squares`."""

    which: int
    layer: AdaptedLayer
    rows: Tensor
    left: list[F64]
    gram: F64
    updates: dict[int, Update]
    squares: dict[int, float]
    count: int = 0

    def add(self, x: Tensor) -> None:
        """Count x (tokens, in), or the tokens of an embedding, whose inputs are unit vectors."""
        z = self._through(x, self.rows).double()
        self.gram += (z.T @ z).cpu().numpy()
        self.count += len(z)
        for n, update in self.updates.items():
            own = torch.from_numpy(self.left[0]).to(z) @ self.rows.double()
            error = dense_update(update, dense_weight(self.layer.base_layer)).double() - own
            self.squares[n] += float(self._through(x, error.float()).double().square().sum())

    def _through(self, x: Tensor, rows: Tensor) -> Tensor:
        return rows.T[x] if isinstance(self.layer.base_layer, nn.Embedding) else x.float() @ rows.T

    def errors(self) -> list[tuple[float, float]]:
        """The mean squared error of each student, and the mean square of the teacher's output."""
        count = max(1, self.count)
        gram = self.gram / count
        energy = _size(self.left[0], gram)
        return [
            (self.squares[n] / count if n in self.squares else _size(left, gram), energy)
            for n, left in enumerate(self.left[1:])
        ]


def _target_inputs(
    model: nn.Module, teacher: LoraAdapter, students: Mapping[str, CompactAdapter]
) -> list[_TargetInput]:
    """The targets that are layers of their own (experts are not); `students` by the names they are attached under."""
    layers = attach.layers_of(model, _TEACHER)
    device = next(iter(model.parameters())).device
    dense = {n: name for n, (name, student) in enumerate(students.items()) if methods.needs_base(student)}
    factors = [
        {} if n in dense else {target_key(t): (a, b) for t, a, b in methods.expand_all(student)}
        for n, student in enumerate(students.values())
    ]
    targets = []
    for n, layer in sorted(layers.items()):
        pair = teacher.targets[n]
        key = target_key(pair.target)
        pairs = [table.get(key) for table in factors]
        stacked: list[Array] = [pair.A, *(ab[0] for ab in pairs if ab is not None)]
        rows = torch.from_numpy(np.concatenate(stacked).astype(np.float32)).to(device)
        own = _spread(pair.scale * pair.B.astype(np.float64), 0, len(rows))
        left, at = [own], pair.rank
        for ab in pairs:
            left.append(own if ab is None else own - _spread(ab[1].astype(np.float64), at, len(rows)))
            at += 0 if ab is None else ab[0].shape[0]
        updates = {
            m: update
            for m, name in dense.items()
            for update in layer.updates
            if update.name == name and target_key(update.target) == key
        }
        gram = np.zeros((len(rows), len(rows)))
        targets.append(_TargetInput(n, layer, rows, left, gram, updates, dict.fromkeys(updates, 0.0)))
    return targets


@contextmanager
def _watching(targets: Iterable[_TargetInput], masks: Iterable[Tensor]) -> Iterator[None]:
    """While the context lasts, what flows into the targets is counted."""
    with ExitStack() as stack:
        for target in targets:

            def count(module: Any, arguments: Any, named: Any, target: _TargetInput = target) -> None:
                target.add(rows_of(target.layer.base_layer, first_input(arguments, named), masks))

            stack.callback(target.layer.register_forward_pre_hook(count, with_kwargs=True).remove)
        yield


def _spread(b: F64, at: int, width: int) -> F64:
    """b (out, r) as columns `at` and after of (out, width)."""
    spread = np.zeros((b.shape[0], width))
    spread[:, at : at + b.shape[1]] = b
    return spread


def _size(left: F64, gram: F64) -> float:
    """tr(left @ gram @ left^T), not negative."""
    return max(0.0, float(((left.T @ left) * gram).sum()))
