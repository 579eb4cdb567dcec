"""Every real adapter, file by file: converted, with at least the share that it kept when this was written, or refused
with its code. Skipped, by name, where they are absent."""

from __future__ import annotations

import math
import re
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from conftest import ASSETS, asset, dense
from models import random_base

from lrconvert import api
from lrconvert.core import errors
from lrconvert.core.limits import MIB
from lrconvert.formats.lrc import file
from lrconvert.methods import base as methods

# Folder: targets, and the smallest captured share of lowrank at 8 % and 4 % of the bytes, less a little; None where the
# adapter is smaller than the header of a file, and is converted without a budget.
CONVERTED: dict[str, tuple[int, tuple[float, float] | None]] = {
    "bloom_lora": (48, (0.92, 0.85)),
    "cloneofsimo_pt": (128, (0.9, 0.73)),
    "cloneofsimo_safetensors/analog_svd_rank4.safetensors": (192, (0.87, 0.8)),
    "cloneofsimo_safetensors/lora_disney.safetensors": (192, (0.68, 0.38)),
    "cloneofsimo_safetensors/lora_disney_inpainting.safetensors": (192, (0.67, 0.37)),
    "deltacompression_poc": (24, (0.75, 0.65)),
    "distilbert_imdb": (12, (0.93, 0.85)),
    "gemma3_270m_svg_adapter": (72, (0.72, 0.50)),
    "gpt2_tigrinya": (36, (0.93, 0.85)),
    "ih_bloom560m_r10": (24, (0.95, 0.9)),
    "ih_gpt2_r4_a16_biaslora": (36, (0.76, 0.54)),
    "ih_tinygpt2_r4": (6, None),
    "mlx_cli": (8, (0.83, 0.65)),
    "mlx_cli/0000100_adapters.safetensors": (8, (0.83, 0.65)),
    "mlx_vtboyarc": (8, (0.85, 0.71)),
    "monteclora_roberta_mrpc_230": (24, (0.93, 0.88)),
    "mountain_v1_binary": (36, (0.89, 0.74)),
    "peft_regression_adalora_mlp": (1, None),
    "peft_regression_lora_conv2d": (1, None),
    "peft_regression_lora_mlp": (1, None),
    "peft_regression_lora_mlp_modules_to_save": (1, None),
    "peft_regression_lora_opt-125m_bnb_4bit": (24, (0.51, 0.26)),
    "phi1_5_r4": (48, (0.73, 0.51)),
    "sam_lora/lora_rank16.safetensors": (24, (0.95, 0.92)),
    "sam_lora/lora_rank2.safetensors": (24, (0.71, 0.35)),
    "sam_lora/lora_rank4.safetensors": (24, (0.89, 0.69)),
    "sam_lora/lora_rank6.safetensors": (24, (0.93, 0.8)),
    "sam_lora/lora_rank8.safetensors": (24, (0.94, 0.87)),
    "sd_lora_pokemon": (128, (0.68, 0.41)),
    "t5_small_rec": (36, (0.94, 0.92)),
}
# Options of sources that do not state something themselves.
OPTIONS = {"mlx_vtboyarc": {"alpha": 160.0}}
# The norm of all updates together, of layouts that state a scale, a half or an orientation in their own way; worked out
# from the plain tensors by the definitions of the layouts.
NORMS = {
    "cloneofsimo_pt": 8.56619,
    "cloneofsimo_safetensors/analog_svd_rank4.safetensors": 1.69961,
    "cloneofsimo_safetensors/lora_disney.safetensors": 132.84299,
    "cloneofsimo_safetensors/lora_disney_inpainting.safetensors": 99.73658,
    "mlx_cli": 2.99782,
    "mlx_cli/0000100_adapters.safetensors": 2.11312,
    "mlx_vtboyarc": 7.87114,
    "sam_lora/lora_rank16.safetensors": 2.22932,
    "sam_lora/lora_rank2.safetensors": 1.14314,
    "sam_lora/lora_rank4.safetensors": 1.28764,
    "sam_lora/lora_rank6.safetensors": 1.6294,
    "sam_lora/lora_rank8.safetensors": 1.70083,
    "sd_lora_pokemon": 23.98765,
}
# Memory for the largest of them, in bytes of its file: a reader holds its factors, and one tensor besides.
MOST_MEMORY = 4
REFUSED = {
    "cloneofsimo_safetensors": "E-CONFIG",  # three adapters in one folder
    "lerobot_bin": "E-NOT-LORA",
    "lycoris_lokr": "E-CONFIG",
    "mt0_large_ia3": "E-BASE",  # without its base
    "peft_regression_ia3_mlp": "E-BASE",
    "sam_lora": "E-CONFIG",
}
# LoKr, which tests/formats/test_other_kinds.py reads.
AS_LORA = tuple(f"lycoris_lokr/smart_falcon_{rank}_lokr.safetensors" for rank in (4, 8, 16))
SHARES = (0.08, 0.04, 0.016)
# These keep the same shares in these forms; the others work by statistics, or not at all.
FLOORS = ("distilbert_imdb", "gemma3_270m_svg_adapter", "gpt2_tigrinya", "deltacompression_poc")
KEEP = ("vblora", "nola")
ON_A_BASE = ("distilbert_imdb", "deltacompression_poc", "t5_small_rec")  # a random one, for updates that depend on it


def test_the_table_is_complete():
    asset("adapters")
    folders = {path.name for path in (ASSETS / "adapters").iterdir() if path.is_dir()}
    rows = CONVERTED.keys() | REFUSED.keys() | set(AS_LORA)
    assert folders == {name.partition("/")[0] for name in rows} and not CONVERTED.keys() & REFUSED.keys()
    several = {name for name, code in REFUSED.items() if code == "E-CONFIG"}
    for name in several:
        files = {f"{name}/{path.name}" for path in (ASSETS / "adapters" / name).glob("*.safetensors")}
        assert len(files) > 1 and files == {row for row in rows if row.startswith(f"{name}/")}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(errors.LrcError) as caught:
        api.load_lora(asset(f"adapters/{name}"), allow_pickle=True)
    assert caught.value.fix
    assert caught.value.code == REFUSED[name] and name in str(caught.value)


def test_settings_without_matrices(tmp_path):
    """lerobot_bin holds alphas and dropouts alone, which shows when its configuration says what it lacks."""
    source = asset("adapters/lerobot_bin") / "adapter_model.bin"
    (tmp_path / "adapter_model.bin").write_bytes(source.read_bytes())
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
    with pytest.raises(errors.EmptyAdapterError, match=r"606 settings .* no matrices"):
        api.load_lora(tmp_path, allow_pickle=True)
    (tmp_path / "x").mkdir()
    (tmp_path / "adapter_model.bin").rename(tmp_path / "x" / "lora.bin")
    with pytest.raises(errors.EmptyAdapterError, match="606 settings"):
        api.load_lora(tmp_path / "x", allow_pickle=True)


@pytest.mark.parametrize("name", CONVERTED)
def test_pickles_are_opened_only_when_allowed(name):
    path = asset(f"adapters/{name}")
    pickled = path.is_dir() and not [p for p in path.iterdir() if p.suffix in (".safetensors", ".npz")]
    if not pickled:
        assert len(api.load_lora(path, **OPTIONS.get(name, {})).targets) == CONVERTED[name][0]
    else:
        with pytest.raises(errors.PickleError):
            api.load_lora(path)


@pytest.mark.medium
@pytest.mark.parametrize("name", NORMS)
def test_norms_and_memory(name):
    path = asset(f"adapters/{name}")
    pytest.importorskip("torch")  # what loading it takes is not the reader's
    tracemalloc.start()
    lora = api.load_lora(path, allow_pickle=True, **OPTIONS.get(name, {}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    total = math.sqrt(sum(np.sum(dense(pair) ** 2) for pair in lora.targets))
    assert total == pytest.approx(NORMS[name], rel=1e-5)
    assert peak < MOST_MEMORY * 2 * lora.half_bytes + MIB


@pytest.mark.medium
@pytest.mark.parametrize("name", CONVERTED)
def test_lowrank(name, tmp_path):
    check(name, "lowrank", tmp_path, CONVERTED[name][1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in CONVERTED for method in methods.module_names() if method != "lowrank"],
)
def test_other_methods(name, method, tmp_path):
    """A sample where VB-LoRA fits for minutes: adapters get one of the three budgets, by turns."""
    floors = CONVERTED[name][1]
    sampled = method == "vblora" and floors is not None
    turn = [*CONVERTED].index(name) % len(SHARES)
    kept = floors if floors is None or (name in FLOORS and method in KEEP) else (0.0, 0.0)
    check(name, method, tmp_path, kept, SHARES[turn : turn + 1] if sampled else SHARES)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in FLOORS if name in CONVERTED])
def test_vblora_at_every_budget(name, tmp_path):
    check(name, "vblora", tmp_path, CONVERTED[name][1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_A_BASE)
def test_bat(name, tmp_path):
    base = random_base(tmp_path / "base", api.load_lora(asset(f"adapters/{name}"), allow_pickle=True))
    check(name, "bone", tmp_path, (0.0, 0.0), variant="bat", base=base)


def check(
    name: str, method: str, folder, floors: tuple[float, ...] | None, shares: Sequence[float] = SHARES, **options
) -> None:
    """At these budgets: what fits is written, read, and keeps its share; what does not is refused with the smallest
    size, which does fit. Without `floors` no budget fits, and only the whole adapter is converted."""
    lora = api.load_lora(asset(f"adapters/{name}"), allow_pickle=True, **OPTIONS.get(name, {}))
    assert len(lora.targets) == CONVERTED[name][0]
    smallest, sizes = None, []
    for share in shares:
        floor = (*(floors or (0, 0)), 0.0)[SHARES.index(share)]
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
    assert sizes == sorted(sizes, reverse=True)
    assert shares != SHARES or (len(sizes) >= 2) == (floors is not None)
    if smallest is not None:
        assert api.convert(lora, method, target_size=smallest, **options).sizes.adapter <= smallest
    if floors is None and method == "lowrank":
        assert api.convert(lora, method, bits=12).fidelity.captured >= 1 - 1e-6
