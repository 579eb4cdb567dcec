"""A fine-tuned model minus its base: base + merge(extract(tuned)) is tuned again as far as the rank goes, and the
errors that are said are those of the written factors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ADAPTERS, BASES
from models import cast_base, load_all, save_base

from lrconvert import api
from lrconvert.api.extracting import extract
from lrconvert.cli import cli
from lrconvert.convert.extract import difference
from lrconvert.core import errors
from lrconvert.core.dtypes import Stored, round_to
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.lora.adapter import LoraAdapter

LLAMA, PLAIN = BASES / "tiny-llama", ADAPTERS / "llama-plain"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


def changed(
    folder: Path, base: Path, values: Mapping[str, np.ndarray | None], dtype: str = "F32", shards: int = 1
) -> Path:
    """A model folder with the tensors of `base` and these in their place, None for one that is left out."""
    tensors = {name: Stored(dtype, round_to(stored.decode(), dtype)) for name, stored in load_all(base).items()}
    for name, array in values.items():
        tensors.pop(name, None)
        if array is not None:
            tensors[name] = Stored(dtype, round_to(np.asarray(array), dtype))
    names = sorted(tensors, reverse=shards > 1)
    parts = [{name: tensors[name] for name in names[n::shards]} for n in range(shards)]
    made: Path = save_base(folder, parts, json.loads((base / "config.json").read_text()))
    return made


def tuned(folder: Path, base: Path, dtype: str = "F32", seed: int = 0, size: float = 1e-2, **how: Any) -> Path:
    """A model whose every tensor is trained: no difference has a low rank."""
    rng = np.random.default_rng(seed)
    values = {name: stored.decode() for name, stored in load_all(base).items()}
    return changed(folder, base, {n: v + size * rng.standard_normal(v.shape) for n, v in values.items()}, dtype, **how)


def deltas(one: Path, other: Path) -> dict[str, np.ndarray]:
    a, b = load_all(one), load_all(other)
    return {name: a[name].decode().astype(np.float64) - b[name].decode() for name in b}


def test_a_merged_lora_comes_back(tmp_path: Path) -> None:
    """In F32 more than 0.999 of the update is captured, at its own rank, whatever the shards; nothing else changed, and
    no component but the LoRA's stands above the rounding."""
    api.merge(LLAMA, PLAIN, tmp_path / "merged", shard_bytes=40_000)
    done = extract(tmp_path / "merged", LLAMA, rank=12)
    lora = api.load_lora(PLAIN)
    assert done.captured > 0.999999 and done.lora is not None and not done.carried
    assert {t.target.name: t.above for t in done.targets} == {p.target.name: p.rank for p in lora.targets}
    for mine, own in zip(done.lora.targets, lora.targets, strict=True):
        expected = own.scale * own.B.astype(np.float64) @ own.A
        assert np.linalg.norm(mine.B.astype(np.float64) @ mine.A - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.medium
@pytest.mark.parametrize("base", ["tiny-llama", "tiny-gpt2"])
def test_base_and_extraction_approach_the_model_with_the_rank(tmp_path: Path, base: str) -> None:
    """Norms and biases come back exactly, matrices ever nearer, and at full rank to rounding; linear layers, Conv1D and
    embeddings, sharded otherwise than the base."""
    model = tuned(tmp_path / "tuned", BASES / base, shards=3)
    distances = []
    for rank in (2, 32, 512):
        out = tmp_path / f"merged-{rank}"
        done = extract(model, BASES / base, rank=rank, dtype="F32")
        api.merge(BASES / base, done, out)
        left = deltas(out, model)
        distances.append(sum(float(np.sum(d**2)) for d in left.values()))
        assert all(not d.any() for name, d in left.items() if d.ndim == 1)
        assert abs(distances[-1] - sum(t.error for t in done.targets)) <= 1e-3 * distances[0]
    assert distances[0] > 1.5 * distances[1] and distances[2] < 1e-9 * distances[0]


def test_the_error_is_that_of_the_written_factors(tmp_path: Path) -> None:
    """Said per target for what is stored: rounded to BF16 it is larger than in F32, and each is the distance itself."""
    model = tuned(tmp_path / "tuned", LLAMA)
    whole = deltas(model, LLAMA)
    for dtype in ("F32", "BF16"):
        done = extract(model, LLAMA, rank=5, dtype=dtype)
        assert done.lora is not None
        rows = {row.target.name: row for row in done.targets}
        for pair in done.lora.targets:
            delta = pair.B.astype(np.float64) @ pair.A
            delta = delta.T if pair.target.view.kind == "transposed" else delta
            expected = np.linalg.norm(whole[pair.target.name] - delta) / np.linalg.norm(whole[pair.target.name])
            assert abs(rows[pair.target.name].relative_error - expected) < 1e-5


def test_ranks_under_a_share_and_under_bytes_are_chosen_over_all_modules(tmp_path: Path) -> None:
    """A share is reached with the fewest numbers, about; bytes are kept; ranks differ by module."""
    model = changed(
        tmp_path / "tuned",
        LLAMA,
        {
            n: v.decode() + _decaying(v.shape, i)
            for i, (n, v) in enumerate(load_all(LLAMA).items())
            if v.array.ndim == 2
        },
    )
    done = extract(model, LLAMA, min_captured=0.9)
    assert 0.9 <= done.captured < 0.93
    assert len({t.rank for t in done.targets}) > 2
    bounded = extract(model, LLAMA, target_size=20_000)
    assert bounded.factor_bytes <= 20_000
    even = extract(model, LLAMA, rank=max(1, round(20_000 / extract(model, LLAMA, rank=1).factor_bytes)))
    assert bounded.captured >= even.captured or even.factor_bytes > 20_000
    with pytest.raises(errors.BudgetError, match="rank 1 of every module"):
        extract(model, LLAMA, min_captured=0.99, rank=1)
    with pytest.raises(errors.BudgetError, match="no component"):
        extract(model, LLAMA, target_size=10)


def _decaying(shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((n, min(shape))))[0] for n in shape)
    return np.asarray((0.1 + seed % 3) * 0.7 ** np.arange(min(shape)) * u @ v.T)


@pytest.mark.parametrize("method", ["lowrank", "sbora"])
def test_straight_to_a_compact_form(tmp_path: Path, method: str) -> None:
    """The file is below its size, names the base's contents, and its error is measured on the difference."""
    api.merge(LLAMA, PLAIN, tmp_path / "merged")
    done = extract(tmp_path / "merged", LLAMA, method, rank=8, target_size=9000)
    assert done.compact is not None and done.conversion is not None and done.conversion.fidelity is not None
    assert done.conversion.sizes.adapter <= 9000 and done.compact.base.content
    assert abs(done.captured - done.conversion.fidelity.captured) < 1e-4
    api.merge(LLAMA, done, tmp_path / "again")
    left = sum(float(np.sum(d**2)) for d in deltas(tmp_path / "again", tmp_path / "merged").values())
    assert abs(left / done.energy - (1 - done.captured)) < 1e-3


def test_large_tensors_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not kept in memory is read again for every product, in blocks, with the same result."""
    model = tuned(tmp_path / "tuned", LLAMA)
    held = extract(model, LLAMA, rank=4)
    monkeypatch.setattr(difference, "HELD", 0)
    monkeypatch.setattr(difference, "BLOCK", 1000)
    blocks = extract(model, LLAMA, rank=4)
    assert held.lora is not None and blocks.lora is not None
    assert np.isclose(held.captured, blocks.captured, rtol=1e-9)


def test_rounding_is_told_from_the_difference(tmp_path: Path) -> None:
    """Merged in BF16 a small update is mostly rounding: the estimate is near the truth, which the LoRA tells, and a
    warning says so; in F32 there is none."""
    base = cast_base(LLAMA, tmp_path / "base", "BF16")
    lora = api.load_lora(PLAIN)
    for scale, is_noisy in ((0.002, True), (0.05, False), (3.0, False)):
        small = replace(lora, targets=tuple(replace(p, scale=p.scale * scale) for p in lora.targets))
        api.merge(base, small, tmp_path / f"merged-{scale}")
        done = extract(tmp_path / f"merged-{scale}", base, rank=8)
        own = {p.target.name: p.scale * p.B.astype(np.float64) @ p.A for p in small.targets}
        found = deltas(tmp_path / f"merged-{scale}", base)
        truth = sum(np.sum((found[name] - own[name]) ** 2) for name in own) / done.energy
        assert truth / 2 < done.rounding <= min(2 * truth, 1.0)
        assert any("which no rank describes" in line for line in done.warnings) == is_noisy


def test_trained_tokens_go_along_as_rows(tmp_path: Path) -> None:
    weight = load_all(LLAMA)["model.embed_tokens.weight"].decode().copy()
    weight[[3, 7]] += 1
    other = load_all(LLAMA)["model.layers.0.mlp.up_proj.weight"].decode() + 0.1
    values = {"model.embed_tokens.weight": weight, "model.layers.0.mlp.up_proj.weight": other}
    model = changed(tmp_path / "tuned", LLAMA, values)
    done = extract(model, LLAMA)
    assert [(e.use, e.shape) for e in done.carried] == [("rows", (2, weight.shape[1])), ("row_indices", (2,))]
    api.merge(LLAMA, done, tmp_path / "again")
    assert not deltas(tmp_path / "again", model)["model.embed_tokens.weight"].any()


def test_a_grown_vocabulary_is_refused_or_carried_whole(tmp_path: Path) -> None:
    tensors = load_all(LLAMA)
    grown = {
        name: np.concatenate([tensors[name].decode(), np.ones((2, tensors[name].shape[1]))])
        for name in ("model.embed_tokens.weight", "lm_head.weight")
        if name in tensors
    }
    up = tensors["model.layers.0.mlp.up_proj.weight"].decode() + 0.1
    model = changed(tmp_path / "tuned", LLAMA, {**grown, "model.layers.0.mlp.up_proj.weight": up})
    with pytest.raises(errors.BaseError, match=r"resize_token_embeddings\("):
        extract(model, LLAMA)
    done = extract(model, LLAMA, vocabulary="whole")
    api.merge(LLAMA, done, tmp_path / "again")
    again = load_all(tmp_path / "again")
    for name, values in grown.items():
        assert np.array_equal(again[name].decode(), values.astype(np.float32))


def test_names_of_another_prefix_and_dtype(tmp_path: Path) -> None:
    """`model.` in front or not is the same tensor; what other dtypes round is said."""
    model = tuned(tmp_path / "tuned", LLAMA, "BF16")
    tensors = {name.removeprefix("model."): stored for name, stored in load_all(model).items()}
    bare = save_base(tmp_path / "bare", [tensors], CONFIG)
    one, other = extract(model, LLAMA, rank=3), extract(bare, LLAMA, rank=3)
    assert one.lora is not None and other.lora is not None
    assert one.lora.targets == other.lora.targets
    assert any("BF16 in the fine-tuned model, F32 in the base" in line for line in one.warnings)


def test_what_is_excluded_stays_the_bases(tmp_path: Path) -> None:
    model = tuned(tmp_path / "tuned", LLAMA)
    done = extract(model, LLAMA, rank=2, exclude=["norm", "embed"], include=["layers"])
    assert not done.carried and all("layers" in t.target.name for t in done.targets)
    assert any("norm" in name for name in done.left_out)


def test_models_that_do_not_go_together(tmp_path: Path) -> None:
    """Equal models, another base, NaN, quantized models, adapters in place of models: each is said."""
    with pytest.raises(errors.NoEffectError, match="equal the base's"):
        extract(LLAMA, LLAMA)
    with pytest.raises(errors.BaseError, match="Is this the base"):
        extract(BASES / "tiny-bert", LLAMA)
    with pytest.raises(errors.FileKindError, match="is an adapter"):
        extract(PLAIN, LLAMA)
    name = "model.layers.0.mlp.up_proj.weight"
    broken = load_all(LLAMA)[name].decode().copy()
    broken[0, 0] = np.nan
    with pytest.raises(errors.ValueRangeError, match="NaN"):
        extract(changed(tmp_path / "nan", LLAMA, {name: broken}), LLAMA)
    with pytest.raises(errors.BaseError, match="in the fine-tuned model"):
        extract(changed(tmp_path / "shape", LLAMA, {name: broken[:, :-1]}), LLAMA)
    norm = load_all(LLAMA)["model.norm.weight"].decode() + 1
    with pytest.raises(errors.EmptyAdapterError, match=r"no matrix changed, only 'model\.norm"):
        extract(changed(tmp_path / "norm", LLAMA, {"model.norm.weight": norm}), LLAMA)
    quantized = shutil.copytree(LLAMA, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(errors.QuantizedBaseError, match="dequantize=True"):
        extract(quantized, LLAMA)
    with pytest.raises(errors.OptionError, match="target_ratio is of a compact form"):
        extract(LLAMA, LLAMA, target_ratio=5)


def test_a_dry_run_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned(tmp_path / "tuned", LLAMA)
    with open_checkpoint(LLAMA) as checkpoint:
        kind = type(checkpoint)
    monkeypatch.setattr(kind, "read", None)
    done = extract(model, LLAMA, rank=4, dry_run=True)
    monkeypatch.undo()
    made = extract(model, LLAMA, rank=4)
    assert done.lora is None and (done.factor_bytes, done.read_bytes) == (made.factor_bytes, made.read_bytes)


def run(*words: object) -> Any:
    return CliRunner().invoke(cli, [str(word) for word in words])


def test_the_command_writes_a_file_or_a_folder(tmp_path: Path) -> None:
    """A compact file by default, which merges; with --to a PEFT folder that reads back; JSON; what exists stays."""
    api.merge(LLAMA, PLAIN, tmp_path / "merged")
    words = ("extract", tmp_path / "merged", "--base", LLAMA, "-o")
    done = run(*words, tmp_path / "x.lrc", "--target-size", "9KB")
    assert done.exit_code == 0 and "captured  0.9" in done.output, done.output
    assert max(map(len, done.output.splitlines()[1:])) <= 100
    assert api.validate(tmp_path / "x.lrc").ok
    again = run(*words, tmp_path / "x.lrc")
    assert again.exit_code == 1 and isinstance(again.exception, errors.OutputExistsError)
    done = run(*words, tmp_path / "folder", "--to", "peft-lora", "--rank", 8, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["captured"] > 0.999
    read = api.load(tmp_path / "folder")
    assert isinstance(read, LoraAdapter) and {p.rank for p in read.targets} == {8}
    assert run(*words, tmp_path / "y", "--to", "kohya", "--method", "lowrank").exit_code == 2
    dry = run("extract", tmp_path / "merged", "--base", LLAMA, "--dry-run")
    assert dry.exit_code == 0 and "headers were read" in dry.output


def test_the_command_combines_what_has_an_equals_sign_in_its_name(tmp_path: Path) -> None:
    """What follows the last = is the weight, unless the whole is a path that exists."""
    odd = shutil.copytree(PLAIN, tmp_path / "a=0.5")
    done = run("combine", odd, f"{odd}=2", "-o", tmp_path / "x.lrc", "--json")
    assert done.exit_code == 0, done.output
    assert [a["weight"] for a in json.loads(done.stdout)["adapters"]] == [1.0, 2.0]
    done = run("combine", f"{PLAIN}=0.7", f"{PLAIN}=-0.2", "--mode", "svd", "--to", "peft-lora", "-o", tmp_path / "f")
    assert done.exit_code == 0 and "1.0000 of the energy of the weighted sum" in done.output, done.output
    done = run("combine", PLAIN, "--to", "peft-lora", "--target-size", "9KB", "-o", tmp_path / "g")
    assert done.exit_code == 2 and "--mode svd --rank bounds a LoRA" in done.output
