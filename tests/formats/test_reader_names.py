"""Names that PEFT does not write: wrappers of a training, no prefix, two prefixes, the adapter's name. By content."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from conftest import ADAPTERS, BASES

from lrconvert import api
from lrconvert.core import errors
from lrconvert.formats.readers.base import load
from lrconvert.formats.readers.shared import wrappers
from lrconvert.formats.readers.shared.options import ReadOptions

PREFIX = "base_model.model."
SOURCE = ADAPTERS / "llama-plain"
Rename = Callable[[str], str]

# What reports show, and a word of the warning.
SPELLED: dict[str, tuple[Rename, str]] = {
    "compiled": (lambda n: f"_orig_mod.{n}", "_orig_mod"),
    "compiled behind the prefix": (lambda n: n.replace(PREFIX, f"{PREFIX}_orig_mod."), "_orig_mod"),
    "parallel": (lambda n: f"module.{n}", "module is taken"),
    "parallel behind the prefix": (lambda n: n.replace(PREFIX, f"{PREFIX}module."), "module is taken"),
    "both": (lambda n: f"module._orig_mod.module.{n}", "_orig_mod"),
    "sharded": (lambda n: n.replace("layers.0.", "layers.0._fsdp_wrapped_module."), "_fsdp_wrapped_module"),
    "sharded and checkpointed": (
        lambda n: n.replace("layers.", "_fsdp_wrapped_module.layers.").replace(
            ".mlp.", "._checkpoint_wrapped_module.mlp."
        ),
        "_checkpoint_wrapped_module",
    ),
    "of Lightning": (lambda n: f"_forward_module.model.{n}", "_forward_module"),
    "no prefix": (lambda n: n.removeprefix(PREFIX), "do not begin with"),
    "the prefix twice": (lambda n: PREFIX + n, "not once in front"),
    "of a distributed checkpoint": (lambda n: f"model_state.model.{n}", "'model_state.model.base_model"),
    "an adapter's name": (lambda n: n.replace(".weight", ".vision.weight"), "'vision'"),
}


def renamed(folder: Path, rename: Rename, **config: Any) -> Path:
    shutil.copytree(SOURCE, folder)
    stored = safetensors.numpy.load_file(SOURCE / "adapter_model.safetensors")
    tensors = {rename(name): value for name, value in stored.items()}
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return folder


@pytest.mark.parametrize("name", SPELLED)
def test_names_are_read_by_content(name: str, tmp_path: Path) -> None:
    rename, word = SPELLED[name]
    plain, ours = load(SOURCE), load(renamed(tmp_path / "x", rename))
    assert ours.targets == plain.targets and ours.extras == plain.extras
    assert any(word in line for line in ours.warnings)
    alone = load(tmp_path / "x" / "adapter_model.safetensors")
    assert alone.targets == plain.targets


def test_two_spellings_of_one_target_are_refused(tmp_path: Path) -> None:
    stored = safetensors.numpy.load_file(SOURCE / "adapter_model.safetensors")
    halves = [name for name in stored if "layers.0.mlp.down_proj" in name]
    for number, rename in enumerate(rename for rename, _ in SPELLED.values()):
        more = {rename(name): stored[name] for name in halves}
        if set(more) <= set(stored) or "vision" in next(iter(more)):
            continue
        folder = renamed(tmp_path / str(number), lambda name: name)
        safetensors.numpy.save_file({**stored, **more}, folder / "adapter_model.safetensors")
        if any(name.startswith(f"{PREFIX}module.") for name in more):
            continue  # a module of that name: not every tensor is below it
        with pytest.raises(errors.TensorUnknownError, match="mean the same"):
            load(folder)


def test_a_module_called_module_keeps_its_name() -> None:
    """It is a wrapper only where the whole model is in it."""
    names = ["base_model.model.module.q.lora_A.weight", "base_model.model.head.lora_A.weight"]
    assert wrappers.plain(names) == (names, [])
    assert wrappers.plain(["module.lora_A.weight"]) == (["module.lora_A.weight"], [])
    assert wrappers.plain(["a_orig_mod.q.lora_A", "x._orig_mods.lora_A"])[1] == []
    assert wrappers.plain(["lora_unet__orig_mod_mid_block.alpha"])[0] == ["lora_unet_mid_block.alpha"]


def test_a_level_too_many_or_too_few_is_named_without_a_base(tmp_path: Path) -> None:
    """With a base, names are resolved; without one, only those that look odd are named."""
    few = renamed(tmp_path / "few", lambda n: n.replace(f"{PREFIX}model.", PREFIX))
    many = renamed(tmp_path / "many", lambda n: n.replace(PREFIX, f"{PREFIX}model."))
    for folder in (few, many):
        assert any("look odd" in line for line in load(folder).warnings)
        assert load(folder, ReadOptions(base=BASES / "tiny-llama")).warnings == ()
    assert load(SOURCE).warnings == ()
    bare = renamed(
        tmp_path / "features", lambda n: n.replace(f"{PREFIX}model.", PREFIX), task_type="FEATURE_EXTRACTION"
    )
    assert load(bare).warnings == ()  # AutoModel's names


def test_a_merge_of_wrapped_names_is_that_of_plain_ones(tmp_path: Path) -> None:
    base = BASES / "tiny-llama"
    api.merge(base, SOURCE, tmp_path / "plain", undo=False)
    api.merge(base, renamed(tmp_path / "x", SPELLED["sharded"][0]), tmp_path / "wrapped", undo=False)
    for shard in (tmp_path / "plain").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "wrapped" / shard.name).read_bytes()


# --- shards ---------------------------------------------------------------------------------------------------------


def sharded(folder: Path, ending: str = "safetensors") -> dict[str, str]:
    """Put the adapter's weights into two files with an index; returns which tensor is in which."""
    import torch

    shutil.copytree(SOURCE, folder)
    (folder / "adapter_model.safetensors").unlink()
    stored = safetensors.numpy.load_file(SOURCE / "adapter_model.safetensors")
    names = sorted(stored)
    places: dict[str, str] = {}
    for number, part in enumerate((names[:10], names[10:]), 1):
        file = f"adapter_model-{number:05d}-of-00002.{ending}"
        if ending == "bin":
            torch.save({name: torch.from_numpy(stored[name]) for name in part}, folder / file)
        else:
            safetensors.numpy.save_file({name: stored[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    write_index(folder, places, ending)
    return places


def write_index(folder: Path, places: dict[str, str], ending: str = "safetensors") -> None:
    (folder / f"adapter_model.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_a_sharded_adapter_is_the_whole_one(tmp_path: Path) -> None:
    """In safetensors and as pickles; by its folder and by its index."""
    whole = load(SOURCE)
    sharded(tmp_path / "x")
    assert load(tmp_path / "x") == whole
    assert load(tmp_path / "x" / "adapter_model.safetensors.index.json") == whole
    sharded(tmp_path / "y", "bin")
    with pytest.raises(errors.PickleError, match="allow_pickle"):
        load(tmp_path / "y")
    assert load(tmp_path / "y", ReadOptions(allow_pickle=True)) == whole


def test_shards_of_another_layout(tmp_path: Path) -> None:
    """A folder without a configuration whose file is in shards stands for that file."""
    places = {}
    for number, half in enumerate("AB", 1):
        name, file = f"unet.mid_block.proj_in.lora_{half}.weight", f"lora-{number:05d}-of-00002.safetensors"
        safetensors.numpy.save_file({name: np.ones((4, 4), np.float32)}, tmp_path / file)
        places[name] = file
    (tmp_path / "lora.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert [pair.target.name for pair in load(tmp_path).targets] == ["unet.mid_block.proj_in.weight"]


def test_shards_that_are_not_as_the_index_says(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    places = sharded(folder)
    first = min(places)
    for changed, code in (
        ({**places, first: "../adapter_model-00001-of-00002.safetensors"}, "E-PATH"),
        ({**places, first: "/etc/passwd"}, "E-PATH"),
        ({**places, first: "adapter_model-00002-of-00002.safetensors"}, "E-INDEX-MAP"),
        ({**places, "missing": places[first]}, "E-INDEX-MAP"),
        ({name: file for name, file in places.items() if name != first}, "E-INDEX-MAP"),
        ({**places, first: "adapter_model-00003-of-00003.safetensors"}, "E-IO-KIND"),
        ({}, "E-INDEX-MAP"),
    ):
        write_index(folder, changed)
        with pytest.raises(errors.LrcError) as caught:
            load(folder)
        assert caught.value.code == code and str(tmp_path) in str(caught.value)
    outside = tmp_path / "outside.safetensors"
    shutil.move(folder / places[first], outside)
    (folder / places[first]).symlink_to(outside)
    write_index(folder, places)
    with pytest.raises(errors.ShardPathError):
        load(folder)
    (folder / "adapter_model.safetensors.index.json").unlink()
    with pytest.raises(errors.FileKindError, match="no index of shards"):
        load(folder)


# --- what ZeRO-3 leaves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pickled", [False, True])
def test_empty_tensors_of_zero_3(pickled: bool, tmp_path: Path) -> None:
    """Left out with a warning where they are no part of the adapter; refused by name, with advice, where they are."""
    import torch

    stored = safetensors.numpy.load_file(SOURCE / "adapter_model.safetensors")
    empty, options = np.zeros(0, np.float32), ReadOptions(allow_pickle=pickled)

    def written(name: str, **config: Any) -> Path:
        folder = renamed(tmp_path / f"{len(list(tmp_path.iterdir()))}", lambda n: n, **config)
        if pickled:
            (folder / "adapter_model.safetensors").unlink()
            tensors = {key: torch.from_numpy(value.copy()) for key, value in {**stored, name: empty}.items()}
            torch.save(tensors, folder / "adapter_model.bin")
        else:
            safetensors.numpy.save_file({**stored, name: empty}, folder / "adapter_model.safetensors")
        return folder

    embedding = f"{PREFIX}model.embed_tokens.weight"
    lora = load(written(embedding), options)
    assert lora.targets == load(SOURCE).targets and lora.extras == ()
    assert any("ZeRO-3" in line and embedding in line for line in lora.warnings)
    factor = min(stored)
    for folder in (
        written(factor),
        written(f"{PREFIX}model.score.modules_to_save.weight"),
        written(embedding, modules_to_save=["embed_tokens"]),
    ):
        with pytest.raises(errors.ShapeError, match=r"ZeRO-3.*stage3_gather_16bit_weights_on_model_save"):
            load(folder, options)
