"""How an allocation is shown: the table of ranks, and what training did."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeGuard

from lrconvert.cli.refining import refinement_json, refinement_text
from lrconvert.core.errors import printable
from lrconvert.report.conversion import conversion_json
from lrconvert.report.tables import table

if TYPE_CHECKING:
    from lrconvert.convert.rank_allocation import Allocation, Module
    from lrconvert.refine.rank_training import Round, TrainedAllocation

_BAR = 20
_ROUNDS = 8  # columns of a training, less the first
_LAYERS = 48  # ranks of one kind of module that are shown one by one


def is_trained(done: Allocation) -> TypeGuard[TrainedAllocation]:
    """Return true if an allocation was trained; its class is not asked, which would load torch."""
    return hasattr(done, "training")


def allocation_json(done: Allocation) -> dict[str, Any]:
    trained = {}
    if is_trained(done):
        rounds = [{"step": r.step, "bytes": r.nbytes, "components": dict(r.components)} for r in done.rounds]
        trained = {"training": {**refinement_json(done.training), "rounds": rounds}}
    return {
        **conversion_json(done),
        **trained,
        "scores": {"of": done.scores, "items": done.items, "ablated": done.ablated},
        "modules": [
            {"name": m.name, "kind": m.kind, "layer": list(m.layer), "rank_before": m.before, "rank_after": m.after}
            for m in done.modules
        ],
    }


def _training(done: Allocation) -> str:
    """Show the effect of training on the answers of the first allocation; nothing without one."""
    if not is_trained(done):
        return ""
    trained = refinement_text("first allocation", "trained", done.training)
    return f"\n\n{trained}\n\ncomponents after so many steps\n{_rounds(done.rounds)}"


def _rounds(rounds: Sequence[Round]) -> str:
    """A row for each kind of module with its components at some of the rounds, the first and the last among them."""
    last = len(rounds) - 1
    shown = [rounds[n] for n in sorted({round(k * last / _ROUNDS) for k in range(_ROUNDS + 1)})]
    kinds = list(rounds[0].components)
    rows = [
        [printable(name), *(r.components[kind] for r in shown)] for name, kind in zip(_short(kinds), kinds, strict=True)
    ]
    rows.append(["bytes", *(r.nbytes for r in shown)])
    return table(["module", *(f"{r.step:,}" for r in shown)], rows)


def allocation_text(done: Allocation, verbose: bool) -> str:
    """Show ranks before and after, and what training did."""
    return f"{ranks(done, verbose)}{_training(done)}"


def ranks(done: Allocation, verbose: bool) -> str:
    """Ranks before and after: a row for each kind of module with a bar and the ranks by layer; then each module."""
    before, after = sum(m.before for m in done.modules), sum(m.after for m in done.modules)
    measured_by = f"by {done.scores}"
    if done.items:
        measured_by += f" on {done.items:,} answers, {done.ablated} components ablated"
    kinds = [(kind, list(members)) for kind, members in groupby(done.modules, key=lambda m: m.kind)]
    rows = []
    for name, (_, members) in zip(_short([kind for kind, _ in kinds]), kinds, strict=True):
        one, two = sum(m.before for m in members), sum(m.after for m in members)
        filled = round(_BAR * two / max(1, one))
        rows.append([printable(name), len(members), one, two, "#" * filled + "." * (_BAR - filled), _by_layer(members)])
    head = ["module", "count", "rank before", "after", "of it kept", "after, layer by layer"]
    parts = [
        f"rank      {before:,} -> {after:,} over {len(done.modules)} modules, {measured_by}",
        "",
        table(head, rows),
    ]
    if verbose:
        each = [[printable(m.name), m.before, m.after] for m in done.modules]
        parts += ["", table(["module", "rank before", "after"], each)]
    return "\n".join(parts)


def _by_layer(members: Sequence[Module]) -> str:
    ranks = [m.after for m in members]
    return " ".join(map(str, ranks)) if len(ranks) <= _LAYERS else f"{min(ranks)}..{max(ranks)}"


def _short(kinds: Sequence[str]) -> list[str]:
    """Return the part after the last number of each name, if that tells them apart."""
    names = [kind.rpartition("*.")[2].removesuffix(".weight") for kind in kinds]
    return names if len(set(names)) == len(names) else list(kinds)
