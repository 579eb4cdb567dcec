"""Codes of several passes by a beam search on the Gram matrix; `methods/vblora/subvectors` has the same in torch.

The same sums in another order: a code differs only where two are equally good up to float32's rounding.
"""

from __future__ import annotations

import numpy as np

from lrconvert.core.dtypes import F32, Array
from lrconvert.kernels.jit import compiled
from lrconvert.kernels.machine_code import Signature

LOOPS = {"search": Signature(("f4 2", "f4 1", "f4 2", "f4 2", "i8 2", "f4 3", "f4 2", "i8 3"))}
_BLOCK = 16  # scores that are looked at one by one only if one of them is good enough


@compiled()
def search(
    products: F32, squares: F32, table: F32, gains: F32, codes: Array, rows: F32, sums: F32, links: Array
) -> None:
    """Fill `codes`, int64 (n, passes), with those that bring ``sum over passes p of g_p v`` near each sub-vector x.

    `products` (n, h) are ``<x, v>``, `squares` (n,) ``<x, x>``, `gains` (n, passes) the g. `table` (h + 1, d) has the
    ``<u, v>`` of the bank, its rows filled up with zeros to a multiple of 16, and last the ``<v, v>``, filled up with
    infinity. From the `beam` best partial sums, each with error e and ``c[v] = <left, v>``, a pass takes the best of
    all

        e - 2 g c[v] + g^2 <v, v>;  then  c <- c - g table[v]

    Scratch: `rows` (2, beam + 1, d) and `links`, int64 (2, passes, beam), of zeros, and `sums` (2, beam).
    """
    n, h = products.shape
    depth, beam, diagonal = codes.shape[1], sums.shape[1], table[h]
    left, after, scores = rows[0, :beam], rows[1, :beam], rows[0, beam]
    errors, best, parent, chosen = sums[0], sums[1], links[0], links[1]
    for i in range(n):
        for v in range(h):
            left[0, v] = products[i, v]
        errors[0] = squares[i]
        count = 1
        for p in range(depth):
            kept, wanted = 0, 1 if p == depth - 1 else beam
            limit = np.float32(np.inf)
            for w in range(count):
                if _score(errors[w], left[w], diagonal, gains[i, p], limit, scores):
                    kept, limit = _keep(scores, w, kept, best[:wanted], parent[p], chosen[p], limit)
            count = max(kept, 1)
            if p < depth - 1:
                for w in range(count):
                    _subtract(left[parent[p, w]], table[chosen[p, w]], gains[i, p], after[w])
                    errors[w] = best[w]
                left, after = after, left
        w = 0
        for p in range(depth - 1, -1, -1):
            codes[i, p] = chosen[p, w]
            w = parent[p, w]


@compiled()
def _score(error: np.float32, left: F32, diagonal: F32, g: np.float32, limit: np.float32, scores: F32) -> int:
    """Fill `scores`, and return how many are below `limit`."""
    twice, square = np.float32(2) * g, g * g
    below = np.int32(0)
    for v in range(len(scores)):
        score = error - twice * left[v] + square * diagonal[v]
        scores[v] = score
        below += np.int32(score < limit)
    return int(below)


@compiled()
def _keep(
    scores: F32, row: int, kept: int, best: F32, parent: Array, chosen: Array, limit: np.float32
) -> tuple[int, np.float32]:
    """Sort the scores below `limit` into `best`, smallest first, with their `row` and places. Return how many are kept,
    and the new limit."""
    for first in range(0, len(scores), _BLOCK):
        below = np.int32(0)
        for v in range(_BLOCK):
            below += np.int32(scores[first + v] < limit)
        if not below:
            continue
        for v in range(first, first + _BLOCK):
            score = scores[v]
            if not score < limit:
                continue
            at = kept if kept < len(best) else len(best) - 1
            while at > 0 and best[at - 1] > score:
                best[at], parent[at], chosen[at] = best[at - 1], parent[at - 1], chosen[at - 1]
                at -= 1
            best[at], parent[at], chosen[at] = score, row, v
            kept = min(kept + 1, len(best))
            if kept == len(best):
                limit = best[kept - 1]
    return kept, limit


@compiled()
def _subtract(left: F32, row: F32, g: np.float32, after: F32) -> None:
    """Fill `after` with ``left - g row``."""
    for v in range(len(after)):
        after[v] = left[v] - g * row[v]
