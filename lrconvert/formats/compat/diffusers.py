"""diffusers: ``pipeline.load_lora_weights(FOLDER)``. Every pipeline has a loader of its own: it loads what is named
after its models, translates some other layouts by their names, and passes by whatever belongs to no model, with a line
in the log at most. Some names it refuses, among them nearly every one without ``lora`` in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lrconvert.core.errors import LrcError
from lrconvert.core.wording import spelled
from lrconvert.formats.compat.base import Consumer, Finding, NoOptions, verdicts
from lrconvert.formats.compat.shared import rules
from lrconvert.formats.compat.shared.subject import PEFT_WEIGHTS, Subject
from lrconvert.formats.readers.diffusers import METADATA, settings_by_model

VERSION = "0.42.1"
refuses, wrong, _ = verdicts("diffusers", VERSION)

PIPELINE = "diffusers/loaders/lora_pipeline.py"
STATE_DICT = f"{PIPELINE} lora_state_dict"
LOAD = f"{PIPELINE} load_lora_weights"
INTO_MODEL = "diffusers/loaders/peft.py PeftAdapterMixin.load_lora_adapter"
KOHYA = "diffusers/loaders/lora_conversion_utils.py _convert_non_diffusers_lora_to_diffusers"
KWARGS = "diffusers/utils/peft_utils.py get_peft_kwargs"
CONFIG = "diffusers/utils/peft_utils.py _create_lora_config"
TEXT = "diffusers/utils/state_dict_utils.py convert_state_dict_to_diffusers"


@dataclass(frozen=True)
class Family:
    """Pipelines with one loader: how their classes begin, the models that it loads into, and the beginnings of names
    that it translates; `marks` are parts of names by which it knows other layouts of its own."""

    classes: tuple[str, ...]
    models: tuple[str, ...]
    translates: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()

    @property
    def has_unet(self) -> bool:
        return "unet" in self.models


_FLAT = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_ONE = ("transformer",)
# The first whose class begins the pipeline's; longer ones stand before shorter.
FAMILIES = (
    Family(("StableDiffusion3",), ("transformer", "text_encoder", "text_encoder_2")),
    Family(("StableDiffusionXL", "KolorsImg2Img", "AnimateDiffSDXL"), ("unet", "text_encoder", "text_encoder_2"),
           _FLAT),
    Family(("StableDiffusion", "LatentConsistency", "AnimateDiff", "Kolors", "StableUnCLIP"), ("unet", "text_encoder"),
           _FLAT),
    Family(("Flux2",), _ONE, ("diffusion_model.", "base_model.model."), (".lora_down.weight",)),
    Family(("Flux", "Chroma", "BriaFiboPipeline", "BriaFiboEdit", "VisualCloze"), ("transformer", "text_encoder"), (),
           (".lora_down.weight", "processor", "query_norm.scale", "base_model")),
    Family(("LTX2",), ("transformer", "connectors"), ("diffusion_model.", "text_embedding_projection.")),
    Family(("LTX",), _ONE, ("diffusion_model.",)),
    Family(("Wan", "LucyEdit", "ChronoEdit", "AnyFlow"), ("transformer", "transformer_2"),
           ("diffusion_model.", "lora_unet_")),
    Family(("SkyReelsV2", "Helios"), _ONE, ("diffusion_model.", "lora_unet_")),
    Family(("HunyuanVideo", "HunyuanSkyreels"), _ONE, (), ("img_attn_qkv",)),
    Family(("Lumina2",), _ONE, ("diffusion_model.",)),
    Family(("HiDream",), _ONE, (), ("diffusion_model",)),
    Family(("QwenImage", "ZImage"), _ONE, ("diffusion_model.", "lora_unet_"), ("default.", ".alpha")),
    Family(("Krea2", "ErnieImage"), _ONE, ("diffusion_model.", "base_model.model.")),
    Family(("Ideogram4",), _ONE, ("diffusion_model.",), (".attention.qkv.",)),
    Family(("CogVideoX", "ConsisID", "Mochi", "AuraFlow", "Sana", "CogView4", "Kandinsky5", "Cosmos2_5", "BriaFibo2"),
           _ONE),
)  # fmt: skip
# What a file without a base is taken for, by the names in it.
_SOME_UNET = Family((), ("unet", "text_encoder", "text_encoder_2"), _FLAT)
_OF_UNETS = re.compile(
    r"unet\.|lora_unet_(?:down|up|input|output)_blocks_|lora_unet_mid(?:dle)?_block|lora_te[12]?_text_model_"
)
_SOME_MODELS = ("transformer", "transformer_2", "transformer_ref", "connectors", "text_encoder", "text_encoder_2")
_SOME_TRANSFORMER = Family((), _SOME_MODELS, ("diffusion_model.", "lora_unet_", "lora_transformer_"))
_FLAT_MODULE = re.compile(
    r"lora_(?P<role>unet|te[12]?)_(?P<again>(?:lora_)?(?:unet|te[12]?|text_encoder)_)?(?P<inside>.+)"
)
_OF_STABILITY = re.compile(r"(?:input_blocks|output_blocks|middle_block|time_embed|label_emb|out)_\d")
_FACTORS = (".lora_down.weight", ".lora_up.weight")
_FOREIGN = ("kohya", "diffusers", "lycoris", "raw", "peft", "")
_MODULE = re.compile(r"(?P<module>.+?)\.(?:lora_[AB](?:\.[^.]+)?|lora_(?:down|up)|lora\.(?:down|up))\.weight")


def examine(subject: Subject, options: NoOptions) -> Iterator[Finding]:
    how = f"convert or export it: {rules.export_call('diffusers')}"
    if subject.layout == "lrconvert":
        yield refuses("layout", "a compact lrconvert file, which no program but lrconvert reads", how, STATE_DICT)
        return
    if subject.layout == "mlx" or subject.foreign not in _FOREIGN:
        what = f"the layout {subject.foreign or subject.layout}, whose names diffusers does not know"
        yield refuses("layout", what, how, STATE_DICT)
        return
    if subject.layout == "peft" or subject.weights == PEFT_WEIGHTS:
        what = "a PEFT folder, whose names say nothing of the model of a pipeline that they are for"
        yield refuses("layout", what, how, STATE_DICT)
        return
    names = [info.name for info in subject.tensors if "dora_scale" not in info.name]
    lost = [info.name for info in subject.tensors if "dora_scale" in info.name]
    what = f"{len(lost)} magnitudes of a DoRA (dora_scale) are left out, and the rest is taken for a plain LoRA"
    fix = f"convert it with {spelled('base', ...)} and {spelled('bake_dora', ...)}, and export that to diffusers"
    yield from wrong.of("dora", lost, what, fix, STATE_DICT)
    family = _family(subject, names)
    if family.has_unet and all(name.startswith(_FLAT) for name in names):
        yield from _flat(subject, names)
        return
    if not family.has_unet and _is_translated(family, names):
        yield from _elsewhere(subject, family, names)
        return
    yield from _named(subject, family, names, how)


def _family(subject: Subject, names: Sequence[str]) -> Family:
    """Return the loader of the base's pipeline; without a base what the names look like."""
    for family in FAMILIES:
        if subject.pipeline.startswith(family.classes):
            return family
    return _SOME_UNET if any(_OF_UNETS.match(name) for name in names) else _SOME_TRANSFORMER


def _is_translated(family: Family, names: Sequence[str]) -> bool:
    return any(name.startswith(family.translates) or any(mark in name for mark in family.marks) for name in names)


# --- kohya's layout of UNets ----------------------------------------------------------------------------------------


def _flat(subject: Subject, names: Sequence[str]) -> Iterator[Finding]:
    left = [name for name in names if not name.endswith((*_FACTORS, ".alpha"))]
    fix = f"convert or export it, which multiplies the factors out: {rules.export_call('diffusers')}"
    yield from refuses.of("names", left, "names that its translation does not know", fix, KOHYA)
    ups = {name.removesuffix(_FACTORS[1]) for name in names if name.endswith(_FACTORS[1])}
    alone = [n for n in names if n.endswith(_FACTORS[0]) and n.removesuffix(_FACTORS[0]) not in ups]
    yield from refuses.of("pair", alone, "lora_up is missing", "the file is incomplete: save it again", KOHYA)
    texts = [name for name in names if name.startswith("lora_te")]
    if texts and not any("_out_proj." in name or "_mlp_" in name for name in texts):
        what = f"no out_proj and no mlp of a text encoder, by one of which it tells the layout: {texts[0]!r:.160}"
        yield refuses("names", what, f"export it: {rules.export_call('diffusers')}", TEXT)
    alphas = [name for name in names if name.endswith(".alpha")]
    if alphas and METADATA in subject.metadata:
        what = f"the file has alphas and {METADATA}, and it takes one of them"
        yield refuses("alpha", what, f"remove one, or export it: {rules.export_call('diffusers')}", CONFIG)
    if alphas and len(alphas) < len(ups):
        without = sorted(ups - {name.removesuffix(".alpha") for name in alphas})
        what = f"{len(without)} modules state no alpha and get that of the others, {without[0]!r:.160} for one"
        yield wrong("alpha", what, f"bake the scales: {rules.export_call('diffusers')}", KWARGS)
    elif len({subject.alphas[name] for name in alphas if name in subject.alphas}) > 1:
        what = "the alphas differ, and it takes the most frequent one for all modules of a UNet"
        yield wrong("alpha", what, f"bake the scales: {rules.export_call('diffusers')}", KWARGS)
    zero = [name for name in alphas if subject.alphas.get(name) == 0]
    what = "an alpha of 0 makes an update of zero there, and sd-scripts takes it for none (a scale of 1)"
    yield from wrong.of("alpha", zero, what, "write the alpha that was meant, r for a scale of 1", KWARGS)
    yield from _flat_modules(subject, sorted(ups))


def _flat_modules(subject: Subject, modules: Sequence[str]) -> Iterator[Finding]:
    """Modules whose names begin twice, or which the base's models do not have, where their names are known."""
    lacking = []
    for module in modules:
        match = _FLAT_MODULE.fullmatch(module)
        if match is None:
            continue
        model = {"unet": "unet", "te2": "text_encoder_2"}.get(match["role"], "text_encoder")
        known = {name.replace(".", "_").removeprefix("text_model_") for name in subject.components.get(model, ())}
        of_stability = _OF_STABILITY.match(match["inside"]) is not None
        if match["again"] or (known and not of_stability and match["inside"].removeprefix("text_model_") not in known):
            lacking.append(module)
    yield from _lacking(lacking, modules)


# --- other layouts --------------------------------------------------------------------------------------------------


def _elsewhere(subject: Subject, family: Family, names: Sequence[str]) -> Iterator[Finding]:
    """Return what is said of files that a loader of its own translates: whose models are not loaded."""
    models = [f"lora_te{n}_" for n in (2, 3)] if "text_encoder" in family.models else ["lora_te"]
    others = [name for name in names if name.startswith(tuple(models))]
    if "text_encoder_2" not in family.models:
        yield from _left_out(others, family)


def _left_out(names: Sequence[str], family: Family) -> Iterator[Finding]:
    what = f"tensors of models that its loader passes by (it loads {', '.join(family.models)})"
    fix = "merge that part into its model: lrconvert merge-into-base PIPELINE FILE"
    yield from wrong.of("models", names, what, fix, INTO_MODEL)


def _named(subject: Subject, family: Family, names: Sequence[str], how: str) -> Iterator[Finding]:
    """Return what is said of files whose names begin with a model of the pipeline, as diffusers writes them."""
    takes_alpha = family.classes[:1] == ("Flux",)
    strange = [name for name in names if "lora" not in name and not (takes_alpha and name.endswith(".alpha"))]
    if family.has_unet or not takes_alpha:
        yield from refuses.of("names", strange, "names without `lora` in them", how, LOAD)
        if strange:
            return
    elif strange:
        fix = "load them with load_textual_inversion, from a file of their own"
        yield from wrong.of("names", strange, "tensors that are passed by", fix, INTO_MODEL)
    own = {name for name in names if name.startswith(tuple(f"{model}." for model in family.models))}
    others = [name for name in names if name not in own and name not in strange]
    if not own and others:
        first = others[0]
        what = (
            f"no name begins with one of its models ({', '.join(family.models)}), so nothing is loaded: {first!r:.160}"
        )
        yield wrong("names", what, how, INTO_MODEL)
        return
    yield from _left_out(others, family)
    yield from _metadata(subject, sorted(own))
    yield from _partly_scaled(family, sorted(own))
    yield from _modules(subject, sorted(own))


def _metadata(subject: Subject, names: Sequence[str]) -> Iterator[Finding]:
    if METADATA not in subject.metadata:
        return
    fix = f"write it anew: {rules.export_call('diffusers')}"
    try:
        settings = settings_by_model(subject.metadata)
    except LrcError as error:
        yield refuses("metadata", f"its {METADATA} cannot be used: {error.what:.200}", fix, CONFIG)
        return
    models = sorted({name.partition(".")[0] for name in names})
    without = [model for model in models if model not in settings]
    what = f"{METADATA} says nothing of some models of the file, which have no target_modules then"
    yield from refuses.of("metadata", without, what, fix, CONFIG)
    ranks: Mapping[str, int] = {
        name.rpartition(".lora_A")[0]: info.shape[0] for name, info in subject.by_name.items() if ".lora_A" in name
    }
    odd = [
        module
        for module, rank in ranks.items()
        if (own := settings.get(module.partition(".")[0])) is not None
        and own.ranks.value(module.partition(".")[2]) != rank
    ]
    yield from refuses.of("metadata", odd, f"{METADATA} states other ranks than the tensors have", fix, INTO_MODEL)


def _partly_scaled(family: Family, names: Sequence[str]) -> Iterator[Finding]:
    for model in family.models:
        inside = [name for name in names if name.startswith(f"{model}.")]
        modules = {match["module"] for name in inside if (match := _MODULE.fullmatch(name)) is not None}
        scaled = {name.partition(".lora_magnitude_vector")[0] for name in inside if ".lora_magnitude_vector" in name}
        if scaled and modules - scaled:
            without = sorted(modules - scaled)
            what = f"{len(without)} modules of a DoRA have no magnitudes and get those of the base, {without[0]!r:.160}"
            yield wrong("dora", what, f"convert it with {spelled('bake_dora', ...)}", KWARGS)


def _modules(subject: Subject, names: Sequence[str]) -> Iterator[Finding]:
    """Modules that the base's models do not have, where their names are known."""
    lacking = []
    for name in names:
        match = _MODULE.fullmatch(name)
        model, _, module = ("" if match is None else match["module"]).partition(".")
        known = subject.components.get(model)
        plain = module.replace(".processor.", ".")
        if known and not {plain, plain.removeprefix("text_model."), f"text_model.{plain}"} & known:
            lacking.append(f"{model}.{module}")
    every = {match["module"] for name in names if (match := _MODULE.fullmatch(name)) is not None}
    yield from _lacking(sorted(set(lacking)), sorted(every))


def _lacking(lacking: Sequence[str], every: Sequence[str]) -> Iterator[Finding]:
    fix = "is this the right base, and does the prefix of the model stand once in the names?"
    if lacking and len(lacking) == len(every):
        yield from refuses.of("modules", lacking, "none of the modules is in the base's models", fix, INTO_MODEL)
    else:
        what = "modules that the base's models do not have, left out with a line in the log"
        yield from wrong.of("modules", lacking, what, fix, INTO_MODEL)


CONSUMER = Consumer("diffusers", "diffusers", VERSION, examine)
