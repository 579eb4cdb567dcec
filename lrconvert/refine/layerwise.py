"""Stage one, layer by layer: each target matches the teacher's output on the teacher's own inputs.

For a layer that is all its second moments: with them every method's own fit, closed form or alternating, minimizes that
error, without a pass backward through the model.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from lrconvert.core.errors import BaseError, LrcError
from lrconvert.formats.fidelity import target_key
from lrconvert.io.container import open_checkpoint
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
    """The teacher with the targets of `compact`, in their order and with their views. Raises E-BASE."""
    pairs = {target_key(pair.target): pair for pair in lora.targets}
    found = []
    for target in compact.targets:
        pair = pairs.get(target_key(target))
        if pair is None or pair.target.matrix_shape != target.matrix_shape:
            raise BaseError(f"the target {target.name!r} is not one of the teacher's", fix="is this its teacher?")
        found.append(replace(pair, target=target))
    return replace(lora, targets=tuple(found))


def moments(lesson: RefineSession, adapter: LoraAdapter | CompactAdapter, settings: Settings) -> InputStatistics:
    """The moments of the teacher's inputs to the layers of `adapter`, on a part of what is trained on."""
    room = lesson.room
    room.using(TEACHER)
    batches = lesson.inputs(settings.seed, settings.batch_tokens)
    with room.computing():
        return collect_statistics.collect(room.model, batches, wanted=statistics.wanted(room.model, adapter, (), ()))


def refitted(
    lesson: RefineSession, compact: CompactAdapter, settings: Settings, progress: Progress
) -> CompactAdapter | None:
    """`compact` fitted again, under the moments of the teacher's inputs; None where the method has no fit for its
    configuration: for numbers that came from elsewhere as they are, or without the folder of the base where updates
    depend on it."""
    method = methods.get(compact.method)
    needs_base = methods.needs_base(compact)
    if any(spec.kind == "single" for spec in method.specs(compact.config, compact.targets)):
        return None
    if needs_base and lesson.base is None:
        return None
    known = moments(lesson, compact, settings)
    context = FitContext(settings.seed, str(lesson.room.device), progress, known)
    try:
        with ExitStack() as stack:
            if needs_base and lesson.base is not None:
                checkpoint = stack.enter_context(open_checkpoint(lesson.base))
                context = replace(context, base=BaseWeights(compact, checkpoint, compact.base.content))
            tensors = method.fit(aligned(lesson.teacher, compact), compact.config, context)
    except LrcError as error:
        if error.code != "E-STATS":
            raise
        return None  # a layer that the data never reached
    return replace(compact, tensors=tensors)
