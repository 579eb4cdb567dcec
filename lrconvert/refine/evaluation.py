"""The distance of answers from the teacher's on held-out data, measured as `compare_outputs` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lrconvert.live import attach
from lrconvert.live.answers import AnswerSums, Outputs
from lrconvert.refine.data import Pool
from lrconvert.refine.distributed import Processes
from lrconvert.refine.losses import Batch, outputs

TEACHER = "teacher"
ZERO = "zero_point"  # what the teacher carries beside its updates
_CACHED = 1 << 29  # bytes of the teacher's answers that are kept in memory


class _FloatAttention(TorchFunctionMode):
    """Attention of 16-bit numbers on a processor in float32: its way back is several times as fast on short texts."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or len(args) < 3 or not _is_narrow(args[0]):
            return func(*args, **kwargs)
        mask = kwargs.get("attn_mask")
        if isinstance(mask, Tensor) and mask.is_floating_point():
            kwargs = {**kwargs, "attn_mask": mask.float()}
        return func(*(x.float() for x in args[:3]), *args[3:], **kwargs).to(args[0].dtype)


def _is_narrow(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


@dataclass(eq=False)
class TeacherModel:
    """A model with a teacher, what was active on it before, and how it computes."""

    model: nn.Module
    before: tuple[str, ...]
    device: torch.device
    autocast: bool
    processes: Processes

    def activate(self, *names: str) -> None:
        """Let the model compute with these adapters, beside those that were active before."""
        attach.set_active(self.model, (*self.before, *names))

    @contextmanager
    def computing(self, training: bool = False) -> Iterator[None]:
        """Return the context in which forward passes are made: in bf16 with `autocast`. What is measured is what the
        model answers; `training` may differ from it in rounding."""
        # Layers that are computed again on the way back are so without a mode.
        is_again = training and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        attention = _FloatAttention() if training and not is_again else nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast), attention:
            yield

    def answers(self, batch: Batch, hidden: bool, training: bool = False) -> Outputs:
        """Return what the model answers with the adapters that are active; `training` as in `computing`."""
        with self.computing(training):
            return outputs(self.model, batch, hidden)

    @torch.no_grad()
    def teacher(self, batch: Batch, hidden: bool, training: bool = False) -> Outputs:
        """Return what the teacher answers; `training` as in `computing`."""
        self.activate(TEACHER)
        return self.answers(batch, hidden, training)


@dataclass(eq=False)
class Evaluator:
    """The held-out batches of this process: its share of them, or all where there are fewer than processes."""

    teacher_model: TeacherModel
    batches: list[Batch]
    shared: bool
    _cache: list[Outputs] = field(default_factory=list)
    _cached: int = 0

    @classmethod
    def of(cls, teacher_model: TeacherModel, pool: Pool, batch_tokens: int) -> Evaluator:
        """Return the evaluator of the held-out `pool`."""
        plan, processes = pool.plan(0, -1, batch_tokens), teacher_model.processes
        shared = len(plan) >= processes.size
        own = plan[processes.rank :: processes.size] if shared else plan
        return cls(teacher_model, [pool.batch(numbers).to(teacher_model.device) for numbers in own], shared)

    @torch.no_grad()
    def sums(self, names: Sequence[str], hidden: bool = False) -> AnswerSums:
        """Return how far the base with the adapters `names` is from the teacher."""
        total = AnswerSums()
        for n, batch in enumerate(self.batches):
            goal = self._goal(n, batch, hidden)
            self.teacher_model.activate(*names)
            total.add(goal, self.teacher_model.answers(batch, hidden))
        if not self.shared:
            return total
        values = [total.items, total.distance, total.agreed, total.tokens, *(total.hidden or ())]
        sums = self.teacher_model.processes.totals(values, self.teacher_model.device)
        return AnswerSums(int(sums[0]), sums[1], int(sums[2]), int(sums[3]), sums[4:], total.are_logits)

    def _goal(self, n: int, batch: Batch, hidden: bool) -> Outputs:
        if not hidden and n < len(self._cache):
            return self._cache[n]
        goal = self.teacher_model.teacher(batch, hidden)
        if n == len(self._cache) and self._cached + goal.rows.nbytes <= _CACHED:
            self._cache.append(Outputs(goal.rows, goal.are_logits))
            self._cached += goal.rows.nbytes
        return goal
