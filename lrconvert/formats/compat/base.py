"""The contract of a consumer, and the registry that finds consumers by scanning this folder.

A consumer is a program that loads adapters: a server, a converter, a library. It is one file here that binds
``CONSUMER``: a pure function from a `Subject` to findings. It states what the program would do, read in its source at
one version; it never runs the program, and it never reads the data of a tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lrconvert.core import registry
from lrconvert.core.errors import LrcError, OptionError, printable
from lrconvert.formats.compat.shared.subject import Subject, example, look
from lrconvert.formats.readers.shared.options import ReadOptions

Severity = Literal["refuses", "wrong", "warns"]


@dataclass(frozen=True)
class Finding:
    """One thing that a consumer would do with an adapter.

    `severity`: it "refuses" the adapter, silently gets it "wrong", or "warns" (a note of ours or of the consumer; the
    result may be right). `version` is the one whose source was read, `source` where in it. `rule` is stable.
    """

    severity: Severity
    consumer: str
    version: str
    rule: str
    what: str
    fix: str
    source: str

    def __repr__(self) -> str:
        return f"<Finding: {self.consumer} {self.severity}: {printable(self.what, 80)}>"

    def __str__(self) -> str:
        advice = printable(self.fix[0].upper() + self.fix[1:], 600)
        return f"{self.severity}: {self.consumer} {self.version}: {printable(self.what, 600)}. {advice}."


@dataclass(frozen=True)
class Verdict:
    """Makes the findings of one severity of one consumer."""

    severity: Severity
    consumer: str
    version: str

    def __call__(self, rule: str, what: str, fix: str, source: str) -> Finding:
        return Finding(self.severity, self.consumer, self.version, rule, what, fix, source)

    def of(self, rule: str, names: Sequence[str], what: str, fix: str, source: str) -> Iterator[Finding]:
        """Yield one finding about modules or tensors, with an example of them; none if there are no `names`."""
        if names:
            yield self(rule, f"{what}: {example(names)}", fix, source)


def verdicts(consumer: str, version: str) -> tuple[Verdict, Verdict, Verdict]:
    """Return the three verdicts of a consumer: refuses, wrong, warns."""
    return (
        Verdict("refuses", consumer, version),
        Verdict("wrong", consumer, version),
        Verdict("warns", consumer, version),
    )


@dataclass(frozen=True)
class NoOptions:
    """The options of a consumer without any."""


@dataclass(frozen=True)
class Consumer:
    """One program. `Options` is a frozen dataclass of settings that change the answer, each field with
    ``metadata={"help": ...}``; fields of one name in several consumers are one option. `examine(subject, options)`
    yields findings and raises nothing but E-OPTION and E-PATTERN."""

    id: str
    title: str
    version: str
    examine: Callable[[Subject, Any], Iterable[Finding]]
    Options: type[Any] = NoOptions


def check(
    path: Path, consumers: Iterable[str], reading: ReadOptions, options: Mapping[str, Any]
) -> tuple[Finding, ...]:
    """Return what `consumers` would do with the adapter at `path`; see `lrconvert.api.check`."""
    programs = chosen(consumers)
    fields = [{f.name for f in dataclasses.fields(program.Options)} for program in programs]
    if unknown := sorted(set(options) - set().union(*fields)):
        raise OptionError(f"none of these consumers has the option {unknown[0]!r}")
    settings = [
        p.Options(**{k: v for k, v in options.items() if k in names}) for p, names in zip(programs, fields, strict=True)
    ]
    try:
        subject = look(path, reading)
        return tuple(f for p, setting in zip(programs, settings, strict=True) for f in p.examine(subject, setting))
    except LrcError as error:
        raise error.at(path) from None


# --- the registry ---------------------------------------------------------------------------------------------------


def ids() -> list[str]:
    """Return the names for `--for`, from the file names of this folder."""
    return registry.names("lrconvert.formats.compat")


def get(consumer_id: str) -> Consumer:
    """Return the consumer of that id. Raises E-OPTION for an unknown one."""
    if consumer_id not in ids():
        raise OptionError(f"there is no consumer {consumer_id!r}", fix=f"known: {', '.join(ids())}, all")
    consumer: Consumer = registry.load("lrconvert.formats.compat", consumer_id, "CONSUMER")
    return consumer


def chosen(names: Iterable[str]) -> list[Consumer]:
    """Return the consumers of these ids, each once; "all" stands for every one."""
    wanted = [consumer_id for name in names for consumer_id in (ids() if name == "all" else [name])]
    return [get(name) for name in dict.fromkeys(wanted)]
