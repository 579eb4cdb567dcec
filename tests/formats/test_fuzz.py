"""Valid material with one thing wrong: refused by an error of ours, or it means what it says.

What "means what it says" is, is worked out here from the plain JSON, by other code than the reader's. A quick run draws
the same examples each time; the slow one many more, and others each time.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
from conftest import FIXTURES, ROOT, write_files
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from test_container import check_against_the_library

from lrconvert import api, testing
from lrconvert.core import errors
from lrconvert.formats.lrc import file
from lrconvert.formats.lrc.validation import validate
from lrconvert.io.checkpoint import INDEX_NAME, open_checkpoint
from lrconvert.methods import base as methods
from lrconvert.testing import json_trees
from lrconvert.testing.container_versions import encoded, version_of
from lrconvert.testing.peft import CONFIG_NAME, WEIGHTS_NAME

FUZZ = ROOT / "tests" / "fuzz"
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
SLOW = pytest.param(1000, marks=(pytest.mark.slow, pytest.mark.long))


def fuzz(examples: int, check: Callable[[st.DataObject], None]) -> None:
    """Run `check` on that many draws."""
    quick = settings(max_examples=examples, deadline=None, suppress_health_check=CHECKS, derandomize=examples < 500)
    quick(given(st.data())(check))()


def mutated(data: st.DataObject, files: Mapping[str, bytes], often: str) -> dict[str, bytes]:
    """The folder with one of its files mutated, every other time the one named `often`."""
    bad = data.draw(testing.folder_mutations(files, [often] if data.draw(st.booleans()) else []))
    note(f"{bad.name}: {bad.kind} at {bad.where}: {bad.data[:300]!r}")
    return {**files, bad.name: bad.data}


# --- containers -----------------------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize("examples", [150, SLOW])
def test_containers(examples: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    def check(data: st.DataObject) -> None:
        good = data.draw(testing.safetensors_files())
        path.write_bytes(good)
        assert check_against_the_library(path)
        bad = data.draw(testing.mutations(good))
        note(f"{bad.kind} at {bad.where}")
        path.write_bytes(bad.data)
        check_against_the_library(path)

    fuzz(examples, check)


# --- lrconvert files ------------------------------------------------------------------------------------------------

_NO_MEANING = ("manifest: provenance", "manifest: base.content", "manifest: extras")


def meaning(path: Path) -> list[Any]:
    """The update: every target with its factors."""
    return [(t, a.tobytes(), b.tobytes()) for t, a, b in methods.without_base(file.read(path))]


@pytest.mark.medium
@pytest.mark.parametrize("examples", [200, SLOW])
def test_lrconvert_files(examples: int, tmp_path: Path) -> None:
    """Refused by every verb alike; or the same file; or, where digests were made right, a file that the writer writes
    and whose update is the same if the change was not to be one of it."""
    path, other = tmp_path / "x.lrc", tmp_path / "good.lrc"

    def check(data: st.DataObject) -> None:
        good = data.draw(testing.lrconvert_files())
        other.write_bytes(good)
        assert validate(other).ok
        bad = data.draw(testing.mutations(good))
        note(f"{bad.kind} at {bad.where}")
        path.write_bytes(bad.data)
        findings = validate(path).findings
        assert all(f.code.startswith("E-") and f.message.isprintable() for f in findings)
        try:
            compact = api.read(path)
        except errors.LrcError as error:
            assert error.code in {f.code for f in findings}, (error, findings)
            return
        assert findings == ()
        assert encoded(compact, version_of(bad.data)) == bad.data
        if bad.data != good:
            assert bad.where.startswith(("manifest: ", "packed manifest: ")), bad
            if bad.where.startswith(_NO_MEANING):
                assert meaning(path) == meaning(other)

    fuzz(examples, check)


# --- PEFT folders ---------------------------------------------------------------------------------------------------


def expected(files: Mapping[str, bytes]) -> dict[str, tuple[bytes, bytes, float]]:
    """{module: (bits of A, bits of B, scale)} by PEFT's rules."""
    config = json.loads(files[CONFIG_NAME])
    tensors = dict(container_tensors(files[WEIGHTS_NAME]))
    updates = {}
    for name, (_, shape, a) in tensors.items():
        if ".lora_A." not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha = first_match(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        assert first_match(config.get("rank_pattern") or {}, module, config["r"]) == shape[0]
        scale = alpha / math.sqrt(shape[0]) if config.get("use_rslora") else alpha / shape[0]
        updates[module] = (a, tensors[name.replace("lora_A", "lora_B")][2], scale)
    return updates


def first_match(table: Mapping[str, float], module: str, default: float) -> float:
    for key, value in table.items():
        if key == module or re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def container_tensors(data: bytes) -> list[tuple[str, tuple[str, list[int], bytes]]]:
    return [(n, (i["dtype"], i["shape"], bytes(i["data"]))) for n, i in safetensors.deserialize(data)]


@pytest.mark.medium
@pytest.mark.parametrize("examples", [250, SLOW])
def test_peft_folders(examples: int, tmp_path: Path) -> None:
    """Refused; or factors and scales are those that the configuration and the weights spell out."""
    folder = tmp_path / "lora"

    def check(data: st.DataObject) -> None:
        good = data.draw(testing.peft_folders())
        for files in (good, mutated(data, good, CONFIG_NAME)):
            write_files(folder, files)
            try:
                lora = api.load_lora(folder)
            except errors.LrcError as error:
                assert files is not good, error
                assert str(error).isprintable()
                continue
            ours = {
                p.target.name.removesuffix(".weight"): (p.a.array.tobytes(), p.b.array.tobytes(), p.scale)
                for p in lora.targets
            }
            assert ours == expected(files)
            assert all(isinstance(w, str) for w in lora.warnings)

    fuzz(examples, check)


@pytest.mark.medium
@pytest.mark.parametrize("examples", [60, SLOW])
def test_peft_configurations_of_real_adapters(examples: int, tmp_path: Path) -> None:
    """The configurations that PEFT wrote, with one thing wrong: refused, or read; nothing else is raised."""
    names = sorted(p.name for p in (FIXTURES / "adapters").iterdir())

    def check(data: st.DataObject) -> None:
        source = FIXTURES / "adapters" / data.draw(st.sampled_from(names))
        bad = data.draw(testing.mutations((source / CONFIG_NAME).read_bytes()))
        note(f"{source.name}: {bad.kind} at {bad.where}")
        weights = (source / WEIGHTS_NAME).read_bytes()
        try:
            lora = api.load_lora(write_files(tmp_path / "lora", {CONFIG_NAME: bad.data, WEIGHTS_NAME: weights}))
        except errors.LrcError:
            return
        assert lora.targets

    fuzz(examples, check)


# --- bases ----------------------------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize("examples", [150, SLOW])
def test_shard_indexes(examples: int, tmp_path: Path) -> None:
    """Refused; or every tensor that the index names is there, from the shard that it names, and no other."""
    count = 0

    def check(data: st.DataObject) -> None:
        nonlocal count
        count += 1
        good = data.draw(testing.shard_indexes())
        folder = tmp_path / str(count)  # files of earlier examples must not be there
        for files in (good, mutated(data, good, INDEX_NAME)):
            write_files(folder, files)
            try:
                with open_checkpoint(folder) as base:
                    ours = {t.name: (t.file.name, bytes(base.read(t))) for t in base.tensors.values()}
            except errors.LrcError as error:
                assert files is not good, error
                assert str(error).isprintable() and str(folder) in str(error)
                continue
            index = json.loads(files[INDEX_NAME])
            stored = {shard: dict(container_tensors(files[shard])) for shard in set(index["weight_map"].values())}
            assert ours == {name: (shard, stored[shard][name][2]) for name, shard in index["weight_map"].items()}

    fuzz(examples, check)


# --- the strategies themselves --------------------------------------------------------------------------------------


def test_hypothesis_is_imported_when_it_is_used() -> None:
    code = "import sys, lrconvert.testing as t; assert 'hypothesis' not in sys.modules; t.peft_configs()"
    subprocess.run([sys.executable, "-c", code + "; assert 'hypothesis' in sys.modules"], check=True)


def test_without_hypothesis_there_is_advice() -> None:
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "from lrconvert import testing\nfrom lrconvert.core import errors\n"
        "try: testing.peft_configs()\n"
        "except errors.DependencyError as error: assert 'pip install' in str(error)\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["v1/lowrank", "v2/lowrank.2"])
def test_mutations_are_many_and_mutate(name: str) -> None:
    """Every kind comes up, in headers and manifests, and hardly any leaves the bytes as they were."""
    good = (FIXTURES / "golden" / name / "0.lrc").read_bytes()
    seen: list[testing.Mutation] = []

    @settings(max_examples=400, deadline=None, suppress_health_check=CHECKS, derandomize=True, database=None)
    @given(testing.mutations(good))
    def collect(mutation: testing.Mutation) -> None:
        seen.append(mutation)

    collect()
    kinds = {m.kind for m in seen}
    assert {"drop", "duplicate key", "rename", "type", "huge", "negative", "escape", "shift", "cut", "byte"} <= kinds
    assert {"dtype", "path", "null", "nest", "length", "append", "fraction", "control"} <= kinds
    assert {m.where.split(":")[0] for m in seen} >= {"header", "manifest"}
    assert sum(m.data == good for m in seen) < len(seen) / 10
    assert ("packed manifest" in {m.where.split(":")[0] for m in seen}) == name.startswith("v2")
    signed = [m for m in seen if m.where.startswith("manifest: provenance") and m.kind in ("text", "path")]
    assert signed


def test_trees_spell_what_they_read() -> None:
    text = '{"a":[1,2.5,true,null,"\\u00e9\\n"],"a":{},"b":-3}'
    assert json_trees.spell(json_trees.parsed(text)) == text.replace("\\u00e9", "é")
    changed = json_trees.changed(json_trees.parsed(text), (0, 1), lambda node: json_trees.Literal("1e999"))
    assert json_trees.spell(changed) == json_trees.spell(json_trees.parsed(text)).replace("2.5", "1e999")
    assert json_trees.keys_to(json_trees.parsed(text), (0, 1)) == "a[1]"


def test_manifests_are_those_of_files() -> None:
    @settings(max_examples=10, deadline=None, suppress_health_check=CHECKS, derandomize=True)
    @given(testing.manifests("lowrank"), testing.peft_configs())
    def check(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        assert manifest["requires"] == [] and manifest["method"]["id"] == "lowrank"
        assert config["peft_type"] == "LORA" and config["r"] > 0

    check()


def test_the_fuzz_target_runs_over_its_seeds() -> None:
    """tests/fuzz/fuzz_file.py, as it runs without atheris."""
    command = [sys.executable, "-W", "error", str(FUZZ / "fuzz_file.py"), "--replay"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, rest = done.stdout.split(maxsplit=1)
    assert int(count) > 200 and rest == "inputs, no failure\n"


def test_the_fuzz_target_finds() -> None:
    """A fault planted in the reader is a find."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import fuzz_file\n"
        "class Broken(fuzz_file.ContainerFile):\n    read = lambda self, info, *a: bytes(info.nbytes)\n"
        "fuzz_file.ContainerFile = Broken\n"
        "fuzz_file.replay([])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(FUZZ)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "AssertionError" in done.stderr and "input: " in done.stderr


@pytest.mark.medium
def test_the_long_run_reaches_every_surface_and_finds(tmp_path: Path) -> None:
    """tests/fuzz/long_run.py, some executions of every surface from a stated seed; a planted fault is a find."""
    code = """if True:
        import sys, pathlib; sys.path.insert(0, sys.argv[1])
        import long_run, surfaces
        for name in surfaces.SURFACES:
            if name not in surfaces.NEED_TORCH:
                stint = long_run.Stint(name, "test", None)
                del stint.corpus[6:]
                done = stint.run(60.0, 20)
                assert not done["finds"] and done["covered"] > 20, (name, done)
        surfaces.strictjson.parse = lambda data, **_: {}[0]
        state = pathlib.Path(sys.argv[2])
        (find,) = long_run.Stint("json", "test", state).run(60.0, 9)["finds"]
        assert find.startswith("json: KeyError") and len(list((state / "finds").iterdir())) == 2
        long_run.add(figures := {}, "json", {"executions": 9, "kept": 1, "covered": 5, "finds": {find: ""}})
        assert figures["json"]["executions"] == 9 and figures["json"]["stints"] == 1
    """
    command = [sys.executable, "-c", code, str(FUZZ), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
