"""The fidelity of a conversion in numbers: captured energy per target, bytes, answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import BaseError, OptionError
from lrconvert.core.notebook import html_table
from lrconvert.core.wording import spelled, verb
from lrconvert.formats.lrc import file
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.lora import svd
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, LoraTarget, Target
from lrconvert.lora.base_weights import BaseWeights
from lrconvert.lora.input_statistics import InputStatistics, Moment
from lrconvert.methods import base as methods

FEWEST = 20  # texts: a bootstrap over fewer says little
_LITTLE = 0.5  # of the energy: less is no working copy of a LoRA, unless it is trained


@dataclass(frozen=True)
class TargetFidelity:
    """One target: ranks before and after, ||delta||^2, ||delta - delta_hat||^2, and the share of energy captured. The
    same of the outputs under input statistics (`output`) and on data (`data`): E||delta x||^2 and so on; and in the
    metric of the fits (`fit`). `is_dropped`: the LoRA changes this target, and nothing of that is kept.

    Of an update that is zero there is no share to keep: it is None."""

    name: str
    rank_before: int
    rank_after: int
    energy: float
    error: float
    output_energy: float | None = None
    output_error: float | None = None
    fit_energy: float | None = None
    fit_error: float | None = None
    data_energy: float | None = None
    data_error: float | None = None
    is_dropped: bool = False

    @property
    def captured(self) -> float | None:
        return 0.0 if self.is_dropped else _total([(self.error, self.energy)])

    @property
    def output_captured(self) -> float | None:
        return _total([(self.output_error, self.output_energy)])

    @property
    def data_captured(self) -> float | None:
        return _total([(self.data_error, self.data_energy)])


def _total(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    """The share captured of all (error, energy) that were measured; None if none was, or all are zero."""
    measured = [(error, energy) for error, energy in pairs if error is not None and energy is not None]
    error, energy = (sum(values) for values in zip(*measured, strict=True)) if measured else (0.0, 0.0)
    if not energy:
        return None if not error else -math.inf
    return 1.0 - error / energy


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval, from paired bootstrap samples of texts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """A score of base, LoRA and file on the same texts, and the file's less the LoRA's."""

    base: Interval
    lora: Interval
    file: Interval
    change: Interval


@dataclass(frozen=True)
class Answers:
    """The distance of a model's answers from those of the LoRA, on data. `kind`: "KL" of the logits in nats per item,
    or the relative squared error of "hidden states" where a model has no logits. `agreement`: the share of items with
    the same first choice. `base_...`: the same of the base without updates; heads that both carry stay on it.
    `interval`: the 95 % interval of `closed`, and `intervals` those of the other measures by their names, where enough
    texts were measured to say. `loss` (nats) where places have right answers, `accuracy` where these are classes.
    """

    kind: str
    items: int
    distance: float
    base_distance: float
    agreement: float | None = None
    base_agreement: float | None = None
    interval: tuple[float, float] | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    loss: Scores | None = None
    accuracy: Scores | None = None

    @property
    def closed(self) -> float:
        """The share of the distance between base and LoRA that is gone; 0 where there is none."""
        return _total([(self.distance, self.base_distance)]) or 0.0


@dataclass(frozen=True)
class Fidelity:
    """The share of a LoRA that a compact adapter keeps, in the Frobenius norm of the weight update.

    `source_bytes`: the LoRA's factors at 16 bit. `adapter_bytes`: the file without extra tensors; `total_bytes` with.
    `is_refined`: the file was trained after its fit. `warnings` are one-line texts.
    """

    targets: tuple[TargetFidelity, ...]
    method: str
    source_bytes: int
    payload_bytes: int
    overhead_bytes: int
    extras_bytes: int
    answers: Answers | None = None
    warnings: tuple[str, ...] = ()
    is_refined: bool = False

    def __repr__(self) -> str:
        return f"<Fidelity: {self.method}, captured {self.captured:.4f}, {self.adapter_bytes:,} bytes>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return Comparison([self])._repr_html_()

    @property
    def captured(self) -> float:
        """1 - sum of squared errors / sum of squared norms, over all targets; 0 of a LoRA that changes nothing."""
        return _total([(t.error, t.energy) for t in self.targets]) or 0.0

    @property
    def dropped(self) -> tuple[str, ...]:
        """The targets of the LoRA of which nothing is kept."""
        return tuple(t.name for t in self.targets if t.is_dropped)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what a user should know of the loss, one line each: targets that were dropped, and what it means that
        little is kept of a file that was not refined."""
        lines = [dropped_note(self.dropped, len(self.targets))] if self.dropped else []
        if not any(t.energy or t.is_dropped for t in self.targets):
            return (*lines, "the LoRA's update is zero: there is nothing to keep, and the file changes no answer")
        kept = self.captured if self.output_captured is None else self.output_captured
        if kept < _LITTLE and self.answers is None and not self.is_refined:
            what = "update's" if self.output_captured is None else "outputs'"
            lines.append(
                f"only {max(kept, 0):.1%} of the {what} energy is kept: as it is the model may answer more like the "
                f"base than with the LoRA; train the file with {verb('refine')}, ask for more bytes, or take "
                f"another form ({verb('compress')} tries all)"
            )
        return tuple(lines)

    @property
    def output_captured(self) -> float | None:
        """The same of the outputs, under the input statistics; None without them."""
        return _total([(t.output_error, t.output_energy) for t in self.targets])

    @property
    def fit_captured(self) -> float | None:
        """The same in the metric of the fits, `svd.fit_metric`; None without statistics."""
        return _total([(t.fit_error, t.fit_energy) for t in self.targets])

    @property
    def data_captured(self) -> float | None:
        """The same of the outputs on data; None without. Experts, and all else that is no layer, are not in it."""
        return _total([(t.data_error, t.data_energy) for t in self.targets])

    @property
    def adapter_bytes(self) -> int:
        return self.payload_bytes + self.overhead_bytes

    @property
    def total_bytes(self) -> int:
        return self.adapter_bytes + self.extras_bytes

    @property
    def ratio(self) -> float:
        """Source factors at 16 bit over our bytes, extras counted on neither side."""
        return self.source_bytes / self.adapter_bytes


class Comparison(list[Fidelity]):
    """The rows of a comparison, one for each file: a list that a notebook shows as a table."""

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        has_answers = any(row.answers is not None for row in self)
        head = ["form", "bytes", "times smaller", "captured", "modules dropped"]
        rows = []
        for row in self:
            cells = [row.method, f"{row.adapter_bytes:,}", f"{row.source_bytes / max(1, row.adapter_bytes):.1f}"]
            cells += [f"{row.captured:.4f}", str(len(row.dropped))]
            if has_answers:
                answers = row.answers
                agreement = answers.agreement if answers is not None else None
                cells += ["" if answers is None else f"{answers.distance:.4g}"]
                cells += ["" if answers is None else f"{answers.closed:.1%}"]
                cells += ["" if agreement is None else f"{agreement:.1%}"]
            rows.append(cells)
        if has_answers:
            head += ["distance from the LoRA", "closed", "agreement"]
        notes = dict.fromkeys(f"{row.method}: {note}" for row in self for note in (*row.notes, *row.warnings))
        return html_table("Comparison with the LoRA", head, rows, notes)


def dropped_note(names: Sequence[str], count: int) -> str:
    """Return the line that says which of `count` modules are not in a file."""
    return f"{len(names)} of {count} modules are dropped, nothing of them is kept: {names[0]}, for one"


def target_key(target: Target) -> tuple[str, str]:
    """Return the key of a target in both adapters: a base may have corrected the view, names keep their order."""
    kind = target.view.text if target.view.kind not in ("matrix", "transposed") else ""
    return target.name, kind


def fidelity(
    lora: LoraAdapter,
    compact: CompactAdapter,
    statistics: InputStatistics | None = None,
    base: BaseWeights | None = None,
) -> Fidelity:
    """Measure `compact` against the LoRA it came from. Raises E-BASE if their targets differ, E-STATS.

    Targets of the LoRA that the compact adapter lacks (an `--exclude`) count as lost. The weights of the `base` are
    read where updates depend on them; without them E-OPTION, with others than the adapter's E-FPR.
    """
    pairs = {target_key(pair.target): pair for pair in lora.targets}
    for target in compact.targets:
        if target_key(target) not in pairs:
            raise BaseError(f"the target {target.name!r} is not one of the source's", fix="is this its source?")
    rows: dict[tuple[str, str], TargetFidelity] = {}
    if methods.needs_base(compact):
        if base is None:
            what = "what the adapter keeps depends on the base's weights"
            raise OptionError(what, fix=f"give the folder of the base with {spelled('base', ...)}")
        for target, rank, updates in methods.updates_on(compact, base):
            key = target_key(target)
            rows[key] = _dense_fidelity(pairs[key], rank, updates, statistics)
    else:
        for target, a, b in methods.expand_all(compact):  # one at a time: some forms expand to many times their size
            rows[target_key(target)] = _target_fidelity(pairs[target_key(target)], (a, b), statistics)
    every = tuple(rows.get(key) or _target_fidelity(pair, None, statistics) for key, pair in pairs.items())
    size = file.sizes(compact)
    fields = compact.provenance.fields
    refined = fields.get("refined_steps", "0") != "0" or fields.get("refined_layerwise") == "yes"
    return Fidelity(
        every, methods.form(compact)[0], lora.half_bytes, size.payload, size.overhead, size.extras, is_refined=refined
    )


def fidelity_on(
    lora: LoraAdapter, compact: CompactAdapter, statistics: InputStatistics | None, base: Path | None
) -> Fidelity:
    """Measure the same with the folder of the base, which is opened where it is needed."""
    if base is None or not methods.needs_base(compact):
        return fidelity(lora, compact, statistics)
    with open_checkpoint(base, quantized=True) as checkpoint:
        return fidelity(lora, compact, statistics, BaseWeights(compact, checkpoint, checkpoint.content_digest()))


def _target_fidelity(
    pair: LoraTarget, ours: tuple[Any, Any] | None, statistics: InputStatistics | None
) -> TargetFidelity:
    out, inner = pair.target.matrix_shape
    a, b = ours if ours is not None else (np.zeros((0, inner)), np.zeros((out, 0)))
    if a.shape[1] != inner or b.shape[0] != out:
        raise BaseError(f"the target {pair.target.name!r} has other shapes in the two adapters")
    error, energy = svd.distance(pair, a, b)
    whole = 1 + pair.lost / energy if energy else 1.0  # times the energy: that of an update of another kind
    rest = whole - 1
    dropped = _is_zero(a, b) and not (pair.scale == 0 or _is_zero(pair.A, pair.B))
    row = TargetFidelity(
        pair.target.name, pair.rank, a.shape[0], energy + pair.lost, error + pair.lost, is_dropped=dropped
    )
    if statistics is None:
        return row
    moment = statistics.of(pair.target)
    fit_error, fit_energy = svd.distance(pair, a, b, svd.fit_metric(pair, moment))
    row = replace(row, fit_energy=fit_energy * whole, fit_error=fit_error + fit_energy * rest)
    if moment is None:
        return row
    error, energy = svd.distance(pair, a, b, moment)
    return replace(row, output_energy=energy * whole, output_error=error + energy * rest)


def _is_zero(a: Array, b: Array) -> bool:
    """Return whether no number of B @ A can be other than zero: every component has a zero factor."""
    return not (np.any(a, axis=1) & np.any(b, axis=0)).any()


def _dense_fidelity(
    pair: LoraTarget, rank: int, updates: Iterator[tuple[int, Array]], statistics: InputStatistics | None
) -> TargetFidelity:
    """The same of an update that comes as rows (first, (n, in)); the energies are those of the factors."""
    nothing = _target_fidelity(pair, None, statistics)
    if not rank:
        return nothing
    left, right = pair.scale * pair.B.astype(np.float64), pair.A.astype(np.float64)
    metrics: dict[str, Moment | None] = {"error": None}
    if statistics is not None:
        moment = statistics.of(pair.target)
        metrics["fit_error"] = svd.fit_metric(pair, moment)
        if moment is not None:
            metrics["output_error"] = moment
    share, is_dropped = pair.lost / nothing.energy if nothing.energy else 0.0, nothing.is_dropped
    errors = {name: share * getattr(nothing, name.replace("error", "energy")) for name in metrics}
    for top, update in updates:
        is_dropped = is_dropped and not update.any()
        error = update - left[top : top + len(update)] @ right
        for name, metric in metrics.items():
            errors[name] += float(np.vdot(error if metric is None else metric.times(error), error))
    changes: dict[str, Any] = {"rank_after": rank, "is_dropped": is_dropped, **errors}
    return replace(nothing, **changes)
