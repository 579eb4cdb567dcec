"""Pipelines of diffusers: a folder with ``model_index.json``, and in it one for each model, tokenizer and scheduler."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lrconvert.core.errors import BaseError
from lrconvert.core.wording import spelled
from lrconvert.io.checkpoint import PIPELINE_NAME, is_without_weights
from lrconvert.io.container import read_json


def is_pipeline(path: Path) -> bool:
    return (path / PIPELINE_NAME).is_file()


def models(pipeline: Path) -> tuple[str, ...]:
    """Return the folders of a pipeline's models, sorted: those with a configuration and weights."""
    folders = (folder for folder in pipeline.iterdir() if (folder / "config.json").is_file())
    return tuple(sorted(folder.name for folder in folders if not is_without_weights(folder)))


def siblings(model: Path) -> frozenset[str]:
    """Return the other parts of the pipeline that a model's folder lies in; none if it lies in no pipeline."""
    place = model.absolute()
    if not is_pipeline(place.parent):
        return frozenset()
    parts = read_json(place.parent / PIPELINE_NAME)
    return frozenset(name for name in parts if not name.startswith("_")) - {place.name}


def chosen(pipeline: Path, names: Iterable[str], component: str = "") -> tuple[str, ...]:
    """Return the models of a pipeline that `names` of parameters are for, by their first segments, or the one that is
    asked for. Raises E-BASE."""
    there = models(pipeline)
    listed = ", ".join(there) or "no model with weights"
    if component:
        if component not in there:
            raise BaseError(f"the pipeline has no model {component!r:.80}, it has {listed}", path=pipeline)
        return (component,)
    firsts = {name.partition(".")[0] for name in names}
    if firsts and firsts <= set(there):
        return tuple(sorted(firsts))
    unknown = sorted(firsts - set(there))
    what = f"nothing says which model of the pipeline {unknown[0]!r:.80} is in" if unknown else "the adapter is empty"
    raise BaseError(what, fix=f"pass {spelled('component', ...)}, one of {listed}", path=pipeline)
