"""The README.md of an exported folder, made offline: front matter that hubs read, the command, and the error table.

The licence is the source's: read from its card, kept in the compact file's provenance, written into the new card.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from lrconvert.core.errors import LrcError
from lrconvert.core.version import __version__
from lrconvert.formats.fidelity import Fidelity
from lrconvert.formats.lrc import file
from lrconvert.io.container import open_regular, pread
from lrconvert.lora.adapter import CompactAdapter
from lrconvert.methods import base as methods

_TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


CARD = "README.md"
_CARD_BYTES = 1 << 16  # front matter stands at the beginning
_LICENCE = ("license", "license_name", "license_link")
_LINE = re.compile(rf"({'|'.join(_LICENCE)}):[ \t]*(.*)")
_TEXT_BYTES = 200


def licence(folder: Path) -> dict[str, str]:
    """What the card in a folder says of the licence: ``license``, ``license_name``, ``license_link``, those it has.
    Several licences are joined with commas. Empty without a card, or without front matter in it."""
    card = folder / CARD
    if not card.is_file():
        return {}
    try:
        descriptor, info = open_regular(card)
    except LrcError:  # it cannot be opened, and nothing but the licence would be read from it
        return {}
    try:
        text = bytes(pread(descriptor, min(info.st_size, _CARD_BYTES), 0, card)).decode("utf-8", "replace")
    finally:
        os.close(descriptor)
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    found: dict[str, str] = {}
    key = ""
    for line in lines[1:]:
        if line.rstrip() == "---":
            break
        if (read := _LINE.fullmatch(line)) is not None:
            key = read[1]
            found[key] = _scalar(read[2])
        elif key and (item := re.fullmatch(r"[ \t]*-[ \t]+(.+)", line)) is not None:
            found[key] = ", ".join(part for part in (found[key], _scalar(item[1])) if part)
        else:
            key = ""
    return {k: v for k, v in found.items() if v and len(v.encode()) <= _TEXT_BYTES and v.isprintable()}


def _scalar(text: str) -> str:
    """A YAML scalar, or a list in brackets, as plain text."""
    plain = text.split(" #")[0].strip().strip("[]")
    return ", ".join(part.strip().strip("'\"") for part in plain.split(",")) if plain else ""


def origin(compact: CompactAdapter) -> dict[str, str]:
    """Where exported factors come from, for the metadata of a file: short strings, no path, no time."""
    came, method = compact.provenance, methods.get(compact.method)
    found = {
        "lrconvert_version": __version__,
        "lrconvert_method": f"{method.id} {method.version}",
        "lrconvert_source": came.source,
        "lrconvert_captured": came.fields.get("captured", ""),
        "lrconvert_base_model": came.base_model,
        "lrconvert_base_revision": came.revision,
        "lrconvert_base_content": compact.base.content,
        **{f"lrconvert_{key}": came.fields.get(key, "") for key in _LICENCE},
    }
    return {key: text for key, text in found.items() if text}


def sidecar(compact: CompactAdapter) -> dict[str, str]:
    """The object of ``lrconvert.json`` beside an export."""
    return {"tool": f"lrconvert {__version__}", "source": compact.provenance.source}


def _yaml_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'


def model_card(
    compact: CompactAdapter, layout: str, command: str, fidelity: Fidelity | None, library: str = "peft"
) -> bytes:
    """The card of `compact` exported as `layout` for `library`; with `fidelity`, its error table is per target."""
    came = compact.provenance
    front = ["---"]
    if came.base_model:
        front += [f"base_model: {_yaml_string(came.base_model)}"]
    front += [f"library_name: {library}"] if library else []
    front += _licence_lines(came.fields)
    if came.task_type in _TASKS:
        front += [f"pipeline_tag: {_TASKS[came.task_type]}"]
    front += ["tags:", "- lora", "- lrconvert", "---", ""]
    method = methods.get(compact.method)
    size = file.sizes(compact)
    body = [
        f"# {layout} adapter, expanded from a compact {method.title} file",
        "",
        f"Written by lrconvert {__version__}. The update of every target is exactly the one of the compact file "
        f"({size.adapter:,} bytes without extra tensors; method `{method.id}` version {method.version}).",
        "",
    ]
    if command:
        body += ["```", command, "```", ""]
    body += _error_table(compact, fidelity)
    if came.source:
        body += ["", f"Source adapter, sha256 of its tensors: `{came.source}`"]
    return "\n".join([*front, *body, ""]).encode("utf-8")


def _licence_lines(fields: Mapping[str, str]) -> list[str]:
    found = []
    for key in _LICENCE:
        several = fields.get(key, "").split(", ")
        if len(several) > 1 and key == "license":
            found += [f"{key}:", *(f"- {_yaml_string(text)}" for text in several)]
        elif several != [""]:
            found += [f"{key}: {_yaml_string(fields[key])}"]
    return found


def _error_table(compact: CompactAdapter, fidelity: Fidelity | None) -> list[str]:
    total = compact.provenance.fields.get("captured", "")
    if fidelity is None:
        if not total:
            return ["How much of a source adapter this keeps was not measured."]
        return [
            f"Captured energy of the source's update, over all targets, as the compact file states it: **{total}** "
            "(1 is lossless). It was not measured again for this export."
        ]
    rows = [
        f"Captured energy of the source's update, over all targets: **{fidelity.captured:.4f}** (1 is lossless).",
        "",
        "| target | rank before | rank after | captured | relative error |",
        "|---|---:|---:|---:|---:|",
    ]
    for t in fidelity.targets:
        relative = (t.error / t.energy) ** 0.5 if t.energy else 0.0
        rows.append(f"| `{t.name}` | {t.rank_before} | {t.rank_after} | {t.captured:.4f} | {relative:.4f} |")
    return rows
