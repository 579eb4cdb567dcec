"""Loaded by every worker of a Dask cluster under test: log which jobs it begins and ends, in the file LOG_JOBS."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lrconvert.api.batch import one

LOG = Path(os.environ["LOG_JOBS"])


def logged(job: Any, real: Any = one.convert_one) -> Any:
    name = Path(job.source).name
    with LOG.open("a") as file:
        file.write(f"begins {name} {os.getpid()}\n")
    outcome = real(job)
    with LOG.open("a") as file:
        file.write(f"ends {name} {os.getpid()}\n")
    return outcome


if one.convert_one is not logged and one.convert_one.__name__ != "logged":  # it may be loaded more than once
    one.convert_one = logged
