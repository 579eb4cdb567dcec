"""`refine`: a compact adapter is made to answer more as its teacher does, or comes back as it was."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from lrconvert import attaching, file, live, report, texts
from lrconvert.adapter import CompactAdapter, LoraAdapter
from lrconvert.container import open_checkpoint
from lrconvert.errors import DataError, FingerprintError, OptionError, OutputExistsError
from lrconvert.methods import base as methods
from lrconvert.refining import checkpoint, layers, log, world, writing
from lrconvert.refining.data import Pool, Split, examples, split
from lrconvert.refining.held import TEACHER, Held, Room, answers
from lrconvert.refining.loop import Scale, Trainer
from lrconvert.refining.losses import Sums
from lrconvert.refining.pupil import NAME, Pupil
from lrconvert.refining.settings import Settings
from lrconvert.report import Answers

Progress = Callable[[float, str], None]
Keep = Callable[[checkpoint.State], None]
_LAYERWISE_TOKENS = 1 << 16
_SHARE = 0.15  # of the progress: what comes before the end-to-end stage


@dataclass(frozen=True)
class Refinement:
    """`compact` is what to write. `before` and `after` are measured on held-out data, against the teacher; `improved`:
    whether it is better than its input, whose numbers it has otherwise. `steps` were made, of which `best_step` was
    taken (0: before the first); `layerwise`: whether stage one helped. `data`: digest of all data. `leads`: whether
    this is the first of several processes, the one that writes. `warnings` are one-line texts."""

    compact: CompactAdapter
    before: Answers
    after: Answers
    improved: bool
    steps: int
    best_step: int
    layerwise: bool
    data: str
    seconds: float
    leads: bool = True
    warnings: tuple[str, ...] = ()


def refine(
    compact: CompactAdapter,
    teacher: LoraAdapter,
    base: Path | nn.Module,
    data: Any,
    settings: Settings,
    *,
    device: str,
    partial: Path | None,
    resume: bool,
    log_to: Path | None,
    load_in_4bit: bool,
    progress: Progress,
) -> Refinement:
    """See `lrconvert.api.refine`; unfinished work is kept at `partial`."""
    settings.check()
    if partial is not None and partial.exists() and not resume:
        raise OutputExistsError(
            "holds a refinement that was broken off", fix="pass --resume to go on with it, or remove it", path=partial
        )
    layers.aligned(teacher, compact)
    if load_in_4bit and not isinstance(base, Path):
        raise OptionError("a live model cannot be loaded in 4 bit", fix="load it so, or give its folder")
    started = time.monotonic()
    with world.joined(device) as here:
        device = world.own_device(device)
        quiet = progress if here.leads else lambda share, text: None
        quiet(0.0, "loading the base")
        if isinstance(base, Path):
            _check_base(compact, base)
            model = live.load_model(base, device, four_bit=load_in_4bit)
        else:
            model = base
        with prepared(model, teacher, settings, here) as room:
            there = split_of(room, base, data, settings, lambda share, text: quiet(0.05 * share, text))
            where = base if isinstance(base, Path) else None
            work = Work(room, compact, teacher, where, there, settings, partial, resume, log_to)
            found = work.run(quiet)
    return replace(found, seconds=time.monotonic() - started, warnings=(*teacher.warnings, *_other(compact, teacher)))


def _other(compact: CompactAdapter, teacher: LoraAdapter) -> tuple[str, ...]:
    """A warning if the teacher is not the LoRA that the file was made from, as far as both say."""
    made_from, given = compact.provenance.source, teacher.provenance.source
    if not made_from or not given or made_from == given:
        return ()
    return ("the teacher is not the LoRA that the file was made from: what is measured is against the teacher",)


def _check_base(compact: CompactAdapter, base: Path) -> None:
    if compact.base.content:
        with open_checkpoint(base) as opened:
            if opened.content_digest() != compact.base.content:
                raise FingerprintError("the base has other contents than the file's own", path=base)


@contextmanager
def prepared(model: nn.Module, teacher: LoraAdapter, settings: Settings, here: world.World) -> Iterator[Room]:
    """The model with its teacher, frozen and in evaluation mode; afterwards it is as it was."""
    trained = [p for p in model.parameters() if p.requires_grad]
    training = [module for module in model.modules() if module.training]
    before = attaching.active(model)
    device = next(iter(model.parameters())).device
    cast = settings.autocast == "bf16" or (settings.autocast == "auto" and device.type == "cuda")
    config: Any = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    attaching.attach(model, teacher, name=TEACHER)
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        if cache is not None:
            config.use_cache = False
        if settings.gradient_checkpointing:
            _checkpointed(model, True)
        yield Room(model, before, device, cast, here)
    finally:
        if settings.gradient_checkpointing:
            _checkpointed(model, False)
        if cache is not None:
            config.use_cache = cache
        names = model.__dict__["_lrconvert"].adapters if "_lrconvert" in model.__dict__ else ()
        for name in (NAME, TEACHER):
            if name in names:
                attaching.detach(model, name)
        if attaching.active(model) != before:
            attaching.set_active(model, before)
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


def split_of(room: Room, base: Path | nn.Module, data: Any, settings: Settings, progress: Progress) -> Split:
    """The data that there is, or that the teacher writes, and what of it is held out. Raises E-DATA."""
    there = split(_pool(room, base, data, settings, progress), settings.seed)
    if settings.task_loss and _unlabelled(there.train):
        raise DataError("the task's loss needs labels, and the data has none", fix="leave out --task-loss")
    return there


def _pool(room: Room, base: Path | nn.Module, data: Any, settings: Settings, progress: Progress) -> Pool:
    """All the data. Raises E-DATA."""
    kind = live.kind_of(room.model)
    paths: Any = [data] if isinstance(data, (str, PathLike)) else data
    if paths is not None and not _are_paths(paths):
        return _given(kind, paths)
    if paths is None and kind != "decoder":
        raise DataError(
            f"an {kind} cannot write texts of its own", fix="give --data: texts of the kind that the adapter is for"
        )
    config: Any = getattr(room.model, "config", None)
    where = base if isinstance(base, Path) else Path(str(getattr(config, "name_or_path", "")))
    tokenizer = live.load_tokenizer(where)
    length = live.longest_input(room.model, tokenizer, settings.length)
    pad = tokenizer.pad_token_id or 0
    if paths is not None:
        classes = {str(name): int(n) for name, n in (getattr(config, "label2id", None) or {}).items()}
        read = texts.read([Path(path) for path in paths])
        return Pool(kind, tuple(examples(read, tokenizer, kind, length, settings.max_tokens, classes)), pad=pad)
    room.using(TEACHER)
    with room.computing():
        found = writing.written(
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


# --- the work -------------------------------------------------------------------------------------------------------


def _to_the_end(trainer: Trainer, keep: Keep, progress: Progress) -> Trainer:
    trainer.train(keep, progress)
    return trainer


@dataclass(eq=False)
class Work:
    """One refinement from data to result. `train` is the second stage: it takes the trainer, where to keep a state, and
    progress, and gives the trainer whose best and state are the outcome."""

    room: Room
    compact: CompactAdapter
    teacher: LoraAdapter
    base: Path | None
    split: Split
    settings: Settings
    partial: Path | None
    resume: bool
    log_to: Path | None
    train: Callable[[Trainer, Keep, Progress], Trainer] = _to_the_end

    def run(self, progress: Progress) -> Refinement:
        settings, room = self.settings, self.room
        told = log.to_file(self.log_to if room.world.leads else None)
        held = Held.of(room, self.split.held, settings.batch_tokens)
        base = held.sums((), hidden=settings.hidden > 0)
        if base.items == 0:
            raise DataError("there is no output to compare", fix="is the data empty?")
        if not base.mean > 0:
            raise DataError("the teacher answers as the base does on this data: there is nothing to learn from it")
        pupil = Pupil(room.model, self.compact, layers.aligned(self.teacher, self.compact), settings.train_heads)
        scale = Scale(base.mean, base.sizes)
        trainer = Trainer(room, pupil, self.split.train, held, scale, settings, told)
        before = self._measured(trainer, self.compact)
        told("start", {"base": base.mean, "before": before.mean, "items": base.items, "settings": asdict(settings)})
        kept = self._kept()
        if kept is None:
            self._first_stage(trainer, before, told, lambda s, t: progress(0.05 + (_SHARE - 0.05) * s, t))
        else:
            trainer.start(self.compact, before)
            trainer.begin(self.compact)
            trainer.resume(kept, self.compact)
        if settings.end_to_end:
            trainer = self.train(trainer, self._keep, lambda s, t: progress(_SHARE + (1 - _SHARE) * s, t))
        assert trainer.best is not None
        state = trainer.state
        improved = trainer.best is not self.compact and state.best_distance < before.mean
        after = replace(before, distance=state.best_distance * before.items, agreed=state.best_agreed)
        found = Refinement(
            trainer.best if improved else self.compact,
            answers(before, base),
            answers(after if improved else before, base),
            improved,
            state.step,
            state.best_step,
            bool(state.layerwise),
            self.split.digest,
            0.0,
            leads=room.world.leads,
        )
        told("end", {"distance": found.after.distance, "closed": found.after.closed, "best_step": state.best_step})
        return replace(found, compact=self._signed(found))

    def _measured(self, trainer: Trainer, compact: CompactAdapter) -> Sums:
        trainer.pupil.take(compact)
        return trainer.measured()

    def _first_stage(self, trainer: Trainer, before: Sums, told: log.Log, progress: Progress) -> None:
        trainer.start(self.compact, before)
        if self.settings.layerwise:
            progress(0.0, "layer by layer")
            found = layers.refitted(
                self.room, self.teacher, self.compact, self._some_inputs(), self.settings.seed, self.base, progress
            )
            if found is not None:
                after = self._measured(trainer, found)
                told("layers", {"distance": after.mean, "before": before.mean})
                if after.mean < before.mean:
                    trainer.start(found, after)
                    trainer.state.layerwise = 1
        assert trainer.best is not None
        trainer.begin(trainer.best)

    def _some_inputs(self) -> Iterator[Mapping[str, Any]]:
        tokens = 0
        pool = self.split.train
        for which in pool.plan(self.settings.seed, 0, self.settings.batch_tokens):
            batch = pool.batch(which)
            yield batch.inputs
            tokens += int(batch.weight)
            if tokens >= _LAYERWISE_TOKENS:
                return

    def _about(self) -> dict[str, Any]:
        """What a checkpoint is of: it is of no use to other work."""
        options = {k: repr(v) for k, v in sorted(asdict(self.settings).items()) if k not in ("checkpoint_every",)}
        payload = hashlib.sha256()
        for piece in file.encode(self.compact):
            payload.update(piece)
        return {
            "file": payload.hexdigest(),
            "teacher": self.teacher.provenance.source,
            "data": self.split.digest,
            "settings": options,
            "processes": self.room.world.size,
        }

    def _kept(self) -> checkpoint.State | None:
        if self.partial is None or not self.partial.exists() or not self.resume:
            return None
        return checkpoint.read(self.partial, self._about())

    def _keep(self, state: checkpoint.State) -> None:
        if self.partial is not None and self.room.world.leads:
            checkpoint.write(self.partial, self._about(), state)

    def _signed(self, found: Refinement) -> CompactAdapter:
        """With what was done in its provenance, also where it came to nothing."""
        compact = found.compact
        fields = {
            **compact.provenance.fields,
            "refined_steps": str(found.best_step),
            "refined_layerwise": "yes" if found.layerwise else "no",
            "refined_seed": str(self.settings.seed),
            "refined_data": found.data,
            "refined_before": _metrics(found.before),
            "refined_after": _metrics(found.after),
        }
        if self.teacher.provenance.source:
            fields["refined_teacher"] = self.teacher.provenance.source
        if found.improved and methods.needs_base(compact) and self.base is None:
            fields.pop("captured", None)  # nobody knows without the base's weights
        elif found.improved and "captured" in fields:
            captured = report.fidelity_on(layers.aligned(self.teacher, compact), compact, None, self.base).captured
            fields["captured"] = f"{min(max(captured, 0.0), 1.0):.4f}"
        return replace(compact, provenance=replace(compact.provenance, fields=fields))


def _metrics(found: Answers) -> str:
    agreement = "" if found.agreement is None else f", agreement {found.agreement:.4f}"
    return f"{found.kind} {found.distance:.6g} of {found.base_distance:.6g}{agreement}, {found.items} items"
