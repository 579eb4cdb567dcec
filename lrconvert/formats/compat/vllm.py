"""vLLM: ``--lora-modules NAME=FOLDER`` or a ``LoRARequest``. It reads few fields of the configuration and never the
adapter's kind, but it checks those few, and every tensor's name."""

from __future__ import annotations

from collections.abc import Iterator

from lrconvert.core.errors import OptionError
from lrconvert.formats.compat.base import Consumer, Finding, verdicts
from lrconvert.formats.compat.shared import rules, whole_names
from lrconvert.formats.compat.shared.rules import EXPAND, ServerOptions, check_base, right_base, words
from lrconvert.formats.compat.shared.subject import PEFT_PREFIX, Subject, example, leaf
from lrconvert.formats.expansions.ranks import VLLM_RANKS as RANKS

VERSION = "0.33.0"
refuses, wrong, warns = verdicts("vllm", VERSION)

HELPER = "vllm/lora/peft_helper.py PEFTHelper"
MODEL = "vllm/lora/lora_model.py LoRAModel"
LOAD = f"{MODEL}.from_local_checkpoint"
NAMES = "vllm/lora/utils.py parse_fine_tuned_lora_name"
MODULES = "vllm/lora/utils.py get_supported_lora_modules"
HEADS = ("classifier", "score")  # PEFTHelper._validate_features
MERGE = "merge it into the base and serve that"

# Text models of vllm/model_executor/models/registry.py whose class is not SupportsLoRA.
NO_LORA = words(
    """
    BailingMoeV2_5ForCausalLM BailingMoeV3ForCausalLM BeamForCausalLM BloomForCausalLM Cohere2MoeForCausalLM
    DbrxForCausalLM DeepseekV32ForCausalLM DeepseekV4ForCausalLM DomynEdgeForCausalLM DoryForCausalLM
    FalconForCausalLM FalconMambaForCausalLM FlintForCausalLM GPT2LMHeadModel GPTJForCausalLM Gemma3nForCausalLM
    Glm5NextForCausalLM GlmMoeDsaForCausalLM HCXVisionV2ForCausalLM HYV4ForCausalLM HrmTextForCausalLM
    IQuestLoopCoderForCausalLM InklingForCausalLM InklingForConditionalGeneration KimiLinearForCausalLM
    Mamba2ForCausalLM MambaForCausalLM MiMoV2FlashForCausalLM MiMoV2ForCausalLM MiniMaxM3SparseForCausalLM
    OrionForCausalLM Qwen4ExpForCausalLM StableLmForCausalLM Step1ForCausalLM Step3TextForCausalLM Step3p5ForCausalLM
    Step5ForCausalLM Zamba2ForCausalLM
    """
)
# Text models that take LoRA, but none on embed_tokens or lm_head: their embedding_modules are empty.
NO_EMBEDDINGS = words(
    """
    AXK1ForCausalLM AfmoeForCausalLM AliceAIForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM
    ChatGLMForConditionalGeneration ChatGLMModel DeepseekForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM
    Ernie4_5_MoeForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma4ForCausalLM GemmaForCausalLM Glm4ForCausalLM
    Glm4MoeForCausalLM Glm4MoeLiteForCausalLM GptOssForCausalLM HYV3ForCausalLM InternLM2ForCausalLM LagunaForCausalLM
    LongcatFlashForCausalLM LongcatFlashNgramForCausalLM MiMoForCausalLM MiniMaxM2ForCausalLM Ministral3ForCausalLM
    MistralForCausalLM MistralLarge3ForCausalLM MuseGlimmerForCausalLM OPTForCausalLM OlmoHybridForCausalLM
    OlmoeForCausalLM PanguEmbeddedForCausalLM PanguProMoEV2ForCausalLM PanguUltraMoEForCausalLM Plamo3ForCausalLM
    Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3NextForCausalLM Rnj1ForCausalLM SarvamMLAForCausalLM
    SarvamMoEForCausalLM
    """
)
_FEATURES = {
    "use_dora": ("dora", "DoRA is not implemented"),
    "lora_bias": ("lora-bias", "a bias of lora_B (lora_bias) is not implemented"),
    "alora_invocation_tokens": ("alora", "Activated LoRA is not implemented"),
    "layer_replication": ("replication", "layer_replication is not implemented"),
    "use_bdlora": ("bdlora", "block-diagonal LoRA is not implemented"),
    "use_qalora": ("qalora", "QA-LoRA is not implemented"),
}


def examine(subject: Subject, options: ServerOptions) -> Iterator[Finding]:
    limit = 16 if options.max_lora_rank is None else options.max_lora_rank
    if limit not in RANKS:
        fix = f"it takes {', '.join(map(str, RANKS))}"
        raise OptionError(f"vLLM {VERSION} has no --max-lora-rank {limit}", fix=fix)
    if (problem := rules.not_a_peft_folder(subject)) is not None:
        yield refuses("layout", *problem, f"{HELPER}.from_local_dir")
        return
    if subject.pickle:
        yield rules.pickled(subject, warns, LOAD)
    elif not subject.weights:
        yield rules.unweighted(refuses, LOAD)
    missing = rules.missing_fields(subject)
    if subject.kind not in ("LORA", ""):
        yield _other_kind(subject, missing)
        return
    if missing:
        what = f"the configuration lacks {', '.join(missing)}"
        yield refuses("fields", what, "write the fields", f"{HELPER}.from_dict")
        return
    yield from _numbers(subject, limit)
    yield from _features(subject)
    yield from _names(subject)
    yield from _factors(subject)
    yield from _base(subject)


def _other_kind(subject: Subject, missing: list[str]) -> Finding:
    """vLLM does not read peft_type: what becomes of another kind depends on what it has in common with LoRA."""
    what = f"the adapter is {subject.kind}, not LORA, which vLLM does not look at"
    if missing:
        return refuses("kind", f"{what}; it asks for the fields {', '.join(missing)}", EXPAND, f"{HELPER}.from_dict")
    unknown = [name for name in subject.others if not _is_head(name)]
    if unknown or not subject.tensors:
        names = f": {example(unknown)}" if unknown else ""
        return refuses("kind", f"{what}; its tensor names are refused{names}", EXPAND, NAMES)
    return wrong("kind", f"{what}; its tensors are read as LoRA", EXPAND, f"{HELPER}.from_dict")


def _numbers(subject: Subject, limit: int) -> Iterator[Finding]:
    bad = list(rules.bad_rank(subject, refuses, "use a positive integer", f"{HELPER}.__post_init__"))
    yield from bad
    if not bad and (top := max(rules.stated_ranks(subject).values())) > limit:
        enough = next((n for n in RANKS if n >= top), None)
        fix = "reduce the rank" if enough is None else f"start the server with --max-lora-rank {enough}"
        what = f"the largest rank is {top}, --max-lora-rank is {limit}"
        yield refuses("max-rank", what, fix, f"{HELPER}.validate_legal")
    yield from rules.bad_alpha(subject, refuses, f"{HELPER}._scaling")


def _features(subject: Subject) -> Iterator[Finding]:
    source = f"{HELPER}._validate_features"
    yield from rules.set_features(subject, refuses, MERGE, source, _FEATURES)
    if rules.changes_base(subject):
        fix = (
            "convert it to plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion), or set "
            "init_lora_weights to true if the served base has the changed weights already"
        )
        init = subject.config["init_lora_weights"]
        yield refuses("init", f"the initialization {init!r:.60} changes the base's weights", fix, source)
    if subject.config.get("bias", "none") != "none":
        what = f"bias is {subject.config['bias']!r:.40}: trained biases are not implemented"
        yield refuses("bias", what, MERGE, f"{HELPER}.validate_legal")
    if others := [m for m in subject.names("modules_to_save") if m not in HEADS]:
        what = f"modules_to_save may name classifier or score only, it names {example(others)}"
        yield refuses("saved", what, MERGE, source)


def _is_head(name: str) -> bool:
    parts = name.split(".")
    return len(parts) >= 2 and parts[-2] in HEADS and parts[-1] in ("weight", "bias")


def _names(subject: Subject) -> Iterator[Finding]:
    saved = subject.names("modules_to_save")
    heads = {name.split(".")[-2] for name in subject.others if _is_head(name)}
    unknown = [name for name in subject.others if not _readable(subject, name)]
    yield from refuses.of("names", unknown, "names that vLLM does not know", "remove the tensors, or merge them", NAMES)
    if unlisted := sorted(heads - set(saved)):
        yield refuses("saved", f"the head {unlisted[0]!r} is not in modules_to_save", "list it there", LOAD)
    if len(heads & set(saved)) > 1:
        yield refuses("saved", "two heads are saved, one is supported", MERGE, f"{MODEL}.from_lora_tensors")


def _readable(subject: Subject, name: str) -> bool:
    """Return True for names that are taken or skipped, and those that another finding has explained."""
    if name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")) or _is_head(name):
        return True
    explained = (
        (name.endswith(".lora_magnitude_vector") and subject.flag("use_dora"))
        or (name.endswith(".lora_B.bias") and subject.flag("lora_bias"))
        or (name.endswith(".bias") and subject.config.get("bias", "none") != "none")
    )
    return explained or any(f".{m}." in f".{name}" for m in subject.names("modules_to_save") if m not in HEADS)


def _factors(subject: Subject) -> Iterator[Finding]:
    if subject.weights and not subject.pairs and all(_readable(subject, name) for name in subject.others):
        what = "the file holds no LoRA factors: the base alone would answer"
        yield wrong("names", what, "is this a LoRA?", MODEL)
    yield from rules.incomplete_pairs(subject, refuses, "vllm/lora/layers set_lora")
    convolutions = [m for m, p in subject.pairs.items() if p.a is not None and len(p.a.shape) > 3]
    yield from refuses.of("conv", convolutions, "convolutions take no LoRA", MERGE, MODULES)
    yield from rules.integer_factors(subject, wrong, f"{MODEL}.from_lora_tensors")
    if odd := rules.ranks_at_odds(subject):
        module = odd[0]
        what = (
            f"{len(odd)} modules have another rank than the configuration says and are scaled by the latter, "
            f"{module!r:.120} by alpha / {subject.rank(module):g} at rank {subject.pairs[module].rank}"
        )
        yield wrong("shape", what, "correct r or rank_pattern", f"{HELPER}.get_rank_and_scaling")


def _base(subject: Subject) -> Iterator[Finding]:
    arch = subject.architecture
    if arch in NO_LORA:
        source = "vllm/config/lora.py LoRAConfig.verify_with_model_config"
        yield refuses("model", f"{arch} takes no LoRA", MERGE, source)
        return
    embeddings = [m for m, p in subject.pairs.items() if p.embedding or leaf(m) in ("lm_head", "embed_tokens")]
    if embeddings and arch in NO_EMBEDDINGS:
        yield refuses("embedding", f"{arch} takes no LoRA on {example(embeddings)}", MERGE, MODULES)
    elif embeddings and subject.base is None:
        yield warns("embedding", f"only some models take LoRA on {example(embeddings)}", check_base(), MODULES)
    vocabulary = subject.base_number("vocab_size")
    for module, pair in subject.pairs.items():
        if pair.embedding and pair.a is not None and vocabulary is not None and pair.a.shape[-1] != vocabulary:
            what = f"{module!r:.120} has {pair.a.shape[-1]} tokens, the base {vocabulary:g}"
            yield refuses("vocabulary", what, "train without added tokens, or merge", f"{MODEL}.from_lora_tensors")
    source = "vllm/lora/model_manager.py LoRAModelManager.activate_adapter"
    yield from whole_names.wrappers(subject, wrong, "they match no module and are left out silently", source)
    place = whole_names.placement(subject, _spelled)
    what = f"{len(place.lacking)} modules are not in the base and are left out silently"
    yield from wrong.of("modules", place.lacking, what, right_base(), source)
    if arch.endswith("ForCausalLM"):
        what = f"names are those of the bare model, none matches {arch}, the base alone answers"
        fix = "add the missing part (often `model.`) to every name"
        yield from wrong.of("modules", place.shorter, what, fix, source)
    if subject.base is None:
        yield from whole_names.doubled(subject, warns, source, _spelled)


def _spelled(module: str) -> str:
    """parse_fine_tuned_lora_name takes PEFT's prefix out wherever it stands, if the name begins with it."""
    return module.replace(PEFT_PREFIX, "")


CONSUMER = Consumer("vllm", "vLLM", VERSION, examine, ServerOptions)
