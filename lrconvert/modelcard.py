"""The README.md of an exported folder, made offline: front matter that hubs read, the command, and the error table."""

from __future__ import annotations

from lrconvert import __version__, file
from lrconvert.adapter import CompactAdapter
from lrconvert.methods import base as methods
from lrconvert.report import Fidelity

_TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def _yaml_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'


def model_card(compact: CompactAdapter, layout: str, command: str, fidelity: Fidelity | None) -> bytes:
    """The card of `compact` exported as `layout`; with `fidelity`, its error table is per target."""
    came = compact.provenance
    front = ["---"]
    if came.base_model:
        front += [f"base_model: {_yaml_string(came.base_model)}"]
    front += ["library_name: peft"]
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
