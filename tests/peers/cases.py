"""Small synthetic adapters for the tiny Llama of the fixtures: a clean one, and one defect each.

`expected` maps a consumer to what `check` says of the folder alone, as "severity:rule"; what is not listed is nothing
found. With the base given, see `with_base`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, INNER, KV, VOCABULARY, LAYERS = 64, 144, 32, 100, 2
PREFIX = "base_model.model."
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
LEAVES = [name.rpartition(".")[2] for name in SHAPES]
Tensors = dict[str, np.ndarray]


@dataclass
class Adapter:
    """A folder in the making. Tensors are by name, files by name and text."""

    config: dict[str, Any]
    tensors: Tensors
    files: dict[str, str] = field(default_factory=dict)
    weights: str = "adapter_model.safetensors"

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        if self.config:
            (folder / "adapter_config.json").write_text(json.dumps(self.config, indent=2))
        for name, text in self.files.items():
            (folder / name).write_text(text)
        if self.weights.endswith(".bin"):
            import torch

            torch.save({k: torch.from_numpy(v) for k, v in self.tensors.items()}, folder / self.weights)
        elif self.weights:
            from safetensors.numpy import save_file

            save_file(self.tensors, folder / self.weights, {"format": "pt"})
        return folder


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def factors(module: str, out: int, inner: int, rank: int) -> Tensors:
    return {
        f"{PREFIX}{module}.lora_A.weight": numbers(rank, inner),
        f"{PREFIX}{module}.lora_B.weight": numbers(out, rank),
    }


def plain(
    *, rank: int = 8, ranks: Mapping[str, int] | None = None, modules: tuple[str, ...] = tuple(SHAPES), **config: Any
) -> Adapter:
    """A LoRA on `modules` of every layer; `ranks` by the last part of a module's name."""
    tensors: Tensors = {}
    for layer in range(LAYERS):
        for name in modules:
            out, inner = SHAPES[name]
            leaf = name.rpartition(".")[2]
            tensors |= factors(f"model.layers.{layer}.{name}", out, inner, (ranks or {}).get(leaf, rank))
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "lrconvert/tiny-llama",
        "r": rank, "lora_alpha": 16, "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False, "use_rslora": False,
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
        "target_modules": sorted(name.rpartition(".")[2] for name in modules),
    }  # fmt: skip
    return Adapter({**settings, **config}, tensors)


def having(adapter: Adapter, tensors: Tensors) -> Adapter:
    adapter.tensors |= tensors
    return adapter


def storing(adapter: Adapter, name: str, *shape: int) -> Adapter:
    return having(adapter, {PREFIX + name: numbers(*shape)})


def without(adapter: Adapter, *keys: str) -> Adapter:
    for key in keys:
        adapter.config.pop(key, None)
        adapter.tensors.pop(key, None)
    return adapter


def renamed(adapter: Adapter, old: str, new: str) -> Adapter:
    adapter.tensors = {name.replace(old, new): value for name, value in adapter.tensors.items()}
    return adapter


def magnitudes(adapter: Adapter) -> Adapter:
    halves = {name: value for name, value in adapter.tensors.items() if name.endswith(".lora_B.weight")}
    new = {n.replace("lora_B.weight", "lora_magnitude_vector"): numbers(len(value)) + 9 for n, value in halves.items()}
    return having(adapter, new)


def biased(adapter: Adapter) -> Adapter:
    halves = {name: value for name, value in adapter.tensors.items() if name.endswith(".lora_B.weight")}
    return having(adapter, {n.replace("weight", "bias"): numbers(len(value)) for n, value in halves.items()})


def embedded(adapter: Adapter) -> Adapter:
    name = f"{PREFIX}model.embed_tokens.lora_embedding_"
    rank = adapter.config["r"]
    return having(adapter, {f"{name}A": numbers(rank, VOCABULARY), f"{name}B": numbers(HIDDEN, rank)})


def other_kind(kind: str, suffixes: Mapping[str, tuple[int, ...]], **config: Any) -> Adapter:
    """An adapter of another kind on q_proj."""
    kept = ("base_model_name_or_path", "task_type", "modules_to_save")
    adapter = plain(modules=())
    adapter.config = {key: adapter.config[key] for key in kept}
    adapter.config |= {"peft_type": kind, "target_modules": ["q_proj"], **config}
    for layer in range(LAYERS):
        for suffix, shape in suffixes.items():
            adapter.tensors[f"{PREFIX}model.layers.{layer}.self_attn.q_proj.{suffix}"] = numbers(*shape)
    return adapter


def mlx(*, rank: int = 8, modules: tuple[str, ...] = ("self_attn.q_proj", "mlp.down_proj"), **config: Any) -> Adapter:
    """An adapter as mlx-lm writes it."""
    tensors: Tensors = {}
    for layer in range(LAYERS):
        for name in modules:
            out, inner = SHAPES[name]
            tensors[f"model.layers.{layer}.{name}.lora_a"] = numbers(inner, rank)
            tensors[f"model.layers.{layer}.{name}.lora_b"] = numbers(rank, out)
    parameters = {"rank": rank, "scale": 2.0, "dropout": 0.0, "keys": list(modules)}
    settings = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    return Adapter({**settings, **config}, tensors, weights="adapters.safetensors")


def parameters(**changes: Any) -> dict[str, Any]:
    values = {"rank": 8, "scale": 2.0, "dropout": 0.0, **changes}
    return {key: value for key, value in values.items() if value is not None}


Expected = dict[str, set[str]]


@dataclass(frozen=True)
class Case:
    """One adapter and what `check` says. `unseen` are consumers of which a peer's test cannot see the error (the base
    is changed, the adapter acts at the wrong time); `unrun` those that the adapter cannot be given to as it is."""

    name: str
    build: Callable[[], Adapter]
    expected: Expected = field(default_factory=dict)
    with_base: Expected | None = None
    options: dict[str, Any] = field(default_factory=dict)
    unseen: frozenset[str] = frozenset()
    unrun: frozenset[str] = frozenset()


def case(
    name: str,
    build: Callable[[], Adapter],
    expected: dict[str, str] | None = None,
    with_base: dict[str, str] | None = None,
    *,
    options: dict[str, Any] | None = None,
    unseen: str = "",
    unrun: str = "",
) -> Case:
    def split(texts: dict[str, str]) -> Expected:
        return {consumer: set(text.split()) for consumer, text in texts.items()}

    return Case(
        name,
        build,
        split(expected or {}),
        None if with_base is None else split(with_base),
        options or {},
        frozenset(unseen.split()),
        frozenset(unrun.split()),
    )


_HALVES = {"a": (64, 4), "b": (4, 64)}
_BAKED = {"r": 8, "lora_alpha": 8, "rank_pattern": {"k_proj": 4}, "alpha_pattern": {"k_proj": 4}}
_PISSA = {"vllm": "refuses:init", "sglang": "wrong:init", "llamacpp": "wrong:init"}
_BARE_NAMES = {"peft": "wrong:modules", "vllm": "wrong:modules"}
_WRAPPED = {"peft": "wrong:wrapper", "vllm": "wrong:wrapper", "llamacpp": "refuses:wrapper"}
_ELSEWHERE = dict.fromkeys(("peft", "vllm"), "wrong:modules")
_ELSEWHERE |= {"sglang": "refuses:layers", "llamacpp": "refuses:modules"}
_EVERYWHERE = ("peft", "vllm", "sglang", "llamacpp")
_ALL = " ".join(_EVERYWHERE)

PEFT_CASES = (
    case("clean", plain),
    case("all-linear", lambda: plain(target_modules="all-linear")),
    case("alpha-float", lambda: plain(lora_alpha=12.5)),
    case("double", lambda: _cast(plain(), np.float64)),
    case("half", lambda: _cast(plain(), np.float16)),
    case("rank-pattern", lambda: plain(ranks={"k_proj": 4}, rank_pattern={"k_proj": 4}),
         {"sglang": "wrong:scale refuses:shape"}),
    case("alpha-pattern", lambda: plain(alpha_pattern={"o_proj": 32}),
         {"sglang": "wrong:scale", "llamacpp": "wrong:scale"}),
    case("ranks-kept", lambda: plain(ranks={"k_proj": 4}, **_BAKED),
         {"sglang": "refuses:shape", "llamacpp": "wrong:scale"}),
    case("rslora", lambda: plain(use_rslora=True), {"sglang": "wrong:scale", "llamacpp": "wrong:scale"}),
    case("alpha-zero", lambda: plain(lora_alpha=0), {"llamacpp": "wrong:scale"}),
    case("rank-32", lambda: plain(rank=32), {"vllm": "refuses:max-rank"}),
    case("rank-32-allowed", lambda: plain(rank=32), options={"max_lora_rank": 32}),
    case("rank-32-not", lambda: plain(rank=32), {"vllm": "refuses:max-rank", "sglang": "refuses:max-rank"},
         options={"max_lora_rank": 16}),
    case("rank-zero", lambda: plain(modules=tuple(SHAPES)[:3], target_modules=LEAVES[:4], rank_pattern={"o_proj": 0}),
         {"peft": "refuses:rank", "vllm": "refuses:rank"}),
    case("rank-at-odds", lambda: plain(r=4),
         {"peft": "refuses:shape", "vllm": "wrong:shape", "sglang": "refuses:shape", "llamacpp": "warns:shape"},
         unseen="llamacpp"),
    case("dora", lambda: magnitudes(plain(use_dora=True)),
         {"vllm": "refuses:dora", "sglang": "refuses:dora", "llamacpp": "refuses:dora"}, unseen="peft"),
    case("dora-undeclared", lambda: magnitudes(plain()),
         {"peft": "wrong:extra", "vllm": "refuses:names", "sglang": "refuses:extra", "llamacpp": "refuses:dora"}),
    case("lora-bias", lambda: biased(plain(lora_bias=True)),
         {"vllm": "refuses:lora-bias", "sglang": "wrong:lora-bias", "llamacpp": "refuses:names"}),
    case("bias", lambda: plain(bias="lora_only"), {"vllm": "refuses:bias"}),
    case("pissa", lambda: plain(init_lora_weights="pissa"), _PISSA, unseen="sglang llamacpp"),
    case("gaussian", lambda: plain(init_lora_weights="gaussian")),
    case("alora", lambda: plain(alora_invocation_tokens=[5, 6]), {"vllm": "refuses:alora", "sglang": "wrong:alora"},
         unseen="sglang"),
    case("replication",
         lambda: having(plain(layer_replication=[[0, 2], [1, 2]]),
                        factors("model.layers.2.mlp.down_proj", HIDDEN, INNER, 8)),
         {"vllm": "refuses:replication", "sglang": "refuses:replication", "llamacpp": "refuses:replication"},
         unrun="peft"),
    case("experts",
         lambda: having(plain(modules=(), target_parameters=["mlp.experts.down_proj"]),
                        factors("model.layers.0.mlp.experts", HIDDEN, INNER, 4 * 8)),  # 4 experts of rank 8
         {"sglang": "refuses:experts", "llamacpp": "refuses:experts"}, unrun="peft vllm"),  # the base has no experts
    case("saved-head", lambda: storing(plain(modules_to_save=["lm_head"]), "lm_head.weight", VOCABULARY, HIDDEN),
         {"vllm": "refuses:saved", "sglang": "wrong:saved", "llamacpp": "refuses:names"}),
    case("saved-norm", lambda: storing(plain(modules_to_save=["norm"]), "model.norm.weight", HIDDEN),
         {"vllm": "refuses:saved", "sglang": "wrong:saved", "llamacpp": "wrong:norms"}, unrun="peft"),  # not wrapped
    case("norm-in-layer", lambda: storing(plain(), "model.layers.0.input_layernorm.weight", HIDDEN),
         {"vllm": "refuses:names", "sglang": "refuses:extra", "llamacpp": "wrong:norms"}),
    case("saved-absent", lambda: plain(modules_to_save=["lm_head"]),
         {"peft": "refuses:saved", "vllm": "refuses:saved"}),
    case("score", lambda: storing(plain(modules_to_save=["score"], task_type="SEQ_CLS"), "score.weight", 3, HIDDEN),
         {"sglang": "wrong:saved", "llamacpp": "refuses:names"}, unrun="peft"),  # another model class
    case("score-undeclared", lambda: storing(plain(task_type="SEQ_CLS"), "score.weight", 3, HIDDEN),
         {"vllm": "refuses:saved", "sglang": "wrong:saved", "llamacpp": "refuses:names"}, unrun="peft"),
    case("embeddings-stored", lambda: storing(plain(), "model.embed_tokens.weight", VOCABULARY, HIDDEN),
         {"vllm": "refuses:names", "sglang": "wrong:saved", "llamacpp": "refuses:names"}),
    case("trained-tokens",
         lambda: storing(plain(trainable_token_indices=[1, 2]),
                         "model.embed_tokens.token_adapter.trainable_tokens_delta", 2, HIDDEN),
         {"vllm": "refuses:names", "sglang": "wrong:saved", "llamacpp": "refuses:names"}),
    case("embedding", lambda: embedded(plain(target_modules=[*LEAVES, "embed_tokens"])),
         {"vllm": "warns:embedding", "llamacpp": "warns:embedding"}, {}),
    case("embedding-untargeted", lambda: embedded(plain()),
         {"peft": "wrong:targets", "vllm": "warns:embedding", "sglang": "wrong:embedding",
          "llamacpp": "warns:embedding"}),
    case("lm-head",
         lambda: having(plain(target_modules=[*LEAVES, "lm_head"]), factors("lm_head", VOCABULARY, HIDDEN, 8)),
         {"vllm": "warns:embedding", "llamacpp": "warns:embedding"}, {}),
    case("targets-pattern", lambda: plain(target_modules=r".*\.(q|k|v|o|gate|up|down)_proj"),
         {"sglang": "refuses:targets"}),
    case("targets-absent", lambda: without(plain(), "target_modules"),
         {"peft": "warns:targets", "vllm": "refuses:fields", "sglang": "refuses:fields"}, unseen="peft"),
    case("targets-fewer", lambda: plain(target_modules=LEAVES[:-1]),
         {"peft": "wrong:targets", "sglang": "refuses:targets"}),
    case("pickle", lambda: _pickled(plain()), dict.fromkeys(_EVERYWHERE, "warns:pickle")),
    case("unprefixed", lambda: renamed(plain(), PREFIX, ""), {"peft": "wrong:prefix"}),
    case("named", lambda: renamed(plain(), ".weight", ".style.weight"),
         {"peft": "wrong:extra", "vllm": "refuses:names", "llamacpp": "refuses:names"}),
    case("half-a-pair", lambda: without(plain(), f"{PREFIX}model.layers.1.self_attn.o_proj.lora_B.weight"),
         {"peft": "wrong:pair", "vllm": "refuses:pair", "sglang": "refuses:pair", "llamacpp": "refuses:pair"}),
    case("integers", lambda: _cast(plain(), np.int8), dict.fromkeys(_EVERYWHERE, "wrong:dtype"), unseen=_ALL),
    case("bare-names", lambda: renamed(plain(), "model.layers", "layers"), {}, _BARE_NAMES),
    case("bare-names-no-task", lambda: renamed(plain(task_type=None), "model.layers", "layers"), {},
         {**_BARE_NAMES, "peft": "warns:modules"}, unseen="peft"),
    case("compiled", lambda: renamed(plain(), PREFIX, f"_orig_mod.{PREFIX}"),
         {**_WRAPPED, "peft": "wrong:prefix wrong:wrapper"}),
    case("data-parallel", lambda: renamed(plain(), PREFIX, f"module.{PREFIX}"),
         {**_WRAPPED, "peft": "wrong:prefix wrong:wrapper"}),
    case("compiled-inside", lambda: renamed(plain(), PREFIX, f"{PREFIX}_orig_mod."), _WRAPPED, _WRAPPED),
    case("sharded-inside", lambda: renamed(plain(), "layers.0.", "layers.0._fsdp_wrapped_module."), _WRAPPED, _WRAPPED),
    case("checkpointed-inside", lambda: renamed(plain(), "self_attn.", "_checkpoint_wrapped_module.self_attn."),
         _WRAPPED, _WRAPPED),
    case("prefix-twice", lambda: renamed(plain(), PREFIX, PREFIX + PREFIX), {"peft": "warns:twice"},
         {"peft": "wrong:modules"}),
    case("model-twice", lambda: renamed(plain(), PREFIX, f"{PREFIX}model."),
         dict.fromkeys(("peft", "vllm", "llamacpp"), "warns:twice"),
         {"peft": "wrong:modules", "vllm": "wrong:modules", "llamacpp": "refuses:modules"}),
    case("other-base", lambda: renamed(plain(), "layers.1", "layers.7"), {}, _ELSEWHERE),
    case("q-alone", lambda: plain(modules=("self_attn.q_proj",)), {"sglang": "refuses:partners"}),
    case("v-alone", lambda: plain(modules=("self_attn.v_proj",)), {"sglang": "refuses:partners"}),
    case("q-and-v", lambda: plain(modules=("self_attn.q_proj", "self_attn.v_proj"))),
    case("gate-alone", lambda: plain(modules=("mlp.gate_proj",))),
    case("up-alone", lambda: plain(modules=("mlp.up_proj",)), {"sglang": "warns:partners"}, unseen="sglang"),
    case("two-stacks",
         lambda: having(renamed(plain(modules=("self_attn.o_proj",)), "model.layers", "model.encoder.layers"),
                        renamed(plain(modules=("self_attn.o_proj",)), "model.layers", "model.decoder.layers").tensors),
         {"sglang": "wrong:modules"}, unrun="peft vllm llamacpp"),
    case("strange-module",
         lambda: renamed(plain(modules=("self_attn.o_proj",), target_modules=["dense"]), "o_proj", "dense"),
         {"sglang": "warns:targets"}, unrun=_ALL),
    case("unknown-field", lambda: plain(future_flag=True), {"peft": "warns:fields"}),
    case("unknown-field-unset", lambda: plain(future_flag=None)),
    case("old-peft", lambda: plain(corda_config=None), {"peft": "refuses:fields"}, options={"peft_version": "0.13.2"},
         unrun=_ALL),
    case("no-alpha", lambda: without(plain(), "lora_alpha"),
         {"vllm": "refuses:fields", "sglang": "refuses:fields", "llamacpp": "refuses:alpha"}),
    case("null-alpha", lambda: plain(lora_alpha=None),
         {"peft": "refuses:alpha", "vllm": "refuses:alpha", "sglang": "refuses:rank", "llamacpp": "refuses:alpha"}),
    case("task", lambda: plain(task_type="POETRY"), {"peft": "refuses:task"}),
    case("no-kind", lambda: without(plain(), "peft_type"), {"peft": "refuses:kind", "sglang": "refuses:kind"}),
    case("kind-from-the-future", lambda: plain(peft_type="NEXTLORA"),
         {"peft": "refuses:kind", "vllm": "wrong:kind", "sglang": "refuses:kind", "llamacpp": "wrong:kind"},
         unseen="vllm llamacpp"),
    case("loha",
         lambda: other_kind("LOHA", {f"hada_w{n}_{half}": shape for n in (1, 2) for half, shape in _HALVES.items()},
                            r=4, alpha=8),
         {"vllm": "refuses:kind", "sglang": "refuses:kind", "llamacpp": "refuses:kind"}, unseen="peft"),
    case("ia3", lambda: other_kind("IA3", {"ia3_l": (64, 1)}, feedforward_modules=[]),
         {"vllm": "refuses:kind", "sglang": "refuses:kind", "llamacpp": "refuses:kind"}, unseen="peft"),
    case("bone", lambda: other_kind("BONE", {"bone_block": (8, 8, 8)}, r=8),
         dict.fromkeys(_EVERYWHERE, "refuses:kind")),
    case("two-files", lambda: _beside(plain(), "optimizer.safetensors"), {"sglang": "warns:files"}, unrun="sglang"),
    case("added-tokens", lambda: _beside(plain(), "added_tokens.json", json.dumps({"<new>": VOCABULARY})),
         {"sglang": "warns:tokens"}, {"sglang": "refuses:tokens"}),
    case("copied-tokens", lambda: _beside(plain(), "added_tokens.json", json.dumps({"<old>": 7})),
         {"sglang": "warns:tokens"}, {}),
    case("no-base-name", lambda: plain(base_model_name_or_path=None), {"llamacpp": "warns:base"}, {}),
    case("private-base", lambda: plain(base_model_name_or_path="/home/me/llama"), {"llamacpp": "warns:base"}, {}),
    case("no-weights", lambda: _unweighted(plain()), dict.fromkeys(_EVERYWHERE, "refuses:weights")),
    case("no-config", lambda: Adapter({}, plain().tensors), dict.fromkeys(_EVERYWHERE, "refuses:layout")),
    case("conv1d", lambda: _gpt2(("c_attn", 192, 64)), {"sglang": "wrong:names", "llamacpp": "refuses:conv1d"},
         unrun=_ALL),
    case("conv1d-square", lambda: _gpt2(("c_proj", 64, 64)), {"sglang": "wrong:names", "llamacpp": "wrong:conv1d"},
         unrun=_ALL),
    case("vision", lambda: renamed(plain(), "model.layers", "vision_tower.layers"), {"llamacpp": "wrong:modules"},
         unrun="peft vllm sglang"),
)  # fmt: skip

MLX_CASES = (
    case("mlx-clean", mlx),
    case("mlx-no-keys", lambda: mlx(modules=tuple(SHAPES), lora_parameters=parameters())),
    case("mlx-rank", lambda: mlx(rank=4, lora_parameters=parameters()), {"mlx": "refuses:shape"}),
    case("mlx-alpha", lambda: mlx(lora_parameters=parameters(scale=None, alpha=16)), {"mlx": "refuses:fields"}),
    case("mlx-no-dropout", lambda: mlx(lora_parameters=parameters(dropout=None)), {"mlx": "refuses:fields"}),
    case("mlx-lora-layers", lambda: without(mlx(lora_layers=2), "num_layers"), {"mlx": "refuses:fields"}),
    case("mlx-extra", lambda: having(mlx(), {"model.norm.weight": numbers(HIDDEN)}), {"mlx": "refuses:names"}),
    case("mlx-magnitude", lambda: having(mlx(), {"model.layers.0.self_attn.q_proj.m": numbers(HIDDEN)}),
         {"mlx": "refuses:names"}),
    case("mlx-dora",
         lambda: having(mlx(fine_tune_type="dora"), {f"model.layers.{n}.{m}.m": numbers(HIDDEN) for n in range(LAYERS)
                                                   for m in ("self_attn.q_proj", "mlp.down_proj")})),
    case("mlx-half", lambda: without(mlx(), "model.layers.1.mlp.down_proj.lora_b"), {"mlx": "wrong:pair"}),
    case("mlx-keys", lambda: mlx(lora_parameters=parameters(keys=["self_attn.q_proj"])), {"mlx": "refuses:targets"}),
    case("mlx-last-layer", lambda: mlx(num_layers=1), {}, {"mlx": "refuses:layers"}),
    case("mlx-peft-names", lambda: _as_mlx(plain()), {"mlx": "refuses:names"}),
    case("mlx-twice", lambda: renamed(mlx(), "model.layers", "model.model.layers"), {"mlx": "warns:twice"},
         {"mlx": "refuses:modules"}),
    case("mlx-compiled", lambda: renamed(mlx(), "model.layers", "_orig_mod.model.layers"), {"mlx": "refuses:wrapper"}),
    case("mlx-npz", lambda: _unweighted(_beside(mlx(), "adapters.npz")), {"mlx": "refuses:weights"}),
)  # fmt: skip


def _cast(adapter: Adapter, dtype: Any) -> Adapter:
    adapter.tensors = {name: value.astype(dtype) for name, value in adapter.tensors.items()}
    return adapter


def _pickled(adapter: Adapter) -> Adapter:
    adapter.weights = "adapter_model.bin"
    return adapter


def _unweighted(adapter: Adapter) -> Adapter:
    adapter.weights = ""
    return adapter


def _beside(adapter: Adapter, name: str, text: str = "") -> Adapter:
    adapter.files[name] = text
    return adapter


def _as_mlx(adapter: Adapter) -> Adapter:
    return Adapter(mlx().config, adapter.tensors, weights="adapters.safetensors")


def _gpt2(*modules: tuple[str, int, int]) -> Adapter:
    adapter = plain(modules=(), fan_in_fan_out=True, target_modules=[name for name, _, _ in modules])
    for name, out, inner in modules:
        adapter.tensors |= factors(f"transformer.h.0.attn.{name}", out, inner, 8)
    return adapter


# --- GGUF files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GgufCase:
    """A GGUF file of an adapter of the tiny Llama, and what `check` says of it with the base, "severity:rule" or "".
    `tensors` come beside one pair on q_proj, `fields` in place of those of a LoRA."""

    expected: str = ""
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()
    fields: Mapping[str, str | float] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        from lrconvert.formats.exporters import gguf

        q_proj = gguf_pair("blk.0.attn_q", (4, HIDDEN), (HIDDEN, 4))
        values = {name: numbers(*shape) / 8 for name, shape in sorted((*q_proj, *self.tensors))}
        own = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
        fields = {"adapter.lora.alpha": 8.0, **own, **self.fields}
        path.write_bytes(b"".join(gguf._gguf(fields, list(values.items()), "F32")))
        return path


def gguf_pair(module: str, a: tuple[int, int], b: tuple[int, int]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return (f"{module}.weight.lora_a", a), (f"{module}.weight.lora_b", b)


GGUF_CASES = {
    "clean": GgufCase("", gguf_pair("blk.1.ffn_up", (3, HIDDEN), (INNER, 3))),
    "alpha-zero": GgufCase("", fields={"adapter.lora.alpha": 0.0}),
    "norm": GgufCase("wrong:norms", (("blk.0.attn_norm.weight", (HIDDEN,)),)),
    "model": GgufCase("refuses:kind", fields={"general.type": "model"}),
    "other-kind": GgufCase("refuses:kind", fields={"adapter.type": "prompt"}),
    "other-architecture": GgufCase("refuses:model", fields={"general.architecture": "qwen2"}),
    "half-a-pair": GgufCase("refuses:pair", gguf_pair("blk.1.ffn_up", (3, HIDDEN), (INNER, 3))[:1]),
    "bias": GgufCase("refuses:names", (("blk.0.attn_q.bias", (HIDDEN,)),)),
    "other-base": GgufCase("refuses:modules", gguf_pair("blk.7.ffn_up", (3, HIDDEN), (INNER, 3))),
    "narrower-base": GgufCase("refuses:shape", gguf_pair("blk.1.ffn_up", (3, HIDDEN - 16), (INNER, 3))),
    "turned": GgufCase("refuses:shape", gguf_pair("blk.1.ffn_down", (INNER, 3), (3, HIDDEN))),
    "ranks-at-odds": GgufCase("refuses:shape", gguf_pair("blk.1.ffn_up", (3, HIDDEN), (INNER, 5))),
}
