"""`lrconvert check`: what each consumer would do with small adapters of one defect each, and whether PEFT agrees."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ADAPTERS, ASSETS, BASES, asset
from peers import oracle
from peers.cases import GGUF_CASES, MLX_CASES, PEFT_CASES, PREFIX, Case, numbers, plain, renamed

import lrconvert
from lrconvert.cli import cli
from lrconvert.core.errors import JsonSyntaxError, LrcError, OptionError, PatternError, PickleError, UnknownLayoutError
from lrconvert.formats.compat import base, peft
from lrconvert.formats.compat.shared import rules
from lrconvert.formats.compat.shared.subject import Subject
from lrconvert.io.checkpoint import Checkpoint

LLAMA = BASES / "tiny-llama"
PEFT_READERS = ("peft", "vllm", "sglang", "llamacpp")
DIFFUSION = ("comfyui", "diffusers")  # their rules are in test_compat_diffusion.py
BY_NAME = {case.name: case for case in (*PEFT_CASES, *MLX_CASES)}


def by_consumer(findings: tuple[lrconvert.Finding, ...]) -> dict[str, set[str]]:
    table: dict[str, set[str]] = {}
    for finding in findings:
        table.setdefault(finding.consumer, set()).add(f"{finding.severity}:{finding.rule}")
    return table


def each(consumers: Iterable[str], rule: str) -> dict[str, set[str]]:
    return {consumer: {rule} for consumer in consumers}


def everywhere(case: Case, expected: dict[str, set[str]]) -> dict[str, set[str]]:
    """The table says nothing of consumers that the layout is not for."""
    others = (*DIFFUSION, "mlx") if case in PEFT_CASES else (*DIFFUSION, *PEFT_READERS)
    return {**each(others, "refuses:layout"), **expected}


@pytest.mark.parametrize("name", GGUF_CASES)
def test_what_is_said_of_a_gguf_file(name: str, tmp_path: Path) -> None:
    """llama.cpp itself is asked in test_llamacpp_runtime.py."""
    path = GGUF_CASES[name].write(tmp_path / "adapter.gguf")
    findings = lrconvert.check(path, ("llamacpp",), base=BASES / "tiny-llama")
    assert {f"{f.severity}:{f.rule}" for f in findings} == set(GGUF_CASES[name].expected.split()), findings


# --- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_NAME)
def test_what_each_consumer_would_do(name, tmp_path):
    case = BY_NAME[name]
    folder = case.build().write(tmp_path / name)
    assert by_consumer(lrconvert.check(folder, **case.options)) == everywhere(case, case.expected)
    if case.with_base is not None:
        assert by_consumer(lrconvert.check(folder, base=LLAMA, **case.options)) == everywhere(case, case.with_base)


def test_every_rule_is_in_the_table():
    """A finding that no case shows is a finding that nobody has seen."""
    unseen = {
        "vllm": {"qalora", "bdlora", "conv", "model", "vocabulary", "names", "saved", "embedding", "shape"},
        "sglang": {"qalora", "bdlora"},
        "llamacpp": {"qalora", "bdlora", "model", "names", "dora"},
        "mlx": {"layout"},
    }
    shared = inspect.getmembers(rules, inspect.isfunction)
    for consumer in base.chosen([*PEFT_READERS, "mlx"]):
        text = (Path(base.__file__).parent / f"{consumer.id}.py").read_text()
        text += "".join(inspect.getsource(f) for name, f in shared if f"rules.{name}(" in text)
        shown = {
            rule.partition(":")[2]
            for case in BY_NAME.values()
            for table in (case.expected, case.with_base or {})
            for rule in table.get(consumer.id, ())
        } | {"layout"}
        written = set(re.findall(r'(?:refuses|wrong|warns|verdict)(?:\.of)?\(\s*"([a-z0-9-]+)"', text))
        assert written - shown <= unseen.get(consumer.id, set()), consumer.id


def test_a_finding_says_what_to_do(tmp_path):
    for case in BY_NAME.values():
        for finding in lrconvert.check(case.build().write(tmp_path / case.name), **case.options):
            assert finding.what and finding.fix and finding.source, finding
            assert "\n" not in str(finding) and str(finding).startswith(f"{finding.severity}: {finding.consumer} ")
            assert not finding.what.endswith(".") and not finding.fix.endswith("."), finding


# --- rules that need a base or a feature that the table has no room for -----------------------------------------------


def with_base(tmp_path: Path, **config: object) -> Path:
    """A base folder that is only a configuration."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rules_for(tmp_path: Path, adapter, consumer: str, **options) -> set[str]:
    folder = adapter.write(tmp_path / "adapter")
    return by_consumer(lrconvert.check(folder, (consumer,), **options)).get(consumer, set())


@pytest.mark.parametrize(
    ("consumer", "architecture", "rule"),
    [
        ("vllm", "GPT2LMHeadModel", "refuses:model"),
        ("vllm", "LlamaForCausalLM", None),
        ("llamacpp", "NobodysForCausalLM", "refuses:model"),
        ("llamacpp", "LlamaForCausalLM", None),
    ],
)
def test_the_architecture_of_the_base(tmp_path, consumer, architecture, rule):
    config = with_base(tmp_path, architectures=[architecture])
    assert rules_for(tmp_path, plain(), consumer, base=config) == ({rule} if rule else set())


@pytest.mark.parametrize(
    ("consumer", "case", "architecture", "settings", "rule"),
    [
        ("vllm", "lm-head", "MistralForCausalLM", {}, "embedding"),
        ("vllm", "lm-head", "Qwen2ForCausalLM", {}, "embedding"),
        ("vllm", "embedding", "LlamaForCausalLM", {"vocab_size": 90}, "vocabulary"),
        ("llamacpp", "lm-head", "LlamaForCausalLM", {"tie_word_embeddings": True}, "embedding"),
    ],
)
def test_embeddings_and_heads_of_the_base(tmp_path, consumer, case, architecture, settings, rule):
    config = with_base(tmp_path, architectures=[architecture], **settings)
    assert rules_for(tmp_path, BY_NAME[case].build(), consumer, base=config) == {f"refuses:{rule}"}


@pytest.mark.parametrize("key", ["use_qalora", "use_bdlora"])
@pytest.mark.parametrize("consumer", ["vllm", "sglang", "llamacpp"])
def test_variants_of_lora(tmp_path, key, consumer):
    assert rules_for(tmp_path, plain(**{key: {"nblocks": 2}}), consumer) == {f"refuses:{key.removeprefix('use_')}"}


def test_vllm_convolutions(tmp_path):
    adapter = plain(modules=())
    adapter.tensors = {
        "base_model.model.conv.lora_A.weight": numbers(8, 3, 3, 3),
        "base_model.model.conv.lora_B.weight": numbers(16, 8, 1, 1),
    }
    assert rules_for(tmp_path, adapter, "vllm") == {"refuses:conv"}


def test_vllm_has_a_fixed_list_of_ranks(tmp_path):
    folder = plain().write(tmp_path / "a")
    with pytest.raises(OptionError, match="no --max-lora-rank 48"):
        lrconvert.check(folder, ("vllm",), max_lora_rank=48)
    assert not lrconvert.check(folder, ("sglang",), max_lora_rank=48)


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.13.2", "refuses"), ("0.14", "warns"), ("0.17.1", None), (None, None)],
)
def test_fields_that_a_release_of_peft_does_not_know(tmp_path, version, expected):
    folder = plain(target_parameters=["experts.weight"]).write(tmp_path / "a")
    severities = [f.severity for f in lrconvert.check(folder, ("peft",), peft_version=version) if f.rule == "fields"]
    assert severities == ([expected] if expected else [])


@pytest.mark.parametrize("version", ["0.12", "new", "1"])
def test_releases_of_peft_without_facts(tmp_path, version):
    with pytest.raises(OptionError):
        lrconvert.check(plain().write(tmp_path / "a"), ("peft",), peft_version=version)


# --- every adapter at hand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(p.name for p in ADAPTERS.iterdir()))
def test_fixtures(name):
    findings = lrconvert.check(ADAPTERS / name)
    assert not [f for f in findings if f.consumer == "peft"]
    assert [f.rule for f in findings if f.consumer == "mlx"] == ["layout"]


@pytest.mark.parametrize("name", sorted(p.name for p in (ASSETS / "adapters").iterdir()) if ASSETS.exists() else [])
def test_real_adapters(name):
    folder = asset(f"adapters/{name}")
    findings = lrconvert.check(folder)
    assert {f.consumer for f in findings} <= set(base.ids())
    for path in folder.glob("*.safetensors"):
        assert lrconvert.check(path)


def compact(tmp_path: Path, method: str, **options) -> Path:
    made = lrconvert.convert(lrconvert.load_lora(ADAPTERS / "llama-patterns"), method, **options)
    lrconvert.write(made.compact, tmp_path / "a.lrc")
    return tmp_path / "a.lrc"


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_our_export_is_clean(tmp_path, dtype):
    lrconvert.export(compact(tmp_path, "lowrank"), tmp_path / "out", to="peft-lora", dtype=dtype)
    assert not lrconvert.check(tmp_path / "out", PEFT_READERS)
    assert not lrconvert.check(tmp_path / "out", PEFT_READERS, base=LLAMA)


def test_our_export_with_ranks_kept(tmp_path):
    lrconvert.export(compact(tmp_path, "lowrank"), tmp_path / "out", to="peft-lora", keep_ranks=True)
    findings = by_consumer(lrconvert.check(tmp_path / "out", PEFT_READERS))
    assert findings == {"sglang": {"refuses:shape"}, "llamacpp": {"wrong:scale"}}


def test_our_vblora_export(tmp_path):
    file = compact(tmp_path, "vblora", peft_compatible=True, rank=2, num_vectors=32, vector_length=16, top_k=2)
    lrconvert.export(file, tmp_path / "out", to="peft-vblora")
    findings = by_consumer(lrconvert.check(tmp_path / "out", PEFT_READERS))
    assert findings == each(("vllm", "sglang", "llamacpp"), "refuses:kind")


def test_no_server_loads_a_compact_file(tmp_path):
    findings = lrconvert.check(compact(tmp_path, "lowrank"))
    assert by_consumer(findings) == each(base.ids(), "refuses:layout")
    assert all("export" in f.fix for f in findings)


def test_a_file_beside_its_configuration_is_the_folder(tmp_path):
    folder = plain(use_rslora=True).write(tmp_path / "a")
    assert lrconvert.check(folder / "adapter_model.safetensors") == lrconvert.check(folder)


def test_a_file_alone(tmp_path):
    folder = plain().write(tmp_path / "a")
    alone = (folder / "adapter_model.safetensors").rename(tmp_path / "other.safetensors")
    goal = {**each(base.ids(), "refuses:layout"), **each(DIFFUSION, "wrong:names")}
    assert by_consumer(lrconvert.check(alone)) == goal


# --- broken input ---------------------------------------------------------------------------------------------------


def test_nothing_there(tmp_path):
    with pytest.raises(UnknownLayoutError):
        lrconvert.check(tmp_path / "missing")
    with pytest.raises(UnknownLayoutError):
        lrconvert.check(tmp_path)


def test_broken_files(tmp_path):
    folder = plain().write(tmp_path / "a")
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(JsonSyntaxError):
        lrconvert.check(folder)
    folder = plain().write(tmp_path / "b")
    (folder / "adapter_model.safetensors").write_bytes(b"\x10" + bytes(30))
    with pytest.raises(LrcError):
        lrconvert.check(folder)
    pickled = tmp_path / "weights.bin"
    pickled.write_bytes(b"PK\x03\x04" + bytes(range(40, 90)))
    with pytest.raises(PickleError):
        lrconvert.check(pickled)


def test_a_hostile_pattern_is_not_run(tmp_path):
    folder = plain(rank_pattern={"(a+)+$": 4}).write(tmp_path / "a")
    with pytest.raises(PatternError):
        lrconvert.check(folder)


JUNK = [None, True, -1, 0, 2.5, 10**15, "", "text", [], ["x"], [None], [[1]], {}, {"k": None}, {"k": {"k": 1}}]


@pytest.mark.parametrize("value", JUNK, ids=repr)
def test_any_value_in_any_field(tmp_path, value):
    """Configurations of strangers: whatever a field holds, there are findings or one of our errors."""
    fields = [*plain().config, "use_qalora", "lora_bias", "trainable_token_indices", "layer_replication"]
    layouts = {"peft": plain, "mlx": BY_NAME["mlx-clean"].build}
    for layout, build in layouts.items():
        for key in [*fields, "lora_parameters", "num_layers", "fine_tune_type"]:
            adapter = build()
            adapter.config[key] = value
            folder = adapter.write(tmp_path / layout / key)
            lrconvert.check(folder)
    base_folder = with_base(
        tmp_path, **dict.fromkeys(["architectures", "vocab_size", "text_config", "model_type"], value)
    )
    lrconvert.check(folder, base=base_folder)


def test_nothing_is_read_but_headers(tmp_path, monkeypatch):
    folder = plain().write(tmp_path / "a")
    from lrconvert.io import container

    def refuse(*args: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(container.ContainerFile, "read", refuse)
    monkeypatch.setattr(Checkpoint, "read", refuse)
    lrconvert.check(folder, base=LLAMA)


# --- the registry and the command line --------------------------------------------------------------------------------


def test_the_folder_is_the_registry():
    assert base.ids() == ["comfyui", "diffusers", "llamacpp", "mlx", "peft", "sglang", "vllm"]
    assert [c.id for c in base.chosen(["all"])] == base.ids()
    assert sorted(c.id for c in base.chosen(["vllm", "all", "vllm"])) == base.ids()
    assert all(0 < len(c.title) <= 70 for c in base.chosen(["all"]))
    with pytest.raises(OptionError, match="there is no consumer 'ollama'"):
        base.get("ollama")


def test_an_option_of_nobody(tmp_path):
    folder = plain().write(tmp_path / "a")
    with pytest.raises(OptionError, match="max_lora_rank"):
        lrconvert.check(folder, ("peft",), max_lora_rank=16)


def run(*words: object):
    return CliRunner().invoke(cli, ["check", *map(str, words)])


def test_command_line(tmp_path):
    clean = plain().write(tmp_path / "clean")
    done = run(clean, "--for", "vllm", "--for", "peft")
    assert done.exit_code == 0
    assert done.output.splitlines() == ["vllm 0.33.0: nothing found", f"peft {peft.VERSION}: nothing found"]

    scaled = plain(use_rslora=True).write(tmp_path / "scaled")
    done = run(scaled, "--for", "vllm", "--for", "sglang")
    assert done.exit_code == 1
    first, second = done.output.splitlines()
    assert first == "vllm 0.33.0: nothing found"
    assert second.startswith("wrong: sglang 0.5.23: use_rslora ignored")

    named = plain(base_model_name_or_path=None).write(tmp_path / "named")
    done = run(named, "--for", "llamacpp")
    assert done.exit_code == 0 and done.output.startswith("warns: llamacpp")
    assert run(named, "--for", "llamacpp", "--base", LLAMA).output.endswith("nothing found\n")


def test_command_line_options(tmp_path):
    big = plain(rank=32).write(tmp_path / "big")
    assert run(big, "--for", "vllm").exit_code == 1
    assert run(big, "--for", "vllm", "--max-lora-rank", 64).exit_code == 0
    assert run(big, "--for", "nobody").exit_code == 2
    assert run(big).exit_code == 2


def test_json(tmp_path):
    folder = plain(use_dora=True).write(tmp_path / "a")
    done = run(folder, "--for", "all", "--json")
    assert done.exit_code == 1
    answer = json.loads(done.output)
    assert answer["schema"] == 1 and answer["ok"] is False
    assert [c["id"] for c in answer["consumers"]] == base.ids()
    fields = {"severity", "consumer", "version", "rule", "what", "fix", "source"}
    assert answer["findings"] and all(set(finding) == fields for finding in answer["findings"])


# --- PEFT itself ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_config():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoConfig.from_pretrained(LLAMA)


def peft_does(folder: Path, config) -> dict:
    """What the installed PEFT does with a folder: refuses, or the norm of every update and the tensors left over."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(model, folder)
            result = loaded.load_adapter(folder, "default")
    except Exception as error:
        return {"outcome": "refuses", "why": f"{type(error).__name__}: {error}"}
    norms = {}
    for name, module in loaded.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            delta = module.get_delta_weight("default").detach().double().numpy()
            if norm := float(np.linalg.norm(delta)):
                norms[name] = norm
    return {"outcome": "loads", "norms": norms, "left": list(result.unexpected_keys)}


@pytest.mark.parametrize("case", [c for c in PEFT_CASES if "peft" not in c.unrun | c.unseen], ids=lambda c: c.name)
@pytest.mark.medium
def test_peft_agrees(case, tmp_path, llama_config):
    adapter = case.build()
    folder = adapter.write(tmp_path / case.name)
    answer = peft_does(folder, llama_config)
    says = oracle.predicted(folder, "peft", case.options)
    if answer["outcome"] == "refuses":
        assert says == "refuses", answer["why"]
        return
    right = oracle.truth(folder, adapter) if adapter.config["peft_type"] == "LORA" else answer["norms"]
    plainly = oracle.verdict({**answer, "saved": list(adapter.tensors)}, right, adapter)
    assert says == ("wrong" if answer["left"] or plainly == "wrong" else "right"), answer


def test_the_facts_about_peft():
    """Kinds, tasks and fields are those of the release that they name."""
    import dataclasses

    peft_package = pytest.importorskip("peft")
    if peft_package.__version__ != peft.VERSION:
        pytest.skip(f"the installed peft is {peft_package.__version__}")
    from peft.utils.peft_types import PeftType, TaskType

    assert {kind.value for kind in PeftType} == peft.KINDS
    assert {task.value for task in TaskType} == peft.TASKS
    assert {f.name for f in dataclasses.fields(peft_package.LoraConfig)} == peft._known_fields(None)


@pytest.mark.parametrize(("model_type", "reads"), [("qwen3_moe", True), ("gpt_neox", False), ("llama", False)])
def test_peft_reads_names_without_its_prefix_where_transformers_converts_names(tmp_path, model_type, reads):
    folder = renamed(plain(), PREFIX, "").write(tmp_path / "a")
    config = with_base(tmp_path, model_type=model_type)
    findings = {f.severity for f in lrconvert.check(folder, ("peft",), base=config) if f.rule == "prefix"}
    assert findings == {"warns" if reads else "wrong"}


def test_names_of_modules_are_looked_up(monkeypatch):
    """A name in target_modules stands for a module or a whole end of one, and the list is gone through once, however
    many modules it names."""
    calls = []
    real = Subject.names
    monkeypatch.setattr(Subject, "names", lambda subject, key: calls.append(key) or real(subject, key))
    modules = [f"model.layers.{n}.{leaf}" for n in range(20) for leaf in ("q_proj", "proj", "q_proj.", "")]
    for names in (modules, ["layers.0.q_proj", "3.proj"], ["proj", "", "ayers.1.proj"], []):
        subject = Subject("peft", {"target_modules": names})
        calls.clear()
        named = [module for module in modules if peft._targeted(subject, module)]
        assert calls == ["target_modules"]
        assert named == [m for m in modules if any(m == name or m.endswith(f".{name}") for name in names)]
