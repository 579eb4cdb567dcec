"""Merges on models of many kinds: what is tied, how experts are stored, what is quantized; and that what is written
loads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from architectures import ARCHITECTURES, Architecture
from models import config_of, load_all, one_target, save_base, tree

from lrconvert import api
from lrconvert.api import merge, unmerge, verify
from lrconvert.core.dtypes import Stored
from lrconvert.core.errors import BaseError, PlacementError, QuantizedBaseError
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.lora.adapter import LoraAdapter, Provenance, Target
from lrconvert.merge.plan import load_check
from lrconvert.merge.plan.load_check import Named

EXACT = 1e-5  # of the adapter's own effect, in float32


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def adapted(architecture: Architecture, base: Path, folder: Path, **options: Any) -> Any:
    """Save an adapter of PEFT with random factors, and return the model with it."""
    torch.manual_seed(7)
    model = peft.get_peft_model(architecture.load(base), peft.LoraConfig(r=4, init_lora_weights=False, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def load_clean(architecture: Architecture, folder: Path) -> Any:
    """The model that a folder holds; every tensor is found, and none is left over."""
    model, report = architecture.kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def ends(model: Any) -> dict[str, str]:
    """The modules of the input and output embeddings."""
    both = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    return {end: next(name for name, other in model.named_modules() if other is module) for end, module in both.items()}


TIED = ("llama-tied", "gpt2", "gemma3", "mamba", "biogpt", "modernbert", "bert", "whisper", "bart")


@pytest.mark.medium
@pytest.mark.parametrize("name", TIED)
def test_one_end_of_a_tie_changes_alone(name: str, tmp_path: Path) -> None:
    """A LoRA on one of the tied embeddings, or that one saved whole: what PEFT computes with the adapter attached, in a
    folder that loads without a missing or unexpected tensor, and back to the last byte."""
    architecture = ARCHITECTURES[name]
    base = architecture.save(tmp_path / "base")
    plain = architecture.logits(architecture.load(base))
    for end, module in ends(architecture.load(base)).items():
        for kind in ("target_modules", "modules_to_save"):
            place = tmp_path / f"{end}-{kind}"
            options = {"target_modules": [*architecture.linear], kind: [module]}
            expected = architecture.logits(adapted(architecture, base, place / "adapter", **options))
            api.merge(base, place / "adapter", place / "out")
            error = (architecture.logits(load_clean(architecture, place / "out")) - expected).norm()
            assert error <= EXACT * (expected - plain).norm() or error <= 1e-6 * expected.norm(), (end, kind)
            assert config_of(place / "out")["tie_word_embeddings"] is False
            assert api.verify(place / "out", base, place / "adapter").ok
            api.unmerge(place / "out", place / "back")
            assert tree(place / "back") == tree(base)


def test_both_ends_that_change_alike_stay_tied(tmp_path: Path) -> None:
    """PEFT's `ensure_weight_tying` gives both ends one update: nothing is untied."""
    architecture = ARCHITECTURES["llama-tied"]
    base = architecture.save(tmp_path / "base")
    options = {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True}
    expected = architecture.logits(adapted(architecture, base, tmp_path / "adapter", **options))
    api.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert load_all(tmp_path / "out").keys() == load_all(base).keys()
    got = architecture.logits(load_clean(architecture, tmp_path / "out"))
    assert (got - expected).norm() <= EXACT * expected.norm()


@pytest.mark.parametrize("end", ("shared", "lm_head"))
def test_a_tie_that_cannot_be_saved_apart_is_refused(end: str, tmp_path: Path) -> None:
    """T5's class ties whatever its configuration says: numbers that it would not load are not written."""
    architecture = ARCHITECTURES["t5"]
    base = architecture.save(tmp_path / "base")
    adapted(architecture, base, tmp_path / "adapter", target_modules=["q", end])
    with pytest.raises(PlacementError, match=r"are one tensor, of which only one end changes, and T5ForCond.* Use an"):
        api.merge(base, tmp_path / "adapter", tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("name", ("llama", "llama-tied", "mamba", "bert"))
def test_resized_embeddings_with_a_lora(name: str, tmp_path: Path) -> None:
    """An adapter with more tokens than its base has their rows beside it: the merged model has them, too."""
    architecture = ARCHITECTURES[name]
    base = architecture.save(tmp_path / "base")
    model = architecture.load(base)
    model.resize_token_embeddings(44, mean_resizing=False)
    names = ends(model)
    options = {"target_modules": [*architecture.linear, *names.values()]}
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **options))
    model.save_pretrained(tmp_path / "adapter")
    expected = architecture.logits(model, 44)
    api.merge(base, tmp_path / "adapter", tmp_path / "out")
    merged = load_clean(architecture, tmp_path / "out")
    assert merged.config.vocab_size == 44
    assert (architecture.logits(merged, 44) - expected).norm() <= EXACT * expected.norm()
    api.unmerge(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)
    made = api.convert(api.load_lora(tmp_path / "adapter"), "lowrank", bits=14, base=base)
    shapes = {target.name: target.shape for target in made.compact.targets}
    assert {shapes[f"{module}.weight"] for module in names.values()} == {(44, 16)}


def test_classes_that_are_not_known_are_not_guessed(tmp_path: Path) -> None:
    """Where transformers has no class, what a base says and stores counts; an embedding that may be a head, too, under
    a name that nobody knows, is refused."""
    embedding, head = "model.tok.weight", "model.out.weight"
    config = {"model_type": "our_own", "architectures": ["OurOwnForCausalLM"], "vocab_size": 6}
    stored = {embedding: Stored("F32", np.ones((6, 4), "<f4")), "model.norm.weight": Stored("F32", np.ones(4, "<f4"))}
    lora = lora_of(Target(embedding, (6, 4)))
    base = save_base(tmp_path / "alone", [stored], config)
    with pytest.raises(PlacementError, match=r"'model.tok.weight' may be tied .* no class 'OurOwnForCausalLM'"):
        merge(base, [lora], tmp_path / "never")
    apart = save_base(tmp_path / "apart", [{**stored, head: Stored("F32", np.zeros((6, 4), "<f4"))}], config)
    said = save_base(tmp_path / "said", [stored], {**config, "tie_word_embeddings": False})
    for base in (apart, said):
        report = merge(base, [lora], tmp_path / f"{base.name}-out")
        assert not report.config and load_all(tmp_path / f"{base.name}-out").keys() == load_all(base).keys()


# --- experts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("gpt-oss-square", "gpt-oss"))
def test_experts_stored_in_out(name: str, tmp_path: Path) -> None:
    """The class says how stacks are stored, wherever the base lies."""
    architecture = ARCHITECTURES[name]
    base = architecture.save(tmp_path / "base")
    options = {"target_modules": ["q_proj"], "target_parameters": [*architecture.experts]}
    expected = architecture.logits(adapted(architecture, base, tmp_path / "adapter", **options))
    plain = architecture.logits(architecture.load(base))
    api.merge(base, tmp_path / "adapter", tmp_path / "out")
    got = architecture.logits(load_clean(architecture, tmp_path / "out"))
    assert (got - expected).norm() <= EXACT * (expected - plain).norm()


def lora_of(*targets: Target) -> LoraAdapter:
    return LoraAdapter(tuple(one_target(target, seed=n) for n, target in enumerate(sorted(targets))))


def test_layers_of_experts_find_their_rows_in_a_stack(tmp_path: Path) -> None:
    """An adapter of single experts on a base that holds them as stacks, (experts, out, in) or (experts, in, out)."""
    rng = np.random.default_rng(0)
    stack, down = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
    shapes = {stack: (3, 12, 8), down: (3, 6, 10)}
    stored = {name: Stored("F32", rng.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}
    base = save_base(tmp_path / "base", [stored], {"model_type": "llama"})
    lora = lora_of(
        Target("model.layers.0.mlp.experts.2.gate_proj.weight", (6, 8)),
        Target("model.layers.0.mlp.experts.1.up_proj.weight", (6, 8)),
        Target("model.layers.0.mlp.experts.down_projs.1.weight", (10, 6)),
    )
    merge(base, [lora], tmp_path / "out")
    after = load_all(tmp_path / "out")
    wanted = {name: value.array.astype(np.float64) for name, value in stored.items()}
    updates = {pair.target.name.split("experts.")[1]: pair.scale * pair.B @ pair.A for pair in lora.targets}
    wanted[stack][2, :6] += updates["2.gate_proj.weight"]
    wanted[stack][1, 6:] += updates["1.up_proj.weight"]
    wanted[down][1] += updates["down_projs.1.weight"].T
    for name, values in wanted.items():
        assert np.allclose(after[name].array, values, rtol=1e-6, atol=1e-6)
    unmerge(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)
    with pytest.raises(BaseError, match=r"'.*experts.0.up_proj.weight' is \[5, 8\] \(out, in\) in the adapter"):
        merge(base, [lora_of(Target("model.layers.0.mlp.experts.0.up_proj.weight", (5, 8)))], tmp_path / "never")


# --- quantized layers -----------------------------------------------------------------------------------------------


def partly_quantized(folder: Path, method: str) -> tuple[Path, Architecture]:
    """A tiny gpt-oss whose experts are stored quantized, and its attention is not."""
    architecture = ARCHITECTURES["gpt-oss"]
    architecture.save(folder)
    stored = load_all(folder)
    for name in [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inner, out = stored.pop(name).shape
        if method == "mxfp4":
            stored[f"{name}_blocks"] = Stored("U8", np.zeros((experts, out, 1, inner // 2), np.uint8))
            stored[f"{name}_scales"] = Stored("U8", np.zeros((experts, out, 1), np.uint8))
        else:
            stored[name] = Stored("F8_E4M3", np.zeros((experts, inner, out), np.uint8))
            stored[f"{name}_scale_inv"] = Stored("F32", np.ones((experts, 1, 1), np.float32))
    config = config_of(folder) | {"quantization_config": {"quant_method": method}}
    return save_base(folder.with_name("quantized"), [stored], config), architecture


@pytest.mark.parametrize("method", ("mxfp4", "fp8"))
def test_layers_that_are_not_quantized_merge(method: str, tmp_path: Path) -> None:
    """Of quantized layers beside them nothing is needed: they are copied, a merge is undone to the last byte, and
    `convert --base` takes even their shapes, from the class. An update of theirs is refused by the method's name."""
    base, architecture = partly_quantized(tmp_path / "base", method)
    adapted(architecture, tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
    before = load_all_quantized(base)
    for in_place in (False, True):
        if in_place:
            api.merge(base, tmp_path / "adapter", in_place=True)
            changed = load_all_quantized(base)
            api.unmerge(base, in_place=True)
        else:
            api.merge(base, tmp_path / "adapter", tmp_path / "out")
            changed = load_all_quantized(tmp_path / "out")
            assert api.verify(tmp_path / "out", base, tmp_path / "adapter").ok
            api.unmerge(tmp_path / "out", tmp_path / "back")
            assert tree(tmp_path / "back") == tree(base)
        moved = {name for name in before if before[name] != changed[name]}
        assert moved and all(name.endswith(("q_proj.weight", "o_proj.weight")) for name in moved)
        assert load_all_quantized(base) == before
    experts = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": ["q_proj"]}
    adapted(architecture, tmp_path / "base", tmp_path / "experts", **experts)
    made = api.convert(api.load_lora(tmp_path / "experts"), "lowrank", bits=12, base=base)
    assert {t.shape for t in made.compact.targets if "experts" in t.name} == {(4, 24, 16)}
    with pytest.raises(QuantizedBaseError, match=f"down_proj.* stored quantized, by {method}. Use the unquantized"):
        api.merge(base, tmp_path / "experts", tmp_path / "never")


def load_all_quantized(folder: Path) -> dict[str, Stored]:
    with open_checkpoint(folder, quantized=True) as checkpoint:
        return {name: checkpoint.file_of(info).load(info) for name, info in checkpoint.tensors.items()}


# --- whether it loads -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ARCHITECTURES["llama"].save(tmp_path_factory.mktemp("llama") / "base")


def test_what_would_not_load_is_not_written(llama: Path) -> None:
    """A name that is missing, one too many, another shape, and fields that do not go with what is stored."""
    with open_checkpoint(llama) as checkpoint:
        own = [Named(name, info.shape, name) for name, info in checkpoint.tensors.items()]
        config = checkpoint.config
        assert load_check.check(own, checkpoint, config) == ""
        norm = next(each for each in own if each.name == "model.norm.weight")
        rest = [each for each in own if each is not norm]
        cases = {
            "'model.norm.weight' is missing": (rest, config),
            "'model.norm.other' is not in": ([*own, Named("model.norm.other", (3,))], config),
            "'model.norm.weight' is .3., and .16.": ([*rest, Named(norm.name, (3,), "")], config),
            "'score.weight' is missing": (own, {**config, "architectures": ["LlamaForSequenceClassification"]}),
            "is .40, 16., and .48, 16.": (own, {**config, "vocab_size": 48}),
        }
        for what, (tensors, fields) in cases.items():
            with pytest.raises(PlacementError, match=f"E-PLACE: .*would not load: .*{what}"):
                load_check.check(tensors, checkpoint, fields)
        unknown = {**config, "architectures": ["OurOwnForCausalLM"]}
        assert "no class OurOwnForCausalLM" in load_check.check(own, checkpoint, unknown)


def test_verify_says_what_does_not_load(llama: Path, tmp_path: Path) -> None:
    lora = lora_of(Target("model.layers.0.mlp.up_proj.weight", (24, 16)))
    lora = replace(lora, provenance=Provenance(task_type="CAUSAL_LM"))
    merge(llama, [lora], tmp_path / "out")
    assert verify(tmp_path / "out", llama, [lora]).ok
    stored = load_all(tmp_path / "out")
    stored["proj_out.weight"] = stored.pop("lm_head.weight")
    other = save_base(tmp_path / "other", [stored], json.loads((tmp_path / "out" / "config.json").read_text()))
    report = verify(other, llama, [lora])
    texts = [each.what for each in report.differences if each.name == "loading"]
    assert not report.ok and texts == [
        "'lm_head.weight' is missing in the tensors of LlamaForCausalLM",
        "'proj_out.weight' is not in LlamaForCausalLM",
    ]
