"""Sessions, which all students of one teacher share: a live model with the teacher on it, data that is split, and the
distance of the base without updates from the teacher's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lrconvert.core.errors import DataError, OptionError
from lrconvert.core.wording import spelled
from lrconvert.live import attach, load_model, texts, zero_point
from lrconvert.live.answers import AnswerSums
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.refine import self_generated_data
from lrconvert.refine.attached_student import NAME
from lrconvert.refine.data import Pool, Split, split, tokenized
from lrconvert.refine.distributed import Processes
from lrconvert.refine.evaluation import TEACHER, ZERO, Evaluator, TeacherModel
from lrconvert.refine.self_generated_data import OwnTexts
from lrconvert.refine.settings import RunOptions, Settings

Progress = Callable[[float, str], None]
_STATISTICS_TOKENS = 1 << 16  # what layers are fitted on


def part(progress: Progress, start: float, stop: float) -> Progress:
    """Return the progress of a part of the work, from `start` to `stop` of the whole."""
    return lambda share, text: progress(start + (stop - start) * share, text)


@dataclass(frozen=True, eq=False)
class RefineSession:
    """A teacher on a live model, with data. `base` is the folder of the model, None for one that was live.
    `base_distance`: how far the base without updates is from the teacher on held-out data; heads that teacher and
    students carry are on it (`zero_point`)."""

    teacher_model: TeacherModel
    teacher: LoraAdapter
    base: Path | None
    split: Split
    evaluator: Evaluator
    base_distance: AnswerSums

    def inputs(self, seed: int, batch_tokens: int) -> Iterator[Mapping[str, Any]]:
        """Yield model inputs of a part of what is trained on, in the order of the first epoch."""
        pool = self.split.train
        return (pool.batch(n).inputs for n in pool.first_batches(seed, batch_tokens, _STATISTICS_TOKENS))


@contextmanager
def open_session(
    base: Path | nn.Module,
    teacher: LoraAdapter,
    data: Any,
    settings: Settings,
    run: RunOptions,
    *,
    processes: Processes | None = None,
    student: CompactAdapter | None = None,
    progress: Progress,
) -> Iterator[RefineSession]:
    """Open a session on `data` (as in `refine`, or `OwnTexts`), for one `student` or for all that carry the teacher's
    heads; afterwards the model is as it was. Raises E-BASE, E-DATA, E-OPTION."""
    progress(0.0, "loading the base")
    where = base if isinstance(base, Path) else None
    model = base
    if isinstance(base, Path):
        model = load_model.load_model(base, run.device, four_bit=run.load_in_4bit, adapter=teacher)
    assert not isinstance(model, Path)
    adapters = {TEACHER: teacher, ZERO: zero_point.without_updates(teacher, student)}
    with _prepared(model, adapters, settings, processes or Processes()) as teacher_model:
        pool, source = _pool(teacher_model, where, data, settings, progress)
        parts = split(pool, settings.seed, source)
        if settings.task_loss and _is_unlabelled(parts.train):
            what = "the task's loss needs labels, and the data has none"
            raise DataError(what, fix=f"give labels, or leave out {spelled('task_loss')}", path=source)
        evaluator = Evaluator.of(teacher_model, parts.held_out, settings.batch_tokens)
        base_distance = evaluator.sums((ZERO,), hidden=settings.hidden > 0)
        if base_distance.items == 0:
            raise DataError("there is no output to compare", fix="is the data empty?")
        if not base_distance.mean > 0:
            raise DataError("the teacher's updates change no answer on this data: there is nothing to learn from it")
        yield RefineSession(teacher_model, teacher, where, parts, evaluator, base_distance)


@contextmanager
def _prepared(
    model: nn.Module, adapters: Mapping[str, LoraAdapter], settings: Settings, processes: Processes
) -> Iterator[TeacherModel]:
    """The model with its teacher and its zero point, frozen and in evaluation mode; afterwards it is as it was."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = attach.active(model)
    device = next(iter(model.parameters())).device
    autocast = settings.autocast == "bf16" or (settings.autocast == "auto" and device.type == "cuda")
    config: Any = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    with load_model.evaluating(model), attach.temporarily(model, adapters):
        if settings.gradient_checkpointing:
            _set_gradient_checkpointing(model, True)
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            if cache is not None:
                config.use_cache = False
            yield TeacherModel(model, before, device, autocast, processes)
        finally:
            if settings.gradient_checkpointing:
                _set_gradient_checkpointing(model, False)
            if cache is not None:
                config.use_cache = cache
            if NAME in attach.attached(model):
                attach.detach(model, NAME)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
                parameter.grad = None
            for parameter in trained:
                parameter.requires_grad_(True)


def _set_gradient_checkpointing(model: nn.Module, on: bool) -> None:
    """Compute layers again on the way back, or not. They have to believe that they train; what is in them, dropout for
    one, does not."""
    verb = "enable" if on else "disable"
    names = ("activation", "gradient")  # the second is the older one, and warns where the first is
    named = next((name for name in names if hasattr(model, f"{name}_checkpointing_{verb}")), None)
    if named is None:
        raise OptionError(
            "the model has no gradient checkpointing", fix=f"leave out {spelled('gradient_checkpointing', True)}"
        )
    switch: Any = getattr(model, f"{named}_checkpointing_{verb}")
    switch(**({f"{named}_checkpointing_kwargs": {"use_reentrant": False}} if on else {}))
    for module in model.modules():
        if on and getattr(module, "gradient_checkpointing", False):
            module.training = True
        elif not on and hasattr(module, "gradient_checkpointing"):
            module.training = False


# --- data -----------------------------------------------------------------------------------------------------------


def _pool(
    teacher_model: TeacherModel, base: Path | None, data: Any, settings: Settings, progress: Progress
) -> tuple[Pool, Path | None]:
    """All the data, and the file that it begins in. Raises E-DATA."""
    model = teacher_model.model
    kind = load_model.kind_of(model)
    own = data if isinstance(data, OwnTexts) else None
    data = None if own is not None else data
    written, model_inputs = texts.open_texts(data)
    if written is None and data is not None:
        batches = tuple(dict(batch) for batch in model_inputs)
        if not batches:
            raise DataError("the data is empty")
        return Pool(kind, model_inputs=batches), None
    if data is None and kind != "decoder":
        raise DataError(
            f"an {kind} cannot write texts of its own",
            fix=f"give {spelled('data', ...)}: texts of the kind that the adapter is for",
        )
    tokenizer = load_model.tokenizer_of(model, base)
    length = load_model.longest_input(model, tokenizer, settings.length)
    if written is not None:
        classes = load_model.classes_of(model)
        read = _labelled(written.texts, classes) if settings.task_loss and kind == "encoder" else written.texts
        pool = tokenized(read, tokenizer, kind, length, settings.max_tokens, classes, written.tally)
        progress(0.0, written.tally.notice())
        return pool, written.path
    teacher_model.activate(TEACHER)

    def write() -> list[texts.Example]:
        with teacher_model.computing():
            return self_generated_data.sample(
                model,
                tokenizer,
                length=length,
                tokens=min(settings.own_tokens, settings.max_tokens or settings.own_tokens),
                batch_tokens=settings.batch_tokens,
                seed=settings.seed,
                progress=progress,
                store=None if own is None else own.store,
            )

    rows = write() if own is None else own.keep(write)
    return Pool(kind, tuple(rows), pad=tokenizer.pad_token_id or 0), None


_Example = texts.Text | texts.Conversation


def _labelled(read: Iterable[_Example], classes: Mapping[str, int]) -> Iterator[_Example]:
    """Yield texts. Raises E-DATA at a label that is no class of the model."""
    for text in read:
        label = text.label if isinstance(text, texts.Text) else None
        if label is not None and texts.class_of(label, classes) is None:
            known = ", ".join(list(classes)[:8]) + (", ..." if len(classes) > 8 else "")
            raise DataError(
                f"the label {label!r:.60} is no class of the model, which knows {known or 'none'}",
                fix=f"spell labels as the base's config.json does (label2id), or leave out {spelled('task_loss')}",
                path=None if text.place is None else text.place.path,
            )
        yield text


def _is_unlabelled(pool: Pool) -> bool:
    if pool.kind == "encoder" and pool.examples:
        return all(example.label is None for example in pool.examples)
    labels = pool.batch([0]).labels
    return labels is None or not bool((labels != texts.IGNORED).any())
