"""One process of the pool: a JSON object in on every line, one out for it. Its own output goes to stderr.

A job: ``verb``, ``method``, ``path``, ``output`` (null: a dry run), ``overwrite``, ``loading`` and ``options`` (of
`api.load_lora` and of the verb), ``inputs`` (digests), ``base_content`` (a `KnownContent`, or null), ``verbose``. The
answer: ``state`` ("done", "skipped", "failed"), and what of the outcome there is.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lrconvert import api
from lrconvert.api.batch import request
from lrconvert.convert.convert import Conversion
from lrconvert.core.errors import LrcError, OutputExistsError, WorkerError
from lrconvert.formats.lrc import file
from lrconvert.io.checkpoint import KnownContent
from lrconvert.io.durable import check_output, make_folder
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.report import text_and_json


def work(job: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to one job; whatever goes wrong is in it."""
    try:
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
    chosen = {**request.settled(job["verb"], job["method"], options), "loading": _without_base(loading)}
    wanted = request.digest(job["verb"], job["method"], chosen, request.of_source(path), job["inputs"])
    if output is not None:
        if (finished := request.finished(output, wanted)) is not None:
            return {"state": "skipped", **_of_file(finished)}
        if output.exists() and not job["overwrite"]:
            raise OutputExistsError(
                "exists already, and was made from another source or with other options",
                fix="choose another output, or pass --overwrite",
                path=output,
            )
        if output.parent.exists():
            check_output(output, job["overwrite"], inputs=[path])
    lora = _marked(api.load_lora(path, **loading), wanted)
    if base_content is not None:  # digested once for all jobs
        options["base_content"] = KnownContent(
            base_content["digest"], tuple(tuple(file) for file in base_content["files"])
        )
    done = _convert(job, lora, options, dry_run=output is None)
    if output is not None:
        make_folder(output.parent)  # not before there is something to put into it
        api.write(done.compact, output, overwrite=job["overwrite"])
    answer: dict[str, Any] = {"state": "done", "report": text_and_json.conversion_json(done)}
    if job["verbose"]:
        answer["text"] = text_and_json.conversion(str(path), job["output"], done, True)
    captured = None if done.fidelity is None else done.fidelity.captured
    losses = {"warnings": [*done.warnings, *done.notes], "dropped": len(done.dropped)}
    return {**answer, **_numbers(done.sizes, captured, done.ratio), **losses}


def _convert(job: Mapping[str, Any], lora: LoraAdapter, options: dict[str, Any], dry_run: bool) -> Conversion:
    if job["verb"] == "convert":
        return api.convert(lora, job["method"], dry_run=dry_run, **options)
    if job["verb"] == "allocate":
        return api.allocate(lora, dry_run=dry_run, **options)
    return api.compress(lora, **options).chosen


def _without_base(loading: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in loading.items() if key != "base" and value is not False}


def _marked(lora: LoraAdapter, wanted: str) -> LoraAdapter:
    provenance = lora.provenance
    return replace(lora, provenance=replace(provenance, fields={**provenance.fields, request.FIELD: wanted}))


def _of_file(compact: CompactAdapter) -> dict[str, Any]:
    captured = compact.provenance.fields.get("captured")
    return _numbers(file.sizes(compact), None if captured is None else float(captured), None)


def _numbers(sizes: file.Sizes, captured: float | None, ratio: float | None) -> dict[str, Any]:
    return {"bytes": text_and_json.sizes_json(sizes), "captured": captured, "ratio": ratio}


def main() -> None:
    """Serve until the input ends. A request to end is an exception, so that nothing half-written is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the one that started us
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        print(json.dumps(work(json.loads(line))), file=answers, flush=True)
