"""Fits chosen by what the model answers on held-out data, before anything is trained: their norm and their strength."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lrconvert.convert.compress import Candidate
from lrconvert.live import attach
from lrconvert.live.answers import AnswerSums
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.refine.attached_student import NAME
from lrconvert.refine.session import RefineSession

OUTPUTS, WEIGHTS = "outputs", "weights"  # the norms of a fit: with input statistics, and without
_STRONGER = 1.25  # times the strength that was tried before
_STRONGEST = 4.0


def nearer(session: RefineSession, by_outputs: Candidate, by_weights: Candidate) -> Candidate:
    """Return the fit of a form whose answers on held-out data are nearer to the LoRA's, the first of equal ones."""
    one, two = distance_of(session, by_outputs), distance_of(session, by_weights)
    if one is None or two is None:
        norm, chosen, other = (WEIGHTS, by_weights, None) if one is None else (OUTPUTS, by_outputs, None)
    elif one.mean <= two.mean:
        norm, chosen, other = OUTPUTS, by_outputs, two
    else:
        norm, chosen, other = WEIGHTS, by_weights, one
    return replace(chosen, norm=norm, other=None if other is None else other.answers(session.base_distance))


def distance_of(session: RefineSession, candidate: Candidate, scale: float = 1.0) -> AnswerSums | None:
    """Return the distance from the LoRA's answers with a fit, its updates times `scale`; None if there is no fit."""
    if candidate.conversion is None:
        return None
    adapters: dict[str, CompactAdapter | LoraAdapter] = {NAME: candidate.conversion.compact}
    with attach.temporarily(session.teacher_model.model, adapters, scale=scale):
        return session.evaluator.sums((NAME,))


def strengthened(
    session: RefineSession, candidate: Candidate, refit: Callable[[Candidate, float], Candidate]
) -> Candidate:
    """Return a candidate fitted anew at the strength at which its answers are nearest to the LoRA's."""
    plain = distance_of(session, candidate)
    if plain is None:
        return candidate
    best, nearest = 1.0, plain.mean
    while best * _STRONGER <= _STRONGEST:
        stronger = distance_of(session, candidate, best * _STRONGER)
        assert stronger is not None
        if not stronger.mean < nearest:
            break
        best, nearest = best * _STRONGER, stronger.mean
    again = candidate if best == 1 else refit(candidate, best)
    now = None if again is candidate else distance_of(session, again)
    if now is None or not now.mean < plain.mean:
        return candidate
    measured = plain.answers(session.base_distance)
    return replace(again, norm=candidate.norm, other=candidate.other, strength=best, plain=measured)
