"""Baking adapters into base weights, taking them out again bit for bit, and checking that a model is such a merge.

A merge plans what becomes of every tensor and file (`plan/`), computes the values in blocks of rows, rounded correctly
(`compute`, `arithmetic/`), and writes them with a record that undoes it and a journal (`writing`, `journal`), into a
new folder (`merge`) or into the model itself (`in_place/`). `unmerge` opens, checks and follows the record (`undo/`);
`verify` computes a merge again and compares. `quantized_base` reads quantized checkpoints as bf16,
`pipeline` merges into the models of a diffusers pipeline.
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
