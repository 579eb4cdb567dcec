"""What training frameworks leave: folders with more beside the adapter, files of their own, and checkpoints in shards,
which are refused with the program that makes an adapter of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ADAPTERS, dense, write_files
from test_base_names import make_base

from lrconvert import api
from lrconvert.core import errors
from lrconvert.formats.readers.base import load
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.testing import samples

# What lies beside the adapter, by framework: names of files and of folders.
BESIDE = {
    "llama-factory": ("all_results.json", "training_args.bin", "trainer_state.json", "training_loss.png", "README.md"),
    "ms-swift": ("additional_config.json", "args.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    "unsloth": ("tokenizer.json", "chat_template.jinja", "optimizer.pt", "rng_state_0.pth", "trainer_state.json"),
    "megatron-bridge": ("README.md",),
    "deepspeed": ("global_step500/zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_to_fp32.py", "latest"),
}
# Checkpoints in shards: their files, and a word of what to do.
SHARDS = {
    "megatron-bridge": (("iter_0000100/__0_0.distcp", "latest_checkpointed_iteration.txt"), "export_adapter_ckpt"),
    "megatron-bridge, inside": (("run_config.yaml", ".metadata", "__0_0.distcp"), "export_adapter_ckpt"),
    "nemo 2": (("context/model.yaml", "weights/__0_0.distcp"), "llm.peft.export_lora"),
    "nemo 2, weights": (("adapter_metadata.json", "__0_0.distcp", ".metadata"), "llm.peft.export_lora"),
    "nemo 1": (("model_config.yaml", "model_weights.ckpt"), "llm.peft.export_lora"),
    "ms-swift": (("args.json", "iter_0000100/__0_0.distcp"), "with adapter_load, with to_hf"),
    "deepspeed": (("global_step500/mp_rank_00_model_states.pt", "zero_to_fp32.py"), "zero_to_fp32.py"),
    "deepspeed, inside": (("mp_rank_00_model_states.pt",), "zero_to_fp32.py"),
    "fsdp": (("pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp"), "accelerate merge-weights"),
    "fsdp, inside": ((".metadata", "__0_0.distcp"), "accelerate merge-weights"),
}


def put(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}" if path.suffix == ".json" else b"x")
    return folder


@pytest.mark.parametrize("framework", BESIDE)
def test_folders_of_frameworks_are_read(framework: str, tmp_path: Path) -> None:
    """PEFT's folder with what lies beside it, also as the only checkpoint in a folder of them."""
    plain = api.load_lora(ADAPTERS / "llama-plain")
    inside = tmp_path / "run" / "checkpoint-500"
    inside.parent.mkdir()
    write_files(inside, {path.name: path.read_bytes() for path in (ADAPTERS / "llama-plain").iterdir()})
    put(inside, BESIDE[framework])
    assert api.load_lora(inside).targets == plain.targets
    read = api.load_lora(tmp_path / "run")
    assert read.targets == plain.targets and "read from the folder 'checkpoint-500' inside" in read.warnings


@pytest.mark.parametrize("framework", SHARDS)
@pytest.mark.parametrize("configured", [False, True])
def test_shards_are_refused_with_the_converter(framework: str, configured: bool, tmp_path: Path) -> None:
    """Also where PEFT's configuration lies beside them."""
    names, words = SHARDS[framework]
    folder = put(tmp_path / "checkpoint", names)
    if configured:
        config = (ADAPTERS / "llama-plain" / "adapter_config.json").read_bytes()
        (folder / "adapter_config.json").write_bytes(config)
    with pytest.raises(errors.UnknownLayoutError) as caught:
        load(folder, ReadOptions(allow_pickle=True))
    assert words in (caught.value.fix or "") and "checkpoint" in str(caught.value)


def test_an_archive_of_nemo_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lora.nemo").write_bytes(b"x" * 1024)
    with pytest.raises(errors.UnknownLayoutError, match="archive of NeMo") as caught:
        load(tmp_path / "lora.nemo")
    assert "export_lora" in (caught.value.fix or "")


def test_state_of_a_training_is_no_adapter(tmp_path: Path) -> None:
    """One file of weights beside it is the adapter."""
    write_files(tmp_path / "run", samples.SAMPLES["diffusers"]().files)
    (tmp_path / "run" / "pytorch_lora_weights.safetensors").rename(tmp_path / "run" / "last.safetensors")
    put(tmp_path / "run", ("optimizer.bin", "scheduler.bin", "training_args.bin", "rng_state.pth", "scaler.pt"))
    assert len(load(tmp_path / "run").targets) == 2


# --- CLIP-LoRA ------------------------------------------------------------------------------------------------------


def clip_lora(
    path: Path, encoder: str, position: str, count: int, changes: dict[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Save nested dicts as CLIP-LoRA does; return the update of each layer of its list."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    weights, updates = {}, {}
    for number in range(count):
        a, b = torch.randn(2, 8), torch.randn(6, 2)
        weights[f"layer_{number}"] = {"v_proj": {"w_lora_A": a, "w_lora_B": b}}
        updates[number] = (b.double() @ a.double() * 4 / math.sqrt(2)).numpy()
    metadata = {"r": 2, "alpha": 4, "encoder": encoder, "params": ["v"], "position": position, **(changes or {})}
    torch.save({"weights": weights, "metadata": metadata}, path)
    return updates


@pytest.mark.parametrize(
    ("encoder", "position", "layers"),
    [
        ("text", "top2", ["text_model.10", "text_model.11"]),
        ("vision", "mid", [f"vision_model.{n}" for n in (4, 5, 6, 7)]),
        ("both", "top3", [f"{e}.{n}" for e in ("text_model", "vision_model") for n in (9, 10, 11)]),
        ("both", "all", [*(f"text_model.{n}" for n in range(12)), *(f"vision_model.{n}" for n in range(21))]),
        ("vision", "all", [f"vision_model.{n}" for n in range(12)]),
    ],
)
def test_clip_lora(encoder: str, position: str, layers: list[str], tmp_path: Path) -> None:
    """Layers are numbered as its tables have them, of ViT-B and ViT-L/14, the text encoder's first."""
    updates = clip_lora(tmp_path / "lora.pt", encoder, position, len(layers))
    names = [f"{e}.encoder.layers.{n}.self_attn.v_proj.weight" for e, n in (name.split(".") for name in layers)]
    lora = load(tmp_path / "lora.pt", ReadOptions(allow_pickle=True))
    assert isinstance(lora, LoraAdapter) and [pair.target.name for pair in lora.targets] == sorted(names)
    read = {pair.target.name: dense(pair) for pair in lora.targets}
    for number, name in enumerate(names):
        np.testing.assert_allclose(read[name], updates[number], rtol=1e-6)
    base = make_base(tmp_path / "base", dict.fromkeys(names, (6, 8)), {})
    assert load(tmp_path / "lora.pt", ReadOptions(allow_pickle=True, base=base)).targets == lora.targets


def test_clip_lora_needs_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "lora.pt"
    cases: list[tuple[int, dict[str, Any], str]] = [
        (2, {"encoder": "audio"}, "do not tell the layers"),
        (2, {"position": "somewhere"}, "do not tell the layers"),
        (5, {}, r"the file has 5 layers, encoder 'text' and position 'top2' are 2"),
        (2, {"r": 3}, "r = 3, the tensors have rank 2"),
        (2, {"alpha": None}, "says no alpha"),
    ]
    for count, changes, words in cases:
        clip_lora(path, "text", "top2", count, changes)
        with pytest.raises(errors.ConfigError, match=words):
            load(path, ReadOptions(allow_pickle=True))
    with pytest.raises(errors.PickleError):
        load(path)
