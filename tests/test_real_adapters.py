"""Every real adapter: converted, with at least the share that it kept when this was written, or refused with its code.
Skipped, by name, where they are absent."""

from __future__ import annotations

import re

import pytest
from conftest import ASSETS, asset
from models import random_base

from lrconvert import api, errors, file
from lrconvert.methods import base as methods

# Folder: targets, and the smallest captured share of lowrank at 8 % and 4 % of the bytes, less a little; None where the
# adapter is smaller than the header of a file, and is converted without a budget.
CONVERTED: dict[str, tuple[int, tuple[float, float] | None]] = {
    "bloom_lora": (48, (0.92, 0.85)),
    "deltacompression_poc": (24, (0.75, 0.65)),
    "distilbert_imdb": (12, (0.93, 0.85)),
    "gemma3_270m_svg_adapter": (72, (0.72, 0.50)),
    "gpt2_tigrinya": (36, (0.93, 0.85)),
    "ih_bloom560m_r10": (24, (0.95, 0.9)),
    "ih_gpt2_r4_a16_biaslora": (36, (0.76, 0.54)),
    "ih_tinygpt2_r4": (6, None),
    "monteclora_roberta_mrpc_230": (24, (0.93, 0.88)),
    "mountain_v1_binary": (36, (0.89, 0.74)),
    "peft_regression_lora_conv2d": (1, None),
    "peft_regression_lora_mlp": (1, None),
    "peft_regression_lora_mlp_modules_to_save": (1, None),
    "peft_regression_lora_opt-125m_bnb_4bit": (24, (0.51, 0.26)),
    "phi1_5_r4": (48, (0.73, 0.51)),
    "t5_small_rec": (36, (0.94, 0.92)),
}
REFUSED = {
    "cloneofsimo_pt": "E-LAYOUT",
    "cloneofsimo_safetensors": "E-LAYOUT",
    "lerobot_bin": "E-NOT-LORA",
    "lycoris_lokr": "E-LAYOUT",
    "mlx_cli": "E-LAYOUT",
    "mlx_vtboyarc": "E-LAYOUT",
    "mt0_large_ia3": "E-NOT-LORA",
    "peft_regression_adalora_mlp": "E-NOT-LORA",
    "peft_regression_ia3_mlp": "E-NOT-LORA",
    "sam_lora": "E-LAYOUT",
    "sd_lora_pokemon": "E-LAYOUT",
}
SHARES = (0.08, 0.04, 0.016)
# These keep the same shares in these forms; the others work by statistics, or not at all.
FLOORS = ("distilbert_imdb", "gemma3_270m_svg_adapter", "gpt2_tigrinya", "deltacompression_poc")
KEEP = ("vblora", "nola")
ON_A_BASE = ("distilbert_imdb", "deltacompression_poc", "t5_small_rec")  # a random one, for updates that depend on it


def test_the_table_is_complete():
    asset("adapters")
    folders = {path.name for path in (ASSETS / "adapters").iterdir() if path.is_dir()}
    assert folders == CONVERTED.keys() | REFUSED.keys() and not CONVERTED.keys() & REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(errors.LrcError) as caught:
        api.load_lora(asset(f"adapters/{name}"), allow_pickle=True)
    assert caught.value.code == REFUSED[name] and name in str(caught.value)


@pytest.mark.parametrize("name", CONVERTED)
def test_pickles_are_opened_only_when_allowed(name):
    path = asset(f"adapters/{name}")
    if (path / "adapter_model.safetensors").exists():
        assert len(api.load_lora(path).targets) == CONVERTED[name][0]
    else:
        with pytest.raises(errors.PickleError):
            api.load_lora(path)


@pytest.mark.parametrize("name", CONVERTED)
def test_lowrank(name, tmp_path):
    check(name, "lowrank", tmp_path, CONVERTED[name][1])


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in methods.module_names() if m != "lowrank"])
@pytest.mark.parametrize("name", CONVERTED)
def test_other_methods(name, method, tmp_path):
    floors = CONVERTED[name][1]
    check(name, method, tmp_path, floors if floors is None or (name in FLOORS and method in KEEP) else (0.0, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_A_BASE)
def test_bat(name, tmp_path):
    base = random_base(tmp_path / "base", api.load_lora(asset(f"adapters/{name}"), allow_pickle=True))
    check(name, "bone", tmp_path, (0.0, 0.0), variant="bat", base=base)


def check(name: str, method: str, folder, floors: tuple[float, ...] | None, **options) -> None:
    """At three budgets: what fits is written, read, and keeps its share; what does not is refused with the smallest
    size, which does fit. Without `floors` no budget fits, and only the whole adapter is converted."""
    lora = api.load_lora(asset(f"adapters/{name}"), allow_pickle=True)
    assert len(lora.targets) == CONVERTED[name][0]
    smallest, sizes = None, []
    for share, floor in zip(SHARES, (*(floors or (0, 0)), 0.0), strict=True):
        limit = int(lora.half_bytes * share)
        try:
            done = api.convert(lora, method, target_size=limit, **options)
        except errors.BudgetError as error:
            smallest = int(re.search(r"smallest possible file has ([\d,]+) bytes", str(error))[1].replace(",", ""))
            assert smallest > limit
            continue
        assert smallest is None and floors is not None
        assert done.fidelity is not None and floor - 1e-6 <= done.fidelity.captured <= 1
        assert done.sizes.adapter <= limit
        sizes.append(done.sizes.adapter)
        path = folder / f"{share}.lrc"
        file.write(done.compact, path)
        assert file.read(path).targets == done.compact.targets and len(done.compact.targets) == len(lora.targets)
    assert sizes == sorted(sizes, reverse=True) and (len(sizes) >= 2) == (floors is not None)
    if smallest is not None:
        assert api.convert(lora, method, target_size=smallest, **options).sizes.adapter <= smallest
    if floors is None and method == "lowrank":
        assert api.convert(lora, method).fidelity.captured >= 1 - 1e-6
