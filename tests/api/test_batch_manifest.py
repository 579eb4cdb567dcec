"""The manifest of a batch: its records say what a full check would say, and whatever becomes of them, the files are the
same; its jobs are done as they stand there, or refused before any work."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ADAPTERS
from test_batch import work_here

import lrconvert
from lrconvert.api import adapters
from lrconvert.api.batch import manifest, one, request, run, sources
from lrconvert.api.batch.job import Job, Outcome
from lrconvert.api.batch.manifest import Manifest, Record
from lrconvert.api.batch.tally import Batch
from lrconvert.core import errors
from lrconvert.formats.readers import base as readers
from lrconvert.io import durable

OPTIONS: dict[str, Any] = {"bits": 4}
NAMES = ("a", "b", "c")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the adapters that were worked on, in this process; young files count as old."""
    monkeypatch.setattr(request, "_TICK", -1)
    return work_here(monkeypatch)


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    for name in NAMES:
        shutil.copytree(ADAPTERS / "llama-plain", tmp_path / "zoo" / name)
    return tmp_path / "zoo"


def convert(zoo: Path, **options: Any) -> Batch:
    return lrconvert.convert_many(zoo, zoo.parent / "out", "lowrank", **{**OPTIONS, **options})


def states(batch: Batch) -> dict[str, str]:
    return {Path(o.source).name: o.code or o.state for o in batch.outcomes}


def outputs(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.glob("*.lrc")) if p.is_file()}


def text(zoo: Path) -> bytes:
    return (zoo.parent / "out" / manifest.NAME).read_bytes()


def known(text: bytes) -> list[Any]:
    """What records say of outputs, but for how they came to be."""
    fields = ("source", "digest", "output", "output_digest", "bytes", "settings", "source_state", "output_state")
    return sorted([record.get(name) for name in fields] for record in map(json.loads, text.splitlines()))


# --- what is known --------------------------------------------------------------------------------------------------


def test_what_the_manifest_knows_is_not_read(zoo: Path, asked: list[str]) -> None:
    """The second run works on nothing, and says of the outputs what a full check says."""
    first = convert(zoo)
    assert states(first) == dict.fromkeys(NAMES, "done") and asked == [*NAMES] and first.notes == ()
    lines, before = text(zoo), outputs(zoo.parent / "out")
    asked.clear()
    passed = convert(zoo)
    assert asked == [] and text(zoo) == lines and outputs(zoo.parent / "out") == before
    (zoo.parent / "out" / manifest.NAME).unlink()
    checked = convert(zoo)
    assert asked == [*NAMES] and passed.outcomes == checked.outcomes
    assert known(text(zoo)) == known(lines)


def _same_size(path: Path) -> None:
    """Other bytes, as many, at the same time by all that a program can set."""
    info = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def _replaced(path: Path) -> None:
    copy = shutil.copy2(path, path.with_name("copy"))
    Path(copy).replace(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "an input of equal size": lambda root: _same_size(root / "zoo" / "b" / "adapter_model.safetensors"),
    "a setting": lambda root: (root / "zoo" / "b" / "adapter_config.json").write_text(
        (root / "zoo" / "b" / "adapter_config.json").read_text().replace('"lora_alpha": ', '"lora_alpha": 1')
    ),
    "a file more": lambda root: (root / "zoo" / "b" / "more.json").write_text("{}"),
    "a file less": lambda root: (root / "zoo" / "b" / "adapter_model.safetensors").unlink(),
    "an input put in place anew": lambda root: _replaced(root / "zoo" / "b" / "adapter_model.safetensors"),
    "no output": lambda root: (root / "out" / "b.lrc").unlink(),
    "an output of equal size": lambda root: _same_size(root / "out" / "b.lrc"),
    "an output cut short": lambda root: (root / "out" / "b.lrc").write_bytes(b"short"),
    "another's output": lambda root: shutil.copy2(root / "out" / "a.lrc", root / "out" / "b.lrc"),
    "a folder in place of the output": lambda root: (
        (root / "out" / "b.lrc").unlink(),
        (root / "out" / "b.lrc").mkdir(),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_checked_in_full(change: str, zoo: Path, asked: list[str]) -> None:
    """Only the adapter that was changed is worked on, with the outcome that it has without records."""
    convert(zoo)
    asked.clear()
    CHANGES[change](zoo.parent)
    aside = shutil.copytree(zoo.parent, zoo.parent / "aside", copy_function=shutil.copy2) / "zoo"
    (aside.parent / "out" / manifest.NAME).unlink()
    with_records = states(convert(zoo))
    assert asked == ["b"] and with_records["a"] == with_records["c"] == "skipped"
    assert with_records == states(convert(aside)) and outputs(zoo.parent / "out") == outputs(aside.parent / "out")


@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"seed": 7}, {"include": ["q_proj"]}, {"allow_pickle": True}], ids=str
)
def test_other_options_are_not_known(options: dict[str, Any], zoo: Path, asked: list[str]) -> None:
    convert(zoo)
    asked.clear()
    assert states(convert(zoo, **options)) == dict.fromkeys(NAMES, "E-OUT-EXISTS") and asked == [*NAMES]
    asked.clear()
    assert set(states(convert(zoo)).values()) == {"skipped"} and asked == []
    assert states(convert(zoo, **options, overwrite=True)) == dict.fromkeys(NAMES, "done")
    asked.clear()
    assert set(states(convert(zoo, **options)).values()) == {"skipped"} and asked == []


def test_an_input_that_may_still_change_is_not_vouched_for(
    zoo: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One so young that its next change may have the same time, and one that changes while it is converted."""
    monkeypatch.setattr(request, "_TICK", 10**18)
    convert(zoo)
    assert b"source_state" not in text(zoo) and text(zoo).count(b'"done"') == 3
    monkeypatch.setattr(request, "_TICK", -1)
    shutil.rmtree(zoo.parent / "out")
    real = adapters.load_lora

    def load(path: Path, **options: Any) -> Any:
        lora = real(path, **options)
        if path.name == "b":
            os.utime(path / "adapter_config.json", ns=(1, 1))
        return lora

    monkeypatch.setattr(adapters, "load_lora", load)
    assert set(states(convert(zoo)).values()) == {"done"}
    asked.clear()
    assert set(states(convert(zoo)).values()) == {"skipped"} and asked == ["b"]


# --- damage, crashes, other runs ------------------------------------------------------------------------------------


def test_a_manifest_that_is_cut_anywhere(zoo: Path, asked: list[str]) -> None:
    """A line that a crash has torn is no line: its output is checked, and the manifest is whole again."""
    convert(zoo)
    path, whole = zoo.parent / "out" / manifest.NAME, text(zoo)
    lines = whole.splitlines(keepends=True)
    for cut in (0, 1, len(lines[0]) - 1, len(lines[0]), len(whole) - 300, len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        asked.clear()
        batch = convert(zoo)
        assert asked == [*NAMES][whole[: cut + 1].count(b"\n") :] and batch.notes == ()
        assert set(states(batch).values()) == {"skipped"} and known(text(zoo)) == known(whole)


@pytest.mark.parametrize("damage", [b"\0", b"\n", b'{"name":"b.lrc"}', b"0"], ids=repr)
def test_a_manifest_that_is_damaged(damage: bytes, zoo: Path, asked: list[str]) -> None:
    """A line that is not as it was sealed is not believed, a note says so, and all other lines still are."""
    convert(zoo)
    path, whole = zoo.parent / "out" / manifest.NAME, text(zoo)
    at = whole.index(b"\n") + 21
    path.write_bytes(whole[:at] + damage + whole[at + 1 :])
    asked.clear()
    batch = convert(zoo)
    assert asked == ["b"] and batch.notes and "line 2" in batch.notes[0]
    assert set(states(batch).values()) == {"skipped"} and known(text(zoo)) == known(whole) and convert(zoo).notes == ()


def test_a_run_that_is_broken_off_anywhere(zoo: Path, asked: list[str]) -> None:
    """Stopped after any adapter, and run again: the same files, and nothing is made twice."""
    convert(zoo)
    wanted = outputs(zoo.parent / "out")
    for stop in range(len(NAMES)):
        shutil.rmtree(zoo.parent / "out")
        asked.clear()

        def interrupt(done: int, of: int, stop: int = stop) -> None:
            if done > stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(zoo, on_done=interrupt)
        again = states(convert(zoo))
        assert outputs(zoo.parent / "out") == wanted and [*again.values()].count("done") == len(NAMES) - stop - 1


def test_a_worker_of_a_killed_batch_may_finish_first(
    zoo: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output that comes to be while it is made is passed by if it is the one that was wanted, and refused if not."""
    convert(zoo)
    kept = shutil.copytree(zoo.parent / "out", zoo.parent / "kept")
    real = one.places.publish
    for content, state in (((kept / "b.lrc").read_bytes(), "skipped"), (b"another program's", "E-OUT-EXISTS")):
        shutil.rmtree(zoo.parent / "out")

        def publish(compact: Any, output: str, content: bytes = content, **options: Any) -> str:
            if Path(output).name == "b.lrc":
                Path(output).write_bytes(content)
            return real(compact, output, **options)

        monkeypatch.setattr(one.places, "publish", publish)
        assert states(convert(zoo)) == {"a": "done", "b": state, "c": "done"}
        assert (zoo.parent / "out" / "b.lrc").read_bytes() == content


def test_one_batch_at_a_time_writes_a_folder(zoo: Path, asked: list[str]) -> None:
    out = zoo.parent / "out"
    out.mkdir()
    with durable.locked(out), pytest.raises(errors.LockedError):
        convert(zoo)
    assert [*out.iterdir()] == [] and asked == []
    with pytest.raises(errors.LockedError):  # begun by an outcome of the first
        convert(zoo, on_done=lambda done, of: convert(zoo))
    assert len(asked) == 1
    assert set(states(convert(zoo)).values()) == {"done", "skipped"}
    with durable.locked(out):
        assert convert(zoo, dry_run=True).ok  # writes nothing


def test_a_manifest_that_cannot_be_kept_is_a_note(zoo: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: durable.File, data: bytes) -> int:
        raise errors.FileWriteError("the disk is full", path=file.path)

    monkeypatch.setattr(durable.File, "write", refuse)
    monkeypatch.setattr(run, "convert_one", lambda job: Outcome(job.source, job.output, "done"))
    batch = convert(zoo)
    assert batch.ok and batch.count("done") == 3 and len(batch.notes) == 1 and "the disk is full" in batch.notes[0]


@pytest.mark.parametrize("kind", ["a link", "a folder", "a pipe"])
def test_what_is_in_the_way_of_the_manifest(kind: str, zoo: Path, asked: list[str]) -> None:
    out, outside = zoo.parent / "out", zoo.parent / "outside"
    out.mkdir()
    outside.write_text("kept")
    {"a link": lambda p: p.symlink_to(outside), "a folder": Path.mkdir, "a pipe": os.mkfifo}[kind](out / manifest.NAME)
    with pytest.raises(errors.OutputPathError):
        convert(zoo)
    assert outside.read_text() == "kept" and len([*out.iterdir()]) == 1


def test_a_folder_of_outputs_behind_a_link(zoo: Path, asked: list[str]) -> None:
    (zoo.parent / "real").mkdir()
    (zoo.parent / "out").symlink_to(zoo.parent / "real")
    assert set(states(convert(zoo)).values()) == {"done"}
    asked.clear()
    assert set(states(convert(zoo)).values()) == {"skipped"} and asked == []


# --- jobs of a manifest ---------------------------------------------------------------------------------------------


def asking(folder: Path, *lines: dict[str, str] | str, end: str = "\n") -> Path:
    path = folder / "jobs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + end)
    return path


def done(path: Path, **options: Any) -> Batch:
    return lrconvert.convert_many(None, None, "lowrank", manifest=path, **{**OPTIONS, **options})


@pytest.mark.parametrize("end", ["\n", "", "\n\n"], ids=repr)
def test_sources_and_outputs_come_from_a_manifest(end: str, zoo: Path, asked: list[str]) -> None:
    """Paths are relative to it, wherever the command runs; what is done is appended, and passed by later."""
    lines = [{"source": f"zoo/{name}", "output": f"made/{name}/small.lrc"} for name in NAMES]
    lines[1]["digest"] = request.of_source(zoo / "b")
    path = asking(zoo.parent, *lines, end=end)
    before = path.read_text()
    assert set(states(done(path)).values()) == {"done"} and asked == [*NAMES]
    wanted = convert(zoo)
    for outcome, name in zip(wanted.outcomes, NAMES, strict=True):
        made = zoo.parent / "made" / name / "small.lrc"
        assert made.read_bytes() == Path(outcome.output).read_bytes()
    text = path.read_text()
    assert text.startswith(before.rstrip()) and text.count('"state"') == 3
    asked.clear()
    assert set(states(done(path)).values()) == {"skipped"} and asked == [] and path.read_text() == text
    (zoo.parent / "made" / "b" / "small.lrc").unlink()
    assert states(done(path)) == {"a": "skipped", "b": "done", "c": "skipped"} and asked == ["b"]
    records = list(Manifest(path, asks=True).records())
    assert [(record.output, record.state) for record in records if isinstance(record, Record)] == [
        (line["output"], "done") for line in lines
    ]


def test_a_record_is_a_manifest_of_jobs_as_well(zoo: Path, asked: list[str]) -> None:
    """That of a folder of outputs names the jobs of which it is the record."""
    convert(zoo)
    path = zoo.parent / "out" / manifest.NAME
    asked.clear()
    assert set(states(done(path)).values()) == {"skipped"} and asked == []
    assert set(states(done(path, bits=3, overwrite=True)).values()) == {"done"} and asked == [*NAMES]


def test_a_manifest_elsewhere_is_the_record(zoo: Path, asked: list[str]) -> None:
    path = zoo.parent / "records" / "all.jsonl"
    path.parent.mkdir()
    assert set(states(convert(zoo, manifest=path)).values()) == {"done"}
    asked.clear()
    assert set(states(convert(zoo, manifest=path)).values()) == {"skipped"} and asked == []
    assert not (zoo.parent / "out" / manifest.NAME).exists() and path.read_text().count("\n") == 3


JOB = {"source": "zoo/a", "output": "a.lrc"}
REFUSED = {
    "no JSON": (["{"], "E-JSON-SYNTAX", "line 1"),
    "no output": ([JOB, {"source": "zoo/a"}], "E-MISSING", "line 2"),
    "another field": ([JOB, {**JOB, "ouput": "x"}], "E-UNKNOWN", "line 2"),
    "no digest": ([{**JOB, "digest": "12"}], "E-DIGEST", "line 1"),
    "one output of two": ([JOB, {"source": "zoo/b", "output": "a.lrc"}], "E-OPTION", "'zoo/a' and 'zoo/b'"),
    "not JSON lines": (["[1]"], "E-JSON-SYNTAX", "line 1"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_line_that_may_be_a_job_is_never_passed_by(fault: str, zoo: Path, asked: list[str]) -> None:
    """What is wrong with it is said before any work, with its number; nothing is written."""
    lines, code, told = REFUSED[fault]
    path = asking(zoo.parent, *lines)
    before = path.read_text()
    with pytest.raises(errors.LrcError) as refused:
        done(path)
    assert refused.value.code == code and told in str(refused.value) and str(path) in str(refused.value)
    assert asked == [] and path.read_text() == before


def test_a_damaged_record_may_be_a_job_that_is_lost(zoo: Path, asked: list[str]) -> None:
    """Where nothing else names the jobs, it is refused; where they are asked for, it is a note."""
    convert(zoo)
    path = zoo.parent / "out" / manifest.NAME
    path.write_bytes(path.read_bytes().replace(b"b.lrc", b"B.lrc"))
    with pytest.raises(errors.DigestError, match="line 2"):
        done(path)
    path = asking(zoo.parent, *({"source": f"zoo/{name}", "output": f"{name}.lrc"} for name in NAMES))
    done(path)
    path.write_bytes(path.read_bytes().replace(b'"done","source":"zoo/b"', b'"done","source":"zoo/B"'))
    asked.clear()
    batch = done(path)
    assert asked == ["b"] and len(batch.notes) == 1 and set(states(batch).values()) == {"skipped"}


def test_reading_a_manifest_never_writes_it(zoo: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reports while a batch runs, damaged and replaced records or not, leaves the file to the batch."""
    monkeypatch.setattr(manifest, "_SPARE", 0)
    convert(zoo)
    path = zoo.parent / "out" / manifest.NAME
    path.write_bytes(path.read_bytes() * 4 + b'{"state":"done"}\n' + path.read_bytes()[:40])
    before = path.read_bytes()
    for asks in (False, True):
        opened = Manifest(path, asks=asks)
        assert len(list(opened.records())) == 3 and len(opened.notes) == 1 and path.read_bytes() == before
    convert(zoo)
    assert path.read_bytes() != before and path.read_bytes().count(b"\n") == 3


def test_one_batch_at_a_time_writes_a_manifest(zoo: Path, asked: list[str]) -> None:
    path = asking(zoo.parent, JOB)
    with manifest.opened(path), pytest.raises(errors.LockedError):
        done(path)
    with pytest.raises(errors.OptionError, match="Leave the folder out"):
        lrconvert.convert_many(None, zoo.parent / "out", "lowrank", manifest=path)
    with pytest.raises(errors.FileReadError):
        done(zoo.parent / "nothing.jsonl")
    assert asked == [] and not (zoo.parent / "nothing.jsonl").exists()


def test_failures_are_recorded_and_tried_again(zoo: Path, asked: list[str]) -> None:
    path = asking(zoo.parent, JOB, {"source": "zoo/none", "output": "none.lrc"})
    assert states(done(path)) == {"a": "done", "none": "E-IO-KIND"}
    failed = Manifest(path).find("none.lrc")
    assert failed is not None and (failed.state, failed.code) == ("failed", "E-IO-KIND") and failed.message
    shutil.copytree(zoo / "a", zoo / "none")
    assert states(done(path)) == {"a": "skipped", "none": "done"}


# --- many -----------------------------------------------------------------------------------------------------------


def _record(name: str, mark: str) -> Record:
    return Record("done", "x", name, bytes=2, adapter_bytes=1, captured=0.1, settings=mark * 32)


def test_the_last_line_of_a_name_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of any bytes; lines that were replaced go when they are many, and nothing else does."""
    monkeypatch.setattr(manifest, "_SPARE", 3)
    names = ["a.lrc", "ä/ö.lrc", manifest.portable(os.fsdecode(b"\xff.lrc")), "line\nbreak.lrc"]
    with manifest.opened_in(tmp_path) as kept:
        for mark in "123":
            for name in names:
                kept.add(_record(name, mark))
        assert kept.find("a.lrc") is None  # an own line is for a later run
    nbytes = (tmp_path / manifest.NAME).stat().st_size
    with manifest.opened_in(tmp_path) as kept:
        assert (tmp_path / manifest.NAME).stat().st_size == nbytes // 3
        lines = [kept.find(name) for name in names]
        assert [line and line.settings for line in lines] == ["3" * 32] * 4
        assert lines[0] == _record("a.lrc", "3") and kept.find("b.lrc") is None
        kept.add(_record("b.lrc", "4"))
    again = Manifest(tmp_path / manifest.NAME)
    assert again.find("b.lrc") == _record("b.lrc", "4") and again.notes == [] and len(again) == 5


@pytest.mark.medium
def test_the_memory_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an adapter no more stays than its name and the place of its line, whatever it reports."""

    def convert_one(job: Job) -> Outcome:
        report = {"targets": list(range(300))}
        sizes = {"nbytes": 1, "total_bytes": 2, "captured": 0.5}
        return Outcome(job.source, job.output, "done", **sizes, report=report, stamps=("0" * 32, "1" * 32))

    monkeypatch.setattr(run, "convert_one", convert_one)
    work_here(monkeypatch)
    counts, peaks = (100, 1100), []
    for count in counts:
        (tmp_path / f"{count}").mkdir()
        for number in range(count):
            (tmp_path / f"{count}" / f"adapter-{number}.safetensors").touch()
        for _ in range(2):  # the second with a manifest to read
            tracemalloc.start()
            lrconvert.convert_many(
                tmp_path / f"{count}", tmp_path / f"out{count}", "lowrank", on_outcome=lambda o: None
            )
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        peaks.append(peak)
    assert (peaks[1] - peaks[0]) / (counts[1] - counts[0]) < 600


def test_files_of_one_folder_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of n files is not gone through n times, but again as soon as it has changed."""
    for number in range(20):
        (tmp_path / f"{number}.safetensors").touch()
        (tmp_path / f"{number}.json").touch()
    (tmp_path / "adapter_config.json").touch()
    monkeypatch.setattr(request, "_TICK", -1)
    listed, real = [], Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: listed.append(path) or real(path))
    for number in range(20):
        files, folder = request.files_of(tmp_path / f"{number}.safetensors")
        wanted = {f"{number}.safetensors", f"{number}.json", "adapter_config.json"}
        assert {file.name for file in files} == wanted and folder == tmp_path
    assert len(listed) == 1
    (tmp_path / "README.md").touch()
    assert tmp_path / "README.md" in request.files_of(tmp_path / "3.safetensors")[0] and len(listed) == 2


def test_shards_count_with_their_index(tmp_path: Path) -> None:
    """An adapter that is given by its index is another one if a shard is."""
    for name in ("m.safetensors.index.json", "m-00001-of-00001.safetensors"):
        (tmp_path / name).write_text("{}")
    before = request.of_source(tmp_path / "m.safetensors.index.json")
    (tmp_path / "m-00001-of-00001.safetensors").write_text("[]")
    assert request.of_source(tmp_path / "m.safetensors.index.json") != before


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"peft_type": %s}', '{"fine_tune_type": "lora"}', None])
@pytest.mark.parametrize("kind", ['"LORA"', '"MISS"', '"BONE"', '"VBLORA"', '"SBORA"', '"X"', "[]", "7", "null"])
def test_a_configuration_makes_an_adapter(config: str | None, kind: str, tmp_path: Path) -> None:
    """A folder with one is recognised by some reader, whatever it says: nothing else has to be asked."""
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config % kind if "%" in config else config)
    recognised = any(reader.recognises(tmp_path) for reader in readers.all_readers())
    assert sources.is_adapter(tmp_path) == recognised == (config is not None)
