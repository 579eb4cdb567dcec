"""A made-up server: ``tinyserve --adapter FOLDER``. It loads PEFT folders up to a largest rank, multiplies by alpha / r
of the whole adapter, and passes DoRA's magnitudes by.

A complete consumer. As ``lrconvert/formats/compat/tinyserve.py`` it is found by itself, as ``check --for tinyserve``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lrconvert.core.options import option
from lrconvert.formats.compat.base import Consumer, Finding, verdicts
from lrconvert.formats.compat.shared.rules import bake, not_a_peft_folder, rescaled
from lrconvert.formats.compat.shared.subject import Subject

VERSION = "1.0.0"
refuses, wrong, warns = verdicts("tinyserve", VERSION)

LOAD = "tinyserve/adapters.py load"  # each finding names where the program's source says so


@dataclass(frozen=True)
class TinyserveOptions:
    """Settings that change the answer; each field becomes an option of `check`."""

    max_rank: int = option(16, "The largest rank that the server was started with.", least=1)


def examine(subject: Subject, options: TinyserveOptions) -> Iterator[Finding]:
    """Yield what the program would refuse or get wrong, from the configuration and the headers alone."""
    if problem := not_a_peft_folder(subject):
        yield refuses("layout", *problem, LOAD)
        return
    large = [module for module, pair in subject.pairs.items() if (pair.rank or 0) > options.max_rank]
    if large:
        yield refuses("rank", f"{large[0]!r:.120} has a rank above {options.max_rank}", "start it with more", LOAD)
    alpha, rank = subject.number("lora_alpha", 8), subject.number("r", 8)
    if alpha and rank and (modules := rescaled(subject, lambda module, stored: alpha / rank)):
        yield wrong("scale", f"one scale for all: {modules}", bake(), LOAD)
    if subject.flag("use_dora"):
        yield wrong("dora", "the magnitudes of DoRA are passed by", "convert it with --bake-dora", LOAD)


CONSUMER = Consumer("tinyserve", "tinyserve", VERSION, examine, TinyserveOptions)
