"""vLLM: ``--lora-modules NAME=FOLDER`` or a ``LoRARequest``. It reads few fields of the configuration and never the
adapter's kind, but it checks those few, and every tensor's name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from lrconvert.core.errors import OptionError
from lrconvert.formats.compat import base
from lrconvert.formats.compat.base import RESAVE, Consumer, Finding, Subject, example, leaf, words

VERSION = "0.33.0"
refuses = partial(Finding, "refuses", "vllm", VERSION)
wrong = partial(Finding, "wrong", "vllm", VERSION)
warns = partial(Finding, "warns", "vllm", VERSION)

HELPER = "vllm/lora/peft_helper.py PEFTHelper"
MODEL = "vllm/lora/lora_model.py LoRAModel"
NAMES = "vllm/lora/utils.py parse_fine_tuned_lora_name"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py MaxLoRARanks
HEADS = ("classifier", "score")  # PEFTHelper._validate_features
EXPAND = "expand it to plain LoRA first"
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


@dataclass(frozen=True)
class Options:
    """Settings of the server."""

    max_lora_rank: int | None = field(
        default=None, metadata={"help": "The server's own --max-lora-rank. vllm: 16 if not given; sglang: no limit."}
    )


def examine(subject: Subject, options: Options) -> Iterator[Finding]:
    limit = 16 if options.max_lora_rank is None else options.max_lora_rank
    if limit not in RANKS:
        raise OptionError(
            f"vLLM {VERSION} has no --max-lora-rank {limit}", fix=f"it takes {', '.join(map(str, RANKS))}"
        )
    if (found := base.not_a_peft_folder(subject)) is not None:
        yield refuses("layout", *found, f"{HELPER}.from_local_dir")
        return
    if subject.pickle:
        what = f"the weights are a pickle, {subject.pickle}, and were not looked at"
        yield warns("pickle", what, RESAVE, f"{MODEL}.from_local_checkpoint")
    elif not subject.weights:
        fix = "put the weights there under this name"
        yield refuses("weights", f"there is no {base.PEFT_WEIGHTS}", fix, f"{MODEL}.from_local_checkpoint")
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in subject.config]
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
    unknown = [info.name for info in subject.others if not _is_head(info.name)]
    if unknown or not subject.tensors:
        names = f": {example(unknown)}" if unknown else ""
        return refuses("kind", f"{what}; its tensor names are refused{names}", EXPAND, NAMES)
    return wrong("kind", f"{what}; its tensors are read as LoRA", EXPAND, f"{HELPER}.from_dict")


def _numbers(subject: Subject, limit: int) -> Iterator[Finding]:
    ranks = {"r": subject.config.get("r"), **subject.pattern("rank_pattern")}
    bad = {k: v for k, v in ranks.items() if not isinstance(v, int) or isinstance(v, bool) or v <= 0}
    if bad:
        key, value = next(iter(bad.items()))
        yield refuses(
            "rank", f"the rank {key!r:.80} is {value!r:.40}", "use a positive integer", f"{HELPER}.__post_init__"
        )
    elif (top := max(ranks.values())) > limit:
        enough = next((n for n in RANKS if n >= top), None)
        fix = "reduce the rank" if enough is None else f"start the server with --max-lora-rank {enough}"
        yield refuses(
            "max-rank", f"the largest rank is {top}, --max-lora-rank is {limit}", fix, f"{HELPER}.validate_legal"
        )
    alphas = {"lora_alpha": subject.config.get("lora_alpha"), **subject.pattern("alpha_pattern")}
    for key, value in alphas.items():
        if base.as_number(value) is None:
            yield refuses("alpha", f"the alpha {key!r:.80} is {value!r:.40}", "use a number", f"{HELPER}._scaling")
            break


def _features(subject: Subject) -> Iterator[Finding]:
    source = f"{HELPER}._validate_features"
    features = {
        "use_dora": ("dora", "DoRA is not implemented"),
        "lora_bias": ("lora-bias", "a bias of lora_B (lora_bias) is not implemented"),
        "alora_invocation_tokens": ("alora", "Activated LoRA is not implemented"),
        "layer_replication": ("replication", "layer_replication is not implemented"),
        "use_bdlora": ("bdlora", "block-diagonal LoRA is not implemented"),
        "use_qalora": ("qalora", "QA-LoRA is not implemented"),
    }
    for key, (rule, what) in features.items():
        if subject.flag(key):
            yield refuses(rule, what, MERGE, source)
    if base.changes_base(subject):
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
    heads = {info.name.split(".")[-2] for info in subject.others if _is_head(info.name)}
    unknown = [info.name for info in subject.others if not _readable(subject, info.name)]
    if unknown:
        yield refuses(
            "names", f"names that vLLM does not know: {example(unknown)}", "remove the tensors, or merge them", NAMES
        )
    if loose := sorted(heads - set(saved)):
        what = f"the head {loose[0]!r} is not in modules_to_save"
        yield refuses("saved", what, "list it there", f"{MODEL}.from_local_checkpoint")
    if len(heads & set(saved)) > 1:
        yield refuses("saved", "two heads are saved, one is supported", MERGE, f"{MODEL}.from_lora_tensors")


def _readable(subject: Subject, name: str) -> bool:
    """Names that are taken or skipped, and those that another finding has explained."""
    if name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")) or _is_head(name):
        return True
    explained = (
        (name.endswith(".lora_magnitude_vector") and subject.flag("use_dora"))
        or (name.endswith(".lora_B.bias") and subject.flag("lora_bias"))
        or (name.endswith(".bias") and subject.config.get("bias", "none") != "none")
    )
    return explained or any(f".{m}." in f".{name}" for m in subject.names("modules_to_save") if m not in HEADS)


def _factors(subject: Subject) -> Iterator[Finding]:
    if subject.weights and not subject.pairs and all(_readable(subject, info.name) for info in subject.others):
        fix = "is this a LoRA?"
        yield wrong("names", "the file holds no LoRA factors: the base alone would answer", fix, f"{MODEL}")
    if halves := base.incomplete(subject):
        what = f"lora_A or lora_B is missing or does not fit: {example(halves)}"
        yield refuses("pair", what, "the file is incomplete: save it again", "vllm/lora/layers set_lora")
    if conv := [m for m, p in subject.pairs.items() if p.a is not None and len(p.a.shape) > 3]:
        what = f"convolutions take no LoRA: {example(conv)}"
        yield refuses("conv", what, MERGE, "vllm/lora/utils.py get_supported_lora_modules")

    if codes := base.not_floats(subject):
        what = f"factors that are no floats are read as plain numbers: {example(codes)}"
        yield wrong("dtype", what, "store them as F32, F16 or BF16", f"{MODEL}.from_lora_tensors")
    if odd := base.ranks_at_odds(subject):
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
    source = "vllm/lora/utils.py get_supported_lora_modules"
    if embeddings and arch in NO_EMBEDDINGS:
        yield refuses("embedding", f"{arch} takes no LoRA on {example(embeddings)}", MERGE, source)
    elif embeddings and subject.base is None:
        what = f"only some models take LoRA on {example(embeddings)}"
        yield warns("embedding", what, "give --base to have it checked", source)
    vocabulary = subject.base_number("vocab_size")
    for module, pair in subject.pairs.items():
        if pair.embedding and pair.a is not None and vocabulary is not None and pair.a.shape[-1] != vocabulary:
            what = f"{module!r:.120} has {pair.a.shape[-1]} tokens, the base {vocabulary:g}"
            yield refuses("vocabulary", what, "train without added tokens, or merge", f"{MODEL}.from_lora_tensors")
    lacking, shorter = base.outside_base(subject)
    source = "vllm/lora/model_manager.py LoRAModelManager.activate_adapter"
    if lacking:
        what = f"{len(lacking)} modules are not in the base and are left out silently: {example(lacking)}"
        yield wrong("modules", what, "is this the right base?", source)
    if shorter and arch.endswith("ForCausalLM"):
        what = f"names are those of the bare model, none matches {arch}, the base alone answers: {example(shorter)}"
        yield wrong("modules", what, "add the missing part (often `model.`) to every name", source)


CONSUMER = Consumer("vllm", "vLLM", VERSION, examine, Options)
