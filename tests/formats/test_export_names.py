"""Names of exports: those of the class that the base is loaded in, whatever the source called its modules."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ADAPTERS, BASES
from peers.cases import PREFIX, plain, renamed

from lrconvert import api
from lrconvert.core import errors
from lrconvert.formats.base_class import NAMES
from lrconvert.lora import class_names
from lrconvert.lora.adapter import CompactAdapter, Target, View
from lrconvert.methods import base as methods

LLAMA = BASES / "tiny-llama"
# What reports show of names for a model.layers.0.self_attn.q_proj.
SPELLINGS = {
    "right": (PREFIX, PREFIX),
    "one too few": (f"{PREFIX}model.", PREFIX),
    "one too many": (f"{PREFIX}model.", f"{PREFIX}model.model."),
}
QV = ("self_attn.q_proj", "self_attn.v_proj")


def compact_of(folder: Path, **options: Any) -> CompactAdapter:
    return api.convert(api.load_lora(folder), "lowrank", bits=14, **options).compact


def listed(folder: Path) -> list[str]:
    modules: list[str] = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    return modules


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("given", ["to the conversion", "to the export", "as a config alone"])
def test_an_export_has_the_names_of_the_bases_class(spelling: str, given: str, tmp_path: Path) -> None:
    """The same bytes whichever way the source spells its names, wherever the base is given."""
    base = LLAMA
    if given == "as a config alone":
        base = tmp_path / "base"
        base.mkdir()
        (base / "config.json").write_bytes((LLAMA / "config.json").read_bytes())
    early = {"base": base} if given == "to the conversion" else {}
    late = {} if early else {"base": base}
    folders = []
    for name in ("right", spelling):
        source = renamed(plain(modules=QV), *SPELLINGS[name]).write(tmp_path / f"source-{name}-{len(folders)}")
        compact = compact_of(source, **early)
        folder = tmp_path / f"out-{name}-{len(folders)}"
        done = api.export(compact, folder, to="peft-lora", **late)
        assert ("names are those of" in " ".join(done.notes)) == (name != "right")
        assert not api.check(folder, ["peft", "vllm"], base=LLAMA)
        folders.append(folder)
    one, two = (api.load_lora(folder) for folder in folders)
    assert one.shapes() == two.shapes()
    assert all(
        np.array_equal(a.A, b.A) and np.array_equal(a.B, b.B) for a, b in zip(one.targets, two.targets, strict=True)
    )


def test_the_sources_names_are_kept_if_asked(tmp_path: Path) -> None:
    source = renamed(plain(modules=QV), *SPELLINGS["one too few"]).write(tmp_path / "a")
    compact = compact_of(source, base=LLAMA)
    assert compact.provenance.fields[NAMES] == "layers>model.layers"
    api.export(compact, tmp_path / "out", to="peft-lora", keep_names=True)
    assert all(name.startswith("layers.") for name in listed(tmp_path / "out"))
    # It is the class of the task that has them.
    compact = replace(compact, provenance=replace(compact.provenance, task_type="FEATURE_EXTRACTION"))
    api.export(compact, tmp_path / "task", to="peft-lora", base=LLAMA)
    assert all(name.startswith("layers.") for name in listed(tmp_path / "task"))


def test_names_that_nobody_checked_are_said(tmp_path: Path) -> None:
    """Without a base there is a note; with one there is none where nothing changes."""
    compact = compact_of(plain(modules=QV).write(tmp_path / "a"))
    without = api.export(compact, tmp_path / "without", to="peft-lora").notes
    assert len(without) == 1 and "not checked" in without[0]
    assert api.export(compact, tmp_path / "with", to="peft-lora", base=LLAMA).notes == ()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_a_target_that_the_class_lacks_is_named(tmp_path: Path) -> None:
    source = renamed(plain(modules=QV), "layers.1", "layers.7").write(tmp_path / "a")
    notes = api.export(compact_of(source), tmp_path / "out", to="peft-lora", base=LLAMA).notes
    assert any("model.layers.7.self_attn.q_proj.weight" in note and "LlamaForCausalLM" in note for note in notes)


@pytest.mark.parametrize(
    ("adapter", "base"), [("bert-classifier", "tiny-bert"), ("gpt2-conv1d", "tiny-gpt2-hub"), ("vit-plain", "tiny-vit")]
)
def test_names_that_are_right_stay(adapter: str, base: str, tmp_path: Path) -> None:
    """Of a class with a head beside a base saved without one, and of a base that stores no prefix."""
    compact = compact_of(ADAPTERS / adapter)
    api.export(compact, tmp_path / "without", to="peft-lora")
    notes = api.export(compact, tmp_path / "with", to="peft-lora", base=BASES / base).notes
    assert not any("names" in note for note in notes if "SGLang" not in note)
    assert listed(tmp_path / "with") == listed(tmp_path / "without")


def test_mlx_has_the_old_names_of_models_that_see(tmp_path: Path) -> None:
    for name, folder in (("model.language_model", "new"), ("language_model.model", "old")):
        source = renamed(plain(modules=QV), f"{PREFIX}model.", f"{PREFIX}{name}.").write(tmp_path / f"source-{folder}")
        api.export(compact_of(source), tmp_path / folder, to="mlx")
        keys = json.loads((tmp_path / folder / "adapter_config.json").read_text())["lora_parameters"]["keys"]
        assert all(key.startswith("language_model.model.layers.") for key in keys)


def test_a_name_that_no_module_can_have_is_refused(tmp_path: Path) -> None:
    source = renamed(plain(modules=QV), "layers.1", "layers..1").write(tmp_path / "a")
    for layout in ("peft-lora", "mlx", "raw"):
        with pytest.raises(errors.ExportError, match="no module can be called"):
            api.export(compact_of(source), tmp_path / "out", to=layout)


def test_ranks_of_strange_names_are_kept(tmp_path: Path) -> None:
    """PEFT takes keys of rank_pattern for regular expressions."""
    adapter = renamed(plain(modules=QV, ranks={"v_proj": 4}, rank_pattern={"v_proj": 4}), "layers.1", "layers.1(+)[a]")
    api.export(compact_of(adapter.write(tmp_path / "a")), tmp_path / "out", to="peft-lora", keep_ranks=True)
    ranks = {
        p.target.name.split(".")[-2]: p.rank for p in api.load_lora(tmp_path / "out").targets if "(+)" in p.target.name
    }
    assert ranks == {"q_proj": 8, "v_proj": 4}


# --- what PEFT makes of it ------------------------------------------------------------------------------------------


def _multimodal() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    tokens = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 4}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **tokens))


@pytest.mark.medium
@pytest.mark.parametrize("old", [("model.language_model.", "language_model.model."), ("model.language_model", "model")])
def test_peft_applies_an_adapter_of_an_older_release(old: tuple[str, str], tmp_path: Path) -> None:
    """Names of transformers 4, and one level too few, of a model that sees: the export has PEFT's logits."""
    import peft
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    _multimodal().save_pretrained(tmp_path / "base")
    kind = type(_multimodal())

    def model() -> Any:
        return kind.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()

    def answers(of: Any) -> Any:
        with torch.no_grad():
            return of(input_ids=torch.arange(3, 12)[None]).logits.double()

    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=r".*language_model.*\.[qv]_proj")
    trained = peft.get_peft_model(model(), config)
    wanted = answers(trained)
    trained.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    stored = {name.replace(*old): value for name, value in load_file(path).items()}
    save_file(stored, path, metadata={"format": "pt"})
    api.export(compact_of(tmp_path / "a", base=tmp_path / "base"), tmp_path / "out", to="peft-lora")
    exported = answers(peft.PeftModel.from_pretrained(model(), tmp_path / "out"))
    assert (exported - wanted).norm() <= 1e-2 * (wanted - answers(model())).norm()


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl", "mistral3"])
def test_an_adapter_of_a_decoder_finds_its_place_in_a_model_that_sees(model_type: str, tmp_path: Path) -> None:
    """On the model with eyes ``model.layers`` is a dead name; with its config.json an export has the right one."""
    title = {"gemma3": "Gemma3", "qwen2_5_vl": "Qwen2_5_VL", "mistral3": "Mistral3"}[model_type]
    text = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 144, "num_hidden_layers": 2, "head_dim": 16,
            "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    config = {"model_type": model_type, "architectures": [f"{title}ForConditionalGeneration"], "text_config": text}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    source = plain(modules=QV).write(tmp_path / "a")
    said = {finding.rule for finding in api.check(source, ["vllm"], base=tmp_path / "base")}
    assert said == (set() if model_type == "qwen2_5_vl" else {"modules"})  # old names of that one are known to vLLM
    api.export(compact_of(source), tmp_path / "out", to="peft-lora", base=tmp_path / "base")
    assert all(name.startswith("model.language_model.layers.") for name in listed(tmp_path / "out"))
    assert not api.check(tmp_path / "out", ["peft", "vllm"], base=tmp_path / "base")


# --- experts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("kind", ["expert", "expert_transposed"])
def test_experts_are_in_the_order_that_the_class_says(model_type: str, kind: str, tmp_path: Path) -> None:
    """A stack is (experts, out, in) or (experts, in, out) as the class has it, and an update that was read for the
    other order is the same change of the stored numbers."""
    title = {"qwen3_moe": "Qwen3MoeForCausalLM", "gpt_oss": "GptOssForCausalLM"}[model_type]
    config = {"model_type": model_type, "architectures": [title], "num_hidden_layers": 1, "hidden_size": 16,
              "vocab_size": 32, "moe_intermediate_size": 8, "intermediate_size": 8, "num_experts": 2,
              "num_local_experts": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    shape = (2, 8, 16) if model_type == "gpt_oss" else (2, 16, 8)
    name = "model.layers.0.mlp.experts.down_proj"
    lora = api.load_lora(plain(modules=QV).write(tmp_path / "a"))
    targets = [Target(name, shape, View(f"{kind}:{n}")) for n in range(2)]
    rng = np.random.default_rng(0)
    pairs = []
    for one, target in zip(lora.targets, targets, strict=False):
        out, inner = target.matrix_shape
        a, b = (rng.standard_normal(size).astype(np.float32) for size in ((4, inner), (out, 4)))
        pairs.append(replace(one, target=target, a=replace(one.a, array=a), b=replace(one.b, array=b), scale=1.0))
    compact = api.convert(replace(lora, targets=tuple(pairs)), "lowrank", bits=14).compact
    api.export(compact, tmp_path / "out", to="peft-lora", base=tmp_path / "base")
    again = api.load_lora(tmp_path / "out", base=tmp_path / "base")
    is_transposed = model_type == "gpt_oss"
    for (target, a, b), pair in zip(methods.expand_all(compact), again.targets, strict=True):
        mine = b @ a if target.view.kind == "expert" else (b @ a).T
        delta = pair.scale * pair.B @ pair.A
        assert np.allclose(delta.T if is_transposed else delta, mine, atol=1e-5)


# --- complete groups ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruned", ["q_proj", "v_proj", "gate_proj"])
def test_every_server_takes_an_export_with_pruned_modules(pruned: str, tmp_path: Path) -> None:
    compact = compact_of(plain(rank=8).write(tmp_path / "a"))
    ranks = [0 if pruned in target.name and "layers.0" in target.name else 8 for target in compact.targets]
    lora = api.load_lora(tmp_path / "a")
    cut = [replace(p, a=replace(p.a, array=p.a.array * bool(r)), b=replace(p.b, array=p.b.array * bool(r)))
           for p, r in zip(lora.targets, ranks, strict=True)]  # fmt: skip
    compact = api.convert(replace(lora, targets=tuple(cut)), "lowrank", target_ratio=4).compact
    assert 0 in compact.config.counts
    for keep_ranks in (False, True):
        api.export(compact, tmp_path / f"{keep_ranks}", to="peft-lora", keep_ranks=keep_ranks)
        findings = api.check(tmp_path / f"{keep_ranks}", ["peft", "vllm", "sglang", "llamacpp"], base=LLAMA)
        assert "partners" not in {finding.rule for finding in findings}
        assert keep_ranks or not findings


def test_a_base_completes_groups_that_were_never_adapted(tmp_path: Path) -> None:
    """q_proj alone is refused by SGLang: with the base's config v_proj gets zeros, without it the export says so."""
    compact = compact_of(plain(modules=("self_attn.q_proj", "mlp.up_proj")).write(tmp_path / "a"))
    notes = api.export(compact, tmp_path / "without", to="peft-lora").notes
    assert any(note.startswith("SGLang") and "refuses" in note for note in notes)
    assert api.export(compact, tmp_path / "with", to="peft-lora", base=LLAMA).notes == ()
    findings = api.check(tmp_path / "with", ["all"], base=LLAMA)
    assert {finding.consumer for finding in findings} <= {"comfyui", "diffusers", "mlx"}  # whose layouts it is not
    added = set(listed(tmp_path / "with")) - set(listed(tmp_path / "without"))
    assert {name.rpartition(".")[2] for name in added} == {"v_proj", "gate_proj"}
    again = {pair.target.name: pair for pair in api.load_lora(tmp_path / "with").targets}
    assert all(not again[f"{name}.weight"].B.any() for name in added)


# --- tied embeddings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_llamacpp_gets_no_lora_on_tied_embeddings(tied: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((LLAMA / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (base / "config.json").write_text(json.dumps(config))
    lora = api.load_lora(plain(modules=QV).write(tmp_path / "a"))
    embedding = Target("model.embed_tokens.weight", (100, 64), View("transposed"))
    first = replace(lora.targets[0], target=embedding, a=replace(lora.targets[0].a, array=np.ones((8, 100), "<f4")))
    first = replace(first, b=replace(first.b, array=np.ones((64, 8), "<f4")))
    compact = api.convert(replace(lora, targets=(first, *lora.targets)), "lowrank", bits=8).compact
    if tied:
        with pytest.raises(errors.ExportError, match="tied"):
            api.export(compact, tmp_path / "out", to="gguf", base=base)
    untied = LLAMA if tied else base
    api.export(compact, tmp_path / "gguf", to="gguf", base=untied)
    rules = [f.rule for f in api.check(tmp_path / "gguf" / "adapter.gguf", ["llamacpp"], base=base)]
    assert rules == (["embedding"] if tied else [])


# --- the names of a class -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "text"),
    [
        ({"layers.0.q.weight": "model.layers.0.q.weight", "layers.11.k.weight": "model.layers.11.k.weight"},
         "layers>model.layers"),
        ({"model.model.layers.0.q.weight": "model.layers.0.q.weight"}, "model.model>model"),
        ({"encoder.layer.3.attention.query.weight": "layers.3.q_proj.weight",
          "encoder.layer.4.attention.query.weight": "layers.4.q_proj.weight"},
         "encoder.layer.#.attention.query.weight>layers.#.q_proj.weight"),
        ({"a;b.0.q.weight": "c.0.q.weight"}, ""),
    ],
)  # fmt: skip
def test_a_renaming_is_a_short_text(new: dict[str, str], text: str) -> None:
    names = [*new, "lm_head.weight", "model.norm.weight"]
    assert class_names.as_text(new, names) == text
    if text:
        assert [class_names.from_text(text, name) for name in names] == [new.get(name, name) for name in names]


@pytest.mark.parametrize("config", [{}, {"model_type": "nobodys"}, {"model_type": "llama"}, {"architectures": [1]}])
def test_a_base_that_says_no_class_changes_no_name(config: dict[str, Any]) -> None:
    target = Target("model.layers.0.q.weight", (4, 4))
    assert class_names.renaming([target], config, "") == class_names.Renaming()
