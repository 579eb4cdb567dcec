"""Families of diffusion models against diffusers itself: its models have the modules of our tables, its converters make
of a trainer's file what our readers do, and its loaders take what our exporters write."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import dense
from peers import oracle
from safetensors.numpy import save_file

from lrconvert import api
from lrconvert.core.dtypes import Stored
from lrconvert.formats.families.base import DIFFUSERS, ORIGINAL, families
from lrconvert.formats.families.shared.spelling import Spelling
from lrconvert.formats.families.shared.table import filled
from lrconvert.lora.adapter import LoraAdapter, LoraTarget, Target, View
from lrconvert.testing import diffusion

pytestmark = pytest.mark.medium
KOHYA, COMFYUI = Spelling("lora_unet_", "lora_down", True), Spelling("diffusion_model.", "lora_A", False)
PLAIN_KOHYA = Spelling("diffusion_model.", "lora_down", True)
PREFIXED = Spelling("transformer.", "lora_A", False)
# Families, spellings and schemes that diffusers converts, the width that it asks for, and the modules that it knows.
WAN = r"blocks\.\d+\.(self_attn|cross_attn|ffn)\.[^_]+(_img)?"
CONVERTED: dict[str, tuple[str, Spelling, str, int, str]] = {
    "kohya flux1": ("flux1", KOHYA, ORIGINAL, 3072, ".*(blocks|_in).*"),
    "comfyui flux1": ("flux1", PLAIN_KOHYA, ORIGINAL, 3072, "(double|single)_blocks.*"),
    "xlabs flux1": ("flux1", Spelling("", "down", False), "xlabs", 4, ".*"),
    "kohya flux2": ("flux2", KOHYA, ORIGINAL, 4, ".*(blocks|img_in|txt_in|time_in|final_layer.linear).*"),
    "comfyui flux2": ("flux2", COMFYUI, ORIGINAL, 4, "(?!final_layer.adaLN).*"),
    "musubi wan": ("wan", KOHYA, ORIGINAL, 4, WAN),
    "comfyui wan": ("wan", COMFYUI, ORIGINAL, 4, rf"{WAN}|head.head|(text|time)_embedding.*|time_projection.1"),
    "down-up wan": ("wan", PLAIN_KOHYA, ORIGINAL, 4, WAN),
    "official hunyuan_video": ("hunyuan_video", COMFYUI, ORIGINAL, 3072, "(double|single)_blocks.*"),
    "prefixed hunyuan_video": ("hunyuan_video", PREFIXED, ORIGINAL, 3072, "(double|single)_blocks.*"),
    "musubi qwen_image": ("qwen_image", KOHYA, ORIGINAL, 4, ".*"),
    "down-up qwen_image": ("qwen_image", PLAIN_KOHYA, ORIGINAL, 4, ".*"),
    "comfyui z_image": ("z_image", PLAIN_KOHYA, DIFFUSERS, 4, "(layers|noise_refiner|context_refiner).*"),
    "kohya z_image": ("z_image", KOHYA, ORIGINAL, 4, r"layers\..*"),
    "comfyui lumina2": ("lumina2", COMFYUI, ORIGINAL, 2304, r"layers\..*"),
    "comfyui ltx_video": ("ltx_video", COMFYUI, DIFFUSERS, 4, "transformer_blocks.*"),
    "comfyui ltx2": ("ltx2", COMFYUI, ORIGINAL, 4, ".*"),
    "comfyui hidream": ("hidream", COMFYUI, ORIGINAL, 4, ".*"),
}
# Whole weights of the model's own code, for families whose LoRAs diffusers does not convert, or only in part.
CHECKPOINTS = {
    "sd3": "joint_blocks.*|final_layer.*",
    "z_image": ".*",
    "ltx_video": ".*",
    "hunyuan_video": "(?!final_layer.adaLN|single_blocks.*linear1).*",
    "wan": "(?!.*norm|img_emb.proj.[04]).*",
}
# Layouts in which diffusers loads a family, and the modules that it loads there.
LOADED = {
    **{name: {"diffusers": ".*"} for name in families()},
    "flux1": {"diffusers": ".*", "onetrainer": r"(single_)?transformer_blocks\.\d\.attn.*"},
    "flux2": {"diffusers": ".*", "comfyui": "(?!norm_out).*", "kohya": ".*transformer_blocks.*"},
    "qwen_image": {"diffusers": ".*", "comfyui": ".*", "kohya": ".*"},
    "wan": {"diffusers": ".*", "comfyui": r"blocks\..*|proj_out", "kohya": r"blocks\..*"},
    "hidream": {"diffusers": ".*", "comfyui": ".*"},
    "ltx_video": {"diffusers": ".*", "comfyui": "transformer_blocks.*"},
    "ltx2": {"diffusers": ".*", "comfyui": ".*"},
}


def ask(jobs: dict[str, dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """What diffusers answers, in one process: {case: answer}."""
    oracle.needed("diffusers")
    asked = [(tmp_path, options) for options in jobs.values()]
    answers = dict(zip(jobs, oracle.ask("diffusers", asked, tmp_path), strict=True))
    refused = {case: answer["why"] for case, answer in answers.items() if answer["outcome"] != "loads"}
    assert not refused, refused
    return answers


def config_of(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / f"base {name}"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"_class_name": families()[name].classes[0], "_diffusers_version": "0"})
    )
    return folder


def same(case: str, theirs: dict[str, np.ndarray], ours: dict[str, np.ndarray]) -> None:
    theirs = {name.removeprefix("transformer."): update for name, update in theirs.items()}
    assert sorted(theirs) == sorted(ours), case
    for name, update in ours.items():
        bound = 1e-5 * np.abs(update).max()
        assert np.abs(theirs[name].reshape(update.shape) - update).max() <= bound, (case, name)


def read(path: Path, base: Path) -> dict[str, LoraTarget]:
    return {pair.target.name.removesuffix(".weight"): pair for pair in api.load_lora(path, base=base).targets}


@dataclass(frozen=True)
class Asked:
    """What diffusers answered to all that needs no model: shapes of modules, and by case its updates and ours."""

    shapes: dict[str, dict[str, list[int]]]
    converted: dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]
    checkpoints: dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    oracle.needed("diffusers")
    folder = tmp_path_factory.mktemp("asked")
    jobs: dict[str, dict[str, Any]] = {name: {"family": name, "what": "shapes"} for name in families()}
    ours = {}
    for case, (name, spelling, scheme, width, known) in CONVERTED.items():
        pairs = diffusion.pairs(families()[name], scheme, rank=1 + (width < 9), alpha=3.0, width=width, block=0)
        path = folder / f"{case}.safetensors"
        save_file(dict(diffusion.tensors([p for p in pairs if re.fullmatch(known, p.module)], spelling)), path)
        ours[case] = {name: times_probe(pair) for name, pair in read(path, config_of(folder, name)).items()}
        jobs[case] = {"family": name, "what": "convert", "file": str(path), "out": str(folder / f"{case}.npz")}
    for name, known in CHECKPOINTS.items():
        every = diffusion.pairs(families()[name], ORIGINAL, rank=1, alpha=1.0, block=0)
        pairs = [pair for pair in every if re.fullmatch(known, pair.module)]
        path, case = folder / f"{name}.safetensors", f"checkpoint {name}"
        save_file(dict(diffusion.tensors(pairs, KOHYA)), path)
        ours[case] = {name: dense(pair) for name, pair in read(path, config_of(folder, name)).items()}
        save_file({f"{pair.module}.weight": pair.b @ pair.a for pair in pairs}, folder / f"{case}.safetensors")
        jobs[case] = {"family": name, "what": "checkpoint", "file": str(folder / f"{case}.safetensors"),
                      "out": str(folder / f"{case}.npz")}  # fmt: skip
    answers = ask(jobs, folder)
    both = {case: (dict(np.load(folder / f"{case}.npz")), mine) for case, mine in ours.items()}
    return Asked(
        {name: answers[name]["shapes"] for name in families()},
        {case: both[case] for case in CONVERTED},
        {name: both[f"checkpoint {name}"] for name in CHECKPOINTS},
    )


def times_probe(pair: LoraTarget) -> np.ndarray:
    a, b = pair.A.astype(np.float64), pair.B.astype(np.float64)
    vectors = np.random.default_rng(a.shape[1]).standard_normal((a.shape[1], 3))  # as diffusion_transformers.probe
    return np.asarray(pair.scale * (b @ (a @ vectors)))


def test_diffusers_models_have_the_modules_of_our_tables(asked: Asked) -> None:
    """Every layer of each model is in its family's table, with a shape that the line has, and in the original code."""
    for name, family in families().items():
        for module, (out, *inner) in asked.shapes[name].items():
            assert family.schemes[DIFFUSERS].find(module, False), (name, module)
            if len(inner) == 1:
                assert family.schemes[ORIGINAL].of_part(module, out, inner[0]), (name, module, out, inner)


@pytest.mark.parametrize("case", CONVERTED)
def test_diffusers_converts_as_we_read(case: str, asked: Asked) -> None:
    theirs, mine = asked.converted[case]
    assert len(mine) > 2
    same(case, theirs, mine)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_diffusers_converts_whole_weights_to_the_same_names(name: str, asked: Asked) -> None:
    """An update in the place of a weight, converted with its checkpoint, is that of the module that we name."""
    theirs, mine = asked.checkpoints[name]
    same(name, {key.removesuffix(".weight"): value for key, value in theirs.items()}, mine)


def test_diffusers_loads_what_we_write(asked: Asked, tmp_path: Path) -> None:
    """On a model of each class: every layer has the update that was exported, in every layout that diffusers reads."""
    jobs, ours = {}, {}
    for name, layouts in LOADED.items():
        for layout, known in layouts.items():
            case = f"{name} {layout}"
            chosen = {m: shape for m, shape in asked.shapes[name].items() if re.fullmatch(known, m)}
            lora = adapter(chosen, 1.5 if layout == "kohya" else 1.0)
            ours[case] = {pair.target.name.removesuffix(".weight"): dense(pair) for pair in lora.targets}
            api.export(lora, tmp_path / case, to=layout, base=config_of(tmp_path, name))
            (file,) = (tmp_path / case).glob("*.safetensors")
            out = str(tmp_path / f"{case}.npz")
            jobs[case] = {"family": name, "what": "load", "file": str(file), "out": out}
    ask(jobs, tmp_path)
    for case, mine in ours.items():
        same(case, dict(np.load(tmp_path / f"{case}.npz")), mine)


def adapter(shapes: dict[str, list[int]], scale: float) -> LoraAdapter:
    """A random update of each module; of convolutions, too."""
    targets = []
    for n, (module, (out, *inner)) in enumerate(sorted(shapes.items())):
        rng = np.random.default_rng(n)
        width = int(np.prod(inner))
        a, b = (Stored("F32", rng.standard_normal(s).astype(np.float32)) for s in ((2, width), (out, 2)))
        view = View(f"conv:{'x'.join(map(str, inner[1:]))}:1") if len(inner) > 1 else View()
        targets.append(LoraTarget(Target(f"{module}.weight", (out, *inner), view), a, b, scale))
    return LoraAdapter(tuple(sorted(targets, key=lambda pair: pair.target)))


def test_no_test_is_of_an_unknown_module() -> None:
    for name, _, scheme, _, known in CONVERTED.values():
        lines = families()[name].schemes[scheme].lines
        assert any(re.fullmatch(known, filled(line.name, ("0",) * line.name.count("#"))) for line in lines)
