"""The jobs of a batch with the work that is to be done to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lrconvert.api.batch import places, request
from lrconvert.api.batch.job import Job, Work
from lrconvert.api.batch.options import BatchOptions
from lrconvert.api.batch.sources import Planned
from lrconvert.core.options import make
from lrconvert.core.wording import is_on_command_line
from lrconvert.formats.readers.shared.options import ReadOptions


class Works:
    """The jobs of a plan with their work, prepared once for all. It is of one or two kinds: a layout and an alpha hold
    for sources that are not lrconvert files. Where all are, each refuses them."""

    def __init__(self, jobs: Sequence[Planned], work: Work, reading: ReadOptions, batch: BatchOptions) -> None:
        self._jobs, self._is_plan, self.options = jobs, batch.dry_run, work.options
        ready = request.prepared(work)
        ready = replace(ready, overwrite=batch.overwrite, verbose=batch.verbose, is_command=is_on_command_line())
        both = [_plain_reading(reading), _plain_reading(reading.for_ours())]
        self._kinds = [replace(ready, reading=kind) for kind in both]
        self._settings = [
            request.digest(
                work.verb,
                work.method,
                request.chosen(work.verb, work.method, ready.options, kind),
                "",
                ready.inputs or {},
            )
            for kind in both
        ]
        self._ours = bytearray()
        if both[0] != both[1]:
            self._ours = bytearray(places.is_compact(job.where) for job in jobs)
        if all(self._ours):
            self._ours.clear()

    def job(self, number: int) -> Job:
        """Return the job of a number, with absolute paths."""
        planned = self._jobs[number]
        output = "" if self._is_plan else places.absolute(planned.target)
        source, work = places.absolute_source(planned.where), self._kinds[self._kind(number)]
        return Job(source, output, work, planned.source, planned.digest)

    def settings(self, number: int) -> str:
        """Return the digest of a request without its source, as a manifest holds it."""
        return self._settings[self._kind(number)]

    def _kind(self, number: int) -> int:
        return self._ours[number] if self._ours else 0


def _plain_reading(reading: ReadOptions) -> dict[str, Any]:
    """The reading options as JSON, in their one spelling."""
    settled = make(ReadOptions, vars(reading), "reading")
    return {key: request.plain(key, value) for key, value in vars(settled).items() if value is not None}
