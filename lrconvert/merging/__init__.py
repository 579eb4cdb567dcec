"""Baking adapters into base weights, taking them out again bit for bit, and checking that a model is such a merge.

`updates` what adapters add, `plan` what becomes of every tensor and file, `compute` (with `exact` and `dora`) the
values, `job`, `writing`, `sinks` and `journal` one pass over a base, `merge` and `inplace` where it goes, `record` and
`residual` what undoes it, `unmerge`, `restoring` and `undoing`; `site`, `patches` and `halfway` a model that is changed
in place, `recover` the way out; `verify`.
"""

from lrconvert.merging.merge import merge
from lrconvert.merging.recover import Recovery, recover
from lrconvert.merging.report import Difference, MergeReport, UnmergeReport, VerifyReport
from lrconvert.merging.unmerge import unmerge
from lrconvert.merging.updates import Scaled
from lrconvert.merging.verify import verify

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
