"""A small model in several files, and the two loops of the tests of crashes: every call fails, power is lost."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from conftest import random_lora
from models import extra, one_target, random_base, save_base

from lrconvert import api
from lrconvert.api import merge, unmerge
from lrconvert.core.dtypes import Stored, round_to
from lrconvert.core.errors import LrcError
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, Target
from lrconvert.testing import faults


def whole(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, the records of merges too; {} if there is none."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if not p.is_dir()}


@dataclass(frozen=True)
class Scene:
    """A folder with the model `base`, and the same model `merged` (without it: absent), as they are to be."""

    name: str
    base: Path
    merged: Path
    adapter: LoraAdapter | CompactAdapter

    def merge(self, model: Path, **options: Any) -> Any:
        return merge(model, [self.adapter], in_place=True, allow_no_op=True, **options)

    def unmerge(self, model: Path, **options: Any) -> Any:
        return unmerge(model, in_place=True, **options)

    def acts(self) -> dict[str, tuple[Path, Path, Callable[..., Any]]]:
        """(what is there before, what is there after, how) of either direction."""
        return {"merge": (self.base, self.merged, self.merge), "unmerge": (self.merged, self.base, self.unmerge)}


def scene(folder: Path, kind: str) -> Scene:
    """`swap`: whole weight files change, one of them by a head that is replaced, and so does config.json. `patch`: few
    rows change. `mixed`: one file each, and one that does not change."""
    base = folder / kind / "base"
    base.parent.mkdir()
    adapter: LoraAdapter | CompactAdapter
    if kind == "swap":
        lora = random_lora(((12, 16), (16, 20)), scale=0.05)
        shards = [
            {p.target.name: Stored("BF16", round_to(np.random.default_rng(n).standard_normal(p.target.shape), "BF16"))}
            for n, p in enumerate(lora.targets)
        ]
        shards[0]["score.weight"] = Stored("F32", np.zeros((2, 4), "<f4"))
        config = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
        save_base(base, shards, config)
        adapter = LoraAdapter(lora.targets, (extra("score.weight", np.ones((3, 4))),))
    elif kind == "patch":
        lora = random_lora(((480, 8), (320, 12)), scale=0.3)
        adapter = api.convert(lora, "sbora", variant="fb", rank=3).compact
        random_base(base, lora, "BF16", shards=2)
    else:
        sparse, dense = Target("sparse.weight", (400, 6)), Target("dense.weight", (10, 12))
        few = one_target(sparse)
        b = np.zeros((400, 3), "<f4")
        b[[3, 4, 5, 200]] = 1
        few = type(few)(sparse, few.a, Stored("F32", b), 1.0)
        adapter = LoraAdapter((one_target(dense), few))
        rng = np.random.default_rng(0)
        shapes = {"dense.weight": (10, 12), "quiet.weight": (4, 4), "sparse.weight": (400, 6)}
        save_base(base, [{n: Stored("F16", rng.standard_normal(s).astype("<f2"))} for n, s in shapes.items()])
    merged = base.parent / "merged"
    made = Scene(kind, base, merged, adapter)
    shutil.copytree(base, merged)
    made.merge(merged)
    return made


KINDS = ("swap", "patch", "mixed")

ALL = [(error, persistent) for persistent in (False, True) for error in faults.ERRORS]


def _nothing_fails(disk: faults.Faulty | None, n: int, error: int) -> bool:
    """Call `n`, as the run before this one made it, cannot fail in the way `error`: only writes can be SHORT. All that
    are short from `n` on are those from the next write on, whose turn comes."""
    return error == faults.SHORT and disk is not None and disk.made[n - 1 : n] not in (["write"], ["pwrite"])


@dataclass(frozen=True)
class Failure:
    """A run into `out` whose call `n` failed, and perhaps all later ones; `caught` is what it raised."""

    n: int
    error: int
    persistent: bool
    options: tuple[Any, ...]
    out: Path
    caught: LrcError | None


def failures(
    place: Path,
    ways: Callable[[int], Iterable[tuple[Any, ...]]],
    prepare: Callable[..., Any],
    run: Callable[..., Any],
    calls: Iterable[int] | None = None,
) -> Iterator[Failure]:
    """SQLite's loop: let call n = 1, 2, ... fail until nothing is left to fail.

    `ways(n)` gives (error, whether later calls fail too, options...); ``prepare(out, *options)`` and
    ``run(out, *options)`` are called for each, in a folder of its own.
    """
    for n in count(1) if calls is None else calls:
        disk: faults.Faulty | None = None
        for error, persistent, *options in ways(n):
            if _nothing_fails(disk, n, error):
                continue
            (place / "work").mkdir()
            out = place / "work" / "out"
            prepare(out, *options)
            caught: LrcError | None = None
            with faults.installed(faults.Faulty(n, error, persistent)) as disk:
                try:
                    run(out, *options)
                except LrcError as raised:
                    caught = raised
            yield Failure(n, error, persistent, tuple(options), out, caught)
            shutil.rmtree(out.parent)
        if calls is None and disk is not None and not disk.reached:
            return


def calls_of(run: Callable[[], Any]) -> list[str]:
    """The names of the calls that a run makes."""
    with faults.installed(faults.Faulty(10**9, errno.EIO)) as disk:
        run()
    return disk.made


def power_losses(
    place: Path,
    prepare: Callable[[Path], Any],
    run: Callable[[Path], Any],
    moments: Callable[[int], Iterable[int]],
    tries: int = 1,
) -> Iterator[tuple[Path, bool]]:
    """Run once, then make what the disk may hold if power failed at these moments: (output, whether the run had
    reported success)."""
    work, left = place / "work", place / "left"
    work.mkdir()
    prepare(work / "out")
    with faults.installed(faults.Recorder(work)) as disk:
        run(work / "out")
    for moment in moments(len(disk.calls)):
        for attempt in range(tries):
            left.mkdir()
            disk.after_power_loss(moment, Random(1000 * moment + attempt), left)
            yield left / "out", moment == len(disk.calls)
            shutil.rmtree(left)
