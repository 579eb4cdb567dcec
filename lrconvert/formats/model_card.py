"""The README.md of an exported folder, made offline: front matter that hubs read, the command, and the error table.

The licence is the source's: read from its card, kept in the compact file's provenance, written into the new card.
"""

from __future__ import annotations

import re
from pathlib import Path

from lrconvert.core.errors import printable
from lrconvert.core.limits import MIB
from lrconvert.core.version import __version__
from lrconvert.formats.fidelity import Fidelity
from lrconvert.formats.lrc import file
from lrconvert.lora.adapter import CompactAdapter
from lrconvert.methods import base as methods

CARD = "README.md"
_CARD_BYTES = MIB
_TEXT_BYTES = 200
_WEB = re.compile(r"https?://[\w.-]+(?::\d+)?(?:[/?#][^\s<>\"'()\[\]\\^`{|}]*)?\Z")
_LICENCE = ("license", "license_name", "license_link")
_TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


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
    for key in _LICENCE:
        value = front.get(key)
        texts = value if isinstance(value, list) else [value]
        stated[key] = ", ".join(text for text in texts if isinstance(text, str))
    return {k: v for k, v in stated.items() if v and len(v.encode()) <= _TEXT_BYTES and v.isprintable()}


def origin(compact: CompactAdapter) -> dict[str, str]:
    """Return where exported factors come from, for the metadata of a file: short strings, no path, no time."""
    provenance, method = compact.provenance, methods.get(compact.method)
    notes = {
        "lrconvert_version": __version__,
        "lrconvert_method": f"{method.id} {method.version}",
        "lrconvert_source": provenance.source,
        "lrconvert_captured": provenance.fields.get("captured", ""),
        "lrconvert_base_model": provenance.base_model,
        "lrconvert_base_revision": provenance.revision,
        "lrconvert_base_content": compact.base.content,
        **{f"lrconvert_{key}": provenance.fields.get(key, "") for key in _LICENCE},
    }
    return {key: text for key, text in notes.items() if text}


def sidecar(compact: CompactAdapter) -> dict[str, str]:
    """Return the object of ``lrconvert.json`` beside an export."""
    return {"tool": f"lrconvert {__version__}", "source": compact.provenance.source}


def model_card(
    compact: CompactAdapter, layout: str, command: str, fidelity: Fidelity | None, library: str = "peft"
) -> bytes:
    """Return the card of `compact` exported as `layout` for `library`, with the error table of `fidelity`."""
    from huggingface_hub import ModelCardData

    provenance = compact.provenance
    licences = provenance.fields.get("license", "").split(", ")
    link = provenance.fields.get("license_link", "")
    front = ModelCardData(
        base_model=provenance.base_model or None,
        library_name=library or None,
        license=licences if len(licences) > 1 else licences[0] or None,  # type: ignore[arg-type]
        license_name=provenance.fields.get("license_name"),
        license_link=link if _WEB.match(link) else None,
        pipeline_tag=_TASKS.get(provenance.task_type),
        tags=["lora", "lrconvert"],
    )
    method = methods.get(compact.method)
    size = file.sizes(compact)
    body = [
        f"# {layout} adapter, expanded from a compact {method.title} file",
        "",
        f"Written by lrconvert {__version__}. The update of every target is exactly the one of the compact file "
        f"({size.adapter:,} bytes without extra tensors; method `{method.id}` version {method.version}).",
        "",
    ]
    if link and not _WEB.match(link):
        body += [f"The source's card says of its licence: {code(link)}", ""]
    if command:
        shown = printable(command, 4000)
        body += [_fence(shown, 3), shown, _fence(shown, 3), ""]
    body += _error_table(compact, fidelity)
    if provenance.source:
        body += ["", f"Source adapter, sha256 of its tensors: {code(provenance.source)}"]
    return "\n".join(["---", front.to_yaml(), "---", "", *body, ""]).encode("utf-8")


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
