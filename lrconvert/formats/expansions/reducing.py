"""Adapters of a smaller rank, for servers that have room for no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lrconvert.core.dtypes import Array, Stored
from lrconvert.core.errors import ExportError
from lrconvert.core.wording import spelled
from lrconvert.formats.expansions.ranks import EXACT, needed
from lrconvert.lora import svd
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, LoraTarget
from lrconvert.methods import base as methods
from lrconvert.methods.shared.plain_lora import plain_lora


@dataclass(frozen=True)
class Reduced:
    """An adapter of a smaller rank, and the error of that: ||change|| / ||update|| over all targets, and of the target
    that lost most (`worst`, `worst_error`). `cut`: how many targets have other factors than before."""

    adapter: LoraAdapter | CompactAdapter
    rank: int
    error: float = 0.0
    cut: int = 0
    worst: str = ""
    worst_error: float = 0.0


def reduced(compact: CompactAdapter, max_rank: int, max_error: float) -> Reduced:
    """Return an adapter whose ranks are at most `max_rank`: factors of smaller ranks stay as they are, to the bit,
    others become the best of that rank in the Frobenius norm, smaller still where that is exact.

    Raises E-EXPORT if more than `max_error` of the norm is lost by that, or if updates depend on the base.
    """
    if methods.needs_base(compact):
        what = f"the updates of this {compact.method} adapter depend on the base's weights: it has no rank to reduce"
        raise ExportError(what, fix="merge it into its base")
    ranks = methods.get(compact.method).ranks(compact.config, compact.targets)
    if max(ranks, default=0) <= max_rank:
        return Reduced(compact, max(ranks, default=0))
    lora = plain_lora(compact)
    spectra = svd.spectra(lora.targets)
    norms = [float(np.sum(s * s)) for s in spectra]
    pairs, losses = [], []
    for pair, s in zip(lora.targets, spectra, strict=True):
        made, loss = (pair, 0.0) if pair.rank <= max_rank else _cut(pair, s, max_rank)
        pairs.append(made)
        losses.append(loss)
    total = sum(norms)
    error = float(np.sqrt(sum(losses) / total)) if total else 0.0
    shares = [float(np.sqrt(loss / norm)) if norm else 0.0 for loss, norm in zip(losses, norms, strict=True)]
    worst = int(np.argmax(shares))
    if error > max_error:
        raise _too_much(spectra, lora, max_rank, error, max_error)
    changed = sum(one is not other for one, other in zip(pairs, lora.targets, strict=True))
    adapter = replace(lora, targets=tuple(pairs))
    rank = max(pair.rank for pair in pairs)
    return Reduced(adapter, rank, error, changed, lora.targets[worst].target.name, shares[worst])


def _cut(pair: LoraTarget, s: Array, max_rank: int) -> tuple[LoraTarget, float]:
    """The target in a rank of at most `max_rank`, and the squared norm of what it lost."""
    left = np.cumsum((s * s)[::-1])[::-1]
    exact = int(np.argmax(np.append(left, 0.0) <= EXACT**2 * left[0])) if left[0] else 0
    rank = max(1, min(max_rank, exact))
    a, b = svd.balanced(svd.svd(pair), rank)
    small, tall = (Stored("F32", np.ascontiguousarray(x, np.float32)) for x in (a, b))
    return LoraTarget(pair.target, small, tall, 1.0), float(np.append(left, 0.0)[rank])


def _too_much(
    spectra: Sequence[Array], lora: LoraAdapter, max_rank: int, error: float, max_error: float
) -> ExportError:
    """The error for a rank that is too small, with the ranks that do."""
    need = needed(spectra, max(pair.rank for pair in lora.targets))
    assert need is not None
    what = f"at rank {max_rank} the update loses {error:.2g} of its norm, more than {max_error:g}"
    ranks = f"rank {need.exact} loses nothing"
    if need.close < need.exact:
        ranks = f"rank {need.close} loses {need.error:.1g}, {ranks}"
    return ExportError(what, fix=f"{ranks}; or allow it with {spelled('max_error', ...)}")
