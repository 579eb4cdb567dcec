"""Adapters that are no LoRA, recognised by the names of their tensors: what each is, and what to do instead."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lrconvert.core.errors import EmptyAdapterError, NotLoraError, UnknownLayoutError, UnsupportedLoraError

_AS_LORA = "load it with its own tool, merge it into its base, and extract a LoRA from the difference of the two models"
_MERGE = "merge it into its base with the tool that trained it, and use the merged model"
_MERGE_NOT = "it is a model of its own beside the base, which no LoRA stands for; use it with the program it is for"
_NO_WEIGHTS = "it changes no weight of the base, so there is nothing to convert"

# (pattern of a name, what it is, what to do). The first whose pattern is in a name wins.
_KINDS = (
    (
        r"\.lora_[AB]\.(seed|coefficients)$",
        "a NOLA of a language model: its bases were drawn by the generator of the device that it was trained on, "
        "in the dtype of its coefficients, and on a GPU the numbers depend on how many processors the device has; "
        "they cannot be made again here",
        "with NOLA's own code, on the kind of GPU that it was trained on, merge it and use the merged model",
    ),
    (r"\.hada_(w\d|t\d)", "a LoHa: products of two low-rank matrices, element by element", _AS_LORA),
    (r"\.lokr_(w\d|t\d)", "a LoKr: Kronecker products", _AS_LORA),
    (r"\.oft_(blocks|diag|R|r)\b", "an OFT: rotations of the base's weights", _MERGE),
    (r"\.boft_", "a BOFT: rotations of the base's weights", _MERGE),
    (r"\.hra_u\b", "an HRA: reflections of the base's weights", _MERGE),
    (r"\.ia3_l\b|\.on_input$", "an (IA)^3: factors on activations", _MERGE),
    (r"\.lora_E\b|\.ranknum\b", "an AdaLoRA: singular values beside the factors", _AS_LORA),
    (r"vera_lambda_|^vera_[AB]\b", "a VeRA: scales of shared random matrices", _AS_LORA),
    (r"\.randlora_", "a RandLoRA: scales of shared random matrices", _AS_LORA),
    (r"\.fourierft_spectrum", "a FourierFT: entries of a spectrum", _AS_LORA),
    (r"prompt_embeddings|prompt_encoder|prefix_", "a tuned prompt", _NO_WEIGHTS),
    (
        r"^(emb_params|string_to_param\..*|string_to_token\..*|clip_[lg]|t5xxl)$",
        "a textual inversion: embeddings of a word",
        "it changes no weight, so there is nothing to convert; diffusers loads it with load_textual_inversion",
    ),
    (r"^lora_controlnet$", "a Control-LoRA: a ControlNet that is stored as a difference", "load it as a ControlNet"),
    (r"^(768|320|640|1024|1280)\.[01]\.linear", "a hypernetwork: layers before the attention's keys", _MERGE_NOT),
    (r"^ip_adapter\.|^image_proj\.", "an IP-Adapter: attention to pictures, beside that to texts", _MERGE_NOT),
    (r"\bexp_avg(_sq)?$", "the state of an optimizer", "give the adapter's weights, which lie beside it"),
    (
        r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.",
        "a whole checkpoint of a diffusion model",
        "give the LoRA here; what was fine-tuned becomes one by its difference from its base",
    ),
    (r"_custom_diffusion\.", "a Custom Diffusion: whole weights of the attention", _MERGE),
    (r"\.[ab][12]\.weight$", "a GLoRA", _AS_LORA),
)
# Parts of files that are LoRAs otherwise: dropping them would change the model.
_PARTS = (
    (r"\.(diff|diff_b|w_norm|b_norm|set_weight)$", "a whole difference of weights, not a pair of factors", _MERGE),
    (
        r"(^|\.)(q|k|v|o|out)_proj\.w_lora_[AB]$",
        "a CLIP-LoRA, which numbers its layers in an order that only its options tell",
        "merge it with its own code and use the merged model",
    ),
    (
        r"\.lora_\w+_adapter\.linear_(in|out)\.",
        "a LoRA of NeMo, whose fused layers keep rows in Megatron's order",
        "export it with NeMo as a Hugging Face adapter and convert that",
    ),
    (r"\.lora_(up|down)\.\d+\.weight$", "a pair of one slice of a fused layer", "save it again with sd-scripts"),
)
_FACTOR = re.compile(r"(?i)lora_?(a|b|up|down)\b|\.(up|down)\b|w_[ab]_\d")
_WHOLE = re.compile(r"\.(weight|bias|running_mean|running_var|num_batches_tracked|inv_freq)$")
_SCALAR = re.compile(r"\.(alpha|scale|lora_alpha|lora_dropout|dropout|dropout_p)\b")


def refuse(names: Sequence[str]) -> None:
    """Raise E-NOT-LORA if the names are those of another kind of adapter, E-LORA-FEATURE if they are parts of variants
    of LoRA that are not converted, E-EMPTY if there are only settings."""
    refuse_parts(names)
    if names and not any(_FACTOR.search(name) for name in names) and all(_SCALAR.search(name) for name in names):
        raise no_matrices(names)


def refuse_parts(names: Sequence[str]) -> None:
    """Raise E-NOT-LORA and E-LORA-FEATURE as `refuse` does, for names of what stands beside factors."""
    for table, error in ((_KINDS, NotLoraError), (_PARTS, UnsupportedLoraError)):
        for pattern, what, advice in table:
            for name in names:
                if re.search(pattern, name):
                    raise error(f"tensor {name!r:.120} belongs to {what}", fix=advice)


def no_matrices(names: Sequence[str]) -> EmptyAdapterError:
    """Return the error for a file whose tensors are settings alone."""
    what = f"the file holds {len(names)} settings such as {names[0]!r:.120}, and no matrices"
    return EmptyAdapterError(what, fix="the training saved no weights; export the adapter again")


def whole_weights(names: Sequence[str]) -> UnknownLayoutError | None:
    """Return the error for a file of a model's weights, None if the names are not those of one."""
    if not names or not all(_WHOLE.search(name) for name in names) or any(_FACTOR.search(name) for name in names):
        return None
    what = f"the file holds {len(names)} whole weights such as {names[0]!r:.120}, and no factors: it is of a model"
    fix = "give the LoRA here; what was fine-tuned becomes one by its difference from its base"
    return UnknownLayoutError(what, fix=fix)
