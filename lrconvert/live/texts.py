"""Texts as data for models: files of texts, and the batches of tokens that a model is given.

Files: ``.txt`` (running text), ``.jsonl`` (one example a line: ``text``; ``prompt`` and ``completion``; ``text`` and
``label``). A decoder reads running text in blocks of equal length, so that nothing is padding; examples are read one by
one, shortest first, padded to the longest of a batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrconvert.core.errors import DataError
from lrconvert.core.wording import either

IGNORED = -100  # the label of what does not count, as in torch


@dataclass(frozen=True)
class Text:
    """One example: `prompt` and what follows it. A plain text is all `completion`; `label` is a class. `running` text
    goes on in the next one."""

    completion: str
    prompt: str = ""
    label: str | None = None
    running: bool = False


# --- files ----------------------------------------------------------------------------------------------------------


def read(paths: Sequence[Path]) -> Iterator[Text]:
    """Yield the examples of files, in order. Raises E-DATA (naming file and line), E-IO-*."""
    for path in paths:
        is_empty = True
        try:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        is_empty = False
                        yield _text(line, number, path)
        except UnicodeDecodeError:
            raise DataError("is not UTF-8 text", path=path) from None
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", path=path) from None
        if is_empty:
            raise DataError("holds no text", path=path)


def _text(line: str, number: int, path: Path) -> Text:
    if path.suffix == ".txt":
        return Text(line, running=True)
    if path.suffix not in (".jsonl", ".json"):
        raise DataError("is of no known kind", fix="give .txt (running text) or .jsonl (an object a line)", path=path)
    try:
        fields = json.loads(line)
    except ValueError:
        raise DataError(f"line {number} is not JSON", path=path) from None
    names = ("text", "prompt", "completion", "label")
    values = {name: fields[name] for name in names if name in fields} if isinstance(fields, dict) else {}
    label = values.pop("label", None)
    if not all(isinstance(value, str) for value in values.values()) or not isinstance(label, (str, int, type(None))):
        raise DataError(f"line {number} holds a text that is no string", path=path)
    if values.keys() == {"prompt", "completion"}:
        return Text(values["completion"], prompt=values["prompt"])
    if values.keys() == {"text"}:
        return Text(values["text"], label=None if label is None else str(label))
    raise DataError(
        f"line {number} has neither `text` nor `prompt` and `completion`",
        fix=either("see help(lrconvert.statistics)", "see `lrconvert statistics -h`"),
        path=path,
    )


# --- tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """The tokens of one text, how many of them are a prompt, what an encoder-decoder writes, the class of its label."""

    ids: tuple[int, ...]
    prompt: int = 0
    target: tuple[int, ...] = ()
    label: int | None = None


def tokenize(
    texts: Iterable[Text], tokenizer: Any, kind: str, length: int, max_tokens: int, classes: Mapping[str, int]
) -> tuple[list[int], list[Example]]:
    """Return the tokens of all running text, which only a decoder reads as such, and the other examples, each at most
    `length` long. `kind` is that of the model, `classes` numbers the labels."""
    running: list[int] = []
    examples: list[Example] = []
    tokens = 0
    for text in texts:
        if max_tokens and tokens >= max_tokens:
            break
        if text.running and kind == "decoder":
            ids = tokenizer(text.completion, add_special_tokens=not running, verbose=False)["input_ids"]
            running += ids
            tokens += len(ids)
        else:
            examples.append(_tokenized(text, tokenizer, kind, length, classes))
            tokens += len(examples[-1].ids)
    return running, examples


def _tokenized(text: Text, tokenizer: Any, kind: str, length: int, classes: Mapping[str, int]) -> Example:
    def ids(*parts: str, **named: Any) -> tuple[int, ...]:
        return tuple(tokenizer(*parts, truncation=True, max_length=length, **named)["input_ids"])

    if kind == "encoder-decoder":
        return Example(ids(text.prompt or text.completion), target=ids(text_target=text.completion))
    if kind == "encoder":
        return Example(ids(*filter(None, (text.prompt, text.completion))), label=class_of(text.label, classes))
    whole, end = ids(text.prompt + text.completion), tokenizer.eos_token_id
    if end is not None and whole[-1:] != (end,):
        whole = (*whole, end)[:length]
    return Example(whole, prompt=_common_start(whole, ids(text.prompt)) if text.prompt else 0)


def _common_start(whole: tuple[int, ...], prompt: tuple[int, ...]) -> int:
    """Count the tokens of a prompt that begin the whole text: a token may reach over its end."""
    count = 0
    while count < min(len(whole), len(prompt)) and whole[count] == prompt[count]:
        count += 1
    return count


def class_of(label: str | None, classes: Mapping[str, int]) -> int | None:
    """Return the number of a label, which is the name of a class or its number; None for one that is neither."""
    if label is None:
        return None
    return classes.get(label, int(label) if label.isdecimal() and int(label) in classes.values() else None)


# --- batches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing:
    """The form of batches: `kind` decoder, encoder, or encoder-decoder; tokens of a block (or at most of a text),
    of a batch, and at most of everything (0: no limit)."""

    kind: str
    length: int
    batch_tokens: int
    max_tokens: int = 0


def batches(texts: Iterable[Text], tokenizer: Any, packing: Packing) -> list[dict[str, Any]]:
    """Return the batches that a model is given, as torch tensors. The same texts give the same batches. Raises
    E-DATA."""
    running, examples = tokenize(texts, tokenizer, packing.kind, packing.length, packing.max_tokens, {})
    examples = sorted((e for e in examples if e.ids), key=lambda e: (len(e.ids), len(e.target)))
    groups = cut(range(len(examples)), [len(e.ids) for e in examples], packing.batch_tokens)
    pad = tokenizer.pad_token_id or 0
    packed = [*_blocks(running, packing), *(_padded([examples[n] for n in group], pad) for group in groups)]
    if not packed:
        raise DataError("the data has no token")
    return packed


def _blocks(stream: list[int], packing: Packing) -> list[dict[str, Any]]:
    """Running text in batches of blocks; what is left over is a batch of its own."""
    blocks = [stream[at : at + packing.length] for at in range(0, len(stream), packing.length)]
    rows = max(1, packing.batch_tokens // packing.length)
    full = [block for block in blocks if len(block) == packing.length]
    grouped = [full[at : at + rows] for at in range(0, len(full), rows)]
    if len(full) < len(blocks):
        grouped.append([blocks[-1]])
    return [{"input_ids": torch.tensor(group)} for group in grouped]


def cut(order: Iterable[int], sizes: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return numbers of examples, of rising size, in batches of at most that many tokens with their padding."""
    groups: list[list[int]] = []
    for n in order:
        if not groups or sizes[n] * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(n)
    return groups


def padded(rows: Sequence[Sequence[int]], fill: int, width: int = 0) -> Tensor:
    """Return rows in one tensor, filled up to the longest of them, or to `width`."""
    width = max(width, *map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def _padded(examples: Sequence[Example], pad: int) -> dict[str, Any]:
    read, written = [e.ids for e in examples], [e.target for e in examples]
    batch = {"input_ids": padded(read, pad), "attention_mask": padded([[1] * len(row) for row in read], 0)}
    if written[0]:
        widths = [max(map(len, rows)) for rows in (read, written)]
        batch["labels"] = padded(written, IGNORED, widths[1] + (widths[0] == widths[1]))  # known by its length
    return batch
