"""Adapters of other kinds as LoRAs: their updates beside those of the libraries that train them, what is cut and how it
is said, and every verb on every kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ADAPTERS, asset, dense, write_files
from peers import oracle
from safetensors.numpy import load_file, save_file
from test_base_names import make_base

from lrconvert import api
from lrconvert.core import errors
from lrconvert.core.dtypes import F64, STORAGE, decode
from lrconvert.formats import inspection
from lrconvert.formats.lrc import file
from lrconvert.formats.readers.base import load
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.lora import factoring
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.testing import samples


def whole(lora: LoraAdapter) -> dict[str, F64]:
    """The updates, in the shapes of the base's parameters, and what extra tensors add to others."""
    updates = {}
    for pair in lora.targets:
        update = dense(pair)
        turned = update.T if pair.target.view.kind == "transposed" else update
        updates[pair.target.name] = turned.reshape(pair.target.shape)
    for extra in lora.extras:
        assert extra.use == "add"
        values = decode(np.frombuffer(extra.data, STORAGE[extra.dtype]), extra.dtype)
        updates[extra.name] = values.astype(np.float64).reshape(extra.shape)
    return updates


def assert_same(updates: Mapping[str, F64], wanted: Mapping[str, F64], bound: float = 1e-6) -> None:
    """Each differs by no more than `bound` of its norm."""
    assert updates.keys() == wanted.keys()
    for name, update in wanted.items():
        difference = np.linalg.norm(updates[name].reshape(update.shape) - update)
        assert difference <= bound * np.linalg.norm(update), (name, difference / np.linalg.norm(update))


# --- LyCORIS --------------------------------------------------------------------------------------------------------

NETWORKS: dict[str, dict[str, Any]] = {
    "loha": {"algo": "loha", "linear_dim": 3, "linear_alpha": 2},
    "loha-tucker": {"algo": "loha", "linear_dim": 2, "linear_alpha": 1, "use_tucker": True, "train_norm": True},
    "lokr": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 3},
    "lokr-both": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 3, "decompose_both": True, "factor": 4},
    "lokr-full": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 5, "full_matrix": True, "use_scalar": True},
    "lokr-tucker": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 2, "use_tucker": True, "factor": 2},
    "full": {"algo": "full", "train_norm": True},
    "locon": {"algo": "lora", "linear_dim": 2, "linear_alpha": 1, "use_tucker": True, "train_norm": True},
}


@pytest.mark.medium
def test_lycoris_computes_with_the_updates_that_are_read(tmp_path: Path) -> None:
    """Files as it saves them, of linear layers, convolutions and norms, beside what its layers add."""
    oracle.needed("lycoris")
    jobs = [(tmp_path / name, {"seed": n, "network": network}) for n, (name, network) in enumerate(NETWORKS.items())]
    answers = oracle.ask("lycoris", jobs, tmp_path)
    for (folder, _), answer in zip(jobs, answers, strict=True):
        assert answer["outcome"] == "loads", (folder.name, answer)
        with np.load(folder / "deltas.npz") as stored:
            wanted = dict(stored)
        lora = load(folder / "lycoris.safetensors", ReadOptions(base=folder / "base"))
        assert_same(whole(lora), wanted, 2e-6)
        assert not any(pair.lost for pair in lora.targets) and any(p.target.view.kind == "conv" for p in lora.targets)


# --- PEFT -----------------------------------------------------------------------------------------------------------


def little_model() -> Any:
    """Two linear layers, convolutions of two dimensions, of one pixel and of one dimension, and a bias without."""
    import torch

    torch.manual_seed(1)
    layers = {
        "one": torch.nn.Linear(12, 16),
        "two": torch.nn.Linear(16, 8, bias=False),
        "plane": torch.nn.Conv2d(6, 8, 3),
        "pixel": torch.nn.Conv2d(8, 4, 1),
        "line": torch.nn.Conv1d(4, 6, 3),
    }
    return torch.nn.ModuleDict(layers)


LINEAR, EVERY = ["one", "two"], ["one", "two", "plane", "pixel", "line"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "loha": ("LoHaConfig", {"r": 3, "alpha": 2, "target_modules": EVERY, "init_weights": False}),
    "loha-core": (
        "LoHaConfig",
        {"r": 2, "alpha": 5, "target_modules": EVERY, "init_weights": False, "use_effective_conv2d": True},
    ),
    "loha-patterns": (
        "LoHaConfig",
        {
            "r": 2,
            "alpha": 4,
            "rank_pattern": {"two": 3},
            "alpha_pattern": {"one": 1},
            "target_modules": LINEAR,
            "init_weights": False,
        },
    ),
    "lokr": ("LoKrConfig", {"r": 1, "alpha": 3, "target_modules": EVERY, "init_weights": False}),
    "lokr-whole": ("LoKrConfig", {"r": 8, "alpha": 3, "target_modules": EVERY, "init_weights": False}),
    "lokr-both": (
        "LoKrConfig",
        {
            "r": 1,
            "alpha": 2,
            "target_modules": EVERY,
            "init_weights": False,
            "decompose_both": True,
            "decompose_factor": 4,
            "use_effective_conv2d": True,
        },
    ),
    "vera": ("VeraConfig", {"r": 5, "target_modules": LINEAR, "init_weights": False}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "lora_alpha": 7, "total_step": 9, "target_modules": LINEAR}),
    "ia3": ("IA3Config", {"target_modules": EVERY[:-1], "feedforward_modules": ["two", "pixel"]}),
}


def trained(kind: str, folder: Path, **changes: Any) -> dict[str, F64]:
    """Save an adapter of PEFT's with random numbers, and its base; return what it adds when PEFT merges it."""
    import peft
    import torch
    from safetensors.torch import save_file as save

    name, settings = KINDS[kind]
    base = little_model()
    before = {name: value.detach().double().numpy().copy() for name, value in base.state_dict().items()}
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "config.json").write_text("{}")
    save(base.state_dict(), folder / "base" / "model.safetensors")
    model = peft.get_peft_model(base, getattr(peft, name)(**{**settings, **changes}))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if value.requires_grad and "original" not in parameter:
                value.add_(torch.randn(value.shape) * 0.3)
    model.save_pretrained(folder / "adapter")
    merged = model.double().merge_and_unload().state_dict()
    after = {name: value.numpy() - before[name] for name, value in merged.items() if name in before}
    return {name: update for name, update in after.items() if np.abs(update).max() > 1e-12}


@pytest.mark.medium
@pytest.mark.parametrize("kind", KINDS)
def test_peft_merges_the_updates_that_are_read(kind: str, tmp_path: Path) -> None:
    """Of every layer, exactly; also of a bias that (IA)^3 multiplies with its layer."""
    wanted = trained(kind, tmp_path)
    options = ReadOptions(base=tmp_path / "base")
    lora = load(tmp_path / "adapter", options)
    assert isinstance(lora, LoraAdapter) and not any(pair.lost for pair in lora.targets)
    assert_same(whole(lora), wanted, 1e-6)
    assert load(tmp_path / "adapter" / "adapter_model.safetensors", options) == lora
    assert lora.provenance.fields["source_format"] == f"peft-{kind.partition('-')[0]}"


# --- real files -----------------------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize(("rank", "limit"), [(4, None), (16, 32)])
def test_a_real_lokr_is_read_exactly_or_with_what_was_cut(rank: int, limit: int | None) -> None:
    """Of 350 layers: rank 4 times 4 is a LoRA of rank 16; 16 times 16 is cut, and each target knows what it lacks."""
    path = asset(f"adapters/lycoris_lokr/smart_falcon_{rank}_lokr.safetensors")
    lora, stored = load(path, ReadOptions(source_rank=limit)), load_file(path)
    assert isinstance(lora, LoraAdapter) and len(lora.targets) == 350
    assert max(pair.rank for pair in lora.targets) == (limit or rank * rank)
    for pair in lora.targets[::41]:
        module = pair.target.name.removesuffix(".weight")
        one, other, *_ = (
            stored[f"{module}.lokr_w{n}_a"].astype(float) @ stored[f"{module}.lokr_w{n}_b"].reshape(rank, -1)
            for n in (1, 2)
        )
        update = np.kron(one, other) * float(stored[f"{module}.alpha"]) / rank
        error, energy = np.sum((dense(pair) - update) ** 2), np.sum(update**2)
        assert error == pytest.approx(pair.lost, rel=1e-6, abs=1e-12 * energy)
    assert any("have a rank above 32" in line for line in lora.warnings) == (limit is not None)


def test_a_real_ia3_on_inputs(tmp_path: Path) -> None:
    """PEFT's own regression file: the columns of the base's weight, each times its factor less one, exactly."""
    adapter = asset("adapters/peft_regression_ia3_mlp")
    torch = pytest.importorskip("torch")
    ((_, factors),) = torch.load(adapter / "adapter_model.bin", weights_only=True, map_location="cpu").items()
    weight = np.random.default_rng(0).standard_normal((20, factors.numel())).astype(np.float32)
    base = weights_of(tmp_path / "base", {"lin0.weight": weight, "lin0.bias": np.ones(20, np.float32)})
    lora = load(adapter, ReadOptions(base=base, allow_pickle=True))
    assert_same(whole(lora), {"lin0.weight": weight * (factors.double().numpy() - 1)})


@pytest.mark.medium
def test_a_real_ia3_on_outputs_is_cut(tmp_path: Path) -> None:
    """The first layer of one of mT0 large, on random weights: the best LoRA of a rank, to the percent."""
    adapter = asset("adapters/mt0_large_ia3")
    torch = pytest.importorskip("torch")
    stored = torch.load(adapter / "adapter_model.bin", weights_only=True, map_location="cpu")
    taken = {name: value.float().numpy() for name, value in list(stored.items())[:1]}
    rng, weights = np.random.default_rng(0), {}
    for name, factors in taken.items():
        module = name.removeprefix("base_model.model.").removesuffix(".ia3_l")
        weights[f"{module}.weight"] = rng.standard_normal((factors.size, 1024)).astype(np.float32)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    save_file(taken, tmp_path / "adapter" / "adapter_model.safetensors")
    base = weights_of(tmp_path / "base", weights, model_type="mt5", architectures=["MT5ForConditionalGeneration"])
    lora = load(tmp_path / "adapter", ReadOptions(base=base, source_rank=64))
    assert isinstance(lora, LoraAdapter)
    for pair, factors in zip(lora.targets, taken.values(), strict=True):
        update = (factors.reshape(-1, 1) - 1) * weights[pair.target.name]
        best = np.sum(np.linalg.eigvalsh(update @ update.T)[:-64])
        error = np.sum((dense(pair) - update) ** 2)
        assert best <= error <= 1.01 * best and error == pytest.approx(pair.lost, rel=1e-4)


def weights_of(folder: Path, tensors: Mapping[str, Any], **config: Any) -> Path:
    """A base with these weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


# --- what is cut ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [3, 7, 12])
def test_products_are_exact_or_know_what_they_lack(limit: int) -> None:
    """Of all three kinds of products, at ranks below and above the limit; the rest is orthogonal to what is kept, and
    no matrix of that rank has a smaller one."""
    rng = np.random.default_rng(limit)
    pairs = [(rng.standard_normal((20, 3)), rng.standard_normal((3, 24))) for _ in range(2)]
    left, right = rng.standard_normal((4, 3)), (rng.standard_normal((5, 2)), rng.standard_normal((2, 8)))
    cases = [
        (factoring.of_hadamard(*pairs, limit), (pairs[0][0] @ pairs[0][1]) * (pairs[1][0] @ pairs[1][1])),
        (factoring.of_kronecker(left, right, limit), np.kron(left, right[0] @ right[1])),
        (factoring.of_kronecker(right, left, limit), np.kron(right[0] @ right[1], left)),
        (factoring.of_matrix(rng.standard_normal((20, 24)), limit), None),
        (factoring.of_product(rng.standard_normal((20, 9)), rng.standard_normal((9, 24)), limit), None),
    ]
    for made, update in cases:
        assert made.a.shape[0] == made.b.shape[1] <= limit
        if update is None:
            continue
        rest = update - made.b @ made.a
        tail = np.sum(np.linalg.svd(update, compute_uv=False)[limit:] ** 2)
        assert np.sum(rest**2) == pytest.approx(tail, abs=1e-12 * np.sum(update**2))
        assert made.lost == pytest.approx(tail, abs=1e-12 * np.sum(update**2))
        assert (made.lost == 0) == (np.linalg.matrix_rank(update) <= limit)
        assert np.abs(made.b.T @ rest).max() < 1e-9 and np.abs(rest @ made.a.T).max() < 1e-9


def test_a_large_matrix_is_cut_near_its_best() -> None:
    """Above the size that is decomposed as a whole: by subspace iteration, the same each time, within a percent."""
    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((600, 700)) / np.arange(1, 701)).astype(np.float32)
    one, again = (factoring.of_matrix(matrix, 16) for _ in range(2))
    assert np.array_equal(one.a, again.a) and np.array_equal(one.b, again.b)
    tail = np.sum(np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[16:] ** 2)
    error = np.sum((matrix - one.b @ one.a) ** 2)
    assert tail <= error * (1 + 1e-6) and error <= 1.01 * tail and one.lost == pytest.approx(error, rel=1e-4)


def test_what_is_kept_is_measured_against_the_whole_update(tmp_path: Path) -> None:
    """A LoKr cut to a rank, then converted: captured is what is left of the LoKr, not of the LoRA in between."""
    trained("lokr", tmp_path)
    options = ReadOptions(base=tmp_path / "base", source_rank=2)
    every, cut = load(tmp_path / "adapter"), load(tmp_path / "adapter", options)
    assert isinstance(every, LoraAdapter) and isinstance(cut, LoraAdapter)
    share = float(cut.provenance.fields["share_of_source"])
    assert 0.1 < share < 0.999 and f"holds {share:.4f}" in cut.warnings[-1]
    done = api.convert(cut, "lowrank", bits=15)
    assert done.fidelity is not None and done.fidelity.captured == pytest.approx(share, abs=1e-4)
    full = {pair.target.name: pair for pair in every.targets}
    for row, pair in zip(done.fidelity.targets, cut.targets, strict=True):
        update, kept = dense(full[pair.target.name]), dense(pair)
        wanted = 1 - np.sum((update - kept) ** 2) / np.sum(update**2)
        assert row.captured == pytest.approx(wanted, abs=1e-4)
    shown = {row["name"]: row["held"] for row in inspection.inspect_lora(cut)["targets"] if "held" in row}
    assert shown and all(0 < value < 1 for value in shown.values())
    assert "held" not in inspection.inspect_lora(every)["targets"][0]
    assert done.compact.provenance.fields["share_of_source"] == cut.provenance.fields["share_of_source"]


def test_a_rank_is_for_other_kinds_alone(tmp_path: Path) -> None:
    with pytest.raises(errors.OptionError, match="does not take another rank"):
        api.load_lora(ADAPTERS / "llama-plain", source_rank=4)
    file.write(api.convert(ADAPTERS / "llama-plain", "lowrank").compact, tmp_path / "x.lrc")
    with pytest.raises(errors.OptionError, match="keeps its rank"):
        api.load(tmp_path / "x.lrc", source_rank=4)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_is_refused_says_what_to_do(tmp_path: Path) -> None:
    """A VeRA without its shared matrices, and one without a base; an (IA)^3 without a base; halves that do not fit."""
    sample = samples.SAMPLES["peft_vera"]()
    folder = write_files(tmp_path / "vera", sample.files)
    base = make_base(tmp_path / "base", sample.base, {})
    with pytest.raises(errors.BaseError, match="how many inputs"):
        load(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: v for n, v in tensors.items() if n != "base_model.vera_A"}, folder / "adapter_model.safetensors")
    with pytest.raises(errors.PairError, match=r"vera_A is not in the file.*save_projection=True"):
        load(folder, ReadOptions(base=base))
    ia3 = write_files(tmp_path / "ia3", samples.SAMPLES["peft_ia3"]().files)
    with pytest.raises(errors.BaseError, match="weights of the base"):
        load(ia3)
    lycoris = write_files(tmp_path / "lycoris", samples.SAMPLES["lycoris"]().files) / "lora.safetensors"
    tensors = load_file(lycoris)
    for part, shape, words in (
        ("hada_w2_a", (5, 2), "not of one size"),
        ("hada_w1_b", (3, 8), "do not fit"),
        ("lokr_w2_a", (3, 2), "do not fit"),
        ("lokr_w2_b", None, "has no lokr_w2_b"),
    ):
        (name,) = (name for name in tensors if name.endswith(part))
        changed = {n: v for n, v in tensors.items() if n != name}
        save_file(changed | ({name: np.ones(shape, np.float32)} if shape else {}), lycoris)
        with pytest.raises(errors.PairError, match=words):
            load(lycoris)
    save_file({**tensors, "lora_unet_x_proj.lora_down.weight": np.ones((1, 8), np.float32)}, lycoris)
    with pytest.raises(errors.PairError, match="has no lora_up"):
        load(lycoris)


# --- every verb on every kind ---------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("lokr-")])
def test_every_verb_takes_every_kind(kind: str, tmp_path: Path) -> None:
    """Converted, compressed, exported and merged: the same update comes out of all of them, biases included."""
    wanted = trained(kind, tmp_path)
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    options = {"base": base} if kind in ("vera", "ia3") else {}
    converted = api.convert(adapter, "lowrank", bits=12, **options)
    assert converted.fidelity is not None and converted.fidelity.captured > 1 - 1e-4
    api.compress(adapter, target_size=3000, forms=["lowrank"], out=tmp_path / "small.lrc", **options)
    assert (tmp_path / "small.lrc").stat().st_size <= 3000 + 1000 * (kind == "ia3")  # its bias is an extra tensor
    api.export(adapter, tmp_path / "peft", to="peft-lora", base=base)
    exported = api.load_lora(tmp_path / "peft")
    api.merge(base, adapter, tmp_path / "merged")
    again = whole(exported)
    for name, update in wanted.items():
        assert np.linalg.norm(again[name] - update) < 1e-5 * np.linalg.norm(update), name
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    for name, update in wanted.items():
        difference = after[name].astype(np.float64) - before[name]
        assert np.linalg.norm(difference - update) < 1e-5 * np.linalg.norm(update) + 1e-6, name
