"""DoRA as LyCORIS stores it (``.dora_scale``), of outputs and of inputs, in layers of every kind: one stated formula
when it is merged, attached, baked, written to a file and exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import load_all, save_base, tree
from safetensors.numpy import load_file, save_file

from lrconvert import api
from lrconvert.api import merge, unmerge, verify
from lrconvert.core.dtypes import F64, Array, Stored, round_to
from lrconvert.core.errors import LrcError
from lrconvert.formats.lrc import file
from lrconvert.lora.adapter import LoraAdapter

RANK, ALPHA = 3, 6.0
SHAPES = {
    "linear": (24, 70),
    "square": (24, 24),
    "conv1d": (12, 5, 3),
    "conv2d": (12, 5, 3, 2),
    "conv3d": (12, 5, 1, 2, 2),
    "conv3d of one place": (12, 5, 1, 1, 1),
}
BOTH_WAYS = [(kind, axis) for kind in SHAPES for axis in ("outputs", "inputs")]


@dataclass(frozen=True)
class Layer:
    """One layer and its adapter as a file of kohya's layout has them."""

    weight: Array
    tensors: dict[str, Array]
    base: Path
    path: Path

    def load(self) -> LoraAdapter:
        lora = api.load_lora(self.path, base=self.base)
        assert isinstance(lora, LoraAdapter)
        return lora

    @property
    def goal(self) -> F64:
        """magnitude / ||W + s B A|| (W + s B A), norms along all axes but that of the magnitude."""
        down, up, magnitude = (self.tensors[f"lora_unet_lay_er.{n}"].astype(np.float64) for n in PARTS)
        v = self.weight + ALPHA / RANK * (up.reshape(len(up), -1) @ down.reshape(RANK, -1)).reshape(self.weight.shape)
        axes = tuple(axis for axis in range(v.ndim) if magnitude.shape[axis] == 1)
        return magnitude / np.sqrt(np.square(v).sum(axis=axes, keepdims=True)) * v


PARTS = ("lora_down.weight", "lora_up.weight", "dora_scale")


def make(folder: Path, kind: str, axis: str, dtype: str = "F32") -> Layer:
    shape, rng = SHAPES[kind], np.random.default_rng(5)
    stored = Stored(dtype, round_to(rng.standard_normal(shape), dtype))
    base = save_base(
        folder / "base", [{"lay.er.weight": stored, "lay.er.bias": Stored("F32", np.ones(shape[0], "<f4"))}]
    )
    ones = (1,) * len(shape[2:])
    count = (shape[0], 1, *ones) if axis == "outputs" else (1, shape[1], *ones)
    tensors = {
        "lora_unet_lay_er.lora_down.weight": rng.standard_normal((RANK, *shape[1:])),
        "lora_unet_lay_er.lora_up.weight": rng.standard_normal((shape[0], RANK, *ones)) * 0.3,
        "lora_unet_lay_er.alpha": np.array(ALPHA),
        "lora_unet_lay_er.dora_scale": 1 + rng.random(count),
    }
    tensors = {name: values.astype(np.float32) for name, values in tensors.items()}
    save_file(tensors, folder / "dora.safetensors")
    return Layer(stored.decode().reshape(shape), tensors, base, folder / "dora.safetensors")


@pytest.mark.parametrize("dtype", ("F32", "BF16"))
@pytest.mark.parametrize(("kind", "axis"), BOTH_WAYS)
def test_merged_as_stated(kind: str, axis: str, dtype: str, tmp_path: Path) -> None:
    """The formula in float64 to the resolution of the base's dtype; verified, and undone to the last bit."""
    layer = make(tmp_path, kind, axis, dtype)
    merge(layer.base, [layer.load()], tmp_path / "out")
    merged = load_all(tmp_path / "out")["lay.er.weight"].decode().astype(np.float64).reshape(layer.weight.shape)
    step = {"F32": 2.0**-24, "BF16": 2.0**-8}[dtype]
    assert (np.abs(merged - layer.goal) <= step * np.abs(layer.goal) * 1.000001).all()
    assert verify(tmp_path / "out", layer.base, [layer.load()]).ok
    unmerge(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(layer.base)


@pytest.mark.parametrize("kind", ("linear", "conv2d"))
def test_the_order_of_operations_of_inputs(kind: str, tmp_path: Path) -> None:
    """formats/merge-v1.md, one operation after the other."""
    layer = make(tmp_path, kind, "inputs")
    merge(layer.base, [layer.load()], tmp_path / "out")
    down, up, magnitude = (layer.tensors[f"lora_unet_lay_er.{n}"].astype(np.float64) for n in PARTS)
    a, b = down.reshape(RANK, -1), up.reshape(-1, RANK)
    total = b[:, :1] * a[0]
    for j in range(1, RANK):
        total = total + b[:, j : j + 1] * a[j]
    v = layer.weight.reshape(len(b), -1) + total * (ALPHA / RANK)
    lanes = np.zeros((64, v.shape[1]))
    for o, row in enumerate(v):
        lanes[o % 64] += row * row
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    squares = lanes[0].reshape(magnitude.size, -1)
    norms = squares[:, 0]
    for place in range(1, squares.shape[1]):
        norms = norms + squares[:, place]
    factor = np.repeat(magnitude.reshape(-1) / np.sqrt(norms), squares.shape[1])
    merged = load_all(tmp_path / "out")["lay.er.weight"].array.reshape(v.shape)
    assert np.array_equal(round_to(v * factor, "F32"), merged)


def module_of(layer: Layer) -> Any:
    """A torch model of this one layer, ``lay.er``."""
    torch = pytest.importorskip("torch")
    shape = layer.weight.shape
    kinds = {2: lambda: torch.nn.Linear(shape[1], shape[0])}
    kinds |= {
        2 + n: lambda kind=kind: kind(shape[1], shape[0], shape[2:], padding=1, stride=2)
        for n, kind in enumerate((torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d), 1)
    }
    inner = torch.nn.Module()
    inner.er = kinds[len(shape)]()
    inner.forward = inner.er.forward
    model = torch.nn.Sequential()
    model.add_module("lay", inner)
    with torch.no_grad():
        inner.er.weight.copy_(torch.from_numpy(layer.weight.copy()))
        inner.er.bias.fill_(1)
    return model


@pytest.mark.parametrize(("kind", "axis"), BOTH_WAYS)
def test_attached_as_if_merged(kind: str, axis: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    layer = make(tmp_path, kind, axis)
    model, goal = module_of(layer), module_of(layer)
    with torch.no_grad():
        goal.lay.er.weight.copy_(torch.from_numpy(layer.goal))
    x = torch.randn(2, layer.weight.shape[1], *(7,) * (layer.weight.ndim - 2))
    before = model(x)
    inner = model.lay
    api.attach(model, layer.load())
    inner.forward = lambda values: inner.er(values)
    assert torch.allclose(model(x), goal(x), atol=2e-4)
    api.detach(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", ("linear", "conv3d"))
@pytest.mark.parametrize("axis", ("outputs", "inputs"))
def test_baked_at_full_rank_is_all_of_it(kind: str, axis: str, tmp_path: Path) -> None:
    layer = make(tmp_path, kind, axis)
    made = api.convert(layer.load(), "lowrank", bits=15, base=layer.base, bake_dora=64)
    assert "hold 1.0000 of the whole" in made.warnings[-1] and not made.compact.extras
    merge(layer.base, [made.compact], tmp_path / "out")
    merged = load_all(tmp_path / "out")["lay.er.weight"].decode().reshape(layer.weight.shape)
    assert np.abs(merged - layer.goal).max() < 2e-3 * np.abs(layer.goal).max()


@pytest.mark.parametrize(("kind", "axis"), BOTH_WAYS)
def test_carried_by_files_and_exports(kind: str, axis: str, tmp_path: Path) -> None:
    """A compact file keeps the magnitudes bit by bit, and kohya's layout gets them back in their own shape."""
    layer = make(tmp_path, kind, axis)
    lora = layer.load()
    made = api.convert(lora, "lowrank", rank=RANK, bits=15)
    assert any("DoRA" in warning for warning in made.warnings)
    file.write(made.compact, tmp_path / "x.lrc")
    back = api.load(tmp_path / "x.lrc")
    assert back.extras == lora.extras and back.targets == lora.shapes()
    for number, adapter in enumerate((lora, back)):
        moved = api.load_lora(layer.path) if adapter is lora else adapter
        api.export(_on_unet(moved), tmp_path / f"out{number}", to="kohya")
        (out,) = (tmp_path / f"out{number}").glob("*.safetensors")
        (name,) = (name for name in load_file(out) if name.endswith(".dora_scale"))
        assert np.array_equal(load_file(out)[name], layer.tensors["lora_unet_lay_er.dora_scale"])


def _on_unet(adapter: Any) -> Any:
    """The adapter on a module that diffusion models have."""
    from lrconvert.formats.base_class import renamed_by

    return renamed_by(adapter, lambda name: "unet.conv_in.weight")


def test_shapes_that_say_nothing_are_refused(tmp_path: Path) -> None:
    layer = make(tmp_path, "square", "inputs")
    name = "lora_unet_lay_er.dora_scale"
    for shape, text in {(24,): "nothing says whose", (2, 12): "24 outputs", (1, 25): "24 outputs"}.items():
        save_file({**layer.tensors, name: np.ones(shape, np.float32)}, layer.path)
        with pytest.raises(LrcError, match=text) as caught:
            layer.load()
        assert caught.value.code == "E-PAIR" and caught.value.fix


@pytest.mark.parametrize(("kind", "axis"), [("linear", "outputs"), ("linear", "inputs")])
def test_flat_magnitudes_are_told_by_their_number(kind: str, axis: str, tmp_path: Path) -> None:
    layer = make(tmp_path, kind, axis)
    whole = layer.load()
    name = "lora_unet_lay_er.dora_scale"
    save_file({**layer.tensors, name: layer.tensors[name].reshape(-1)}, layer.path)
    assert layer.load().extras == whole.extras


def test_programs_that_know_no_dora_of_inputs_are_not_given_one(tmp_path: Path) -> None:
    lora = make(tmp_path, "linear", "inputs").load()
    for layout in ("peft-lora", "diffusers", "raw"):
        with pytest.raises(LrcError, match="bake_dora") as caught:
            api.export(_on_unet(lora), tmp_path / layout, to=layout)
        assert caught.value.code == "E-EXPORT"


def test_negative_magnitudes_are_named(tmp_path: Path) -> None:
    """The first releases of LyCORIS stored means of the weights, not norms."""
    layer = make(tmp_path, "linear", "inputs")
    name = "lora_unet_lay_er.dora_scale"
    assert not any("below zero" in warning for warning in layer.load().warnings)
    save_file({**layer.tensors, name: -layer.tensors[name]}, layer.path)
    assert any("below zero" in warning for warning in layer.load().warnings)
