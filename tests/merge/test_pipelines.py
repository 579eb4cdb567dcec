"""Merges into models of diffusers: their weight files, whatever their names, and pipelines of several models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import load_all, one_target, renamed, save_base, tree

from lrconvert import api
from lrconvert.api import merge, recover, unmerge, verify
from lrconvert.core.dtypes import Stored, round_to
from lrconvert.core.errors import BaseError, FileKindError, LrcError, OptionError, UndoError
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.lora.adapter import LoraAdapter, Target, View
from lrconvert.merge import Scaled

CONV = View("conv:3x3:1")
UNET = {"down.0.attn.to_q.weight": (16, 24), "down.0.conv.weight": (8, 4, 3, 3), "mid.proj.weight": (12, 8)}
TEXT = {"text_model.layers.0.q_proj.weight": (16, 16), "text_model.layers.0.up.weight": (24, 16)}
LAYOUTS = {
    "one file": ("diffusion_pytorch_model", "", 1),
    "shards": ("diffusion_pytorch_model", "", 2),
    "variant": ("diffusion_pytorch_model", "fp16", 1),
    "shards of a variant": ("diffusion_pytorch_model", "fp16", 2),
    "variant of transformers": ("model", "fp16", 1),
    "shards of a variant of transformers": ("model", "bf16", 2),
}


def lora(shapes: Mapping[str, tuple[int, ...]], prefix: str = "", seed: int = 0) -> LoraAdapter:
    targets = [Target(prefix + n, s, CONV if len(s) == 4 else View("matrix")) for n, s in sorted(shapes.items())]
    return LoraAdapter(tuple(one_target(t, scale=0.02, seed=seed + i) for i, t in enumerate(targets)))


def model(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], layout: str = "one file", config: dict[str, Any] | None = None
) -> Path:
    """A model whose weight files have these names."""
    stem, variant, count = LAYOUTS[layout]
    rng = np.random.default_rng(len(shapes))
    parts: list[dict[str, Stored]] = [{} for _ in range(count)]
    for n, (name, shape) in enumerate(shapes.items()):
        parts[n % count][name] = Stored("F16", round_to(rng.standard_normal(shape) * 0.02, "F16"))
    save_base(folder, parts, config or {"_class_name": "UNet2DConditionModel"})
    dot = f".{variant}" if variant else ""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace('"model-', f'"{stem}{dot}-')
        index.unlink()
        (folder / f"{stem}.safetensors.index{dot}.json").write_text(text)
    for path in list(folder.glob("model*.safetensors")):
        path.rename(folder / path.name.replace("model", f"{stem}{dot}", 1))
    return folder


def pipeline(folder: Path, layout: str = "shards") -> Path:
    folder.mkdir()
    model(folder / "unet", UNET, layout)
    model(folder / "text_encoder", TEXT, "variant of transformers", {"model_type": "clip_text_model"})
    model(folder / "vae", {"decoder.weight": (8, 8)})
    for name in ("scheduler", "tokenizer"):
        (folder / name).mkdir()
        (folder / name / f"{name}_config.json").write_text("{}\n")
    parts = {name: ["diffusers", "X"] for name in ("unet", "text_encoder", "vae", "scheduler", "tokenizer")}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts}))
    (folder / "v1-5-pruned.safetensors").write_bytes(b"all weights once more")
    return folder


def both() -> LoraAdapter:
    unet, text = lora(UNET, "unet."), lora(TEXT, "text_encoder.", seed=9)
    return replace(unet, targets=tuple(sorted((*unet.targets, *text.targets), key=lambda p: p.target)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_files_of_every_name(layout: str, tmp_path: Path) -> None:
    """The output has the base's file names, and so have new shards; a merge in place and an unmerge give every byte."""
    base = model(tmp_path / "base", UNET, layout)
    before, adapter = tree(base), lora(UNET)
    merge(base, [adapter], tmp_path / "out")
    assert tree(tmp_path / "out").keys() == before.keys()
    plain = model(tmp_path / "plain", UNET)
    merge(plain, [adapter], tmp_path / "goal")
    goal = load_all(tmp_path / "goal")
    assert load_all(tmp_path / "out") == goal and goal != load_all(plain)
    assert verify(tmp_path / "out", base, [adapter]).ok
    unmerge(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == before
    merged = tree(tmp_path / "out")
    merge(base, [adapter], in_place=True)
    assert tree(base) == merged
    assert recover(base).state == "clean"
    unmerge(base, in_place=True)
    assert tree(base) == before
    merge(base, [adapter], tmp_path / "cut", shard_bytes=600)
    stem, variant, _ = LAYOUTS[layout]
    dot = f".{variant}" if variant else ""
    names = {path.name for path in (tmp_path / "cut").iterdir() if path.is_file()} - {"config.json"}
    shards = {f"{stem}{dot}-{n:05}-of-00003.safetensors" for n in (1, 2, 3)}
    assert names == {f"{stem}.safetensors.index{dot}.json", *shards}
    assert load_all(tmp_path / "cut") == goal


def test_which_of_several_files(tmp_path: Path) -> None:
    """The weights without a variant are those of the model, and others are left out by name; several variants alone
    are ambiguous."""
    base = model(tmp_path / "base", UNET, "shards")
    (base / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x")
    (base / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")
    report = merge(base, [lora(UNET)], tmp_path / "out")
    others = ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json")
    assert report.left_out == others
    two = model(tmp_path / "two", UNET, "variant")
    (two / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"x")
    with pytest.raises(FileKindError, match=r"diffusion_pytorch_model.fp16 and diffusion_pytorch_model.non_ema"):
        open_checkpoint(two)


def test_a_pipeline(tmp_path: Path) -> None:
    """Every model that the adapter names is merged as it is alone; all else is copied; each is undone by itself."""
    base = pipeline(tmp_path / "base")
    before = tree(base)
    report = merge(base, [both()], tmp_path / "out")
    assert tree(base) == before
    assert {each.name.partition(".")[0] for each in report.tensors} == {"unet", "text_encoder"}
    assert len(report.tensors) == 5 and report.left_out == ("v1-5-pruned.safetensors",) and not report.warnings
    assert [name.split("/")[0] for name in report.record.split(", ")] == ["text_encoder", "unet"]
    for name, shapes, seed in (("unet", UNET, 0), ("text_encoder", TEXT, 9)):
        merge(base / name, [lora(shapes, seed=seed)], tmp_path / name)
        assert load_all(tmp_path / name) == load_all(tmp_path / "out" / name)
    out = tree(tmp_path / "out")
    out = {name: data for name, data in out.items() if "/.lrconvert/" not in name}
    assert {name for name, data in before.items() if out.get(name) != data} == {
        *(f"unet/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)),
        *("text_encoder/model.fp16.safetensors", "v1-5-pruned.safetensors"),
    }
    assert dict(report.files) == {name: len(data) for name, data in out.items()}
    assert verify(tmp_path / "out", base, [both()]).ok
    with pytest.raises(UndoError, match=r"Give .*out/text_encoder or .*out/unet"):
        unmerge(tmp_path / "out")
    for name in ("unet", "text_encoder"):
        unmerge(tmp_path / "out" / name)
        assert load_all(tmp_path / "out" / name) == load_all(base / name)


def test_a_compact_adapter_of_several_models(tmp_path: Path) -> None:
    """One file holds the updates of all: each model takes its own, and the record undoes it."""
    base = pipeline(tmp_path / "base")
    compact = api.convert(both(), "lowrank", bits=8).compact
    merge(base, [compact], tmp_path / "out")
    assert verify(tmp_path / "out", base, [compact]).ok
    for name in ("unet", "text_encoder"):
        before, after = load_all(base / name), load_all(tmp_path / "out" / name)
        assert all(before[tensor] != after[tensor] for tensor in before)
        unmerge(tmp_path / "out" / name, tmp_path / name)
        assert load_all(tmp_path / name) == before


def test_verify_compares_the_other_models(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base")
    merge(base, [both()], tmp_path / "out")
    place = tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)
    assert [each.name for each in verify(tmp_path / "out", base, [both()]).differences] == ["vae: decoder.weight"]


def test_one_model_of_a_pipeline(tmp_path: Path) -> None:
    """By its name, or by its folder: what is for other models is left out, with a word."""
    base = pipeline(tmp_path / "base")
    goal = tmp_path / "goal"
    merge(base / "unet", [lora(UNET)], goal)
    reports = [
        merge(base, [both()], tmp_path / "named", component="unet"),
        merge(base / "unet", [both()], tmp_path / "folder"),
    ]
    for report, folder in zip(reports, (tmp_path / "named" / "unet", tmp_path / "folder"), strict=True):
        assert load_all(folder) == load_all(goal)
        assert any("parts for text_encoder, which are not of this model" in each for each in report.warnings)
    assert load_all(tmp_path / "named" / "text_encoder") == load_all(base / "text_encoder")
    assert verify(tmp_path / "named", base, [both()], component="unet").ok
    # Names without a model's: only the user can say.
    with pytest.raises(BaseError, match=r"which model of the pipeline 'down' is in. Pass component=..., one of t"):
        merge(base, [lora(UNET)], tmp_path / "none")
    merge(base, [lora(UNET)], tmp_path / "said", component="unet")
    assert load_all(tmp_path / "said" / "unet") == load_all(goal)


def test_in_place(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base")
    before = tree(base)
    with pytest.raises(OptionError, match=r"for text_encoder and unet.*Pass component"):
        merge(base, [both()], in_place=True)
    report = merge(base, [both()], in_place=True, component="text_encoder")
    assert report.record.startswith("text_encoder/.lrconvert/merge-1")
    assert {n for n, data in tree(base).items() if before.get(n) not in (None, data)} == {
        "text_encoder/model.fp16.safetensors"
    }
    unmerge(base / "text_encoder", in_place=True)
    after = {name: data for name, data in tree(base).items() if "/.lrconvert/" not in name}
    assert after == before


def test_what_is_refused(tmp_path: Path) -> None:
    """Nothing appears then, also where the first model of several would have been merged."""
    base = pipeline(tmp_path / "base")
    good = both()
    odd = renamed(good, *(n.replace("to_q", "to_z") for n in (p.target.name for p in good.targets)))
    refused: list[tuple[list[Any], dict[str, Any], str]] = [
        ([odd], {}, "E-BASE"),
        ([good], {"component": "unet_2"}, "no model 'unet_2', it has text_encoder, unet, vae"),
        ([good], {"resume": True}, "does not go with a pipeline"),
        ([Scaled(good, 0.0)], {}, "E-NO-EFFECT"),
    ]
    for adapters, options, why in refused:
        with pytest.raises(LrcError, match=why):
            merge(base, adapters, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(LrcError, match="is no pipeline, so it is not replaced"):
        merge(base, [good], tmp_path / "out", overwrite=True)
    with pytest.raises(OptionError, match="for a pipeline"):
        merge(base / "unet", [lora(UNET)], tmp_path / "out", component="unet")
    with pytest.raises(FileKindError, match="is a pipeline of several models"):
        open_checkpoint(base)
    with pytest.raises(UndoError, match="no model of this pipeline has a record"):
        unmerge(base)


def test_square_weights(tmp_path: Path) -> None:
    """LoRAs of attention alone have nothing but square weights, which diffusers stores (out, in)."""
    shapes = {"attn.to_q.weight": (16, 16), "attn.to_k.weight": (16, 16)}
    config = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.42.1"}
    base = model(tmp_path / "base", shapes, config=config)
    adapter = lora(shapes)
    merge(base, [adapter], tmp_path / "out")
    before, after = load_all(base), load_all(tmp_path / "out")
    for pair in adapter.targets:
        update = pair.scale * pair.b.decode().astype(np.float64) @ pair.a.decode()
        name = pair.target.name
        assert np.abs(after[name].decode() - before[name].decode() - update).max() <= 2.0**-13


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base")
    report = merge(base, [both()], tmp_path / "out", dry_run=True)
    assert report.dry_run and len(report.tensors) == 5 and len(list(tmp_path.iterdir())) == 1
    assert report.files == merge(base, [both()], tmp_path / "out").files


def test_a_pipeline_that_is_replaced(tmp_path: Path) -> None:
    """A merge that breaks off leaves what was there."""
    base = pipeline(tmp_path / "base")
    merge(base, [both()], tmp_path / "out", component="unet")
    before = tree(tmp_path / "out")
    with pytest.raises(LrcError, match="E-BASE"):
        odd = renamed(both(), *(p.target.name.replace("to_q", "to_z") for p in both().targets))
        merge(base, [odd], tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == before
    merge(base, [both()], tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out", base, [both()]).ok and len(list(tmp_path.iterdir())) == 2
