"""Estimates of the time that the parts of a ranking by answers take, and what is left out where that is too long.

Nothing changes where there is time enough, so that results do not depend on the machine then.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

from lrconvert.core.wording import spelled
from lrconvert.refine.evaluation import ZERO, Evaluator
from lrconvert.refine.session import RefineSession

_CHOOSING = 0.25  # of the time, for the answers of fits before anything is trained
_PASSES = 8  # over the held-out texts for each form: two norms, and strengths
_OF_A_STEP = 5  # forward passes that a step of training takes as long as


def _seconds_of_a_batch(session: RefineSession) -> float:
    """The seconds of a forward pass over one batch, the teacher's answers being known."""
    one = Evaluator(session.teacher_model, session.evaluator.batches[:1], False)
    one.sums((ZERO,))
    start = time.monotonic()
    one.sums((ZERO,))
    return time.monotonic() - start


def stride_of_choosing(session: RefineSession, forms: int, minutes: float) -> int:
    """Return n where a quarter of the `minutes` has time for every nth held-out batch; 1 if it has for all."""
    seconds = _seconds_of_a_batch(session)
    most = max(1, int(_CHOOSING * 60 * minutes / max(1e-9, seconds * forms * _PASSES)))
    return math.ceil(len(session.evaluator.batches) / most)


def cut_choosing(session: RefineSession, stride: int, minutes: float) -> tuple[RefineSession, tuple[str, ...]]:
    """Return the session with every held-out batch of that `stride`, and a line that says so; the same session if these
    are all."""
    batches = session.evaluator.batches
    if stride <= 1:
        return session, ()
    evaluator = Evaluator(session.teacher_model, batches[::stride], session.evaluator.shared)
    base = evaluator.sums((ZERO,), hidden=bool(session.base_distance.hidden))
    what = f"{len(batches) - len(evaluator.batches)} of {len(batches)} held-out batches ({_more(minutes)})"
    return replace(session, evaluator=evaluator, base_distance=base), (what,)


def minutes_of_rounds(
    session: RefineSession, steps: Sequence[int], forms: int, most: float
) -> tuple[float | None, tuple[str, ...]]:
    """Return `most`, the minutes that rounds of so many `steps` are to take, and a line that says so; None if they take
    no longer anyway. Half of the `forms` are left after each round."""
    each = _OF_A_STEP * _seconds_of_a_batch(session)
    seconds = 0.0
    for count in steps:
        seconds += forms * count * each
        forms = (forms + 1) // 2
    if seconds <= 60 * most:
        return None, ()
    return most, (f"all steps of refinement, some {seconds / 60:.0f} minutes ({_more(most)})",)


def _more(minutes: float) -> str:
    return f"there were {minutes:g} minutes; more with {spelled('budget_minutes')}"
