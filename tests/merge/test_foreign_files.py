"""Tidying and putting back touch what we wrote and nothing else: links lead nowhere, and files of others stay."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import random_lora
from crashes import Scene, calls_of, whole
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrconvert import api
from lrconvert.api import merge, unmerge
from lrconvert.core import errors
from lrconvert.io import durable
from lrconvert.io.checkpoint import JOURNAL, READY_NAME
from lrconvert.io.durable import system
from lrconvert.merge import Scaled, recover
from lrconvert.merge.signed_json import sign
from lrconvert.testing import faults

State = dict[str, tuple[bytes | str, int, int]]


def state(folder: Path) -> State:
    """Bytes (of links: where they lead), mode and time of change of everything in a folder."""
    found: State = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        content: bytes | str = (
            str(path.readlink()) if path.is_symlink() else b"" if path.is_dir() else path.read_bytes()
        )
        found[path.relative_to(folder).as_posix()] = (content, info.st_mode, info.st_mtime_ns)
    return found


def strangers(folder: Path) -> Path:
    """A stranger's folder with every name that a journal, a record and unfinished work have."""
    folder.mkdir()
    for name in (
        *("plan.json", "done.jsonl", "ready.json", "fresh.tmp", "patch-0.tmp", "patch-2.tmp", "config.json"),
        *("model/config.json", "model/model.safetensors", "model/.lrconvert/merge-1-0123456789ab/record.json"),
        *("old/config.json", "old/model.safetensors.index.json", "undone/record.json", "undone/base/0.header"),
        *("journal/plan.json", "journal/2024/may.txt", "journal/model/x", "record.json", "undo.bin", "thesis.txt"),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"a stranger's {name}")
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
    return folder


_calls: dict[tuple[str, str], int] = {}


def calls(scene: Scene, act: str, place: Path) -> int:
    """How many calls a command makes that change the disk."""
    if (scene.name, act) not in _calls:
        model = shutil.copytree(scene.acts()[act][0], place / "counted")
        _calls[scene.name, act] = len(calls_of(lambda: scene.acts()[act][2](model, resume=True)))
        shutil.rmtree(model)
    return _calls[scene.name, act]


def broken_off(scene: Scene, act: str, model: Path, at: int) -> None:
    """A model in which the command was killed before call `at`."""
    shutil.copytree(scene.acts()[act][0], model)
    with faults.installed(faults.Killer(at)), pytest.raises(faults.Killed):
        scene.acts()[act][2](model, resume=True)


COMMANDS: dict[str, Callable[[Scene, Path], Any]] = {
    "recover": lambda scene, model: recover(model),
    "merge": lambda scene, model: scene.merge(model),
    "merge on": lambda scene, model: scene.merge(model, resume=True),
    "unmerge": lambda scene, model: scene.unmerge(model),
    "unmerge on": lambda scene, model: scene.unmerge(model, resume=True),
    "unmerge in one step": lambda scene, model: unmerge(model),
    "merge into": lambda scene, model: merge(model, [scene.adapter], model.parent / "out"),
    "merge into, over": lambda scene, model: merge(
        model.parent / "base", [scene.adapter], model, overwrite=True, resume=True
    ),
}
PLACES = (
    *(".lrconvert", JOURNAL, f"{JOURNAL}/model", f"{JOURNAL}/old", f"{JOURNAL}/undone", f"{JOURNAL}/plan.json"),
    *(f"{JOURNAL}/{name}" for name in ("done.jsonl", READY_NAME, "fresh.tmp", "patch-0.tmp", "old/config.json")),
    *(f"{JOURNAL}/model/{name}" for name in ("config.json", ".lrconvert", "model.safetensors.index.json", "x")),
    *("RECORD", "RECORD/base", "RECORD/record.json", "RECORD/undo.bin", "config.json", "../.model.partial"),
    *("../.model.partial/model", "../.model.123.0badcafe.partial", "../.model.123.0badcafe.old", "../.model.1.tmp"),
)
KINDS_OF_LINKS = ("folder", "file", "dangling", "hard", "inner")


def placed(model: Path, place: str, kind: str, outside: Path) -> None:
    """Put a link at a place, in place of what is there; into a folder, the link that its name would have there."""
    records = [*model.glob(".lrconvert/merge-*"), *model.glob(f"{JOURNAL}/model/.lrconvert/merge-*")]
    path = model / place if "RECORD" not in place else records[0] / place[7:] if records else None
    if path is None or not path.parent.resolve().is_relative_to(model.parent.resolve()):
        return
    path = path.parent.resolve() / path.name
    if not path.parent.is_dir() or path.is_symlink():
        return
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "hard":
        os.link(outside / "thesis.txt", path)
    else:
        inner = {"folder": "", "file": "thesis.txt", "dangling": "nothing", "inner": "journal"}
        path.symlink_to(outside / inner[kind])


@pytest.mark.medium
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_nothing_outside_is_touched(data: st.DataObject, scenes: dict[str, Scene], place: Path) -> None:
    """Whatever a folder holds: links at every place, broken off work at any moment, records that were signed again."""
    scene, act = scenes[data.draw(st.sampled_from(("mixed", "swap")))], data.draw(st.sampled_from(("merge", "unmerge")))
    shutil.rmtree(place / "case", ignore_errors=True)
    (place / "case" / "inside").mkdir(parents=True)
    outside, model = strangers(place / "case" / "outside"), place / "case" / "inside" / "model"
    shutil.copytree(scene.base, model.parent / "base")
    total = calls(scene, act, place)
    broken_off(scene, act, model, data.draw(st.integers(1, total)))
    for where in data.draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=3)):
        placed(model, where, data.draw(st.sampled_from(KINDS_OF_LINKS)), outside)
    kept = []
    for path in (model / "notes.txt", model / JOURNAL / "notes.txt", model / JOURNAL / "old" / "chapter.txt"):
        if path.parent.is_dir() and path.parent.resolve().is_relative_to(model.parent.resolve()):
            path.write_text("mine")
            kept.append(path)
    linked = {p.lstat().st_ino for p in outside.rglob("*")}
    before = state(outside)
    for name in data.draw(st.lists(st.sampled_from(sorted(COMMANDS)), min_size=1, max_size=3)):
        with suppress(errors.LrcError):
            COMMANDS[name](scene, model)
        assert state(outside) == before, name
        assert {p.lstat().st_ino for p in outside.rglob("*")} == linked
        if "over" in name or "one step" in name:  # the folder is another one now
            break
        assert all(path.read_text() == "mine" for path in kept), name


def test_links_are_refused_by_name(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """With the path of the link, before anything is done; and a folder without them goes on."""
    scene = scenes["mixed"]
    outside = strangers(tmp_path / "outside")
    before = state(outside)
    at = calls(scene, "merge", tmp_path) * 2 // 3
    for number, where in enumerate(
        (".lrconvert", JOURNAL, f"{JOURNAL}/model", f"{JOURNAL}/old", f"{JOURNAL}/plan.json")
    ):
        model = tmp_path / f"model-{number}"
        broken_off(scene, "merge", model, at)
        kept = tmp_path / f"kept-{number}"
        (model / where).rename(kept)
        (model / where).symlink_to(outside / "journal")
        for verb in (recover, scene.merge, scene.unmerge, unmerge):
            with pytest.raises(errors.LrcError, match=r"E-OUT-PATH: .*is a link|E-UNFINISHED") as caught:
                verb(model)
            assert str(model / where) in str(caught.value) or caught.value.code == "E-UNFINISHED"
        (model / where).unlink()
        kept.rename(model / where)
        recover(model)
        assert whole(model) in (whole(scene.base), whole(scene.merged))
    assert state(outside) == before


def test_a_link_that_comes_at_the_last_moment(tmp_path: Path) -> None:
    """Between looking at a folder and deleting what is in it, the folder is exchanged for a link."""
    outside = strangers(tmp_path / "outside")
    before = state(outside)
    work = tmp_path / ".out.1.0badcafe.partial"
    (work / "journal" / "2024").mkdir(parents=True)
    (work / "journal" / "2024" / "may.txt").write_text("ours")

    class Racing(faults.Quick):
        def unlink(self, path: Path) -> None:
            if not (work / "journal").is_symlink():
                (work / "journal").rename(tmp_path / "elsewhere")
                (work / "journal").symlink_to(outside / "journal")
            super().unlink(path)

    with faults.installed(Racing()), pytest.raises(errors.FileWriteError):
        durable.clean_up(tmp_path / "out")
    assert state(outside) == before
    recover(tmp_path / "out")
    assert state(outside) == before and not work.exists()


def test_every_call_stays_below_a_guarded_folder(tmp_path: Path) -> None:
    """No call of the system goes through a link in it, at any depth."""
    outside, root = strangers(tmp_path / "outside"), tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    (root / "deep" / "link").symlink_to(outside)
    (root / "own").write_text("own")
    disk, before = system.System(), state(outside)
    place = root / "deep" / "link"
    calls: dict[str, Callable[[], Any]] = {
        "open": lambda: disk.open(place / "new", os.O_WRONLY | os.O_CREAT),
        "open_folder": lambda: disk.open_folder(place / "journal"),
        "mkdir": lambda: disk.mkdir(place / "new"),
        "rename to": lambda: disk.rename(root / "own", place / "thesis.txt"),
        "rename from": lambda: disk.rename(place / "thesis.txt", root / "stolen"),
        "exchange": lambda: disk.exchange(root / "own", place / "thesis.txt"),
        "link": lambda: disk.link(place / "thesis.txt", root / "stolen"),
        "unlink": lambda: disk.unlink(place / "thesis.txt"),
        "rmdir": lambda: disk.rmdir(place / "journal" / "2024"),
    }
    with system.guarded(root):
        for name, call in calls.items():
            with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
                call()
            assert state(outside) == before, name
    assert sorted(p.name for p in root.iterdir()) == ["deep", "own"]


def test_files_of_others_stay_in_a_journal(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """Only names that a merge writes are deleted from it."""
    scene = scenes["swap"]
    model = tmp_path / "model"
    broken_off(scene, "merge", model, 60)
    mine = [model / JOURNAL / name for name in ("notes.txt", "model/my.txt", "old/my.txt", "mine/deep/x.json")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    recover(model)
    scene.merge(model)
    scene.unmerge(model)
    assert [path.read_text() for path in mine] == ["mine"] * 4
    left = {p for p in (model / ".lrconvert").rglob("*") if p.is_file()}
    assert left == set(mine)


def test_an_unmerge_in_one_step_deletes_nothing_of_others(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """What the new folder would not have, hidden folders and other weights, is not deleted with the old one."""
    scene = scenes["swap"]
    for name in (".git/config", "pytorch_model.bin", "RECORD/notes.txt"):
        model = shutil.copytree(scene.merged, tmp_path / name[:4])
        record = next(model.glob(".lrconvert/merge-*"))
        path = record / "notes.txt" if "RECORD" in name else model / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        before = whole(model)
        for from_base in (None, scene.base):
            if from_base is not None and "RECORD" in name:
                continue
            with pytest.raises(
                errors.LrcError, match=r"E-OUT-PATH: .*in_place=True|E-UNDO: .*notes.txt: .*ove it away"
            ):
                unmerge(model, from_base=from_base)
            assert whole(model) == before
        if "RECORD" in name:
            with pytest.raises(errors.UndoError, match=r"notes\.txt"):
                unmerge(model, in_place=True)
            path.rename(model / "notes.txt")
        unmerge(model, in_place=True)
        mine = whole(model)
        assert mine.pop(name if "RECORD" not in name else "notes.txt") == b"mine"
        assert mine == whole(scene.base)


def test_folders_that_only_look_like_work(tmp_path: Path) -> None:
    """A hidden folder with the names of unfinished work and content, but without our plan, is somebody's own."""
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    lora = random_lora()
    for names in (("model/thesis.txt",), ("model/thesis.txt", "plan.json"), ("notes.json",), ("model", "config.json")):
        for name in names:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text("mine")
        (tmp_path / "x.lrc").unlink(missing_ok=True)
        api.write(api.convert(lora, "lowrank", bits=4).compact, tmp_path / "x.lrc")
        before = state(partial)
        with pytest.raises(errors.FileKindError):
            recover(out)
        assert state(partial) == before
        shutil.rmtree(partial)


def test_a_record_with_a_tensor_in_another_file(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """A record that was changed and signed again, while the model is between two states: our error."""
    scene = scenes["swap"]
    stopped = 0
    for at in range(60, calls(scene, "merge", tmp_path), 5):
        model = tmp_path / f"model-{at}"
        broken_off(scene, "merge", model, at)
        records = list((model / JOURNAL / "model" / ".lrconvert").glob("merge-*/record.json"))
        if not (model / JOURNAL / READY_NAME).exists() or not records:
            continue
        value = json.loads(records[0].read_text())
        for tensor in value["tensors"]:
            tensor["output"] = f"{tensor['output']}.elsewhere"
        records[0].write_bytes(sign({key: item for key, item in value.items() if key != "digest"}))
        try:
            recover(model)
        except errors.LrcError as error:
            stopped += error.code == "E-UNDO"
    assert stopped > 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_root_keeps_owners(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """Owner, group and mode of every file, in place and in one step; new ones are the owner's of the folder."""
    scene = scenes["swap"]
    model = shutil.copytree(scene.base, tmp_path / "model")
    for path in (model, *model.rglob("*")):
        os.chown(path, 4321, 8765)
        path.chmod(0o750 if path.is_dir() else 0o640)

    def owners() -> set[tuple[int, int]]:
        return {(p.stat().st_uid, p.stat().st_gid) for p in (model, *model.rglob("*"))}

    scene.merge(model)
    assert owners() == {(4321, 8765)}
    assert {p.stat().st_mode & 0o777 for p in model.iterdir() if p.is_file()} == {0o640}
    scene.unmerge(model)
    assert owners() == {(4321, 8765)} and whole(model) == whole(scene.base)
    merge(scene.base, [scene.adapter], model, overwrite=True)
    assert owners() == {(4321, 8765)}
    unmerge(model)
    assert owners() == {(4321, 8765)}
    single = tmp_path / "x.lrc"
    compact = api.convert(random_lora(), "lowrank", bits=4).compact
    api.write(compact, single)
    os.chown(single, 4321, 8765)
    single.chmod(0o604)
    api.write(compact, single, overwrite=True)
    info = single.stat()
    assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (4321, 8765, 0o604)


LONG = [*("x" * n for n in (200, 219, 240, 247, 255)), "ü" * 127, os.fsdecode(b"\xff" * 255), os.fsdecode(b"b\xe4r")]


@pytest.mark.parametrize("name", LONG, ids=lambda name: f"{name[:1]!r} {len(os.fsencode(name))}")
def test_names_as_long_as_the_disk_takes(name: str, tmp_path: Path) -> None:
    """Files and folders of up to 255 bytes, not UTF-8 too, are written, and their leftovers found."""
    lora = random_lora()
    compact = api.convert(lora, "lowrank", bits=4).compact
    for overwrite in (False, True):
        api.write(compact, tmp_path / name, overwrite=overwrite)
    made = len(calls_of(lambda: api.write(compact, tmp_path / name, overwrite=True)))
    for at in range(2, made):
        with faults.installed(faults.Killer(at)), pytest.raises(faults.Killed):
            api.write(compact, tmp_path / name, overwrite=True)
        recover(tmp_path / name)
        assert [p.name for p in tmp_path.iterdir()] == [name]
    (tmp_path / name).unlink()
    with durable.atomic_directory(tmp_path / name, overwrite=False) as folder:
        folder.write_bytes(name, b"1")
    with durable.work_directory(tmp_path / name, overwrite=True, resume=True) as work:
        work.content.write_bytes(name, b"2")
    assert whole(tmp_path) == {f"{name}/{name}": b"2"}
    durable.partial_path(tmp_path / name).write_bytes(b"")


def test_recover_knows_unfinished_work(tmp_path: Path) -> None:
    """Of a refinement or statistics: it is named, and stays; a stranger's file of that name is not spoken of."""
    from lrconvert.refine import checkpoint

    out, partial = tmp_path / "out.lrc", tmp_path / "out.lrc.partial"
    checkpoint.write(partial, {}, checkpoint.State())
    assert recover(out).unfinished == (partial.name,) and partial.exists()
    partial.write_bytes(b"somebody's")
    with pytest.raises(errors.FileKindError):
        recover(out)
    assert partial.read_bytes() == b"somebody's"


def test_the_same_merge_with_another_scale_is_another(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """Only what is the same to the bit is done already; `again` merges it once more, and a changed model is refused."""
    scene = scenes["swap"]
    adapter = random_lora(((12, 16), (16, 20)), scale=0.05)
    model = shutil.copytree(scene.base, tmp_path / "model")
    merge(model, [adapter], in_place=True)
    first = whole(model)
    assert merge(model, [adapter], in_place=True).already_done and whole(model) == first
    assert merge(model, [adapter], in_place=True, dry_run=True).already_done
    assert not merge(model, [Scaled(adapter, 0.5)], in_place=True).already_done
    assert merge(model, [adapter], in_place=True).already_done  # though another came since
    once = merge(model, [adapter], in_place=True, again=True)
    assert not once.already_done and once.record.startswith(".lrconvert/merge-3-")
    assert any("merge 3" in w for w in merge(model, [adapter], tmp_path / "out").warnings)
    path = model / "model-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = whole(model)
    with pytest.raises(errors.DigestError, match=r"changed since merge 3.*again=True"):
        merge(model, [adapter], in_place=True)
    assert whole(model) == before


def test_a_model_that_another_run_changes_is_not_replaced(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """An unmerge in one step waits for nobody, and takes no folder away from under a run that works in it."""
    scene = scenes["swap"]
    model = shutil.copytree(scene.merged, tmp_path / "model")
    told: list[str] = []

    def meanwhile(fraction: float, text: str) -> None:
        with pytest.raises(errors.LockedError):
            unmerge(model)
        told.append(text)

    scene.unmerge(model, progress=meanwhile)
    assert told and whole(model) == whole(scene.base)


def test_names_that_are_no_utf8_do_not_spoil_a_record(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """Of adapters and of files beside the weights: the record is read again, and the merge undone."""
    scene, name = scenes["swap"], os.fsdecode(b"b\xe4r")
    base = shutil.copytree(scene.base, tmp_path / "base")
    (base / name).write_bytes(b"notes")
    model = shutil.copytree(base, tmp_path / os.fsdecode(b"m\xe4"))
    merge(model, [Scaled(scene.adapter, name=name)], in_place=True)
    assert unmerge(model, tmp_path / "back").warnings == ()
    assert whole(tmp_path / "back") == whole(base)
    (model / name).write_bytes(b"changed")
    assert [w for w in unmerge(model, in_place=True).warnings if "changed since the merge" in w]
