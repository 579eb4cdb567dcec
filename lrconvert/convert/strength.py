"""The strength at which a small file is written where no data can tell: larger than its nearest fit.

A fit leaves out what does not fit into the bytes and shrinks what it rounds coarsely: the model answers as with a part
of the LoRA. docs/strength.md has the measurements behind the rule.
"""

from __future__ import annotations

_POWER = -0.7
_STRONGEST = 2.0
_WEAKEST = 1.02  # below it another fit is not worth its time
FORMS = ("lowrank", "nola", "vblora")  # what the others capture of the weights says too little of their answers


def strength_without_data(method: str, captured: float) -> float:
    """Return what the updates of a form are multiplied with whose nearest fit captures the share `captured` of the
    energy of the weights: captured^-0.7, at most 2. It is 1 where that is almost 1, and for forms without such a rule.
    """
    if method not in FORMS or not 0 < captured < 1:
        return 1.0
    strength = float(min(captured**_POWER, _STRONGEST))
    return strength if strength >= _WEAKEST else 1.0
