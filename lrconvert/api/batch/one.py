"""The work on one adapter of a batch: what every executor calls."""

from __future__ import annotations

import os
import platform
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

from lrconvert.api import adapters, conversions
from lrconvert.api.batch import places, request
from lrconvert.api.batch.job import DO_NOT_SHIP, SHIP, Job, Outcome, Work
from lrconvert.convert.compress import Compression
from lrconvert.convert.convert import Conversion
from lrconvert.core.errors import ArgumentError, DigestError, LrcError, OutputExistsError, WorkerError
from lrconvert.core.options import described
from lrconvert.core.redaction import redacted
from lrconvert.core.wording import on_command_line, spelled
from lrconvert.formats.lrc import file
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.report.compression import verdict_json, verdict_text
from lrconvert.report.conversion import conversion_json, conversion_text


def convert_one(job: Job) -> Outcome:
    """Return the outcome of one job: the adapter made smaller and written, passed by because that is done, or failed
    with the code and the message of the error.

    Doing a job again changes nothing: an output that was made of the same source with the same options is passed by,
    whoever made it, and two processes that do the same job at once write the same bytes, of which one file appears. So
    a scheduler may repeat it as often as it likes. Job and outcome can be pickled. Only what ends a process is raised.

    >>> from lrconvert import Job, Work
    >>> job = Job("my-adapter", "small.lrc", Work("convert", "lowrank", {"target_size": "6KB"}))
    >>> convert_one(job).state, convert_one(job).state
    ('done', 'skipped')
    """
    if not isinstance(job, Job):
        raise ArgumentError(f"job is {described(job)}; a Job was expected", fix="lrconvert.batch_jobs makes them")
    start = time.perf_counter()
    try:
        with on_command_line(job.work.is_command):
            outcome = _worked(job, request.prepared(job.work))
    except LrcError as error:
        outcome = failed(job, error.at(job.source))
    except Exception as error:
        print(redacted(traceback.format_exc()), file=sys.stderr)
        what = f"an unexpected error, {type(error).__name__}: {error}"
        outcome = failed(job, WorkerError(f"{what:.400}", fix="please report it", path=job.source))
    worker = f"{platform.node()}:{os.getpid()}"
    return replace(outcome, seconds=round(time.perf_counter() - start, 4), worker=worker)


def failed(job: Job, error: LrcError) -> Outcome:
    """Return the outcome of a job that met an error."""
    return replace(_named(job), state="failed", code=error.code, message=str(error))


def _named(job: Job) -> Outcome:
    return Outcome(redacted(job.shown or job.source), redacted(job.output), "done", method=job.work.method)


def _worked(job: Job, work: Work) -> Outcome:
    """The outcome of a job whose work is `prepared`. Raises whatever goes wrong."""
    before = places.source_state(job.source)
    with places.fetched(job.source) as path:
        source = request.of_source(path)
        if job.source_digest not in ("", source):
            what = f"the source has the digest {source}, not {job.source_digest}, which the manifest names"
            raise DigestError(what, fix="take the adapter that is meant, or its digest", path=job.source)
        chosen = request.chosen(work.verb, work.method, work.options, work.reading)
        wanted = request.digest(work.verb, work.method, chosen, source, work.inputs or {})
        if job.output and (passed := _finished(job, wanted, before, source)) is not None:
            return passed
        if job.output:
            places.check(job.output, overwrite=work.overwrite, source=path)
        result = _convert(work, _marked(adapters.load_lora(path, **work.reading), wanted), dry_run=not job.output)
    done = result.chosen if isinstance(result, Compression) else result
    outcome = replace(_reported(job, work, result, done), source_digest=source)
    if not job.output:
        return outcome
    try:
        digest = places.publish(done.compact, job.output, overwrite=work.overwrite)
    except OutputExistsError:  # another worker had the same job, of this batch or of one that was killed
        if (passed := _finished(job, wanted, before, source)) is None:
            raise
        return passed
    return replace(outcome, output_digest=digest, stamps=_stamps(job, before))


def _finished(job: Job, wanted: str, before: request.State, source: str) -> Outcome | None:
    """The outcome of a job whose output is there, made for the same request; None if there is none, or if another's
    may be overwritten. Raises E-OUT-EXISTS if it may not."""
    was = places.output_state(job.output)
    with places.kept(job.output) as path:
        if path is None:
            return None
        compact = request.finished(path, wanted)
        if compact is not None:
            sizes = file.sizes(compact)
            passed = replace(
                _named(job),
                state="skipped",
                nbytes=sizes.adapter,
                total_bytes=sizes.total,
                captured=_stated(compact),
                method=compact.method,
                source_digest=source,
                output_digest=request.of_file(path),
            )
            return replace(passed, stamps=_stamps(job, before, was))
    if not job.work.overwrite:
        what = "exists already, and was made from another source or with other options"
        fix = f"choose another output, or pass {spelled('overwrite', True)}"
        raise OutputExistsError(what, fix=fix, path=job.output)
    return None


def _convert(work: Work, lora: LoraAdapter, dry_run: bool) -> Conversion | Compression:
    options = dict(work.options)
    if work.base_content is not None:  # digested once for all jobs
        options["base_content"] = work.base_content
    if work.verb == "convert":
        return conversions.convert(lora, work.method, dry_run=dry_run, **options)
    if work.verb == "allocate":
        return conversions.allocate(lora, dry_run=dry_run, **options)
    return conversions.compress(lora, **options)


def _marked(lora: LoraAdapter, wanted: str) -> LoraAdapter:
    provenance = lora.provenance
    return replace(lora, provenance=replace(provenance, fields={**provenance.fields, request.FIELD: wanted}))


def _reported(job: Job, work: Work, result: Conversion | Compression, done: Conversion) -> Outcome:
    """The outcome of a conversion, before anything is written."""
    report, verdict, text = conversion_json(done), "", ""
    if isinstance(result, Compression):
        verdict = SHIP if result.verdict.ship else DO_NOT_SHIP
        report = {**report, "verdict": verdict_json(result.verdict)}
    if work.verbose:
        text = conversion_text(_named(job).source, _named(job).output or None, done, True)
        if job.output and isinstance(result, Compression):
            text += f"\n\n{verdict_text(Path(job.output).name, result)}"
    return replace(
        _named(job),
        nbytes=done.sizes.adapter,
        total_bytes=done.sizes.total,
        captured=None if done.fidelity is None else done.fidelity.captured,
        ratio=done.ratio,
        dropped=len(done.dropped),
        verdict=verdict,
        warnings=(*done.warnings, *done.notes),
        report=report,
        text=text,
        method=done.compact.method,
    )


def _stated(compact: CompactAdapter) -> float | None:
    """The captured share that a file states."""
    captured = compact.provenance.fields.get("captured")
    return None if captured is None else float(captured)


def _stamps(job: Job, before: request.State, was: request.State | None = None) -> tuple[str, str] | None:
    """The states of source and output, for a later run; None where the source may have changed meanwhile, or the
    output, which was checked in the state that it `was` in."""
    now = places.output_state(job.output)
    if not before.is_past or before != places.source_state(job.source) or not now.digest:
        return None
    return None if was is not None and was.digest != now.digest else (before.digest, now.digest)
