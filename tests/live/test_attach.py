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
from lrconvert.live.adapted_layer import lookup_scale
from lrconvert.live.attach import attach, detach, disabled, replaced, set_active
from lrconvert.lora.adapter import ExtraTensor, Target, View
from lrconvert.methods import base as methods
from lrconvert.methods.shared.plain_lora import plain_lora

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
        attach(three, plain_lora(compact))
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


def adapter_of(pairs: dict[str, Any], *, lora: Any = None) -> Any:
    """An adapter that has these values in place of parameters, beside the updates of `lora`."""
    extras = tuple(
        ExtraTensor(name, "F32", tuple(value.shape), value.detach().numpy().tobytes()) for name, value in pairs.items()
    )
    return replace(lora or random_lora([]), extras=extras)


def test_saved_ends_of_a_tied_model() -> None:
    """Each end has its own value while the adapter is active, whichever comes and goes, in copies too; the head can be
    trained alone; afterwards both ends share one parameter again."""
    model = oracle.transformer("LlamaForCausalLM", tie_word_embeddings=True)()
    x, before, names = inputs(LLAMA), snapshot(model), list(model.state_dict())
    ends = "model.embed_tokens.weight", "lm_head.weight"
    own = model.lm_head.weight
    one = {name: own + n for n, name in enumerate(ends, 1)}
    attach(model, adapter_of(one), name="both")
    attach(model, adapter_of({ends[1]: own + 3}), name="head")
    for active, added in ((("both",), (1, 2)), (("head",), (0, 3)), (("both", "head"), (1, 3)), ((), (0, 0))):
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            set_active(other, active)
            for name, n in zip(ends, added, strict=True):
                assert torch.equal(other.get_parameter(name), own + n), (active, name)
            assert list(other.state_dict()) == names
    set_active(model, "head")
    ((extra, head),) = replaced(model, "head", adapter_of({ends[1]: own}).extras)
    assert extra.name == ends[1] and head is model.lm_head.weight and not head.requires_grad
    model.requires_grad_(False)
    head.requires_grad_(True)
    model(x).logits.square().sum().backward()
    assert head.grad is not None and model.model.embed_tokens.weight.grad is None
    model.requires_grad_(True)
    detach(model)
    assert snapshot(model) == before and model.lm_head.weight is model.model.embed_tokens.weight


def test_a_saved_module_of_two_paths() -> None:
    """The path that the adapter names gets its value, as in PEFT; the other one keeps the module."""
    model = nn.ModuleDict({"one": nn.Linear(3, 3), "three": nn.Linear(3, 3)})
    model["two"] = model["one"]
    own, before, lora = model["one"].weight, snapshot(model), renamed(random_lora([(3, 3)]), "one.weight")
    attach(model, adapter_of({"one.weight": own + 1}), name="a")
    attach(model, adapter_of({"one.weight": own + 2}), name="b")
    attach(model, lora, name="c")
    for names, n in ((("a",), 1), (("b", "c"), 2), (("c",), 0)):
        set_active(model, names)
        assert torch.equal(model["one"].weight, own + n) and model["two"].weight is own
    x = torch.ones(2, 3)
    set_active(model, ("a", "c"))
    change = torch.from_numpy(lora.targets[0].scale * lora.targets[0].B @ lora.targets[0].A)
    assert torch.allclose(model["one"](x) - model["two"](x), x @ (change + 1).T, atol=1e-5)
    for name in ("b", "a", "c"):
        detach(model, name)
    assert snapshot(model) == before and model["one"] is model["two"]


def test_weights_that_are_used_without_their_layer(tmp_path: Path) -> None:
    """Trained rows and saved values are those of the layer's `weight`, as in PEFT; updates are not."""
    make = oracle.transformer("LlamaForCausalLM", tie_word_embeddings=True)
    oracle.train(make, tmp_path, target_modules=["q_proj"], trainable_token_indices=[2, 7])
    model, theirs = make(), oracle.peft_model(make, tmp_path).base_model.model
    own = model.lm_head.weight.detach().clone()
    attach(model, api.load_lora(tmp_path))
    for end in ("lm_head", "model.embed_tokens"):
        assert torch.equal(model.get_submodule(end).weight, theirs.get_submodule(end).weight)
    assert not torch.equal(model.lm_head.weight, own)
    set_active(model, ())
    assert torch.equal(model.lm_head.weight, own)


def test_trained_rows_of_an_output_layer_keep_its_bias() -> None:
    """PEFT's layer for them leaves it out; what it merges has it."""
    model, x = nn.Sequential(nn.Linear(6, 9)), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    rows, changed = torch.ones(2, 6), copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight[[3, 5]] = rows
    index = ExtraTensor("0.weight", "I64", (2,), np.array([3, 5]).tobytes(), "row_indices")
    values = ExtraTensor("0.weight", "F32", (2, 6), rows.numpy().tobytes(), "rows")
    attach(model, replace(random_lora([]), extras=(values, index)))
    assert torch.allclose(model(x), changed(x), atol=1e-6)


class Scaled(nn.Embedding):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * 3.5


class Normed(nn.Embedding):
    def forward(self, x: Any) -> Any:
        return nn.functional.normalize(super().forward(x), dim=-1)


class Offset(nn.Embedding):
    def forward(self, x: Any) -> Any:
        return super().forward(x + 2)


@pytest.mark.parametrize(("kind", "scale"), [(nn.Embedding, 1.0), (Scaled, 3.5), (Normed, None), (Offset, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_says_what_it_does(kind: Any, scale: float | None, dtype: Any) -> None:
    """Its scale is found by asking it, whatever its name; what else it does it does with trained rows, too."""
    layer = kind(9, 6).to(dtype)
    assert lookup_scale(layer) == scale
    model = nn.Sequential(layer)
    tokens, rows = torch.tensor([[0, 3, 5, 1, 6]]), torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    index = ExtraTensor("0.weight", "I64", (2,), np.array([3, 5]).tobytes(), "row_indices")
    values = ExtraTensor("0.weight", "F32", (2, 6), rows.numpy().tobytes(), "rows")
    attach(model, replace(random_lora([]), extras=(values, index)))
    changed = copy.deepcopy(layer)
    with torch.no_grad():
        changed.weight[[3, 5]] = rows.to(dtype)
    assert torch.equal(model(tokens), changed(tokens))


def test_the_live_model_says_how_it_stores_a_weight(tmp_path: Path) -> None:
    """Conv1D and square layers, whatever the adapter's flags say: a head beside `c_attn`, converted without a base."""
    make = oracle.transformer("GPT2LMHeadModel", n_embd=16, n_layer=1, n_head=2)
    oracle.train(make, tmp_path, target_modules=["c_attn", "c_proj", "lm_head"], init_lora_weights=False)
    x, lora = inputs(make), api.load_lora(tmp_path)
    theirs = oracle.outputs(oracle.peft_model(make, tmp_path), x)
    turned = {"matrix": View("transposed"), "transposed": View("matrix")}
    flags = tuple(
        replace(pair, target=Target(t.name, t.matrix_shape[:: 1 if turned[t.view.kind].text == "matrix" else -1], v))
        for pair in lora.targets
        for t, v in ((pair.target, turned[pair.target.view.kind]),)
    )
    for adapter in (lora, replace(lora, targets=flags)):
        model = make()
        attach(model, adapter)
        assert oracle.difference(oracle.outputs(model, x), theirs) <= 1e-6


@pytest.mark.parametrize("is_transposed", [True, False, None])
def test_square_experts_are_stored_as_their_module_says(is_transposed: bool | None) -> None:
    experts = nn.Module()
    experts.stack = nn.Parameter(torch.zeros(2, 5, 5))
    model = nn.ModuleDict({"experts": experts})
    (pair,) = random_lora([(5, 5)]).targets
    lora = replace(
        random_lora([]), targets=(replace(pair, target=Target("experts.stack", (2, 5, 5), View("expert:1"))),)
    )
    if is_transposed is None:
        with pytest.raises(LrcError, match=r"E-ORIENT.*Set `is_transposed`"):
            attach(model, lora)
        return
    experts.is_transposed = is_transposed
    attach(model, lora)
    delta = torch.from_numpy(pair.scale * pair.B @ pair.A)
    assert torch.allclose(experts.stack[1], delta.T if is_transposed else delta, rtol=1e-5)
    assert not experts.stack[0].any()


def test_a_stack_is_computed_once_in_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the module asks for it; frozen factors are stacked once, and again when they change."""
    config = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "vocab_size": 32}
    make = oracle.transformer("Qwen3MoeForCausalLM", **config)
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    oracle.train(make, tmp_path, target_modules=["q_proj"], target_parameters=stacks)
    x, lora, model = inputs(make), api.load_lora(tmp_path), make()
    model.config._experts_implementation = "eager"  # asks for every expert by itself
    products, stacked = [], []
    for name, calls in (("baddbmm", products), ("stack", stacked)):
        function = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=function, calls=calls, **k: calls.append(0) or f(*a, **k))
    source = attach(model, lora)
    first = oracle.outputs(model, x)
    assert (len(products), len(stacked)) == (2, 4)
    assert torch.equal(oracle.outputs(model, x), first) and (len(products), len(stacked)) == (4, 4)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(2)
    other = make()
    attach(other, lora, scale=4.0)
    assert oracle.difference(oracle.outputs(model, x), oracle.outputs(other, x)) <= 1e-6


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
    made = lrconvert.convert(lrconvert.load_lora(tmp_path / "lora"), "lowrank", bits=12)
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
