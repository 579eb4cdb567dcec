"""Whether adapters of one base have anything to share: banks, bases, starts and coder tables, at equal bytes each.

    python benchmarks/members.py          trains the fleet (half an hour of a core), resumable
    python benchmarks/sharing.py          measures what is missing
    python benchmarks/sharing.py --render writes the tables of docs/sharing.md

The fleet is that of `members.py`: LoRAs of one encoder over six tasks. A size is what one more adapter adds to a fleet,
without its overhead there, as a share of its factors at 16 bit; what is stored once for all is counted apart. "New"
adapters, the six of seed 1, were not there when a bank or a basis was learned. Adapters of one seed began at the same
A, as those of one training script do; other seeds began elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import accuracy
import cells
import intervals
import joint_basis
import members
import numpy as np
import sharing_chat
import sharing_tables
from joint_basis import Basis, Coded, Member
from members import TASKS
from sharing_tables import ANSWERED, SHARES

from lrconvert import api

NAME = "sharing"
_RANK = 8
_MANY = 18  # the long ones of other seeds
_PRIOR = 1000.0  # numbers that a fixed table counts for
FORMS = ((4, 256), (8, 256))  # (b, h) of banks
_TIMES = np.arange(1.0, 2.01, 0.04)  # of the bytes


def _of(seed: int) -> list[members.Member]:
    """The long members of a seed, by task."""
    return [member for member in members.trained("long") if member.seed == seed]


def _others(count: int = 0) -> list[members.Member]:
    """Members that began elsewhere than the new ones: the long ones, then short ones, as many as there are or `count`,
    spread over the tasks."""
    both = [m for m in (*members.trained("long"), *members.trained("short")) if m.seed != 1]
    return both[: count or None]


@cache
def _member(member: members.Member) -> Member:
    return Member.of(_lora(member))


@cache
def _lora(member: members.Member) -> Any:
    return api.load_lora(member.teacher.adapter)


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


# --- cells ----------------------------------------------------------------------------------------------------------


def _trained(kind: str) -> dict[str, Any]:
    scores = [members.train(member) for member in members.trained(kind)]
    before, after = (np.array([score[key] for score in scores]) for key in ("accuracy of the base", _WITH))
    return {
        "members": len(scores),
        "above the base": int((after > before).sum()),
        "accuracy of the base": _mean(before),
        "accuracy with the LoRA": _mean(after),
        "cpu_seconds": round(sum(score["cpu_seconds"] for score in scores)),
    }


_WITH = "accuracy with the LoRA"


def _overlap(pairs: Callable[[], list[tuple[members.Member, members.Member]]]) -> dict[str, Any]:
    return _overlap_of(lambda: [(_member(a), _member(b)) for a, b in pairs()])


def _overlap_of(pairs: Callable[[], list[tuple[Member, Member]]]) -> dict[str, Any]:
    both = pairs()
    spaces = np.mean([joint_basis.inside(a, b) for a, b in both], axis=0).round(4).tolist()
    return {
        "pairs": len(both),
        "cosine": _mean([joint_basis.cosine(a, b) for a, b in both]),
        **dict(zip(("inputs", "inputs by chance", "outputs", "outputs by chance"), spaces, strict=True)),
    }


def _pairs(same_task: bool, same_seed: bool) -> list[tuple[members.Member, members.Member]]:
    """Pairs of long members of rank 8."""
    known = [member for seed in (0, 1) for member in _of(seed)]
    return [
        (a, b)
        for a in known
        for b in known
        if a != b and (a.task == b.task, a.seed == b.seed) == (same_task, same_seed)
    ]


def _lowrank(share: float, seed: int) -> dict[str, Any]:
    kept, sizes = [], []
    for member in _of(seed):
        lora = _lora(member)
        done = _within(lora, int(lora.half_bytes * share / 100))
        kept.append(done.fidelity.captured)
        sizes.append(done.sizes.payload)
    return {"captured": _mean(kept), "bytes": round(float(np.mean(sizes))), "each": [round(x, 4) for x in kept]}


def _within(lora: Any, payload: int) -> Any:
    """The conversion to low rank whose payload is at most so many bytes."""
    size = payload
    for _ in range(3):
        size += payload - api.convert(lora, "lowrank", target_size=size, dry_run=True).sizes.payload
    return api.convert(lora, "lowrank", target_size=size)


def _header(share: float, overhead: int | None) -> dict[str, Any]:
    """A file of a size, of which `overhead` bytes are no payload; None: a file of its own."""
    kept = []
    for member in _of(1):
        lora = _lora(member)
        limit = int(lora.half_bytes * share / 100)
        done = api.convert(lora, "lowrank", target_size=limit) if overhead is None else _within(lora, limit - overhead)
        kept.append(done.fidelity.captured)
    return {"captured": _mean(kept), "bytes": limit}


def _own_bank(share: float) -> dict[str, Any]:
    import given_bank

    done = [given_bank.own(_lora(m), int(_lora(m).half_bytes * share / 100)) for m in _of(1)]
    kept, sizes, banks = np.mean(done, axis=0).tolist()
    return {"captured": round(kept, 4), "bytes": round(sizes), "bank": round(banks)}


def _bank(share: float, kind: str, count: int, within: bool) -> dict[str, Any]:
    """VB-LoRA on a given bank, of the better of `FORMS`. `within`: the coded ones are among those that the bank was
    learned of."""
    import given_bank

    best: dict[str, Any] = {}
    tested = _of(1)
    sources = (tested + _others())[: count or None] if within else _others(count)
    for b, h in FORMS:
        start = time.process_time()

        def configs(chosen: Sequence[members.Member], shape: tuple[int, int] = (b, h)) -> list[Any]:
            return [given_bank.planned(_lora(m), int(_lora(m).half_bytes * share / 100), *shape) for m in chosen]

        if kind == "random":
            bank = given_bank.random(b, h)
        else:
            loras = [_lora(m) for m in sources]
            bank = given_bank.learned(loras, configs(sources), synthetic=kind == "synthetic")
        learning = round(time.process_time() - start, 1)
        kept = [given_bank.captured(_lora(m), c, bank) for m, c in zip(tested, configs(tested), strict=True)]
        if _mean(kept) > best.get("captured", 0):
            best = {"captured": _mean(kept), "form": [b, h], "learning_cpu_seconds": learning, "once": 2 * b * h}
    return {**best, "learned of": 0 if kind == "random" else len(sources)}


def _on(share: float, tested: Sequence[members.Member], basis_of: Callable[[members.Member], Basis | None]) -> Any:
    kept, once = [], 0
    for member in tested:
        own, basis = _member(member), basis_of(member)
        kept.append(Coded.of(own, basis).best([own.half_bytes * share / 100])[0][0])
        once = 0 if basis is None else basis.nbytes
    return {"captured": _mean(kept), "once": once, "each": [round(x, 4) for x in kept]}


def _joint(share: float, k: int, count: int, within: bool) -> dict[str, Any]:
    sources = (_of(1) + _others())[: count or None] if within else _others(count)
    basis = joint_basis.joint([_member(m) for m in sources], k)
    return {**_on(share, _of(1), lambda member: basis), "learned of": len(sources)}


def _clusters(share: float, k: int) -> dict[str, Any]:
    """A basis for each task, of the other long members of it."""
    row = _on(share, _of(1), lambda member: joint_basis.joint(_of_task(member), k))
    return {**row, "once": len(TASKS) * row["once"], "learned of": len(_of_task(_of(1)[0]))}


def _of_task(member: members.Member) -> list[Member]:
    """The other long members of its task, which began elsewhere."""
    return [_member(m) for m in members.trained("long") if m.task == member.task and m.seed != member.seed]


def _by_task(share: float) -> dict[str, Any]:
    """The common directions, both sides, of the other long members of the task, and what lies outside of them."""
    return _on(share, _of(1), lambda member: joint_basis.common(_of_task(member), _RANK, _RANK))


def _core(k: int) -> dict[str, Any]:
    basis = joint_basis.joint([_member(m) for m in _others(_MANY)], k)
    own = _member(_of(1)[0])
    size = 2 * k * k * len(own.factors)
    kept = [joint_basis.full_core(_member(m), basis) for m in _of(1)]
    return {
        "captured": _mean(kept),
        "bytes": size,
        "share": round(100 * size / own.half_bytes, 2),
        "once": basis.nbytes,
    }


def _start(share: float, seed: int, k_out: int = 0) -> dict[str, Any]:
    """The common directions of A beside what lies outside of them. Seed 0: those of the others of the same start."""
    basis_of: Callable[[members.Member], Basis | None]
    if seed == 0:
        basis_of = _start_of
    else:
        basis = joint_basis.common([_member(m) for m in _others(_MANY)], _RANK, k_out)
        basis_of = lambda member: basis  # noqa: E731
    return _on(share, _of(seed), basis_of)


def _widened(share: float) -> dict[str, Any]:
    """The start as `_start` has it, by the method `lowrank` as it is, on rows that are k numbers longer."""
    from lrconvert.lora import svd
    from lrconvert.methods import base as methods

    kept = []
    for member in _of(0):
        lora, basis = _lora(member), _start_of(member)
        done = _within(joint_basis.widened(lora, basis), int(lora.half_bytes * share / 100))
        parts = zip(lora.targets, basis.sides, methods.without_base(done.compact), strict=True)
        lost = np.array([svd.distance(pair, joint_basis.narrowed(a, own), b) for pair, (own, _), (_, a, b) in parts])
        kept.append(1 - float(lost[:, 0].sum() / lost[:, 1].sum()))
    return {"captured": _mean(kept), "once": basis.nbytes, "each": [round(x, 4) for x in kept]}


def _start_of(member: members.Member) -> Basis:
    return joint_basis.common([_member(m) for m in _of(member.seed) if m != member], _RANK, 0)


def _customers(share: float, shared: bool) -> dict[str, Any]:
    """Adapters of one task, one start, and other texts: the common directions of the others of the task, both sides."""
    known = members.trained("customer")
    pairs = [(_member(a), _member(b)) for a in known for b in known if a.task == b.task and a != b]
    row = _on(share, known, _of_customers if shared else lambda member: None)
    return {**row, "cosine": _mean([joint_basis.cosine(a, b) for a, b in pairs])}


def _of_customers(member: members.Member) -> Basis:
    """The common directions of the task's other customers."""
    others = [m for m in members.trained("customer") if m.task == member.task and m != member]
    return joint_basis.common([_member(m) for m in others], _RANK, _RANK)


def _worth(share: float, cases: Callable[[], list[tuple[Member, Basis]]]) -> dict[str, Any]:
    """How many bytes low rank takes to capture as much without a basis, as a multiple of those with it."""
    factors = []
    for own, basis in cases():
        limit = own.half_bytes * share / 100
        with_it = Coded.of(own, basis).best([limit])[0][0]
        plain = [kept for kept, _, _ in Coded.of(own, None).best([limit * times for times in _TIMES])]
        factors.append(float(np.interp(with_it, plain, _TIMES)))
    return {"bytes without": _mean(factors), "each": [round(x, 3) for x in factors]}


def _next(share: float, shared: bool) -> dict[str, Any]:
    """Adapters that were trained on from those of seed 0; `shared`: as what they differ from these, which are in the
    fleet in as many bytes."""
    kept, angles = [], []
    for member in members.trained("next"):
        assert member.after is not None
        own, before = _member(member), _member(member.after)
        limit = own.half_bytes * share / 100
        angles.append(joint_basis.cosine(own, before))
        if not shared:
            kept.append(Coded.of(own, None).best([limit])[0][0])
            continue
        lora = _lora(member.after)
        _, compact = joint_basis.rebuilt(lora, before, None, limit)
        rest = joint_basis.difference(own, compact)
        missing = rest.energy * (1 - Coded.of(rest, None).best([limit])[0][0])
        kept.append(1 - missing / own.energy)
    return {"captured": _mean(kept), "cosine": _mean(angles), "each": [round(x, 4) for x in kept]}


def _tables(share: float) -> dict[str, Any]:
    """Bits of the coder under its fixed models, and under tables that fit the members."""
    from lrconvert.lora.coded.choice import CLASSES, bits_of_classes
    from lrconvert.lora.coded.models import shifts
    from lrconvert.methods.lowrank.form import starts

    fixed = bits_of_classes().T[shifts() == 0]  # wide models are of no use at these sizes
    counts = np.zeros((2, *fixed.shape))  # of others, of new ones
    for which, chosen in enumerate((_others(_MANY), _of(1))):
        for member in chosen:
            lora = _lora(member)
            compact = _within(lora, int(lora.half_bytes * share / 100)).compact
            place, sizes = 0, np.minimum(np.abs(compact.tensors["codes"]), CLASSES - 1)
            for model, length in starts(compact.config, compact.targets).rows:
                if model < len(fixed):
                    counts[which, model] += np.bincount(sizes[place : place + length], minlength=CLASSES)
                place += length
    signs = np.minimum(np.arange(CLASSES), 1)
    expected = np.exp2(signs - fixed)
    expected *= _PRIOR / expected.sum(axis=1, keepdims=True)
    learned = signs - np.log2((counts[0] + expected) / (counts[0] + expected).sum(axis=1, keepdims=True))
    spent = [float((counts[1] * np.where(counts[1] > 0, bits, 0)).sum()) for bits in (fixed, learned)]
    return {"saved": round(1 - spent[1] / spent[0], 4), "bits": [round(x) for x in spent]}


def _answers(share: float, stronger: bool) -> dict[str, Any]:
    """Low rank with the common start beside low rank without, of the members of seed 0, answer by answer; `stronger`:
    both at the strength that `compress` gives them."""
    parts = [_distances(share, member, stronger) for member in _of(0)]
    size, *near = np.concatenate([part / part[0].mean() for part in parts], axis=1)  # every task weighs the same
    each = {
        m.task: (1 - part[1:].sum(1) / part[0].sum()).round(4).tolist() for m, part in zip(_of(0), parts, strict=True)
    }
    both = {
        name: intervals.share(row, size, one_minus=True) for name, row in zip(("without", "with"), near, strict=True)
    }
    return {"closed": each, **both, "more": intervals.share(near[0] - near[1], size)}


def _distances(share: float, member: members.Member, stronger: bool) -> np.ndarray:
    """KL to the LoRA's answers on each held-out text (3, texts): of the base, of low rank, and of low rank with the
    common start; kept in the cache."""
    from lrconvert.convert.strength import strength_without_data
    from lrconvert.live.zero_point import without_updates

    path = members.FOLDER / member.name / f"answers-{share:g}{'-stronger' if stronger else ''}.npy"
    if not path.exists():
        teacher, lora, own = member.teacher, _lora(member), _member(member)
        model, tokenizer = accuracy._model(teacher)
        held = sorted(accuracy._held(teacher), key=lambda row: len(row["text"]))

        def logs(adapter: Any) -> np.ndarray:
            api.attach(model, adapter)
            answers = accuracy._answers(model, tokenizer, held).logs
            api.detach(model)
            return answers

        limit = own.half_bytes * share / 100
        compact = []
        for basis in (None, _start_of(member)):
            captured, plain = joint_basis.rebuilt(lora, own, basis, limit)
            strength = strength_without_data("lowrank", captured) if stronger else 1.0
            compact.append(replace(plain, targets=tuple(replace(p, scale=strength) for p in plain.targets)))
        goal, *others = (logs(adapter) for adapter in (lora, without_updates(lora), *compact))
        np.save(path, [np.sum(np.exp(goal) * (goal - other), axis=1, dtype=np.float64) for other in others])
    return np.asarray(np.load(path))


def all_cells() -> Iterator[cells.Cell]:
    for kind in ("long", "next", "customer", "short"):
        yield f"trained, {kind}", partial(_trained, kind)
    for task in (True, False):
        for seed in (False, True):
            if not (task and seed):
                yield (
                    f"overlap, {_spelled(task, 'task')}, {_spelled(seed, 'start')}",
                    partial(_overlap, partial(_pairs, task, seed)),
                )
    for share in SHARES:
        yield f"{share:g}%, nothing shared, lowrank", partial(_lowrank, share, 1)
        yield f"{share:g}%, nothing shared, lowrank, seed 0", partial(_lowrank, share, 0)
        yield f"{share:g}%, nothing shared, lowrank as coded here", partial(_on, share, _of(1), lambda member: None)
        yield f"{share:g}%, seed 0, nothing shared", partial(_on, share, _of(0), lambda member: None)
        yield f"{share:g}%, seed 0, the start", partial(_start, share, 0)
        yield f"{share:g}%, seed 0, the start, one model a row", partial(_widened, share)
        yield f"{share:g}%, common directions", partial(_start, share, 1)
        yield f"{share:g}%, common directions, both sides", partial(_start, share, 1, _RANK)
        for k in (16, 64):
            for count in (_MANY, 0) if k == 64 else (_MANY,):
                yield f"{share:g}%, joint {k}, {count or 'all'}", partial(_joint, share, k, count, False)
            yield f"{share:g}%, joint {k}, {_MANY}, members", partial(_joint, share, k, _MANY, True)
        yield f"{share:g}%, joint 16, by task", partial(_clusters, share, 16)
        yield f"{share:g}%, next, nothing shared", partial(_next, share, False)
        yield f"{share:g}%, next, the difference", partial(_next, share, True)
        yield f"{share:g}%, customers, nothing shared", partial(_customers, share, False)
        yield f"{share:g}%, customers, common directions", partial(_customers, share, True)
        yield f"{share:g}%, by task, common directions", partial(_by_task, share)
        yield f"{share:g}%, tables", partial(_tables, share)
        yield f"{share:g}%, own file", partial(_header, share, None)
        yield f"{share:g}%, in a fleet", partial(_header, share, 256)
    for share in SHARES[:2]:
        yield f"{share:g}%, vblora, own bank", partial(_own_bank, share)
        for count in (1, 10, 0):
            yield f"{share:g}%, vblora, of {count or 'all'}", partial(_bank, share, "learned", count, False)
        for count in (10, 0):
            yield f"{share:g}%, vblora, of {count or 'all'}, members", partial(_bank, share, "learned", count, True)
        yield f"{share:g}%, vblora, synthetic", partial(_bank, share, "synthetic", 10, False)
        yield f"{share:g}%, vblora, random", partial(_bank, share, "random", 1, False)
    for k in (6, 12, 19):
        yield f"core {k}", partial(_core, k)
    for kind in ("the same start", "the same task", "another task"):
        yield f"chat, overlap, {kind}", partial(_overlap_of, partial(sharing_chat.pairs, kind))
    for share in SHARES:
        yield f"chat, {share:g}%, nothing shared", partial(sharing_chat.on, share, sharing_chat.starts, False)
        yield f"chat, {share:g}%, the start", partial(sharing_chat.on, share, sharing_chat.starts, True)
        yield f"chat, {share:g}%, same task, nothing shared", partial(sharing_chat.on, share, sharing_chat.task, False)
        yield f"chat, {share:g}%, same task, the other's", partial(sharing_chat.on, share, sharing_chat.task, True)
    for share in SHARES:
        yield (
            f"worth, {share:g}%, the start",
            partial(_worth, share, lambda: [(_member(m), _start_of(m)) for m in _of(0)]),
        )
        customers = lambda: [(_member(m), _of_customers(m)) for m in members.trained("customer")]  # noqa: E731
        yield f"worth, {share:g}%, customers", partial(_worth, share, customers)
        yield f"worth, {share:g}%, the start, chat", partial(_worth, share, sharing_chat.starts)
        yield f"worth, {share:g}%, the same task, chat", partial(_worth, share, sharing_chat.task)
    for name in ("sst2", "e2e"):
        yield f"chat, answers, 0.4%, {name}", partial(sharing_chat.answers, 0.4, name)
    for share in ANSWERED:
        for stronger in (False, True):
            name = f"answers, {share:g}%{', at the strength of compress' if stronger else ''}"
            yield name, partial(_answers, share, stronger)


def _spelled(same: bool, what: str) -> str:
    return f"{'the same' if same else 'another'} {what}"


def table() -> str:
    return sharing_tables.tables(cells.read(NAME))


if __name__ == "__main__":
    cells.main(NAME, __doc__, all_cells, table)
