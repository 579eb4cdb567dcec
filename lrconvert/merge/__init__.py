"""Baking adapters into base weights, taking them out again bit for bit, and checking that a model is such a merge.

`updates` what adapters add, `plan` what becomes of every tensor and file, `compute` (with `exact` and `dora`) the
values, `job`, `writing`, `sinks` and `journal` one pass over a base, `merge` and `inplace` where it goes, `record`
and `residual` what undoes it, `unmerge`, `restoring` and `undoing`; `site`, `patches` and `reconstructed_base` a
model that is changed in place, `recover` the way out; `verify`.
"""

from lrconvert.merge.in_place.recover import Recovery, recover
from lrconvert.merge.merge import merge
from lrconvert.merge.plan.updates import Scaled
from lrconvert.merge.report import Difference, MergeReport, UnmergeReport, VerifyReport
from lrconvert.merge.unmerge import unmerge
from lrconvert.merge.verify import verify

__all__ = [
    "Difference",
    "MergeReport",
    "Recovery",
    "Scaled",
    "UnmergeReport",
    "VerifyReport",
    "merge",
    "recover",
    "unmerge",
    "verify",
]
