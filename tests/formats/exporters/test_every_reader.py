"""Every reader and every exporter: what is read of another tool's file is exported and read again with equal factors,
or refused by name."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BASES, dense, random_lora, write_files
from models import extra, one_target
from safetensors import safe_open
from test_base_names import make_base

from lrconvert import api
from lrconvert.core import errors
from lrconvert.core.dtypes import F64, Stored, round_to
from lrconvert.formats.exporters import base as exporters
from lrconvert.formats.readers.base import ids
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, LoraTarget, Target
from lrconvert.methods import base as methods
from lrconvert.testing import layouts, samples
from lrconvert.testing.layouts import Known

LLAMA = {**json.loads((BASES / "tiny-llama" / "config.json").read_text()), "num_hidden_layers": 22}
LLAMA |= {"num_attention_heads": 1, "num_key_value_heads": 1}
UNET = {"_class_name": "UNet2DConditionModel"}
# What readers ask for where a layout does not spell the names of a base: its parameters, and its config.json.
BASE_OF: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "gguf": (("model.layers.3.self_attn.v_proj", "model.layers.4.mlp.up_proj"), LLAMA),
    "kohya": (layouts.UNET, UNET),
    "diffusers": (layouts.UNET, UNET),
    "lycoris": (layouts.UNET, UNET),
    "clip_lora": (
        tuple(
            f"text_model.encoder.layers.{layer}.self_attn.{leaf}" for layer, leaf in ((10, "q_proj"), (11, "out_proj"))
        ),
        {"model_type": "clip_text_model"},
    ),
}
TEXT = ("gguf", "mlx", "peft", "raw", "torchtune", "peft_vblora", "peft_miss", "sbora")
TEXT += ("peft_adalora", "peft_ia3", "peft_loha", "peft_lokr", "peft_vera")
DIFFUSION = ("kohya", "diffusers", "lycoris")
# The exports that must succeed; whatever else is refused by name.
POSSIBLE = {
    *((reader, layout) for reader in TEXT for layout in ("peft-lora", "gguf", "mlx", "raw")),
    *((reader, layout) for reader in DIFFUSION for layout in ("peft-lora", "kohya", "diffusers", "raw")),
    *((reader, layout) for reader in DIFFUSION for layout in ("comfyui", "onetrainer")),
    *((reader, "original") for reader in DIFFUSION),
    *(("nola", layout) for layout in ("peft-lora", "raw")),
    *(("clip_lora", layout) for layout in ("peft-lora", "raw", "kohya", "diffusers", "comfyui", "onetrainer")),
    ("peft_vblora", "peft-vblora"),
    ("peft_miss", "peft-miss"),
}


def updates(adapter: LoraAdapter | CompactAdapter) -> dict[str, F64]:
    """The (out, in) updates that are not zero: servers' groups are filled up with zeros."""
    if isinstance(adapter, LoraAdapter):
        every = {pair.target.name: dense(pair) for pair in adapter.targets}
    else:
        every = {target.name: b.astype(np.float64) @ a for target, a, b in methods.expand_all(adapter)}
    return {name: update for name, update in every.items() if update.any()}


def read_again(folder: Path, **options: Any) -> LoraAdapter | CompactAdapter:
    """What our reader makes of an export: of its folder, or of the file in it."""
    for path in (folder, *sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.gguf"))):
        with contextlib.suppress(errors.UnknownLayoutError):
            return api.load(path, **options)
    pytest.fail(f"no reader knows {sorted(path.name for path in folder.iterdir())}")


def source_of(reader: str, tmp_path: Path, layout: str = "") -> tuple[Path, dict[str, Any]]:
    """The sample of a reader, and the options that it needs."""
    sample = samples.SAMPLES[reader]()
    folder = write_files(tmp_path / "adapter", sample.files)
    options: dict[str, Any] = {} if sample.alpha is None else {"alpha": sample.alpha}
    modules, config = BASE_OF.get(reader, ((), LLAMA))
    shapes = dict(sample.base) or {f"{module}.weight": (6, 8) for module in modules}
    if not shapes and layout == "gguf":
        shapes = {name: update.shape for name, update in sample.updates.items()}
    if shapes:
        options["base"] = make_base(tmp_path / "base", shapes, config)
    return folder, options


@pytest.mark.parametrize("layout", exporters.ids())
@pytest.mark.parametrize("reader", ids())
def test_read_exported_and_read_again(reader: str, layout: str, tmp_path: Path) -> None:
    folder, options = source_of(reader, tmp_path, layout)
    try:
        done = api.export(folder, tmp_path / "out", to=layout, keep_names=True, **options)
    except errors.LrcError as error:
        assert error.code in ("E-EXPORT", "E-BASE") and error.fix and (reader, layout) not in POSSIBLE, error
        assert not (tmp_path / "out").exists()
        return
    assert (reader, layout) in POSSIBLE
    before = api.load(folder, **options)
    again = read_again(tmp_path / "out", base=options.get("base"))
    expected, read = updates(before), updates(again)
    inside = {name.removeprefix("unet."): update for name, update in expected.items()}
    for name, update in read.items():
        np.testing.assert_allclose(update, inside[name.removeprefix("unet.")], rtol=1e-6, atol=1e-7)
    assert len(read) == len(expected)
    if (
        isinstance(before, LoraAdapter)
        and isinstance(again, LoraAdapter)
        and not any("into B" in n or "F64" in n for n in done.notes)
    ):
        stored = {pair.target.name.removeprefix("unet."): pair for pair in again.targets}
        for pair in before.targets:
            other = stored[pair.target.name.removeprefix("unet.")]
            assert (pair.a, pair.b) == (other.a, other.b)


# --- nothing is lost without a word ---------------------------------------------------------------------------------

NAMES = ("model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight")
PLAIN = ("peft-lora", "mlx", "raw", "gguf")


def lora(
    dtype: str = "F32", scales: tuple[float, float] = (0.75, 0.75), ranks: tuple[int, int] = (4, 4)
) -> LoraAdapter:
    """Two modules of a language model."""
    pairs = []
    for n, (name, scale, rank) in enumerate(zip(NAMES, scales, ranks, strict=True)):
        pair = one_target(Target(name, (6, 8)), rank=rank, seed=n)
        a, b = (Stored(dtype, round_to(values, dtype)) for values in (pair.A, pair.B))
        pairs.append(LoraTarget(pair.target, a, b, scale))
    return LoraAdapter(tuple(pairs))


def exported(adapter: LoraAdapter, folder: Path, layout: str, **options: Any) -> tuple[LoraAdapter, tuple[str, ...]]:
    base = make_base(folder.parent / f"base of {folder.name}", dict.fromkeys(NAMES, (6, 8)), LLAMA)
    done = api.export(adapter, folder, to=layout, base=base, keep_names=True, **options)
    again = read_again(folder, base=base)
    assert isinstance(again, LoraAdapter)
    only = {pair.target.name for pair in adapter.targets}
    return replace(again, targets=tuple(p for p in again.targets if p.target.name in only)), done.notes


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("layout", PLAIN)
def test_factors_keep_every_bit_and_alpha(layout: str, dtype: str, tmp_path: Path) -> None:
    """One scale for all: A and B in the dtype in which the LoRA has them, the scale as alpha, also that of rsLoRA."""
    for n, scale in enumerate((0.75, 2.0, 16 / 8**0.5)):
        before = lora(dtype, (scale, scale))
        again, notes = exported(before, tmp_path / str(n), layout)
        assert [(p.a, p.b) for p in again.targets] == [(p.a, p.b) for p in before.targets]
        assert [p.scale for p in again.targets] == pytest.approx([scale, scale], rel=1e-7)
        assert not [note for note in notes if "multiplied" in note]


@pytest.mark.parametrize("layout", PLAIN)
@pytest.mark.parametrize("scales", [(0.75, 0.5), (0.0, 0.0), (-1.5, -1.5), (0.0, 1.0)], ids=str)
def test_scales_that_a_layout_cannot_state(layout: str, scales: tuple[float, float], tmp_path: Path) -> None:
    """They are in B then, and a scale of zero never becomes the alpha of zero that programs take for none."""
    before = lora("F16", scales)
    again, notes = exported(before, tmp_path / "out", layout)
    expected = {pair.target.name: dense(pair) for pair in before.targets}
    for pair in again.targets:
        np.testing.assert_allclose(dense(pair), expected[pair.target.name], rtol=1e-6, atol=1e-7)
        assert pair.scale > 0
    assert any("multiplied into B" in note for note in notes) == (scales != (0.0, 0.0) and scales != (0.0, 1.0))


@pytest.mark.parametrize("layout", PLAIN)
@pytest.mark.parametrize("keep_ranks", [False, True])
def test_ranks_that_differ(layout: str, keep_ranks: bool, tmp_path: Path) -> None:
    before = lora("F32", (2.0, 2.0), (2, 4))
    if keep_ranks and layout == "mlx":
        with pytest.raises(errors.OptionError, match="one rank"):
            exported(before, tmp_path / "out", layout, keep_ranks=True)
        return
    if keep_ranks and layout == "raw":  # no one alpha is the rank of both
        with pytest.raises(errors.ConfigError, match="states alpha"):
            exported(before, tmp_path / "out", layout, keep_ranks=True)
        return
    again, _ = exported(before, tmp_path / "out", layout, keep_ranks=keep_ranks)
    ranks = {pair.target.name: pair.rank for pair in again.targets}
    assert list(ranks.values()) == ([2, 4] if keep_ranks else [4, 4])
    for pair, own in zip(again.targets, before.targets, strict=True):
        np.testing.assert_allclose(dense(pair), dense(own), rtol=1e-6, atol=1e-7)


def test_float64_is_rounded_and_said(tmp_path: Path) -> None:
    before = lora("F64")
    again, notes = exported(before, tmp_path / "out", "peft-lora")
    assert {pair.a.dtype for pair in again.targets} == {"F32"} and "F64" in " ".join(notes)


@pytest.mark.parametrize("layout", exporters.ids())
def test_heads_and_magnitudes_are_kept_or_refused(layout: str, tmp_path: Path) -> None:
    """A saved head, a DoRA magnitude: in the export with every bit, or E-EXPORT that names it."""
    base = make_base(tmp_path / "base", {**dict.fromkeys(NAMES, (6, 8)), "score.weight": (2, 8)}, LLAMA)
    plain = lora()
    names = [pair.target.name for pair in plain.targets]
    magnitudes = tuple(replace(extra(name, np.arange(1, 7.0)), use="magnitude") for name in names)
    for beside in ((extra("score.weight", np.ones((2, 8))),), magnitudes):
        adapter = replace(plain, extras=beside)
        try:
            api.export(adapter, tmp_path / "out", to=layout, base=base, keep_names=True, overwrite=True)
        except errors.ExportError as error:
            assert beside[0].name in str(error) or layout in ("peft-miss", "peft-vblora", "original")
            continue
        again = read_again(tmp_path / "out", base=base)
        kept = {(e.name, e.use): np.frombuffer(e.data, np.float32).tolist() for e in again.extras}
        assert kept == {(e.name, e.use): np.frombuffer(e.data, np.float32).tolist() for e in beside}


def test_the_bias_of_a_lora_has_its_scale_once(tmp_path: Path) -> None:
    """PEFT multiplies it by alpha / r, and what we hold has that in it."""
    names = [pair.target.name.removesuffix(".weight") + ".bias" for pair in lora().targets]
    biases = tuple(replace(extra(name, np.arange(6.0)), use="add") for name in names)
    api.export(replace(lora(), extras=biases), tmp_path / "out", to="peft-lora")
    again = api.load_lora(tmp_path / "out")
    assert {e.name: np.frombuffer(e.data, np.float32).tolist() for e in again.extras if e.use == "add"} == {
        name: [0, 1, 2, 3, 4, 5] for name in names
    }


def test_a_lora_has_no_source(tmp_path: Path) -> None:
    with pytest.raises(errors.OptionError, match="nothing is lost"):
        api.export(random_lora(), tmp_path / "out", to="peft-lora", source=random_lora())
    with pytest.raises(errors.OptionError, match="no folder to write"):
        api.export(random_lora(), to="peft-lora")


KOHYA = {
    "lora_unet_mid_block_attentions_0_proj_in": "unet.mid_block.attentions.0.proj_in",
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
    ),
    "lora_unet_input_blocks_4_1_transformer_blocks_1_ff_net_0_proj": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.ff.net.0.proj"
    ),
    "lora_te_text_model_encoder_layers_11_mlp_fc2": "text_encoder.text_model.encoder.layers.11.mlp.fc2",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
    "lora_unet_transformer_blocks_0_attn_to_q": "transformer.transformer_blocks.0.attn.to_q",
    "lora_unet_nobody_0_knows": None,
    "lora_te3_encoder_block_0": None,
}


@pytest.mark.parametrize("spelled", KOHYA)
def test_names_of_kohya_without_a_base(spelled: str, tmp_path: Path) -> None:
    """Those of diffusers' and CLIP's modules are taken apart, which is said; without a meaning they are refused."""
    role, _, inside = spelled.removeprefix("lora_").partition("_")
    known = Known(inside, np.ones((2, 8), "<f4"), np.ones((6, 2), "<f4"), 1.0)
    folder = write_files(tmp_path / "a", layouts.kohya([known], f"lora_{role}"))
    if KOHYA[spelled] is None:
        with pytest.raises(errors.ExportError, match=rf"the layout kohya mean, '{spelled}.*Give base="):
            api.export(folder, tmp_path / "out", to="diffusers")
        return
    done = api.export(folder, tmp_path / "out", to="diffusers")
    assert f"'{KOHYA[spelled]}.weight'" in " ".join(done.notes)
    (pair,) = api.load_lora(tmp_path / "out").targets
    assert pair.target.name == f"{KOHYA[spelled]}.weight"


def test_a_pipeline_for_peft_is_one_model(tmp_path: Path) -> None:
    """PEFT loads an adapter on one model, whose names begin inside of it."""
    (known,) = [Known(m, *(np.ones(s, "<f4") for s in ((2, 8), (6, 2))), 1.0) for m in layouts.UNET[:1]]
    unet = write_files(tmp_path / "unet", layouts.diffusers([known]))
    done = api.export(unet, tmp_path / "out", to="peft-lora")
    assert any("pipeline.unet" in note for note in done.notes)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == [known.module]
    adapter = api.load_lora(unet)
    text = replace(adapter.targets[0], target=Target("text_encoder.text_model.encoder.layers.0.mlp.fc1.weight", (6, 8)))
    with pytest.raises(errors.ExportError, match="one model"):
        api.export(replace(adapter, targets=(text, *adapter.targets)), tmp_path / "no", to="peft-lora")


def test_metadata_of_a_lora_say_where_it_is_from(tmp_path: Path) -> None:
    folder, _ = source_of("peft", tmp_path)
    api.export(folder, tmp_path / "out", to="peft-lora")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "np") as file:
        assert file.metadata()["lrconvert_source"] == api.load(folder).provenance.source
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`peft`" in card and "bit for bit" in card and "## Measured" not in card
