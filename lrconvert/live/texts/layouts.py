"""Layouts of rows, as trainers take them, by their columns; the first that a row has is the one that is read.

messages                        TRL: turns of `role` and `content`; `tools`, `chat_template_kwargs`
conversations                   ShareGPT: turns of `from` and `value`; `system`, `tools`
prompt, completion              TRL: two texts, or two lists of turns
instruction, input, output      Alpaca: put into the template of Stanford's training
text, label                     TRL, and class heads
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lrconvert.live.texts.tally import BAD, EMPTY, NO_TURN
from lrconvert.live.texts.text import Conversation, Text, Turn

_USER, _ASSISTANT, _SYSTEM, _TOOL = "user", "assistant", "system", "tool"
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), _USER),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), _ASSISTANT),
    **dict.fromkeys(("tool", "observation", "function_response"), _TOOL),
    "system": _SYSTEM,
}
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:"
)
_PAIRED = ", paired with an input that provides further context"


class LeftOut(Exception):
    """A row that is not used: the `reason` as in `tally`, and what is wrong with it."""

    def __init__(self, reason: str, why: str = "") -> None:
        super().__init__(why)
        self.reason, self.why = reason, why


class UnknownLayout(LeftOut):
    """A row whose columns are none of the layouts."""


def _messages(row: Mapping[str, Any]) -> Conversation:
    return _conversation(_turns(row["messages"], "messages"), row, "conversations (messages)")


def _sharegpt(row: Mapping[str, Any]) -> Conversation:
    name = next(name for name in _CONVERSATIONS if row.get(name) is not None)
    turns = _turns(row[name], name)
    system = row.get("system")
    if isinstance(system, str) and system and turns and turns[0].get("role") != _SYSTEM:
        turns = ({"role": _SYSTEM, "content": system}, *turns)
    return _conversation(turns, row, "conversations (ShareGPT)")


def _prompted(row: Mapping[str, Any]) -> Text | Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Text(completion, prompt=prompt, kind="prompts with completions")
    if any(isinstance(value, str) or not isinstance(value, Sequence) for value in (prompt, completion)):
        raise LeftOut(BAD, "holds a text that is no string: `prompt` and `completion` are two texts or two lists")
    before = _turns(prompt, "prompt")
    if before and before[-1].get("role") == _ASSISTANT:
        raise LeftOut(BAD, "has a `prompt` that ends with a turn of the assistant")
    turns = (*before, *_turns(completion, "completion"))
    return _conversation(turns, row, "conversations (prompt, completion)", len(before))


def _alpaca(row: Mapping[str, Any]) -> Text:
    instruction, given, output = (row.get(name) or "" for name in ("instruction", "input", "output"))
    if not all(isinstance(value, str) for value in (instruction, given, output)):
        raise LeftOut(BAD, "holds a text that is no string")
    if not output:
        raise LeftOut(EMPTY)
    prompt = _ALPACA.format(
        paired=_PAIRED if given else "",
        instruction=instruction,
        given=f"### Input:\n{given}\n\n" if given else "",
    )
    return Text(output, prompt=prompt, kind="Alpaca rows (Stanford's template)")


def _plain(row: Mapping[str, Any]) -> Text:
    text, label = row["text"], row.get("label")
    if not isinstance(text, str) or not isinstance(label, (str, int, type(None))):
        raise LeftOut(BAD, "holds a text that is no string")
    return Text(text, label=None if label is None else str(label), kind="texts" if label is None else "labelled texts")


_CONVERSATIONS = ("conversations", "conversation")
# What a row has to have, all columns that are read then, and how. The order is the one that is promised.
_LAYOUTS: tuple[tuple[tuple[str, ...], tuple[str, ...], Callable[[Mapping[str, Any]], Text | Conversation]], ...] = (
    (("messages",), ("tools", "chat_template_kwargs"), _messages),
    (("conversations",), ("system", "tools", "chat_template_kwargs"), _sharegpt),
    (("conversation",), ("system", "tools", "chat_template_kwargs"), _sharegpt),
    (("prompt", "completion"), ("tools", "chat_template_kwargs"), _prompted),
    (("instruction", "output"), ("input",), _alpaca),
    (("text",), ("label",), _plain),
)
_OTHERS = ("history", "chosen", "rejected")  # columns of trainers that no layout reads
COLUMNS = frozenset([*_OTHERS, *(name for wanted, more, _ in _LAYOUTS for name in (*wanted, *more))])
_KNOWN = "`messages`, `conversations`, `prompt` and `completion`, `instruction` and `output`, or `text`"


def is_text_row(row: Any) -> bool:
    """Return true if the columns of a row are those of a layout; model inputs have others."""
    return isinstance(row, Mapping) and any(all(name in row for name in wanted) for wanted, _, _ in _LAYOUTS)


def read(row: Mapping[str, Any]) -> tuple[Text | Conversation, tuple[str, ...]]:
    """Return what a row holds, and which of its columns lost to that. A column without a value counts as none. Raises
    LeftOut."""
    present = {name for name in COLUMNS if row.get(name) is not None}
    for wanted, more, made in _LAYOUTS:
        if present.issuperset(wanted):
            return made(row), tuple(sorted(present - {*wanted, *more} - _empty(row)))
    if {"prompt", "chosen"} <= present:
        raise UnknownLayout(BAD, "is a preference (`chosen`, `rejected`), which is not read; name one `completion`")
    shown = ", ".join(f"{name!r:.30}" for name in list(row)[:8])
    raise UnknownLayout(BAD, f"has none of {_KNOWN}; it has {shown or 'nothing'}")


def _empty(row: Mapping[str, Any]) -> set[str]:
    """Columns that hold nothing: a table has a cell for each."""
    return {name for name, value in row.items() if value in ("", [], {})}


# --- turns ----------------------------------------------------------------------------------------------------------


def _conversation(turns: tuple[Turn, ...], row: Mapping[str, Any], kind: str, first: int = 0) -> Conversation:
    if not turns:
        raise LeftOut(EMPTY)
    if not any(turn["role"] == _ASSISTANT for turn in turns[first:]):
        raise LeftOut(NO_TURN)
    tools, options = (_parsed(row.get(name), name) for name in ("tools", "chat_template_kwargs"))
    if not isinstance(tools or [], Sequence) or not isinstance(options or {}, Mapping):
        raise LeftOut(BAD, "holds `tools` that are no list, or `chat_template_kwargs` that are no object")
    return Conversation(turns, first, tuple(tools or ()), dict(options or {}), kind=kind)


def _parsed(value: Any, name: str) -> Any:
    """A value that tables hold as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise LeftOut(BAD, f"holds a text in `{name}` that is not JSON") from None


def _turns(value: Any, name: str) -> tuple[Turn, ...]:
    """The turns of a list, in the spelling of `messages`. Raises LeftOut."""
    listed = _parsed(value, name)
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise LeftOut(BAD, f"holds a `{name}` that is no list of turns")
    return tuple(_turn(turn, number) for number, turn in enumerate(listed, 1))


def _turn(value: Any, number: int) -> Turn:
    if isinstance(value, Mapping) and isinstance(value.get("role"), str):
        turn = {key: part for key, part in value.items() if part is not None}
        turn["content"] = _content(turn.get("content", ""), number)
        return turn
    if isinstance(value, Mapping) and isinstance(value.get("from"), str):
        role = _SHAREGPT_ROLES.get(value["from"])
        if role is None:
            raise LeftOut(BAD, f"turn {number} is from {value['from']!r:.30}, which is no known speaker")
        return {"role": role, "content": _content(value.get("value"), number)}
    raise LeftOut(BAD, f"turn {number} has neither `role` and `content` nor `from` and `value`")


def _content(value: Any, number: int) -> str:
    """The text of a turn, which may come in parts. Raises LeftOut for images and the like."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
    raise LeftOut(BAD, f"turn {number} holds something that is no text")
