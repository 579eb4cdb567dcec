"""SGLang: ``--lora-paths NAME=FOLDER``. It reads five fields of the configuration, scales every module by alpha / r,
and finds a tensor's layer by ``layers.<n>.`` and its module by a part of its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from lrconvert.formats.compat.base import Consumer, Finding, verdicts
from lrconvert.formats.compat.shared import rules
from lrconvert.formats.compat.shared.rules import EXPAND, ServerOptions, bake, check_base, words
from lrconvert.formats.compat.shared.subject import PEFT_WEIGHTS, Subject, as_number, leaf

VERSION = "0.5.23"
refuses, wrong, warns = verdicts("sglang", VERSION)

CONFIG = "sglang/srt/lora/lora_config.py LoRAConfig"
ADAPTER = "sglang/srt/lora/lora.py LoRAAdapter"
PROCESS = f"{ADAPTER}._process_weight"
POOL = "sglang/srt/lora/mem_pool.py LoRAMemoryPool.load_lora_weight_to_buffer"
VALIDATE = "sglang/srt/lora/lora_manager.py LoRAManager.validate_new_adapter"
UTILS = "sglang/srt/lora/utils.py"
MERGE = "merge it into the base and serve that"

_LAYER = re.compile(r"layers\.(\d+)\.")  # sglang/srt/layers/utils/common.py get_layer_id
# sglang/srt/lora/utils.py get_normalized_target_modules, the part of it that joins modules.
_QKV = ("q_proj", "k_proj", "v_proj")
_FUSED = dict.fromkeys(_QKV, "qkv_proj") | dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")
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
_ALORA = ("alora", "Activated LoRA is ignored: the adapter acts from the first token on")


def examine(subject: Subject, options: ServerOptions) -> Iterator[Finding]:
    if (problem := rules.not_a_peft_folder(subject)) is not None:
        yield refuses("layout", *problem, f"{CONFIG}.get_lora_config")
        return
    yield from _files(subject)
    if subject.kind.lower() != "lora":
        kind = subject.kind or "of no stated kind"
        yield refuses("kind", f"the adapter is {kind}, not LORA", EXPAND, f"{ADAPTER}.__init__")
        return
    if missing := rules.missing_fields(subject):
        yield refuses("fields", f"the configuration lacks {', '.join(missing)}", "write the fields", CONFIG)
        return
    yield from _config(subject, options)
    yield from _tokens(subject)
    yield from _scales(subject)
    yield from _factors(subject)
    yield from _layers(subject)
    yield from _extras(subject)


def _files(subject: Subject) -> Iterator[Finding]:
    source = "sglang/srt/model_loader/loader.py DefaultModelLoader._prepare_weights"
    stored = sorted(name for name in subject.files if name.endswith(".safetensors"))
    if stored and stored != [PEFT_WEIGHTS]:
        others = [name for name in stored if name != PEFT_WEIGHTS]
        yield from warns.of("files", others, "every .safetensors file here is loaded", "move it away", source)
    elif subject.pickle:
        yield rules.pickled(subject, warns, source)
    elif not stored and not any(name.endswith((".bin", ".pt")) for name in subject.files):
        yield refuses("weights", "there are no weights", f"put {PEFT_WEIGHTS} there", source)


def _config(subject: Subject, options: ServerOptions) -> Iterator[Finding]:
    rank, alpha = subject.number("r"), subject.number("lora_alpha")
    if rank is None or alpha is None or rank <= 0 or not float(rank).is_integer():
        what = f"r is {subject.config['r']!r:.40} and lora_alpha {subject.config['lora_alpha']!r:.40}"
        yield refuses("rank", what, "use a positive integer and a number", f"{ADAPTER}.__init__")
    elif options.max_lora_rank is not None and rank > options.max_lora_rank:
        what = f"r is {rank:g}, --max-lora-rank is {options.max_lora_rank}"
        fix = f"start the server with --max-lora-rank {rank:g}"
        yield refuses("max-rank", what, fix, "sglang/srt/lora/mem_pool.py LoRAMemoryPool.can_support")
    if subject.flag("use_dora"):
        yield refuses("dora", "DoRA is not implemented", MERGE, VALIDATE)
    targets, fix = subject.config["target_modules"], "list the names of the modules"
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        what = f"target_modules is the pattern {targets!r:.120}; only a list, all or all-linear is taken"
        yield refuses("targets", what, fix, f"{UTILS} get_normalized_target_modules")
    elif not isinstance(targets, (str, list)):
        yield refuses("targets", f"target_modules is {targets!r:.60}", fix, CONFIG)
    yield from rules.set_features(subject, wrong, MERGE, CONFIG, {"alora_invocation_tokens": _ALORA})
    yield from rules.set_features(subject, refuses, MERGE, POOL)
    yield from rules.ignored_init(subject, wrong, CONFIG)


def _tokens(subject: Subject) -> Iterator[Finding]:
    vocabulary = subject.base_number("vocab_size")
    if vocabulary is not None:
        added = [token for token, n in subject.added_tokens.items() if (as_number(n) or 0) >= vocabulary]
        fix = "delete added_tokens.json if the base has these tokens, else merge"
        yield from refuses.of("tokens", added, "tokens are added to the vocabulary", fix, VALIDATE)
    elif subject.added_tokens:
        what = "added_tokens.json is here: tokens beyond the base's vocabulary are refused"
        yield warns("tokens", what, check_base(), VALIDATE)


def _scales(subject: Subject) -> Iterator[Finding]:
    rank, alpha = subject.number("r"), subject.number("lora_alpha")
    if rank is None or alpha is None or rank <= 0:
        return
    if changed := rules.rescaled(subject, lambda module, stored: alpha / rank):
        ignored = [key for key in ("use_rslora", "alpha_pattern", "rank_pattern") if subject.flag(key)]
        what = f"{' and '.join(ignored)} ignored, lora_alpha / r scales every module: {changed}"
        yield wrong("scale", what, bake(), f"{ADAPTER}.__init__")
    other = [m for m, pair in subject.pairs.items() if pair.rank not in (None, rank)]
    if other and not subject.flag("target_parameters"):
        module = other[0]
        what = f"{len(other)} modules are not of rank r = {rank:g}, {module!r:.120} is of {subject.pairs[module].rank}"
        yield refuses("shape", what, "pad all factors with zeros to one rank", POOL)


def _factors(subject: Subject) -> Iterator[Finding]:
    yield from rules.incomplete_pairs(subject, refuses, POOL)
    yield from rules.integer_factors(subject, wrong, f"{UTILS} copy_weight_into_buffer")
    embeddings = [m for m in subject.pairs if leaf(m) in _EMBEDDINGS]
    dropped = [m for m in subject.pairs if not _LAYER.search(m) and m not in embeddings]
    yield from wrong.of("names", dropped, "names without `layers.<n>.` are dropped without a word", MERGE, PROCESS)
    if isinstance(subject.config["target_modules"], list):
        listed = {leaf(name) for name in subject.names("target_modules")}
        unlisted = [m for m in embeddings if leaf(m) not in listed]
        what = "not in target_modules, so dropped without a word"
        yield from wrong.of("embedding", unlisted, what, "list them there", PROCESS)


def _layers(subject: Subject) -> Iterator[Finding]:
    """Modules inside layers: what SGLang fuses needs its partners, and what shares a slot overwrites one another."""
    slots: dict[tuple[str, str], list[str]] = {}
    for module in subject.pairs:
        if (layer := _LAYER.search(module)) and ".experts" not in module:
            slots.setdefault((layer[1], leaf(module)), []).append(module)
    twice = [modules for modules in slots.values() if len(modules) > 1]
    if twice:
        what = f"{twice[0][0]!r:.120} and {twice[0][1]!r:.120} go to one slot, the last one wins"
        yield wrong("modules", what, "keep the modules of the language model's decoder only", POOL)
    yield from _partners(slots)
    listed = {_FUSED.get(leaf(name), leaf(name)) for name in subject.names("target_modules")}
    unlisted = [modules[0] for (_, name), modules in slots.items() if listed and _FUSED.get(name, name) not in listed]
    yield from refuses.of("targets", unlisted, "modules that target_modules does not name", "name them there", POOL)
    strange = sorted({name for _, name in slots if name not in _KNOWN})
    what = "modules that only some model classes of SGLang know, others stop at them"
    source = f"{UTILS} get_default_hidden_dim"
    yield from warns.of("targets", strange, what, "try it with the model that you serve", source)
    depth = subject.base_number("num_hidden_layers")
    if depth is not None:
        deep = [module for (n, _), modules in slots.items() if int(n) >= depth for module in modules]
        yield from refuses.of("layers", deep, f"the base has {depth:g} layers", "give the right base", PROCESS)


def _partners(slots: Iterable[tuple[str, str]]) -> Iterator[Finding]:
    by_layer: dict[str, set[str]] = {}
    for layer, name in slots:
        by_layer.setdefault(layer, set()).add(name)
    for layer, names in sorted(by_layer.items()):
        if not names.isdisjoint(_QKV) and not {"q_proj", "v_proj"} <= names:
            what = f"layer {layer} adapts {', '.join(sorted(names.intersection(_QKV)))}"
            source = f"{ADAPTER}.normalize_qkv_proj"
            fix = "add the other with zero factors"
            yield refuses("partners", f"{what}: q_proj and v_proj are needed together", fix, source)
            break
    for layer, names in sorted(by_layer.items()):
        if "up_proj" in names and "gate_proj" not in names:
            what = f"layer {layer} adapts up_proj without gate_proj, which models with a gate refuse"
            yield warns("partners", what, "add gate_proj with zero factors", f"{ADAPTER}.normalize_gate_up_proj")
            break


def _extras(subject: Subject) -> Iterator[Finding]:
    inside = [name for name in subject.others if _LAYER.search(name) and not _explained(subject, name)]
    biases = [name for name in inside if name.endswith(".lora_B.bias")]
    what = "the bias of lora_B is not read or takes the place of lora_B"
    yield from wrong.of("lora-bias", biases, what, MERGE, POOL)
    unread = [name for name in inside if name not in biases]
    yield from refuses.of("extra", unread, "tensors inside layers that are no LoRA factors", MERGE, POOL)
    outside = [name for name in subject.others if not _LAYER.search(name) and ".base_layer." not in name]
    yield from wrong.of("saved", outside, "tensors outside the layers are dropped without a word", MERGE, PROCESS)


def _explained(subject: Subject, name: str) -> bool:
    """Return True for a factor by SGLang's rule (a part of the name), and for what another finding has named."""
    magnitude = name.endswith(".lora_magnitude_vector") and subject.flag("use_dora")
    return magnitude or _NAMED.search(name) is not None


CONSUMER = Consumer("sglang", "SGLang", VERSION, examine, ServerOptions)
