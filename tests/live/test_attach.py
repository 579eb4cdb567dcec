"""Adapters on live models: as PEFT computes, with exact gradients, and gone without a trace."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import peft_oracle as oracle
from conftest import random_lora
from models import renamed
from test_reader_variants import CASES, LLAMA, NET, inputs
from torch import nn

from lrconvert import api
from lrconvert.core.errors import AttachError, BaseError, BudgetError, LrcError, OptionError
from lrconvert.formats import fidelity
from lrconvert.live.attach import attach, detach, disabled, set_active
from lrconvert.lora.adapter import ExtraTensor
from lrconvert.methods import base as methods

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's


def converted(lora: Any, method: str) -> Any:
    """`lora` in a form, by the first of its examples that suits the tiny models here."""
    refused = None
    for options in methods.get(method).examples:
        try:
            return api.convert(lora, method, **options).compact
        except (OptionError, BudgetError) as error:
            refused = error
    raise AssertionError(refused)


def snapshot(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything that makes a model the object it is."""
    modules = [(name, id(module), type(module), module.training) for name, module in model.named_modules()]
    values = [
        (name, id(p), p.data_ptr(), p.requires_grad, p.detach().clone().numpy().tobytes())
        for name, p in model.named_parameters(remove_duplicate=False)
    ]
    return [*modules, *values, tuple(model.state_dict())]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.medium
def test_as_peft_computes(name: str, tmp_path: Path) -> None:
    make, config, _, _ = CASES[name]
    oracle.train(make, tmp_path, **{"init_lora_weights": False, **config})
    x, lora, model = inputs(make), api.load_lora(tmp_path), make()
    before, plain = snapshot(model), oracle.outputs(model, x)
    theirs = oracle.outputs(oracle.peft_model(make, tmp_path), x)
    attach(model, lora)
    assert oracle.difference(oracle.outputs(model, x), theirs) <= 1e-5
    with disabled(model):
        assert torch.equal(oracle.outputs(model, x), plain)
    assert oracle.difference(oracle.outputs(model, x), theirs) <= 1e-5
    detach(model)
    assert snapshot(model) == before
    assert torch.equal(oracle.outputs(model, x), plain)


@pytest.mark.parametrize("method", methods.module_names())
@pytest.mark.medium
def test_compact_adapters_compute_as_they_expand(method: str, tmp_path: Path) -> None:
    for n, name in enumerate(("every layer", "experts, ranks by pattern", "DoRA, Conv1D")):
        make, config, _, _ = CASES[name]
        oracle.train(make, tmp_path / str(n), **{"init_lora_weights": False, **config})
        lora = api.load_lora(tmp_path / str(n))
        compact = converted(lora, method)
        x, one, two, three = inputs(make), make(), make(), make()
        attach(one, compact, trainable=True)
        attach(two, compact)
        attach(three, fidelity.expanded(compact))
        outputs = [oracle.outputs(model, x) for model in (one, two, three)]
        assert max(oracle.difference(one, outputs[2]) for one in outputs[:2]) <= 1e-5


def test_several_by_name(tmp_path: Path) -> None:
    """They add up, are switched, and leave in any order."""
    loras = []
    for n, modules in enumerate((["q_proj", "o_proj"], ["q_proj", "down_proj"])):
        oracle.train(LLAMA, tmp_path / str(n), target_modules=modules, disturb=0.1 * (n + 1))
        loras.append(api.load_lora(tmp_path / str(n)))
    x, model = inputs(LLAMA), LLAMA()
    before = snapshot(model)
    alone = []
    for lora in loras:
        other = LLAMA()
        attach(other, lora)
        alone.append(oracle.outputs(other, x))
    attach(model, loras[0], name="one")
    attach(model, loras[1], name="two", scale=0.5)
    both = oracle.outputs(model, x)
    merged = oracle.merged(loras[0], LLAMA())
    with torch.no_grad():
        for key, delta in oracle.deltas(loras[1]).items():
            merged.get_parameter(key).add_(torch.from_numpy(0.5 * delta))
    assert oracle.difference(both, oracle.outputs(merged, x)) <= 1e-5
    set_active(model, "one")
    assert oracle.difference(oracle.outputs(model, x), alone[0]) <= 1e-6
    with pytest.raises(AttachError, match="there is no adapter 'three'"):
        set_active(model, ["one", "three"])
    with pytest.raises(AttachError, match="is taken"):
        attach(model, loras[1], name="two")
    detach(model, "one")
    set_active(model, "two")
    attach(model, loras[0], name="one")
    assert oracle.difference(oracle.outputs(model, x), both) <= 1e-6
    detach(model, "two")
    detach(model, "one")
    assert snapshot(model) == before
    with pytest.raises(AttachError):
        detach(model, "one")


def test_heads_of_several_adapters() -> None:
    """Each adapter has its own head whenever it is active, in whatever order they come and go."""
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 3))
    plain, before = model[1].weight.detach().clone(), snapshot(model)
    lora = renamed(random_lora([(24, 16)]), "0.weight")
    for n in (1, 2, 3):
        head = ExtraTensor("1.weight", "F32", (3, 24), np.full((3, 24), n, np.float32).tobytes())
        attach(model, replace(lora, extras=(head,)), name=f"a{n}")
    for names, value in (("a1", 1), ("a3", 3), ((), 0), (("a1", "a2"), 2), (("a2", "a1"), 1), (("a3",), 3)):
        set_active(model, names)
        assert torch.equal(model[1].weight, plain if value == 0 else torch.full((3, 24), float(value)))
    set_active(model, ("a1", "a2"))
    detach(model, "a1")
    assert bool((model[1].weight == 2).all())
    detach(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_a_copy_has_adapters_of_its_own(copied: Any) -> None:
    model, x = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 3)), torch.ones(2, 16)
    plain = model(x)
    lora = renamed(random_lora([(24, 16)]), "0.weight")
    attach(model, lora)
    adapted, other = model(x), copied(model)
    assert torch.equal(other(x), adapted) and not torch.equal(adapted, plain)
    set_active(other, ())
    assert torch.equal(other(x), plain) and torch.equal(model(x), adapted)
    detach(other)
    assert torch.equal(other(x), plain) and torch.equal(model(x), adapted) and type(other[0]) is nn.Linear
    detach(model)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("method", ["lora", *methods.module_names()])
def test_gradients(method: str, tmp_path: Path) -> None:
    """Against finite differences of every number that is trained; compact forms expand in float32."""
    oracle.train(NET, tmp_path, **{"target_modules": ["conv1", "lin", "emb"], "r": 2, "init_lora_weights": False})
    lora = api.load_lora(tmp_path)
    adapter = lora if method == "lora" else converted(lora, method)
    model, x = NET().double(), inputs(NET)
    source = attach(model, adapter, dtype=torch.float64, trainable=True)
    assert {id(p) for p in source.parameters()} <= {id(p) for p in model.parameters()}
    width, tolerance = (1e-6, 1e-5) if method == "lora" else (1e-3, 1e-2)
    weights = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss() -> Any:
        return (model(x) * weights).sum()

    loss().backward()
    for name, parameter in source.named_parameters():
        assert parameter.grad is not None, name
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        direction *= parameter.detach().square().mean().sqrt().clamp(min=1e-30)  # scales are small numbers
        with torch.no_grad():
            steps = []
            for step in (width, -width):
                parameter += step * direction
                steps.append(loss())
                parameter -= step * direction
        slope = (steps[0] - steps[1]) / (2 * width)
        assert torch.isclose(slope, (parameter.grad * direction).sum(), rtol=tolerance, atol=tolerance), name


def test_mixed_precision(tmp_path: Path) -> None:
    """A bf16 model with the adapter in fp32, as PEFT holds it."""
    oracle.train(LLAMA, tmp_path, target_modules=["q_proj", "lm_head"])
    model = LLAMA().to(torch.bfloat16)
    x = inputs(LLAMA)
    source = attach(model, api.load_lora(tmp_path))
    assert {p.dtype for p in source.parameters()} == {torch.float32}
    theirs = peft.PeftModel.from_pretrained(LLAMA().to(torch.bfloat16), str(tmp_path)).eval()
    assert model(x).logits.dtype == torch.bfloat16
    assert torch.equal(model(x).logits, theirs(x).logits)


@pytest.mark.medium
@pytest.mark.parametrize("name", ("every layer", "DoRA", "tokens, tied", "lora_bias"))
def test_compiles_in_one_graph(name: str, tmp_path: Path) -> None:
    make, config, _, _ = CASES[name]
    oracle.train(make, tmp_path, **config)
    model, x = make(), inputs(make)
    attach(model, api.load_lora(tmp_path))
    expected = oracle.outputs(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert oracle.difference(oracle.outputs(compiled, x), expected) <= 1e-6


def test_what_does_not_fit_leaves_the_model_alone(tmp_path: Path) -> None:
    oracle.train(LLAMA, tmp_path / "llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    oracle.train(NET, tmp_path / "net", target_modules=["lin"])
    model = LLAMA()
    before = snapshot(model)
    for lora, error in ((api.load_lora(tmp_path / "net"), BaseError), (random_lora(), BaseError)):
        with pytest.raises(error):
            attach(model, lora)
        assert snapshot(model) == before
    with pytest.raises(LrcError, match="is no identifier"):
        attach(model, api.load_lora(tmp_path / "llama"), name="a.b")
    wide = oracle.transformer("LlamaForCausalLM", vocab_size=40)()
    with pytest.raises(LrcError, match="E-PLACE"):
        attach(wide, api.load_lora(tmp_path / "llama"))
    assert "_lrconvert" not in vars(wide) and "_lrconvert" not in vars(model)


def test_the_api_takes_files(tmp_path: Path) -> None:
    import lrconvert

    oracle.train(LLAMA, tmp_path / "lora", target_modules=["q_proj"])
    made = lrconvert.convert(lrconvert.load_lora(tmp_path / "lora"), "lowrank", bits=16)
    lrconvert.write(made.compact, tmp_path / "x.lrc")
    x, model = inputs(LLAMA), LLAMA()
    before = snapshot(model)
    outputs = []
    for path in (tmp_path / "lora", tmp_path / "x.lrc"):
        lrconvert.attach(model, path, name="it")
        outputs.append(oracle.outputs(model, x))
        with lrconvert.disabled(model):
            assert oracle.difference(oracle.outputs(model, x), outputs[-1]) > 1e-3
        lrconvert.set_active(model, "it")
        lrconvert.detach(model, "it")
    assert oracle.difference(*outputs) < 1e-2 and snapshot(model) == before


def test_four_bit_layers(tmp_path: Path) -> None:
    """Layers of bitsandbytes, which run on a CPU too."""
    bnb = pytest.importorskip("bitsandbytes")
    for config in ({}, {"use_dora": True}):
        oracle.train(WIDE, tmp_path / str(len(config)), target_modules=["0"], **config)
        lora = api.load_lora(tmp_path / str(len(config)))
        model = WIDE()
        layer = bnb.nn.Linear4bit(64, 64, bias=True, compute_dtype=torch.float32, quant_type="nf4")
        layer.load_state_dict(model[0].state_dict())
        model[0] = layer.to("cpu")
        plain = WIDE()
        with torch.no_grad():
            weight = bnb.functional.dequantize_4bit(model[0].weight.data, model[0].weight.quant_state)
            plain[0].weight.copy_(weight)
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        attach(model, lora)
        attach(plain, lora)
        assert oracle.difference(oracle.outputs(model, x), oracle.outputs(plain, x)) <= 1e-4


def test_accelerate() -> None:
    """Under accelerate (prepare, accumulate, clip) a model with an adapter trains as without."""
    accelerate = pytest.importorskip("accelerate")
    lora = renamed(random_lora([(24, 16), (40, 24)]), "0.weight", "2.weight")
    halves = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(3)).double()
    trained = []
    for accelerator in (None, accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 40)).double().requires_grad_(False)
        source = attach(model, lora, dtype=torch.float64, trainable=True)
        step: Any = torch.optim.SGD(source.parameters(), lr=0.1)
        if accelerator is None:
            for _ in range(3):
                step.zero_grad()
                sum(model(half).square().mean() / 2 for half in halves).backward()
                nn.utils.clip_grad_norm_(source.parameters(), 0.5)
                step.step()
        else:
            whole, step = accelerator.prepare(model, step)
            for half in [half for _ in range(3) for half in halves]:
                with accelerator.accumulate(whole):
                    accelerator.backward(whole(half).square().mean())
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(source.parameters(), 0.5)
                    step.step()
                    step.zero_grad()
            assert accelerator.unwrap_model(whole) is model
        trained.append([p.detach().clone() for p in source.parameters()])
    for a, b in zip(*trained, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))


WIDE = oracle.seeded(wide)

_DDP = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
sys.path[:0] = {paths!r}
from torch.nn.parallel import DistributedDataParallel
from conftest import random_lora
from models import renamed
from lrconvert.live.attach import attach

def run(rank, world, store, results):
    torch.manual_seed(0)
    layers = torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 40)
    model = torch.nn.Sequential(*layers).double().requires_grad_(False)
    lora = renamed(random_lora(((24, 16), (40, 24))), "0.weight", "2.weight")
    source = attach(model, lora, dtype=torch.float64, trainable=True)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{{store}}", rank=rank, world_size=world)
        model, x = DistributedDataParallel(model), x[rank::world]
    step = torch.optim.SGD(source.parameters(), lr=0.1)
    for _ in range(3):
        step.zero_grad()
        model(x).square().mean().backward()
        step.step()
    if rank == 0:
        torch.save([p.detach() for p in source.parameters()], f"{{results}}/{{world}}.pt")

if __name__ == "__main__":
    run(0, 1, "", sys.argv[1])
    mp.spawn(run, (2, sys.argv[1] + "/store", sys.argv[1]), nprocs=2)
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    import subprocess
    import sys

    script = tmp_path / "ddp.py"
    script.write_text(_DDP.format(paths=[str(Path(__file__).parent), str(Path(__file__).parent.parent)]))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), (a - b).abs().max()
