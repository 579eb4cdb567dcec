"""Names and orientations: what a target of an adapter means in a base, and what is refused rather than guessed."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import since_transformers

from lrconvert.core.dtypes import Stored
from lrconvert.core.errors import BaseError, OrientationError
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.io.container import encode_header
from lrconvert.lora import base_names, renamings
from lrconvert.lora.adapter import MATRIX, TRANSPOSED, LoraAdapter, LoraTarget, Target, View

Shape = tuple[int, ...]


def make_base(folder: Path, shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Path:
    """A base whose tensors have these shapes, all F16."""
    folder.mkdir()
    size = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    header = encode_header([(name, "F16", shape) for name, shape in shapes.items()], {})
    (folder / "model.safetensors").write_bytes(header + bytes(size))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def lora_of(*targets: Target) -> LoraAdapter:
    pairs = []
    for target in targets:
        out, inner = target.matrix_shape
        a, b = np.ones((1, inner), "<f4"), np.ones((out, 1), "<f4")
        pairs.append(LoraTarget(target, Stored("F32", a), Stored("F32", b), 1.0))
    return LoraAdapter(tuple(pairs))


def resolved(base: Path, *wanted: Target) -> list[Target]:
    with open_checkpoint(base) as checkpoint:
        return list(base_names.resolve(lora_of(*wanted), checkpoint).shapes())


# --- renamed modules ------------------------------------------------------------------------------------------------

Config = dict[str, Any]
VIT: Config = {"model_type": "vit"}
# family or configuration, a name before and a name after
RENAMED: list[tuple[str | Config, str, str]] = [
    ("vit", "vit.encoder.layer.3.attention.attention.query", "vit.layers.3.attention.q_proj"),
    ("vit", "encoder.layer.3.attention.attention.key", "vit.layers.3.attention.k_proj"),
    ("vit", "vit.encoder.layer.3.attention.attention.value", "layers.3.attention.v_proj"),
    ("vit", "vit.encoder.layer.3.attention.output.dense", "vit.layers.3.attention.o_proj"),
    ("vit", "vit.encoder.layer.3.intermediate.dense", "vit.layers.3.mlp.fc1"),
    ("vit", "vit.encoder.layer.3.output.dense", "vit.layers.3.mlp.fc2"),
    (
        {"model_type": "depth_anything", "backbone_config": {"model_type": "dinov2"}},
        "backbone.encoder.layer.1.attention.attention.query",
        "backbone.encoder.layer.1.attention.q_proj",
    ),
    (
        {"model_type": "vision-encoder-decoder", "encoder": VIT, "decoder": {"model_type": "gpt2"}},
        "encoder.encoder.layer.1.attention.attention.query",
        "encoder.layers.1.attention.q_proj",
    ),
    ("swin", "swin.encoder.layers.2.blocks.1.attention.self.query", "swin.encoder.layers.2.blocks.1.attention.q_proj"),
    ("segformer", "segformer.encoder.block.2.1.attention.self.value", "segformer.stages.2.blocks.1.attention.v_proj"),
    ("detr", "model.decoder.layers.5.fc1", "model.decoder.layers.5.mlp.fc1"),
    ("gpt_neox", "embed_out", "lm_head"),
    ("mixtral", "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"),
    ("clip", "text_model.text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"),
    ("llava", "language_model.model.layers.7.self_attn.q_proj", "model.language_model.layers.7.self_attn.q_proj"),
    ("llava", "vision_tower.vision_model.encoder.layers.7.mlp.fc1", "model.vision_tower.encoder.layers.7.mlp.fc1"),
    ("llava", "language_model.lm_head", "lm_head"),
    ("llava", "multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
    ("qwen2_vl", "visual.blocks.0.attn.proj", "model.visual.blocks.0.attn.proj"),
    ("qwen2_vl", "model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"),
    ("nomic_bert", "nomic_bert.encoder.layers.2.mlp.fc12", "nomic_bert.layers.2.mlp.gate_proj"),
]


@pytest.mark.parametrize(("config", "old", "new"), RENAMED, ids=[new for _, _, new in RENAMED])
def test_renamed_modules_are_found_both_ways(tmp_path: Path, config: str | Config, old: str, new: str) -> None:
    config = {"model_type": config} if isinstance(config, str) else config
    old, new = f"{old}.weight", f"{new}.weight"
    others = {f"{name.removesuffix('.weight')}_too.weight": (4, 6) for name in (old, new)}
    for n, (ours, stored) in enumerate(((old, new), (new, old), (old, old), (new, new))):
        base = make_base(tmp_path / str(n), {stored: (4, 6), **others}, config)
        assert resolved(base, Target(ours, (4, 6))) == [Target(stored, (4, 6))]


def test_renamings_are_those_of_the_base_s_family(tmp_path: Path) -> None:
    """The same names in a family that was not renamed are other parameters."""
    name = "encoder.layer.0.attention.attention.query.weight"
    for n, config in enumerate(({"model_type": "bert"}, {}, {"model_type": ["vit"]}, {"vit": "vit"})):
        base = make_base(tmp_path / str(n), {name: (4, 6)}, config)
        with pytest.raises(BaseError, match=r"E-BASE: .*'layers.0.attention.q_proj.weight' is not in the base"):
            resolved(base, Target("layers.0.attention.q_proj.weight", (4, 6)))


def test_ambiguous_names_are_listed(tmp_path: Path) -> None:
    old, new = "vit.encoder.layer.0.attention.attention.query.weight", "vit.layers.0.attention.q_proj.weight"
    base = make_base(tmp_path / "base", {old: (4, 6), new: (4, 6)}, VIT)
    for name in ("layers.0.attention.q_proj.weight", "encoder.layer.0.attention.attention.query.weight"):
        with pytest.raises(BaseError, match=f"E-BASE: .*{name!r} may be any of {old}, {new}"):
            resolved(base, Target(name, (4, 6)))
    assert resolved(base, Target(old, (4, 6)))[0].name == old  # a stored name means itself
    base = make_base(tmp_path / "prefixes", {"a.h.0.weight": (4, 6), "b.h.0.weight": (4, 6)}, {})
    with pytest.raises(BaseError, match=r"may be any of a.h.0.weight, b.h.0.weight"):
        resolved(base, Target("h.0.weight", (4, 6)))
    with pytest.raises(BaseError, match="two targets of the adapter mean the same parameter"):
        resolved(base, Target("a.h.0.weight", (4, 6)), Target("x.a.h.0.weight", (4, 6)))


FUSED = [
    ("mixtral", "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.block_sparse_moe.experts.1.w1.weight", "ex"),
    ("mixtral", "model.layers.0.block_sparse_moe.experts.1.w1.weight", "model.layers.0.mlp.experts.gate_up_proj", "ex"),
    ("nomic_bert", "nomic_bert.layers.0.self_attn.q_proj.weight", "nomic_bert.encoder.layers.0.attn.Wqkv.weight", "fu"),
    ("phi3", "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.gate_up_proj.weight", "fu"),
    ("llama", "model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.self_attn.k_proj.weight", "parts"),
]
FUSED_TEXTS = {
    "ex": "stores its experts in another form",
    "fu": "stores that layer fused with others",
    "parts": "stores that layer in parts",
}


@pytest.mark.parametrize(("family", "name", "stored", "how"), FUSED)
def test_fused_layers_are_refused_by_name(tmp_path: Path, family: str, name: str, stored: str, how: str) -> None:
    other = stored.replace("layers.0", "layers.1")
    base = make_base(tmp_path / "base", {stored: (4, 6), other: (4, 6)}, {"model_type": family})
    with pytest.raises(BaseError) as caught:
        resolved(base, Target(name, (4, 6)))
    text = str(caught.value)
    assert f"which {FUSED_TEXTS[how]}: {stored}" in text and "Use a checkpoint in the form" in text
    assert other not in text and "\n" not in text


def test_long_names_take_linear_time() -> None:
    rules = renamings.rules(n for names in renamings.FAMILIES for n in names.split())
    assert len(rules) > 100
    seconds = []
    for count in (250, 500):
        names = ["encoder.layer." * count, "layers." + "1" * 14 * count, "encoder.block.1" * count, "." * 14 * count]
        start = time.process_time()
        for name in names:
            renamings.canonical(name, rules)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 0.1 + 4 * seconds[0]


# --- the table against transformers ---------------------------------------------------------------------------------

FAST = ("vit", "dinov2", "swin", "segformer", "llava", "qwen2_vl", "gpt_neox", "mixtral", "nomic_bert", "beit")
# What transformers itself does not save under the name that it was loaded from, and embeddings.
EXCEPTED = ("decoder.decoder_layers.", ".swin.embeddings.", "position_embedding")


def model_classes(family: str) -> Iterable[type]:
    """The classes of transformers for a model type, by the names in its Auto classes."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.auto import modeling_auto

    tables = [v for k, v in vars(modeling_auto).items() if k.endswith("_MAPPING_NAMES")]
    classes = {name for table in tables for kind, names in table.items() if kind == family for name in np.ravel(names)}
    return [getattr(transformers, name) for name in sorted(classes) if hasattr(transformers, name)]


def saved_names(model: Any) -> dict[str, str]:
    """{parameter of a layer: the name under which transformers saves it}, for those that are saved as they are."""
    from transformers import conversion_mapping, core_model_loading

    conversions = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)[::-1]
    conversions = [c for c in conversions if not isinstance(c, core_model_loading.PrefixChange)]
    back = [c.reverse_transform() for c in conversions]
    renames = [c for c in back if isinstance(c, core_model_loading.WeightRenaming)]
    converters = [c for c in back if isinstance(c, core_model_loading.WeightConverter)]
    return {
        name: core_model_loading.apply_renamings(name, renames)
        for name, parameter in model.named_parameters()
        if name.endswith(".weight")
        and parameter.ndim > 1
        and core_model_loading.apply_converters(name, converters)[1] is None
    }


def check_family(family: str) -> int:
    """Compare the table with transformers on the family's classes at their default sizes, without weights."""
    torch = pytest.importorskip("torch")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    renamed = 0
    for cls in model_classes(family):
        config = CONFIG_MAPPING[family]()
        for part in (config, *(getattr(config, key) for key in config.sub_configs)):
            for field in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
                if part is not None and isinstance(getattr(part, field, None), int):
                    setattr(part, field, min(2, getattr(part, field)))
        try:
            with torch.device("meta"):
                model = cls(config)
        except (
            ImportError,
            ValueError,
            TypeError,
            AttributeError,
            LookupError,
            AssertionError,
        ):  # it needs more than its defaults
            continue
        rules = renamings.rules(renamings.families(config.to_dict()))
        saved = saved_names(model)
        for names in (saved.keys(), saved.values()):  # no two parameters become one
            assert len({renamings.canonical(name, rules) for name in names}) == len(saved)
        for live, stored in saved.items():
            if any(part in live for part in EXCEPTED):
                continue
            ours, theirs = (renamings.canonical(name, rules) for name in (live, stored))
            assert ours.removeprefix("model.") == theirs.removeprefix("model.") or (
                ours.partition(".")[2] == theirs or theirs.partition(".")[2] == ours
            ), f"{cls.__name__}: {live} is saved as {stored}"
            assert renamings.canonical(ours, rules) == ours
            renamed += live != stored
    return renamed


@since_transformers("5.22")
@pytest.mark.parametrize("family", FAST)
def test_the_table_is_transformers_own(family: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert check_family(family) > 0


@since_transformers("5.22")
@pytest.mark.slow
def test_the_whole_table_is_transformers_own() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        total = sum(check_family(family) for names in renamings.FAMILIES for family in names.split())
    assert total > 1000


# --- orientation ----------------------------------------------------------------------------------------------------


def target(name: str, out: int, inner: int) -> Target:
    return Target(f"h.0.{name}.weight", (out, inner))


CONV1D, LINEAR = {"wide": (6, 4)}, {"wide": (4, 6)}  # how a layer of (out, in) = (4, 6) is stored
# configuration, stored shape of a non-square sibling that the adapter also has, and the view of a square layer
SQUARES: list[tuple[Config, list[Shape], View | None]] = [
    ({"model_type": "llama"}, [], MATRIX),
    ({"model_type": "llama"}, [(4, 6)], MATRIX),
    ({"model_type": "gpt2"}, [], TRANSPOSED),
    ({"model_type": "gpt2"}, [(6, 4)], TRANSPOSED),
    ({}, [(4, 6)], MATRIX),
    ({}, [(6, 4)], TRANSPOSED),
    ({"model_type": "own", "auto_map": {}}, [(4, 6)], MATRIX),
    ({}, [], None),
    ({"model_type": "own", "auto_map": {}}, [], None),  # code of its own: the name of the family says nothing
    ({"model_type": "llama"}, [(6, 4)], None),  # a family of linear layers that is stored like Conv1D
    ({}, [(4, 6), (6, 4)], None),  # siblings that disagree
]


@pytest.mark.parametrize(("config", "siblings", "view"), SQUARES)
def test_square_layers(tmp_path: Path, config: Config, siblings: list[Shape], view: View | None) -> None:
    names = [f"wide{n}" for n in range(len(siblings))]
    shapes = {"h.0.square.weight": (4, 4), **{f"h.0.{n}.weight": s for n, s in zip(names, siblings, strict=True)}}
    base = make_base(tmp_path / "base", shapes, config)
    wanted = [target("square", 4, 4), *(target(name, 4, 6) for name in names)]
    if view is None:
        with pytest.raises(OrientationError, match=r"E-ORIENT: .*base: 'h.0.square.weight' is square.*config.json"):
            resolved(base, *wanted)
    else:
        assert resolved(base, *wanted)[0] == Target("h.0.square.weight", (4, 4), view)


def test_heads_do_not_decide_squares(tmp_path: Path) -> None:
    """An output head is an ordinary linear layer in a model of Conv1D, and an embedding in one of linear layers lies
    the other way round: neither says how the layers between them are stored."""
    shapes = {"h.0.square.weight": (4, 4), "lm_head.weight": (9, 4), "wte.weight": (9, 4)}
    base = make_base(tmp_path / "base", shapes, {})
    with pytest.raises(OrientationError):
        resolved(base, target("square", 4, 4), Target("lm_head.weight", (9, 4)), Target("wte.weight", (4, 9)))


def test_shapes_must_be_those_of_the_adapter(tmp_path: Path) -> None:
    shapes = {"w.weight": (4, 6), "stack": (2, 4, 6), "rows.weight": (12, 6), "c.weight": (4, 2, 3, 3)}
    base = make_base(tmp_path / "base", shapes, {})
    for wanted in (
        Target("w.weight", (4, 7)),
        Target("w.weight", (2, 4, 6), View("expert:0")),
        Target("stack", (2, 4, 7), View("expert:0")),
        Target("stack", (3, 4, 6), View("expert:2")),
        Target("rows.weight", (9, 6), View("rows:3:6")),
        Target("rows.weight", (12, 5), View("rows:3:6")),
        Target("c.weight", (4, 2, 2, 2), View("conv:2x2:1")),
    ):
        with pytest.raises(BaseError, match=rf"E-BASE: .*{wanted.name!r} is \[.*in the adapter, \[.*in the base"):
            resolved(base, wanted)


def test_experts_take_the_layout_that_fits(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {"stack": (2, 4, 6), "square": (2, 4, 4)}, {})
    assert resolved(base, Target("stack", (2, 6, 4), View("expert:1"))) == [
        Target("stack", (2, 4, 6), View("expert_transposed:1"))
    ]
    assert resolved(base, Target("stack", (2, 6, 4), View("expert_transposed:1"))) == [
        Target("stack", (2, 4, 6), View("expert:1"))
    ]


def test_square_stacks_are_never_guessed(tmp_path: Path) -> None:
    """(experts, in, out) is claimed where it is known alone and stays; (experts, out, in) is for the base's class to
    say, else for stacks that are not square, and without either it is refused."""
    shapes = {"mlp.experts.down_proj": (2, 4, 4), "mlp.experts.gate_up_proj": (2, 4, 8)}
    base = make_base(tmp_path / "base", shapes, {})
    square = Target("mlp.experts.down_proj", (2, 4, 4), View("expert:1"))
    known = Target("mlp.experts.down_proj", (2, 4, 4), View("expert_transposed:1"))
    assert resolved(base, known) == [known]
    with pytest.raises(OrientationError, match=r"E-ORIENT: .*base: the matrices of .*down_proj' are square"):
        resolved(base, square)
    for view, is_transposed in (((2, 8, 4), True), ((2, 4, 8), False)):
        other = Target("mlp.experts.gate_up_proj", view, View("expert:0"))
        assert resolved(base, other, square)[1].view == (known.view if is_transposed else square.view)


@pytest.mark.parametrize(("family", "view"), (("gpt_oss", "expert_transposed:1"), ("qwen3_moe", "expert:1")))
def test_the_class_says_how_square_stacks_are_stored(tmp_path: Path, family: str, view: str) -> None:
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    counts = {"num_experts": 2, "num_local_experts": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    title = {"gpt_oss": "GptOssForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[family]
    config: Config = {
        "model_type": family,
        "architectures": [title],
        "vocab_size": 32,
        "head_dim": 4,
        **sizes,
        **counts,
    }
    name = "model.layers.0.mlp.experts.down_proj"
    base = make_base(tmp_path / "gpt-oss", {name: (2, 8, 8)}, config)  # a path says nothing
    assert resolved(base, Target(name, (2, 8, 8), View("expert:1")))[0].view == View(view)
