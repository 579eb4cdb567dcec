"""A log of a refinement: one JSON object a line, appended as things happen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lrconvert.io.durable import appended

Log = Callable[[str, dict[str, Any]], None]


def to_file(path: Path | None) -> Log:
    """Return ``log(event, fields)``, which appends a line to `path`, or nothing without one. Raises E-IO-WRITE."""

    def log(event: str, fields: dict[str, Any]) -> None:
        if path is not None:
            appended(path, (json.dumps({"event": event, **fields}) + "\n").encode())

    return log
