"""What is measured of a chat model's answers: distances from the teacher's, and how well the task is done.

A score is a table (texts, k) whose rows add up, so that every sample of the bootstrap has its own: hits for accuracy,
counts of n-grams for BLEU. `score_of` makes numbers of sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import intervals
import numpy as np

_ORDER = 4  # n-grams of BLEU


@dataclass(frozen=True, eq=False)
class Answers:
    """Of a model's answers at the places that count, (items,): KL from the teacher's, and the first choice; which text
    each item is of. `score` (texts, k) is empty where the task was not scored."""

    kl: np.ndarray
    first: np.ndarray
    texts: np.ndarray
    score: np.ndarray


# --- scores ---------------------------------------------------------------------------------------------------------


def hits(right: Sequence[bool]) -> np.ndarray:
    """Return the score of texts that are right or wrong."""
    return np.array([[float(is_right), 1.0] for is_right in right])


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))


def bleu_counts(written: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Return (texts, 10): n-grams of order 1 to 4 that a reference has, too (as often as in one of them), then all
    n-grams, then the words of the text and of the reference of nearest length (the shorter of two equally near). Words
    are what white space parts; case does not count. (Papineni et al., 2002)"""
    rows = []
    for text, wanted in zip(written, references, strict=True):
        words, others = text.lower().split(), [other.lower().split() for other in wanted]
        matched, counted = [], []
        for n in range(1, _ORDER + 1):
            own, most = _grams(words, n), Counter[tuple[str, ...]]()
            for other in others:
                most |= _grams(other, n)
            matched.append(sum((own & most).values()))
            counted.append(sum(own.values()))
        nearest = min((len(other) for other in others), key=lambda size: (abs(size - len(words)), size))
        rows.append([*matched, *counted, len(words), nearest])
    return np.array(rows, np.float64)


def score_of(sums: np.ndarray) -> np.ndarray:
    """Return the scores of sums (samples, k): accuracy of 2 columns, BLEU of 10."""
    if sums.shape[1] == 2:
        shares: np.ndarray = sums[:, 0] / sums[:, 1]
        return shares
    matched, counted, words, nearest = sums[:, :4], sums[:, 4:8], sums[:, 8], sums[:, 9]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(matched / counted).mean(1)
        penalty = np.minimum(0.0, 1 - nearest / words)
    return np.where((matched > 0).all(1), np.exp(logs + penalty), 0.0)


# --- rows of the table ----------------------------------------------------------------------------------------------


def measured(base: Answers, goal: Answers, ours: Answers) -> dict[str, object]:
    """Return the share of the KL closed, the share of equal first choices, and the share of the gain in score, each
    with its interval, and the scores of base, teacher and ours."""
    texts = int(base.texts.max()) + 1

    def by_text(values: np.ndarray) -> np.ndarray:
        return np.bincount(base.texts, values, texts)

    same = by_text((ours.first == goal.first).astype(np.float64))
    row: dict[str, object] = {
        "closed": intervals.share(by_text(ours.kl), by_text(base.kl), one_minus=True),
        "agreement": intervals.share(same, by_text(np.ones(len(base.kl)))),
        "base_agreement": round(float((base.first == goal.first).mean()), 4),
        "base_kl": round(float(base.kl.mean()), 5),
        "items": len(base.kl),
        "texts": texts,
    }
    if not len(ours.score):
        return row

    def gain(weights: np.ndarray) -> np.ndarray:
        before, after, now = (score_of(weights @ answers.score) for answers in (base, goal, ours))
        with np.errstate(divide="ignore", invalid="ignore"):
            return (now - before) / (after - before)

    scores = [round(float(score_of(a.score.sum(0, keepdims=True))[0]), 4) for a in (base, goal, ours)]
    return row | {"scores": scores, "gain": intervals.interval(gain, len(base.score))}
