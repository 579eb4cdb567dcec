"""Baking adapters into base weights, taking them out again bit for bit, and checking that a model is such a merge.

`updates` what adapters add, `plan` what becomes of every tensor and file, `compute` (with `exact` and `dora`) the
values, `merge` writing, `record` and `residual` what undoes it, `unmerge`, `verify`.
"""

from lrconvert.merging.merge import merge
from lrconvert.merging.report import Difference, MergeReport, UnmergeReport, VerifyReport
from lrconvert.merging.unmerge import unmerge
from lrconvert.merging.updates import Scaled
from lrconvert.merging.verify import verify

__all__ = ["Difference", "MergeReport", "Scaled", "UnmergeReport", "VerifyReport", "merge", "unmerge", "verify"]
