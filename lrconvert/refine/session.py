"""What all students of one teacher share: a live model with the teacher on it, data that is split, and how far the base
without an adapter is from the teacher's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from lrconvert.core.errors import DataError, OptionError
from lrconvert.live import attach, load_model, texts
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.refine import distributed, self_generated_data
from lrconvert.refine.attached_student import NAME
from lrconvert.refine.data import Pool, Split, examples, split
from lrconvert.refine.evaluation import TEACHER, Evaluator, TeacherModel
from lrconvert.refine.losses import Sums
from lrconvert.refine.settings import Settings

Progress = Callable[[float, str], None]
_SOME_TOKENS = 1 << 16  # what layers are fitted on


@dataclass(frozen=True, eq=False)
class RefineSession:
    """`base` is the folder of the model, None for one that was live. `far`: the base without an adapter, on held-out
    data."""

    room: TeacherModel
    teacher: LoraAdapter
    base: Path | None
    split: Split
    held: Evaluator
    far: Sums

    def inputs(self, seed: int, batch_tokens: int) -> Iterator[Mapping[str, Any]]:
        """Model inputs of a part of what is trained on, in the order of the first epoch."""
        pool = self.split.train
        return (pool.batch(which).inputs for which in pool.some(seed, batch_tokens, _SOME_TOKENS))


@contextmanager
def opened(
    base: Path | nn.Module,
    teacher: LoraAdapter,
    data: Any,
    settings: Settings,
    *,
    device: str,
    here: distributed.Processes,
    load_in_4bit: bool,
    progress: Progress,
) -> Iterator[RefineSession]:
    """A lesson on `data` (as in `refine`); afterwards the model is as it was. Raises E-BASE, E-DATA, E-OPTION."""
    progress(0.0, "loading the base")
    model = load_model.load_model(base, device, four_bit=load_in_4bit) if isinstance(base, Path) else base
    with _prepared(model, teacher, settings, here) as room:
        pool = _pool(room, base, data, settings, progress)
        there = split(pool, settings.seed)
        if settings.task_loss and _unlabelled(there.train):
            raise DataError("the task's loss needs labels, and the data has none", fix="leave out --task-loss")
        held = Evaluator.of(room, there.held, settings.batch_tokens)
        far = held.sums((), hidden=settings.hidden > 0)
        if far.items == 0:
            raise DataError("there is no output to compare", fix="is the data empty?")
        if not far.mean > 0:
            raise DataError("the teacher answers as the base does on this data: there is nothing to learn from it")
        yield RefineSession(room, teacher, base if isinstance(base, Path) else None, there, held, far)


@contextmanager
def _prepared(
    model: nn.Module, teacher: LoraAdapter, settings: Settings, here: distributed.Processes
) -> Iterator[TeacherModel]:
    """The model with its teacher, frozen and in evaluation mode; afterwards it is as it was."""
    trained = [p for p in model.parameters() if p.requires_grad]
    training = [module for module in model.modules() if module.training]
    before = attach.active(model)
    device = next(iter(model.parameters())).device
    cast = settings.autocast == "bf16" or (settings.autocast == "auto" and device.type == "cuda")
    config: Any = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    attach.attach(model, teacher, name=TEACHER)
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        if cache is not None:
            config.use_cache = False
        if settings.gradient_checkpointing:
            _checkpointed(model, True)
        yield TeacherModel(model, before, device, cast, here)
    finally:
        if settings.gradient_checkpointing:
            _checkpointed(model, False)
        if cache is not None:
            config.use_cache = cache
        names = model.__dict__["_lrconvert"].adapters if "_lrconvert" in model.__dict__ else ()
        for name in (NAME, TEACHER):
            if name in names:
                attach.detach(model, name)
        if attach.active(model) != before:
            attach.set_active(model, before)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def _checkpointed(model: nn.Module, on: bool) -> None:
    """Layers that are computed again on the way back. They have to believe that they train; what is in them, dropout
    for one, does not."""
    switch: Any = getattr(model, f"gradient_checkpointing_{'enable' if on else 'disable'}", None)
    if switch is None:
        raise OptionError("the model has no gradient checkpointing", fix="leave out --gradient-checkpointing")
    if on:
        switch(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        switch()
    for module in model.modules():
        if on and getattr(module, "gradient_checkpointing", False):
            module.training = True
        elif not on and hasattr(module, "gradient_checkpointing"):
            module.training = False


# --- data -----------------------------------------------------------------------------------------------------------


def _pool(room: TeacherModel, base: Path | nn.Module, data: Any, settings: Settings, progress: Progress) -> Pool:
    """All the data. Raises E-DATA."""
    kind = load_model.kind_of(room.model)
    paths: Any = [data] if isinstance(data, (str, PathLike)) else data
    if paths is not None and not _are_paths(paths):
        return _given(kind, paths)
    if paths is None and kind != "decoder":
        raise DataError(
            f"an {kind} cannot write texts of its own", fix="give --data: texts of the kind that the adapter is for"
        )
    config: Any = getattr(room.model, "config", None)
    where = base if isinstance(base, Path) else Path(str(getattr(config, "name_or_path", "")))
    tokenizer = load_model.load_tokenizer(where)
    length = load_model.longest_input(room.model, tokenizer, settings.length)
    pad = tokenizer.pad_token_id or 0
    if paths is not None:
        classes = {str(name): int(n) for name, n in (getattr(config, "label2id", None) or {}).items()}
        read = texts.read([Path(path) for path in paths])
        return Pool(kind, tuple(examples(read, tokenizer, kind, length, settings.max_tokens, classes)), pad=pad)
    room.using(TEACHER)
    with room.computing():
        found = self_generated_data.written(
            room.model,
            tokenizer,
            length=length,
            tokens=min(settings.own_tokens, settings.max_tokens or settings.own_tokens),
            batch_tokens=settings.batch_tokens,
            seed=settings.seed,
            progress=progress,
        )
    return Pool(kind, tuple(found), pad=pad)


def _are_paths(paths: Any) -> bool:
    return isinstance(paths, Sequence) and bool(paths) and all(isinstance(path, (str, PathLike)) for path in paths)


def _given(kind: str, batches: Iterable[Mapping[str, Any]]) -> Pool:
    found = tuple(dict(batch) for batch in batches)
    if not found:
        raise DataError("the data is empty")
    return Pool(kind, given=found)


def _unlabelled(pool: Pool) -> bool:
    labels = pool.batch([0]).labels
    return labels is None or not bool((labels != -100).any())
