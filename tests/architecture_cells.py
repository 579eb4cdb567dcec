"""One cell of the table: an architecture, a feature, and whether what lrconvert makes of it is what PEFT says.

Every error is the distance of logits from those of PEFT's attached model, over the adapter's own effect: 0 is PEFT, 1
is as wrong as no adapter.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architecture_features import NEW_TOKENS, Feature
from architectures import VOCABULARY, Architecture

import lrconvert
from lrconvert.core.errors import LrcError

EXACT = 1e-4
"""The largest error of what computes with the adapter's own numbers: attach and merge."""
ROUNDED = 3e-3
"""The largest error of what was rounded to 16 bits on its way."""

Step = list[Any]
"""A verdict and the error, or what was said. Verdicts: "ok", the code of a refusal, "WRONG", "FAILS" for an exception
of another kind, "MERGED" for the answer of PEFT's merged model where PEFT's attached one answers otherwise, and
"UNCHECKED" for a file that PEFT does not read, made without a base and with the note that names were not checked."""


class Base:
    """A tiny model in a folder and in memory."""

    def __init__(self, architecture: Architecture, folder: Path) -> None:
        self.architecture = architecture
        self.folder = architecture.save(folder)
        self.place = folder.parent
        self.model = architecture.load(folder)

    def copy(self, feature: Feature, seed: int = 3) -> Any:
        """Return a model of its own, as the adapter's program makes it of the base."""
        return feature.prepare(copy.deepcopy(self.model), seed)

    def logits(self, model: Any, feature: Feature) -> torch.Tensor:
        return self.architecture.logits(model, VOCABULARY + (NEW_TOKENS if feature.resized else 0))


@dataclass(frozen=True)
class Truth:
    """The adapter, what PEFT answers with it, and what the base answers."""

    folder: Path
    attached: torch.Tensor
    merged: torch.Tensor | None
    base: torch.Tensor
    fields: dict[str, Any]

    def error(self, answer: torch.Tensor, other: torch.Tensor | None = None) -> float:
        """Return how far an answer is from that of PEFT's attached model, or from another, over the effect."""
        return _distance(answer, self.attached if other is None else other, self.attached - self.base)


def _distance(answer: torch.Tensor, truth: torch.Tensor, effect: torch.Tensor) -> float:
    return float((answer - truth).norm() / effect.norm()) if answer.shape == truth.shape else float("inf")


def run(base: Base, feature: Feature, work: Path) -> dict[str, Any]:
    """Return the cell: what PEFT does with the adapter, and a `Step` for everything of lrconvert."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = _truth(base, feature, work)
        if isinstance(made, dict):
            return made
        return {**made.fields, "steps": _steps(base, feature, made, work)}


def _truth(base: Base, feature: Feature, work: Path) -> Truth | dict[str, Any]:
    import peft

    options = feature.options(base.architecture, base.copy(feature))
    if options is None:
        return {"peft": "none of it"}
    folder = work / "adapter"
    try:
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options})
        model = peft.get_peft_model(base.copy(feature), config)
        _disturb(model)
        trained = base.logits(model, feature)
        model.save_pretrained(str(folder))
        attached = _peft(base, feature, folder)
        other = _peft(base, feature, folder, seed=4) if feature.resized else attached
    except Exception as error:  # what PEFT cannot do is no fault of ours
        return {"peft": "refuses", "why": _line(error)}
    before = base.logits(base.copy(feature), feature)
    effect = float((attached - before).norm() / before.norm())
    lost = float((attached - trained).norm() / (trained - before).norm())
    fields: dict[str, Any] = {"peft": "ok", "effect": round(effect, 4)}
    if not effect > 1e-5:
        return {"peft": "no effect"}
    if lost > EXACT or not torch.equal(attached, other):  # the adapter does not say all that the model was
        return {"peft": "loses", "why": f"a share of {lost:.2g}"}
    try:
        merged = _peft(base, feature, folder, merge=True)
        error = _distance(merged, attached, attached - before)
        fields["peft-merge"] = ["ok" if error <= EXACT else "WRONG", float(f"{error:.2g}")]
    except Exception as refusal:
        merged, fields["peft-merge"] = None, ["refuses", _line(refusal)]
    if feature.rewrite is not None:
        feature.rewrite(folder, base.model)
    return Truth(folder, attached, merged, before, fields)


def _disturb(model: Any) -> None:
    """Move all that is trainable away from its start."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=random)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * noise.abs())
            elif "lora_" in name and "bias" not in name:
                parameter.copy_(noise * 0.2)
            else:
                parameter.add_(noise * 0.1)


def _peft(base: Base, feature: Feature, folder: Path, merge: bool = False, seed: int = 3) -> torch.Tensor:
    """What PEFT answers with a saved adapter. Raises where it names missing or unexpected tensors."""
    import peft

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base.copy(feature, seed), str(folder))
    for warning in said:
        if "missing adapter keys" in str(warning.message):
            raise RuntimeError(f"PEFT: {warning.message}")
    return base.logits(model.merge_and_unload() if merge else model, feature)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:240]


# --- what lrconvert makes of it -------------------------------------------------------------------------------------


def _steps(base: Base, feature: Feature, truth: Truth, work: Path) -> dict[str, Step]:
    steps: dict[str, Step] = {}

    def step(name: str, limit: float, answer: Callable[[], torch.Tensor]) -> bool:
        steps[name] = _judge(truth, limit, answer, base.place)
        return steps[name][0] == "ok"

    def attached(adapter: Path) -> torch.Tensor:
        model = base.copy(feature)
        lrconvert.attach(model, adapter)
        return base.logits(model, feature)

    step("attach", EXACT, lambda: attached(truth.folder))
    for name, options in (("", {}), ("-base", {"base": base.folder})):
        file, out = work / f"small{name}.lrc", work / f"export{name}"
        try:
            lora = lrconvert.load_lora(truth.folder, **options)
            lrconvert.write(lrconvert.convert(lora, "lowrank", bits=14, **options).compact, file)
        except Exception as error:
            steps[f"convert{name}"] = _failed(error, base.place)
            continue
        step(f"file{name}", ROUNDED, lambda file=file: attached(file))  # type: ignore[misc]
        try:
            notes = lrconvert.export(file, out, to="peft-lora").notes
        except Exception as error:
            steps[f"export{name}"] = _failed(error, base.place)
            continue
        if step(f"export{name}", ROUNDED, lambda out=out: _peft(base, feature, out)):  # type: ignore[misc]
            continue
        unchecked = [note for note in notes if "names were not checked" in note]
        if unchecked and steps[f"export{name}"][0] == "FAILS":
            steps[f"export{name}"] = ["UNCHECKED", unchecked[0]]
    if not feature.resized:  # a check against a base of other tokens is another question
        steps["check"] = _check(base, feature, truth)
    steps.update(_merged(base, feature, truth, base.folder, work))
    if feature.resized:  # as refusals advise
        larger = work / "larger"
        base.copy(feature).save_pretrained(larger)
        merged = _merged(base, feature, truth, larger, work)
        steps.update({f"{name}-resized": said for name, said in merged.items()})
    return steps


def _judge(truth: Truth, limit: float, answer: Callable[[], torch.Tensor], place: Path) -> Step:
    try:
        given = answer()
    except Exception as refusal:
        return _failed(refusal, place)
    error = truth.error(given)
    if error > limit and truth.merged is not None and truth.error(given, truth.merged) <= limit:
        return ["MERGED", float(f"{error:.2g}")]
    return ["ok" if error <= limit else "WRONG", float(f"{error:.2g}")]


def _failed(error: Exception, place: Path) -> Step:
    if isinstance(error, LrcError):
        return [error.code, str(error).replace(str(place), "").partition(": ")[2][:600]]
    return ["FAILS", _line(error).replace(str(place), "")]


def _check(base: Base, feature: Feature, truth: Truth) -> Step:
    """Whether `check` says of PEFT what PEFT does."""
    try:
        reads = feature.rewrite is None or truth.error(_peft(base, feature, truth.folder)) <= EXACT
    except Exception:
        reads = False
    try:
        findings = lrconvert.check(truth.folder, ["peft"], base=base.folder)
    except Exception as error:
        return _failed(error, base.place)
    # without a task an adapter may be meant for the bare model: a warning then
    has_task = "task_type" in (feature.options(base.architecture, base.model) or {})
    dead = [str(f) for f in findings if f.severity != "warns" or (f.rule == "modules" and not has_task)]
    if reads == (not dead):
        return ["ok", "finds it dead, as it is" if dead else ""]
    return ["WRONG", f"PEFT reads it; {dead[0]}" if reads else "PEFT does not read it, and nothing is found"]


def _merged(base: Base, feature: Feature, truth: Truth, into: Path, work: Path) -> dict[str, Step]:
    """What becomes of a merge into the model at `into`."""
    merged, again = work / f"{into.name}-merged", work / f"{into.name}-again"
    try:
        lrconvert.merge(into, truth.folder, merged)
    except Exception as error:
        return {"merge": _failed(error, base.place)}
    steps: dict[str, Step] = {}

    def loaded() -> torch.Tensor:
        model, said = base.architecture.kind.from_pretrained(merged, dtype=torch.float32, output_loading_info=True)
        wrong = {kind: sorted(map(str, names))[:3] for kind, names in said.items() if names}
        steps["keys"] = ["WRONG", str(wrong)[:300]] if wrong else ["ok", ""]
        return base.logits(model, feature)

    steps["merge"] = _judge(truth, EXACT, loaded, base.place)
    try:
        steps["verify"] = ["ok" if lrconvert.verify(merged, into, truth.folder).ok else "WRONG", ""]
    except Exception as error:
        steps["verify"] = _failed(error, base.place)
    try:
        lrconvert.unmerge(merged, again)
        steps["unmerge"] = ["ok" if _files(again) == _files(into) else "WRONG", ""]
    except Exception as error:
        steps["unmerge"] = _failed(error, base.place)
    return steps


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
