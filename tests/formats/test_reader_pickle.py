"""Pickled adapters: only if the user says so, only tensors, and the same adapter as the safetensors file beside it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import peft_oracle as oracle
import pytest
import safetensors.torch
import torch
from conftest import ADAPTERS, asset
from peft_oracle import seeded
from torch import nn

from lrconvert import api
from lrconvert.core import errors
from lrconvert.formats.readers.base import load
from lrconvert.formats.readers.shared.options import ReadOptions

ALLOWED = ReadOptions(allow_pickle=True)


@pytest.fixture
def folder(tmp_path):
    """A PEFT folder without weights, and a function that writes them as a pickle."""
    shutil.copy(ADAPTERS / "llama-plain" / "adapter_config.json", tmp_path)
    return tmp_path


def state():
    return safetensors.torch.load_file(ADAPTERS / "llama-plain" / "adapter_model.safetensors")


def saved(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["llama-plain", "llama-bf16", "llama-dora", "bert-classifier", "gpt2-conv1d"])
def test_a_pickle_gives_what_its_safetensors_twin_gives(name, legacy, tmp_path):
    shutil.copy(ADAPTERS / name / "adapter_config.json", tmp_path)
    values = safetensors.torch.load_file(ADAPTERS / name / "adapter_model.safetensors")
    torch.save(values, tmp_path / "adapter_model.bin", _use_new_zipfile_serialization=not legacy)
    assert load(tmp_path, ALLOWED) == load(ADAPTERS / name)
    assert load(tmp_path / "adapter_model.bin", ALLOWED) == load(ADAPTERS / name)


def test_safetensors_go_first(folder):
    torch.save({"rubbish": torch.ones(1)}, folder / "adapter_model.bin")
    shutil.copy(ADAPTERS / "llama-plain" / "adapter_model.safetensors", folder)
    assert load(folder, ALLOWED) == load(folder) == load(ADAPTERS / "llama-plain")


def test_views_and_shared_memory(folder):
    """Tensors that are not contiguous, and two that share their memory."""
    turned = {k: v.T.contiguous().T for k, v in state().items()}
    torch.save(turned, folder / "adapter_model.bin")
    assert load(folder, ALLOWED) == load(ADAPTERS / "llama-plain")
    shared = torch.ones(64, 8)
    names = [f"base_model.model.{m}.lora_{h}.weight" for m in "xy" for h in "AB"]
    torch.save({n: shared.T if ".lora_A." in n else shared for n in names}, folder / "adapter_model.bin")
    assert len(load(folder, ALLOWED).targets) == 2


@pytest.mark.parametrize("wrap", ["state_dict", "model", "lora"])
def test_a_dict_in_a_dict_is_read(wrap, folder):
    """As training scripts save them, with settings beside, which are named where they are not used."""
    torch.save({wrap: state(), "epoch": 3, "names": ["a", "b"]}, folder / "adapter_model.bin")
    ours, plain = load(folder, ALLOWED), load(ADAPTERS / "llama-plain")
    assert ours.targets == plain.targets and ours.extras == plain.extras
    assert any("epoch = 3" in line for line in ours.warnings)


def test_a_nested_pickle_that_states_its_alpha_and_rank(tmp_path):
    """It needs no --alpha; another rank is refused by what it says, and so are layouts that are not read."""
    factors = {f"m.q.lora_{half}": torch.ones(shape) for half, shape in (("A", (2, 8)), ("B", (6, 2)))}
    path = tmp_path / "lora.pt"
    for said in ({"r": 2, "alpha": 6}, {"config": {"r": 2, "lora_alpha": 6.0}}):
        torch.save({"weights": factors, **said}, path)
        assert [pair.scale for pair in load(path, ALLOWED).targets] == [3.0]
    torch.save({"weights": factors, "r": 4, "alpha": 6}, path)
    with pytest.raises(errors.PairError, match="states 4"):
        load(path, ALLOWED)
    torch.save({"weights": factors}, path)
    with pytest.raises(errors.ConfigError, match="alpha="):
        load(path, ALLOWED)
    layer = {"q_proj": {"w_lora_A": torch.ones(2, 8), "w_lora_B": torch.ones(8, 2)}}
    torch.save({"weights": {"layer_0": layer}, "metadata": {"r": 2, "alpha": 1, "params": ["q", "k"]}}, path)
    with pytest.raises(errors.ConfigError, match="CLIP-LoRA"):
        load(path, ALLOWED)


def test_negated_views_have_their_numbers(folder):
    """torch keeps a sign beside the numbers of some views, which the bytes of a tensor do not have."""
    torch.save(
        {k: torch._neg_view(v) if ".lora_B." in k else v for k, v in state().items()}, folder / "adapter_model.bin"
    )
    ours, plain = load(folder, ALLOWED), load(ADAPTERS / "llama-plain")
    for one, other in zip(ours.targets, plain.targets, strict=True):
        assert (one.A == other.A).all() and (one.B == -other.B).all()


@pytest.mark.filterwarnings("ignore")
def test_the_real_reason_is_said_of_a_single_file(tmp_path):
    """A limit, a dtype or a name keeps its code where no configuration says what the file is."""
    for case in ("a repeating view", "one memory, many tensors", "complex numbers", "many dimensions", "a long name"):
        make, error, text = HOSTILE[case]
        (tmp_path / "lora.pt").write_bytes(make())
        with pytest.raises(error, match=text) as caught:
            load(tmp_path / "lora.pt", ALLOWED)
        assert "lora.pt" in str(caught.value)


def test_file_names_that_are_no_utf_8(tmp_path):
    """Linux allows any bytes; what is said of them is one line of text."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/lora-\xff.pt")
    torch.save({"m.q.lora_A": torch.ones(2, 8), "m.q.lora_B": torch.ones(6, 2)}, path)
    assert len(api.load_lora(path, allow_pickle=True, alpha=2.0).targets) == 1
    for options in ({}, {"allow_pickle": True}):
        with pytest.raises(errors.LrcError) as caught:
            api.load_lora(path, **options)
        assert str(caught.value).isprintable() and "lora-" in str(caught.value)
    command = [sys.executable, "-m", "lrconvert.cli", "inspect", path, "--allow-pickle", "--alpha", "2", "--json"]
    done = subprocess.run(command, capture_output=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["targets"][0]["rank"] == 2, done.stderr


class Bomb:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def compressed() -> bytes:
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(state()))) as source,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for entry in source.infolist():
            out.writestr(entry.filename, source.read(entry))
    return buffer.getvalue()


def repeated() -> bytes:
    return saved({"base_model.model.x.lora_A.weight": torch.ones(1).expand(1 << 20, 1 << 20)})


def named(value, name="base_model.model.x.lora_A.weight") -> bytes:
    return saved({name: value})


HOSTILE = {
    "a list": (lambda: saved([torch.ones(1)]), errors.EmptyAdapterError, "no lora_A"),
    "a list of lists": (lambda: saved([[torch.ones(1)]]), errors.PickleError, "entry '0' is a list"),
    "a tuple": (lambda: saved((torch.ones(1),)), errors.PickleError, "holds a tuple"),
    "a value that is no tensor": (lambda: saved({**state(), "x": {1, 2}}), errors.PickleError, "'x' is a set"),
    "a name that is no text": (lambda: saved({3: torch.ones(1)}), errors.PickleError, "entry '3'"),
    "the state of a training": (lambda: saved({"model": state(), "optimizer": {"state": {0: torch.ones(1)}}}),
                                errors.PickleError, "'optimizer.state.0' is a Tensor.*tensors alone"),
    "a module": (lambda: saved(nn.Linear(2, 2)), errors.PickleError, "more than tensors"),
    "cut off": (lambda: saved(state())[:-5000], errors.PickleError, "zip|damaged"),
    "rubbish": (lambda: b"PK" + os.urandom(500), errors.PickleError, "zip"),
    "text": (lambda: b"hello", errors.PickleError, "damaged"),
    "empty": (lambda: b"", errors.PickleError, "damaged"),
    "compressed": (compressed, errors.PickleError, "compressed"),
    "a repeating view": (repeated, errors.LimitError, "of which 4 are stored"),
    "one memory, many tensors": (lambda: saved({f"base_model.model.{i}.lora_A.weight": s for s in [torch.ones(512,
        512)] for i in range(50)}), errors.LimitError, "the tensors have"),
    "complex numbers": (lambda: named(torch.ones(2, 2, dtype=torch.complex64)), errors.DtypeError, "complex64"),
    "a sparse tensor": (lambda: named(torch.ones(2, 2).to_sparse()), errors.LrcError, "sparse|more than"),
    "no numbers": (lambda: named(torch.ones(0, 2)), errors.ShapeError, "lora_A"),
    "many dimensions": (lambda: named(torch.ones([1] * 9)), errors.ShapeError, "lora_A"),
    "control characters": (lambda: named(torch.ones(1), "a\x1b[31m"), errors.TensorNameError, "control"),
    "a long name": (lambda: named(torch.ones(1), "a" * 5000), errors.TensorNameError, "too long"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", HOSTILE)
def test_pickles_that_are_refused(case, folder):
    make, error, text = HOSTILE[case]
    (folder / "adapter_model.bin").write_bytes(make())
    with pytest.raises(error, match=text) as caught:
        load(folder, ALLOWED)
    assert "adapter_model.bin" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    with pytest.raises(errors.PickleError, match="allow_pickle"):
        load(folder)


@pytest.mark.parametrize("wrap", [lambda bomb: pickle.dumps(bomb), lambda bomb: saved({"a": bomb}), saved])
def test_no_code_of_a_pickle_runs(wrap, folder):
    """The same bytes do run code where they are unpickled without care."""
    bomb = folder / "created"
    data = wrap(Bomb(bomb))
    (folder / "adapter_model.bin").write_bytes(data)
    with pytest.raises(errors.PickleError, match="more than tensors"):
        load(folder, ALLOWED)
    assert not bomb.exists()
    torch.load(io.BytesIO(data), weights_only=False) if data[:2] == b"PK" else pickle.loads(data)
    assert bomb.exists()


def test_a_pickle_under_the_name_of_safetensors_stays_refused(folder):
    (folder / "adapter_model.safetensors").write_bytes(saved(state()))
    with pytest.raises(errors.PickleError):
        load(folder, ALLOWED)


def test_an_old_torch_is_not_trusted_with_pickles(folder, monkeypatch):
    torch.save(state(), folder / "adapter_model.bin")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(errors.DependencyError, match=r"2\.5\.1"):
        load(folder, ALLOWED)


@pytest.mark.medium
def test_every_command_that_reads_an_adapter_takes_the_option(folder, tmp_path):
    torch.save(state(), folder / "adapter_model.bin")
    plain, base = str(ADAPTERS / "llama-plain"), str(ADAPTERS.parent / "bases" / "tiny-llama")

    def run(*words):
        command = [sys.executable, "-m", "lrconvert.cli", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    assert run("lora-to-lowrank", plain, "-o", "x.lrc", "--bits", 12).returncode == 0
    commands = [
        ("inspect", folder, "--json"),
        ("compare", folder, "x.lrc", "--json"),
        ("lora-to-lowrank", folder, "-o", "y.lrc", "--bits", 12, "--overwrite"),
        ("merge", base, folder, "-o", "out", "--dry-run"),
        ("export", "x.lrc", "-o", "exported", "--to", "peft-lora", "--source", folder, "--overwrite"),
    ]
    for words in commands:
        refused, done = run(*words), run(*words, "--allow-pickle")
        assert refused.returncode == 1 and refused.stderr.startswith("E-PICKLE"), words
        assert done.returncode == 0, (words, done.stderr)
    assert json.loads(run(*commands[1], "--allow-pickle").stdout)["files"][0]["captured"] > 0.999


def test_the_api_takes_the_option(folder):
    torch.save(state(), folder / "adapter_model.bin")
    for verb in (api.load_lora, api.load, api.inspect):
        with pytest.raises(errors.PickleError):
            verb(folder)
        assert verb(folder, allow_pickle=True)
    compact = api.convert(api.load_lora(folder, allow_pickle=True), "lowrank", bits=12).compact
    assert api.compare(folder, [compact], allow_pickle=True)[0].captured > 0.999


# --- adapters that PEFT 0.6 saved as pickles, with the outputs it had ------------------------------------------------


class MLP(nn.Module):
    """The models of PEFT's regression tests."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 2)

    def forward(self, x):
        return self.lin1(self.lin0(x.float()).relu()).log_softmax(-1)


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(5, 10, 3)
        self.lin0 = nn.Linear(10, 2)

    def forward(self, x):
        return self.lin0(self.conv2d(x.float().reshape(2, 5, 3, 3)).relu().flatten(1)).log_softmax(-1)


@pytest.mark.parametrize(
    ("name", "model"), [("lora_mlp", MLP), ("lora_mlp_modules_to_save", MLP), ("lora_conv2d", Conv)]
)
def test_outputs_of_peft_0_6(name, model):
    path = asset(f"adapters/peft_regression_{name}")
    wanted = torch.load(path / "output.pt", weights_only=True, map_location="cpu").double()
    x = torch.arange(90).reshape(9, 10)
    changed = oracle.merged(load(path, ALLOWED), seeded(model)())
    assert oracle.difference(oracle.outputs(changed, x), wanted) <= 1e-5
    assert oracle.difference(oracle.outputs(seeded(model)(), x), wanted) > 0.05
