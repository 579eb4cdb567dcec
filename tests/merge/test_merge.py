"""Merging into a base: against PEFT's own merge, as models that load, and byte for byte where nothing may change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ADAPTERS, BASES, random_lora
from models import (
    auto,
    cast_base,
    config_of,
    extra,
    load_all,
    load_clean,
    logits,
    one_target,
    peft_merged,
    random_base,
    save_base,
    saved_adapter,
    tree,
)

from lrconvert import api
from lrconvert.api import merge
from lrconvert.core.dtypes import STORAGE, TORCH_NAMES, Stored, decode, round_to
from lrconvert.core.errors import (
    BaseError,
    FileWriteError,
    FingerprintError,
    LrcError,
    MergeOverflowError,
    NoEffectError,
    OutputExistsError,
    OutputPathError,
    PlacementError,
    QuantizedBaseError,
    ValueRangeError,
)
from lrconvert.io.container import ContainerFile, encode_header, open_checkpoint
from lrconvert.lora import base_names, renamings
from lrconvert.lora.adapter import ExtraTensor, LoraAdapter, Provenance, Target, View
from lrconvert.merge import MergeReport, compute
from lrconvert.merge.arithmetic import exact

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

DTYPES = ("F32", "BF16", "F16")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- the numbers ----------------------------------------------------------------------------------------------------


PEFT_CASES = [
    *(("tiny-llama", adapter, "F32", True) for adapter in ("llama-patterns", "llama-bf16")),
    *(("tiny-llama", "llama-plain", dtype, wide) for dtype in ("BF16", "F16") for wide in (True, False)),
    *(("tiny-gpt2", "gpt2-conv1d", dtype, dtype == "F32") for dtype in DTYPES),
]


@pytest.mark.parametrize(("base", "adapter", "dtype", "wide"), PEFT_CASES)
def test_never_further_from_exact_than_peft(tmp_path: Path, base: str, adapter: str, dtype: str, wide: bool) -> None:
    """`wide`: PEFT keeps the adapter in float32, as is its default; else in the base's dtype."""
    source = cast_base(BASES / base, tmp_path / "base", dtype)
    api.merge(source, ADAPTERS / adapter, tmp_path / "out")
    expected = peft_merged("CausalLM", source, ADAPTERS / adapter, wide=wide).state_dict()
    weights, after = load_all(source), load_all(tmp_path / "out")
    with open_checkpoint(source) as checkpoint:
        lora = base_names.resolve(api.load_lora(ADAPTERS / adapter), checkpoint)
    better = 0
    for pair in lora.targets:
        name, stored_transposed = pair.target.name, pair.target.view.kind == "transposed"
        w, merged = (x[name].decode().astype(np.float64) for x in (weights, after))
        other = expected[name].double().numpy()
        left, right = (pair.A.T, pair.B.T) if stored_transposed else (pair.B, pair.A)
        nearly = w + np.longdouble(pair.scale) * (left.astype(np.longdouble) @ right.astype(np.longdouble))
        assert (np.abs(merged - nearly) <= np.abs(other - nearly) + np.abs(nearly) * 2.0**-50).all()
        update = exact.Update([exact.Term(pair.scale, left, right)])
        differing = np.argwhere(merged != other)
        for row, col in differing[:: max(1, len(differing) // 50)]:  # and without any rounding, where it matters
            goal = Fraction(w[row, col]) + update.exact(row, col)
            assert abs(Fraction(merged[row, col]) - goal) <= abs(Fraction(other[row, col]) - goal)
        better += len(differing)
    assert better > 1000 or (wide and dtype != "F32")  # where PEFT rounds twice there is something to be better at


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_is_the_nearest(tmp_path: Path, dtype: str) -> None:
    """All elements of a small sharded base, against rational arithmetic."""
    lora = random_lora(((12, 16), (16, 20), (9, 5)), rank=3, scale=16 / 8**0.5)
    base = random_base(tmp_path / "base", lora, dtype, shards=2)
    report = merge(base, [lora], tmp_path / "out")
    before, after = load_all(base), load_all(tmp_path / "out")
    for pair in lora.targets:
        update = exact.Update([exact.Term(pair.scale, pair.B, pair.A)])
        w, merged = before[pair.target.name].decode(), after[pair.target.name].array
        for row, col in np.ndindex(*w.shape):
            goal = exact.round_fraction(Fraction(float(w[row, col])) + update.exact(row, col), dtype)
            assert merged.view(f"u{merged.dtype.itemsize}")[row, col] == goal
    assert report.stats.elements == 12 * 16 + 16 * 20 + 9 * 5
    assert report.stats.changed + report.stats.unmoved == report.stats.elements


def test_several_adapters_are_one_sum(tmp_path: Path) -> None:
    """Rounded once: the order does not matter, and opposite adapters cancel to the last bit."""
    one, two = (random_lora(((12, 16), (16, 20)), seed=n, scale=0.3) for n in (1, 2))
    base = random_base(tmp_path / "base", one, "BF16")
    merge(base, [one, two], tmp_path / "ab")
    merge(base, [two, one], tmp_path / "ba")
    assert tree(tmp_path / "ab") == tree(tmp_path / "ba")
    before, after = load_all(base), load_all(tmp_path / "ab")
    for pair, other in zip(one.targets, two.targets, strict=True):
        terms = [exact.Term(p.scale, p.B, p.A) for p in (pair, other)]
        expected, _ = exact.Update(terms).add(before[pair.target.name].array, "BF16")
        assert np.array_equal(after[pair.target.name].array, expected)
    minus = replace(one, targets=tuple(replace(p, scale=-p.scale) for p in one.targets))
    with pytest.raises(NoEffectError, match="zero everywhere"):
        merge(base, [one, minus], tmp_path / "none")
    merge(base, [one, minus], tmp_path / "none", allow_no_op=True)
    assert tree(tmp_path / "none") == tree(base)


VIEWS = [
    ("matrix", (6, 10)),
    ("transposed", (6, 10)),
    ("rows:2:5", (6, 10)),
    ("expert:1", (3, 4, 10)),
    ("conv:3x3:1", (4, 2, 3, 3)),
    ("conv:3:2", (4, 5, 3)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("view", "shape"), VIEWS)
def test_views(tmp_path: Path, view: str, shape: tuple[int, ...], dtype: str) -> None:
    """Small integers, so that float64 is exact; the config's family keeps the square question out of it."""
    pair = one_target(Target("w.weight", shape, View(view)), whole=True)
    w = np.random.default_rng(5).integers(-9, 9, shape) / 4
    base = save_base(tmp_path / "base", [{"w.weight": Stored(dtype, round_to(w, dtype))}])
    report = merge(base, [LoraAdapter((pair,))], tmp_path / "out")
    change = pair.scale * (pair.B.astype(np.float64) @ pair.A.astype(np.float64))
    expected = w.copy()
    if view == "transposed":
        expected += change.T
    elif view.startswith("rows"):
        expected[2:5] += change
    elif view.startswith("expert"):
        expected[1] += change
    else:
        expected += change.reshape(shape)
    after = load_all(tmp_path / "out")["w.weight"]
    assert np.array_equal(after.array, round_to(expected, dtype))
    assert report.stats.elements == w.size
    assert report.tensors[0].updates == 1


def test_slices_that_overlap_are_summed_before_rounding(tmp_path: Path) -> None:
    shape = (6, 10)
    whole = LoraAdapter((one_target(Target("w.weight", shape), seed=1, whole=True),))
    slices = LoraAdapter(
        tuple(
            one_target(Target("w.weight", shape, View(f"rows:{a}:{b}")), seed=a, whole=True)
            for a, b in ((0, 2), (1, 5))
        )
    )
    w = np.full(shape, 1.0)
    base = save_base(tmp_path / "base", [{"w.weight": Stored("BF16", round_to(w, "BF16"))}])
    report = merge(base, [whole, slices], tmp_path / "out")
    for pair, rows in zip([*whole.targets, *slices.targets], (slice(0, 6), slice(0, 2), slice(1, 5)), strict=True):
        w[rows] += pair.scale * (pair.B.astype(np.float64) @ pair.A.astype(np.float64))
    assert np.array_equal(load_all(tmp_path / "out")["w.weight"].array, round_to(w, "BF16"))
    assert report.tensors[0].updates == 3


def test_views_that_do_not_go_together(tmp_path: Path) -> None:
    w = Stored("F32", np.ones((4, 5, 3), np.float32))
    base = save_base(tmp_path / "base", [{"w.weight": w}])
    adapters = [LoraAdapter((one_target(Target("w.weight", (4, 5, 3), View(v))),)) for v in ("expert:1", "conv:3:1")]
    with pytest.raises(BaseError, match="do not go together"):
        merge(base, adapters, tmp_path / "out")


def test_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes however many rows are computed at a time."""
    lora = random_lora(((50, 16), (16, 90)), rank=3)
    base = random_base(tmp_path / "base", lora, "F16")
    merge(base, [lora], tmp_path / "one")
    monkeypatch.setattr(compute, "rows_per_block", lambda cols: 7)
    merge(base, [lora], tmp_path / "many")
    assert tree(tmp_path / "one") == tree(tmp_path / "many")


def test_compact_adapters_merge_as_they_expand(tmp_path: Path) -> None:
    from lrconvert.methods import base as methods

    lora = random_lora(((24, 16), (16, 40)), rank=4)
    base = random_base(tmp_path / "base", lora, "BF16")
    compact = api.convert(lora, "lowrank", bits="4").compact
    api.write(compact, tmp_path / "small.lrc.safetensors")
    api.merge(base, tmp_path / "small.lrc.safetensors", tmp_path / "out")
    before, after = load_all(base), load_all(tmp_path / "out")
    for target, a, b in methods.expand_all(compact):
        expected, _ = exact.Update([exact.Term(1.0, b, a)]).add(before[target.name].array, "BF16")
        assert np.array_equal(after[target.name].array, expected)


def test_contents_of_the_base_are_checked(tmp_path: Path) -> None:
    """A file that was made with a base at hand names its contents; how they are sharded does not matter."""
    lora = random_lora(((24, 16), (16, 40)))
    base = random_base(tmp_path / "base", lora)
    compact = api.convert(lora, "lowrank", bits="4", base=base).compact
    stored = load_all(base)
    merge(save_base(tmp_path / "sharded", [{n: v} for n, v in stored.items()]), [compact], tmp_path / "one")
    merge(base, [compact], tmp_path / "two")
    assert load_all(tmp_path / "one") == load_all(tmp_path / "two")
    other = random_base(tmp_path / "other", lora, seed=1)
    with pytest.raises(FingerprintError, match=r"E-FPR: .*other contents"):
        merge(other, [compact], tmp_path / "out")


# --- models ---------------------------------------------------------------------------------------------------------

MODELS = [
    ("llama-plain", "tiny-llama", "CausalLM"),
    ("llama-rslora", "tiny-llama", "CausalLM"),
    ("llama-lmhead", "tiny-llama", "CausalLM"),
    ("gpt2-conv1d", "tiny-gpt2", "CausalLM"),
    ("gpt2-conv1d", "tiny-gpt2-hub", "CausalLM"),
    ("bert-classifier", "tiny-bert", "SequenceClassification"),
    ("vit-query-value", "tiny-vit", "ImageClassification"),
    ("vit-plain", "tiny-vit", "ImageClassification"),
]


@pytest.mark.parametrize(("adapter", "base", "kind"), MODELS)
def test_fixture_models_give_the_stored_logits(tmp_path: Path, adapter: str, base: str, kind: str) -> None:
    from safetensors.torch import load_file

    api.merge(BASES / base, ADAPTERS / adapter, tmp_path / "out")
    inputs = load_file(ADAPTERS / adapter / "expected.safetensors")
    expected = inputs.pop("logits")
    with torch.no_grad():
        result = load_clean(kind, tmp_path / "out")(**inputs).logits
    assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()


def renamed_vit(folder: Path, prefix: str = "") -> Path:
    """The ViT fixture with the names of its modules, which transformers saves under those of before; `prefix` is taken
    off, and what does not have it left out."""
    stored, config = load_all(BASES / "tiny-vit"), config_of(BASES / "tiny-vit")
    names = {name: renamings.canonical(name, renamings.rules(renamings.families(config))) for name in stored}
    assert any(name != new for name, new in names.items())
    kept = {new.removeprefix(prefix): stored[name] for name, new in names.items() if new.startswith(prefix)}
    kept |= {"pooler.dense.bias": stored["vit.layernorm.bias"]} if prefix else {}
    return save_base(folder, [kept], config | ({"architectures": ["ViTModel"]} if prefix else {}))


@pytest.mark.parametrize("adapter", ("vit-plain", "vit-query-value"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_renamed_modules_merge_as_in_peft(tmp_path: Path, adapter: str, dtype: str) -> None:
    """Adapters and bases with the names before transformers 5 and after it, in all four ways. The two adapters differ
    in their names alone; PEFT reads only the newer."""
    new = cast_base(renamed_vit(tmp_path / "renamed"), tmp_path / "new", dtype)
    old = cast_base(BASES / "tiny-vit", tmp_path / "old", dtype)
    for base in (new, old):
        api.merge(base, ADAPTERS / adapter, tmp_path / f"merged-{base.name}")
        assert load_all(base).keys() == load_all(tmp_path / f"merged-{base.name}").keys()
    merged, again = (load_clean("ImageClassification", tmp_path / f"merged-{n}").state_dict() for n in ("old", "new"))
    expected = peft_merged("ImageClassification", old, ADAPTERS / "vit-plain").state_dict()
    unit = {"F32": 2.0**-22, "BF16": 2.0**-7, "F16": 2.0**-10}[dtype]
    assert merged.keys() == again.keys() == expected.keys()
    for name, goal in expected.items():
        assert torch.equal(merged[name], again[name])
        assert torch.allclose(merged[name].double(), goal.double(), rtol=unit, atol=1e-7)


def test_renamed_names_get_their_prefix(tmp_path: Path) -> None:
    """A ViT saved without head and prefix, with the names after transformers 5: the adapter brings both, and the pooler
    has no use any more."""
    base = renamed_vit(tmp_path / "base", prefix="vit.")
    lora = api.load_lora(ADAPTERS / "vit-query-value")
    named = replace(lora, provenance=replace(lora.provenance, fields={"base_model_class": "ViTForImageClassification"}))
    report = merge(base, [named], tmp_path / "out")
    assert report.config["architectures"] == ["ViTForImageClassification"]
    assert report.dropped == ("pooler.dense.bias",)
    assert {n.partition(".")[0] for n in load_all(tmp_path / "out")} == {"vit", "classifier"}
    api.merge(BASES / "tiny-vit", ADAPTERS / "vit-query-value", tmp_path / "whole")
    result, goal = (load_clean("ImageClassification", tmp_path / n).state_dict() for n in ("out", "whole"))
    assert result.keys() == goal.keys() and all(torch.equal(result[n], goal[n]) for n in result)


@pytest.mark.parametrize("adapter", ("llama-plain", "llama-bf16", "llama-tied-bf16"))
@pytest.mark.parametrize("dtype", ("BF16", "F16"))
def test_half_precision_models_stay_near_peft(tmp_path: Path, adapter: str, dtype: str) -> None:
    base = cast_base(BASES / ("tiny-llama-bf16" if "tied" in adapter else "tiny-llama"), tmp_path / "base", dtype)
    api.merge(base, ADAPTERS / adapter, tmp_path / "out")
    model = load_clean("CausalLM", tmp_path / "out")
    assert model.dtype == getattr(torch, TORCH_NAMES[dtype])
    difference = logits(model.float()) - logits(peft_merged("CausalLM", base, ADAPTERS / adapter).float())
    assert difference.abs().max() < (0.1 if dtype == "BF16" else 0.02)


def test_bert_gets_head_prefix_and_architecture(tmp_path: Path) -> None:
    """A base saved without "bert." and without head: the merged model is what PEFT's save_pretrained writes."""
    base, adapter = BASES / "tiny-bert", ADAPTERS / "bert-classifier"
    report = api.merge(base, adapter, tmp_path / "out")
    peft_merged("SequenceClassification", base, adapter, num_labels=3).save_pretrained(tmp_path / "theirs")
    assert config_of(tmp_path / "out") == config_of(tmp_path / "theirs")
    merged, expected = load_all(tmp_path / "out"), load_all(tmp_path / "theirs")
    assert merged.keys() == expected.keys()
    for name, stored in load_all(base).items():
        if not name.endswith(("query.weight", "value.weight")):
            assert merged[f"bert.{name}"] == stored
    assert merged["classifier.weight"] == expected["classifier.weight"]
    assert report.added == ("classifier.bias", "classifier.weight") and report.placed == report.dropped == ()
    assert report.config["architectures"] == ["BertForSequenceClassification"]


HEADS = [
    ("tiny-llama", "SequenceClassification", "SEQ_CLS", ["q_proj"], 2, ("lm_head.weight",)),
    ("tiny-llama", "SequenceClassification", "SEQ_CLS", ["q_proj"], 5, ("lm_head.weight",)),
    ("tiny-llama-bf16", "SequenceClassification", "SEQ_CLS", ["q_proj"], 2, ()),
    ("tiny-gpt2", "SequenceClassification", "SEQ_CLS", ["c_attn"], 3, ()),
    ("tiny-gpt2-hub", "SequenceClassification", "SEQ_CLS", ["c_attn"], 3, ()),
    ("tiny-bert", "SequenceClassification", "SEQ_CLS", ["query"], 2, ()),
    ("tiny-bert", "TokenClassification", "TOKEN_CLS", ["query"], 7, ("pooler.dense.bias", "pooler.dense.weight")),
    ("tiny-bert", "QuestionAnswering", "QUESTION_ANS", ["query"], None, ("pooler.dense.bias", "pooler.dense.weight")),
]


@pytest.mark.parametrize(("base", "kind", "task", "modules", "labels", "dropped"), HEADS)
def test_heads_of_other_tasks(
    tmp_path: Path, base: str, kind: str, task: str, modules: list[str], labels: int | None, dropped: tuple[str, ...]
) -> None:
    """The old head goes, the new one comes, sharded or not; as PEFT's merged model in names, config and logits."""
    source, options = BASES / base, {"num_labels": labels} if labels else {}
    adapter = saved_adapter(kind, source, tmp_path / "adapter", task_type=task, target_modules=modules, **options)
    report = api.merge(source, adapter, tmp_path / "out")
    assert report.dropped == dropped
    check_as_peft(tmp_path, source, adapter, kind, 2e-2 if base.endswith("bf16") else 1e-5, **options)


def check_as_peft(tmp_path: Path, source: Path, adapter: Path, kind: str, limit: float = 1e-5, **options: Any) -> None:
    """`tmp_path / "out"` is the model that PEFT merges and saves, in names, configuration and logits."""
    peft_model = peft_merged(kind, source, adapter, **options)
    peft_model.save_pretrained(tmp_path / "theirs")
    assert config_of(tmp_path / "out") == config_of(tmp_path / "theirs")
    names, expected = load_all(tmp_path / "out").keys(), load_all(tmp_path / "theirs").keys()
    assert {n for n in names if not n.endswith(".attn.bias")} == expected
    model = load_clean(kind, tmp_path / "out")
    ids = torch.randint(4, 100, (2, 20), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 2  # where some read the class
    with torch.no_grad():
        result, goal = (m.float()(input_ids=ids, attention_mask=torch.ones_like(ids)) for m in (model, peft_model))
    field = "start_logits" if kind == "QuestionAnswering" else "logits"
    assert torch.allclose(result[field], goal[field], atol=limit)


_ENCODER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
# model type: its configuration, and a layer for the LoRA
TINY: dict[str, tuple[dict[str, Any], str]] = {
    "bert": (_ENCODER, "query"),
    "roberta": (_ENCODER | {"max_position_embeddings": 64}, "query"),
    "electra": (_ENCODER | {"embedding_size": 16}, "query"),
    "albert": (_ENCODER | {"embedding_size": 16}, "query"),
    "distilbert": ({"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48}, "q_lin"),
    "deberta": (_ENCODER, "in_proj"),
    "deberta-v2": (_ENCODER, "query_proj"),
    "modernbert": (_ENCODER | {"cls_token_id": 1, "sep_token_id": 2}, "Wqkv"),
    "gpt_neox": (_ENCODER, "query_key_value"),
    "opt": ({"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}, "q_proj"),
    "bloom": ({"hidden_size": 32, "n_layer": 1, "n_head": 2}, "query_key_value"),
    "qwen2": (_ENCODER | {"num_key_value_heads": 1, "tie_word_embeddings": True}, "q_proj"),
    "t5": ({"d_model": 32, "d_kv": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}, "q"),
    "bart": (
        {
            "d_model": 32,
            **{
                f"{side}_{what}": n
                for side in ("encoder", "decoder")
                for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))
            },
        },
        "q_proj",
    ),
}
TASKS = {"Seq": "SequenceClassification", "Token": "TokenClassification", "Q": "QuestionAnswering"}
TASK_TYPES = {"Seq": "SEQ_CLS", "Token": "TOKEN_CLS", "Q": "QUESTION_ANS"}
_NEEDS = "which neither the base nor the adapter has"
# model type, class of the base, task, modules_to_save beside PEFT's own, and what is refused
ARCHITECTURES: list[tuple[str, str, str, list[str], str]] = [
    ("bert", "BertForMaskedLM", "Seq", [], f"BertForSequenceClassification needs 'bert.pooler', {_NEEDS}"),
    ("bert", "BertForMaskedLM", "Seq", ["pooler"], ""),
    ("bert", "BertForMaskedLM", "Token", [], ""),
    ("bert", "BertForPreTraining", "Seq", [], ""),
    ("roberta", "RobertaForMaskedLM", "Seq", [], ""),
    ("roberta", "RobertaModel", "Q", [], ""),
    ("electra", "ElectraForPreTraining", "Seq", [], ""),
    ("albert", "AlbertForPreTraining", "Seq", [], ""),
    ("albert", "AlbertForPreTraining", "Token", [], ""),
    ("albert", "AlbertForMaskedLM", "Seq", [], f"needs 'albert.pooler', {_NEEDS}"),
    ("distilbert", "DistilBertForMaskedLM", "Seq", [], ""),
    ("distilbert", "DistilBertModel", "Q", [], ""),
    ("deberta", "DebertaForMaskedLM", "Seq", ["pooler"], ""),
    ("deberta", "DebertaModel", "Token", [], ""),
    ("deberta-v2", "DebertaV2Model", "Seq", [], f"needs 'pooler', {_NEEDS}"),
    ("deberta-v2", "DebertaV2ForMaskedLM", "Seq", ["pooler"], ""),
    ("deberta-v2", "DebertaV2ForMaskedLM", "Q", [], ""),
    ("modernbert", "ModernBertForMaskedLM", "Seq", [], ""),
    ("modernbert", "ModernBertForMaskedLM", "Token", ["head"], ""),
    ("modernbert", "ModernBertModel", "Token", [], f"needs 'head', {_NEEDS}"),
    ("modernbert", "ModernBertForMaskedLM", "Q", ["classifier"], ""),
    ("gpt_neox", "GPTNeoXForCausalLM", "Seq", [], ""),
    ("opt", "OPTForCausalLM", "Seq", [], ""),
    ("bloom", "BloomForCausalLM", "Token", [], ""),
    ("qwen2", "Qwen2ForCausalLM", "Token", [], ""),
    ("t5", "T5ForConditionalGeneration", "Seq", ["classification_head"], ""),
    ("t5", "T5ForConditionalGeneration", "Token", [], ""),
    ("t5", "T5Model", "Q", [], ""),
    ("t5", "T5ForConditionalGeneration", "Seq", [], "the adapter's task needs a model ForSequenceClassification"),
    ("bart", "BartForConditionalGeneration", "Seq", ["classification_head"], ""),
    ("bart", "BartForConditionalGeneration", "Q", [], ""),
    ("bart", "BartModel", "Seq", [], "the adapter's task needs a model ForSequenceClassification"),
]


@pytest.mark.medium
@pytest.mark.parametrize(("family", "cls", "task", "saved", "refusal"), ARCHITECTURES)
def test_heads_of_common_architectures(
    tmp_path: Path, family: str, cls: str, task: str, saved: list[str], refusal: str
) -> None:
    """As PEFT's merged model; what PEFT would draw at random is refused."""
    settings, module = TINY[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, vocab_size=100, pad_token_id=0, eos_token_id=2, **settings)
    getattr(transformers, cls)(config).save_pretrained(tmp_path / "base")
    labels = {} if task == "Q" else {"num_labels": 3}
    extra = {"modules_to_save": ["classifier", *saved]} if saved else {}
    adapter = saved_adapter(
        *(TASKS[task], tmp_path / "base", tmp_path / "adapter"),
        **{"task_type": TASK_TYPES[task], "target_modules": [module], **labels, **extra},
    )
    if refusal:
        with pytest.raises(PlacementError, match=f"E-PLACE: .*{refusal}"):
            api.merge(tmp_path / "base", adapter, tmp_path / "out")
    else:
        api.merge(tmp_path / "base", adapter, tmp_path / "out")
        check_as_peft(tmp_path, tmp_path / "base", adapter, TASKS[task], **labels)


def test_classifier_of_another_size_is_replaced(tmp_path: Path) -> None:
    """A base with a head of two labels and an adapter with three: the head and the labels are the adapter's."""
    torch.manual_seed(0)
    auto("SequenceClassification").from_pretrained(BASES / "tiny-bert", num_labels=2).save_pretrained(tmp_path / "base")
    report = api.merge(tmp_path / "base", ADAPTERS / "bert-classifier", tmp_path / "out")
    assert report.placed == ("classifier.bias", "classifier.weight") and report.added == ()
    model = load_clean("SequenceClassification", tmp_path / "out")
    expected = peft_merged("SequenceClassification", BASES / "tiny-bert", ADAPTERS / "bert-classifier", num_labels=3)
    assert model.config.num_labels == 3 and torch.allclose(logits(model), logits(expected), atol=1e-5)
    # and back to two: transformers does not write its default
    two = saved_adapter(
        "SequenceClassification", tmp_path / "base", tmp_path / "two", task_type="SEQ_CLS", target_modules=["key"]
    )
    api.merge(tmp_path / "out", two, tmp_path / "back")
    assert "id2label" not in config_of(tmp_path / "back")
    assert load_clean("SequenceClassification", tmp_path / "back").config.num_labels == 2


def test_head_is_replaced_in_place_and_in_its_own_dtype(tmp_path: Path) -> None:
    """Neither configuration nor names change where the base has such a head; an odd dtype stays aligned."""
    base = cast_base(BASES / "tiny-vit", tmp_path / "base", "BF16")
    report = api.merge(base, ADAPTERS / "vit-query-value", tmp_path / "out")
    assert (
        report.config == {} and (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    )
    after = load_all(tmp_path / "out")
    assert after["classifier.weight"].dtype == "F32" and after["vit.layernorm.weight"].dtype == "BF16"
    with ContainerFile(tmp_path / "out" / "model.safetensors") as file:
        header = len(file.header_bytes)
        assert all((info.start - header) % STORAGE[info.dtype].itemsize == 0 for info in file.tensors)
    load_clean("ImageClassification", tmp_path / "out")


# --- tied embeddings ------------------------------------------------------------------------------------------------


def tied_lora(*names: str, extras: tuple[ExtraTensor, ...] = ()) -> LoraAdapter:
    """An update of `names` for the tied fixture, (100, 48) each."""
    pairs = [one_target(Target(name, (100, 48)), seed=n, scale=0.2) for n, name in enumerate(names)]
    return LoraAdapter(tuple(pairs), extras, Provenance(task_type="CAUSAL_LM"))


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_head_of_a_tied_model_becomes_its_own_tensor(tmp_path: Path) -> None:
    base = BASES / "tiny-llama-bf16"
    adapter = saved_adapter(
        "CausalLM", base, tmp_path / "adapter", task_type="CAUSAL_LM", target_modules=["lm_head", "q_proj"]
    )
    report = api.merge(base, adapter, tmp_path / "out")
    assert report.added == (HEAD,) and report.config == {"tie_word_embeddings": False}
    before, after = load_all(base), load_all(tmp_path / "out")
    assert after[EMBEDDING] == before[EMBEDDING] and after[HEAD] != after[EMBEDDING]
    model = load_clean("CausalLM", tmp_path / "out", torch.float32)
    unmerged = auto("CausalLM").from_pretrained(base, dtype=torch.float32)
    unmerged = peft.PeftModel.from_pretrained(unmerged, str(adapter)).eval()
    assert torch.allclose(logits(model), logits(unmerged), atol=0.1)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_embedding_of_a_tied_model_leaves_the_head(tmp_path: Path) -> None:
    base = BASES / "tiny-llama-bf16"
    report = merge(base, [tied_lora(EMBEDDING)], tmp_path / "out")
    before, after = load_all(base), load_all(tmp_path / "out")
    assert after[HEAD] == before[EMBEDDING] and after[EMBEDDING] != before[EMBEDDING]
    assert report.config == {"tie_word_embeddings": False} and report.added == (HEAD,)
    load_clean("CausalLM", tmp_path / "out")


def test_both_ends_of_a_tie(tmp_path: Path) -> None:
    base = BASES / "tiny-llama-bf16"
    lora = tied_lora(EMBEDDING, HEAD)
    merge(base, [lora], tmp_path / "out")
    before, after = load_all(base)[EMBEDDING].array, load_all(tmp_path / "out")
    for pair in lora.targets:
        expected, _ = exact.Update([exact.Term(pair.scale, pair.B, pair.A)]).add(before, "BF16")
        assert np.array_equal(after[pair.target.name].array, expected)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


def test_tie_that_is_stored_twice(tmp_path: Path) -> None:
    """Both stored and equal: the one that is not updated keeps its bytes, and the tie goes."""
    stored = load_all(BASES / "tiny-llama-bf16")
    base = save_base(tmp_path / "base", [{**stored, HEAD: stored[EMBEDDING]}], config_of(BASES / "tiny-llama-bf16"))
    for name, other in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
        merge(base, [tied_lora(name)], tmp_path / name)
        after = load_all(tmp_path / name)
        assert after[other] == stored[EMBEDDING] != after[name]
        assert config_of(tmp_path / name)["tie_word_embeddings"] is False
    merge(base, [LoraAdapter((one_target(Target("model.layers.0.mlp.down_proj.weight", (48, 112))),))], tmp_path / "no")
    assert config_of(tmp_path / "no")["tie_word_embeddings"] is True


def test_embeddings_as_extras(tmp_path: Path) -> None:
    """modules_to_save of one end, of both, and of both alike (which is what PEFT stores for a model it kept tied)."""
    base, new, other = BASES / "tiny-llama-bf16", np.ones((100, 48)), np.zeros((100, 48))
    old = load_all(base)[EMBEDDING]

    def run(name: str, *extras: ExtraTensor) -> tuple[dict[str, Stored], bool]:
        merge(base, [tied_lora(extras=extras)], tmp_path / name)
        return load_all(tmp_path / name), config_of(tmp_path / name)["tie_word_embeddings"]

    after, tied = run("embedding", extra(EMBEDDING, new, "BF16"))
    assert not tied and after[HEAD] == old and (after[EMBEDDING].decode() == 1).all()
    after, tied = run("head", extra(HEAD, new, "BF16"))
    assert not tied and after[EMBEDDING] == old and (after[HEAD].decode() == 1).all()
    after, tied = run("both", extra(EMBEDDING, new, "BF16"), extra(HEAD, other, "BF16"))
    assert not tied and (after[HEAD].decode() == 0).all() and (after[EMBEDDING].decode() == 1).all()
    after, tied = run("alike", extra(EMBEDDING, new, "BF16"), extra(HEAD, new, "BF16"))
    assert tied and HEAD not in after and (after[EMBEDDING].decode() == 1).all()
    with pytest.raises(NoEffectError, match="no target and no other tensor"):
        run("same", ExtraTensor(HEAD, "BF16", (100, 48), old.array.tobytes()))


def test_vocabulary_of_another_size(tmp_path: Path) -> None:
    base = BASES / "tiny-llama"
    head, embedding = extra(HEAD, np.ones((104, 64))), extra(EMBEDDING, np.ones((104, 64)))
    merge(base, [tied_lora(extras=(head, embedding))], tmp_path / "out")
    assert config_of(tmp_path / "out")["vocab_size"] == 104
    load_clean("CausalLM", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert index["metadata"]["total_size"] == sum(info.nbytes for info in checkpoint.tensors.values())
        assert index["metadata"]["total_parameters"] == sum(int(np.prod(i.shape)) for i in checkpoint.tensors.values())
    with pytest.raises(PlacementError, match=r"size of the vocabulary, but 'lm_head.weight' keeps its own"):
        merge(base, [tied_lora(extras=(embedding,))], tmp_path / "half")


def test_base_weight_beside_a_lora(tmp_path: Path) -> None:
    """PEFT stores lm_head.base_layer.weight with a LoRA of the head: it counts if it differs from the base's."""
    base, name = BASES / "tiny-llama", "lm_head.base_layer.weight"
    lora = api.load_lora(ADAPTERS / "llama-lmhead")
    assert [e.name for e in lora.extras] == [name]
    merge(base, [lora], tmp_path / "with")
    merge(base, [replace(lora, extras=())], tmp_path / "without")
    assert tree(tmp_path / "with") == tree(tmp_path / "without")
    pair = next(p for p in lora.targets if p.target.name == HEAD)
    other = np.random.default_rng(0).standard_normal((100, 64))
    merge(base, [replace(lora, extras=(extra(name, other),))], tmp_path / "other")
    expected, _ = exact.Update([exact.Term(pair.scale, pair.B, pair.A)]).add(other.astype(np.float32), "F32")
    assert np.array_equal(load_all(tmp_path / "other")[HEAD].array, expected)
    half = cast_base(base, tmp_path / "half-base", "F16")  # the same numbers in another dtype are the same
    equal = extra(name, load_all(half)[HEAD].decode())
    report = merge(half, [replace(lora, extras=(equal,))], tmp_path / "half")
    assert load_all(tmp_path / "half")[HEAD].dtype == "F16" and report.placed == ()


# --- what has no place ----------------------------------------------------------------------------------------------


def head_lora(*extras: ExtraTensor, task: str = "SEQ_CLS", **fields: str) -> LoraAdapter:
    name = "bert.encoder.layer.0.attention.self.query.weight"
    return LoraAdapter((one_target(Target(name, (32, 32))),), extras, Provenance(task_type=task, fields=fields))


def test_no_place(tmp_path: Path) -> None:
    base, out = BASES / "tiny-bert", tmp_path / "out"
    head = extra("classifier.weight", np.ones((3, 32)))
    cases: list[tuple[str, list[LoraAdapter]]] = [
        ("task does not say which architecture", [head_lora(head, task="")]),
        ("task does not say which architecture", [head_lora(head, task="CAUSAL_LM")]),
        (
            "'bert.encoder.new.weight' has no place: the base has no",
            [head_lora(extra("bert.encoder.new.weight", [1.0]))],
        ),
        (r"it is \[32, 33\], the base's 'pooler", [head_lora(extra("bert.pooler.dense.weight", np.ones((32, 33))))]),
        (
            r"it is \[5, 32\], the base's",
            [head_lora(extra("bert.encoder.layer.0.output.dense.weight", np.ones((5, 32))))],
        ),
        ("also a target of an update", [head_lora(extra("bert.encoder.layer.0.attention.self.query.weight", [1.0]))]),
        (
            "two adapters bring different ones",
            [head_lora(head), head_lora(extra("classifier.weight", np.zeros((3, 32))))],
        ),
        (
            "heads of BertFor.* and BertFor",
            [head_lora(head), head_lora(extra("classifier.bias", [1.0]), task="TOKEN_CLS")],
        ),
        ("the base has no 'bert.nothing.weight'", [head_lora(extra("bert.nothing.base_layer.weight", [1.0]))]),
        ("lm_head.weight' has no place", [head_lora(extra("lm_head.weight", np.ones((100, 32))), task="")]),
    ]
    for what, adapters in cases:
        with pytest.raises(PlacementError, match=f"E-PLACE: .*tiny-bert: .*{what}"):
            merge(base, adapters, out)
    assert list(tmp_path.iterdir()) == []


def test_architecture_may_be_named_by_the_adapter(tmp_path: Path) -> None:
    head = extra("classifier.weight", np.ones((3, 32)))
    bias = extra("classifier.bias", np.zeros(3))
    merge(
        BASES / "tiny-bert",
        [head_lora(head, bias, task="", base_model_class="BertForSequenceClassification")],
        tmp_path / "out",
    )
    assert load_clean("SequenceClassification", tmp_path / "out").config.num_labels == 3


def test_quantized_bases_are_refused(tmp_path: Path) -> None:
    lora = random_lora(((12, 16),))
    base = save_base(tmp_path / "i8", [{"layers.0.proj.weight": Stored("I8", np.ones((12, 16), np.int8))}])
    with pytest.raises(QuantizedBaseError, match=r"E-BASE-QUANT: .*is stored as I8. Use the unquantized parent"):
        merge(base, [lora], tmp_path / "out")
    base = random_base(tmp_path / "q", lora)
    (base / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    with pytest.raises(QuantizedBaseError):
        merge(base, [lora], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what must not change -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ("tiny-llama", "tiny-llama-bf16", "tiny-gpt2-hub", "tiny-bert", "tiny-vit"))
def test_no_op_is_a_copy(tmp_path: Path, base: str) -> None:
    with open_checkpoint(BASES / base) as checkpoint:
        info = next(i for i in checkpoint.tensors.values() if len(i.shape) == 2 and i.shape[0] != i.shape[1])
    lora = LoraAdapter((one_target(Target(info.name, info.shape), scale=0.0),))
    with pytest.raises(NoEffectError):
        merge(BASES / base, [lora], tmp_path / "out")
    report = merge(BASES / base, [lora], tmp_path / "out", allow_no_op=True)
    assert tree(tmp_path / "out") == tree(BASES / base)
    assert report.stats.changed == 0 and report.total_bytes == sum(map(len, tree(BASES / base).values()))


def test_untouched_bytes_are_copied(tmp_path: Path) -> None:
    """Tensors without a target, headers, the index and every other file: the base's, byte for byte."""
    api.merge(BASES / "tiny-llama", ADAPTERS / "llama-plain", tmp_path / "out")
    before, after = load_all(BASES / "tiny-llama"), load_all(tmp_path / "out")
    updated = {p.target.name for p in api.load_lora(ADAPTERS / "llama-plain").targets}
    assert before.keys() == after.keys() and updated
    for name in before:
        assert (before[name] != after[name]) == (name in updated)
    for name, data in tree(BASES / "tiny-llama").items():
        if name.endswith(".safetensors"):
            length = 8 + int.from_bytes(data[:8], "little")
            assert (tmp_path / "out" / name).read_bytes()[:length] == data[:length]
        else:
            assert (tmp_path / "out" / name).read_bytes() == data


def test_other_files(tmp_path: Path) -> None:
    """Code, templates and tokenizers are copied; weights in other formats, hidden folders and links out are named."""
    lora = random_lora(((12, 16),))
    base = random_base(tmp_path / "base", lora)
    copied = ["modeling_x.py", "tokenizer.model", "additional_chat_templates/a.jinja", ".gitattributes", "README.md"]
    left_out = [
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack", "model.onnx"),
        *("consolidated.safetensors", "original/consolidated.00.pth", "q4.gguf", "link.txt"),
    ]
    for name in [*copied, *left_out[:-1], ".git/config", ".cache/x/y"]:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    (tmp_path / "outside.txt").write_text("secret")
    (base / "link.txt").symlink_to(tmp_path / "outside.txt")
    report = merge(base, [lora], tmp_path / "out")
    assert tree(tmp_path / "out").keys() == {*copied, "model.safetensors", "config.json"}
    assert report.left_out == tuple(sorted([*left_out, ".git/", ".cache/"]))
    assert dict(report.files) == {name: len(data) for name, data in tree(tmp_path / "out").items()}


def test_hub_cache_links_become_files(tmp_path: Path) -> None:
    lora = random_lora(((12, 16),))
    plain = random_base(tmp_path / "plain", lora, shards=2)
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for n, path in enumerate(sorted(plain.iterdir())):
        shutil.copy(path, blobs / f"blob{n}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{n}")
    merge(plain, [lora], tmp_path / "one")
    merge(snapshot, [lora], tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert not any(p.is_symlink() for p in (tmp_path / "two").iterdir())


# --- no effect, and failures ----------------------------------------------------------------------------------------


def test_no_effect_has_three_reasons(tmp_path: Path) -> None:
    lora = random_lora(((12, 16),))
    base = random_base(tmp_path / "base", lora, "BF16")
    pair = lora.targets[0]
    tiny = replace(lora, targets=(replace(pair, scale=1e-9),))
    zero = replace(lora, targets=(replace(pair, b=Stored("F32", np.zeros((12, 4), np.float32))),))
    # Zero, but not by a look at the factors: what B reads, A leaves out.
    a, b = np.zeros((2, 16), np.float32), np.zeros((12, 2), np.float32)
    a[0], b[:, 1] = 1, 1
    hidden = replace(lora, targets=(replace(pair, a=Stored("F32", a), b=Stored("F32", b)),))
    for adapters, what in (
        ([], "no target and no other tensor"),
        ([LoraAdapter(())], "no target and no other tensor"),
        ([zero], "the update is zero everywhere"),
        ([hidden], "the update is zero everywhere"),
        ([tiny], "no element moved: all 192 nonzero updates are below the resolution of BF16"),
    ):
        with pytest.raises(NoEffectError, match=f"E-NO-EFFECT: .*{what}.*--allow-no-op"):
            merge(base, adapters, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        merge(base, adapters, tmp_path / "copy", allow_no_op=True, overwrite=True)
        assert tree(tmp_path / "copy") == tree(base)


class Stop(Exception):
    pass


def failing_merges(tmp_path: Path) -> list[tuple[str, type[BaseException], Any]]:
    lora = random_lora(((12, 16), (16, 20)))
    base = random_base(tmp_path / "base", lora, "F16", shards=2)
    last = lora.targets[1]
    huge = replace(lora, targets=(lora.targets[0], replace(last, scale=1e9)))
    nan = shutil.copytree(base, tmp_path / "nan")
    with ContainerFile(nan / "model-00002-of-00002.safetensors") as file:
        start = file.by_name[last.target.name].start
    data = bytearray((nan / "model-00002-of-00002.safetensors").read_bytes())
    data[start : start + 2] = np.float16(np.nan).tobytes()
    (nan / "model-00002-of-00002.safetensors").write_bytes(data)

    def stop(kind: type[BaseException]) -> Any:
        def progress(fraction: float, text: str) -> None:
            if fraction > 0.6:
                raise kind

        return progress

    return [
        ("overflow", MergeOverflowError, lambda out, **k: merge(base, [huge], out, **k)),
        ("nan", ValueRangeError, lambda out, **k: merge(nan, [lora], out, **k)),
        ("stop", Stop, lambda out, **k: merge(base, [lora], out, progress=stop(Stop), **k)),
        (
            "interrupt",
            KeyboardInterrupt,
            lambda out, **k: merge(base, [lora], out, progress=stop(KeyboardInterrupt), **k),
        ),
    ]


@pytest.mark.parametrize("old", (False, True))
def test_failures_leave_nothing(tmp_path: Path, old: bool) -> None:
    for name, error, run in failing_merges(tmp_path):
        place = tmp_path / f"place-{name}"
        place.mkdir()
        if old:
            save_base(place / "out", [{"w": Stored("F32", np.ones(1, np.float32))}])
        before = tree(place)
        with pytest.raises(error) as caught:
            run(place / "out", overwrite=old)
        if isinstance(caught.value, LrcError):
            assert "tensor 'layers.1.proj.weight': element [" in str(caught.value)
        assert tree(place) == before and len(list(place.iterdir())) == old


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = random_lora(((12, 16), (16, 20)))
    base = random_base(tmp_path / "base", lora)
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        if len(data) > 1000:
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(FileWriteError, match=r"E-IO-WRITE: .*out/model.safetensors: .*No space left"):
        merge(base, [lora], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    lora = random_lora(((12, 16),))
    base = random_base(tmp_path / "base", lora)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    for out, overwrite, error, what in (
        ("base", True, OutputPathError, "is also the input"),
        ("base/out", False, OutputPathError, "lies inside the input"),
        ("no/out", False, OutputPathError, "does not exist"),
        ("other", False, OutputExistsError, "--overwrite"),
        ("other", True, OutputPathError, "not a model folder"),
    ):
        with pytest.raises(error, match=what):
            merge(base, [lora], tmp_path / out, overwrite=overwrite)
    merge(base, [lora], tmp_path / "out")
    with pytest.raises(OutputExistsError):
        merge(base, [lora], tmp_path / "out")
    first = tree(tmp_path / "out")
    (tmp_path / "out" / "stale.json").write_text("{}")
    merge(base, [lora], tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == first


def test_missing_target_names_what_is_near(tmp_path: Path) -> None:
    lora = random_lora(((12, 16),))
    base = random_base(tmp_path / "base", lora)
    wrong = replace(lora, targets=(replace(lora.targets[0], target=Target("layers.9.proj.weight", (12, 16))),))
    with pytest.raises(BaseError, match=r"'layers.9.proj.weight' is not in the base.*layers.0.proj.weight"):
        merge(base, [wrong], tmp_path / "out")


# --- planning and reporting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("adapter", "base"), [(a, b) for a, b, _ in MODELS])
def test_dry_run_knows_every_size(tmp_path: Path, adapter: str, base: str) -> None:
    planned = api.merge(BASES / base, ADAPTERS / adapter, tmp_path / "out", dry_run=True)
    assert list(tmp_path.iterdir()) == [] and planned.dry_run
    done = api.merge(BASES / base, ADAPTERS / adapter, tmp_path / "out")
    assert planned.files == done.files == tuple((n, len(d)) for n, d in sorted(tree(tmp_path / "out").items()))
    assert planned.stats.elements == done.stats.elements > 0 == planned.stats.changed
    assert (planned.placed, planned.added, planned.config) == (done.placed, done.added, done.config)


def test_report_and_progress(tmp_path: Path) -> None:
    lora = random_lora(((12, 16), (16, 20)), scale=0.01)
    base = random_base(tmp_path / "base", lora, "BF16", shards=2)
    seen: list[tuple[float, str]] = []
    report = merge(base, [lora, lora], tmp_path / "out", progress=lambda f, text: seen.append((f, text)))
    assert isinstance(report, MergeReport) and not report.dry_run
    assert [(t.name, t.dtype, t.shape, t.updates) for t in report.tensors] == [
        ("layers.0.proj.weight", "BF16", (12, 16), 2),
        ("layers.1.proj.weight", "BF16", (16, 20), 2),
    ]
    before, after = load_all(base), load_all(tmp_path / "out")
    for pair, row in zip(lora.targets, report.tensors, strict=True):
        w, merged = (decode(x[row.name].array, "BF16").astype(np.float64) for x in (before, after))
        goal = w + 2 * pair.scale * (pair.B.astype(np.float64) @ pair.A.astype(np.float64))
        errors = np.abs(merged - goal)
        assert row.stats.changed == np.count_nonzero(merged != w)
        assert row.stats.unmoved == np.count_nonzero((merged == w) & (goal != w))
        assert row.stats.max_error == pytest.approx(errors.max(), rel=1e-4)
        assert row.stats.mean_error == pytest.approx(errors.mean(), rel=1e-4)
    fractions = [f for f, _ in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0


def test_merging_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        api.merge(BASES / "tiny-bert", ADAPTERS / "bert-classifier", tmp_path / name)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_merge_imports_no_torch() -> None:
    program = "import sys, lrconvert.merge; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_base(tmp_path: Path) -> None:
    """A tensor of 1 GB in bf16: at most 512 MB above the interpreter."""
    rows, cols = 65536, 8192
    header = encode_header([("layers.0.proj.weight", "BF16", (rows, cols))], {"format": "pt"})
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    with (base / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * rows * cols)  # a sparse file
    program = f"""
import sys
from pathlib import Path
import numpy as np
from lrconvert.lora.adapter import *
from lrconvert.core.dtypes import Stored
from lrconvert.api import merge
rng = np.random.default_rng(0)
a = Stored("F32", rng.standard_normal((4, {cols})).astype("f4"))
b = Stored("F32", rng.standard_normal(({rows}, 4)).astype("f4"))
lora = LoraAdapter((LoraTarget(Target("layers.0.proj.weight", ({rows}, {cols})), a, b, 1.0),))
def peak():  # not getrusage, which in a child starts with the peak of the process that started it
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
merge(Path(sys.argv[1]) / "base", [lora], Path(sys.argv[1]) / "out")
print((peak() - before) // 1000)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 512
