"""Texts as data for models: files of texts, and the batches of tokens that a model is given.

Files: ``.txt`` (running text), ``.jsonl`` (one example a line: ``text``; ``prompt`` and ``completion``; ``text`` and
``label``). A decoder reads running text in blocks of equal length, so that nothing is padding; examples are read one by
one, shortest first, padded to the longest of a batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.core.errors import DataError

LENGTH = 512  # tokens of a block, or at most of a text
BATCH_TOKENS = 4096


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
    """The examples of files, in order. Raises E-DATA (naming file and line), E-IO-*."""
    for path in paths:
        found = 0
        try:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        found += 1
                        yield _example(line, number, path)
        except UnicodeDecodeError:
            raise DataError("is not UTF-8 text", path=path) from None
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", path=path) from None
        if not found:
            raise DataError("holds no text", path=path)


def _example(line: str, number: int, path: Path) -> Text:
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
        fix="see `lrconvert statistics -h`",
        path=path,
    )


# --- tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing:
    """How texts become batches: `kind` decoder, encoder, or encoder-decoder; tokens of a block (or at most of a text),
    of a batch, and at most of everything (0: no limit)."""

    kind: str
    length: int = LENGTH
    batch_tokens: int = BATCH_TOKENS
    max_tokens: int = 0


def batches(texts: Iterable[Text], tokenizer: Any, packing: Packing) -> list[dict[str, Any]]:
    """The batches that a model is given, as torch tensors. The same texts give the same batches. Raises E-DATA."""
    running: list[int] = []
    examples: list[tuple[list[int], list[int]]] = []
    tokens = 0
    for text in texts:
        if packing.max_tokens and tokens >= packing.max_tokens:
            break
        if text.running and packing.kind == "decoder":
            ids = tokenizer(text.completion, add_special_tokens=not running, verbose=False)["input_ids"]
            running += ids
        else:
            pair = _pair(text, tokenizer, packing)
            ids = pair[0]
            examples.append(pair)
        tokens += len(ids)
    found = [*_blocks(running, packing), *_by_length(examples, packing, tokenizer.pad_token_id or 0)]
    if not found:
        raise DataError("the data has no token")
    return found


def _pair(text: Text, tokenizer: Any, packing: Packing) -> tuple[list[int], list[int]]:
    """What a model reads of an example, and what an encoder-decoder writes."""

    def ids(*parts: str, **named: Any) -> list[int]:
        found: list[int] = tokenizer(*parts, truncation=True, max_length=packing.length, **named)["input_ids"]
        return found

    if packing.kind == "decoder":
        read, end = ids(text.prompt + text.completion), tokenizer.eos_token_id
        return ([*read, end] if end is not None and read[-1:] != [end] else read)[: packing.length], []
    if packing.kind == "encoder":
        return ids(*filter(None, (text.prompt, text.completion))), []
    return ids(text.prompt or text.completion), ids(text_target=text.completion)


def _blocks(stream: list[int], packing: Packing) -> list[dict[str, Any]]:
    """Running text in batches of blocks; what is left over is a batch of its own."""
    import torch

    blocks = [stream[at : at + packing.length] for at in range(0, len(stream), packing.length)]
    rows = max(1, packing.batch_tokens // packing.length)
    full = [block for block in blocks if len(block) == packing.length]
    grouped = [full[at : at + rows] for at in range(0, len(full), rows)]
    if len(full) < len(blocks):
        grouped.append([blocks[-1]])
    return [{"input_ids": torch.tensor(group)} for group in grouped]


def _by_length(pairs: list[tuple[list[int], list[int]]], packing: Packing, pad: int) -> list[dict[str, Any]]:
    """Examples by length, so that little is padding."""
    pairs = sorted((pair for pair in pairs if pair[0]), key=lambda pair: (len(pair[0]), len(pair[1])))
    found, at = [], 0
    while at < len(pairs):
        stop = at + 1
        while stop < len(pairs) and len(pairs[stop][0]) * (stop + 1 - at) <= packing.batch_tokens:
            stop += 1
        found.append(_padded(pairs[at:stop], pad))
        at = stop
    return found


def _padded(pairs: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, Any]:
    import torch

    widths = [max(len(pair[side]) for pair in pairs) for side in (0, 1)]
    widths[1] += widths[0] == widths[1]  # so that each padding is known by its length

    def rows(side: int, fill: int, value: int | None = None) -> torch.Tensor:
        longest = widths[side]
        made = [
            [*(p[side] if value is None else [value] * len(p[side])), *[fill] * (longest - len(p[side]))] for p in pairs
        ]
        return torch.tensor(made)

    batch = {"input_ids": rows(0, pad), "attention_mask": rows(0, 0, 1)}
    if pairs[0][1]:
        batch["labels"] = rows(1, -100)
    return batch
