"""Confirm from the files alone that a model is the merge of a base and adapters: every value is computed again.

Rounding is part of the format (``formats/merge-v1.md``), so confirming is comparing bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from lrconvert.core.dtypes import STORAGE, Array
from lrconvert.core.errors import LrcError
from lrconvert.core.limits import MAX_INDEX_BYTES
from lrconvert.io.checkpoint import Checkpoint, open_checkpoint
from lrconvert.io.container import TensorInfo, read_small
from lrconvert.io.pipeline import is_pipeline
from lrconvert.merge import pipeline
from lrconvert.merge.arithmetic.rounding import bits
from lrconvert.merge.compute import Computer, read_rows, workspace_for
from lrconvert.merge.hashing import CHUNK, chunks
from lrconvert.merge.plan import load_check
from lrconvert.merge.plan.plan import Output, Plan, named, plan
from lrconvert.merge.plan.updates import Adapter, Scaled
from lrconvert.merge.quantized_base import open_base
from lrconvert.merge.report import Difference, VerifyReport
from lrconvert.merge.undo.open_record import RECORD_NAME, latest, numbered
from lrconvert.merge.undo.record import parse


def verify(
    merged: Path,
    base: Path,
    adapters: Sequence[Adapter | Scaled],
    *,
    dequantize: bool = False,
    component: str = "",
    progress: Callable[[float, str], None] | None = None,
) -> VerifyReport:
    """Compare the tensors and the configuration of `merged` with what merging `adapters` into `base` gives, however
    either is cut into files; `dequantize` and `component` as for `merge`. Reads all of both; writes nothing. Raises
    what a merge raises before it writes.
    """
    inputs = [item if isinstance(item, Scaled) else Scaled(item) for item in adapters]
    if is_pipeline(base):

        def one(model: Path, of: Path, is_merged: bool) -> VerifyReport:
            return _verify_model(model, of, inputs if is_merged else [], dequantize, progress)

        return pipeline.verify(merged, base, inputs, component, one)
    return _verify_model(merged, base, inputs, dequantize, progress)


def _verify_model(
    merged: Path,
    base: Path,
    inputs: Sequence[Scaled],
    dequantize: bool,
    progress: Callable[[float, str], None] | None,
) -> VerifyReport:
    """Verify one model folder."""
    with (
        ExitStack() as stack,
        open_checkpoint(merged, quantized=True) as model,
        open_base(base, dequantize=dequantize) as checkpoint,
    ):
        planned = plan(inputs, checkpoint)
        computer = Computer(planned, stack.enter_context(workspace_for("verify", planned)), measure=False)
        differences = list(_structure(planned, model))
        if differences:  # what is as planned loads as planned
            differences += _loading(planned, model)
        outputs = list(planned.outputs)
        total, done, recomputed = max(1, sum(o.nbytes for o in outputs)), 0, 0
        for output in outputs:
            info = model.tensors.get(output.name)
            if info is not None and (info.dtype, info.shape) == (output.dtype, output.shape):
                pairs = _pairs(computer, output, model, info)
                elements = sum(int(np.count_nonzero(bits(merged) != bits(stored))) for merged, stored in pairs)
                if elements:
                    what = f"{elements} of {int(np.prod(output.shape))} elements differ"
                    differences.append(Difference(output.name, what, elements))
            recomputed += output.is_touched
            done += output.nbytes
            if progress is not None:
                progress(done / total, output.name)
        for file in (*checkpoint.files, *model.files):
            file.check_unchanged()
    warnings = tuple(w for item in inputs for w in getattr(item.adapter, "warnings", ()))
    hint = _hint(merged, base, inputs) if differences else ""
    return VerifyReport(len(outputs), recomputed, total, tuple(differences), warnings, hint)


def _hint(merged: Path, base: Path, inputs: Sequence[Scaled]) -> str:
    """Return what the record in `merged` says that was merged, if that is not what was given; "" without a record."""
    try:
        if not numbered(merged):
            wrong_way = bool(numbered(base))
            return "the base has the record of a merge, and the model has none: exchange them" if wrong_way else ""
        recorded = parse(read_small(latest(merged) / RECORD_NAME, MAX_INDEX_BYTES)).adapters
    except (LrcError, OSError):  # a hint is no part of the answer
        return ""
    made = [(entry.source, entry.scale) for entry in recorded]
    if made == [(item.adapter.provenance.source, item.scale) for item in inputs]:
        return ""
    named = ", ".join(f"{entry.name or 'an adapter'} at scale {entry.scale:g}" for entry in recorded)
    same = [source for source, _ in made] == [item.adapter.provenance.source for item in inputs]
    given = f", not at {', '.join(f'{item.scale:g}' for item in inputs)}" if same else ", not of what was given"
    return f"its record says that it is the merge of {named}{given}"


def _structure(planned: Plan, model: Checkpoint) -> Iterator[Difference]:
    """Return tensors and fields of the configuration that differ between the plan and the model."""
    expected = {o.name: (o.dtype, o.shape) for o in planned.outputs}
    for name, (dtype, shape) in expected.items():
        info = model.tensors.get(name)
        if info is None:
            yield Difference(name, "is missing")
        elif (info.dtype, info.shape) != (dtype, shape):
            yield Difference(name, f"is {info.dtype} {list(info.shape)}, not {dtype} {list(shape)}")
    for name in sorted(set(model.tensors) - set(expected)):
        yield Difference(name, "is not a tensor of the merge")
    config = {**planned.checkpoint.config, **planned.placement.config}
    config = {key: value for key, value in config.items() if value is not None or key in model.config}
    for key in sorted(set(config) | set(model.config)):
        if config.get(key) != model.config.get(key):
            yield Difference(f"config.json: {key}", f"is {model.config.get(key)!r:.60}, not {config.get(key)!r:.60}")


def _loading(planned: Plan, model: Checkpoint) -> list[Difference]:
    """Return what keeps the model from loading as the base does."""
    origins = {each.name: each.base for each in map(named, planned.outputs)}
    tensors = [load_check.Named(name, info.shape, origins.get(name, "")) for name, info in model.tensors.items()]
    found = load_check.problems(tensors, planned.checkpoint, model.config) or ()
    return [Difference("loading", text) for text in found]


def _pairs(computer: Computer, output: Output, model: Checkpoint, info: TensorInfo) -> Iterator[tuple[Array, Array]]:
    """Return (what a merge gives, what the model has), piece by piece."""
    if output.is_touched:
        for block in computer.blocks(output):
            count, cols = block.after.shape
            yield block.after, read_rows(model, info, block.first, count, cols, computer.workspace.pool)
        return
    kind = STORAGE[output.dtype]
    if output.data is not None:
        expected = memoryview(output.data)
        for n, present in enumerate(chunks(model, info)):
            start = n * CHUNK
            yield np.frombuffer(expected[start : start + len(present)], kind), np.frombuffer(present, kind)
    else:
        assert output.source is not None
        for one, other in zip(chunks(computer.plan.checkpoint, output.source), chunks(model, info), strict=True):
            yield np.frombuffer(one, kind), np.frombuffer(other, kind)
