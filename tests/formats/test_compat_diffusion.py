"""`check --for diffusers` and `--for comfyui`: small LoRAs of one defect each; what is said of diffusers is what its
own loader does with them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ADAPTERS
from models import save_base
from peers import oracle
from peers.diffusion_cases import CASES, FEED, FILE, Case, named, settings
from safetensors.numpy import save_file

import lrconvert
from lrconvert.core.dtypes import Stored
from lrconvert.formats.compat import base as consumers

BOTH = ("diffusers", "comfyui")
BY_NAME = {case.name: case for case in CASES}
CLASSES = {"sd": "StableDiffusionPipeline", "flux": "FluxPipeline"}


def pipeline(folder: Path, case: Case) -> Path:
    """The headers of the pipeline that the peer loads a case into, as far as the cases name its modules."""
    folder.mkdir()
    known = [module for other in CASES if other.model == case.model for module in other.scales if "7" not in module]
    models: dict[str, dict[str, Stored]] = {}
    for module in (*known, f"{FEED.rpartition('.')[0]}.0.proj"):
        model, _, inside = module.partition(".")
        models.setdefault(model, {})[f"{inside}.weight"] = Stored("F32", np.zeros((2, 2), "<f4"))
    for model, tensors in models.items():
        save_base(folder / model, [tensors], {"_class_name": "UNet2DConditionModel"})
    parts = {model: ["diffusers", "Model"] for model in models}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": CLASSES[case.model], **parts}))
    return folder


@pytest.mark.parametrize("consumer", BOTH)
@pytest.mark.parametrize("name", BY_NAME)
def test_what_is_said(name: str, consumer: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    findings = lrconvert.check(case.write(tmp_path / "x"), (consumer,), base=pipeline(tmp_path / "base", case))
    said = {f"{finding.severity}:{finding.rule}" for finding in findings}
    assert said == {case.says.get(consumer, "right")} - {"right"}, findings
    assert all(finding.fix and finding.source and len(str(finding)) < 600 for finding in findings)
    assert set(lrconvert.check(tmp_path / "x" / FILE, (consumer,))) == set(lrconvert.check(tmp_path / "x", (consumer,)))


@pytest.mark.parametrize("consumer", BOTH)
def test_every_rule_is_seen(consumer: str) -> None:
    """A finding that no case shows is a finding that nobody has seen; the layout is in the test below."""
    text = (Path(consumers.__file__).parent / f"{consumer}.py").read_text()
    rules = set(re.findall(r'(?:refuses|wrong|warns)(?:\.of)?\(\s*"([a-z-]+)"', text))
    seen = {case.says[consumer].partition(":")[2] for case in CASES if consumer in case.says}
    assert rules - seen - {"layout"} == ({"dtype"} if consumer == "comfyui" else set())


@pytest.mark.parametrize("consumer", BOTH)
def test_what_is_no_lora_of_diffusion(consumer: str, tmp_path: Path) -> None:
    lora = lrconvert.load_lora(ADAPTERS / "llama-plain")
    lrconvert.write(lrconvert.convert(lora, "lowrank", target_ratio=4), tmp_path / "x.lrc")
    (finding,) = lrconvert.check(tmp_path / "x.lrc", (consumer,))
    assert (finding.severity, finding.rule) == ("refuses", "layout") and "export" in finding.fix
    (finding,) = lrconvert.check(ADAPTERS / "llama-plain", (consumer,))
    assert (finding.severity, finding.rule) == ("refuses", "layout")


def test_scales_of_eight_bits_are_lost_in_comfyui(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save

    tensors = {name: torch.from_numpy(value).to(torch.float8_e4m3fn) for name, value in named(FEED).items()}
    save({**tensors, f"{FEED}.lora_A.scale_weight": torch.ones(())}, tmp_path / FILE)
    said = {f"{f.severity}:{f.rule}" for f in lrconvert.check(tmp_path / FILE, ("comfyui",))}
    assert said == {"wrong:dtype"}


@pytest.mark.slow
def test_diffusers_does_what_is_said(tmp_path: Path) -> None:
    """Refuses, loads something else, or loads the update that the file means: its own loader, case by case."""
    oracle.needed("diffusers")
    folders = [case.write(tmp_path / str(number)) for number, case in enumerate(CASES)]
    outs = [tmp_path / f"{number}.npz" for number, _ in enumerate(CASES)]
    jobs = [
        (folder, {"model": case.model, "file": FILE, "out": str(out)})
        for case, folder, out in zip(CASES, folders, outs, strict=True)
    ]
    odd = []
    for case, out, answer in zip(CASES, outs, oracle.ask("diffusers", jobs), strict=True):
        does = "refuses" if answer["outcome"] == "refuses" else _outcome(case, dict(np.load(out)))
        says = case.says.get("diffusers", "right").partition(":")[0]
        if does != says:
            odd.append(f"{case.name}: check says {says}, diffusers {does} {answer.get('why', '')}")
    assert not odd, odd


def _outcome(case: Case, deltas: dict[str, np.ndarray]) -> str:
    """ "right" if every module that the file means got its update, and nothing else of it was left."""
    tensors = case.build()  # in the order of the modules
    theirs = {name.replace("text_model.", ""): delta for name, delta in deltas.items()}
    wanted = {}
    halves = [(n, n.replace("lora_down", "lora_up").replace("lora_A", "lora_B")) for n in tensors]
    products = [tensors[up] @ tensors[down] for down, up in halves if up != down and up in tensors]
    for (module, scale), product in zip(case.scales.items(), products, strict=False):
        wanted[module.replace("text_model.", "")] = scale * product if np.isfinite(scale) else np.inf * np.ones((1, 1))
    whole = all(name.endswith((".weight", ".alpha", ".extra")) for name in tensors)
    same = whole and theirs.keys() == wanted.keys()
    same = same and all(d.shape == theirs[m].shape and np.allclose(theirs[m], d, atol=1e-4) for m, d in wanted.items())
    return "right" if same else "wrong"


@pytest.mark.parametrize("case", ("diffusers", "kohya, text encoder"))
def test_each_program_takes_its_own_export(case: str, tmp_path: Path) -> None:
    lora = lrconvert.load_lora(BY_NAME[case].write(tmp_path / "x"))
    for consumer in BOTH:
        lrconvert.export(lora, tmp_path / consumer, to=consumer)
        assert not lrconvert.check(tmp_path / consumer, (consumer,))


def test_our_exports_are_found_right(tmp_path: Path) -> None:
    """What is exported for diffusers has no finding there, DoRA and own ranks included."""
    save_file({**named(FEED, lora_magnitude_vector=np.ones(64))}, tmp_path / FILE)
    lora = lrconvert.load_lora(tmp_path / FILE)
    for number, options in enumerate(({}, {"keep_ranks": True})):
        out = tmp_path / f"out{number}"
        lrconvert.export(lora, out, to="diffusers", **options)
        assert not lrconvert.check(out, ("diffusers",))
        assert lrconvert.load_lora(out).extras == lora.extras
    assert settings(FEED)["unet.r"] == 2
