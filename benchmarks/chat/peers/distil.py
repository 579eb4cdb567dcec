"""The distillation that trained peers get: KL of the answers and errors of hidden states, as refinement has them.

The same data, split and batches; Adam with a rate that falls linearly to nothing. The rate is the best of three short
branches from the same state, judged on what is held out; their steps count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RATES, PROBE = (0.3, 1.0, 3.0), 8  # multiples of the peer's own rate, steps of a branch
_JUDGED = 4  # batches that judge a branch


@dataclass(frozen=True)
class Schedule:
    steps: int
    batch_tokens: int
    rate: float
    seed: int = 0


Factors = Callable[[], Sequence[tuple[Any, Any]]]  # A (k, in) and B (out, k) of every target, of what is trained


@contextmanager
def _student(layers: Sequence[Any], factors: Factors) -> Iterator[Callable[[bool], None]]:
    """Layers that add their factors' updates while the switch that is given is on; the factors are made anew with every
    call of it."""
    current: list[tuple[Any, Any]] = []

    def switch(on: bool) -> None:
        current[:] = list(factors()) if on else []

    def hook(n: int) -> Callable[[Any, Any, Any], Any]:
        def add(module: Any, arguments: Any, output: Any) -> Any:
            if not current:
                return output
            a, b = current[n]
            return output + ((arguments[0].float() @ a.T) @ b.T).to(output.dtype)

        return add

    hooks = [layer.register_forward_hook(hook(n)) for n, layer in enumerate(layers)]
    try:
        yield switch
    finally:
        for registered in hooks:
            registered.remove()


def distil(
    base: Path, lora: Any, data: Path, parameters: Sequence[Any], factors: Factors, schedule: Schedule
) -> dict[str, Any]:
    """Train `parameters` (torch) so that `factors` answer as `lora` does; return the rate that was chosen."""
    import torch

    from lrconvert.live import attach
    from lrconvert.refine import losses
    from lrconvert.refine.evaluation import TEACHER
    from lrconvert.refine.session import open_session
    from lrconvert.refine.settings import RunOptions, Settings

    settings = Settings(steps=schedule.steps, batch_tokens=schedule.batch_tokens, seed=schedule.seed)
    with open_session(base, lora, data, settings, RunOptions(), progress=lambda share, text: None) as session:
        teacher, pool, far = session.teacher_model, session.split.train, session.base_distance
        layers = attach.layers_of(teacher.model, TEACHER)
        with _student([layers[n] for n in range(len(lora.targets))], factors) as switch:

            def loss_of(batch: Any) -> Any:
                switch(False)
                goal = losses.goal(teacher.teacher(batch, True), 1.0)
                teacher.activate()
                switch(True)
                ours = teacher.answers(batch, True)
                kl = losses.distance(goal, ours, 1.0) / far.mean
                return kl + settings.hidden * losses.hidden_error(goal, ours, far.sizes)

            def branch(steps: int, rate: float, first: int, falling: bool) -> None:
                optimizer = torch.optim.Adam(parameters, lr=rate)
                batches = _batches(pool, schedule, first + steps)
                for n, batch in enumerate(batches):
                    if n < first:
                        continue
                    done = (n - first) / steps
                    optimizer.param_groups[0]["lr"] = rate * ((1 - done) if falling else 1.0)
                    loss_of(batch).backward()
                    torch.nn.utils.clip_grad_norm_(list(parameters), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()

            start = [p.detach().clone() for p in parameters]
            judged: dict[float, float] = {}
            for factor in RATES:
                branch(PROBE, schedule.rate * factor, 0, False)
                with torch.no_grad():
                    judged[factor] = sum(float(loss_of(b)) for b in session.evaluator.batches[:_JUDGED])
                    for parameter, value in zip(parameters, start, strict=True):
                        parameter.copy_(value)
            best = min(judged, key=lambda factor: judged[factor])
            branch(max(1, schedule.steps - PROBE * len(RATES)), schedule.rate * best, 0, True)
            switch(False)
    return {"rate": schedule.rate * best}


def _batches(pool: Any, schedule: Schedule, count: int) -> Iterator[Any]:
    epoch = 0
    while count > 0:
        for numbers in pool.plan(schedule.seed, epoch, schedule.batch_tokens)[:count]:
            count -= 1
            yield pool.batch(numbers)
        epoch += 1
