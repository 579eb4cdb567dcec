"""Examples in tokens, and which of them count: all of a plain text, what follows a prompt, the assistant's turns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lrconvert.core.errors import DataError
from lrconvert.live.texts.chat import ChatTemplate, Rendered, Runs, common_start
from lrconvert.live.texts.layouts import LeftOut
from lrconvert.live.texts.tally import BAD, EMPTY, TOO_LONG, Tally
from lrconvert.live.texts.text import Conversation, Text

IGNORED = -100  # the label of what does not count, as in torch
_ENOUGH = 100  # examples that are all refused: so will the others be


@dataclass(frozen=True)
class Example:
    """The tokens of one text, how many of them are a prompt, what an encoder-decoder writes, the class of its label.
    `answers` are the runs of tokens that count, where that is not all that follows the prompt."""

    ids: tuple[int, ...]
    prompt: int = 0
    target: tuple[int, ...] = ()
    label: int | None = None
    answers: Runs = ()

    @property
    def is_masked(self) -> bool:
        """True if some of the tokens do not count."""
        return bool(self.prompt or self.answers)

    @property
    def has_answer(self) -> bool:
        """True if any of the tokens counts."""
        return len(self.ids) > self.prompt

    @property
    def labels(self) -> list[int]:
        """The tokens, with IGNORED for those that do not count."""
        labels = [IGNORED] * len(self.ids)
        for start, end in self.answers or ((self.prompt, len(self.ids)),):
            labels[start:end] = self.ids[start:end]
        return labels

    @property
    def answer_tokens(self) -> int:
        """The number of tokens that count."""
        return sum(end - start for start, end in self.answers or ((self.prompt, len(self.ids)),))


def tokenize(
    texts: Iterable[Text | Conversation],
    tokenizer: Any,
    kind: str,
    length: int,
    max_tokens: int,
    classes: Mapping[str, int],
    tally: Tally | None = None,
    *,
    answers_only: bool = False,
) -> tuple[list[int], list[Example]]:
    """Return the tokens of all running text, which only a decoder reads as such, and the other examples, each at most
    `length` long; `answers_only`: but for those of which no token counts. `kind` is that of the model, `classes`
    numbers the labels. What was read is counted in `tally`. Raises E-DATA."""
    tally = Tally() if tally is None else tally
    tally.length, tally.max_tokens = length, max_tokens
    reader = _Reader(tokenizer, kind, length, classes, tally, answers_only)
    running: list[int] = []
    examples: list[Example] = []
    refused: DataError | None = None
    tokens = 0
    for text in texts:
        if max_tokens and tokens >= max_tokens:
            tally.is_stopped = True
            break
        if isinstance(text, Text) and text.running and kind == "decoder":
            ids = tokenizer(text.completion, add_special_tokens=not running, verbose=False)["input_ids"]
            running += ids
            tokens += len(ids)
            tally.use(text, len(ids), len(ids))
            continue
        try:
            made = reader.examples(text)
        except LeftOut as error:
            tally.leave_out(error.reason, text.place, error.why)
            refused = refused or _refusal(text, error)
            if not examples and tally.left_out[BAD] >= _ENOUGH:
                break
        else:
            tokens += sum(len(example.ids) for example in made)
            examples += reader.used(text, made)
    if refused and not examples and not running:
        raise refused
    return running, examples


def _refusal(text: Text | Conversation, error: LeftOut) -> DataError:
    place = text.place
    row = "" if place is None else f"{place.row}: "
    return DataError(f"{row}{error.why or 'holds no answer'}", path=None if place is None else place.path)


@dataclass(frozen=True)
class _Reader:
    tokenizer: Any
    kind: str
    length: int
    classes: Mapping[str, int]
    tally: Tally
    answers_only: bool

    def examples(self, text: Text | Conversation) -> list[Example]:
        """The examples of a text. Raises LeftOut, E-DATA."""
        return self._of_conversation(text) if isinstance(text, Conversation) else [self._of_text(text)]

    def used(self, text: Text | Conversation, examples: list[Example]) -> list[Example]:
        """Those of the examples of a text that are used, counted."""
        kept = [e for e in examples if e.ids and (e.has_answer or not self.answers_only)]
        for example in (e for e in examples if e not in kept):
            self.tally.leave_out(TOO_LONG if len(example.ids) >= self.length else EMPTY, text.place)
        if kept:
            answers = [len(e.target) if self.kind == "encoder-decoder" else e.answer_tokens for e in kept]
            self.tally.use(text, sum(len(e.ids) for e in kept), sum(answers))
            self.tally.by_turns += len(examples) > 1
        return kept

    def _of_conversation(self, conversation: Conversation) -> list[Example]:
        if self.kind != "decoder":
            raise DataError(
                f"conversations are for models that go on with a text, and the base is an {self.kind}",
                fix="give `text` and `label`, or `prompt` and `completion`",
                path=None if conversation.place is None else conversation.place.path,
            )
        return [self._of_rendered(one) for one in ChatTemplate(self.tokenizer).render(conversation)]

    def _of_rendered(self, rendered: Rendered) -> Example:
        ids = rendered.ids[: self.length]
        answers = tuple((start, min(end, len(ids))) for start, end in rendered.answers if start < len(ids))
        self.tally.cut += bool(answers) and len(rendered.ids) > len(ids)
        prompt = answers[0][0] if answers else len(ids)
        is_rest = answers in ((), ((prompt, len(ids)),))
        return Example(ids, prompt=prompt, answers=() if is_rest else answers)

    def _of_text(self, text: Text) -> Example:
        if self.kind == "encoder-decoder":
            ids, is_cut = self._ids(text.prompt or text.completion)
            target, is_target_cut = self._ids(text_target=text.completion)
            self.tally.cut += is_cut or is_target_cut
            return Example(ids, target=target)
        if self.kind == "encoder":
            parts = [part for part in (text.prompt, text.completion) if part]
            if not parts:
                raise LeftOut(EMPTY)
            ids, is_cut = self._ids(*parts)
            self.tally.cut += is_cut
            return Example(ids, label=self._class(text))
        whole, is_cut = self._ids(text.prompt + text.completion)
        end = self.tokenizer.eos_token_id
        if end is not None and whole[-1:] != (end,):
            whole = (*whole, end)[: self.length]
        prompt = common_start(whole, self._ids(text.prompt)[0]) if text.prompt else 0
        self.tally.cut += is_cut and prompt < len(whole)
        return Example(whole, prompt=prompt)

    def _ids(self, *parts: str, **named: Any) -> tuple[tuple[int, ...], bool]:
        """Texts in tokens, and whether they had to be cut."""
        ids = tuple(self.tokenizer(*parts, truncation=True, max_length=self.length, **named)["input_ids"])
        is_full = len(ids) >= self.length
        return ids, is_full and len(self.tokenizer(*parts, verbose=False, **named)["input_ids"]) > len(ids)

    def _class(self, text: Text) -> int | None:
        number = class_of(text.label, self.classes)
        if number is None and text.label is not None and self.classes:
            self.tally.unknown_labels[text.label] += 1
        return number


def class_of(label: str | None, classes: Mapping[str, int]) -> int | None:
    """Return the number of a label, which is the name of a class or its number; None for one that is neither."""
    if label is None:
        return None
    return classes.get(label, int(label) if label.isdecimal() and int(label) in classes.values() else None)
