"""Exports to GGUF, served by llama.cpp itself: its log probabilities of the whole vocabulary beside those of
transformers with PEFT. A peer without an environment is skipped by name: see tests/peers/README.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import ARCHITECTURES, VOCABULARY, Architecture
from conftest import ADAPTERS, BASES, dense
from models import auto, load_all, save_base
from peers import oracle
from test_export_peers import made, updates

from lrconvert import api
from lrconvert.core import errors
from lrconvert.lora.adapter import Target, View

pytestmark = pytest.mark.slow

LLAMA = BASES / "tiny-llama"
PROMPTS = ([5, 17, 42, 8, 90, 33], [61, 7, 7, 29])
WRITTEN = 6  # tokens after each prompt
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "lowrank": ("lowrank", {"bits": 8}),
    "alora": ("alora", {"total_rank": 20}),
    "vblora": ("vblora", {"target_ratio": 8}),
    "nola": ("nola", {"target_ratio": 8}),
    "sbora-fa": ("sbora", {"variant": "fa", "rank": 6}),
    "sbora-fb": ("sbora", {"variant": "fb", "rank": 6}),
    "bone": ("bone", {"rank": 8}),
    "bone-out": ("bone", {"rank": 4, "shard": "out"}),
}
EMBEDDING = Target("model.embed_tokens.weight", (100, 64), View("transposed"))
HEAD = Target("lm_head.weight", (100, 64))
QUERY = Target("model.layers.1.self_attn.q_proj.weight", (64, 64))
# The largest difference of a log probability, by the type of what is multiplied by: llama.cpp rounds the other side to
# F16 for weights and factors in F16, to BF16 for BF16, and to 8 bit for Q8_0.
F32, F16, BF16, Q8_0 = 1e-4, 2e-2, 0.1, 0.4


# --- asking llama.cpp, and transformers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """The tokens that llama-server wrote after a prompt, and its log probabilities (WRITTEN, vocabulary) on the way."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    logs: np.ndarray


def converted(folders: Mapping[str, tuple[Path, str]], out: Path) -> dict[str, Path]:
    """Bases in GGUF, as llama.cpp's converter makes them; each is (folder, type)."""
    oracle.needed("llamacpp")
    oracle.needed("xllamacpp")
    jobs = [(path, {"as_base": str(out / f"{n}.gguf"), "outtype": kind}) for n, (path, kind) in folders.items()]
    answers = dict(zip(folders, oracle.ask("llamacpp", jobs, LLAMA), strict=True))
    assert all(answer["outcome"] == "loads" for answer in answers.values()), answers
    return {name: out / f"{name}.gguf" for name in folders}


def serve(
    model: Path,
    *jobs: Path | tuple[Path, dict[str, Any]],
    vocabulary: int = 100,
    prompts: Sequence[Sequence[int]] = PROMPTS,
) -> list[list[Served] | str]:
    """The outcome of each adapter: what is written after every prompt, for every list of `scales`; or why not."""
    asked: list[tuple[Path, dict[str, Any]]] = []
    for job in jobs:
        adapter, options = job if isinstance(job, tuple) else (job, {})
        scales = options.get("scales", [[1.0]])
        requests = [{"prompt": list(p), "n": WRITTEN, "scales": s} for s in scales for p in prompts]
        more = {"requests": requests, "out": f"{adapter}.{len(asked)}.npz", "vocabulary": vocabulary}
        asked.append((adapter, {"model": str(model), **options, **more}))
    answers: list[list[Served] | str] = []
    for (_, options), answer in zip(asked, oracle.ask("xllamacpp", asked, model), strict=True):
        if answer["outcome"] != "loads":
            answers.append(answer["why"])
            continue
        logs, prompts = np.load(options["out"]), [request["prompt"] for request in options["requests"]]
        answers.append(
            [Served(p, t, logs[str(n)]) for n, (p, t) in enumerate(zip(prompts, answer["tokens"], strict=True))]
        )
    return answers


def assert_equal(case: str, model: Any, answers: list[Served] | str, bound: float) -> None:
    """A model of transformers has these log probabilities within `bound`, and would have written the same; where its
    first two choices are nearer than the bound either may be."""
    import torch

    assert not isinstance(answers, str), (case, answers)
    for one in answers:
        ids = torch.tensor([[*one.prompt, *one.tokens[:-1]]])
        with torch.no_grad():
            wanted = model(input_ids=ids).logits[0, len(one.prompt) - 1 :].double().log_softmax(-1).numpy()
        assert one.logs.shape == wanted.shape, case
        assert np.abs(one.logs - wanted).max() <= bound, (case, np.abs(one.logs - wanted).max())
        chosen = wanted[np.arange(len(one.tokens)), one.tokens]
        assert (chosen >= wanted.max(1) - 2 * bound).all(), case


def with_peft(base: Path, adapter: Path) -> Any:
    """transformers' model in float32 with a folder that PEFT loads."""
    import peft
    import torch

    model = auto("CausalLM").from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, str(adapter)).eval()


def exported(compact: Any, folder: Path, base: Path = LLAMA, **options: Any) -> Path:
    api.export(compact, folder, to="gguf", base=base, **options)
    return folder / "adapter.gguf"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with its head tied to its embeddings."""
    folder = tmp_path_factory.mktemp("tied") / "base"
    config = json.loads((LLAMA / "config.json").read_text()) | {"tie_word_embeddings": True}
    stored = {name: value for name, value in load_all(LLAMA).items() if name != "lm_head.weight"}
    return save_base(folder, [stored], config)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tied: Path) -> dict[str, Path]:
    kinds = {kind: (LLAMA, kind) for kind in ("f32", "f16", "q8_0")}
    return converted({**kinds, "tied": (tied, "f32")}, tmp_path_factory.mktemp("bases"))


# --- what is exported -----------------------------------------------------------------------------------------------


def test_xllamacpp_computes_every_form_as_peft_does(bases: dict[str, Path], tmp_path: Path) -> None:
    """Compact file -> GGUF -> llama-server, beside compact file -> PEFT folder -> PEFT. Bat has no factors."""
    import peft
    import torch

    lora = api.load_lora(ADAPTERS / "llama-plain")
    for name, (method, options) in FORMS.items():
        compact = api.convert(lora, method, **options).compact
        exported(compact, tmp_path / name)
        api.export(compact, tmp_path / f"{name}-peft", to="peft-lora", base=LLAMA)
    answers = serve(bases["f32"], *(tmp_path / name / "adapter.gguf" for name in FORMS))
    model: Any = auto("CausalLM").from_pretrained(LLAMA, dtype=torch.float32)
    for name in FORMS:
        folder = str(tmp_path / f"{name}-peft")
        if isinstance(model, peft.PeftModel):
            model.load_adapter(folder, name)
        else:
            model = peft.PeftModel.from_pretrained(model, folder, name)
    model.eval()
    for name, answer in zip(FORMS, answers, strict=True):
        model.set_adapter(name)
        assert_equal(name, model, answer, F32)
    bat = api.convert(lora, "bone", variant="bat", rank=4, base=LLAMA).compact
    with pytest.raises(errors.OptionError):
        exported(bat, tmp_path / "bat")


def test_xllamacpp_takes_every_rank_and_dtype(bases: dict[str, Path], tmp_path: Path) -> None:
    """Own ranks with one scale, and factors in 16 bit: what is stored counts, not what was rounded."""
    compact = api.convert(api.load_lora(ADAPTERS / "llama-patterns"), "lowrank", bits=8).compact
    files = {"ranks": exported(compact, tmp_path / "ranks", keep_ranks=True)}
    files |= {dtype: exported(compact, tmp_path / dtype, dtype=dtype) for dtype in ("F16", "BF16")}
    answers = serve(bases["f32"], *files.values())
    for (name, path), answer in zip(files.items(), answers, strict=True):
        api.export(api.load_lora(path, base=LLAMA), tmp_path / f"{name}-peft", to="peft-lora", base=LLAMA)
        bound = {"ranks": F32, "F16": F16 / 4, "BF16": BF16}[name]
        assert_equal(name, with_peft(LLAMA, tmp_path / f"{name}-peft"), answer, bound)


def test_xllamacpp_adapts_embeddings_and_heads(bases: dict[str, Path], tmp_path: Path) -> None:
    """Where they are not tied; the A of an embedding lies transposed."""
    cases = {"embedding": made(EMBEDDING), "head": made(HEAD), "both": made(HEAD, EMBEDDING, QUERY)}
    answers = serve(bases["f32"], *(exported(compact, tmp_path / name) for name, compact in cases.items()))
    for (name, compact), answer in zip(cases.items(), answers, strict=True):
        api.export(compact, tmp_path / f"{name}-peft", to="peft-lora", base=LLAMA)
        assert_equal(name, with_peft(LLAMA, tmp_path / f"{name}-peft"), answer, F32)


def test_xllamacpp_refuses_loras_on_tied_embeddings(bases: dict[str, Path], tied: Path, tmp_path: Path) -> None:
    """As `check` says: the head is not there to adapt, and the embeddings' factors abort the program."""
    targets = {"embedding": EMBEDDING, "head": HEAD}
    files = [exported(made(target), tmp_path / name) for name, target in targets.items()]
    query = exported(made(QUERY), tmp_path / "query", base=tied)
    *answers, right = serve(bases["tied"], *files, query)
    for (name, target), path, answer in zip(targets.items(), files, answers, strict=True):
        assert isinstance(answer, str), name
        assert re.search("GGML_ASSERT" if name == "embedding" else "does not exist in base model", answer)
        assert [f.severity for f in api.check(path, ("llamacpp",), base=tied)] == ["refuses"]
        with pytest.raises(errors.ExportError, match="tied"):
            exported(made(target), tmp_path / "again", base=tied)
    api.export(made(QUERY), tmp_path / "peft", to="peft-lora", base=tied)
    assert_equal("query", with_peft(tied, tmp_path / "peft"), right, F32)


def test_xllamacpp_scales_adapters_by_request(bases: dict[str, Path], tmp_path: Path) -> None:
    """llama-server's ``--lora ONE --lora TWO``, and ``"lora": [{"id": 0, "scale": 0.5}, ...]`` of a request."""
    import torch

    lora = api.load_lora(ADAPTERS / "llama-plain")
    one, two = api.convert(lora, "lowrank", target_ratio=4).compact, api.convert(lora, "bone", rank=8).compact
    files = [exported(compact, tmp_path / name) for name, compact in (("one", one), ("two", two))]
    scales = [[0.0, 0.0], [0.5, 0.0], [0.0, 2.0], [1.0, 1.0], [-1.0, 0.25]]
    (answer,) = serve(bases["f32"], (files[0], {"more": [str(files[1])], "scales": scales}))
    assert not isinstance(answer, str)
    model = auto("CausalLM").from_pretrained(LLAMA, dtype=torch.float32).eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for n, pair in enumerate(scales):
        for name, value in model.state_dict().items():
            value.copy_(weights[name])
        for scale, compact in zip(pair, (one, two), strict=True):
            for name, delta in updates(compact).items():
                model.state_dict()[f"{name}.weight"] += torch.from_numpy(scale * delta).float()
        assert_equal(str(pair), model, answer[n * len(PROMPTS) : (n + 1) * len(PROMPTS)], F32)


def test_xllamacpp_serves_bases_of_fewer_bits(bases: dict[str, Path], tmp_path: Path) -> None:
    compact = api.convert(api.load_lora(ADAPTERS / "llama-plain"), "lowrank", bits=8).compact
    path = exported(compact, tmp_path / "gguf")
    api.export(compact, tmp_path / "peft", to="peft-lora", base=LLAMA)
    for kind, bound in {"f16": F16, "q8_0": Q8_0}.items():
        (answer,) = serve(bases[kind], path)
        assert_equal(kind, with_peft(LLAMA, tmp_path / "peft"), answer, bound)


def like_mistral(name: str, model: str, *linear: str, experts: Sequence[str] = (), **config: Any) -> Architecture:
    """A tiny model of another class, with the layers of Mistral's where none are named."""
    other = ARCHITECTURES["mistral"]
    linear = linear or other.linear
    return replace(other, name=name, model=model, linear=linear, experts=experts, config={**other.config, **config})


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TWO = (*ATTENTION, "up_proj", "down_proj")
STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
FULL = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4, "sliding_window": None}
WINDOWS = {"num_hidden_layers": 4, "sliding_window": 8}
MIXED = {
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1,
    "moe_intermediate_size": 12, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 2,
}  # fmt: skip
ERNIE = {
    "num_hidden_layers": 2, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 12, "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1, "moe_layer_end_index": 1, "moe_layer_interval": 1,
}  # fmt: skip
# Tiny models of families that tests/architectures.py does not have.
OTHERS = {
    one.name: one
    for one in (
        like_mistral("apertus", "ApertusForCausalLM", *TWO),
        like_mistral("arcee", "ArceeForCausalLM", *TWO),
        like_mistral("cohere2", "Cohere2ForCausalLM", **WINDOWS),
        like_mistral("deepseek-v2", "DeepseekV2ForCausalLM", "o_proj", experts=STACKS, **{**MIXED, **LATENT}),
        like_mistral("dots1", "Dots1ForCausalLM", *ATTENTION, experts=STACKS, **MIXED, num_key_value_heads=2),
        like_mistral("ernie4_5", "Ernie4_5ForCausalLM"),
        like_mistral("ernie4_5-moe", "Ernie4_5_MoeForCausalLM", *ATTENTION, experts=STACKS, **ERNIE),
        like_mistral("exaone4", "Exaone4ForCausalLM", **FULL),
        like_mistral("gemma", "GemmaForCausalLM"),
        like_mistral("glm", "GlmForCausalLM", *ATTENTION, "gate_up_proj", "down_proj", rms_norm_eps=1e-5),
        like_mistral("hunyuan", "HunYuanDenseV1ForCausalLM"),
        like_mistral("jais2", "Jais2ForCausalLM", *TWO),
        like_mistral("minicpm3", "MiniCPM3ForCausalLM", "o_proj", "gate_proj", "up_proj", "down_proj", **LATENT),
        like_mistral("nemotron", "NemotronForCausalLM", *TWO),
        like_mistral("olmo", "OlmoForCausalLM", num_key_value_heads=2),
        like_mistral("olmo3", "Olmo3ForCausalLM", **WINDOWS),
        like_mistral("seed-oss", "SeedOssForCausalLM"),
    )
}
# Families whose tiny model llama.cpp's converter takes, and what the runtime assumes of their configuration.
KINDS: dict[str, dict[str, int | bool]] = {
    "mistral": {}, "qwen2": {}, "qwen2-tied": {}, "qwen3": {}, "qwen3-moe": {"norm_topk_prob": True},
    "gemma2": {"query_pre_attn_scalar": 8}, "gpt-oss": {}, "mixtral": {}, "olmoe": {}, "granite": {}, "granite-moe": {},
    "phi": {"intermediate_size": 64}, "phi3": {}, "cohere": {}, "olmo2": {}, "smollm3": {}, "glm4": {}, "stablelm": {},
    "starcoder2": {}, "gpt2": {}, "gpt-bigcode": {}, "bloom": {}, "qwen2-moe": {}, "falcon": {"num_kv_heads": 1},
    "glm4-moe": {}, "llama4-text": {"num_hidden_layers": 4}, **{name: {} for name in OTHERS},
}  # fmt: skip
# What the converter wants to read in their config.json, and transformers does not write.
STATED: dict[str, dict[str, Any]] = {"cohere2": {"rotary_pct": 1.0}, "dots1": {"scoring_func": "sigmoid"}}


EXPERTS = {"granite-moe": ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj")}
SAMPLE = (
    *("mistral", "qwen2-tied", "gemma2", "phi3", "starcoder2", "gpt2", "bloom", "qwen2-moe", "mixtral"),
    *("deepseek-v2", "llama4-text", "glm4-moe", "arcee"),
)


def family_base(name: str, folder: Path) -> tuple[Architecture, Path]:
    """A tiny model of a family, and the folder that it is written to, as llama.cpp's converter takes it."""
    kind = OTHERS.get(name) or ARCHITECTURES[name]
    replace(kind, config={**kind.config, **KINDS[name]}).save(folder)
    config = json.loads((folder / "config.json").read_text())
    stated = {"n_ctx": config.get("n_positions"), **config, **STATED.get(name, {})}
    (folder / "config.json").write_text(json.dumps(stated))
    return kind, folder


@pytest.mark.parametrize("names", [SAMPLE, pytest.param(tuple(KINDS), marks=pytest.mark.long)], ids=["some", "all"])
def test_xllamacpp_serves_other_families(names: tuple[str, ...], tmp_path: Path) -> None:
    """Layers of other names, fused ones, experts, rows in another order, and GPT-2, whose factors its converter swaps:
    tiny models of their classes with a LoRA of PEFT's on all their layers. The base alone is as far from transformers
    as the base with the LoRA may be; some of them multiply in F16."""
    import peft
    import torch

    models, bases, jobs = {}, {}, []
    for number, name in enumerate(names):
        kind, folder = family_base(name, tmp_path / f"base{number}")
        bases[name] = folder
        torch.manual_seed(number)
        settings = peft.LoraConfig(
            r=3,
            lora_alpha=3,
            init_lora_weights=False,
            target_modules=list(kind.linear),
            target_parameters=list(stacks := EXPERTS.get(name, kind.experts)),
        )
        models[name] = peft.get_peft_model(kind.load(folder), settings).eval()
        found = models[name].targeted_parameter_names
        assert all(any(each.endswith(stack) for each in found) for stack in stacks), (name, found)
        models[name].save_pretrained(tmp_path / name)
    files = converted({name: (folder, "f32") for name, folder in bases.items()}, tmp_path)
    for name, folder in bases.items():
        path = exported(tmp_path / name, tmp_path / f"{name}-gguf", folder)
        jobs.append((path, {"model": str(files[name]), "scales": [[0.0], [1.0]]}))
    prompts = [[token % VOCABULARY for token in prompt] for prompt in PROMPTS]
    for name, answer in zip(names, serve(tmp_path, *jobs, vocabulary=VOCABULARY, prompts=prompts), strict=True):
        assert not isinstance(answer, str), (name, answer)
        with models[name].disable_adapter():
            assert_equal(f"{name} alone", models[name], answer[: len(prompts)], 1e-3)
        assert_equal(name, models[name], answer[len(prompts) :], 1e-3)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("minicpm3", ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]),
        ("deepseek-v2", ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "lm_head"]),
    ],
)
def test_xllamacpp_computes_without_layers_that_the_exporter_refuses(
    name: str, layers: list[str], tmp_path: Path
) -> None:
    """llama.cpp's own converter takes a LoRA on them, and the runtime loads it and answers as the base."""
    import peft

    kind, base = family_base(name, tmp_path / "base")
    if "tie_word_embeddings" not in kind.config:
        replace(kind, tied=False).save(base)
    settings = peft.LoraConfig(r=3, lora_alpha=3, init_lora_weights=False, target_modules=layers)
    model = peft.get_peft_model(kind.load(base), settings).eval()
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    with pytest.raises(errors.ExportError, match="computes without it"):
        exported(tmp_path / "peft", tmp_path / "gguf", base)
    file = converted({name: (base, "f32")}, tmp_path)[name]
    theirs = tmp_path / "theirs.gguf"
    options = {"base": str(base), "kept": str(theirs)}
    (answer,) = oracle.ask("llamacpp", [(tmp_path / "peft", options)], LLAMA)
    assert answer["outcome"] == "loads", answer
    prompts = [[token % VOCABULARY for token in prompt] for prompt in PROMPTS]
    (served,) = serve(tmp_path, (theirs, {"model": str(file)}), vocabulary=VOCABULARY, prompts=prompts)
    with model.disable_adapter():
        assert_equal(name, model, served, 1e-3)
    with pytest.raises(AssertionError):
        assert_equal(name, model, served, 1e-1)
    (found,) = [one for one in api.check(theirs, ("llamacpp",)) if "left out" in one.what]
    assert found.severity == "wrong"


# --- what check says ------------------------------------------------------------------------------------------------


def test_xllamacpp_refuses_what_check_refuses(bases: dict[str, Path], tmp_path: Path) -> None:
    """Of GGUF files; trained norms are left out as `check` says, and an alpha of zero is the scale 1."""
    files = {name: case.write(tmp_path / f"{name}.gguf") for name, case in oracle.cases.GGUF_CASES.items()}
    answers = dict(zip(files, serve(bases["f32"], *files.values()), strict=True))
    for name, case in oracle.cases.GGUF_CASES.items():
        assert isinstance(answers[name], str) == case.expected.startswith("refuses"), (name, answers[name])
    for name in ("clean", "alpha-zero", "norm"):
        folder = tmp_path / f"{name}-peft"
        api.export(api.load_lora(files[name], base=LLAMA), folder, to="peft-lora", base=LLAMA)
        assert_equal(name, with_peft(LLAMA, folder), answers[name], F32)


def test_xllamacpp_does_what_is_repeated_of_it(bases: dict[str, Path], tmp_path: Path) -> None:
    """Whatever llama.cpp's converter takes: the runtime loads it if `check` of the file says so, and its update is the
    one that our reader reads, and `run_llamacpp.py` repeats."""
    import torch

    jobs = {}
    for number, case in enumerate(oracle.cases.PEFT_CASES):
        if "llamacpp" not in case.unrun:
            folder = case.build().write(tmp_path / str(number))
            jobs[case.name] = folder, {"kept": str(tmp_path / f"{number}.gguf")}
    answers = dict(zip(jobs, oracle.ask("llamacpp", list(jobs.values())), strict=True))
    taken = {name: Path(jobs[name][1]["kept"]) for name, answer in answers.items() if answer["outcome"] == "loads"}
    assert len(taken) > 20
    model = auto("CausalLM").from_pretrained(LLAMA, dtype=torch.float32).eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    small = [(path, {"scales": [[1 / 64]]}) for path in taken.values()]  # the cases' factors are large
    for (name, path), served in zip(taken.items(), serve(bases["f32"], *small), strict=True):
        refused = any(finding.severity == "refuses" for finding in api.check(path, ("llamacpp",), base=LLAMA))
        assert isinstance(served, str) == refused, (name, served)
        if refused or name == "alora":  # which acts after its invocation tokens alone
            continue
        if not answers[name]["norms"]:  # loaded, and nothing is adapted
            assert "names" in {finding.rule for finding in api.check(path, ("llamacpp",), base=LLAMA)}, name
            continue
        for key, value in model.state_dict().items():
            value.copy_(weights[key])
        norms = {}
        for pair in api.load_lora(path, base=LLAMA).targets:
            delta = dense(pair)
            module = pair.target.name.removesuffix(".weight")
            norms[module] = float(np.linalg.norm(delta))
            stored = delta.T if pair.target.view.kind == "transposed" else delta
            model.state_dict()[f"{module}.weight"] += torch.from_numpy(stored / 64).float()
        assert norms == pytest.approx(answers[name]["norms"], rel=1e-4), name
        assert_equal(name, model, served, 1e-3)
