"""SGLang: ``--lora-paths NAME=FOLDER``. It reads five fields of the configuration, scales every module by alpha / r,
and finds a tensor's layer by ``layers.<n>.`` and its module by a part of its name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from lrconvert.formats.compat import base
from lrconvert.formats.compat.base import BAKE, RESAVE, Consumer, Finding, Subject, example, leaf, words

VERSION = "0.5.23"
refuses = partial(Finding, "refuses", "sglang", VERSION)
wrong = partial(Finding, "wrong", "sglang", VERSION)
warns = partial(Finding, "warns", "sglang", VERSION)

CONFIG = "sglang/srt/lora/lora_config.py LoRAConfig"
ADAPTER = "sglang/srt/lora/lora.py LoRAAdapter"
POOL = "sglang/srt/lora/mem_pool.py LoRAMemoryPool.load_lora_weight_to_buffer"
MANAGER = "sglang/srt/lora/lora_manager.py LoRAManager"
UTILS = "sglang/srt/lora/utils.py"
EXPAND = "expand it to plain LoRA first"
MERGE = "merge it into the base and serve that"

_LAYER = re.compile(r"layers\.(\d+)\.")  # sglang/srt/layers/utils/common.py get_layer_id
# sglang/srt/lora/utils.py get_normalized_target_modules, the part of it that joins modules.
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
# sglang/srt/lora/utils.py _KNOWN_LORA_TARGET_MODULES and the names that are mapped onto them.
_KNOWN = words(
    """
    qkv_proj qkvr o_proj wo_ud out_proj in_proj in_proj_qkvz up_proj gate_up_proj down_proj fc1_latent_proj
    fc2_latent_proj embed_tokens lm_head fused_qkv_a_proj_with_mqa q_b_proj kv_b_proj q_proj k_proj v_proj gate_proj
    vocab_emb embeddings word_embeddings output unembed_tokens q_a_proj kv_a_proj_with_mqa wq_b wk weights_proj w1 w2
    w3 in_proj_q in_proj_k in_proj_v in_proj_z x_proj wq_du wk_dv wv_dv wr_du
    """
)
_NAMED = re.compile(r"\.lora_[AB]\.[^.]+\.weight")  # saved under an adapter name; "lora_A" in the name is enough
_EMBEDDINGS = ("embed_tokens", "lm_head", "unembed_tokens")


@dataclass(frozen=True)
class Options:
    """Settings of the server."""

    max_lora_rank: int | None = field(
        default=None, metadata={"help": "The server's own --max-lora-rank. vllm: 16 if not given; sglang: no limit."}
    )


def examine(subject: Subject, options: Options) -> Iterator[Finding]:
    if (found := base.not_a_peft_folder(subject)) is not None:
        yield refuses("layout", *found, f"{CONFIG}.get_lora_config")
        return
    yield from _files(subject)
    if subject.kind.lower() != "lora":
        named = subject.kind or "of no stated kind"
        yield refuses("kind", f"the adapter is {named}, not LORA", EXPAND, f"{ADAPTER}.__init__")
        return
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if key not in subject.config]:
        yield refuses("fields", f"the configuration lacks {', '.join(missing)}", "write the fields", CONFIG)
        return
    yield from _config(subject, options)
    yield from _scales(subject)
    yield from _factors(subject)
    yield from _extras(subject)


def _files(subject: Subject) -> Iterator[Finding]:
    source = "sglang/srt/model_loader/loader.py DefaultModelLoader._prepare_weights"
    stored = sorted(name for name in subject.files if name.endswith(".safetensors"))
    if stored and stored != [base.PEFT_WEIGHTS]:
        others = [name for name in stored if name != base.PEFT_WEIGHTS]
        yield warns("files", f"every .safetensors file here is loaded: {example(others)}", "move it away", source)
    elif subject.pickle:
        yield warns("pickle", f"the weights are a pickle, {subject.pickle}, and were not looked at", RESAVE, source)
    elif not stored and not any(name.endswith((".bin", ".pt")) for name in subject.files):
        yield refuses("weights", "there are no weights", f"put {base.PEFT_WEIGHTS} there", source)


def _config(subject: Subject, options: Options) -> Iterator[Finding]:
    rank, alpha = subject.number("r"), subject.number("lora_alpha")
    if rank is None or alpha is None or rank <= 0 or not float(rank).is_integer():
        what = f"r is {subject.config['r']!r:.40} and lora_alpha {subject.config['lora_alpha']!r:.40}"
        yield refuses("rank", what, "use a positive integer and a number", f"{ADAPTER}.__init__")
    elif options.max_lora_rank is not None and rank > options.max_lora_rank:
        what = f"r is {rank:g}, --max-lora-rank is {options.max_lora_rank}"
        fix = f"start the server with --max-lora-rank {rank:g}"
        yield refuses("max-rank", what, fix, "sglang/srt/lora/mem_pool.py LoRAMemoryPool.can_support")
    if subject.flag("use_dora"):
        yield refuses("dora", "DoRA is not implemented", MERGE, f"{MANAGER}.validate_new_adapter")
    targets = subject.config["target_modules"]
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        what = f"target_modules is the pattern {targets!r:.120}; only a list, all or all-linear is taken"
        yield refuses("targets", what, "list the names of the modules", f"{UTILS} get_normalized_target_modules")
    elif not isinstance(targets, (str, list)):
        yield refuses("targets", f"target_modules is {targets!r:.60}", "list the names of the modules", CONFIG)
    for key, rule, what in (
        ("alora_invocation_tokens", "alora", "Activated LoRA is ignored: the adapter acts from the first token on"),
    ):
        if subject.flag(key):
            yield wrong(rule, what, MERGE, CONFIG)
    for key, rule, what in (
        ("use_qalora", "qalora", "the factors of QA-LoRA have other shapes"),
        ("use_bdlora", "bdlora", "the factors of block-diagonal LoRA have other shapes"),
        ("layer_replication", "replication", "the replicated layers do not exist"),
        ("target_parameters", "experts", "expert stacks as PEFT stores them (target_parameters) are not read"),
    ):
        if subject.flag(key):
            yield refuses(rule, what, MERGE, POOL)
    if base.changes_base(subject):
        init = subject.config["init_lora_weights"]
        fix = "convert it to plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        yield wrong(
            "init", f"the initialization {init!r:.60} changes the base's weights, which is ignored", fix, CONFIG
        )
    yield from _tokens(subject)


def _tokens(subject: Subject) -> Iterator[Finding]:
    vocabulary = subject.base_number("vocab_size")
    source = f"{MANAGER}.validate_new_adapter"
    fix = "delete added_tokens.json if the base has these tokens, else merge"
    if vocabulary is not None:
        added = [token for token, n in subject.added_tokens.items() if (base.as_number(n) or 0) >= vocabulary]
        if added:
            yield refuses("tokens", f"tokens are added to the vocabulary: {example(added)}", fix, source)
    elif subject.added_tokens:
        what = "added_tokens.json is here: tokens beyond the base's vocabulary are refused"
        yield warns("tokens", what, "give --base to have it checked", source)


def _scales(subject: Subject) -> Iterator[Finding]:
    rank, alpha = subject.number("r"), subject.number("lora_alpha")
    if rank is None or alpha is None or rank <= 0:
        return
    if changed := base.rescaled(subject, lambda module, stored: alpha / rank):
        ignored = [key for key in ("use_rslora", "alpha_pattern", "rank_pattern") if subject.flag(key)]
        what = f"{' and '.join(ignored)} ignored, lora_alpha / r scales every module: {changed}"
        yield wrong("scale", what, BAKE, f"{ADAPTER}.__init__")
    other = [m for m, pair in subject.pairs.items() if pair.rank not in (None, rank)]
    if other and not subject.flag("target_parameters"):
        module = other[0]
        what = f"{len(other)} modules are not of rank r = {rank:g}, {module!r:.120} is of {subject.pairs[module].rank}"
        yield refuses("shape", what, "pad all factors with zeros to one rank", POOL)


def _factors(subject: Subject) -> Iterator[Finding]:
    if halves := base.incomplete(subject):
        what = f"lora_A or lora_B is missing or does not fit: {example(halves)}"
        yield refuses("pair", what, "the file is incomplete: save it again", POOL)
    if codes := base.not_floats(subject):
        what = f"factors that are no floats are read as plain numbers: {example(codes)}"
        yield wrong("dtype", what, "store them as F32, F16 or BF16", f"{UTILS} copy_weight_into_buffer")
    embeddings = [m for m in subject.pairs if leaf(m) in _EMBEDDINGS]
    dropped = [m for m in subject.pairs if not _LAYER.search(m) and m not in embeddings]
    if dropped:
        what = f"names without `layers.<n>.` are dropped without a word: {example(dropped)}"
        yield wrong("names", what, MERGE, f"{ADAPTER}._process_weight")
    targets = subject.config["target_modules"]
    listed = {leaf(name) for name in subject.names("target_modules")}
    if loose := [m for m in embeddings if isinstance(targets, list) and leaf(m) not in listed]:
        what = f"not in target_modules, so dropped without a word: {example(loose)}"
        yield wrong("embedding", what, "list them there", f"{ADAPTER}._process_weight")
    yield from _layers(subject)


def _layers(subject: Subject) -> Iterator[Finding]:
    """Modules inside layers: what SGLang fuses needs its partners, and what shares a slot overwrites one another."""
    slots: dict[tuple[str, str], list[str]] = {}
    for module in subject.pairs:
        if (found := _LAYER.search(module)) and ".experts" not in module:
            slots.setdefault((found[1], leaf(module)), []).append(module)
    twice = [modules for modules in slots.values() if len(modules) > 1]
    if twice:
        what = f"{twice[0][0]!r:.120} and {twice[0][1]!r:.120} go to one slot, the last one wins"
        yield wrong("modules", what, "keep the modules of the language model's decoder only", POOL)
    by_layer: dict[str, set[str]] = {}
    for layer, name in slots:
        by_layer.setdefault(layer, set()).add(name)
    for layer, names in sorted(by_layer.items()):
        if names & {"q_proj", "k_proj", "v_proj"} and not {"q_proj", "v_proj"} <= names:
            present = ", ".join(sorted(names & {"q_proj", "k_proj", "v_proj"}))
            what = f"layer {layer} adapts {present}: q_proj and v_proj are needed together"
            yield refuses("partners", what, "add the other with zero factors", f"{ADAPTER}.normalize_qkv_proj")
            break
    for layer, names in sorted(by_layer.items()):
        if "up_proj" in names and "gate_proj" not in names:
            what = f"layer {layer} adapts up_proj without gate_proj, which models with a gate refuse"
            yield warns("partners", what, "add gate_proj with zero factors", f"{ADAPTER}.normalize_gate_up_proj")
            break
    listed = {_FUSED.get(leaf(name), leaf(name)) for name in subject.names("target_modules")}
    loose = [ms[0] for (_, name), ms in slots.items() if listed and _FUSED.get(name, name) not in listed]
    if loose:
        what = f"modules that target_modules does not name: {example(loose)}"
        yield refuses("targets", what, "name them there", POOL)
    strange = sorted({name for _, name in slots if name not in _KNOWN})
    if strange:
        what = f"modules that only some model classes of SGLang know, others stop at them: {example(strange)}"
        yield warns("targets", what, "try it with the model that you serve", f"{UTILS} get_default_hidden_dim")
    depth = subject.base_number("num_hidden_layers")
    if depth is not None and (deep := [m for (n, _), ms in slots.items() if int(n) >= depth for m in ms]):
        what = f"the base has {depth:g} layers: {example(deep)}"
        yield refuses("layers", what, "is this the right base?", f"{ADAPTER}._process_weight")


def _extras(subject: Subject) -> Iterator[Finding]:
    inside = [info.name for info in subject.others if _LAYER.search(info.name) and not _explained(subject, info.name)]
    biases = [name for name in inside if name.endswith(".lora_B.bias")]
    if biases:
        what = f"the bias of lora_B is not read or takes the place of lora_B: {example(biases)}"
        yield wrong("lora-bias", what, MERGE, POOL)
    if inside := [name for name in inside if name not in biases]:
        what = f"tensors inside layers that are no LoRA factors: {example(inside)}"
        yield refuses("extra", what, MERGE, POOL)
    outside = [info.name for info in subject.others if not _LAYER.search(info.name)]
    if outside := [name for name in outside if ".base_layer." not in name]:
        what = f"tensors outside the layers are dropped without a word: {example(outside)}"
        yield wrong("saved", what, MERGE, f"{ADAPTER}._process_weight")


def _explained(subject: Subject, name: str) -> bool:
    """A factor by SGLang's rule (a part of the name), or what another finding has named."""
    if _NAMED.search(name):
        return True
    return name.endswith(".lora_magnitude_vector") and subject.flag("use_dora")


CONSUMER = Consumer("sglang", "SGLang", VERSION, examine, Options)
