"""The README.md of an exported folder, made offline: front matter that hubs read, how it is loaded, what was measured.

The licence is the source's: read from its card, kept in the compact file's provenance, written into the new card.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lrconvert.core.errors import printable
from lrconvert.core.limits import MIB
from lrconvert.core.version import __version__
from lrconvert.formats.fidelity import Fidelity
from lrconvert.formats.lrc import file
from lrconvert.io import hub
from lrconvert.lora.adapter import Adapter, CompactAdapter, LoraAdapter
from lrconvert.methods import base as methods

CARD = "README.md"
_CARD_BYTES = MIB
_TEXT_BYTES = 200
_WEB = re.compile(r"https?://[\w.-]+(?::\d+)?(?:[/?#][^\s<>\"'()\[\]\\^`{|}]*)?\Z")
LICENCE = ("license", "license_name", "license_link")
_ANSWERS = re.compile(
    r"(?P<kind>KL|hidden states) (?P<distance>\d+(?:\.\d+)?(?:e[+-]\d+)?) of (?P<base>\d+(?:\.\d+)?(?:e[+-]\d+)?)"
    r"(?:, agreement (?P<agreement>\d+(?:\.\d+)?))?, (?P<items>\d{1,12}) items"
)


class _Task(NamedTuple):
    """A task of PEFT: the hub's tag of it, and the class of transformers that loads a base for it."""

    tag: str
    auto_class: str


_TASKS = {
    "CAUSAL_LM": _Task("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": _Task("text2text-generation", "AutoModelForSeq2SeqLM"),
    "SEQ_CLS": _Task("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": _Task("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": _Task("question-answering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": _Task("feature-extraction", "AutoModel"),
}


def auto_class(task_type: str) -> str:
    """Return the class of transformers that loads a base for a task of PEFT; "" if none is known."""
    return _TASKS[task_type].auto_class if task_type in _TASKS else ""


def licence(folder: Path) -> dict[str, str]:
    """Return what the card in a folder says of the licence: ``license``, ``license_name``, ``license_link``, those it
    has. Several licences are joined with commas. Empty without a card that can be read, or without front matter."""
    card = folder / CARD
    if not card.is_file() or card.stat().st_size > _CARD_BYTES:
        return {}
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        front = metadata_load(card) or {}
    except (OSError, ValueError, RecursionError, YAMLError):  # only the licence would be read from it
        return {}
    stated = {}
    for key in LICENCE:
        value = front.get(key)
        texts = value if isinstance(value, list) else [value]
        stated[key] = ", ".join(text for text in texts if isinstance(text, str))
    return {k: v for k, v in stated.items() if v and len(v.encode()) <= _TEXT_BYTES and v.isprintable()}


def origin(adapter: Adapter) -> dict[str, str]:
    """Return where exported factors come from, for the metadata of a file: short strings, no path, no time."""
    provenance = adapter.provenance
    notes = {
        "lrconvert_version": __version__,
        "lrconvert_method": _method(adapter),
        "lrconvert_source": provenance.source,
        "lrconvert_captured": provenance.fields.get("captured", ""),
        "lrconvert_base_model": provenance.base_model,
        "lrconvert_base_revision": provenance.revision,
        "lrconvert_base_content": adapter.base.content if isinstance(adapter, CompactAdapter) else "",
        **{f"lrconvert_{key}": provenance.fields.get(key, "") for key in LICENCE},
    }
    return {key: text for key, text in notes.items() if text}


def _method(adapter: Adapter) -> str:
    if isinstance(adapter, LoraAdapter):
        return ""
    return f"{methods.form(adapter)[0]} {methods.get(adapter.method).version}"


def sidecar(adapter: Adapter) -> dict[str, str]:
    """Return the object of ``lrconvert.json`` beside an export."""
    return {"tool": f"lrconvert {__version__}", "source": adapter.provenance.source}


@dataclass(frozen=True)
class Written:
    """An export as it was written: the `kind` of adapter, the `library` that loads it and the code that does (`usage`),
    the hub id of the folder if it has one, the `command` that they ran, and notes."""

    kind: str
    library: str = "peft"
    usage: str = ""
    hub_id: str = ""
    command: str = ""
    notes: tuple[str, ...] = ()


def model_card(adapter: Adapter, written: Written, fidelity: Fidelity | None) -> bytes:
    """Return the card of an exported `adapter`: front matter as PEFT has it, how it is loaded, and what was measured,
    with the error table of `fidelity`."""
    link = adapter.provenance.fields.get("license_link", "")
    body = [*_title(adapter, written), "", *_usage(adapter, written)]
    if link and not _WEB.match(link):
        body += [f"The source's card says of its licence: {code(link)}", ""]
    if written.command:
        shown = printable(written.command, 4000)
        body += ["Made with", "", _fence(shown, 3), shown, _fence(shown, 3), ""]
    body += [f"* {code(note)}" for note in written.notes]
    body += [""] if written.notes else []
    if isinstance(adapter, CompactAdapter):
        body += ["## Measured", "", *_measured(adapter), *_error_table(adapter, fidelity)]
    if adapter.provenance.source:
        body += [
            *([] if body[-1] == "" else [""]),
            f"Source adapter, sha256 of its tensors: {code(adapter.provenance.source)}",
        ]
    return "\n".join(["---", _front_matter(adapter, written), "---", "", *body, ""]).encode("utf-8")


def _front_matter(adapter: Adapter, written: Written) -> str:
    from huggingface_hub import ModelCardData

    provenance, base = adapter.provenance, _base_id(adapter)
    task = _TASKS.get(provenance.task_type)
    licences = provenance.fields.get("license", "").split(", ")
    link = provenance.fields.get("license_link", "")
    tags = ["lora", "lrconvert", *(["transformers"] if task and written.library == "peft" else [])]
    named = base if written.hub_id else provenance.base_model  # the hub refuses what is no id
    front = ModelCardData(
        base_model=named or None,
        base_model_relation="adapter" if named else None,
        library_name=written.library or None,
        license=licences if len(licences) > 1 else licences[0] or None,  # type: ignore[arg-type]
        license_name=provenance.fields.get("license_name"),
        license_link=link if _WEB.match(link) else None,
        pipeline_tag=task.tag if task else None,
        tags=sorted([*tags, *([f"base_model:adapter:{base}"] if base else [])]),
    )
    return str(front.to_yaml())


def _base_id(adapter: Adapter) -> str:
    """The base's hub id, if the adapter names it by one."""
    name = adapter.provenance.base_model
    return name if hub.parse(name) is not None else ""


def _title(adapter: Adapter, written: Written) -> list[str]:
    """The heading, and what the factors are."""
    base = _base_id(adapter)
    of = f" for {base}" if base else ""
    if isinstance(adapter, LoraAdapter):
        layout = adapter.provenance.fields.get("source_format", "")
        about = f"Rewritten by lrconvert {__version__} from a LoRA in the layout {code(layout)}: "
        kept = "the same updates." if written.notes else "the same factors, bit for bit."
        return [f"# {written.kind}{of}", "", f"{about}{kept}" if layout else f"Written by lrconvert {__version__}."]
    method, size, (form, title) = methods.get(adapter.method), file.sizes(adapter), methods.form(adapter)
    return [
        f"# {written.kind}{of}, expanded from a compact file ({title})",
        "",
        f"Written by lrconvert {__version__}. The update of every target is exactly the one of the compact file "
        f"({size.adapter:,} bytes without extra tensors; method `{form}` version {method.version}).",
    ]


def _usage(adapter: Adapter, written: Written) -> list[str]:
    """The code that loads the adapter."""
    if not written.usage:
        return []
    task = _TASKS.get(adapter.provenance.task_type)
    language, _, text = written.usage.partition("\n")
    names = {
        "base": _base_id(adapter) or "BASE-MODEL",
        "adapter": written.hub_id or "THIS-FOLDER",
        "auto_class": task.auto_class if task else "AutoModel",
    }
    return ["## Load it", "", f"```{language}", text.format(**names), "```", ""]


def _measured(compact: CompactAdapter) -> list[str]:
    """Answers that refinement measured on held-out data, as the file notes it."""
    fields = compact.provenance.fields
    after, before = (_ANSWERS.fullmatch(fields.get(f"refined_{when}", "")) for when in ("after", "before"))
    if after is None:
        return []
    kind, items = after["kind"], int(after["items"])
    rows = [f"Answers on {items:,} held-out items, against the source adapter's own ({kind}; 0 is equal):", ""]
    rows += [f"| | {kind} | of the base's distance closed | agreement |", "|---|---:|---:|---:|"]
    for name, row in (("base alone", None), ("before refinement", before), ("as published", after)):
        if row is not None or name == "base alone":
            far = float(after["base"])
            near = far if row is None else float(row["distance"])
            closed = "-" if not far else f"{1 - near / far:.1%}"
            rows.append(f"| {name} | {near:.4g} | {closed} | {(row and row['agreement']) or '-'} |")
    return [*rows, ""]


def code(text: str) -> str:
    """Return `text` as Markdown's code, in a table too: no markup in it counts, and control characters are escaped."""
    shown = printable(text).replace("|", "\\|")
    ticks = _fence(shown, 1)
    return f"{ticks}{shown}{ticks}" if ticks == "`" else f"{ticks} {shown} {ticks}"


def _fence(text: str, least: int) -> str:
    """Backticks that a text cannot close."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _error_table(compact: CompactAdapter, fidelity: Fidelity | None) -> list[str]:
    total = compact.provenance.fields.get("captured", "")
    if fidelity is None:
        if not total:
            return ["How much of a source adapter this keeps was not measured."]
        stated = f"**{total}**" if re.fullmatch(r"[\d.]+", total) else code(total)
        return [
            f"Captured energy of the source's update, over all targets, as the compact file states it: {stated} "
            "(1 is lossless). It was not measured again for this export."
        ]
    rows = [
        f"{fidelity.ratio:.1f} times smaller than the source's factors at 16 bit ({fidelity.source_bytes:,} bytes).",
        "",
        f"Captured energy of the source's update, over all targets: **{fidelity.captured:.4f}** (1 is lossless).",
        "",
        "| target | rank before | rank after | captured | relative error |",
        "|---|---:|---:|---:|---:|",
    ]
    for t in fidelity.targets:
        relative = (t.error / t.energy) ** 0.5 if t.energy else 0.0
        share = "-" if t.captured is None else f"{t.captured:.4f}"
        rows.append(f"| {code(t.name)} | {t.rank_before} | {t.rank_after} | {share} | {relative:.4f} |")
    return rows
