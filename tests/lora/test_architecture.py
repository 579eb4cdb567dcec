"""What transformers' classes say of a base: what is tied, under which names, and how it is taken apart."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import since_transformers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from models import one_target, save_base

from lrconvert.core.dtypes import Stored
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.lora import architecture, base_names, ties
from lrconvert.lora.adapter import MATRIX, TRANSPOSED, LoraAdapter, Target
from lrconvert.lora.architecture import TIE
from lrconvert.lora.ties import Tie

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS: dict[str, Any] = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
BOTH = {
    **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 1},
}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2}

# class -> model type, sizes, the embedding of the input, the head, all names of that tensor, and whether they can part
CASES: dict[str, tuple[str, dict[str, Any], str, str, int, bool]] = {
    "LlamaForCausalLM": ("llama", SIZES | {TIE: True}, "model.embed_tokens.weight", "lm_head.weight", 2, True),
    "MambaForCausalLM": ("mamba", SIZES | {"state_size": 8}, "backbone.embeddings.weight", "lm_head.weight", 2, True),
    "BioGptForCausalLM": ("biogpt", SIZES, "biogpt.embed_tokens.weight", "output_projection.weight", 2, True),
    "ModernBertForMaskedLM": (
        "modernbert",
        SIZES | {"cls_token_id": 1, "sep_token_id": 2},
        "model.embeddings.tok_embeddings.weight",
        "decoder.weight",
        2,
        True,
    ),
    "BertForMaskedLM": (
        "bert",
        SIZES,
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.weight",
        2,
        True,
    ),
    "WhisperForConditionalGeneration": (
        "whisper",
        BOTH,
        "model.decoder.embed_tokens.weight",
        "proj_out.weight",
        2,
        True,
    ),
    "BartForConditionalGeneration": ("bart", BOTH, "model.shared.weight", "lm_head.weight", 4, True),
    "T5ForConditionalGeneration": ("t5", T5, "shared.weight", "lm_head.weight", 4, False),
    "UMT5ForConditionalGeneration": ("umt5", T5, "shared.weight", "lm_head.weight", 4, False),
}


def config_of(title: str) -> dict[str, Any]:
    family, sizes = CASES[title][:2]
    return {"model_type": family, "architectures": [title], **TOKENS, **sizes}


# Before, ModernBERT's configuration does not take its own defaults.
YOUNG = {"ModernBertForMaskedLM": since_transformers("5.22")}


@pytest.mark.parametrize("title", [pytest.param(title, marks=YOUNG.get(title, ())) for title in CASES])
def test_the_class_names_what_is_tied(title: str) -> None:
    """Embeddings, heads and ties are those of the class, by whatever names; untying works or is known not to."""
    _, _, embedding, head, count, can_part = CASES[title]
    config = config_of(title)
    found = architecture.of(config)
    assert found is not None and found.name == title and found.is_tied
    assert found.inputs == {embedding} and found.outputs == {head}
    others = found.shared_with(embedding)
    assert head in others and len(others) == count - 1
    assert set(found.sources) >= others and found.shapes[head] == found.shapes[embedding] == (40, 16)
    changes = ties.untied(config, [Tie((embedding, *sorted(others)), {embedding: embedding})])
    assert (changes is not None) == can_part
    if changes is not None:
        after = architecture.of(config | changes)
        assert after is not None and not after.shared_with(embedding)


def test_ties_of_parts_are_taken_apart_in_their_parts() -> None:
    """A model of several parts says it in its own configuration, and in those of the parts that say it."""
    text = {"model_type": "gemma3_text", **TOKENS, **SIZES, "head_dim": 8, "num_key_value_heads": 1, TIE: True}
    vision = {"model_type": "siglip_vision_model", **SIZES, "image_size": 28, "patch_size": 14}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": vision}
    config["architectures"] = ["Gemma3ForConditionalGeneration"]
    found = architecture.of(config)
    assert found is not None
    (group,) = (group for group in found.ties if found.inputs & group)
    changes = ties.untied(config, [Tie(tuple(sorted(group)), {})])
    assert changes == {TIE: False, "text_config": {**text, TIE: False}}


def test_orientation_is_the_class_s_own() -> None:
    gpt2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 16, "n_layer": 1, "n_head": 2}
    found = architecture.of(gpt2 | {"vocab_size": 40})
    assert found is not None
    assert "transformer.h.0.attn.c_attn.weight" in found.transposed and "lm_head.weight" not in found.transposed


def test_numbers_that_json_has_no_word_for() -> None:
    """transformers writes infinity as a table: Mamba 2's limits are."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8, "num_heads": 4, "n_groups": 1, "state_size": 4}
    limits = {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    config = {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], "vocab_size": 40, **sizes, **limits}
    assert architecture.of(config) is not None


def test_a_class_that_is_not_known_is_none() -> None:
    for config in (
        {},
        {"model_type": "nothing"},
        {"model_type": "llama", "num_attention_heads": 0},
        {"model_type": "llama", "vocab_size": "many"},
        {"model_type": "llama", "num_hidden_layers": 10**9},
        {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}},
        {"architectures": ["LlamaForCausalLM"]},
    ):
        assert architecture.of(config) is None and ties.of(config) is None
    assert ties.of({"model_type": "llama", "num_hidden_layers": 1, "architectures": ["OurOwnForCausalLM"]}) is None


# --- all classes ----------------------------------------------------------------------------------------------------


def modules() -> Iterator[Any]:
    """Yield transformers' modules of models."""
    for folder in pkgutil.iter_modules(transformers.models.__path__):
        for file in pkgutil.iter_modules([f"{transformers.models.__path__[0]}/{folder.name}"]):
            if not file.name.startswith("modeling_"):
                continue
            try:
                yield importlib.import_module(f"transformers.models.{folder.name}.{file.name}")
            except (ImportError, OSError):  # of a package that is not there
                continue


def classes(module: Any) -> Iterator[tuple[str, Any]]:
    """Yield (model type, class) of the classes of models in a module."""
    for kind in vars(module).values():
        is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
        if is_model and kind.__module__ == module.__name__ and isinstance(kind.config_class, type):
            yield getattr(kind.config_class, "model_type", ""), kind


# Keys of `_tied_weights_keys` that may reach into numbered layers: patterns, numbers, modules that hold others.
_OF_LAYERS = re.compile(r".*[\\()\[\]?*+|^].*|.*\.\d+\..*|(?!.*(?:weight|bias)\$?$).*")
_PARAMETERS = ("positional_embedding", "codec_head", "eoi_embedding")  # these hold none


@pytest.mark.medium
def test_ties_in_numbered_layers_are_those_that_are_known() -> None:
    """Merges of numbered layers do not ask the class, but for families that tie some of them: these are all."""
    tied = [(f, k._tied_weights_keys) for module in modules() for f, k in classes(module)]
    pairs = [(family, keys.items()) for family, keys in tied if isinstance(keys, dict)]
    keys = ((family, key) for family, items in pairs for pair in items for key in pair)
    found = {family for family, key in keys if _OF_LAYERS.fullmatch(key) and not key.endswith(_PARAMETERS)}
    assert found and found <= ties.TIED_LAYERS, sorted(found - ties.TIED_LAYERS)


@pytest.mark.medium
def test_families_with_layers_that_are_stored_in_out_are_those_that_are_known() -> None:
    """Square layers are (out, in) without asking the class, but in families that use Conv1D: these are all."""
    from transformers.pytorch_utils import Conv1D

    found = {family for module in modules() if vars(module).get("Conv1D") is Conv1D for family, _ in classes(module)}
    assert found and found <= base_names.CONV1D_FAMILIES | base_names._MIXED_FAMILIES | {"clvp_encoder"}, found


def test_square_layers_of_a_decoder_in_a_larger_model_ask_the_class(tmp_path: Path) -> None:
    """GPT-2 as the decoder of a model for images: its layers are (in, out), those of the encoder (out, in)."""
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = {"model_type": "vit", "image_size": 8, "patch_size": 4, **sizes}
    gpt2 = {"model_type": "gpt2", "vocab_size": 40, "n_embd": 8, "n_layer": 1, "n_head": 2, "add_cross_attention": True}
    config = {"model_type": "vision-encoder-decoder", "encoder": vit, "decoder": gpt2}
    config["architectures"] = ["VisionEncoderDecoderModel"]
    known = ties.of(config)
    assert known is not None
    inner, outer = "decoder.transformer.h.0.attn.c_proj.weight", "encoder.layers.0.attention.q_proj.weight"
    base = save_base(
        tmp_path / "base", [{name: Stored("F32", np.zeros((8, 8), "<f4")) for name in (inner, outer)}], config
    )
    lora = LoraAdapter((one_target(Target(inner, (8, 8))), one_target(Target(outer, (8, 8)))))
    with open_checkpoint(base) as checkpoint:
        views = {t.name: t.view for t in base_names.resolve(lora, checkpoint).shapes()}
    assert views == {inner: TRANSPOSED, outer: MATRIX}


@pytest.mark.slow
def test_causal_language_models_that_state_no_tie_share_nothing() -> None:
    """Merges into these do not ask the class about an output head that is stored; small ones of all that build."""
    built = 0
    every = {pair for module in modules() for pair in classes(module)}
    for family, kind in {(f, k) for f, k in every if k.__name__.endswith("ForCausalLM")}:
        config = {"model_type": family, "architectures": [kind.__name__], TIE: False, "num_hidden_layers": 1}
        assert ties.shares_nothing(config) and not ties.shares_nothing(config | {TIE: True})
        found = architecture.of(config)
        if found is not None and found.name == kind.__name__:
            built += 1
            assert not found.ties, kind
    assert built > 50
