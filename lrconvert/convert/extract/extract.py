"""From a fine-tuned model and its base to a LoRA, tensor by tensor; the error of what is kept is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lrconvert.convert.convert import Conversion
from lrconvert.convert.extract import matching
from lrconvert.convert.extract.difference import Difference, Measures
from lrconvert.convert.extract.factors import Cut, best_cut, ranks
from lrconvert.convert.extract.matching import Matched, Matching
from lrconvert.convert.extract.options import DEFAULT_RANK, ExtractOptions
from lrconvert.core.dtypes import FLOATS, Array, Stored, itemsize, round_to
from lrconvert.core.errors import BaseError, EmptyAdapterError, NoEffectError
from lrconvert.core.wording import spelled
from lrconvert.formats import base_class
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.io.container import TensorInfo, combined_digest, tensor_digest
from lrconvert.lora import base_names
from lrconvert.lora.adapter import CompactAdapter, ExtraTensor, LoraAdapter, LoraTarget, Provenance, Target
from lrconvert.methods import base as methods

Progress = Callable[[float, str], None]
Finish = Callable[[LoraAdapter], Conversion]
_MEASURED = 0.85  # of the progress of an extraction: behind when all differences are cut
_MARGIN = 1.1  # over the largest singular value that random numbers have on average
_NEW_BYTES = 1 << 28  # of tensors that the base does not have
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


@dataclass(frozen=True)
class ExtractedTarget:
    """A module of an extraction. `energy` is that of its difference D = W - W0, `error` that of D - B @ A with the
    factors as they are stored; `rounding` about what of `energy` is rounding alone, and `above` how many of its
    components, the kept ones and some more, are larger than rounding makes any."""

    target: Target
    rank: int
    energy: float
    error: float
    rounding: float
    above: int

    @property
    def relative_error(self) -> float:
        """||D - B @ A|| / ||D||, in the Frobenius norm."""
        return math.sqrt(self.error / self.energy) if self.energy else 0.0


@dataclass(frozen=True)
class Extraction:
    """A fine-tuned model minus its base. `lora` is None after a dry run, which reads headers only: ranks and
    `factor_bytes` are the most that they can be then.

    With a `conversion` the errors are those of the compact form that was made of the LoRA, but for one whose updates
    depend on the base. `carried` are the tensors that go along as they are; `unchanged` counts tensors that equal the
    base's, `tied` those that repeat another one; `absent` are names that only the base has, `left_out` those that were
    not asked for or hold no real numbers.
    """

    lora: LoraAdapter | None
    targets: tuple[ExtractedTarget, ...]
    carried: tuple[ExtraTensor, ...]
    unchanged: int
    tied: tuple[str, ...]
    absent: tuple[str, ...]
    left_out: tuple[str, ...]
    read_bytes: int
    factor_bytes: int
    warnings: tuple[str, ...] = ()
    conversion: Conversion | None = None

    @property
    def compact(self) -> CompactAdapter | None:
        """The compact form, if one was asked for."""
        return None if self.conversion is None else self.conversion.compact

    def __repr__(self) -> str:
        kept = "" if self.lora is None else f", captured {self.captured:.4f}"
        return f"<Extraction: {len(self.targets)} targets, {self.factor_bytes:,} bytes of factors{kept}>"

    @property
    def energy(self) -> float:
        return math.fsum(t.energy for t in self.targets)

    @property
    def captured(self) -> float:
        """1 - squared error / squared norm of the differences, over all modules."""
        return 1 - math.fsum(t.error for t in self.targets) / self.energy if self.energy else 1.0

    @property
    def relative_error(self) -> float:
        """||D - B @ A|| / ||D|| over all modules."""
        return math.sqrt(max(0.0, 1 - self.captured))

    @property
    def rounding(self) -> float:
        """About what share of the differences' energy is rounding alone."""
        return math.fsum(t.rounding for t in self.targets) / self.energy if self.energy else 0.0


@dataclass(eq=False)
class _Cut:
    """A target with its difference, and what was made of it."""

    target: Target
    difference: Difference
    measures: Measures
    cut: Cut

    @property
    def above(self) -> int:
        """Components above the largest singular value of random numbers of the rounding's size."""
        rows, columns = self.difference.shape
        size = math.sqrt(self.measures.rounding / (rows * columns))
        edge = _MARGIN * size * (math.sqrt(rows) + math.sqrt(columns))
        return int(np.count_nonzero(self.cut.spectrum > edge))


def extract(
    tuned: Checkpoint,
    base: Checkpoint,
    options: ExtractOptions,
    name: str,
    progress: Progress,
    *,
    dry_run: bool,
    finish: Finish | None = None,
) -> Extraction:
    """Return `tuned` minus `base`, which `name` names, as a LoRA, and what `finish` makes of that; see
    `lrconvert.api.extract`."""
    matched = matching.match(tuned, base, base_names.name_filter(options.include, options.exclude))
    _check_vocabulary(matched, options, tuned)
    if dry_run:
        return _planned(matched, tuned, base, options)
    cuts: list[_Cut] = []
    carried: list[ExtraTensor] = [_whole(tuned, info, info.name) for info in _new(matched, tuned)]
    unchanged = 0
    sizes = [math.prod(pair.tuned.shape) for pair in matched.pairs]
    done, total = 0, max(1, sum(sizes))
    for pair, size in zip(matched.pairs, sizes, strict=True):
        made, extras = _compared(pair, tuned, base, options)
        cuts += made
        carried += extras
        unchanged += not made and not extras
        done += size
        progress(_MEASURED * done / total, pair.name)
    _check_effect(cuts, carried, matched, tuned)
    kept = ranks([one.cut for one in cuts], math.fsum(one.measures.energy for one in cuts), options)
    pairs = [_pair(one, rank, options) for one, rank in zip(cuts, kept, strict=True) if rank]
    lora = LoraAdapter(
        tuple(sorted(pairs, key=lambda pair: pair.target)),
        tuple(carried),
        _provenance(pairs, tuned, name),
        tuple(_warnings(cuts, matched, tuned, base)),
    )
    lora = base_class.noted(lora, base.config, base.tensors.keys())
    conversion = None if finish is None else finish(lora)
    errors = measured(
        _factors(lora, conversion),
        {(one.target.name, one.target.view.text): one.difference for one in cuts},
        lambda share, text: progress(_MEASURED + (1 - _MEASURED) * share, text),
    )
    rows = [_row(one, rank, errors) for one, rank in zip(cuts, kept, strict=True)]
    nbytes = sum(pair.a.nbytes + pair.b.nbytes for pair in pairs)
    return replace(_extraction(matched, lora, rows, carried, unchanged, nbytes), conversion=conversion)


def _factors(lora: LoraAdapter, conversion: Conversion | None) -> Iterator[tuple[Target, Array, Array]]:
    """The factors of what was made: of a form whose updates depend on the base those of the LoRA."""
    if conversion is None or methods.needs_base(conversion.compact):
        return ((pair.target, pair.A, pair.B) for pair in lora.targets)
    return methods.expand_all(conversion.compact)


def measured(
    factors: Iterable[tuple[Target, Array, Array]],
    differences: Mapping[tuple[str, str], Difference],
    progress: Progress,
) -> dict[tuple[str, str], float]:
    """Return ||D - B @ A||^2 of every target of which there are `factors` (target, A, B), by name and view: of the
    differences themselves, which are read for that."""
    errors: dict[tuple[str, str], float] = {}
    for target, a, b in factors:
        key = (target.name, target.view.text)
        left, right = (a.T, b.T) if target.view.kind in ("transposed", "expert_transposed") else (b, a)
        errors[key] = differences[key].residual(left, right)[0]
        progress(len(errors) / len(differences), target.name)
    return errors


# --- one tensor -----------------------------------------------------------------------------------------------------


def _compared(
    pair: Matched, tuned: Checkpoint, base: Checkpoint, options: ExtractOptions
) -> tuple[list[_Cut], list[ExtraTensor]]:
    """Return the cuts of what changed in a tensor, or what is carried of it; nothing of both if it is the base's."""
    places = () if pair.is_resized else matching.targets(pair.name, pair.base.shape, base)
    if not places:
        changed = pair.is_resized or _difference(pair, tuned, base).measure().moved
        return [], [_whole(tuned, pair.tuned, pair.name)] if changed else []
    cuts = []
    for target in places:
        difference = _difference(pair, tuned, base, target)
        measures = difference.measure()
        if not measures.moved:
            continue
        rank = options.most or DEFAULT_RANK
        if matching.is_embedding(pair.name) and len(measures.rows) * difference.shape[1] <= rank * sum(
            difference.shape
        ):
            return [], list(_trained_rows(pair, tuned, measures.rows))
        cut = best_cut(difference, f"{target.name}/{target.view.text}", measures.energy, options)
        difference.release()
        cuts.append(_Cut(target, difference, measures, cut))
    return cuts, []


def _difference(pair: Matched, tuned: Checkpoint, base: Checkpoint, target: Target | None = None) -> Difference:
    """The difference of a target, or without one of a tensor that is no matrix, in its rows."""
    shape, first = pair.base.shape, 0
    if target is not None and target.view.kind.startswith("expert"):
        first = int(target.view.text.partition(":")[2]) * shape[1] * shape[2]
        shape = shape[1:]
    seen = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    return Difference((tuned, pair.tuned), (base, pair.base), first, seen)


def _whole(tuned: Checkpoint, info: TensorInfo, name: str) -> ExtraTensor:
    return ExtraTensor(name, info.dtype, info.shape, bytes(tuned.read(info)))


def _trained_rows(pair: Matched, tuned: Checkpoint, rows: tuple[int, ...]) -> Iterator[ExtraTensor]:
    """Yield the rows of an embedding that differ, as they are: trained tokens."""
    info, width = pair.tuned, pair.tuned.nbytes // pair.tuned.shape[0]
    data = b"".join(tuned.read(info, row * width, width) for row in rows)
    yield ExtraTensor(pair.name, info.dtype, (len(rows), *info.shape[1:]), data, "rows")
    yield ExtraTensor(pair.name, "I64", (len(rows),), np.array(rows, "<i8").tobytes(), "row_indices")


def _pair(one: _Cut, rank: int, options: ExtractOptions) -> LoraTarget:
    left, right = one.cut.left[:, :rank], one.cut.right[:rank]
    if one.target.view.kind in ("transposed", "expert_transposed"):
        left, right = right.T, left.T
    a, b = (Stored(options.dtype, round_to(np.ascontiguousarray(x), options.dtype)) for x in (right, left))
    return LoraTarget(one.target, a, b, 1.0)


def _row(one: _Cut, rank: int, errors: Mapping[tuple[str, str], float]) -> ExtractedTarget:
    measures = one.measures
    error = errors.get((one.target.name, one.target.view.text), measures.energy)
    return ExtractedTarget(one.target, rank, measures.energy, error, measures.rounding, one.above)


# --- all of them ----------------------------------------------------------------------------------------------------


def _check_vocabulary(matched: Matching, options: ExtractOptions, tuned: Checkpoint) -> None:
    """Raise E-BASE for tensors with other rows than the base's, unless they are to be carried whole."""
    resized = [pair for pair in matched.pairs if pair.is_resized]
    if not resized or options.vocabulary == "whole":
        return
    pair = resized[0]
    rows, nbytes = pair.tuned.shape[0], sum(other.tuned.nbytes for other in resized)
    what = f"{pair.name!r} has {rows:,} rows, and the base's {pair.base.shape[0]:,}"
    more = f", as {len(resized) - 1} more" if len(resized) > 1 else ""
    fix = (
        f"carry it whole with {spelled('vocabulary', 'whole')} ({nbytes:,} bytes in all), or give the base with "
        f"as many: model.resize_token_embeddings({rows}), saved"
    )
    raise BaseError(f"{what}{more}", fix=fix, path=tuned.root)


def _new(matched: Matching, tuned: Checkpoint) -> list[TensorInfo]:
    """Return the tensors of real numbers that the base does not have: heads. Raises E-BASE for much of them."""
    new = [info for info in matched.added if info.dtype in FLOATS]
    nbytes = sum(info.nbytes for info in new)
    if nbytes > _NEW_BYTES:
        what = f"{len(new)} tensors are not in the base ({nbytes:,} bytes), {new[0].name!r:.100} for one"
        fix = f"is this its base? {spelled('exclude', ...)} leaves them out"
        raise BaseError(what, fix=fix, path=tuned.root)
    return new


def _check_effect(cuts: list[_Cut], carried: list[ExtraTensor], matched: Matching, tuned: Checkpoint) -> None:
    """Raise E-NO-EFFECT if the models are equal, E-EMPTY if no matrix changed."""
    if not cuts and not carried:
        what = f"all of its {len(matched.pairs)} tensors equal the base's: there is nothing to extract"
        raise NoEffectError(what, fix="is this the model after training, with its adapter merged?", path=tuned.root)
    if not cuts:
        names = ", ".join(repr(extra.name) for extra in carried[:3])
        what = f"no matrix changed, only {names}{' and others' if len(carried) > 3 else ''}"
        raise EmptyAdapterError(what, fix="a LoRA needs a matrix; copy these tensors themselves", path=tuned.root)


def _planned(matched: Matching, tuned: Checkpoint, base: Checkpoint, options: ExtractOptions) -> Extraction:
    """The most that an extraction can hold, by headers."""
    rows, carried = [], [ExtraTensor(info.name, info.dtype, info.shape, b"") for info in _new(matched, tuned)]
    for pair in matched.pairs:
        places = () if pair.is_resized else matching.targets(pair.name, pair.base.shape, base)
        if not places:
            carried.append(ExtraTensor(pair.name, pair.tuned.dtype, pair.tuned.shape, b""))
        for target in places:
            shorter = min(target.matrix_shape)
            rows.append(ExtractedTarget(target, min(options.most or shorter, shorter), 0.0, 0.0, 0.0, 0))
    nbytes = sum(row.rank * sum(row.target.matrix_shape) for row in rows) * itemsize(options.dtype)
    if options.target_size is not None:
        nbytes = min(nbytes, options.target_size)
    warnings = tuple(_warnings([], matched, tuned, base))
    return replace(_extraction(matched, None, rows, carried, 0, nbytes), warnings=warnings)


def _extraction(
    matched: Matching,
    lora: LoraAdapter | None,
    rows: list[ExtractedTarget],
    carried: list[ExtraTensor],
    unchanged: int,
    nbytes: int,
) -> Extraction:
    return Extraction(
        lora,
        tuple(sorted(rows, key=lambda row: row.target)),
        tuple(carried),
        unchanged,
        matched.tied,
        matched.absent,
        matched.left_out,
        matched.nbytes,
        nbytes,
        () if lora is None else lora.warnings,
    )


def _provenance(pairs: list[LoraTarget], tuned: Checkpoint, name: str) -> Provenance:
    """The origin of the LoRA: its base, and the task of the fine-tuned model's class."""
    embeddings = [pair.target.name for pair in pairs if matching.is_embedding(pair.target.name)]
    named = tuned.config.get("architectures")
    title = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    fields = {"source_format": "extracted"}
    if embeddings:
        fields["embeddings"] = ",".join(sorted(text.removesuffix(".weight") for text in embeddings))
    digest = combined_digest(
        (text, tensor_digest(text, stored.dtype, stored.shape, [stored.array.tobytes()]))
        for pair in pairs
        for text, stored in (
            (f"{pair.target.name}/{pair.target.view.text}/{leaf}", value)
            for leaf, value in (("A", pair.a), ("B", pair.b))
        )
    )
    task = next((task for ending, task in _TASKS.items() if title.endswith(ending)), "")
    return Provenance(digest, name, "", task, fields)


def _warnings(cuts: list[_Cut], matched: Matching, tuned: Checkpoint, base: Checkpoint) -> Iterator[str]:
    """Yield what a user should know of the two models, a line each."""
    dtypes = sorted(
        {(pair.tuned.dtype, pair.base.dtype) for pair in matched.pairs if pair.tuned.dtype != pair.base.dtype}
    )
    if dtypes:
        one, other = dtypes[0]
        yield f"tensors are {one} in the fine-tuned model, {other} in the base: what that rounds is in the difference"
    if matched.absent:
        yield (
            f"{len(matched.absent)} tensors of the base are not in the fine-tuned model and stay as they are, "
            f"{matched.absent[0]!r:.100} for one"
        )
    gone = [info.name for info in matched.added if info.dtype not in FLOATS]
    if gone:
        yield f"{len(gone)} tensors that the base lacks hold no real numbers and are left out, {gone[0]!r:.100} for one"
    energy = math.fsum(one.measures.energy for one in cuts)
    rounding = math.fsum(one.measures.rounding for one in cuts)
    if energy and rounding > 0.5 * energy:
        names = ", ".join(sorted({pair.tuned.dtype for pair in matched.pairs}))
        yield (
            f"about {rounding / energy:.0%} of the difference is the rounding of the fine-tuned model to {names}, "
            "which no rank describes: extract from the model as it was before it was rounded, if there is one"
        )
