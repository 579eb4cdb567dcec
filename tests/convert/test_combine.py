"""Several adapters as one: the exact sum, PEFT's `add_weighted_adapter` where it is deterministic, DARE by its formula,
and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ADAPTERS, BASES, random_lora

from lrconvert import api
from lrconvert.convert.combine import arithmetic
from lrconvert.convert.combine.options import CombineOptions
from lrconvert.core import errors
from lrconvert.lora import prng
from lrconvert.lora.adapter import BaseFingerprint, ExtraTensor, LoraAdapter, View
from lrconvert.methods.shared.plain_lora import plain_lora

WEIGHTS = (0.7, -0.3, 1.4)


def deltas(lora: LoraAdapter) -> dict[str, np.ndarray]:
    """The dense updates (out, in), float64, by name."""
    return {p.target.name: p.scale * p.B.astype(np.float64) @ p.A.astype(np.float64) for p in lora.targets}


def weighted_sum(loras: list[LoraAdapter], weights: tuple[float, ...] = WEIGHTS) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for lora, weight in zip(loras, weights, strict=False):
        for name, delta in deltas(lora).items():
            total[name] = total.get(name, 0) + weight * delta
    return total


def near(one: dict[str, np.ndarray], other: dict[str, np.ndarray], tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name, delta in other.items():
        assert np.linalg.norm(one[name] - delta) <= tolerance * np.linalg.norm(delta), name


# --- the sum --------------------------------------------------------------------------------------------------------


def test_the_sum_is_exact_whatever_ranks_scales_and_signs_are() -> None:
    """The update of a sum is the weighted sum of the updates, up to the rounding of factors to F32; the rank is the sum
    of the ranks."""
    loras = [random_lora(rank=rank, scale=scale, seed=rank) for rank, scale in ((2, 2.0), (5, 0.3), (3, 1.0))]
    done = api.combine(list(zip(loras, WEIGHTS, strict=True)))
    near(deltas(done.lora), weighted_sum(loras))
    assert {pair.rank for pair in done.lora.targets} == {10}


def test_the_sum_of_equally_scaled_adapters_keeps_every_bit() -> None:
    loras = [random_lora(seed=seed) for seed in (1, 2)]
    done = api.combine([(lora, 0.5) for lora in loras])
    for pair, one, other in zip(done.lora.targets, *(lora.targets for lora in loras), strict=True):
        assert pair.scale == 0.5 * one.scale
        assert pair.a.array.tobytes() == one.a.array.tobytes() + other.a.array.tobytes()


def test_what_an_adapter_lacks_is_zero_and_said() -> None:
    """Targets are united, also where one names them with the prefix of its class; weights of zero take no rank."""
    whole = random_lora(seed=1)
    part = replace(random_lora(seed=2), targets=random_lora(seed=2).targets[:1])
    named = replace(
        part.targets[0], target=replace(part.targets[0].target, name=f"model.{part.targets[0].target.name}")
    )
    done = api.combine([whole, (replace(part, targets=(named,)), 2.0), (random_lora(seed=3), 0.0)])
    near(deltas(done.lora), weighted_sum([whole, part], (1.0, 2.0)))
    assert any("adapter 2 has no update of 1 of 2 targets" in line for line in done.warnings)


def test_compact_adapters_combine_as_their_expansions() -> None:
    loras = [random_lora(seed=seed) for seed in (1, 2)]
    files = [
        api.convert(lora, method, target_size=3000).compact
        for lora, method in zip(loras, ("lowrank", "vblora"), strict=True)
    ]
    done = api.combine([(files[0], 0.5), (files[1], 2.0)])
    near(deltas(done.lora), weighted_sum([plain_lora(f) for f in files], (0.5, 2.0)))


# --- PEFT -----------------------------------------------------------------------------------------------------------

MODES: list[tuple[str, dict[str, Any]]] = [
    *(("linear", {}), ("svd", {}), ("svd", {"rank": 3})),
    *((mode, {"density": 0.4}) for mode in ("magnitude_prune", "magnitude_prune_svd")),
    *((mode, {"density": 0.4, "sign": sign}) for mode in ("ties", "ties_svd") for sign in ("total", "frequency")),
]


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", ["tiny-llama", "tiny-gpt2"])
def test_the_updates_are_those_of_peft(tmp_path: Path, base: str) -> None:
    """Every mode that draws nothing, on linear layers, Conv1D and an embedding, with rsLoRA's and other scales and a
    negative weight: PEFT's own `add_weighted_adapter` on the live model has the same updates."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    modules = ["q_proj", "down_proj", "embed_tokens"] if base == "tiny-llama" else ["c_attn", "wte"]
    model = transformers.AutoModelForCausalLM.from_pretrained(BASES / base)
    alphas = {"one": (16, False), "two": (3, True), "three": (4, False)}
    for name, (alpha, rslora) in alphas.items():
        config = peft.LoraConfig(r=4, lora_alpha=alpha, use_rslora=rslora, target_modules=modules)
        model = peft.get_peft_model(model, config, name) if name == "one" else model
        if name != "one":
            model.add_adapter(name, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    for number, (mode, options) in enumerate(MODES):
        given = {"rank": "svd_rank", "sign": "majority_sign_method", "density": "density"}
        theirs = {given[key]: value for key, value in options.items()}
        model.add_weighted_adapter(list(alphas), list(WEIGHTS), f"c{number}", combination_type=mode, **theirs)
        ours = api.combine([(tmp_path / name, w) for name, w in zip(alphas, WEIGHTS, strict=True)], mode, **options)
        assert len(ours.lora.targets) >= 2
        for pair in ours.lora.targets:
            layer = model.get_submodule(f"base_model.model.{pair.target.name.removesuffix('.weight')}")
            expected = layer.get_delta_weight(f"c{number}").detach().double().numpy()
            delta = pair.scale * pair.B.astype(np.float64) @ pair.A.astype(np.float64)
            delta = delta.T if pair.target.view.kind == "transposed" else delta
            assert np.linalg.norm(delta - expected) <= 2e-5 * np.linalg.norm(expected), (
                mode,
                options,
                pair.target.name,
            )


# --- DARE -----------------------------------------------------------------------------------------------------------


def test_dare_is_its_formula_with_seeded_masks() -> None:
    """A number is kept where the upper 24 bits of its seeded word are below 2^24 times the density; what is kept is
    divided by the density, then weighted and summed."""
    loras = [random_lora(seed=seed) for seed in (1, 2)]
    done = api.combine([(loras[0], 0.7), (loras[1], 0.3)], "dare_linear_svd", density=0.5, rank=16, seed=7)
    expected: dict[str, np.ndarray] = {}
    for number, (lora, weight) in enumerate(zip(loras, (0.7, 0.3), strict=True)):
        for name, delta in deltas(lora).items():
            words = prng.words(prng.Stream(7, f"combine/{number}/{name}/"), [0], 0, delta.size)[0]
            kept = (words >> 8 < 1 << 23).reshape(delta.shape)
            expected[name] = expected.get(name, 0) + weight * kept * delta / 0.5
    near(deltas(done.lora), expected)
    again = api.combine([(loras[0], 0.7), (loras[1], 0.3)], "dare_linear_svd", density=0.5, rank=16, seed=7)
    other = api.combine([(loras[0], 0.7), (loras[1], 0.3)], "dare_linear_svd", density=0.5, rank=16, seed=8)
    assert again.lora.targets == done.lora.targets and other.lora.targets != done.lora.targets


def test_masks_are_the_same_on_every_machine() -> None:
    """The kept places of a known seed and label, as written down."""
    kept = np.flatnonzero(arithmetic.dropped(np.ones(16), 0.25, prng.Stream(3, "combine/0/w/")))
    assert kept.tolist() == KEPT


KEPT = [2, 5, 6, 8, 9, 14]


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_dare_keeps_the_mean(density: float) -> None:
    x = np.linspace(1, 2, 20_000)
    assert abs(arithmetic.dropped(x, density, prng.Stream(0, "x")).mean() / x.mean() - 1) < 0.05


def test_of_equal_numbers_pruning_keeps_the_first() -> None:
    assert arithmetic.largest(np.array([1.0, -2.0, 1.0, 1.0]), 0.5).tolist() == [1.0, -2.0, 0.0, 0.0]


# --- what is refused ------------------------------------------------------------------------------------------------

HEAD = ExtraTensor("score.weight", "F32", (2,), np.ones(2, "<f4").tobytes())
OTHER = replace(HEAD, data=np.zeros(2, "<f4").tobytes())
BIAS = ExtraTensor("t0.bias", "F32", (2,), np.array([1, 2], "<f4").tobytes(), "add")


def test_extra_tensors_that_differ_need_a_decision() -> None:
    one, other = replace(random_lora(), extras=(HEAD,)), replace(random_lora(), extras=(OTHER,))
    assert api.combine([one, one]).lora.extras == (HEAD,)
    with pytest.raises(errors.PlacementError, match="extras='first'"):
        api.combine([one, other])
    assert api.combine([one, other], extras="first").lora.extras == (HEAD,)
    assert api.combine([one, other], extras="drop").lora.extras == ()


def test_biases_of_loras_are_summed() -> None:
    lora = replace(random_lora(), extras=(BIAS,))
    (bias,) = api.combine([(lora, 0.5), (lora, 2.0)]).lora.extras
    assert np.frombuffer(bias.data, "<f4").tolist() == [2.5, 5.0]
    with pytest.raises(errors.PlacementError, match="ties says nothing of biases"):
        api.combine([lora, lora], "ties", density=0.5)


def _dora() -> LoraAdapter:
    return api.load_lora(ADAPTERS / "llama-dora")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: api.combine([]), errors.OptionError, "no adapter"),
        (lambda: api.combine([_dora(), _dora()]), errors.OptionError, "bake_dora=32"),
        (lambda: api.combine([random_lora(), random_lora(rank=2)], "linear"), errors.OptionError, "ranks 4, 2"),
        (lambda: api.combine([random_lora(), random_lora(((8, 8), (16, 40)))]), errors.BaseError, "in 'adapter 2'"),
        (lambda: api.combine([random_lora()], "ties"), errors.OptionError, "needs density"),
        (lambda: api.combine([random_lora()], "sum", density=0.5), errors.OptionError, "prunes nothing"),
        (lambda: api.combine([random_lora()], "sum", rank=2), errors.OptionError, "cuts no rank"),
        (lambda: api.combine([(random_lora(), 0.0)]), errors.EmptyAdapterError, "all weights are zero"),
        (lambda: api.combine([(random_lora(), float("nan"))]), errors.OptionError, "finite"),
        (lambda: api.combine([(random_lora(), "x")]), errors.ArgumentError, "weight of an adapter"),  # type: ignore[list-item]
        (lambda: api.combine([random_lora()], "avarage"), errors.OptionError, "takes sum, svd"),
        (lambda: api.combine([random_lora()], target_size=5), errors.OptionError, "no option 'target_size'"),
    ],
)
def test_refusals(call: Callable[[], Any], error: type[errors.LrcError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_adapters_of_other_bases_are_refused() -> None:
    small = api.convert(random_lora(), "lowrank", target_size=3000).compact
    one, other = (replace(small, base=BaseFingerprint(small.base.names, digit * 64)) for digit in "12")
    with pytest.raises(errors.FingerprintError):
        api.combine([one, other])


def test_views_stay() -> None:
    lora = random_lora(view=View("transposed"))
    assert api.combine([lora, lora]).lora.shapes() == lora.shapes()


def test_options_say_what_prunes() -> None:
    assert [m for m in ("sum", "ties_svd", "linear") if CombineOptions(m).prunes] == ["ties_svd"]
