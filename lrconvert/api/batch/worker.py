"""One process of the pool: a JSON object in on every line, one out for it. Its own output goes to stderr.

A job: ``verb``, ``method``, ``path``, ``output`` (null: a dry run), ``overwrite``, ``loading`` and ``options`` (of
`api.load_lora` and of the verb), ``inputs`` (digests), ``base_content`` (a `KnownContent`, or null), ``verbose``,
``is_command`` (whether messages speak of flags). The
answer: ``state`` ("done", "skipped", "failed"), what of the outcome there is, and for the journal the ``states`` of
source and output, and the captured share ``stated`` in the output.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lrconvert import api
from lrconvert.api.batch import request
from lrconvert.api.batch.journal import DO_NOT_SHIP, SHIP
from lrconvert.convert.compress import Compression
from lrconvert.convert.convert import Conversion
from lrconvert.core.errors import LrcError, OutputExistsError, WorkerError
from lrconvert.core.wording import on_command_line, spelled
from lrconvert.formats.lrc import file
from lrconvert.io.checkpoint import KnownContent
from lrconvert.io.durable import check_output, make_folder
from lrconvert.kernels import jit
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.report.compression import verdict_json, verdict_text
from lrconvert.report.conversion import conversion_json, conversion_text, sizes_json

# Processor seconds after which loading the compiled loops of the entropy coder costs little beside what was done: they
# save a tenth of a second for a million numbers, which no adapter of that size pays for alone. The bytes are the same.
_LOOPS_PAY_AFTER = 4.0


def work(job: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to one job; whatever goes wrong is in it."""
    try:
        with on_command_line(job["is_command"]):
            return _work(job)
    except LrcError as error:
        return _failed(error.at(job["path"]))
    except Exception as error:
        traceback.print_exc()
        what = f"{type(error).__name__}: {error}"
        return _failed(WorkerError(f"an unexpected error, {what:.400}", fix="please report it", path=job["path"]))


def _failed(error: LrcError) -> dict[str, Any]:
    return {"state": "failed", "code": error.code, "message": str(error)}


def _work(job: Mapping[str, Any]) -> dict[str, Any]:
    path, options, loading = Path(job["path"]), dict(job["options"]), dict(job["loading"])
    base_content = job["base_content"]
    output = None if job["output"] is None else Path(job["output"])
    before = request.state(*request.files_of(path))
    chosen = request.chosen(job["verb"], job["method"], options, loading)
    wanted = request.digest(job["verb"], job["method"], chosen, request.of_source(path), job["inputs"])
    if output is not None:
        was = request.state([output], output.parent)
        if (finished := request.finished(output, wanted)) is not None:
            return {**_passed_by(finished), **_states(before, path, output, was)}
        if output.exists() and not job["overwrite"]:
            raise OutputExistsError(
                "exists already, and was made from another source or with other options",
                fix=f"choose another output, or pass {spelled('overwrite', True)}",
                path=output,
            )
        if output.parent.exists():
            check_output(output, job["overwrite"], inputs=[path])
    lora = _marked(api.load_lora(path, **loading), wanted)
    if base_content is not None:  # digested once for all jobs
        options["base_content"] = KnownContent(
            base_content["digest"], tuple(tuple(file) for file in base_content["files"])
        )
    result = _convert(job, lora, options, dry_run=output is None)
    done = result.chosen if isinstance(result, Compression) else result
    if output is not None:
        make_folder(output.parent)  # not before there is something to put into it
        try:
            api.write(done.compact, output, overwrite=job["overwrite"])
        except OutputExistsError:
            if (finished := request.finished(output, wanted)) is None:
                raise
            return _passed_by(finished)  # a worker of a batch that was killed was still at it
    answer: dict[str, Any] = {"state": "done", "report": conversion_json(done)}
    if isinstance(result, Compression):
        answer["verdict"] = SHIP if result.verdict.ship else DO_NOT_SHIP
        answer["report"]["verdict"] = verdict_json(result.verdict)
    if output is not None:
        answer |= {**_states(before, path, output), "stated": _captured(done.compact)}
    if job["verbose"]:
        answer["text"] = conversion_text(str(path), job["output"], done, True)
        if output is not None and isinstance(result, Compression):
            answer["text"] += f"\n\n{verdict_text(output.name, result)}"
    captured = None if done.fidelity is None else done.fidelity.captured
    losses = {"warnings": [*done.warnings, *done.notes], "dropped": len(done.dropped)}
    return {**answer, **_numbers(done.sizes, captured, done.ratio), **losses}


def _convert(
    job: Mapping[str, Any], lora: LoraAdapter, options: dict[str, Any], dry_run: bool
) -> Conversion | Compression:
    if job["verb"] == "convert":
        return api.convert(lora, job["method"], dry_run=dry_run, **options)
    if job["verb"] == "allocate":
        return api.allocate(lora, dry_run=dry_run, **options)
    return api.compress(lora, **options)


def _marked(lora: LoraAdapter, wanted: str) -> LoraAdapter:
    provenance = lora.provenance
    return replace(lora, provenance=replace(provenance, fields={**provenance.fields, request.FIELD: wanted}))


def _passed_by(finished: CompactAdapter) -> dict[str, Any]:
    captured = _captured(finished)
    return {"state": "skipped", **_numbers(file.sizes(finished), captured, None), "stated": captured}


def _captured(compact: CompactAdapter) -> float | None:
    """The captured share that a file states."""
    captured = compact.provenance.fields.get("captured")
    return None if captured is None else float(captured)


def _states(before: request.State, path: Path, output: Path, was: request.State | None = None) -> dict[str, Any]:
    """The states of source and output, for the journal; nothing where the source may have changed meanwhile, or the
    output, which was checked in the state that it `was` in."""
    now = request.state([output], output.parent)
    if not before.is_past or before != request.state(*request.files_of(path)):
        return {}
    return {} if was is not None and was.digest != now.digest else {"states": [before.digest, now.digest]}


def _numbers(sizes: file.Sizes, captured: float | None, ratio: float | None) -> dict[str, Any]:
    return {"bytes": sizes_json(sizes), "captured": captured, "ratio": ratio}


def main() -> None:
    """Serve until the input ends. A request to end is an exception, so that nothing half-written is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the one that started us
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        try:
            print(json.dumps(work(json.loads(line))), file=answers, flush=True)
        except BrokenPipeError:  # nobody waits for it: the one that started us was killed
            os._exit(0)
        if time.process_time() > _LOOPS_PAY_AFTER:
            jit.load("rans", math.inf, exact=True)
