"""The verbs for many adapters at once: `convert_many`, `compress_many`, `allocate_many`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lrconvert.api.batch import pool, request
from lrconvert.api.batch.sources import AnyPath, Job, plan
from lrconvert.core.errors import OptionError, OutputPathError
from lrconvert.formats.lrc import file
from lrconvert.io import hub
from lrconvert.io.container import KnownContent

State = Literal["done", "skipped", "failed"]
Verb = Literal["convert", "compress", "allocate"]
Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What became of one adapter. `nbytes` (without extra tensors), `total_bytes`, `captured` and `ratio` are None
    where they are not known; `code` and `message` say why it failed; `report` is the JSON object of one conversion."""

    source: str
    output: str
    state: State
    nbytes: int | None = None
    total_bytes: int | None = None
    captured: float | None = None
    ratio: float | None = None
    warnings: tuple[str, ...] = ()
    code: str = ""
    message: str = ""
    report: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


@dataclass(frozen=True)
class Batch:
    """The outcomes in the order of the sources."""

    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        return not self.count("failed")

    def count(self, state: State) -> int:
        return sum(outcome.state == state for outcome in self.outcomes)


def convert_many(sources: AnyPath | Sequence[AnyPath], out: AnyPath, method: str, **options: Any) -> Batch:
    """Convert many adapters into files in the folder `out`, which is made if it is not there.

    `sources` are adapters, or folders of adapters: ``OUT/<name>.lrc``, by the path in the folder. `jobs` processes work
    at once (without it: as many as there are cores, one with a GPU); a failure is one outcome among the others. What is
    finished is passed by: the output is there, passes every check, and its provenance holds the digest of the same
    sources and options. Another file of that name fails with E-OUT-EXISTS, unless `overwrite`. `dry_run` plans only.

    `allow_pickle`, and `loading` for other options of `load_lora`; `verbose` adds the reports as text; `told(done, of)`
    is called after each. The other options are those of `convert`, with paths for `base` and `statistics`. The outputs
    are the same bytes whatever `jobs` is. Raises E-OPTION, E-OUT-PATH and E-LAYOUT for what no adapter could be
    converted with, before any is.
    """
    return many("convert", method, sources, out, **options)


def compress_many(sources: AnyPath | Sequence[AnyPath], out: AnyPath, **options: Any) -> Batch:
    """`compress` for many adapters at once; see `convert_many`."""
    return many("compress", "", sources, out, **options)


def allocate_many(sources: AnyPath | Sequence[AnyPath], out: AnyPath, **options: Any) -> Batch:
    """`allocate` for many adapters at once; see `convert_many`. `data` are files."""
    return many("allocate", "", sources, out, **options)


def many(
    verb: Verb,
    method: str,
    sources: AnyPath | Sequence[AnyPath],
    out: AnyPath | None,
    *,
    jobs: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    verbose: bool = False,
    allow_pickle: bool = False,
    loading: Mapping[str, Any] | None = None,
    told: Told = lambda done, of: None,
    **options: Any,
) -> Batch:
    if jobs is not None and jobs < 1:
        raise OptionError(f"{jobs} processes cannot work", fix="give 1 or more")
    if dry_run and verb == "compress":
        raise OptionError("compress has no dry run", fix="leave it out")
    listed = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    root = None if out is None else hub.output(out)
    if root is None and not dry_run:
        raise OptionError("there is no folder for the outputs", fix="name one, or plan only")
    if root is not None and root.exists() and not root.is_dir():
        raise OutputPathError("is not a folder", fix="give a folder for the outputs", path=root)
    planned = plan(listed, root)
    inputs, content = _inputs(options)
    options = {key: _plain(key, value) for key, value in options.items()}
    shared = {
        "verb": verb,
        "method": method,
        "overwrite": overwrite,
        "verbose": verbose,
        "options": options,
        "inputs": inputs,
        "base_content": None if content is None else asdict(content),
    }
    said = _loading({"allow_pickle": allow_pickle, "base": options.get("base"), **(loading or {})})
    asked = [
        {
            **shared,
            "loading": reading,
            "path": str(job.path.absolute()),
            "output": None if dry_run else str(job.output.absolute()),
        }
        for job, reading in zip(planned, _readings(planned, said), strict=True)
    ]
    count = jobs if jobs is not None else _processes(options)
    known = 0

    def tell(number: int, answer: pool.Answer) -> None:
        nonlocal known
        known += 1
        told(known, len(planned))

    answers = pool.run(asked, count, tell)
    return Batch(tuple(_outcome(job, answer) for job, answer in zip(planned, answers, strict=True)))


def _processes(options: Mapping[str, Any]) -> int:
    """As many as there are cores to run on; one where all would share a GPU."""
    if str(options.get("device", "cpu")).startswith("cuda"):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _inputs(options: Mapping[str, Any]) -> tuple[dict[str, str], KnownContent | None]:
    """Digests of what options name by a path, and the contents of the base. Raises E-OPTION for what is in memory
    only."""
    found: dict[str, str] = {}
    known = None
    for key in ("base", "statistics", "data"):
        value = options.get(key)
        if value is None or value in ((), []):
            continue
        paths = list(value) if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(path, (str, os.PathLike)) for path in paths):
            raise OptionError(f"{key} must be a path where several processes need it", fix="write it to a file first")
        if key == "base":
            found[key], known = request.of_base(hub.locate(paths[0]))
        else:
            found[key] = " ".join(request.of_file(Path(path)) for path in paths)
    return found, known


def _plain(key: str, value: Any) -> Any:
    """An option as JSON. Raises E-OPTION for what is none."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain(key, item) for item in value]
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        raise OptionError(f"{key} cannot be given to other processes", fix="give a path, a number or a text") from None


def _loading(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(key, value) for key, value in given.items() if value is not None}


def _readings(jobs: Sequence[Job], said: dict[str, Any]) -> list[dict[str, Any]]:
    """What is said of each source: a layout and an alpha hold for those that are not lrconvert files. Where all are,
    each refuses what is said."""
    ours = [job.path.is_file() and file.is_lrconvert(job.path) for job in jobs]
    bare = {key: value for key, value in said.items() if key not in ("layout", "alpha")}
    return [bare if own and not all(ours) else said for own in ours]


def _outcome(job: Job, answer: pool.Answer) -> Outcome:
    sizes = answer.get("bytes") or {}
    return Outcome(
        source=job.source,
        output=str(job.output),
        state=answer["state"],
        nbytes=sizes.get("adapter"),
        total_bytes=sizes.get("total"),
        captured=answer.get("captured"),
        ratio=answer.get("ratio"),
        warnings=tuple(answer.get("warnings", ())),
        code=answer.get("code", ""),
        message=answer.get("message", ""),
        report=answer.get("report", {}),
        text=answer.get("text", ""),
    )
