"""Families of diffusion models: names and updates go from any scheme to any other and back, and files of every
trainer's spelling are written as they were read."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, dense
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lrconvert import api
from lrconvert.core import errors
from lrconvert.core.dtypes import Stored
from lrconvert.formats.families.base import DIFFUSERS, ORIGINAL, families, is_known, of_class
from lrconvert.formats.families.shared import translate
from lrconvert.formats.families.shared.table import Line, Templates, filled, parse
from lrconvert.formats.families.shared.translate import Piece, Reading
from lrconvert.lora.adapter import ExtraTensor, LoraAdapter, LoraTarget, Target
from lrconvert.testing import diffusion
from lrconvert.testing.layouts import Known

SCHEMES = [(name, scheme) for name, family in families().items() for scheme in family.schemes]
FUSING = [(name, scheme) for name, scheme in SCHEMES if scheme != DIFFUSERS]


def piece(module: str, out: int, width: int, *, rank: int = 2, seed: int = 0, dtype: str = "<f4") -> Piece:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(dtype) for shape in ((rank, width), (out, rank)))
    word = {"<f4": "F32", "<f2": "F16"}[dtype]
    return Piece(
        module, LoraTarget(Target(f"{module}.weight", (out, width)), Stored(word, a), Stored(word, b), 0.5), {}
    )


def pieces(name: str, scheme: str, **how: Any) -> list[Piece]:
    every = diffusion.modules(families()[name], scheme)
    return [piece(module, out, width, seed=n, **how) for n, (module, out, width, _) in enumerate(every)]


def same(one: list[Piece], other: list[Piece]) -> None:
    """The same modules, and factors to the bit."""
    by_name = {p.module: p.pair for p in other}
    assert sorted(p.module for p in one) == sorted(by_name) and len(one) == len(other)
    for p in one:
        pair = by_name[p.module]
        assert (p.pair.a, p.pair.b, p.pair.scale) == (pair.a, pair.b, pair.scale), p.module
        assert (p.pair.target.shape, p.pair.target.name) == (pair.target.shape, pair.target.name)


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scheme"), SCHEMES)
def test_every_name_is_of_one_line(name: str, scheme: str) -> None:
    """With dots and with underscores; parts are of one line of a scheme."""
    family = families()[name]
    names = family.schemes[scheme]
    for module, out, width, line in diffusion.modules(family, scheme):
        for is_flat in (False, True):
            hits = names.find(module.replace(".", "_") if is_flat else module, is_flat)
            assert line in [hit for hit, _ in hits] and len({hit.name for hit, _ in hits}) == 1
            place = names.place(module.replace(".", "_") if is_flat else module, out, width, is_flat)
            assert place is not None and place[0] == line and filled(place[0].name, place[1]) == module
        assert is_known(module) and is_known(module, scheme)
    parts = [(part, line.rows[n] if len(line.parts) > 1 else line.rows) for line in names.lines
             for n, part in enumerate(line.parts)]  # fmt: skip
    assert len(set(parts)) == len(parts)


def test_tables_are_read_without_a_search() -> None:
    """A name is compared with the lines that have its words, however many others there are."""
    compared = []

    class Counted(str):
        def __eq__(self, other: object) -> bool:
            compared.append(other)
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    lines = [(f"blocks.#.{Counted(f'word{n}')}.2", n) for n in range(500)]
    table = Templates(lines, is_flat=False)
    assert table.find("blocks.7.word300.2") == [(300, ("7",))] and table.find("blocks.7.word300.3") == []
    assert len(compared) < 20


def test_lines_of_shapes() -> None:
    """Rows in widths of the input, a share of the rest, halves that change places; another shape is another layer."""
    (fused,) = parse("linear1 -> attn.{to_q,to_k,to_v},proj : 1 1 1 4".replace("},proj", ",proj}"))
    assert fused.parts == ("attn.to_q", "attn.to_k", "attn.to_v", "attn.proj")
    assert fused.ends(56, 8) == (8, 16, 24, 56) and fused.ends(64, 8) is None
    grouped = Line("qkv", ("q", "k", "v"), (1, None, None))
    assert grouped.ends(16, 8) == (8, 12, 16) and grouped.ends(8, 8) is None and grouped.ends(17, 8) is None
    (turned,) = parse("final -> norm_out.linear : 2 swapped")
    assert turned.is_swapped and turned.ends(16, 8) == (16,) and turned.ends(48, 8) is None
    (same_name,) = parse("txt_in")
    assert same_name == Line("txt_in", ("txt_in",), (None,))


def test_classes_are_of_one_family() -> None:
    every = [name for family in families().values() for name in family.classes]
    assert len(set(every)) == len(every) and of_class("NoSuchModel") is None
    assert all(of_class(name) is family for family in families().values() for name in family.classes)


# --- updates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scheme"), FUSING)
def test_there_and_back(name: str, scheme: str) -> None:
    """A scheme's modules are diffusers', and these are the scheme's again: names, bits and scales."""
    family = families()[name]
    before = pieces(name, scheme)
    middle = translate.translated(before, Reading(name, family, scheme), False, DIFFUSERS)
    assert all(family.schemes[DIFFUSERS].find(p.module, False) for p in middle)
    same(before, translate.translated(middle, Reading(name, family, DIFFUSERS), False, scheme))


@pytest.mark.parametrize(("name", "scheme"), FUSING)
def test_parts_of_any_ranks_become_one_and_parts_again(name: str, scheme: str) -> None:
    """Ranks of parts with A of their own add up; split again, each has its own factors, to the bit."""
    family = families()[name]
    before = []
    for n, line in enumerate(family.schemes[scheme].lines):
        ends = next(line.ends(out, 4) for _, out, _, one in diffusion.modules(family, scheme) if one is line)
        assert ends is not None
        for m, (part, start, end) in enumerate(zip(line.parts, (0, *ends), ends, strict=False)):
            block = ("3",) * part.count("#") if n % 2 else ("17",) * part.count("#")
            before.append(piece(filled(part, block), end - start, 4, rank=1 + m % 3, seed=10 * n + m))
    before = list({p.module: p for p in before}.values())
    fused = translate.translated(before, Reading(name, family, DIFFUSERS), False, scheme)
    same(before, translate.translated(fused, Reading(name, family, scheme), False, DIFFUSERS))


def test_a_fused_update_is_the_updates_of_its_rows() -> None:
    """The dense update of a fused layer has those of its parts one below the other, also of one that is not adapted."""
    flux = families()["flux1"]
    parts = [piece(f"single_transformer_blocks.4.{leaf}", out, 4, seed=n, rank=n + 1)
             for n, (leaf, out) in enumerate((("attn.to_q", 4), ("attn.to_v", 4), ("proj_mlp", 16)))]  # fmt: skip
    (fused,) = translate.translated(parts, Reading("flux1", flux, DIFFUSERS), False, ORIGINAL)
    assert fused.module == "single_blocks.4.linear1" and fused.pair.rank == 6
    rows = [dense(parts[0].pair), np.zeros((4, 4)), dense(parts[1].pair), dense(parts[2].pair)]
    np.testing.assert_array_equal(dense(fused.pair), np.concatenate(rows))


def test_parts_that_share_an_input_share_its_rank() -> None:
    flux = families()["flux1"]
    one = piece("transformer_blocks.0.attn.to_q", 4, 4, rank=3)
    other = piece("transformer_blocks.0.attn.to_v", 4, 4, rank=3, seed=1)
    other = replace(other, pair=replace(other.pair, a=one.pair.a))
    (fused,) = translate.translated([one, other], Reading("flux1", flux, DIFFUSERS), False, ORIGINAL)
    assert fused.pair.rank == 3 and fused.pair.a == one.pair.a


@pytest.mark.parametrize("scales", [(0.5, 2.0), (0.0, 0.75), (0.0, 0.0)])
def test_parts_of_several_scales(scales: tuple[float, float]) -> None:
    flux = families()["flux1"]
    parts = [piece(f"transformer_blocks.0.attn.{leaf}", 4, 4, seed=n) for n, leaf in enumerate(("to_q", "to_k"))]
    parts = [replace(p, pair=replace(p.pair, scale=scale)) for p, scale in zip(parts, scales, strict=True)]
    (fused,) = translate.translated(parts, Reading("flux1", flux, DIFFUSERS), False, ORIGINAL)
    wanted = np.concatenate([dense(parts[0].pair), dense(parts[1].pair), np.zeros((4, 4))])
    np.testing.assert_allclose(dense(fused.pair), wanted, rtol=1e-12)


def test_halves_change_places() -> None:
    flux = families()["flux1"]
    (norm,) = translate.translated(
        [piece("final_layer.adaLN_modulation.1", 8, 4)], Reading("flux1", flux, ORIGINAL), False, DIFFUSERS
    )
    before = dense(piece("final_layer.adaLN_modulation.1", 8, 4).pair)
    assert norm.module == "norm_out.linear"
    np.testing.assert_array_equal(dense(norm.pair), np.concatenate([before[4:], before[:4]]))


def test_what_has_a_number_for_each_row_goes_with_its_rows() -> None:
    """Magnitudes and biases of a fused layer are split and joined as its rows are; a part without a bias has zeros, and
    one without a magnitude is refused."""
    flux = families()["flux1"]
    numbers = np.arange(12, dtype=np.float32)
    name = "double_blocks.2.txt_attn.qkv"
    extras = {use: ExtraTensor(f"{name}.{leaf}", "F32", (12,), numbers.tobytes(), use)
              for use, leaf in (("magnitude", "weight"), ("add", "bias"))}  # fmt: skip
    before = [replace(piece(name, 12, 4), extras=extras)]
    parts = translate.translated(before, Reading("flux1", flux, ORIGINAL), False, DIFFUSERS)
    for n, part in enumerate(parts):
        assert {np.frombuffer(e.data, np.float32).tolist() == numbers[4 * n : 4 * n + 4].tolist()
                for e in part.extras.values()} == {True}  # fmt: skip
        assert part.extras["magnitude"].name == part.pair.target.name
    (again,) = translate.translated(parts, Reading("flux1", flux, DIFFUSERS), False, ORIGINAL)
    assert again.extras == extras
    alone = [replace(parts[1], extras={"add": parts[1].extras["add"]})]
    (padded,) = translate.translated(alone, Reading("flux1", flux, DIFFUSERS), False, ORIGINAL)
    assert np.frombuffer(padded.extras["add"].data, np.float32).tolist() == [0] * 4 + [4, 5, 6, 7] + [0] * 4
    with pytest.raises(errors.ExportError, match="only 1 of its 3 parts have a magnitude"):
        translate.translated([parts[1]], Reading("flux1", flux, DIFFUSERS), False, ORIGINAL)


# --- files -----------------------------------------------------------------------------------------------------------


def files() -> list[tuple[str, diffusion.Trained]]:
    """Every spelling with some families, and every family with two; FLUX.1 with all."""
    chosen = []
    for n, (name, family) in enumerate(families().items()):
        fitting = [trained for trained in diffusion.TRAINED if trained.scheme in family.schemes]
        every = fitting if name == "flux1" else [fitting[n % 5], fitting[5 + n % 4]]
        chosen += [(name, trained) for trained in every]
    return chosen


FILES = files()


def write(folder: Path, known: list[Known], trained: diffusion.Trained) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(diffusion.tensors(known, trained.spelling)), folder / "x.safetensors")
    return folder / "x.safetensors"


def config_of(folder: Path, name: str) -> Path:
    """A base of which there is a config.json alone."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"_class_name": families()[name].classes[0], "_diffusers_version": "0"})
    )
    return folder


def equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    assert sorted(one) == sorted(other)
    for name, values in one.items():
        assert values.dtype == other[name].dtype and np.array_equal(values, other[name]), name


@pytest.mark.medium
@pytest.mark.parametrize(("name", "trained"), FILES, ids=[f"{name}-{trained.name}" for name, trained in FILES])
def test_what_is_read_is_written_in_the_same_layout(name: str, trained: diffusion.Trained, tmp_path: Path) -> None:
    """Without a base and with one: every tensor under its name, with its bits."""
    alpha = 1.0 if trained.spelling.has_alpha else 2.0
    path = write(tmp_path / "a", diffusion.pairs(families()[name], trained.scheme, alpha=alpha), trained)
    for base in (None, config_of(tmp_path / "base", name)):
        out = tmp_path / f"out{base is None}"
        api.export(path, out, to="original", base=base)
        equal(load_file(path), load_file(out / "lora.safetensors"))


LAYOUTS = ("comfyui", "diffusers", "onetrainer", "kohya")


@pytest.mark.medium
@pytest.mark.parametrize("name", families())
def test_layouts_say_the_same(name: str, tmp_path: Path) -> None:
    """From one layout to the next: every module of diffusers has one update, whatever the file calls it."""
    base = config_of(tmp_path / "base", name)
    known = diffusion.pairs(families()[name], ORIGINAL, alpha=3.0)
    trained = next(one for one in diffusion.TRAINED if one.name == "kohya")
    path = write(tmp_path / "first", known, trained)
    wanted = {pair.target.name: dense(pair) for pair in api.load_lora(path, base=base).targets}
    every = {part for line in families()[name].schemes[DIFFUSERS].lines for part in line.parts}
    assert len(wanted) == len({filled(part, ("1",) * part.count("#")) for part in every}) + (name == "sd3")
    for layout in LAYOUTS:
        api.export(path, tmp_path / layout, to=layout, base=base)
        (path,) = (tmp_path / layout).glob("*.safetensors")
        updates = {pair.target.name: dense(pair) for pair in api.load_lora(path, base=base).targets}
        assert sorted(updates) == sorted(wanted), layout
        for module, update in updates.items():
            np.testing.assert_allclose(update, wanted[module], rtol=1e-6, atol=1e-7, err_msg=f"{layout} {module}")


def test_the_guide_has_the_table_of_today() -> None:
    """``python docs/families.py`` writes it."""
    spec = importlib.util.spec_from_file_location("families_page", ROOT / "docs" / "families.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == module.PAGE.read_text("utf-8")


# --- what a name may mean --------------------------------------------------------------------------------------------


def of_blocks(count: int, single: int) -> LoraAdapter:
    """Attention of FLUX.1 or HunyuanVideo, which diffusers calls alike."""
    names = [f"transformer.transformer_blocks.{n}.attn.to_q" for n in range(count)]
    names += [f"transformer.single_transformer_blocks.{n}.attn.to_q" for n in range(single)]
    return LoraAdapter(tuple(piece(name, 4, 4, seed=n).pair for n, name in enumerate(sorted(names))))


def test_names_of_two_families_are_told_apart_by_blocks_or_refused(tmp_path: Path) -> None:
    done = api.export(of_blocks(19, 38), tmp_path / "flux", to="comfyui")
    assert any("the number of blocks is that of FLUX.1" in note for note in done.notes)
    assert "diffusion_model.double_blocks.18.img_attn.qkv.lora_A.weight" in load_file(
        tmp_path / "flux" / "lora.safetensors"
    )
    api.export(of_blocks(20, 40), tmp_path / "hunyuan", to="comfyui")
    assert "diffusion_model.double_blocks.18.img_attn_qkv.lora_A.weight" in load_file(
        tmp_path / "hunyuan" / "lora.safetensors"
    )
    api.export(of_blocks(2, 2), tmp_path / "flat", to="kohya")  # where both have the same names
    assert "lora_unet_single_blocks_1_linear1.alpha" in load_file(tmp_path / "flat" / "lora.safetensors")
    with pytest.raises(errors.ExportError, match=r"FLUX\.1 or HunyuanVideo.*Give base=.*config\.json"):
        api.export(of_blocks(2, 2), tmp_path / "no", to="comfyui")
    base = config_of(tmp_path / "base", "hunyuan_video")
    api.export(of_blocks(2, 2), tmp_path / "yes", to="comfyui", base=base)
    assert "diffusion_model.single_blocks.1.linear1.lora_A.weight" in load_file(tmp_path / "yes" / "lora.safetensors")


def test_a_compact_file_keeps_its_fused_layers_and_finds_its_way_back(tmp_path: Path) -> None:
    """The issue's case: kohya's FLUX, without a base, made small, and out again in kohya's and in diffusers' names."""
    trained = next(one for one in diffusion.TRAINED if one.name == "kohya")
    path = write(tmp_path / "a", diffusion.pairs(families()["flux1"], ORIGINAL, width=16), trained)
    compact = api.convert(path, "lowrank", rank=2, bits=14).compact
    assert "lora_unet_double_blocks_1_img_attn_qkv.weight" in {target.name for target in compact.targets}
    wanted = {pair.target.name: dense(pair) for pair in api.load_lora(path).targets}
    for layout in ("kohya", "original"):
        api.export(compact, tmp_path / layout, to=layout)
        again = {
            pair.target.name: dense(pair) for pair in api.load_lora(tmp_path / layout / "lora.safetensors").targets
        }
        assert sorted(again) == sorted(wanted)
        for name, update in again.items():
            assert np.abs(update - wanted[name]).max() <= 2e-3 * np.abs(wanted[name]).max(), name
    done = api.export(compact, tmp_path / "d", to="diffusers")
    assert any("layers there" in note and "FLUX.1" in note for note in done.notes)
    (file,) = (tmp_path / "d").glob("*.safetensors")
    assert "transformer.single_transformer_blocks.1.proj_mlp.lora_B.weight" in load_file(file)


def test_wan_has_two_transformers(tmp_path: Path) -> None:
    names = [f"{model}.blocks.0.attn1.to_q" for model in ("transformer", "transformer_2")]
    tensors = {f"{name}.lora_{half}.weight": np.ones((2, 2), np.float32) for name in names for half in "AB"}
    save_file(tensors, tmp_path / "wan.safetensors")
    for layout in ("original", "diffusers"):
        api.export(tmp_path / "wan.safetensors", tmp_path / layout, to=layout)
        (file,) = (tmp_path / layout).glob("*.safetensors")
        equal(tensors, load_file(file))
    with pytest.raises(errors.ExportError, match="transformer and transformer_2, whose modules have the same names"):
        api.export(tmp_path / "wan.safetensors", tmp_path / "no", to="comfyui")


def test_differences_of_biases_ride_along(tmp_path: Path) -> None:
    """``.diff_b`` of Wan, in and out, with a base whose names are others, too."""
    name = "diffusion_model.blocks.0.self_attn.q"
    factors = {"lora_down.weight": np.ones((2, 4)), "lora_up.weight": np.ones((4, 2)), "alpha": np.array(2.0)}
    parts = {**factors, "diff_b": np.arange(4)}
    tensors = {f"{name}.{part}": values.astype(np.float32) for part, values in parts.items()}
    save_file(tensors, tmp_path / "wan.safetensors")
    for base in (None, config_of(tmp_path / "base", "wan")):
        out = tmp_path / f"out {base is None}"
        api.export(tmp_path / "wan.safetensors", out, to="original", base=base)
        equal(tensors, load_file(out / "lora.safetensors"))
    (extra,) = api.load_lora(tmp_path / "wan.safetensors", base=tmp_path / "base").extras
    assert (extra.name, extra.use) == ("blocks.0.attn1.to_q.bias", "add")
    api.export(tmp_path / "wan.safetensors", tmp_path / "d", to="diffusers")  # as the bias of a LoRA
    (again,) = api.load_lora(tmp_path / "d").extras
    assert (again.name, again.data) == ("transformer.blocks.0.attn1.to_q.bias", extra.data)
    with safe_open(tmp_path / "d" / "pytorch_lora_weights.safetensors", "np") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_bias"] is True


def test_text_encoders_of_each_layout(tmp_path: Path) -> None:
    """CLIP and T5 beside FLUX: kohya's third is FLUX's second, ComfyUI calls them by their kinds."""
    flux = "lora_unet_double_blocks_0_img_attn_proj"
    clip, t5 = "lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    tensors = {f"{name}.lora_{half}.weight": np.full((2, 2), n + 1, np.float32)
               for n, name in enumerate((flux, clip, t5)) for half in ("down", "up")}  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    base = config_of(tmp_path / "base", "flux1")
    wanted = {
        "kohya": (flux, clip, t5),
        "comfyui": (
            "diffusion_model.double_blocks.0.img_attn.proj",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
        ),
        "diffusers": (
            "transformer.transformer_blocks.0.attn.to_out.0",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
            "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
        ),
    }
    for layout, names in wanted.items():
        folder = tmp_path / layout
        api.export(api.load_lora(tmp_path / "x.safetensors"), folder, to=layout, base=base)
        (file,) = folder.glob("*.safetensors")
        assert {name.partition(".lora_")[0].removesuffix(".alpha") for name in load_file(file)} == set(names), layout


@pytest.mark.parametrize(
    "name",
    [
        "lycoris_transformer_blocks_0_attn_to_q",
        "lora_unet__blocks_0_self_attn_q",
        "lora_transformer_blocks_0_self_attn_q",
    ],
)
def test_prefixes_of_single_trainers(name: str, tmp_path: Path) -> None:
    """SimpleTuner's, VideoX-Fun's: read, named as diffusers has it, and written back as they were."""
    tensors = {f"{name}.lora_{half}.weight": np.ones((2, 2), np.float32) for half in ("down", "up")}
    save_file(tensors, tmp_path / "x.safetensors")
    api.export(tmp_path / "x.safetensors", tmp_path / "again", to="original")
    equal(tensors, load_file(tmp_path / "again" / "lora.safetensors"))
    api.export(tmp_path / "x.safetensors", tmp_path / "d", to="diffusers")
    (pair,) = api.load_lora(tmp_path / "d").targets
    assert pair.target.name in (
        "transformer.transformer_blocks.0.attn.to_q.weight", "transformer.blocks.0.attn1.to_q.weight"
    )  # fmt: skip


def test_what_nothing_explains_is_refused(tmp_path: Path) -> None:
    save_file({f"lora_unet_nobody_0_knows.lora_{half}.weight": np.ones((2, 2), np.float32) for half in ("down", "up")},
              tmp_path / "x.safetensors")  # fmt: skip
    for layout in ("diffusers", "comfyui", "kohya"):
        with pytest.raises(errors.ExportError, match="no base was given"):
            api.export(tmp_path / "x.safetensors", tmp_path / "no", to=layout)
    base = config_of(tmp_path / "base", "flux1")
    with pytest.raises(errors.BaseError, match="is no module of the base"):
        api.load_lora(tmp_path / "x.safetensors", base=base)
    with pytest.raises(errors.ExportError, match=r"nothing says how the file.*peft-lora"):
        api.export(of_blocks(1, 1), tmp_path / "no", to="original")
