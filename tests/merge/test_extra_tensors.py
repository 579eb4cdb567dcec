"""Heads, embeddings and other extra tensors in merged models: as PEFT merges and saves them, and as they load."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ADAPTERS, BASES
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
    save_base,
    saved_adapter,
    tree,
)

from lrconvert import api
from lrconvert.api import merge
from lrconvert.core.dtypes import STORAGE, TORCH_NAMES, Stored
from lrconvert.core.errors import NoEffectError, PlacementError
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.io.container import ContainerFile
from lrconvert.lora import renamings
from lrconvert.lora.adapter import ExtraTensor, LoraAdapter, Provenance, Target
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


@pytest.mark.parametrize(("adapter", "base"), [(a, b) for a, b, _ in MODELS])
def test_dry_run_knows_every_size(tmp_path: Path, adapter: str, base: str) -> None:
    planned = api.merge(BASES / base, ADAPTERS / adapter, tmp_path / "out", dry_run=True)
    assert list(tmp_path.iterdir()) == [] and planned.dry_run
    done = api.merge(BASES / base, ADAPTERS / adapter, tmp_path / "out")
    assert planned.files == done.files == tuple((n, len(d)) for n, d in sorted(tree(tmp_path / "out").items()))
    assert planned.stats.elements == done.stats.elements > 0 == planned.stats.changed
    assert (planned.placed, planned.added, planned.config) == (done.placed, done.added, done.config)


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
