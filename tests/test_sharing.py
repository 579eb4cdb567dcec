"""What docs/sharing.md says is computed as it says: on fleets whose common part is known."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, dense, random_lora

from lrconvert import api
from lrconvert.core.dtypes import Stored
from lrconvert.lora.adapter import LoraAdapter

SHAPES = ((96, 64), (64, 128))


@pytest.fixture(scope="module")
def joint() -> Iterator[Any]:
    """The script as a module; its short name is gone afterwards."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import joint_basis as module

        yield module
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in ("joint_basis", "given_bank"):
            sys.modules.pop(name, None)


def _of_one_start(seed: int, moved: float) -> LoraAdapter:
    """A LoRA whose A are those of seed 100, moved by so much of their size."""
    lora, start = random_lora(SHAPES, seed=seed), random_lora(SHAPES, seed=100)
    return replace(
        lora,
        targets=tuple(
            replace(pair, a=Stored("F32", begun.A * np.float32(1 - moved) + np.float32(moved) * pair.A))
            for pair, begun in zip(lora.targets, start.targets, strict=True)
        ),
    )


def test_what_a_member_captures_is_what_a_server_would_have(joint: Any) -> None:
    """The share that is stated is that of the rebuilt update, at least; with a basis and without."""
    loras = [_of_one_start(seed, 0.3) for seed in range(4)]
    members = [joint.Member.of(lora) for lora in loras]
    for basis in (None, joint.common(members[1:], 4, 0), joint.common(members[1:], 4, 3)):
        limit = 0.2 * members[0].half_bytes
        stated = joint.Coded.of(members[0], basis).best([limit])[0][0]
        solved, rebuilt = joint.rebuilt(loras[0], members[0], basis, limit)
        pairs = list(zip(loras[0].targets, rebuilt.targets, strict=True))
        lost = sum(float(np.sum((dense(a) - dense(b)) ** 2)) for a, b in pairs)
        real = 1 - lost / sum(float(np.sum(dense(a) ** 2)) for a, _ in pairs)
        assert real == pytest.approx(solved, abs=1e-3) and solved > stated - 0.01 and stated > 0.5


def test_it_codes_as_low_rank_does(joint: Any) -> None:
    """Without a basis it captures what the method `lowrank` captures in as many bytes of payload."""
    lora = random_lora(SHAPES, rank=8)
    done = api.convert(lora, "lowrank", target_size=1100)
    assert done.fidelity is not None and done.fidelity.captured is not None
    ((captured, _, _),) = joint.Coded.of(joint.Member.of(lora), None).best([done.sizes.payload])
    assert captured == pytest.approx(done.fidelity.captured, abs=0.02)


def test_a_common_start_is_worth_bytes_and_nothing_else_is(joint: Any) -> None:
    """On adapters that began at one A its directions capture more in as many bytes; on strangers, no more."""
    for moved, least, most in ((0.2, 0.02, 1.0), (1.0, -0.05, 0.01)):
        members = [joint.Member.of(_of_one_start(seed, moved)) for seed in range(5)]
        limit = [0.15 * members[0].half_bytes]
        basis = joint.common(members[1:], 4, 0)
        more = joint.Coded.of(members[0], basis).best(limit)[0][0] - joint.Coded.of(members[0], None).best(limit)[0][0]
        assert least < more < most, moved


def test_a_joint_basis_holds_its_members_once_it_has_all_their_directions(joint: Any) -> None:
    """3 members of rank 4 span 12 directions: a core of 12 has all of each of them and a part of a stranger."""
    members = [joint.Member.of(random_lora(SHAPES, seed=seed)) for seed in range(4)]
    whole, half = joint.joint(members[:3], 12), joint.joint(members[:3], 6)
    assert all(joint.full_core(member, whole) == pytest.approx(1) for member in members[:3])
    assert joint.full_core(members[3], whole) < 0.2 < joint.full_core(members[0], half) < 0.99
    ((captured, _, _),) = joint.Coded.of(members[0], whole).best([0.1 * members[0].half_bytes])
    assert captured > joint.Coded.of(members[0], None).best([0.1 * members[0].half_bytes])[0][0] + 0.05


def test_a_difference_is_what_two_members_differ_by(joint: Any) -> None:
    one, other = random_lora(SHAPES, seed=0), random_lora(SHAPES, seed=1)
    rest = joint.difference(joint.Member.of(one), other)
    for (u, s, v), a, b in zip(rest.factors, one.targets, other.targets, strict=True):
        assert (u * s) @ v.T == pytest.approx(dense(a) - dense(b), abs=1e-5)


@pytest.mark.medium
def test_a_given_bank_stays_and_its_codes_fit_the_update(joint: Any) -> None:
    """Codes on the bank that was learned of others capture as much as is stated by the fit's own error, and more than
    those on a bank that nobody learned."""
    pytest.importorskip("torch")
    import given_bank

    loras = [random_lora(SHAPES, rank=8, seed=seed) for seed in range(3)]
    configs = [given_bank.planned(lora, 2000, 4, 64) for lora in loras]
    bank = given_bank.learned(loras[1:], configs[1:])
    assert bank.shape == (64, 4)
    learned, drawn = (given_bank.captured(loras[0], configs[0], one) for one in (bank, given_bank.random(4, 64)))
    assert 0.3 < drawn < learned < 1
