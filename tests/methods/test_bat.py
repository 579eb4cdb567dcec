"""Bat, whose updates depend on the base: the best fit, the stated merge, PEFT's own model, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import ADAPTERS, BASES, dense, random_lora
from models import extra, load_all, random_base, save_base, tree, updates_on
from safetensors.torch import load_file
from test_bone import moment, statistics
from test_export import load_in_peft, logits
from test_peft_miss import as_bone, saved

from lrconvert import api
from lrconvert.api import merge, unmerge, verify
from lrconvert.core import errors
from lrconvert.core.dtypes import Stored, round_to
from lrconvert.formats.readers import base as readers
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.live import attach
from lrconvert.lora.adapter import TRANSPOSED, CompactAdapter, LoraAdapter, Target, View
from lrconvert.lora.base_weights import BaseWeights
from lrconvert.merge import Scaled, compute
from lrconvert.merge.arithmetic import base_dependent
from lrconvert.methods import base as methods
from lrconvert.methods.bone import bat_fit
from lrconvert.methods.bone.form import complete

SHAPES = ((24, 16), (16, 40), (32, 32))
LLAMA = BASES / "tiny-llama"


def made(tmp_path: Path, lora: LoraAdapter, **options: Any) -> tuple[Path, CompactAdapter]:
    base = random_base(tmp_path / "base", lora)
    return base, api.convert(lora, "bone", variant="bat", base=base, **options).compact


def by_blocks(block: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """``(W_ij + I) D_i``, block by block."""
    rank, out = block.shape
    update = np.zeros_like(weight, np.float64)
    for i in range(out // rank):
        d = block[:, i * rank : (i + 1) * rank].T.astype(np.float64)
        for j in range(weight.shape[1] // rank):
            at = np.s_[i * rank : (i + 1) * rank, j * rank : (j + 1) * rank]
            update[at] = (weight[at].astype(np.float64) + np.eye(rank)) @ d
    return update


# --- the fit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "matrix", "sketch"])
@pytest.mark.parametrize(("rank", "spread"), [(2, 0.02), (8, 0.02), (4, 0.7)])
def test_no_block_is_nearer(kind: str, rank: int, spread: float, tmp_path: Path) -> None:
    """Against a dense least-squares solution of all r * r unknowns of each block, also where W is large."""
    lora = random_lora(((16, 24),), rank=3)
    pair = lora.targets[0]
    base = random_base(tmp_path / "base", lora)
    metric = None if kind == "plain" else moment(24, kind)
    weight = load_all(base)[pair.target.name].decode() * (spread / 0.02)

    class Scaled(BaseWeights):
        def rows(self, target: Target, start: int, stop: int) -> np.ndarray:
            return weight[start:stop]

    with open_checkpoint(base) as checkpoint:
        config = complete(lora.shapes(), [rank], bits=16, bat=True)
        block, _ = bat_fit.fit_block(pair, config, 0, metric, Scaled(lora, checkpoint))
    root = np.eye(24) if metric is None else np.linalg.cholesky(metric.times(np.eye(24)))
    delta = dense(pair)
    error = (by_blocks(block, weight) - delta) @ root
    best = 0.0
    for i in range(16 // rank):
        rows = slice(i * rank, (i + 1) * rank)
        columns = []
        for unit in np.eye(rank * rank):
            one = np.zeros((rank, 16))
            one[:, rows] = unit.reshape(rank, rank).T
            columns.append((by_blocks(one, weight)[rows] @ root).reshape(-1))
        _, _, _, _ = system = np.linalg.lstsq(np.array(columns).T, (delta[rows] @ root).reshape(-1), rcond=None)
        best += float(np.sum((np.array(columns).T @ system[0] - (delta[rows] @ root).reshape(-1)) ** 2))
    assert np.sum(error**2) <= best * (1 + 1e-7) + 1e-12


@pytest.mark.parametrize("kind", ["matrix", "transposed", "rows", "expert"])
def test_every_view_is_merged_measured_and_attached_alike(kind: str, tmp_path: Path) -> None:
    lora = random_lora(((16, 24),), rank=3, view=TRANSPOSED if kind == "transposed" else View("matrix"))
    pair = lora.targets[0]
    view, shape = {
        "matrix": ("matrix", (16, 24)),
        "transposed": ("transposed", (24, 16)),
        "rows": ("rows:8:24", (32, 24)),
        "expert": ("expert:1", (3, 16, 24)),
    }[kind]
    lora = replace(lora, targets=(replace(pair, target=Target(pair.target.name, shape, View(view))),))
    base, compact = made(tmp_path, lora, rank=4)
    before = load_all(base)[pair.target.name].decode()
    delta = updates_on(compact, base)[pair.target.name]
    inside = {
        "matrix": before,
        "transposed": before.T,
        "rows": before[8:24],
        "expert": before[1] if kind == "expert" else before,
    }[kind]
    values = methods.values(methods.get("bone"), compact)
    block = methods.get("bone").block(compact.config, compact.targets, values, 0)
    assert np.allclose(delta, by_blocks(block, inside), atol=1e-12)

    fidelity = api.compare(lora, [compact], base=base)[0]
    assert np.isclose(fidelity.captured, 1 - np.sum((delta - dense(pair)) ** 2) / np.sum(dense(pair) ** 2))
    merge(base, [compact], tmp_path / "out")
    after = load_all(tmp_path / "out")[pair.target.name].decode().astype(np.float64)
    goal = before.astype(np.float64)
    place = {"matrix": goal, "transposed": goal.T, "rows": goal[8:24], "expert": goal[1] if kind == "expert" else goal}[
        kind
    ]
    place += delta
    assert np.array_equal(after.astype(np.float32), goal.astype(np.float32))
    assert verify(tmp_path / "out", base, [compact]).ok
    assert unmerge(tmp_path / "out", tmp_path / "back").verified and tree(tmp_path / "back") == tree(base)


def test_statistics_are_the_metric(tmp_path: Path) -> None:
    lora = random_lora(SHAPES, rank=6)
    base = random_base(tmp_path / "base", lora)
    moments = statistics(lora)
    blind, seeing = (api.convert(lora, "bone", variant="bat", rank=4, base=base, statistics=s) for s in (None, moments))
    one, two = (api.compare(lora, [c.compact], base=base, statistics=moments)[0] for c in (blind, seeing))
    assert two.fit_captured > one.fit_captured and two.captured < one.captured
    assert seeing.fidelity == two


@pytest.mark.parametrize("bits", ["4", "2", "1"])
@pytest.mark.parametrize("seeing", [False, True])
def test_few_bits_lose_as_little_as_those_of_a_bone(bits: str, seeing: bool, tmp_path: Path) -> None:
    """Also on a base whose blocks are far from small beside I, where rounding every number alone loses everything."""
    lora = random_lora(((64, 64), (32, 64)), rank=6)
    rng = np.random.default_rng(0)
    shift = rng.standard_normal((64, 1)) * rng.standard_normal((1, 64))  # some directions are large
    weights = {
        p.target.name: (shift[: p.target.shape[0]] + 0.3 * rng.standard_normal(p.target.shape)) for p in lora.targets
    }
    stored = {name: Stored("F32", value.astype(np.float32)) for name, value in weights.items()}
    base = save_base(tmp_path / "base", [stored])
    options: dict[str, Any] = {"rank": 16, "bits": bits, "statistics": statistics(lora) if seeing else None}
    kept = []
    for variant in ("bone", "bat"):
        fidelity = api.convert(lora, "bone", variant=variant, base=base, **options).fidelity
        assert fidelity is not None
        kept.append(fidelity.captured if fidelity.fit_captured is None else fidelity.fit_captured)
    assert 0 < 0.4 * kept[0] < kept[1]


def test_low_bits_and_budgets(tmp_path: Path) -> None:
    lora = random_lora(SHAPES, rank=6)
    base = random_base(tmp_path / "base", lora)
    captured = []
    for size in (2000, 2600, 4000):
        done = api.convert(lora, "bone", variant="bat", base=base, target_size=size)
        assert done.sizes.adapter <= size and done.compact.config.variant == "bat"
        for target, rank in zip(done.compact.targets, done.compact.config.ranks, strict=True):
            assert not rank or (target.out_features % rank == 0 and target.in_features % rank == 0)
        captured.append(done.fidelity.captured)
    assert captured == sorted(captured) and captured[-1] > 0.2


# --- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_merges_are_the_stated_formula(dtype: str, tmp_path: Path) -> None:
    """float64 operations in the order of formats/merge-v1.md and the method's page, one by one."""
    lora = random_lora(SHAPES, rank=6)
    base = random_base(tmp_path / "base", lora, dtype)
    compact = api.convert(lora, "bone", variant="bat", bits="4", rank=8, base=base).compact
    merge(base, [Scaled(compact, 0.3)], tmp_path / "out")
    before, after = load_all(base), load_all(tmp_path / "out")
    values = methods.values(methods.get("bone"), compact)
    for which, target in enumerate(compact.targets):
        d = methods.get("bone").block(compact.config, compact.targets, values, which).astype(np.float64)
        w = before[target.name].decode().astype(np.float64)
        goal = np.empty_like(w)
        for o in range(w.shape[0]):
            for i in range(w.shape[1]):
                j, c = i // 8 * 8, i % 8
                total = d[c, o]
                for k in range(8):
                    total = total + w[o, j + k] * d[c, o // 8 * 8 + k]
                goal[o, i] = total * 0.3 + w[o, i]
        assert np.array_equal(round_to(goal, dtype), after[target.name].array)
    assert verify(tmp_path / "out", base, [Scaled(compact, 0.3)]).ok
    assert not verify(tmp_path / "out", base, [compact]).ok
    assert unmerge(tmp_path / "out", tmp_path / "back").verified and tree(tmp_path / "back") == tree(base)


def test_blocks_of_rows_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a tensor is cut for reading, also inside a block of inputs, the bytes are the same."""
    for view in (View("matrix"), TRANSPOSED):
        lora = random_lora(((32, 48),), rank=6, view=view)
        folder = tmp_path / view.text
        base, compact = made(folder, lora, rank=8)
        merge(base, [compact], folder / "one")
        with monkeypatch.context() as patch:
            patch.setattr(compute, "rows_per_block", lambda cols: 5)
            patch.setattr(base_dependent, "_TILE", 100)
            merge(base, [compact], folder / "two")
        assert tree(folder / "one") == tree(folder / "two")


def test_another_base_is_refused(tmp_path: Path) -> None:
    lora = random_lora(SHAPES)
    base, compact = made(tmp_path, lora, rank=4)
    other = random_base(tmp_path / "other", lora, seed=1)
    for refused in (
        lambda: merge(other, [compact], tmp_path / "out"),
        lambda: api.compare(lora, [compact], base=other),
    ):
        with pytest.raises(errors.FingerprintError, match="other contents"):
            refused()
    api.write(compact, tmp_path / "x.lrc")
    assert [f.code for f in api.validate(tmp_path / "x.lrc", base=other).findings] == ["E-FPR"]
    merge(base, [lora], tmp_path / "merged")  # what a plain update may be merged into, since it came from the base
    with pytest.raises(errors.FingerprintError):
        merge(tmp_path / "merged", [compact], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_else_on_the_same_rows(tmp_path: Path) -> None:
    lora = random_lora(SHAPES)
    base, compact = made(tmp_path, lora, rank=4)
    with pytest.raises(errors.PlacementError, match="two adapters"):
        merge(base, [compact, lora], tmp_path / "out")
    first, second = (replace(lora, targets=lora.targets[at]) for at in (slice(0, 1), slice(1, None)))
    alone = api.convert(first, "bone", variant="bat", rank=4, base=base).compact
    merge(base, [alone, second], tmp_path / "out")
    assert verify(tmp_path / "out", base, [alone, second]).ok


# --- live models ----------------------------------------------------------------------------------------------------


def llama() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32).eval()


def on_llama(**options: Any) -> CompactAdapter:
    lora = api.load_lora(ADAPTERS / "llama-plain")
    return api.convert(lora, "bone", variant="bat", base=LLAMA, **options).compact


def test_attached_it_is_the_merged_model(tmp_path: Path) -> None:
    compact = on_llama(rank=4)
    merge(LLAMA, [compact], tmp_path / "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    model = llama()
    before = logits(model)
    api.attach(model, compact)
    assert np.abs(logits(model) - logits(merged)).max() <= 2e-3 * np.abs(logits(merged)).max()  # bf16 weights
    assert np.abs(logits(model) - before).max() > 1e-3
    api.detach(model)
    assert np.array_equal(logits(model), before)


LAYERS = {
    "linear": (lambda: torch.nn.Linear(24, 16), "matrix", (16, 24)),
    "Conv1D": (lambda: transformers.pytorch_utils.Conv1D(16, 24), "transposed", (24, 16)),
    "embedding": (lambda: torch.nn.Embedding(24, 16), "transposed", (24, 16)),
    "conv": (lambda: torch.nn.Conv2d(4, 16, (3, 2)), "conv:3x2:1", (16, 4, 3, 2)),
    "rows": (lambda: torch.nn.Linear(24, 32), "rows:8:24", (32, 24)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_computes_as_if_merged(kind: str, tmp_path: Path) -> None:
    make, view, shape = LAYERS[kind]
    torch.manual_seed(0)
    model = torch.nn.Sequential(make())
    pair = random_lora(((16, 24),), rank=3).targets[0]
    lora = LoraAdapter((replace(pair, target=Target("0.weight", shape, View(view))),))
    weight = model[0].weight.detach().clone()
    base = save_base(tmp_path / "base", [{"0.weight": Stored("F32", weight.numpy())}])
    compact = api.convert(lora, "bone", variant="bat", rank=4, base=base).compact
    x = torch.arange(20) if kind == "embedding" else torch.randn(2, 4, 5, 6) if kind == "conv" else torch.randn(3, 24)
    api.attach(model, compact)
    ours = model(x).detach()
    api.detach(model)
    merge(base, [compact], tmp_path / "out")
    with torch.no_grad():
        before = model(x)
        model[0].weight.copy_(torch.from_numpy(load_all(tmp_path / "out")["0.weight"].decode()).reshape(shape))
    assert torch.allclose(ours, model(x), atol=1e-4) and not torch.allclose(before, ours, atol=1e-2)


def test_a_bias_goes_along() -> None:
    """A bias that a Bat carries is added beside its update, at the adapter's scale, as beside any other form's."""
    compact = on_llama(rank=4)
    name = compact.targets[0].name
    bias = np.linspace(-1, 1, compact.targets[0].out_features).astype(np.float32)
    carried = replace(compact, extras=(replace(extra(name.removesuffix("weight") + "bias", bias), use="add"),))
    outputs = []
    for one in (compact, carried):
        model = llama()
        api.attach(model, one, scale=0.5)
        x = torch.randn(3, compact.targets[0].in_features, generator=torch.Generator().manual_seed(0))
        outputs.append(model.get_submodule(name.removesuffix(".weight"))(x).detach().numpy())
    assert np.allclose(outputs[1] - outputs[0], 0.5 * bias, atol=1e-5)


def test_gradients_reach_the_block() -> None:
    model = llama()
    source = attach.attach(model, on_llama(rank=4), trainable=True)
    loss = model(torch.arange(6)[None]).logits.float().square().mean()
    loss.backward()
    (parameter,) = source.parameters()
    assert parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
    step = torch.zeros_like(parameter)
    step.view(-1)[7] = 1e-2
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter += sign * step
            values.append(model(torch.arange(6)[None]).logits.double().square().mean())
            parameter -= sign * step
    assert torch.isclose((values[0] - values[1]) / 2e-2, parameter.grad.view(-1)[7].double(), rtol=0.05, atol=1e-4)


def test_answers_are_measured_beside_others() -> None:
    lora = api.load_lora(ADAPTERS / "llama-plain")
    bone = api.convert(lora, "bone", base=LLAMA, rank=4).compact
    data = [{"input_ids": torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(n))} for n in range(3)]
    found = api.compare(lora, [bone, on_llama(rank=4)], base=LLAMA, data=data)
    one, two = found
    assert two.answers is not None and two.data_captured is not None
    assert abs(two.data_captured - one.data_captured) < 0.2 and two.data_captured != one.data_captured
    assert all(t.data_error is not None for t in two.targets)


# --- PEFT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"rank": 4}, {"rank": 8, "bits": "4"}, {"peft_compatible": True, "target_ratio": 6}]
)
def test_peft_has_our_logits(options: dict[str, Any], tmp_path: Path) -> None:
    compact = on_llama(**options)
    api.export(compact, tmp_path / "out", to="peft-miss")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["init_weights"] == "bat"
    model = llama()
    api.attach(model, compact)
    theirs = logits(load_in_peft("tiny-llama", tmp_path / "out"))
    assert np.abs(theirs - logits(model)).max() <= 1e-5 * np.abs(theirs).max()
    again = api.load(tmp_path / "out")  # lrconvert.json says what it depends on
    assert again.base.content == compact.base.content and again.config.ranks == compact.config.ranks


@pytest.mark.parametrize("is_bone", [False, True])
def test_a_bat_of_peft_is_read_without_loss(is_bone: bool, tmp_path: Path) -> None:
    theirs = logits(saved(tmp_path / "bat", init_weights="bat", r=8))
    if is_bone:
        as_bone(tmp_path / "bat")
    with pytest.raises(errors.BaseError, match=r"depend on|how many inputs"):
        api.load(tmp_path / "bat")
    compact = api.load(tmp_path / "bat", base=LLAMA)
    assert isinstance(compact, CompactAdapter) and compact.config.variant == "bat"
    api.write(compact, tmp_path / "x.lrc")
    assert api.validate(tmp_path / "x.lrc", base=LLAMA).ok
    model = llama()
    api.attach(model, api.read(tmp_path / "x.lrc"))
    assert np.abs(logits(model) - theirs).max() <= 1e-5 * np.abs(theirs).max()
    if not is_bone:
        api.export(compact, tmp_path / "again", to="peft-miss")
        one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("bat", "again"))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_blocks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    saved(tmp_path / "bat", init_weights="bat", r=8)
    path = tmp_path / "bat" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: v[:-1].contiguous() for k, v in tensors.items()}, path)
    with pytest.raises(errors.ShapeError, match="divides both"):
        api.load(tmp_path / "bat", base=LLAMA)
    notes = tmp_path / "bat" / "lrconvert.json"
    save_file(tensors, path)
    shapes = {"model.layers.0.self_attn.q_proj": [64, 64]}
    notes.write_text(json.dumps({"shapes": shapes, "base_content": "no digest"}))
    with pytest.raises(errors.LrcError):
        readers.load(tmp_path / "bat", readers.ReadOptions())


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_needs_the_base_says_so(tmp_path: Path) -> None:
    lora = random_lora(SHAPES)
    with pytest.raises(errors.OptionError, match="base="):
        api.convert(lora, "bone", variant="bat")
    _, compact = made(tmp_path, lora, rank=4)
    with pytest.raises(errors.MissingFieldError, match=r"base\.content"):
        api.write(replace(compact, base=replace(compact.base, content="")), tmp_path / "x.lrc")
    with pytest.raises(errors.OptionError, match="base="):
        api.compare(lora, [compact])
    with pytest.raises(errors.OptionError, match="no factors"):
        api.export(compact, tmp_path / "out", to="peft-lora")
    api.write(compact, tmp_path / "x.lrc")
    with pytest.raises(errors.OptionError, match="no factors"):
        api.load_lora(tmp_path / "x.lrc")
    summary = api.inspect(tmp_path / "x.lrc")
    assert {t["norm"] for t in summary["targets"]} == {None} and summary["warnings"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"rank": 3}, "does not divide"), ({"shard": "out"}, "contradict"), ({"mini_rank": 4}, "variant='mini'")],
)
def test_impossible_options(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    lora = random_lora(SHAPES)
    base = random_base(tmp_path / "base", lora)
    with pytest.raises(errors.OptionError, match=reason):
        api.convert(lora, "bone", variant="bat", base=base, **options)


def test_widths_that_share_no_divisor_have_blocks_of_one(tmp_path: Path) -> None:
    lora = random_lora(((9, 16), (15, 7)))
    base, compact = made(tmp_path, lora)
    assert compact.config.ranks == (1, 1)
    assert api.compare(lora, [compact], base=base)[0].captured > 0
    assert peft is not None


def test_the_command(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from lrconvert.cli import cli

    words = ["lora-to-bat", str(ADAPTERS / "llama-plain"), "-o", str(tmp_path / "x.lrc"), "--target-ratio", "8"]
    refused = CliRunner().invoke(cli, words)
    assert refused.exit_code == 1 and "--base" in str(refused.exception)
    done = CliRunner().invoke(cli, [*words, "--base", str(LLAMA)])
    assert done.exit_code == 0, done.output
    for more in (["inspect"], ["validate", "--base", str(LLAMA)]):
        result = CliRunner().invoke(cli, [more[0], str(tmp_path / "x.lrc"), *more[1:]])
        assert result.exit_code == 0, result.output
    shown = CliRunner().invoke(cli, ["compare", str(ADAPTERS / "llama-plain"), str(tmp_path / "x.lrc")])
    assert shown.exit_code == 1 and "--base" in str(shown.exception)
    words = ["compare", str(ADAPTERS / "llama-plain"), str(tmp_path / "x.lrc"), "--base", str(LLAMA)]
    assert CliRunner().invoke(cli, words).exit_code == 0
