"""Merging in place and back: the same bytes as a copy, one weight file of extra space, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
from conftest import ADAPTERS, BASES, random_lora
from crashes import KINDS, Scene, whole
from models import load_all, one_target, random_base, save_base, tree

from lrconvert import api
from lrconvert.api import merge, unmerge, verify
from lrconvert.core import errors
from lrconvert.core.dtypes import Stored
from lrconvert.io import durable
from lrconvert.io.checkpoint import JOURNAL, READY_NAME, open_checkpoint
from lrconvert.lora.adapter import LoraAdapter, Target, View
from lrconvert.merge import Scaled, recover
from lrconvert.merge.in_place.model_folder import PATCH, SAME, SWAP, ModelFolder
from lrconvert.merge.signed_json import sign
from lrconvert.testing import faults


def modes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """How weight files are changed, of every merge from now on."""
    seen: list[tuple[str, ...]] = []
    real = ModelFolder.begin

    def begin(folder: ModelFolder, work: Any, commit_plan: Any) -> None:
        seen.append(tuple(c.mode for c in commit_plan.changes))
        real(folder, work, commit_plan)

    monkeypatch.setattr(ModelFolder, "begin", begin)
    return seen


# --- the same bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_as_a_copy(kind: str, scenes: dict[str, Scene], tmp_path: Path, monkeypatch: Any) -> None:
    scene = scenes[kind]
    merge(scene.base, [scene.adapter], tmp_path / "copy")
    model = shutil.copytree(scene.base, tmp_path / "model")
    seen = modes(monkeypatch)
    report = scene.merge(model)
    assert whole(model) == whole(tmp_path / "copy") == whole(scene.merged)
    assert verify(model, scene.base, [scene.adapter]).ok
    copied = merge(scene.base, [scene.adapter], tmp_path / "again")
    assert replace(report, left_out=copied.left_out) == copied
    undone = scene.unmerge(model)
    assert whole(model) == whole(scene.base) and undone.verified
    expected = {"swap": (SWAP, SWAP), "patch": (PATCH, PATCH), "mixed": (SWAP, SAME, PATCH)}[kind]
    assert seen == [expected, expected]


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        *(("tiny-llama", f"llama-{name}") for name in ("plain", "dora", "lmhead")),
        *(("tiny-bert", "bert-classifier"), ("tiny-gpt2-hub", "gpt2-conv1d"), ("tiny-vit", "vit-query-value")),
    ],
)
def test_fixtures_in_place(base: str, adapter: str, tmp_path: Path) -> None:
    """DoRA, heads that are added, prefixes, transposed weights: as in a copy, and back."""
    model = shutil.copytree(BASES / base, tmp_path / "model")
    api.merge(BASES / base, ADAPTERS / adapter, tmp_path / "copy")
    api.merge(model, ADAPTERS / adapter, in_place=True)
    assert whole(model) == whole(tmp_path / "copy")
    api.unmerge(model, in_place=True)
    assert whole(model) == whole(BASES / base)


CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True, "vocab_size": 6}


def test_an_untied_head_in_another_file(tmp_path: Path) -> None:
    """The head is a copy of the embedding in another file, which changes too: the copy is of the base's."""
    rng = np.random.default_rng(0)
    shards = [
        {"model.embed_tokens.weight": Stored("F32", rng.standard_normal((6, 8)).astype("<f4"))},
        {"model.norm.weight": Stored("F32", rng.standard_normal(8).astype("<f4"))},
    ]
    base = save_base(tmp_path / "base", shards, CONFIG)
    lora = LoraAdapter((one_target(Target("model.embed_tokens.weight", (6, 8), View("transposed"))),))
    merge(base, [lora], tmp_path / "copy")
    model = shutil.copytree(base, tmp_path / "model")
    report = merge(model, [lora], in_place=True)
    assert report.added == ("lm_head.weight",)
    assert whole(model) == whole(tmp_path / "copy")
    unmerge(model, in_place=True)
    assert whole(model) == whole(base)


def test_stacks_of_merges(tmp_path: Path) -> None:
    one, two = (random_lora(((48, 32), (32, 40)), seed=n, scale=0.3) for n in (1, 2))
    base = random_base(tmp_path / "base", one, "BF16", shards=2)
    model = shutil.copytree(base, tmp_path / "model")
    merge(model, [one], in_place=True)
    first = whole(model)
    merge(model, [two], in_place=True)
    assert unmerge(model, in_place=True, number=2).remaining == 1
    assert whole(model) == first
    unmerge(model, in_place=True)
    assert whole(model) == whole(base)


def test_modes_of_files_stay(scenes: dict[str, Scene], tmp_path: Path) -> None:
    model = shutil.copytree(scenes["swap"].base, tmp_path / "model")
    for path in model.iterdir():
        path.chmod(0o640)
    scenes["swap"].merge(model)
    assert {p.stat().st_mode & 0o777 for p in model.iterdir() if p.is_file()} == {0o640}


def test_patched_files_are_the_same_files(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """Only the rows are written: the files keep their identity, and little is written beside them."""
    model = shutil.copytree(scenes["patch"].base, tmp_path / "model")
    before = {p.name: p.stat().st_ino for p in model.glob("*.safetensors")}
    scenes["patch"].merge(model)
    assert {p.name: p.stat().st_ino for p in model.glob("*.safetensors")} == before


def test_extra_space_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of what lies in the folder at any moment, beside the model: one weight file, and the record."""
    lora = random_lora(((400, 200),) * 5, scale=0.02)
    base = random_base(tmp_path / "base", lora, "BF16", shards=5)
    model = shutil.copytree(base, tmp_path / "model")
    size = sum(map(len, whole(base).values()))
    most = 0
    real = faults.Quick.fsync

    def fsync(disk: Any, descriptor: int) -> None:
        nonlocal most
        most = max(most, sum(p.stat().st_size for p in model.rglob("*") if p.is_file()))
        real(disk, descriptor)

    monkeypatch.setattr(faults.Quick, "fsync", fsync)
    merge(model, [lora], in_place=True)
    record = sum(len(data) for name, data in whole(model).items() if name.startswith(".lrconvert"))
    shard = max(len(data) for name, data in whole(base).items())
    assert shard * 5 > 0.9 * size
    assert most <= size + shard + record + 30_000
    most = 0
    unmerge(model, in_place=True)
    assert most <= size + shard + record + 30_000


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(model: Path, lora: Any, error: type[errors.LrcError], what: str, **options: Any) -> None:
    before = whole(model)
    with pytest.raises(error, match=what):
        merge(model, [lora], in_place=True, **options)
    assert whole(model) == before and not (model / JOURNAL).exists()


def test_what_is_not_changed_in_place(tmp_path: Path) -> None:
    lora = random_lora(((12, 16), (16, 20)))
    base = random_base(tmp_path / "base", lora, shards=2)
    names = ("model-00001-of-00002.safetensors", "config.json", "model.safetensors.index.json")
    for name in names:
        linked = shutil.copytree(base, tmp_path / f"hard-{name}")
        os.link(linked / name, tmp_path / f"other-{name}")
        refused(linked, lora, errors.OutputPathError, "2 hard links")
        soft = shutil.copytree(base, tmp_path / f"soft-{name}")
        (soft / name).rename(soft / f"x-{name}")
        (soft / name).symlink_to(f"x-{name}")
        refused(soft, lora, errors.OutputPathError, "symbolic link")
    (tmp_path / "alias").symlink_to("base")
    with pytest.raises(errors.OutputPathError):
        merge(tmp_path / "alias", [lora], in_place=True)
    (base / ".lrconvert").symlink_to(tmp_path / "hard-config.json")
    refused(base, lora, errors.OutputPathError, "in the way of the record")


def test_options_that_do_not_go_together(scenes: dict[str, Scene], tmp_path: Path) -> None:
    model = shutil.copytree(scenes["swap"].base, tmp_path / "model")
    excluded: list[dict[str, Any]] = [
        *({"undo": False}, {"shard_bytes": 100}, {"dequantize": True}, {"overwrite": True}, {"out": tmp_path / "x"})
    ]
    for options in excluded:
        refused(model, scenes["swap"].adapter, errors.OptionError, "E-OPTION", **options)
    with pytest.raises(errors.OptionError):
        merge(model, [scenes["swap"].adapter])
    for more in ({"out": tmp_path / "x"}, {"from_base": scenes["swap"].base}, {"overwrite": True}):
        with pytest.raises(errors.OptionError):
            unmerge(shutil.copytree(scenes["swap"].merged, tmp_path / f"m-{min(more)}"), in_place=True, **more)
    with pytest.raises(errors.OptionError):
        unmerge(scenes["swap"].merged, tmp_path / "x", resume=True)


def test_refusals_come_before_any_change(tmp_path: Path) -> None:
    """In the last file, after all others were computed: nothing has changed yet."""
    lora = random_lora(((12, 16), (16, 20)))
    base = random_base(tmp_path / "base", lora, "F16", shards=2)
    huge = replace(lora, targets=(lora.targets[0], replace(lora.targets[1], scale=1e9)))
    tiny = replace(lora, targets=tuple(replace(p, scale=1e-12) for p in lora.targets))
    for resume in (False, True):
        refused(base, huge, errors.MergeOverflowError, "element", resume=resume)
        refused(base, tiny, errors.NoEffectError, "no element moved", resume=resume)
    made = api.convert(lora, "lowrank", bits=4, base=random_base(tmp_path / "other", lora, "F16", seed=5)).compact
    refused(base, made, errors.LrcError, "E-FPR")


def test_other_cuts_are_not_undone_in_place(tmp_path: Path) -> None:
    lora = random_lora(((12, 16), (16, 20)))
    base = random_base(tmp_path / "base", lora, shards=2)
    merge(base, [lora], tmp_path / "out", shard_bytes=10**6)
    with pytest.raises(errors.UndoError, match="other files"):
        unmerge(tmp_path / "out", in_place=True)
    unmerge(tmp_path / "out", tmp_path / "back")
    assert whole(tmp_path / "back") == whole(base)


def test_damage_is_found_before_any_change(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """Of a weight in the last file, of the codes: an unmerge rehearses all of it."""
    for name in ("model-00002-of-00002.safetensors", "undo.bin"):
        model = shutil.copytree(scenes["swap"].merged, tmp_path / name)
        path = next(model.rglob(name))
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        before = whole(model)
        with pytest.raises(errors.DigestError):
            unmerge(model, in_place=True)
        assert whole(model) == before and not (model / JOURNAL).exists()


def test_weights_in_other_formats_stay_and_are_named(scenes: dict[str, Scene], tmp_path: Path) -> None:
    model = shutil.copytree(scenes["swap"].base, tmp_path / "model")
    (model / "pytorch_model.bin").write_bytes(b"old weights")
    report = scenes["swap"].merge(model)
    assert (model / "pytorch_model.bin").exists() and report.left_out == ()
    assert any("pytorch_model.bin stays" in w for w in report.warnings)


HOSTILE = [case for case in hostile.cases() if case.reads == "base" and case.code]


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.path)
def test_hostile_bases_on_every_path(
    case: hostile.Case, hostile_files: Path, scenes: dict[str, Scene], tmp_path: Path
) -> None:
    """Every verb that opens a base refuses it with the code of the case, and leaves everything as it was."""
    bad = shutil.copytree(hostile_files / case.path, tmp_path / "bad")
    good, lora, out = scenes["swap"], scenes["swap"].adapter, tmp_path / "out"
    merged = shutil.copytree(good.merged, tmp_path / "merged")
    undoable = shutil.copytree(bad, tmp_path / "undoable")
    shutil.copytree(good.merged / ".lrconvert", undoable / ".lrconvert")
    verbs: dict[str, Callable[[], Any]] = {
        "merge": lambda: merge(bad, [lora], out),
        "dry run": lambda: merge(bad, [lora], out, dry_run=True),
        "resume": lambda: merge(bad, [lora], out, resume=True),
        "in place": lambda: merge(bad, [lora], in_place=True),
        "verify": lambda: verify(bad, good.base, [lora]),
        "verify against": lambda: verify(merged, bad, [lora]),
        "unmerge": lambda: unmerge(undoable, out),
        "unmerge in place": lambda: unmerge(undoable, in_place=True),
        "unmerge from": lambda: unmerge(merged, out, from_base=bad),
        "unmerge from, in its place": lambda: unmerge(merged, from_base=bad),
        "convert": lambda: api.convert(lora, "lowrank", bits=4, base=bad),
    }
    before = whole(tmp_path)
    for name, verb in verbs.items():
        with pytest.raises(errors.LrcError) as caught:
            verb()
        assert caught.value.code == case.code, (name, caught.value)
        assert whole(tmp_path) == before, name
    assert recover(bad).state == "clean" and whole(tmp_path) == before


JOURNALS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a place outside": lambda v: v.update(place="../../precious"),
    "a text outside": lambda v: v["texts"].append("../precious"),
    "a patch outside": lambda v: v["changes"][2].__setitem__(2, "../../../precious"),
    "another file": lambda v: v["changes"][0].__setitem__(0, "../precious"),
    "another kind": lambda v: v.update(kind="delete"),
    "another mode": lambda v: v["changes"][1].__setitem__(1, "patch"),
    "no list": lambda v: v.update(changes=7),
    "a newer version": lambda v: v.update(version=2),
}


@pytest.mark.parametrize("what", JOURNALS)
def test_journals_of_strangers(what: str, scenes: dict[str, Scene], tmp_path: Path) -> None:
    """One thing changed in a journal and signed anew: refused, and nothing is touched."""
    model = shutil.copytree(scenes["mixed"].base, tmp_path / "model")
    (tmp_path / "precious").write_text("precious")
    stopped(scenes["mixed"], model, "merge", 3)
    path = model / JOURNAL / READY_NAME
    value = json.loads(path.read_text())
    JOURNALS[what](value)
    path.write_bytes(sign({key: item for key, item in value.items() if key != "digest"}))
    before = whole(tmp_path)
    for verb in (lambda: recover(model), lambda: scenes["mixed"].merge(model, resume=True)):
        with pytest.raises(errors.LrcError, match=r"E-UNDO|E-VER"):
            verb()
    assert whole(tmp_path) == before


def test_a_journal_that_is_a_link(scenes: dict[str, Scene], tmp_path: Path) -> None:
    model = shutil.copytree(scenes["mixed"].base, tmp_path / "model")
    stopped(scenes["mixed"], model, "merge", 3)
    (model / JOURNAL).rename(tmp_path / "elsewhere")
    (model / JOURNAL).symlink_to(tmp_path / "elsewhere")
    before = whole(tmp_path)
    with pytest.raises(errors.OutputPathError, match="is a link"):
        recover(model)
    assert whole(tmp_path) == before


# --- between two states ---------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stopped(scene: Scene, model: Path, act: str, at: int, **options: Any) -> None:
    """Break off after `at` renames of the second pass."""
    patch = pytest.MonkeyPatch()
    real, count = durable.system.System.rename, 0

    def rename(disk: Any, source: Path, target: Path) -> None:
        nonlocal count
        real(disk, source, target)
        count += (model / JOURNAL / READY_NAME).exists()
        if count == at:
            raise Stop

    patch.setattr(durable.system.System, "rename", rename)
    try:
        with pytest.raises(Stop):
            scene.acts()[act][2](model, **options)
    finally:
        patch.undo()


@pytest.mark.parametrize("act", ("merge", "unmerge"))
def test_between_two_states_nothing_reads_it(act: str, scenes: dict[str, Scene], tmp_path: Path) -> None:
    scene = scenes["swap"]
    before = scene.acts()[act][0]
    model = shutil.copytree(before, tmp_path / "model")
    stopped(scene, model, act, 3)
    assert not (model / "config.json").exists() and not (model / "model.safetensors.index.json").exists()
    for verb in (
        lambda: open_checkpoint(model),
        lambda: merge(model, [scene.adapter], tmp_path / "out"),
        lambda: merge(model, [scene.adapter], in_place=True),
        lambda: unmerge(model, tmp_path / "out"),
        lambda: unmerge(model, in_place=True),
        lambda: verify(model, scene.base, [scene.adapter]),
        lambda: verify(scene.merged, model, [scene.adapter]),
    ):
        with pytest.raises(errors.UnfinishedError, match=r"E-UNFINISHED: .*lrconvert.recover"):
            verb()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert recover(model).state == ("old" if act == "merge" else "new")
    assert whole(model) == whole(scene.base)
    assert recover(model).state == "clean"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", range(1, 7))
def test_resume_finishes(kind: str, at: int, scenes: dict[str, Scene], tmp_path: Path) -> None:
    """A merge goes on forward from wherever it was, to the same bytes and the same report."""
    scene = scenes[kind]
    model, other = (shutil.copytree(scene.base, tmp_path / name) for name in ("model", "other"))
    whole_report = scene.merge(other)
    try:
        stopped(scene, model, "merge", at, resume=True)
    except pytest.fail.Exception:
        assert whole(model) == whole(scene.merged)  # there are not so many renames
        return
    if (model / JOURNAL / READY_NAME).exists():
        with pytest.raises(errors.OptionError, match="other adapters"):
            merge(model, [Scaled(scene.adapter, 0.5)], in_place=True, resume=True)
    report = scene.merge(model, resume=True)
    assert whole(model) == whole(scene.merged)
    assert report == whole_report


def test_a_second_pass_that_cannot_write_is_taken_back(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """And is not, where there is `resume`: then it goes on."""
    scene = scenes["swap"]
    for resume in (False, True):
        model = shutil.copytree(scene.base, tmp_path / f"model-{resume}")
        patch = pytest.MonkeyPatch()
        real = durable.system.System.rename
        full = [True]

        def rename(disk: Any, source: Path, target: Path, real: Any = real, full: Any = full) -> None:
            if target.name == "model-00001-of-00002.safetensors" and full.pop():
                full.append(False)
                raise OSError(28, "No space left on device")
            real(disk, source, target)

        patch.setattr(durable.system.System, "rename", rename)
        with pytest.raises(errors.UnfinishedError if resume else errors.FileWriteError, match="No space left"):
            scene.merge(model, resume=resume)
        patch.undo()
        if resume:
            scene.merge(model, resume=True)
        assert whole(model) == whole(scene.merged if resume else scene.base)


# --- one run at a time ----------------------------------------------------------------------------------------------


def test_two_runs_at_once(scenes: dict[str, Scene], tmp_path: Path) -> None:
    scene = scenes["swap"]
    model = shutil.copytree(scene.base, tmp_path / "model")
    codes: list[str] = []

    def meanwhile(fraction: float, text: str) -> None:
        for verb in (scene.merge, scene.unmerge, recover):
            with pytest.raises(errors.LockedError) as caught:
                verb(model)
            codes.append(caught.value.code)

    scene.merge(model, progress=meanwhile)
    assert codes and set(codes) == {"E-LOCKED"}
    assert whole(model) == whole(scene.merged)


def test_two_merges_into_one_new_folder(scenes: dict[str, Scene], tmp_path: Path) -> None:
    scene = scenes["swap"]
    codes: list[str] = []

    def meanwhile(fraction: float, text: str) -> None:
        for resume in (False, True):
            with pytest.raises(errors.LockedError) as caught:
                merge(scene.base, [scene.adapter], tmp_path / "out", resume=resume)
            codes.append(caught.value.code)
        with pytest.raises(errors.FileKindError):  # it is not a leftover
            recover(tmp_path / "out")

    merge(scene.base, [scene.adapter], tmp_path / "out", progress=meanwhile)
    assert set(codes) == {"E-LOCKED"}
    assert tree(tmp_path / "out") == tree(scene.merged)


NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


@pytest.mark.parametrize("error", NO_LOCKS, ids=errno.errorcode.__getitem__)
def test_file_systems_without_locks(error: int, scenes: dict[str, Scene], tmp_path: Path) -> None:
    """New outputs are written, as making their folder keeps others out; nothing is changed where another run may be at
    work, and nothing is cleaned up that may be in use."""
    scene, out, partial = scenes["swap"], tmp_path / "out", tmp_path / ".out.partial"
    model, merged = (shutil.copytree(p, tmp_path / n) for p, n in ((scene.base, "model"), (scene.merged, "merged")))
    before = whole(model), whole(merged)
    with faults.installed(faults.Remote(error)):
        for verb in (lambda: scene.merge(model), lambda: scene.unmerge(merged)):
            with pytest.raises(errors.LockedError, match=r"the file system gives no lock \(.*\), so .* new folder"):
                verb()
        assert (whole(model), whole(merged)) == before

        def meanwhile(fraction: float, text: str) -> None:
            with pytest.raises(errors.LockedError, match="If none is, remove it, and run it again"):
                merge(scene.base, [scene.adapter], out)

        merge(scene.base, [scene.adapter], out, progress=meanwhile)
        assert tree(out) == tree(scene.merged) and not partial.exists()
        unmerge(out, tmp_path / "back")
        assert whole(tmp_path / "back") == whole(scene.base)
        with durable.atomic_file(tmp_path / "file", overwrite=False) as file:
            file.write(b"new")
        assert (tmp_path / "file").read_bytes() == b"new"
        partial.mkdir()
        (partial / "done.jsonl").write_text("of a killed run")
        shutil.rmtree(out)
        for verb in (lambda: recover(out), lambda: merge(scene.base, [scene.adapter], out, resume=True)):
            with pytest.raises(errors.LockedError, match="If none is, remove it, and run it again"):
                verb()
        meanwhile(0, "")
        assert (partial / "done.jsonl").exists() and not out.exists()
        shutil.rmtree(partial)
        merge(scene.base, [scene.adapter], out)
    assert tree(out) == tree(scene.merged)


# --- recover, and the command line ----------------------------------------------------------------------------------


def test_recover_knows_leftovers(tmp_path: Path) -> None:
    """Those that nobody holds, of this very output."""
    out = tmp_path / "out.lrc"
    with pytest.raises(errors.FileKindError):
        recover(out)
    own, other = tmp_path / ".out.lrc.123.0badcafe.tmp", tmp_path / ".other.lrc.123.0badcafe.tmp"
    own.write_bytes(b"half")
    other.write_bytes(b"half")
    with durable.atomic_file(out, overwrite=False) as file:
        file.write(b"new")
        assert recover(out).removed == (own.name,)
    assert out.read_bytes() == b"new" and other.exists() and not own.exists()
    (tmp_path / ".out.lrc.partial").mkdir()
    (tmp_path / ".out.lrc.partial" / "thesis.txt").write_text("not ours")
    assert recover(out).removed == () and (tmp_path / ".out.lrc.partial" / "thesis.txt").exists()


def test_a_folder_that_was_set_aside_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / ".out.123.0badcafe.old"
    aside.mkdir()
    (aside / "w").write_bytes(b"old")
    assert recover(tmp_path / "out").removed == (aside.name,)
    assert whole(tmp_path) == {"out/w": b"old"}
    aside.mkdir()
    (aside / "w").write_bytes(b"older")
    recover(tmp_path / "out")
    assert whole(tmp_path) == {"out/w": b"old"}


def lrconvert(*words: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lrconvert.cli", *map(str, words)], capture_output=True, text=True, check=False
    )


@pytest.mark.medium
def test_the_command_line(tmp_path: Path) -> None:
    model = shutil.copytree(BASES / "tiny-llama", tmp_path / "model")
    adapter = ADAPTERS / "llama-plain"
    for words in ((), ("--in-place", "-o", tmp_path / "x")):
        assert lrconvert("merge", model, adapter, *words).returncode == 2
    done = lrconvert("merge", model, adapter, "--in-place", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(model)
    assert lrconvert("verify", model, "--base", BASES / "tiny-llama", "--adapter", adapter).returncode == 0
    assert lrconvert("unmerge", model, "--in-place", "-q").returncode == 0
    assert whole(model) == whole(BASES / "tiny-llama")
    done = lrconvert("recover", model)
    assert done.returncode == 0 and "nothing that was broken off" in done.stdout
    assert json.loads(lrconvert("recover", model, "--json").stdout)["state"] == "clean"
    assert load_all(model)
