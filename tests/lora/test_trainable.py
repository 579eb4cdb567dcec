"""Compact adapters in training: what students show is what a file will hold, to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

torch = pytest.importorskip("torch")

from conftest import dense, random_lora
from models import wanted_base
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrconvert import api
from lrconvert.formats.lrc import file
from lrconvert.lora import fake_quant, packing
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.methods import base as methods

# Forms that train otherwise than any example: codes that move over banks of few bits.
MORE: dict[str, tuple[dict[str, Any], ...]] = {
    "vblora": tuple({"vector_length": 8, "num_vectors": 16, "bits": bits, "passes": 2} for bits in (4, 8))
}
FORMS = {name: (*methods.get(name).examples, *MORE.get(name, ())) for name in methods.module_names()}
EXAMPLES = [(name, n) for name, forms in FORMS.items() for n in range(len(forms))]


def made(name: str, n: int) -> CompactAdapter:
    """Form `n` of a method, of a random LoRA."""
    options = FORMS[name][n]
    return api.convert(source(name), name, **options, **wanted_base(name, options, source(name))).compact


def source(name: str) -> LoraAdapter:
    return random_lora([(24, 16), (16, 40)] if name != "vblora" else [(32, 16), (16, 48)])


# --- quantizers -----------------------------------------------------------------------------------------------------

_numbers = st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=9), elements=_numbers), st.integers(-60, 40))
def test_halves_are_those_of_a_file(values: np.ndarray, power: int) -> None:
    x = np.ldexp(values, power).astype(np.float32)
    halves = fake_quant.half(torch.from_numpy(x)).numpy()
    assert halves.tobytes() == (packing.round_half(x) + np.float32(0)).tobytes()


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, 7, elements=st.floats(-300, 300, width=32)), st.sampled_from((1, 2, 3, 4, 8)))
def test_odd_integers_are_the_nearest_there_are(x: np.ndarray, bits: int) -> None:
    allowed = packing.code_values(np.arange(1 << bits), bits)
    integers = fake_quant.odd(torch.from_numpy(x), bits).numpy()
    assert np.isin(integers, allowed).all()
    assert np.array_equal(np.abs(integers - x), np.abs(allowed[None] - x[:, None]).min(1))


def test_gradients_go_straight_through() -> None:
    for quantize in (lambda x: fake_quant.odd(x, 2), fake_quant.half):
        x = torch.randn(9, requires_grad=True)
        weights = torch.randn(9)
        (quantize(x) * weights).sum().backward()
        assert x.grad is not None and torch.equal(x.grad, weights)


# --- students -------------------------------------------------------------------------------------------------------


def same_payload(one: CompactAdapter, other: CompactAdapter) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        one.tensors[k].dtype == other.tensors[k].dtype and one.tensors[k].tobytes() == other.tensors[k].tobytes()
        for k in one.tensors
    )


@pytest.mark.medium
@pytest.mark.parametrize(("name", "n"), EXAMPLES)
def test_a_student_is_its_file(name: str, n: int) -> None:
    """At the start, and after steps in random directions: codes, scales and factors equal to the last bit."""
    compact = made(name, n)
    student = methods.get(name).student(compact)
    assert same_payload(student.compact(), compact)
    student.warm_start_latents(source(name).targets)
    assert same_payload(student.compact(), compact)
    draw = torch.Generator().manual_seed(0)
    for _ in range(2):
        values = student.values()
        factors = [student.factors(values, which) for which in range(len(compact.targets))]
        now = student.compact()
        list(file.encode(now))  # every rule of the format
        for (_, a, b), (ours_a, ours_b) in zip(methods.without_base(now), factors, strict=True):
            assert np.array_equal(ours_a.detach().numpy(), a) and np.array_equal(ours_b.detach().numpy(), b)
        total = sum((f * torch.randn(f.shape, generator=draw)).sum() for pair in factors for f in pair)
        gradients = torch.autograd.grad(total, list(student.parameters()))
        assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += torch.randn(parameter.shape, generator=draw)
        student.clamp_latents()
        assert not same_payload(student.compact(), now)


class _Made(TorchDispatchMode):
    """Counts the bytes that operations make, forward and backward."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        new = [x for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.nbytes += sum(x.untyped_storage().nbytes() for x in new if x.untyped_storage().data_ptr() not in given)
        return made


@pytest.mark.parametrize(("name", "n"), [pair for pair in EXAMPLES if pair[0] in ("lowrank", "nola", "vblora")])
def test_a_step_of_training_grows_as_the_targets_do(name: str, n: int) -> None:
    """No target's factors, nor their gradients, cost work on the numbers of all others."""

    def cost(count: int) -> int:
        pairs = random_lora([(32, 16), (16, 48)] * count, rank=4).targets
        lora = LoraAdapter(tuple(sorted(pairs, key=lambda pair: pair.target.name)))
        student = methods.get(name).student(api.convert(lora, name, **FORMS[name][n]).compact)
        with _Made() as made:
            factors = [f for pair in student.all_factors(student.values(True)) for f in pair if f.requires_grad]
            torch.autograd.backward(factors, [torch.ones_like(f) for f in factors])
        return made.nbytes

    assert cost(32) < 3 * cost(16)


@pytest.mark.parametrize(("name", "n"), [("sbora", 3), ("bone", 1), ("vblora", 0)])
def test_latents_lean_to_the_best_numbers(name: str, n: int) -> None:
    """Without the quantizer, what they lean to is nearer to the LoRA than what is stored."""
    lora, compact = source(name), made(name, n)
    student: Any = methods.get(name).student(compact)
    tensor = "vectors" if name == "vblora" else next(s.name for s in student.specs.values() if s.kind == "code")
    shift = student.shift(tensor, lora.targets)
    assert shift.any()
    values = student.values()

    def error(share: float) -> float:
        moved = {**values, tensor: values[tensor] + share * shift}
        pairs = [student.factors(moved, which) for which in range(len(compact.targets))]
        return sum(
            float(((b @ a).detach() - torch.from_numpy(dense(pair))).square().sum())
            for (a, b), pair in zip(pairs, lora.targets, strict=True)
        )

    assert error(0.2) < error(0.0)  # both factors move at once: all the way is too far


def test_codes_of_a_bank_move_to_the_nearest_vector() -> None:
    compact = made("vblora", 0)
    student: Any = methods.get("vblora").student(compact)
    with torch.no_grad():
        student.latents += torch.randn(student.latents.shape, generator=torch.Generator().manual_seed(0))
    student.clamp_latents()
    bank = torch.from_numpy(compact.tensors["bank"])
    best = torch.cdist(student.latents * student.unit_latents, bank).argmin(1)
    assert torch.equal(student.chosen, best)
    assert not np.array_equal(student.compact().tensors["indices"], compact.tensors["indices"])
