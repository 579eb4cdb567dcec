"""What a merge spends: one product for weights and record, and memory that is used again."""

from __future__ import annotations

import numpy as np
import pytest

from lrconvert.core.dtypes import F64, round_to
from lrconvert.merge.arithmetic.exact import Term, Update
from lrconvert.merge.arithmetic.workspace import Pool, Workspace, multiply


@pytest.mark.parametrize("dtype", ("F32", "F16", "BF16"))
def test_the_product_is_computed_once(dtype: str) -> None:
    """Weights and what an unmerge predicts take as many products as the weights alone."""
    products: list[int] = []

    def counted(left: F64, right: F64, out: F64) -> None:
        products.append(out.size)
        multiply(left, right, out)

    rng = np.random.default_rng(0)
    update = Update([Term(0.1, rng.standard_normal((300, 4)), rng.standard_normal((4, 500)))])
    stored = round_to(rng.standard_normal((300, 500)), dtype)
    with Workspace(1, counted) as workspace:
        update.add_and_predict(stored, dtype, workspace=workspace)
    assert sum(products) == stored.size


def test_memory_is_used_again_when_the_last_view_is_gone() -> None:
    pool, kind = Pool(), np.dtype("<u2")
    first = pool.take((8, 100), kind)
    place, view = first.ctypes.data, first.reshape(-1)[3:8].view(np.uint8)[2:]
    view[:] = 7
    del first
    other = pool.take((8, 100), kind)
    assert other.ctypes.data != place  # a view has it
    other[:] = 0
    assert view.tolist() == [7] * 8
    del view
    assert pool.take((4, 50), kind).ctypes.data == place  # as does less of it


def test_blocks_take_no_new_memory() -> None:
    """A second block of the same size is computed in the memory of the first one."""
    rng = np.random.default_rng(0)
    update = Update([Term(0.1, rng.standard_normal((60, 4)), rng.standard_normal((4, 50)))])
    stored = round_to(rng.standard_normal((60, 50)), "BF16")
    places = []
    with Workspace(1) as workspace:
        for _ in range(3):
            merged, predicted, _ = update.add_and_predict(stored, "BF16", workspace=workspace)
            assert predicted is not None
            places.append({merged.ctypes.data, predicted.ctypes.data})
            del merged, predicted
    assert places[0] == places[1] == places[2]
