"""Stage one, layer by layer: each target matches the teacher's output on the teacher's own inputs.

For a layer that is all its second moments: with them every method's own fit, closed form or alternating, minimizes that
error, without a pass backward through the model.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from lrconvert.core.errors import BaseError, StatisticsError
from lrconvert.formats.fidelity import target_key
from lrconvert.formats.lrc import file
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.live import collect_statistics, statistics
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.lora.base_weights import BaseWeights
from lrconvert.lora.input_statistics import InputStatistics
from lrconvert.methods import base as methods
from lrconvert.methods.base import FitContext
from lrconvert.refine.evaluation import TEACHER
from lrconvert.refine.session import Progress, RefineSession
from lrconvert.refine.settings import Settings


def aligned(lora: LoraAdapter, compact: CompactAdapter) -> LoraAdapter:
    """Return the teacher with the targets of `compact`, in their order and with their views. Raises E-BASE."""
    pairs = {target_key(pair.target): pair for pair in lora.targets}
    ordered = []
    for target in compact.targets:
        pair = pairs.get(target_key(target))
        if pair is None or pair.target.matrix_shape != target.matrix_shape:
            raise BaseError(f"the target {target.name!r} is not one of the teacher's", fix="is this its teacher?")
        ordered.append(replace(pair, target=target))
    return replace(lora, targets=tuple(ordered))


def teacher_statistics(
    session: RefineSession, adapter: LoraAdapter | CompactAdapter, settings: Settings
) -> InputStatistics:
    """Return the statistics of the teacher's inputs to the layers of `adapter`, on a part of what is trained on."""
    teacher_model = session.teacher_model
    teacher_model.activate(TEACHER)
    batches = session.inputs(settings.seed, settings.batch_tokens)
    wanted = statistics.wanted(teacher_model.model, adapter)
    with teacher_model.computing():
        return collect_statistics.collect(teacher_model.model, batches, wanted=wanted)


def refitted(
    session: RefineSession, compact: CompactAdapter, settings: Settings, progress: Progress
) -> CompactAdapter | None:
    """Return `compact` fitted again, under the statistics of the teacher's inputs; None where the method has no fit for
    its configuration: for numbers that came from elsewhere as they are, or without the folder of the base where updates
    depend on it; and where data never reached a layer."""
    method = methods.get(compact.method)
    needs_base = methods.needs_base(compact)
    if compact.method not in methods.module_names():  # an earlier version, which is no longer made
        return None
    if any(spec.kind == "single" for spec in method.specs(compact.config, compact.targets)):
        return None
    if needs_base and session.base is None:
        return None
    inputs = teacher_statistics(session, compact, settings)
    context = FitContext(settings.seed, str(session.teacher_model.device), progress, inputs)
    try:
        with ExitStack() as stack:
            if needs_base and session.base is not None:
                checkpoint = stack.enter_context(open_checkpoint(session.base))
                context = replace(context, base=BaseWeights(compact, checkpoint, compact.base.content))
            lora = aligned(session.teacher, compact)
            return method.refit(lora, compact, lambda c: file.sizes(replace(compact, config=c)).adapter, context)
    except StatisticsError:
        return None
