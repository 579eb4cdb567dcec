"""What of texts a refinement learns from, and the digest by which it is taken up again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ADAPTERS, BASES

from lrconvert import api
from lrconvert.live import load_model, texts
from lrconvert.refine import data

LLAMA, LORA = BASES / "tiny-llama", ADAPTERS / "llama-plain"
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = load_model.load_tokenizer(LLAMA)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def pool_of(rows: list[dict[str, Any]], tokenizer: Any, length: int = 128) -> tuple[data.Pool, texts.Tally]:
    read, _ = texts.open_texts(rows)
    assert read is not None
    return data.tokenized(read.texts, tokenizer, "decoder", length, 0, {}, read.tally), read.tally


def test_only_the_assistants_turns_count(tokenizer: Any) -> None:
    """The places that are scored are those before a token of an answer, and the labels are these tokens."""
    pool, _ = pool_of([{"messages": turns("hello", "the words", "so?", "it was")}, {"text": "plain"}], tokenizer)
    batch = pool.batch([0, 1])
    assert batch.scored is not None and batch.labels is not None and "labels" not in batch.inputs
    for row, example in zip(range(2), pool.examples, strict=True):
        counted = [n for n, label in enumerate(example.labels) if label != texts.IGNORED and n]
        assert batch.scored[row].nonzero()[:, 0].tolist() == [n - 1 for n in counted]
        assert batch.labels[row][batch.scored[row]].tolist() == [example.ids[n] for n in counted]
    assert len(pool.examples[0].answers) == 2 and not pool.examples[1].answers


def test_texts_without_room_for_their_completion_are_counted(tokenizer: Any) -> None:
    """A prompt that fills the length leaves nothing to learn from; the text is left out with a word."""
    rows = [
        {"prompt": "the words", "completion": " and so on"},
        {"prompt": "many words " * 40, "completion": " it"},
        {"prompt": "some words", "completion": " or so"},
        {"messages": turns("many words " * 40, "it")},
    ]
    pool, tally = pool_of(rows, tokenizer, 64)
    assert len(pool) == 2 and tally.notice().is_warning
    assert "left out: 2 whose prompt alone fills length (row 2; row 4)" in tally.notice()
    assert not pool_of(rows[:1] * 2, tokenizer, 64)[1].notice().is_warning


def test_digests_of_what_was_read_before_are_as_before(tokenizer: Any) -> None:
    """A refinement that was broken off goes on: the digest of texts and prompts has nothing new in it. What answers
    there are in a conversation is a part of it."""
    pool, _ = pool_of([{"text": "the words"}, {"prompt": "some", "completion": " words"}], tokenizer)
    hasher = hashlib.sha256()
    for example in pool.examples:
        head = (len(example.ids), example.prompt, 0, -1)
        hasher.update(np.array([*head, *example.ids], "<i8").tobytes())
    assert pool.digest() == hasher.hexdigest()
    ids = tuple(range(20))
    digests = {
        data.Pool("decoder", (data.Example(ids, prompt=2, answers=answers),)).digest()
        for answers in ((), ((2, 4),), ((2, 5),), ((2, 4), (6, 8)))
    }
    assert len(digests) == 4


def test_a_digest_of_before(tokenizer: Any, tmp_path: Path) -> None:
    """The digest of a file of every layout that there was at first, as it was then."""
    rows = [{"text": "one"}, {"prompt": "p", "completion": "c"}, {"text": "two", "label": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.txt").write_text("running on\nand on\n")
    read = texts.read([tmp_path / "a.jsonl", tmp_path / "b.txt"])
    pool = data.tokenized(read, tokenizer, "decoder", 8, 0, {})
    assert pool.digest() == "04fe0530e0b78c7dd04fbc1fab73e61b43f5f79b2875a3cccd960d066189222e"


@pytest.mark.medium
def test_a_refinement_on_conversations(tmp_path: Path) -> None:
    """From rows in memory: it runs, counts answers alone, and says what it left out."""
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(LLAMA).save_pretrained(base)
    tokenizer = load_model.load_tokenizer(LLAMA)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    rows = [{"messages": turns(f"question {n}", f"answer {n} is so")} for n in range(12)]
    told: list[str] = []
    small = api.convert(LORA, "lowrank", target_ratio=8)
    few = {"steps": 2, "eval_every": 1, "layerwise": False, "lr": 0.3}
    done = api.refine(
        small, LORA, base, [*rows, {"messages": turns("only")}], progress=lambda _, t: told.append(t), **few
    )
    (line,) = [text for text in told if text.startswith("data: ")]
    assert "12 conversations (messages)" in line and "1 without an assistant's turn (row 13)" in line
    (measured,) = api.compare(LORA, small, base=base, data=rows)
    assert measured.answers is not None
    assert (
        done.before.items
        < measured.answers.items
        == sum(example.answer_tokens for example in pool_of(rows, tokenizer)[0].examples)
    )
