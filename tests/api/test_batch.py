"""Many adapters at once: what is found, what is made, what is passed by, and what becomes of failures."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ADAPTERS, BASES
from test_cli import lrconvert as command

import lrconvert
from lrconvert import api
from lrconvert.api.batch import manifest, request, run, sources
from lrconvert.api.batch.tally import Batch
from lrconvert.cli import cli
from lrconvert.core import errors
from lrconvert.io import checkpoint
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.lora import statistics_file
from lrconvert.methods import base as methods

pytestmark = pytest.mark.medium  # all of them work on models, disks or processes

OPTIONS: dict[str, Any] = {"bits": 4}


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A folder of adapters: two, one further down, one whose kind is refused, a file that is none, and other things."""
    root = tmp_path / "zoo"
    for name in ("gpt2-conv1d", "llama-plain", "team/a/llama-patterns", "refused"):
        shutil.copytree(ADAPTERS / name.rpartition("/")[2].replace("refused", "llama-rslora"), root / name)
    config = json.loads((root / "refused" / "adapter_config.json").read_text())
    (root / "refused" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "PROMPT_TUNING"}))
    (root / "team" / "broken.safetensors").write_bytes(b"no header")
    (root / "notes.txt").write_text("nothing to convert")
    shutil.copytree(ADAPTERS / "llama-plain", root / ".hidden")
    return root


def tree(root: Path) -> dict[str, bytes]:
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and p.name != manifest.NAME)
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


class Here(Executor):
    """Does each job at once, in this process, as one that was pickled, and keeps the names of their adapters."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def submit(self, call: Any, /, job: Any) -> Any:  # type: ignore[override]
        self.names.append(Path(job.source).name)
        future: Future[Any] = Future()
        future.set_result(pickle.loads(pickle.dumps(call(pickle.loads(pickle.dumps(job))))))
        return future


def work_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let batches do their work in this process, and return the names of the adapters that are worked on from then
    on: what a process costs to start is spared where none is the matter."""
    names: list[str] = []
    monkeypatch.setattr(run, "Workers", lambda count: Here(names))
    monkeypatch.setattr(run, "_processes", lambda options, waiting: 1)
    return names


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    work_here(monkeypatch)


def states(batch: Batch, root: Path) -> dict[str, str]:
    return {str(Path(o.source).relative_to(root)): o.code or o.state for o in batch.outcomes}


GOOD = ("gpt2-conv1d", "llama-plain", "team/a/llama-patterns")
FOUND = dict.fromkeys(GOOD, "done") | {"refused": "E-NOT-LORA", "team/broken.safetensors": "E-HDR-LEN"}


@pytest.mark.medium
def test_a_folder_of_adapters(zoo: Path, tmp_path: Path) -> None:
    """Everything is tried, failures do not stop it, and the bytes do not depend on the number of processes."""
    one = lrconvert.convert_many(zoo, tmp_path / "one", "lowrank", jobs=1, **OPTIONS)
    two = lrconvert.convert_many(zoo, tmp_path / "two", "lowrank", jobs=2, **OPTIONS)
    assert states(one, zoo) == states(two, zoo) == FOUND and not one.ok
    assert set(tree(tmp_path / "one")) == {f"{name}.lrc" for name in GOOD}
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    for outcome in one.outcomes:
        if outcome.state == "done":
            alone = api.convert(api.load_lora(outcome.source), "lowrank", **OPTIONS)
            ours = api.read(outcome.output)
            assert all(np.array_equal(ours.tensors[key], value) for key, value in alone.compact.tensors.items())
            assert outcome.nbytes is not None and outcome.total_bytes == Path(outcome.output).stat().st_size
            assert outcome.captured == pytest.approx(alone.fidelity.captured) and outcome.ratio
        else:
            assert outcome.message.startswith(outcome.code) and Path(outcome.source).name in outcome.message


@pytest.mark.usefixtures("in_process")
@pytest.mark.medium
def test_what_is_finished_is_passed_by(zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lrconvert.convert_many(zoo, out, "lowrank", jobs=1, **OPTIONS)
    before = {p: p.stat() for p in out.rglob("*.lrc")}
    shutil.move(zoo, moved := tmp_path / "moved")  # names of folders do not count
    again = lrconvert.convert_many(moved, out, "lowrank", jobs=1, **OPTIONS)
    assert states(again, moved) == {k: v.replace("done", "skipped") for k, v in FOUND.items()}
    assert {p: p.stat().st_mtime_ns for p in before} == {p: s.st_mtime_ns for p, s in before.items()}
    skipped = next(o for o in again.outcomes if o.state == "skipped")
    assert skipped.nbytes and skipped.captured

    config = moved / "llama-plain" / "adapter_config.json"  # not a tensor, but it changes the update
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 99}))
    damaged = out / "gpt2-conv1d.lrc"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (out / "team" / "a" / "llama-patterns.lrc").unlink()
    third = states(lrconvert.convert_many(moved, out, "lowrank", jobs=1, **OPTIONS), moved)
    wanted = {"llama-plain": "E-OUT-EXISTS", "gpt2-conv1d": "E-OUT-EXISTS", "team/a/llama-patterns": "done"}
    assert {name: third[name] for name in wanted} == wanted
    last = states(lrconvert.convert_many(moved, out, "lowrank", jobs=1, overwrite=True, **OPTIONS), moved)
    assert [last[name] for name in wanted] == ["done", "done", "skipped"]
    assert all(api.validate(path).ok for path in out.rglob("*.lrc"))


@pytest.mark.usefixtures("in_process")
@pytest.mark.medium
@pytest.mark.parametrize("change", [{"bits": 3}, {"include": ["q_proj"]}, {"seed": 7}], ids=str)
def test_other_options_are_another_request(change: dict[str, Any], tmp_path: Path) -> None:
    source = ADAPTERS / "llama-plain"
    assert lrconvert.convert_many([source], tmp_path, "lowrank", jobs=1, **OPTIONS).ok
    (other,) = lrconvert.convert_many([source], tmp_path, "lowrank", jobs=1, **{**OPTIONS, **change}).outcomes
    assert other.code == "E-OUT-EXISTS"


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"target_ratio": 20}, {"target_ratio": 20.0}),
        ({"bits": 4}, {"bits": 4.0, "seed": 0, "include": ()}),
        ({"rank": 2}, {"rank": 2, "bits": None, "target_size": None}),
    ],
)
def test_one_request_in_two_spellings(one: dict[str, Any], other: dict[str, Any], tmp_path: Path) -> None:
    source = ADAPTERS / "llama-plain"
    assert lrconvert.convert_many([source], tmp_path, "lowrank", jobs=1, **one).ok
    (same,) = lrconvert.convert_many([source], tmp_path, "lowrank", jobs=1, **other).outcomes
    assert same.state == "skipped"


COMMANDS = {method.commands[0].name: ("convert", method.id) for method in methods.all_methods()}


@pytest.mark.parametrize("name", [*COMMANDS, "compress", "lora-to-alora", "lora-to-alora --train-steps"])
def test_the_command_line_and_python_name_the_same_work(name: str, tmp_path: Path) -> None:
    """What one has finished the other passes by, whole numbers and fractions spelled in either way."""
    source, shown = ADAPTERS / "llama-plain", ["--target-ratio", "4.0", "--json", "-j", "1"]
    more: dict[str, Any] = {"target_ratio": 4, "jobs": 1}
    if name == "compress":
        first = lrconvert.compress_many([source], tmp_path, forms=["lowrank"], **more)
        shown += ["--methods", "lowrank"]
    elif name in COMMANDS:
        first = lrconvert.convert_many([source], tmp_path, COMMANDS[name][1], **more)
    else:
        if "--train-steps" in name:
            (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": f"a word {n}"}) for n in range(40)))
            more |= {
                "base": BASES / "tiny-llama",
                "data": [tmp_path / "t.jsonl"],
                "rounds": 1.0,
                "exact": 1,
            }
            more["retrain"] = {"steps": 1.0}
            given = {
                "base": more["base"],
                "data": tmp_path / "t.jsonl",
                "rounds": 1,
                "exact": 1,
                "train-steps": 1,
            }
            shown += [word for key, value in given.items() for word in (f"--{key}", str(value))]
        first = lrconvert.allocate_many([source], tmp_path, **more)
    assert first.ok and first.count("done") == 1, first
    done = command(name.split()[0], source, "-o", tmp_path, *shown)
    row, counts = map(json.loads, done.stdout.splitlines())
    assert row["state"] == "skipped" and counts["skipped"] == 1


@pytest.mark.usefixtures("in_process")
def test_statistics_and_base_count_by_content(tmp_path: Path) -> None:
    source, base = ADAPTERS / "llama-plain", BASES / "tiny-llama"
    lora = api.load_lora(source)
    (tmp_path / "texts.txt").write_text("one two three\n" * 20)
    found = api.statistics(base, tmp_path / "texts.txt", tmp_path / "a.stats", adapter=lora, max_tokens=200)
    assert found
    options = {**OPTIONS, "base": base, "statistics": tmp_path / "a.stats"}
    assert lrconvert.convert_many([source], tmp_path / "out", "lowrank", jobs=1, **options).ok
    shutil.copytree(base, tmp_path / "elsewhere")
    shutil.copy(tmp_path / "a.stats", tmp_path / "b.stats")
    options |= {"base": tmp_path / "elsewhere", "statistics": tmp_path / "b.stats"}
    (same,) = lrconvert.convert_many([source], tmp_path / "out", "lowrank", jobs=1, **options).outcomes
    assert same.state == "skipped"
    (other,) = lrconvert.convert_many([source], tmp_path / "out", "lowrank", jobs=1, **OPTIONS).outcomes
    assert other.code == "E-OUT-EXISTS"
    assert request.of_base(base) != request.of_base(BASES / "tiny-bert")
    in_memory = statistics_file.read(tmp_path / "a.stats")
    with pytest.raises(errors.OptionError, match="must be a path"):
        lrconvert.convert_many([source], tmp_path / "out", "lowrank", statistics=in_memory)


def test_a_base_is_digested_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are told the digest, and read no tensor for it; what is written is as if they had taken it."""
    base = shutil.copytree(BASES / "tiny-llama", tmp_path / "base")
    for name in ("one", "two"):
        shutil.copytree(ADAPTERS / "llama-plain", tmp_path / "zoo" / name)
    jobs = list(lrconvert.batch_jobs(tmp_path / "zoo", tmp_path / "out", "lowrank", base=base, **OPTIONS))
    digested: list[str] = []
    taken = checkpoint.tensor_digest
    monkeypatch.setattr(checkpoint, "tensor_digest", lambda name, *rest: digested.append(name) or taken(name, *rest))
    with open_checkpoint(base) as opened:
        whole, names = opened.content_digest(), set(opened.tensors)
    assert set(digested) == names
    digested.clear()
    assert [lrconvert.convert_one(job).state for job in jobs] == ["done", "done"]
    assert not names & set(digested)
    assert {api.read(path).base.content for path in (tmp_path / "out").glob("*.lrc")} == {whole}
    unprepared = lrconvert.Work("convert", "lowrank", {"base": base, **OPTIONS}, {"base": base})
    assert lrconvert.convert_one(lrconvert.Job(jobs[0].source, str(tmp_path / "slow.lrc"), unprepared)).state == "done"
    assert (tmp_path / "slow.lrc").read_bytes() == (tmp_path / "out" / "one.lrc").read_bytes()
    assert set(digested) >= names


@pytest.mark.medium
@pytest.mark.parametrize("verb", ["convert", "compress", "allocate"])
def test_a_base_that_changes_meanwhile(verb: Any, tmp_path: Path) -> None:
    """What was converted before is done; after the change each adapter fails, as its base is not the one digested."""
    base = shutil.copytree(BASES / "tiny-llama", tmp_path / "base")
    for name in ("one", "two"):
        shutil.copytree(ADAPTERS / "llama-plain", tmp_path / "zoo" / name)

    def told(done: int, of: int) -> None:
        for shard in base.glob("*.safetensors"):
            os.utime(shard, ns=(1, 1))

    options: dict[str, Any] = {"base": base, "jobs": 1, "target_ratio": 4}
    if verb == "convert":
        options["method"] = "lowrank"
    if verb == "compress":
        options |= {"forms": ["lowrank"], "rank_by": "fit"}
    many = getattr(lrconvert, f"{verb}_many")
    batch = many(tmp_path / "zoo", tmp_path / "out", on_done=told, **options)
    assert [outcome.code or outcome.state for outcome in batch.outcomes] == ["done", "E-IO-CHANGED"]
    assert str(base) in batch.outcomes[1].message
    again = many(tmp_path / "zoo", tmp_path / "out", **options)
    assert [outcome.state for outcome in again.outcomes] == ["skipped", "done"]


@pytest.mark.usefixtures("in_process")
def test_a_request_is_not_inherited(tmp_path: Path) -> None:
    lrconvert.convert_many([ADAPTERS / "llama-plain"], tmp_path, "lowrank", jobs=1, **OPTIONS)
    made = tmp_path / "llama-plain.lrc"
    assert len(api.read(made).provenance.fields[request.FIELD]) == 32
    second = api.convert(api.load_lora(made), "lowrank", bits=2).compact
    assert request.FIELD not in second.provenance.fields


@pytest.mark.usefixtures("in_process")
@pytest.mark.medium
def test_the_other_verbs(tmp_path: Path) -> None:
    listed = [ADAPTERS / "llama-plain", ADAPTERS / "gpt2-conv1d"]
    smallest = lrconvert.compress_many(listed, tmp_path / "a", jobs=1, target_ratio=5, forms=["lowrank"])
    ranked = lrconvert.allocate_many(listed, tmp_path / "b", jobs=1, total_rank=20)
    assert smallest.ok and ranked.ok
    for batch, verb in ((smallest, lrconvert.compress_many), (ranked, lrconvert.allocate_many)):
        options = {"target_ratio": 5, "forms": ["lowrank"]} if verb is lrconvert.compress_many else {"total_rank": 20}
        out = Path(batch.outcomes[0].output).parent
        assert {o.state for o in verb(listed, out, jobs=1, **options).outcomes} == {"skipped"}
        assert all(api.validate(o.output).ok for o in batch.outcomes)


@pytest.mark.usefixtures("in_process")
def test_each_adapter_has_its_verdict(tmp_path: Path) -> None:
    """That of `compress` alone, also where finished work is passed by; in the table, in JSON, on the page, counted at
    the end; what is not to be shipped is no failure. Other verbs have none."""
    listed = [ADAPTERS / "llama-plain", ADAPTERS / "llama-rslora"]
    asked: dict[str, Any] = {"target_ratio": 11, "forms": ["lowrank"]}
    alone = [api.compress(path, **asked).verdict.ship for path in listed]
    assert sorted(alone) == [False, True]
    words = ["compress", *listed, "-o", tmp_path / "out", "-j", 1, "--target-ratio", 11, "--methods", "lowrank"]
    shown = CliRunner().invoke(cli, [*map(str, words), "--html", str(tmp_path / "x.html"), "-v"])
    assert shown.exit_code == 0 and "do not ship 1 of them" in shown.stdout.splitlines()[-1]
    assert len(re.findall(r"done .* (?:do not )?ship$", shown.stdout, re.MULTILINE)) == 2
    assert shown.stdout.count("; try ") == 1 and "verdict   ship" in shown.stdout
    page = (tmp_path / "x.html").read_text()
    assert "1 is not to be shipped" in page and page.count('<td class="word">do not ship</td>') == 1
    again = lrconvert.compress_many(listed, tmp_path / "out", jobs=1, **asked)
    told = [json.loads(line) for line in CliRunner().invoke(cli, [*map(str, words), "--json"]).stdout.splitlines()]
    assert told[-1]["do_not_ship"] == again.do_not_ship == 1 and told[-1]["ok"]
    expected = ["ship" if ship else "do not ship" for ship in alone]
    assert [(o.state, o.verdict) for o in again.outcomes] == [("skipped", verdict) for verdict in expected]
    assert [line["verdict"] for line in sorted(told[:-1], key=lambda line: str(line["source"]))] == expected
    other = lrconvert.convert_many(listed, tmp_path / "b", "lowrank", jobs=1, bits=4)
    assert not other.do_not_ship and not any(o.verdict for o in other.outcomes)


@pytest.mark.usefixtures("in_process")
def test_a_plan_writes_nothing(zoo: Path, tmp_path: Path) -> None:
    planned = lrconvert.convert_many(zoo, None, "lowrank", jobs=1, dry_run=True, **OPTIONS)
    done = lrconvert.convert_many(zoo, tmp_path / "out", "lowrank", jobs=1, **OPTIONS)
    assert [(o.nbytes, o.code) for o in planned.outcomes] == [(o.nbytes, o.code) for o in done.outcomes]
    assert not (tmp_path / "zoo.lrc").exists() and {p.name for p in tmp_path.iterdir()} == {"zoo", "out"}


@pytest.mark.usefixtures("in_process")
def test_nothing_is_left_where_all_fail(tmp_path: Path) -> None:
    listed = [ADAPTERS / "llama-plain", ADAPTERS / "gpt2-conv1d"]
    batch = lrconvert.convert_many(listed, tmp_path / "out", "lowrank", jobs=1, target_size=10)
    assert {o.code for o in batch.outcomes} == {"E-BUDGET"} and list(tmp_path.iterdir()) == []


# --- what is meant --------------------------------------------------------------------------------------------------


def test_refusals_before_any_work(zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    twice = [zoo / "llama-plain", ADAPTERS / "llama-plain"]
    refused: list[tuple[type[errors.LrcError], Any, Path | None, dict[str, Any]]] = [
        (errors.OptionError, twice, out, {}),
        (errors.OutputPathError, zoo, zoo / "out", {}),
        (errors.OutputPathError, zoo, zoo, {}),
        (errors.OutputPathError, [zoo / "llama-plain"], zoo / "llama-plain" / "out", {}),
        (errors.OutputPathError, zoo, tmp_path / "file", {}),
        (errors.UnknownLayoutError, tmp_path / "empty", out, {}),
        (errors.OptionError, zoo, out, {"jobs": 0}),
        (errors.OptionError, zoo, None, {}),
        (errors.OptionError, zoo, out, {"target_size": object()}),
    ]
    before = tree(tmp_path)
    for error, given, where, options in refused:
        with pytest.raises(error):
            lrconvert.convert_many(given, where, "lowrank", **options)  # type: ignore[arg-type]
    assert tree(tmp_path) == before and not out.exists()


def test_one_adapter_stays_one(zoo: Path, tmp_path: Path) -> None:
    """A single adapter, and a folder with one inside, are written to a file; a folder of several is not."""
    assert not sources.are_many([zoo / "llama-plain"], tmp_path / "x.lrc")
    assert not sources.are_many([zoo / "llama-plain"], tmp_path)
    assert not sources.are_many([zoo / "team" / "a"], tmp_path / "x.lrc")
    assert sources.are_many([zoo / "team" / "a"], tmp_path)
    assert sources.are_many([zoo], tmp_path / "x.lrc")
    assert sources.are_many([zoo / "llama-plain", zoo / "gpt2-conv1d"], tmp_path / "x")


def test_hub_ids_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    snapshot = cache / "models--org--lora" / "snapshots" / ("a" * 40)
    shutil.copytree(ADAPTERS / "llama-plain", snapshot)
    (cache / "models--org--lora" / "refs").mkdir()
    (cache / "models--org--lora" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    (job,) = sources.plan(["org/lora"], tmp_path / "out")
    assert (job.source, job.path, job.output) == ("org/lora", snapshot, tmp_path / "out" / "org--lora.lrc")


def test_files_of_common_names_are_named_by_their_folder(tmp_path: Path) -> None:
    for name in ("a/lora.safetensors", "b/lora.safetensors", "b/style.v2.safetensors", "adapters.npz"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"")
    found = {str(job.output) for job in sources.plan([tmp_path / "in"], Path("out"))}
    assert found == {"out/a.lrc", "out/in.lrc", "out/b.lrc", "out/b/style.v2.lrc"}
    files = [tmp_path / "in" / n / "lora.safetensors" for n in "ab"]
    assert [job.output.name for job in sources.plan(files, Path("out"))] == ["a.lrc", "b.lrc"]


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.medium
def test_the_commands(zoo: Path, tmp_path: Path) -> None:
    words = ["lora-to-lowrank", zoo, "-o", "out", "--bits", "4"]
    done = command(*words, "--jobs", "2", cwd=tmp_path)
    assert done.returncode == 1 and "3 done, 0 skipped, 2 failed" in done.stdout
    told = [line for line in done.stderr.splitlines() if not line.startswith("lora-to-lowrank: ")]  # how far it is
    assert [line.split(":")[0] for line in told] == ["E-NOT-LORA", "E-HDR-LEN"]
    *adapters, found = map(json.loads, command(*words, "--json", "-j", "1", cwd=tmp_path).stdout.splitlines())
    assert (found["ok"], found["done"], found["skipped"], found["failed"]) == (False, 0, 3, 2)
    assert {a.get("error", {}).get("code", a["state"]) for a in adapters} == {
        "skipped",
        "E-NOT-LORA",
        "E-HDR-LEN",
    }
    two = [zoo / "llama-plain", zoo / "gpt2-conv1d"]
    well = command(
        "compress", *two, "-o", "two", "-j", "1", "--target-ratio", "4", "--methods", "lowrank", cwd=tmp_path
    )
    assert well.returncode == 0 and "2 done" in well.stdout and len(list((tmp_path / "two").glob("*.lrc"))) == 2
    assert command("lora-to-alora", *two, "-j", "1", "--total-rank", "9", "--dry-run", cwd=tmp_path).returncode == 0
    assert command("lora-to-lowrank", *two, cwd=tmp_path).returncode == 2


def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    """Processes are started without running the caller's script again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import lrconvert\nprint('begun')\n"
        f"print(lrconvert.convert_many([{str(ADAPTERS / 'llama-plain')!r}], 'out', 'lowrank', bits=4, jobs=2).ok)\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["begun", "True"]
