"""The templates, with the filters that they write numbers by."""

from __future__ import annotations

import base64
import hashlib
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrconvert.core.errors import printable
from lrconvert.report.html import measures
from lrconvert.report.tables import count_bytes

if TYPE_CHECKING:
    from jinja2 import Environment

_HERE = Path(__file__).parent


def rendered(template: str, **values: Any) -> str:
    """Return the page that the template of that name makes of `values`."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=count_bytes,
        printable=printable,
        brief=measures.brief,
        percent=measures.percent,
        tenths=measures.tenths,
        times=measures.times,
        root=lambda energy: f"{math.sqrt(energy) if energy >= 0 else math.nan:.4g}",
    )
    script = (_HERE / "sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals.update(script=script, script_digest=digest)
    return environment
