"""llama.cpp: ``convert_lora_to_gguf.py FOLDER``, then ``--lora FILE.gguf``. The converter stores the factors and
lora_alpha; the runtime multiplies by alpha / rank of each stored pair. Nearly all of the configuration is unread."""

from __future__ import annotations

import math
import ntpath
import posixpath
import re
from collections.abc import Iterator

from lrconvert.formats import gguf_names
from lrconvert.formats.compat.base import Consumer, Finding, NoOptions, verdicts
from lrconvert.formats.compat.shared import rules, whole_names
from lrconvert.formats.compat.shared.rules import EXPAND, bake, check_base, right_base, words
from lrconvert.formats.compat.shared.subject import PEFT_PREFIX, Subject, example, leaf
from lrconvert.lora.base_names import ties_embeddings

VERSION = "as in llama-cpp-python 0.3.36"
refuses, wrong, warns = verdicts("llamacpp", VERSION)

CONVERTER = "convert_lora_to_gguf.py"
TENSORS = f"{CONVERTER} LoraModel.get_tensors"
FILTER = "conversion/base.py TextModel.filter_tensors"
RUNTIME = "src/llama-adapter.cpp llama_adapter_lora_init_impl"
SCALE = "src/llama-adapter.h get_scale"
GRAPH = "src/models"
MERGE = "merge it into the base and convert that"

# conversion/base.py TextModel.filter_tensors: parts of names that no text model has.
_SKIPPED_STARTS = words(
    """
    mlp vit. vpm. siglip2. conformer. merger. resampler. sound_encoder. sound_projection. speech_embeddings.
    """
)
_SKIPPED = words(
    """
    visual. vision. audio. talker. vision_ audio_ token2wav. code2wav. projector. pre_mm_projector_norm image_newline
    view_seperator patch_embed patch_embedding patch_merger. patch_merge_mlp. model.connector.
    """
)
_POSITIONS = re.compile("pos|wpe")
_CONV1D = ("c_attn", "c_proj", "c_fc", "c_fc2")


def examine(subject: Subject, options: NoOptions) -> Iterator[Finding]:
    if subject.foreign == "gguf":  # what the converter makes: the runtime loads it as it is
        yield from _file(subject)
        return
    if (problem := rules.not_a_peft_folder(subject)) is not None:
        yield refuses("layout", *problem, CONVERTER)
        return
    if subject.pickle == "adapter_model.bin":
        yield rules.pickled(subject, warns, CONVERTER)
    elif not subject.weights:
        yield rules.unweighted(refuses, CONVERTER)
    if subject.kind not in ("LORA", ""):
        yield _other_kind(subject)
        return
    if subject.number("lora_alpha") is None:
        yield refuses("alpha", "lora_alpha is missing or no number", "write it", f"{CONVERTER} LoraModel")
    yield from _names(subject)
    yield from _config(subject)
    yield from _factors(subject)
    yield from whole_names.wrappers(subject, refuses, "which are refused", TENSORS)
    yield from _conv1d(subject)
    yield from _base(subject)


# --- a GGUF file -----------------------------------------------------------------------------------------------------

_FACTORS = (".lora_a", ".lora_b")
_INPUTS = re.compile(r"blk\.\d+\.(attn_(q|k|v|qkv)|ffn_(up|gate))\.weight")  # layers that read the hidden state


def _file(subject: Subject) -> Iterator[Finding]:
    kind = subject.config.get("general.type"), subject.config.get("adapter.type")
    if kind != ("adapter", "lora"):
        shown = f"general.type is {kind[0]!r:.40} and adapter.type {kind[1]!r:.40}"
        yield refuses("kind", f"the file is no LoRA: {shown}", "give the adapter's file", RUNTIME)
        return
    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    for info in subject.tensors:
        if info.name.endswith(_FACTORS):
            halves.setdefault(info.name[:-7], {})[info.name[-1]] = info.shape
    if not halves:
        yield wrong("names", "the file holds no LoRA factors", "is this a LoRA?", RUNTIME)
    rest = [info.name for info in subject.tensors if not info.name.endswith(_FACTORS)]
    norms = [name for name in rest if name.endswith("_norm.weight")]
    yield from wrong.of("norms", norms, "trained norms are left out when loading", MERGE, RUNTIME)
    unknown = [name for name in rest if name not in norms]
    yield from refuses.of("names", unknown, "tensors other than LoRA factors are refused", MERGE, RUNTIME)
    lone = [name for name, both in halves.items() if len(both) < 2]
    yield from refuses.of(
        "pair", lone, "a factor without the other half is refused", "convert the adapter again", RUNTIME
    )
    pairs = {name: (both["a"], both["b"]) for name, both in halves.items() if len(both) == 2}
    odd = [name for name, (a, b) in pairs.items() if "token_embd" not in name and a[-2:-1] != b[-1:]]
    yield from refuses.of(
        "shape", odd, "factors that are no (r, in) and (out, r) are refused", "convert it again", RUNTIME
    )
    yield from _tied(subject, [name for name in halves if name.startswith(("token_embd.", "output."))])
    own = subject.config.get("general.architecture")
    family = next((family for family in gguf_names.FAMILIES.values() if family.id == own), None)
    if family is not None:
        yield from _unused([name for name in halves if not family.is_adapted(name.removesuffix(".weight"))])
    yield from _on_base(subject, pairs)


def _on_base(subject: Subject, pairs: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> Iterator[Finding]:
    """Yield what does not fit the base that is given; of a family that is not known here nothing is said."""
    family = gguf_names.family_of(subject.base or {})
    if family is None:
        return
    own = subject.config.get("general.architecture")
    if own != family.id:
        what = f"the adapter is for the architecture {own!r:.40}, the base is a {family.id!r}"
        yield refuses("model", what, right_base(), RUNTIME)
    blocks = subject.base_number("num_hidden_layers") or subject.base_number("n_layer") or math.inf
    absent = [name for name in pairs if name.startswith("blk.") and int(name.split(".")[1]) >= blocks]
    yield from refuses.of("modules", absent, f"{len(absent)} layers are not in the base", right_base(), RUNTIME)
    width = subject.base_number("hidden_size") or subject.base_number("n_embd")
    wide = [name for name, (a, _) in pairs.items() if width and _INPUTS.fullmatch(name) and a[-1] != width]
    what = f"{len(wide)} layers do not read the base's {width} numbers"
    yield from refuses.of("shape", wide, what, right_base(), RUNTIME)


def _unused(layers: list[str]) -> Iterator[Finding]:
    """Yield a finding on layers of which the runtime loads a LoRA, and computes without it."""
    what = "updates of layers are loaded and left out of what is computed"
    yield from wrong.of("modules", layers, what, MERGE, GRAPH)


# --- a PEFT folder ---------------------------------------------------------------------------------------------------


def _other_kind(subject: Subject) -> Finding:
    """The converter does not read peft_type either: the names decide, and lora_alpha."""
    what = f"the adapter is {subject.kind}, not LORA, which is not looked at"
    if subject.pairs and not subject.others and subject.number("lora_alpha") is not None:
        return wrong("kind", f"{what}; its tensors are read as LoRA", EXPAND, CONVERTER)
    names = f": {example(subject.others)}" if subject.others else ""
    return refuses("kind", f"{what}; what it stores is refused{names}", EXPAND, TENSORS)


def _names(subject: Subject) -> Iterator[Finding]:
    """The converter takes factors, skips base layers, keeps norms (which the runtime skips), and stops at all else."""
    norms = [name for name in subject.others if "_layernorm" in name or ".norm" in name]
    rest = [name for name in subject.others if name not in norms and ".base_layer.weight" not in name]
    unknown = [name for name in rest if not _skipped(name)]
    if all(name.endswith(".lora_magnitude_vector") for name in unknown):
        yield from refuses.of("dora", unknown, "the magnitudes of DoRA are refused", MERGE, TENSORS)
    else:
        yield from refuses.of("names", unknown, "tensors other than LoRA factors are refused", MERGE, TENSORS)
    yield from wrong.of("norms", norms, "trained norms are left out when loading", MERGE, RUNTIME)


def _skipped(name: str) -> bool:
    bare = name.replace(PEFT_PREFIX, "")
    return bare.startswith(tuple(_SKIPPED_STARTS)) or any(part in bare for part in _SKIPPED)


def _config(subject: Subject) -> Iterator[Finding]:
    if subject.flag("use_dora") and not any("lora_magnitude_vector" in name for name in subject.others):
        yield wrong("dora", "use_dora is ignored", MERGE, CONVERTER)
    yield from rules.set_features(subject, refuses, MERGE, RUNTIME)
    yield from rules.ignored_init(subject, wrong, CONVERTER)
    alpha = subject.number("lora_alpha")
    # get_scale takes alpha 0 for "no alpha" and leaves the factors as they are.
    if alpha is not None and (changed := rules.rescaled(subject, lambda m, rank: alpha / rank if alpha else 1.0)):
        ignored = [key for key in ("use_rslora", "alpha_pattern") if subject.flag(key)]
        reason = f"{' and '.join(ignored)} ignored" if ignored else "lora_alpha / rank of the tensors is the scale"
        yield wrong("scale", f"{reason}: {changed}", bake(), SCALE)


def _factors(subject: Subject) -> Iterator[Finding]:
    if subject.weights and not subject.pairs and not subject.others:
        yield wrong("names", "the file holds no LoRA factors", "is this a LoRA?", TENSORS)
    if odd := rules.ranks_at_odds(subject):
        module = odd[0]
        what = (
            f"{len(odd)} modules have another rank than the configuration says and are scaled by the former, "
            f"{module!r:.120} by alpha / {subject.pairs[module].rank}"
        )
        yield warns("shape", what, "correct r or rank_pattern", SCALE)
    yield from rules.incomplete_pairs(subject, refuses, TENSORS)
    yield from rules.integer_factors(subject, wrong, "conversion/base.py ModelBase.prepare_tensors")
    dropped = [module for module in subject.pairs if _skipped(f"{module}.weight")]
    yield from wrong.of("modules", dropped, "modules outside the text model are dropped without a word", MERGE, FILTER)


def _conv1d(subject: Subject) -> Iterator[Finding]:
    """The converters of GPT-2 and Jais transpose Conv1D weights, and a LoRA's factors too, which are not transposed."""
    model = (subject.base or {}).get("model_type")
    if not (model in ("gpt2", "jais") if subject.base is not None else subject.flag("fan_in_fan_out")):
        return
    shapes = {
        module: (pair.b.shape[0], pair.a.shape[-1])
        for module, pair in subject.pairs.items()
        if leaf(module) in _CONV1D and pair.a is not None and pair.b is not None
    }
    oblong = [module for module, (out, inner) in shapes.items() if out != inner]
    what, source = "Conv1D updates come out transposed", "conversion/gpt2.py GPT2Model.modify_tensors"
    if oblong:
        yield from refuses.of("conv1d", oblong, f"{what}, the file does not load", MERGE, source)
    else:
        yield from wrong.of("conv1d", list(shapes), what, MERGE, source)


def _base(subject: Subject) -> Iterator[Finding]:
    tokens = [m for m, pair in subject.pairs.items() if pair.embedding and not _POSITIONS.search(leaf(m))]
    heads = [*tokens, *(module for module in subject.pairs if leaf(module) == "lm_head")]
    if subject.base is None:
        base = subject.config.get("base_model_name_or_path")
        if not isinstance(base, str) or not base or posixpath.isabs(base) or ntpath.isabs(base):
            shown = "no base" if not base else f"the base by a path, {base!r:.80}"
            what = f"the configuration names {shown}, which the converter would load"
            yield warns("base", what, "give the converter --base FOLDER (its config.json is enough)", CONVERTER)
        yield from _tied(subject, heads)
        yield from whole_names.doubled(subject, warns, TENSORS, _spelled)
        return
    if subject.architecture and subject.architecture not in ARCHITECTURES:
        what = f"the base's architecture {subject.architecture!r:.80} is not known"
        yield refuses("model", what, "use a newer llama.cpp if it has it", "conversion/__init__.py TEXT_MODEL_MAP")
    yield from _tied(subject, heads)
    if (family := gguf_names.family_of(subject.base)) is not None:
        names = {module: family.named(_spelled(module)) for module in subject.pairs}
        yield from _unused([module for module, name in names.items() if name and not family.is_adapted(name)])
    place = whole_names.placement(subject, _spelled)
    lacking = [module for module in place.lacking if not _skipped(f"{module}.weight")]
    yield from refuses.of("modules", lacking, f"{len(lacking)} modules are not in the base", right_base(), RUNTIME)


def _tied(subject: Subject, ends: list[str]) -> Iterator[Finding]:
    """Yield a finding on LoRAs on tied embeddings: there is no tensor of the head to adapt (Gemma's converter drops the
    factors, without a word), and those of the tokens abort the program where the head multiplies by them."""
    if subject.base is None:
        what = "a base whose lm_head is tied to its embeddings stops or aborts the program"
        yield from warns.of("embedding", ends, what, check_base(), RUNTIME)
    elif ties_embeddings(subject.base):
        what = "the base's lm_head is tied to its embeddings: a LoRA on either stops or aborts the program"
        yield from refuses.of("embedding", ends, what, MERGE, RUNTIME)


def _spelled(module: str) -> str:
    """get_base_tensor_name takes PEFT's prefix out wherever it stands."""
    return module.replace(PEFT_PREFIX, "")


# conversion/__init__.py TEXT_MODEL_MAP.
ARCHITECTURES = words(
    """
    AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM ArcticForCausalLM AudioFlamingo3ForConditionalGeneration
    BaiChuanForCausalLM BaichuanForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM BailingMoeV3ForCausalLM
    BailingMoeV3VLForConditionalGeneration BambaForCausalLM BertForMaskedLM BertForSequenceClassification BertModel
    BitNetForCausalLM BitnetForCausalLM BloomForCausalLM BloomModel CamembertModel ChameleonForCausalLM
    ChameleonForConditionalGeneration ChatGLMForConditionalGeneration ChatGLMModel CodeShellForCausalLM
    CogVLMForCausalLM Cohere2ForCausalLM Cohere2MoeForCausalLM CohereForCausalLM DFlash2DraftModel DFlashDraftModel
    DSparkDraftModel DSparkSpeculator DbrxForCausalLM DeciLMForCausalLM DeepseekForCausalLM DeepseekOCRForCausalLM
    DeepseekV2ForCausalLM DeepseekV32ForCausalLM DeepseekV3ForCausalLM DeepseekV4DSparkModel DeepseekV4ForCausalLM
    DistilBertForMaskedLM DistilBertForSequenceClassification DistilBertModel Dots1ForCausalLM Dots3NoteForCausalLM
    Dots3NoteForConditionalGeneration Dots3NoteTextForCausalLM DotsOCRForCausalLM DreamModel Eagle3DraftModel
    Eagle3LlamaForCausalLM Eagle3Speculator Ernie4_5ForCausalLM Ernie4_5_ForCausalLM Ernie4_5_MoeForCausalLM
    EuroBertModel Exaone4ForCausalLM Exaone4_5_ForConditionalGeneration ExaoneForCausalLM ExaoneMoEForCausalLM
    ExaoneMoeForCausalLM FalconForCausalLM FalconH1ForCausalLM FalconMambaForCausalLM GPT2LMHeadModel
    GPTBigCodeForCausalLM GPTNeoXForCausalLM GPTRefactForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
    Gemma3ForConditionalGeneration Gemma3TextModel Gemma3nForCausalLM Gemma3nForConditionalGeneration
    Gemma4AssistantForCausalLM Gemma4DSparkModel Gemma4ForCausalLM Gemma4ForConditionalGeneration
    Gemma4UnifiedAssistantForCausalLM Gemma4UnifiedForConditionalGeneration GemmaForCausalLM Glm4ForCausalLM
    Glm4MoeForCausalLM Glm4MoeLiteForCausalLM Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration
    Glm5NextForConditionalGeneration GlmForCausalLM GlmMoeDsaForCausalLM GlmOcrForConditionalGeneration
    GptOssForCausalLM GraniteForCausalLM GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM
    GraniteMoeSharedForCausalLM GraniteSWAForCausalLM GraniteSpeechForConditionalGeneration
    GraniteSpeechPlusForConditionalGeneration GraniteSwitchForCausalLM Grok1ForCausalLM GrokForCausalLM
    GroveMoeForCausalLM HYV3ForCausalLM HYV4ForCausalLM HrmTextForCausalLM HunYuanDenseV1ForCausalLM
    HunYuanMoEV1ForCausalLM HunYuanVLForConditionalGeneration IQuestCoderForCausalLM InternLM2ForCausalLM
    InternLM3ForCausalLM JAISLMHeadModel Jais2ForCausalLM JambaForCausalLM JanusForConditionalGeneration
    JinaBertForMaskedLM JinaBertModel JinaEmbeddingsV5Model KORMoForCausalLM KimiK25ForConditionalGeneration
    KimiK3ForConditionalGeneration KimiLinearForCausalLM KimiLinearModel KimiVLForConditionalGeneration
    LFM2ForCausalLM LLaDAMoEModel LLaDAMoEModelLM LLaDAModelLM LLaMAForCausalLM LagunaForCausalLM Lfm25AudioTokenizer
    Lfm2BidirectionalModel Lfm2DSparkDraftModel Lfm2ForCausalLM Lfm2Model Lfm2MoeForCausalLM LingDSparkModel
    Llama4ForCausalLM Llama4ForConditionalGeneration LlamaBidirectionalModel LlamaForCausalLM LlamaForCausalLMEagle3
    LlamaModel LlavaForConditionalGeneration LlavaStableLMEpochForCausalLM MPTForCausalLM MT5ForConditionalGeneration
    MaincoderForCausalLM Mamba2ForCausalLM MambaForCausalLM MambaLMHeadModel MapleForCausalLM MellumForCausalLM
    MiMoV2FlashForCausalLM MiMoV2ForCausalLM MiniCPM3ForCausalLM MiniCPMForCausalLM
    MiniCPMV4_6ForConditionalGeneration MiniMaxM1ForCausalLM MiniMaxM2ForCausalLM MiniMaxM3SparseForCausalLM
    MiniMaxM3SparseForConditionalGeneration MiniMaxText01ForCausalLM Ministral3ForCausalLM
    Mistral3ForConditionalGeneration MistralForCausalLM MixtralForCausalLM ModernBertForMaskedLM
    ModernBertForSequenceClassification ModernBertModel MuseGlimmerAssistantModel MuseGlimmerForConditionalGeneration
    NanbeigeForCausalLM NemotronForCausalLM NemotronHForCausalLM NemotronHPuzzleForCausalLM NeoBERT
    NeoBERTForSequenceClassification NeoBERTLMHead NomicBertModel OLMoForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM
    OlmoForCausalLM OlmoeForCausalLM OpenELMForCausalLM OrionForCausalLM PLMForCausalLM PLaMo2ForCausalLM
    PLaMo3ForCausalLM PaddleOCRVLForConditionalGeneration PanguEmbeddedForCausalLM Phi3ForCausalLM Phi4ForCausalLMV
    PhiForCausalLM PhiMoEForCausalLM Plamo2ForCausalLM Plamo3ForCausalLM PlamoForCausalLM PocketTTSModel
    QWenLMHeadModel Qwen2AudioForConditionalGeneration Qwen2ForCausalLM Qwen2Model Qwen2MoeForCausalLM
    Qwen2VLForConditionalGeneration Qwen2VLModel Qwen2_5OmniModel Qwen2_5_VLForConditionalGeneration
    Qwen3ASRForConditionalGeneration Qwen3DSparkModel Qwen3ForCausalLM Qwen3Model Qwen3MoeForCausalLM
    Qwen3NextForCausalLM Qwen3OmniMoeForConditionalGeneration Qwen3TTSForConditionalGeneration
    Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen3_5ForCausalLM
    Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration Qwen4ExpForCausalLM
    Qwen4ExpForConditionalGeneration RND1 RWForCausalLM RWKV6Qwen2ForCausalLM RWKV7ForCausalLM
    RobertaForSequenceClassification RobertaModel RuGPT3XLForCausalLM Rwkv6ForCausalLM Rwkv7ForCausalLM
    RwkvHybridForCausalLM Sarashina2VisionForCausalLM SarvamMoEForCausalLM SeedOssForCausalLM SmallThinkerForCausalLM
    SmolLM3ForCausalLM SolarOpenForCausalLM Spark2_5ForCausalLM StableLMEpochForCausalLM StableLmForCausalLM
    Starcoder2ForCausalLM Step3p5ForCausalLM Step3p7ForConditionalGeneration StepVLForConditionalGeneration
    T5EncoderModel T5ForConditionalGeneration T5WithLMHeadModel TalkieForCausalLM UMT5ForConditionalGeneration
    UMT5Model UltravoxModel UnlimitedOCRForCausalLM VLlama3ForCausalLM VoxtralForConditionalGeneration WavTokenizerDec
    XLMRobertaForSequenceClassification XLMRobertaModel XverseForCausalLM YoutuForCausalLM
    YoutuVLForConditionalGeneration modeling_grove_moe.GroveMoeForCausalLM modeling_sarvam_moe.SarvamMoEForCausalLM
    """
)

CONSUMER = Consumer("llamacpp", "llama.cpp", VERSION, examine)
