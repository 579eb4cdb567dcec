"""Every other command that writes, on disks that fail at any call or lose power at any moment.

There is the old output or the new one, and nothing is left over but work that the next run goes on with: to the bytes
of a run without a break."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ADAPTERS, BASES, random_lora
from crashes import ALL, calls_of, failures, power_losses, whole
from models import one_target, random_base

from lrconvert import api
from lrconvert.api import merge, unmerge
from lrconvert.api.batch.job import Job, Work
from lrconvert.cli import cli
from lrconvert.core.errors import DurabilityError, LrcError
from lrconvert.live.load_model import load_model
from lrconvert.lora import statistics_file
from lrconvert.lora.adapter import LoraAdapter, Target, View
from lrconvert.lora.input_statistics import Input, InputStatistics, Moment
from lrconvert.merge import recover
from lrconvert.testing import faults

pytestmark = pytest.mark.medium

Write = Callable[[Path, bool], Any]  # (output, whether it may be there)


def bytes_of(path: Path) -> Any:
    """A file's, or of every file of a folder; {} if there is nothing."""
    return path.read_bytes() if path.is_file() else whole(path)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- what is written ------------------------------------------------------------------------------------------------


def converting(folder: Path) -> Write:
    compact = api.convert(random_lora(), "lowrank", bits=4).compact
    return lambda out, overwrite: api.write(compact, out, overwrite=overwrite)


def upgrading(folder: Path) -> Write:
    api.write(api.convert(random_lora(), "lowrank", bits=4).compact, folder / "source.lrc")
    return lambda out, overwrite: api.upgrade(folder / "source.lrc", out, overwrite=overwrite)


def saving_statistics(folder: Path) -> Write:
    inputs = (Input(("layers.0.proj.weight",), None, 16, 10),)
    statistics = InputStatistics(inputs, lambda n: Moment(10, np.eye(16, dtype=np.float32)))
    return lambda out, overwrite: statistics_file.write(statistics, out, overwrite=overwrite)


def undoing(folder: Path) -> Write:
    lora = random_lora(((12, 16), (16, 20)))
    merge(random_base(folder / "base", lora, "BF16", shards=2), [lora], folder / "merged")
    return lambda out, overwrite: unmerge(folder / "merged", out, overwrite=overwrite)


LLAMA = (
    Target("model.layers.0.self_attn.k_proj.weight", (24, 48)),
    Target("model.layers.0.self_attn.q_proj.weight", (48, 48)),
)
DIFFUSION = (
    Target("unet.conv_in.weight", (32, 4, 3, 3), View("conv:3x3:1")),
    Target("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight", (32, 32)),
)
TARGETS = {
    **{name: ("lowrank", {"bits": 8}, LLAMA) for name in ("peft-lora", "gguf", "mlx", "raw")},
    **{name: ("lowrank", {"bits": 8}, DIFFUSION) for name in ("kohya", "diffusers")},
    "peft-vblora": ("vblora", {"vector_length": 12, "num_vectors": 8, "peft_compatible": True}, LLAMA),
    "peft-miss": ("bone", {"rank": 4}, LLAMA),
}


def exporting(to: str) -> Callable[[Path], Write]:
    def made(folder: Path) -> Write:
        method, options, targets = TARGETS[to]
        lora = LoraAdapter(tuple(one_target(t, rank=2, seed=n) for n, t in enumerate(targets)))
        compact = api.convert(lora, method, **options).compact
        base = BASES / "tiny-llama" if to == "gguf" else None
        return lambda out, overwrite: api.export(compact, out, to=to, base=base, overwrite=overwrite)

    return made


def by_command(*words: str) -> Callable[[Path], Write]:
    """A command of the command line; LORA, FILE and OUT stand for an adapter, a compact file and the output."""

    def made(folder: Path) -> Write:
        lora = api.load_lora(ADAPTERS / "llama-plain")
        api.write(api.convert(lora, "lowrank", bits=4, rank=2).compact, folder / "x.lrc")
        places = {"LORA": ADAPTERS / "llama-plain", "FILE": folder / "x.lrc"}

        def run(out: Path, overwrite: bool) -> None:
            arguments = [str({**places, "OUT": out}.get(word, word)) for word in words]
            cli.main([*arguments, *(["--overwrite"] * overwrite)], standalone_mode=False)

        return run

    return made


def of_many(folder: Path) -> Write:
    """One job of a batch, as a process of its own does it."""

    def run(out: Path, overwrite: bool) -> None:
        work = Work("convert", "lowrank", {"bits": 4, "rank": 2}, overwrite=overwrite)
        outcome = api.convert_one(Job(str(ADAPTERS / "llama-plain"), str(out), work))
        if outcome.state == "failed":
            kinds = {"E-IO-SYNC": DurabilityError}
            raise kinds.get(outcome.code, Refused)(outcome.message)

    return run


class Refused(LrcError, code="E-IO-WRITE"):
    """The error of a job of a batch."""


WRITERS: dict[str, Callable[[Path], Write]] = {
    "convert": converting,
    "upgrade": upgrading,
    "statistics": saving_statistics,
    "unmerge": undoing,
    **{f"export {to}": exporting(to) for to in TARGETS},
}
COMMANDS: dict[str, Callable[[Path], Write]] = {
    "compress": by_command("compress", "LORA", "-o", "OUT", "--target-ratio", "8", "--methods", "lowrank", "-q"),
    "alora": by_command("lora-to-alora", "LORA", "-o", "OUT", "--total-rank", "12", "-q"),
    "compare": by_command("compare", "LORA", "FILE", "--html", "OUT"),
    "many": of_many,
}


# --- every call may fail --------------------------------------------------------------------------------------------


def old_and_new(write: Write, place: Path, overwrite: bool) -> tuple[Any, Any, Callable[..., Any]]:
    """(what is there before, what is to be there, what puts the old one there)."""
    write(place / "wanted", False)
    new = bytes_of(place / "wanted")
    before = BASES / "tiny-vit"
    if isinstance(new, dict) and "lrconvert.json" in new:  # only what an export wrote is replaced by one
        before = place / "exported"
        before.mkdir()
        (before / "lrconvert.json").write_text("{}")
        (before / "lora.safetensors").write_bytes(b"old")
    old = bytes_of(before) if isinstance(new, dict) else b"old"

    def prepare(out: Path, *_: Any) -> None:
        if overwrite and isinstance(old, bytes):
            out.write_bytes(old)
        elif overwrite:
            shutil.copytree(before, out)

    return old if overwrite else {}, new, prepare


def fail_writer(write: Write, place: Path, overwrite: bool, ways: Callable[[int], list[tuple[int, bool]]]) -> int:
    """Let every call fail; return how many there are."""
    old, new, prepare = old_and_new(write, place, overwrite)
    for failure in failures(place, ways, prepare, lambda out: write(out, overwrite)):
        out, caught = failure.out, failure.caught
        if caught is None or isinstance(caught, DurabilityError):
            assert bytes_of(out) == new, failure
        else:
            assert caught.code == "E-IO-WRITE"
            assert bytes_of(out) == old or (failure.persistent and overwrite and not out.exists())
        if not failure.persistent and not isinstance(caught, DurabilityError):
            assert names(out.parent) == ["out"] * out.exists()
        if any(out.parent.iterdir()):
            recover(out)
        assert bytes_of(out) in (old, new)
        assert names(out.parent) == ["out"] * out.exists()
    return failure.n


def by_turns(n: int) -> list[tuple[int, bool]]:
    return [ALL[(n * 7) % len(ALL)]]


@pytest.mark.parametrize("overwrite", (False, True))
@pytest.mark.parametrize("name", WRITERS)
def test_every_call_may_fail(name: str, overwrite: bool, place: Path) -> None:
    assert fail_writer(WRITERS[name](place), place, overwrite, by_turns) > 10


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", (False, True))
@pytest.mark.parametrize("name", [*WRITERS, "alora", "compare"])  # the others compute long, and write as `convert` does
def test_every_call_may_fail_in_every_way(name: str, overwrite: bool, place: Path) -> None:
    fail_writer((WRITERS | COMMANDS)[name](place), place, overwrite, lambda n: ALL)


@pytest.mark.medium
@pytest.mark.parametrize("name", COMMANDS)
def test_every_call_of_commands_may_fail(name: str, place: Path) -> None:
    assert fail_writer(COMMANDS[name](place), place, False, by_turns) > 10


def test_a_batch_makes_its_folder_when_there_is_something_to_put(place: Path) -> None:
    """Where the disk does not take the folder, or the file in it, that is said, and no part of a file is there."""
    write, out = of_many(place), place / "work" / "deep" / "out.lrc"
    for n in (1, 2, 3, 6):
        with faults.installed(faults.Faulty(n, errno.ENOSPC, persistent=True)), pytest.raises(LrcError, match="E-IO"):
            write(out, False)
        assert not out.exists()
        if out.parent.exists() and any(out.parent.iterdir()):
            recover(out)
        assert not out.parent.exists() or names(out.parent) == []
    write(out, False)
    assert api.validate(out).ok


# --- power loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", (False, True))
@pytest.mark.parametrize("name", ("convert", "statistics", "export gguf", "unmerge"))
def test_power_loss(name: str, overwrite: bool, place: Path) -> None:
    if overwrite and name in ("export gguf", "unmerge"):
        pytest.skip("folders that replace others: test_crashes.test_power_loss_in_a_new_folder")
    write, seen = WRITERS[name](place), set()
    old, new, prepare = old_and_new(write, place, overwrite)
    losses = power_losses(place, prepare, lambda out: write(out, overwrite), lambda n: range(n + 1), 3)
    for out, reported in losses:
        if any(out.parent.iterdir()):
            recover(out)
        now = bytes_of(out)
        assert now in (old, new)
        assert names(out.parent) == ["out"] * bool(now)
        assert now == new or not reported, "success was reported too early"
        seen.add("new" if now == new else "old")
    assert seen == {"old", "new"}


# --- work that goes on ----------------------------------------------------------------------------------------------

BATCHES = 3


@pytest.fixture(scope="module")
def refining() -> Write:
    """A refinement of three steps with a checkpoint after each but the last; it goes on with one that is there."""
    model, lora = load_model(BASES / "tiny-llama").float(), api.load_lora(ADAPTERS / "llama-plain")
    compact, data = api.convert(lora, "lowrank", bits=2, rank=3).compact, batches(8)
    options = {"steps": 3, "eval_every": 1, "checkpoint_every": 1, "batch_tokens": 96, "lr": 0.1, "layerwise": False}

    def run(out: Path, overwrite: bool) -> None:
        api.refine(compact, lora, model, data, out, resume=True, overwrite=overwrite, **options)

    return run


@pytest.fixture(scope="module")
def measuring() -> Write:
    """Statistics of a few batches, kept after each; work that is there is gone on with."""
    model, data = load_model(BASES / "tiny-llama").float(), batches(BATCHES)
    return lambda out, overwrite: api.statistics(model, data, out, checkpoint_seconds=0, overwrite=overwrite)


def batches(count: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 100, (2, 8), generator=draw)} for _ in range(count)]


def went_on(write: Write, out: Path, old: Any, new: Any, overwrite: bool) -> None:
    """After whatever stopped it: the old output or the new one, and beside it at most work that was whole when it was
    kept. The same once more gives the bytes of a run without a break."""
    if any(out.parent.glob(".out.*")):
        recover(out)
    assert bytes_of(out) in (old, new)
    assert set(names(out.parent)) <= {"out", "out.partial"}
    if bytes_of(out) != new:
        write(out, overwrite)
        assert bytes_of(out) == new and names(out.parent) == ["out"]


def fail_and_go_on(write: Write, place: Path, overwrite: bool, step: int, ways: Callable[[int], Any]) -> None:
    made = calls_of(lambda: write(place / "wanted", False))
    old, new, prepare = old_and_new(lambda out, overwrite: None, place, overwrite)
    calls = range(1, len(made) + 1, step)
    for failure in failures(place, ways, prepare, lambda out: write(out, overwrite), calls):
        out, caught = failure.out, failure.caught
        if caught is None:
            assert bytes_of(out) == new and names(out.parent) == ["out"], failure
        elif not isinstance(caught, DurabilityError):  # that may be of a checkpoint, or of the result
            assert caught.code == "E-IO-WRITE" and bytes_of(out) == old
        went_on(write, out, old, new, overwrite)


@pytest.mark.medium
@pytest.mark.parametrize("what", ("refining", "measuring"))
def test_work_that_a_failing_disk_stopped_goes_on(what: str, place: Path, request: pytest.FixtureRequest) -> None:
    """Some of the calls, each in one way, by turns."""
    write = request.getfixturevalue(what)
    fail_and_go_on(write, place, False, 7, by_turns)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "way"),
    [
        ("refining", "by turns"),
        ("refining", "over an old output, by turns"),
        pytest.param("refining", "all", marks=pytest.mark.long),
        ("measuring", "over an old output, by turns"),
        ("measuring", "all"),
    ],
)
def test_work_goes_on_after_every_call_that_fails(
    what: str, way: str, place: Path, request: pytest.FixtureRequest
) -> None:
    """In every way, or in one by turns where the work takes long; only the last calls know of an old output."""
    write = request.getfixturevalue(what)
    fail_and_go_on(write, place, way.startswith("over"), 1, (lambda n: ALL) if way == "all" else by_turns)


@pytest.mark.parametrize("what", ("refining", "measuring"))
def test_work_goes_on_after_a_power_loss(what: str, place: Path, request: pytest.FixtureRequest) -> None:
    """What is left of the checkpoint is the last one or the one before, whole: never one that cannot be read."""
    write = request.getfixturevalue(what)
    old, new, prepare = old_and_new(write, place, False)
    seen = set()
    for out, _ in power_losses(place, prepare, lambda out: write(out, False), lambda n: range(0, n + 1, 5)):
        seen |= set(names(out.parent))
        went_on(write, out, old, new, False)
    assert {"out", "out.partial"} <= seen


def test_finished_statistics_stay_until_they_are_put_away(measuring: Write, place: Path) -> None:
    """A result that the disk does not take is not measured again."""
    made = calls_of(lambda: measuring(place / "wanted", False))
    last = len(made) - made[::-1].index("open")  # of the result; the one after it is the folder
    with faults.installed(faults.Faulty(last, errno.ENOSPC, persistent=True)), pytest.raises(LrcError, match="space"):
        measuring(place / "out", False)
    fields, _ = statistics_file.read_partial(place / "out.partial")
    assert fields["batches"] == BATCHES
    measuring(place / "out", False)
    assert (place / "out").read_bytes() == (place / "wanted").read_bytes()
