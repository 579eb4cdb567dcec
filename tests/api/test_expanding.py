"""`expanded` and `lrconvert expand`: the folder that a server loads, and the rank that it needs."""

from __future__ import annotations

import json
import os
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import BASES, FIXTURES, random_lora
from safetensors.numpy import load_file

import lrconvert
from lrconvert import api
from lrconvert.api import expanding
from lrconvert.cli import cli
from lrconvert.formats.expansions.sources import LocalFile
from lrconvert.testing import faults

GOLDEN = FIXTURES / "golden" / "v1"
WITH_FACTORS = [p for p in sorted(GOLDEN.glob("*/*.lrc")) if not p.with_suffix(".base.safetensors").exists()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small file, written long ago."""
    path = tmp_path / "small.lrc"
    lrconvert.write(lrconvert.convert(random_lora(), "lowrank", bits=8), path)
    os.utime(path, (1, 1))
    return path


def updates(folder: Path) -> dict[str, np.ndarray]:
    """The update of every module of a PEFT folder whose alpha is its rank."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and not config["rank_pattern"]
    tensors = load_file(folder / "adapter_model.safetensors")
    halves = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    return {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in halves}


def rank(folder: Path) -> int:
    return json.loads((folder / "adapter_config.json").read_text())["r"]


@pytest.mark.parametrize("path", WITH_FACTORS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_it_is_what_export_writes(path, tmp_path):
    """The same bytes, of every form, with a list beside them; asked for twice it is the same folder."""
    try:
        api.export(path, tmp_path / "exported", to="peft-lora")
    except lrconvert.ExportError as error:
        with pytest.raises(lrconvert.ExportError, match=error.code):
            lrconvert.expanded(path, tmp_path / "cache")
        return
    folder = lrconvert.expanded(path, tmp_path / "cache")
    assert lrconvert.expanded(path, tmp_path / "cache") == folder
    own = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "expansion.json"}
    assert own == {p.name: p.read_bytes() for p in (tmp_path / "exported").iterdir()}


def test_what_decides_the_folder(file, tmp_path):
    """Its content and how it is expanded; not its name, nor the size of the cache."""
    one = lrconvert.expanded(file, tmp_path / "cache")
    same = tmp_path / "other-name.lrc"
    same.write_bytes(file.read_bytes())
    assert lrconvert.expanded(same, tmp_path / "cache", cache_size="1GB") == one
    others = [
        lrconvert.expanded(file, tmp_path / "cache", **options)
        for options in ({"dtype": "BF16"}, {"dtype": "F16"}, {"rank": 8}, {"to": "raw"})
    ]
    assert len({one, *others}) == 5
    lrconvert.write(lrconvert.convert(random_lora(seed=1), "lowrank", bits=8), file, overwrite=True)
    assert lrconvert.expanded(file, tmp_path / "cache") not in (one, *others)


def test_another_release_makes_it_again(file, tmp_path, monkeypatch):
    one = lrconvert.expanded(file, tmp_path / "cache")
    monkeypatch.setattr(expanding, "__version__", "9.9")
    assert lrconvert.expanded(file, tmp_path / "cache") != one


def test_a_hit_reads_neither_file_nor_weights(file, tmp_path, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("read")

    one = lrconvert.expanded(file, tmp_path / "cache")
    monkeypatch.setattr("lrconvert.formats.lrc.file.read", never)
    monkeypatch.setattr("lrconvert.formats.expansions.sources.read_digest", never)
    monkeypatch.setattr("lrconvert.formats.expansions.cache.file_digest", never)
    assert lrconvert.expanded(file, tmp_path / "cache") == one


def test_where_the_cache_is(file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    monkeypatch.delenv("LRCONVERT_CACHE", raising=False)
    assert lrconvert.expanded(file).parent == tmp_path / "own" / "lrconvert"
    monkeypatch.setenv("LRCONVERT_CACHE", str(tmp_path / "named"))
    assert lrconvert.expanded(file).parent == tmp_path / "named"


def test_a_broken_file(file, tmp_path):
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(lrconvert.LrcError, match=r"small\.lrc"):
        lrconvert.expanded(file, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name not in ("locks", "digests")]


def test_what_is_no_file(tmp_path):
    with pytest.raises(lrconvert.FileKindError, match="no such file"):
        lrconvert.expanded(tmp_path / "absent.lrc", tmp_path / "cache")
    with pytest.raises(lrconvert.UnknownLayoutError, match="servers load a LoRA as it is"):
        lrconvert.expanded(FIXTURES / "adapters" / "llama-plain", tmp_path / "cache")
    with pytest.raises(lrconvert.ArgumentError, match="peft-lora"):
        lrconvert.expanded(GOLDEN / "lowrank" / "0.lrc", tmp_path / "cache", to="nothing")


def test_the_disk_is_full(file, tmp_path):
    with faults.installed(faults.Faulty(12, 28, persistent=True)), pytest.raises(lrconvert.FileWriteError):
        lrconvert.expanded(file, tmp_path / "cache")


# --- ranks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def columns(tmp_path: Path) -> Path:
    """Columns of the updates of a LoRA of rank 4, twelve of each: factors of rank 12."""
    path = tmp_path / "columns.lrc"
    lrconvert.write(lrconvert.convert(random_lora(), "sbora", variant="fa", rank=12, bits=16), path)
    return path


def test_an_exact_smaller_rank(columns, tmp_path):
    """The product has the rank of the LoRA that the columns are of, within the rounding of 16 bits."""
    facts = lrconvert.inspect(columns)["serving"]
    assert (facts["stored"], facts["close"], facts["vllm_max_lora_rank"]) == (12, 4, 16)
    whole = lrconvert.expanded(columns, tmp_path / "cache")
    with pytest.warns(UserWarning, match="cut to rank 4"):
        small = lrconvert.expanded(columns, tmp_path / "cache", max_rank=4)
    assert (rank(whole), rank(small)) == (12, 4)
    before, after = updates(whole), updates(small)
    for name, update in before.items():
        assert np.linalg.norm(after[name] - update) < 2e-3 * np.linalg.norm(update)


def test_the_error_is_true(columns, tmp_path):
    """What is stated is what was lost, and no other rank-2 update is nearer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = updates(lrconvert.expanded(columns, tmp_path / "cache"))
        small = lrconvert.expanded(columns, tmp_path / "cache", max_rank=2, max_error="90%")
    stated = json.loads((small / "expansion.json").read_text())["facts"]["reduced"]
    after = updates(small)
    lost = sum(np.sum((after[name] - update) ** 2) for name, update in whole.items())
    best = sum(np.sum(np.linalg.svd(update, compute_uv=False)[2:] ** 2) for update in whole.values())
    total = sum(np.sum(update**2) for update in whole.values())
    assert stated["error"] == pytest.approx(np.sqrt(lost / total), rel=1e-3)
    assert lost == pytest.approx(best, rel=1e-3)
    assert stated["rank"] == rank(small) == 2 and stated["targets"] == len(whole)


def test_too_much_is_refused_with_the_rank_that_does(columns, tmp_path):
    with pytest.raises(lrconvert.ExportError, match=r"at rank 2 .* more than 0\.01\. Rank 4 loses .*max_error"):
        lrconvert.expanded(columns, tmp_path / "cache", max_rank=2)


def test_a_rank_that_is_not_above_changes_nothing(file, tmp_path):
    """Factors of no more than the rank stay as they are, to the bit."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = lrconvert.expanded(file, tmp_path / "cache")
        other = lrconvert.expanded(file, tmp_path / "cache", max_rank=4)
    name = "adapter_model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()


def test_updates_that_depend_on_the_base(tmp_path):
    bat = next(p for p in sorted(GOLDEN.glob("bone/*.lrc")) if p not in WITH_FACTORS)
    assert lrconvert.inspect(bat)["serving"] is None
    for options in ({}, {"max_rank": 8}):
        with pytest.raises(lrconvert.LrcError, match="depend on the base"):
            lrconvert.expanded(bat, tmp_path / "cache", **options)


def test_a_source_may_be_refused(file, tmp_path):
    """Before anything is made, and when it is there."""

    def refuse(facts: object, load: object) -> None:
        raise lrconvert.FingerprintError("another base")

    options = expanding.ExpandOptions()
    for _ in range(2):
        with pytest.raises(lrconvert.FingerprintError, match=r"small\.lrc"):
            expanding.expand(LocalFile(file), tmp_path / "cache", options, accept=refuse)
        lrconvert.expanded(file, tmp_path / "cache")


def test_a_user_without_a_home_is_told_to_name_a_folder(file, monkeypatch):
    """As containers have them, under a number that no list of users knows."""

    def nowhere() -> None:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("LRCONVERT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(expanding.Path, "home", nowhere)
    with pytest.raises(lrconvert.OptionError, match="LRCONVERT_CACHE"):
        lrconvert.expanded(file)


# --- the command line ---------------------------------------------------------------------------------------------


def run(*words: object) -> tuple[str, str]:
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        cli.main(["expand", *map(str, words)], standalone_mode=False)
    return out.getvalue(), err.getvalue()


def test_the_command_prints_the_folder(file, tmp_path):
    """On stdout alone, for a shell; a second time without a word beside."""
    out, err = run(file, "--cache", tmp_path / "cache", "--dtype", "BF16")
    folder = lrconvert.expanded(file, tmp_path / "cache", dtype="BF16")
    assert out == f"{folder}\n" and "rounded to BF16" in err
    assert run(file, "--cache", tmp_path / "cache", "--dtype", "BF16") == (out, "")
    facts = json.loads(run(file, "--cache", tmp_path / "cache", "--dtype", "BF16", "--json")[0])
    assert facts["folder"] == str(folder) and facts["was_there"]


def test_the_command_says_every_time_what_is_lost(columns, tmp_path):
    for _ in range(2):
        assert "cut to rank 4" in run(columns, "--cache", tmp_path / "cache", "--max-rank", 4)[1]


def test_inspect_says_the_rank(columns):
    done = CliRunner().invoke(cli, ["inspect", str(columns)])
    assert "a server needs rank 12 (vLLM: --max-lora-rank 16); 4 loses" in done.stdout
    assert "`lrconvert expand --max-rank 4`" in done.stdout


@pytest.mark.medium
def test_a_base_names_the_modules(tmp_path):
    """As `export --base` does; another configuration is another folder."""
    small = lrconvert.convert(FIXTURES / "adapters" / "llama-plain", "lowrank")
    lrconvert.write(small, tmp_path / "small.lrc")
    plain = lrconvert.expanded(tmp_path / "small.lrc", tmp_path / "cache")
    named = lrconvert.expanded(tmp_path / "small.lrc", tmp_path / "cache", base=BASES / "tiny-llama")
    assert plain != named and rank(plain) == rank(named)
