"""What a user says of a layout is taken by every verb and command that reads an adapter, and never without effect."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ADAPTERS, BASES

from lrconvert import api, cli
from lrconvert.core import errors
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.merge import Scaled
from lrconvert.testing import layouts
from lrconvert.testing.layouts import Known

BASE = BASES / "tiny-llama"
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """An adapter that states no alpha: rank 2, which 6 makes a scale of 3."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype("<f4") for shape in ((2, 64), (64, 2)))
    (tmp_path / "raw").mkdir()
    for name, data in layouts.raw([Known(MODULE, a, b, 6.0)]).items():
        (tmp_path / "raw" / name).write_bytes(data)
    return tmp_path / "raw"


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    compact = api.convert(api.load_lora(ADAPTERS / "llama-plain"), "lowrank", bits=14).compact
    api.write(compact, tmp_path / "ours.lrc")
    return tmp_path / "ours.lrc"


def test_every_verb_takes_them() -> None:
    """One that reads adapters by their path takes all three options at once; so does its command."""
    verbs = {name: getattr(api, name) for name in api.__all__}
    sources = {name: inspect.getsource(verb) for name, verb in verbs.items() if inspect.isfunction(verb)}
    reading = {name for name, text in sources.items() if "_reading(" in text}
    assert reading >= {"check", "load", "load_all", "load_lora", "inspect", "compare", "export", "merge", "verify",
                       "attach", "statistics", "refine"}  # fmt: skip


def test_every_command_takes_them() -> None:
    context = click.Context(cli.cli)
    commands = {name: cli.cli.get_command(context, name) for name in cli.cli.list_commands(context)}
    flags = {
        name: {flag for param in command.params for flag in param.opts} for name, command in commands.items() if command
    }
    assert set(flags) == set(commands)
    reading = {name for name, opts in flags.items() if "--allow-pickle" in opts}
    assert reading == {name for name, opts in flags.items() if {"--from", "--alpha"} <= opts} - {"check"}
    assert {"--from", "--alpha"} <= flags["check"]
    assert reading >= {"merge-into-base", "verify", "compare", "statistics", "inspect", "refine", "export", "compress",
                       "lora-to-alora", "lora-to-bone"}  # fmt: skip


def run(*words: Any) -> str:
    done = CliRunner().invoke(cli.cli, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_merge_of_several(raw: Path, ours: Path, tmp_path: Path) -> None:
    """What is said holds for the file of another tool; the lrconvert file beside it states all itself."""
    said = {"layout": "raw", "alpha": 6.0}
    by_hand = [Scaled(api.load(raw, base=BASE, **said), 0.5), Scaled(api.read(ours))]
    api.merge(BASE, by_hand, tmp_path / "one", undo=False)
    command = ("merge-into-base", BASE, f"{raw}=0.5", ours, "-o", tmp_path / "two", "--no-undo", "-q")
    run(*command, "--from", "raw", "--alpha", 6)
    for shard in (tmp_path / "one").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "two" / shard.name).read_bytes()
    run("verify", tmp_path / "two", "--base", BASE, "--adapter", f"{raw}=0.5", "--adapter", ours, "--alpha", 6, "-q")
    assert api.verify(tmp_path / "two", BASE, [by_hand[0], ours]).ok
    assert not api.verify(tmp_path / "two", BASE, [raw, ours], **said).ok
    with pytest.raises(errors.ConfigError, match="alpha="):
        api.merge(BASE, [raw, ours], tmp_path / "three")
    for adapters, match in ((ours, "states its layout"), ([by_hand[0]], "none is read")):
        with pytest.raises(errors.OptionError, match=match):
            api.merge(BASE, adapters, tmp_path / "three", **said)
    with pytest.raises(errors.OptionError, match="peft does not take an alpha"):
        api.load_all([raw, ADAPTERS / "llama-plain"], alpha=6.0)


def test_statistics_export_and_check(raw: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a few words for a tiny model\n" * 4)
    run("statistics", BASE, "--data", texts, "-o", tmp_path / "s", "--adapter", raw, "--alpha", 6, "--device", "cpu")
    (measured,) = api.load_statistics(tmp_path / "s").inputs  # of the adapter's one target, and of no other
    assert f"{MODULE}.weight" in measured.names and measured.tokens
    out = tmp_path / "x.lrc"
    run("lora-to-lowrank", raw, "-o", out, "-q", "--bits", 12, "--alpha", 6, "--base", BASE)
    run("export", out, "-o", tmp_path / "peft", "--to", "peft-lora", "--source", raw, "--alpha", 6, "--from", "raw")
    assert "captured" in (tmp_path / "peft" / "README.md").read_text()
    with pytest.raises(errors.OptionError, match="states its layout"):
        api.export(out, tmp_path / "two", to="peft-lora", alpha=6.0)
    with pytest.raises(errors.OptionError, match="none is read"):
        api.compare(api.load_lora(raw, alpha=6.0), [out], alpha=6.0)


def test_check_says_whose_layout_it_is(raw: Path, ours: Path, tmp_path: Path) -> None:
    """By the names of the tensors, or as it is told; what a GGUF file is for loads it."""
    rng = np.random.default_rng(0)
    known = Known("mid_block.attentions.0.proj_in", *(rng.standard_normal((2, 2)).astype("<f4") for _ in "ab"), 2.0)
    for layout, data in (("kohya", layouts.kohya([known])), ("gguf", layouts.gguf([known]))):
        (path,) = [tmp_path / name for name in data if not name.endswith(".json")]
        path.write_bytes(data[path.name])
        for said in (None, layout):
            findings = {f.consumer: f for f in api.check(path, layout=said)}
            assert f"the layout {layout}" in findings["vllm"].what and f"the layout {layout}" in findings["mlx"].what
            assert ("llamacpp" in findings) == (layout != "gguf")
    folder = json.loads(CliRunner().invoke(
        cli.cli, ["check", str(ADAPTERS / "llama-plain"), "--for", "vllm", "--from", "kohya", "--json"]
    ).output)  # fmt: skip
    assert [f["rule"] for f in folder["findings"]] == ["layout"] and "kohya" in folder["findings"][0]["what"]
    weights = next(raw.glob("*.safetensors"))
    assert api.check(weights, ("vllm",), alpha=6.0) == api.check(weights, ("vllm",))
    for path, said in ((ours, {"layout": "raw"}), (ADAPTERS / "llama-plain", {"alpha": 2.0}), (raw, {"layout": "x"})):
        with pytest.raises(errors.OptionError):
            api.check(path, ("vllm",), **said)


def test_a_live_model_and_a_teacher(raw: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE)
    attached = api.attach(model, raw, alpha=6.0, base=BASE)
    weights = api.load_lora(raw, alpha=6.0)
    assert isinstance(weights, LoraAdapter) and weights.targets[0].scale == 3.0
    assert attached is not None
    api.detach(model)
    with pytest.raises(errors.OptionError, match="none is read"):
        api.attach(model, weights, alpha=6.0)
    with pytest.raises(errors.ConfigError, match="alpha="):
        api.attach(model, raw)
    out = tmp_path / "x.lrc"
    api.write(api.convert(weights, "lowrank", bits=2).compact, out)
    texts = tmp_path / "texts.txt"
    texts.write_text("some words that a tiny model reads again and again\n" * 8)
    settings = {"steps": 1, "layerwise": False, "length": 8, "batch_tokens": 16}
    done = api.refine(out, raw, BASE, texts, alpha=6.0, layout="raw", **settings)
    assert done.compact.method == "lowrank"


def test_many_hold_it_for_foreign_ones(raw: Path, ours: Path, tmp_path: Path) -> None:
    from lrconvert.api.batch import run as many

    both = many.convert_many([raw, ours], tmp_path / "out", "lowrank", jobs=1, alpha=6.0, layout="raw", bits=4)
    assert [o.state for o in both.outcomes] == ["done", "done"]
    alone = many.convert_many(ours, tmp_path / "two", "lowrank", jobs=1, alpha=6.0, bits=4)
    assert [o.code for o in alone.outcomes] == ["E-OPTION"]
