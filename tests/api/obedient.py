"""A job for processes under test that does what it is told, and is quick to load in them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from lrconvert.api.batch.job import Job, Outcome


def obey(job: Job) -> Outcome:
    """Do what the source of a job says, and log in the file `output` when it begins and ends."""
    log(job, "begins")
    begun = Path(job.output).read_text().count(f"{job.shown} begins")
    if job.source == "die" or (job.source == "die once" and begun == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if job.source == "exit":
        os._exit(3)
    if job.source == "wait":
        time.sleep(600)
    log(job, "ends")
    return Outcome(job.shown, job.output, "done")


def log(job: Job, what: str) -> None:
    with Path(job.output).open("a") as file:
        file.write(f"{job.shown} {what} {os.getpid()}\n")
