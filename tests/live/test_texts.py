"""Data as trainers take it: what rows hold, which tokens count, and what is said of what was left out."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BASES

from lrconvert import api
from lrconvert.core.errors import DataError, DependencyError
from lrconvert.live import load_model, texts
from lrconvert.live.compare_outputs import _outputs
from lrconvert.live.texts import columnar, layouts, rows
from lrconvert.live.texts.chat import ChatTemplate

LLAMA = BASES / "tiny-llama"
TURN = "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
OPENING = "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + OPENING
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' }}{% generation %}"
    "{{ m['content'] + eos_token }}{%- endgeneration %}{{ '\n' }}{% else %}"
    + TURN
    + "{% endif %}{% endfor %}"
    + OPENING
)
# As Qwen3: the last turn has a thought, which is gone when another turn follows.
REWRITING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}{{ '<|assistant|>\n(hm) ' + m['content'] "
    "+ eos_token + '\n' }}{% else %}" + TURN + "{% endif %}{% endfor %}" + OPENING
)
# As DeepSeek-R1: the prompt opens a thought that no turn of a conversation has.
BREAKING = "{% for m in messages %}" + TURN + "{% endfor %}" + OPENING.replace("|>\n", "|>\n(think)\n")
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}" + PLAIN

TURNS = [
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "the words"},
    {"role": "user", "content": "and so?"},
    {"role": "assistant", "content": "it was"},
]


@pytest.fixture
def tokenizer() -> Any:
    return load_model.load_tokenizer(LLAMA)


def lines(path: Path, *given: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) if not isinstance(row, str) else row for row in given))
    return path


def read_all(*paths: Path) -> tuple[list[Any], texts.Tally]:
    tally = texts.Tally(files=paths)
    return list(texts.read(paths, tally)), tally


def tokens(read: Sequence[Any], tokenizer: Any, length: int = 512, **more: Any) -> tuple[list[texts.Example], Any]:
    tally = texts.Tally()
    _, made = texts.tokenize(read, tokenizer, "decoder", length, 0, {}, tally, **more)
    return made, tally


def answers(example: texts.Example, tokenizer: Any) -> list[str]:
    runs = example.answers or ((example.prompt, len(example.ids)),)
    return [tokenizer.decode(example.ids[start:end]) for start, end in runs]


# --- rows -----------------------------------------------------------------------------------------------------------


def test_files_of_texts(tmp_path: Path) -> None:
    """What is read today is read as before; where the first row is not to be read, the file is refused."""
    file = lines(tmp_path / "a.jsonl", {"text": "one", "label": 3}, {"prompt": "p", "completion": "c", "id": 1}, "")
    assert list(texts.read([file])) == [texts.Text("one", label="3"), texts.Text("c", prompt="p")]
    (tmp_path / "b.txt").write_text("one\n\ntwo\n")
    assert [t.completion for t in texts.read([tmp_path / "b.txt"])] == ["one\n", "two\n"]  # type: ignore[union-attr]
    wrong = {
        "no JSON": ("x.jsonl", "{", "line 1 is not JSON"),
        "no text": ("x.jsonl", '{"a": 1}', "line 1 has none of .*`text`; it has 'a'"),
        "no string": ("x.jsonl", '{"text": 1}', "line 1 holds a text that is no string"),
        "a list": ("x.jsonl", "[1]", "line 1 is no JSON object"),
        "kind": ("x.docx", "a,b", "is of no known kind"),
        "empty": ("x.txt", "\n\n", "holds no text"),
        "no rows": ("x.csv", "text\n", "holds no text"),
        "columns": ("x.csv", "a,b\n1,2\n", "line 2 has none of .* it has 'a', 'b'"),
        "twice": ("x.csv", "text,text\n1,2\n", "names a column twice"),
        "no end": ("x.json", '[{"text": "a"}', "ends within its list, after row 1"),
        "no comma": ("x.json", '[{"text": "a"} {"text": "b"}]', "after row 1 there is no ','"),
        "more": ("x.json", '[{"text": "a"}] 1', "goes on after the end of its list"),
        "broken": ("x.json", '[{"text": "a"}, {]', "row 2 is not JSON"),
        "preference": ("x.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}', "is a preference"),
    }
    for name, text, why in wrong.values():
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=why):
            list(texts.read([tmp_path / name]))
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8"):
        list(texts.read([tmp_path / "x.txt"]))
    with pytest.raises(DataError, match="cannot be read"):
        list(texts.read([tmp_path / "absent.txt"]))


ROWS = [{"prompt": 'say "é", \n', "completion": "a\tb, c"}, {"prompt": "", "completion": "x" * 200_000}]


def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path) -> None:
    """JSON lines, a JSON list, CSV, Parquet and Arrow; a cell may be longer than the csv module's own limit."""
    lines(tmp_path / "a.jsonl", *ROWS)
    (tmp_path / "b.json").write_text("\ufeff \n" + json.dumps(ROWS, indent=1), encoding="utf-8")
    lines(tmp_path / "c.json", *ROWS)
    limit = csv.field_size_limit()
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8-sig") as handle:
        table = csv.DictWriter(handle, list(ROWS[0]))
        table.writeheader()
        table.writerows(ROWS)
    wanted = [texts.Text(row["completion"], prompt=row["prompt"]) for row in ROWS]
    for name in ("a.jsonl", "b.json", "c.json", "d.csv"):
        assert list(texts.read([tmp_path / name])) == wanted, name
    assert csv.field_size_limit() == limit
    (tmp_path / "e.tsv").write_text('text\tlabel\n"so it goes\t1\n')
    assert list(texts.read([tmp_path / "e.tsv"])) == [texts.Text('"so it goes', label="1")]


def test_columns_of_parquet_and_arrow(tmp_path: Path) -> None:
    """Lists of turns are lists there, and columns that mean nothing here are not read."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    given = [{"messages": TURNS, "image": b"x", "text": None}] * 600
    table = pyarrow.Table.from_pylist(given)
    parquet.write_table(table, tmp_path / "a.parquet")
    with ipc.new_stream(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table)
    with ipc.new_file(tmp_path / "c.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        read, tally = read_all(tmp_path / name)
        assert len(read) == 600 and list(read[-1].turns) == TURNS and not tally.passed_over, name
        assert str(read[-1].place) == f"{name} row 600"
        assert set(next(iter(columnar.rows(tmp_path / name)))) == {"messages", "text"}
    parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match="has none of the columns that are read, but 'a'"):
        read_all(tmp_path / "d.parquet")
    (tmp_path / "e.parquet").write_text("no such thing")
    with pytest.raises(DataError, match="cannot be read"):
        read_all(tmp_path / "e.parquet")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DependencyError, match="needs pyarrow"):
        read_all(tmp_path / "a.parquet")


def test_a_list_is_read_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a chunk ends; and of a long file no more is read than was asked for."""
    given = [{"text": "a" * n, "x": [1, {"y": "]"}]} for n in range(40)]
    (tmp_path / "a.json").write_text(json.dumps(given, indent=1))
    for chunk in (1, 7, 100):
        monkeypatch.setattr(rows, "_CHUNK", chunk)
        assert [t.completion for t in read_all(tmp_path / "a.json")[0]] == [row["text"] for row in given]
    with (tmp_path / "a.json").open() as handle:
        elements = rows._elements(handle, tmp_path / "a.json")
        next(elements)
        assert handle.tell() < 400


def test_bad_rows_are_left_out_by_name(tmp_path: Path) -> None:
    """They are counted, the first are named with their line, and the rest is read."""
    turns = {"messages": TURNS}
    unheard = {"conversations": [{"from": "nobody", "value": "a"}]}
    image = {"messages": [{"role": "user", "content": [{"type": "image"}]}]}
    asked = {"messages": TURNS[:1]}
    file = lines(tmp_path / "a.jsonl", turns, "{", unheard, asked, {"b": 1}, image, {"messages": []}, {"text": "t"})
    read, tally = read_all(file)
    assert len(read) == 2 and dict(tally.left_out) == {"bad": 4, "no turn": 1, "empty": 1}
    line = tally.notice()
    assert line.is_warning and "line 2: is not JSON" in line and "turn 1 is from 'nobody'" in line
    assert "1 without an assistant's turn (line 4)" in line and "4 bad rows" in line and "; ...)" in line
    (tmp_path / "b.csv").write_text('prompt,completion\na,b\n"c,d\ne,f\n')
    read, tally = read_all(tmp_path / "b.csv")
    assert [t.prompt for t in read] == ["a"] and tally.left_out["bad"] == 1  # a quote that is never closed
    (tmp_path / "b.csv").write_text('prompt,completion\na,b\nx\n"c"d,e\nf,g\n')
    read, tally = read_all(tmp_path / "b.csv")
    assert [t.prompt for t in read] == ["a", "f"] and tally.left_out["bad"] == 2
    assert "line 3: has 1 cells, and the first line 2" in tally.notice()


# --- layouts --------------------------------------------------------------------------------------------------------


def one(row: dict[str, Any]) -> Any:
    return layouts.read(row)[0]


def test_the_order_of_layouts_is_the_one_promised() -> None:
    """A row with the columns of several is read as the first, and the others are named."""
    every = {
        "text": "t",
        "prompt": "p",
        "completion": "c",
        "instruction": "i",
        "output": "o",
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "messages": TURNS,
    }
    order = [
        ("messages", "conversations (messages)"),
        ("conversations", "conversations (ShareGPT)"),
        ("prompt", "prompts with completions"),
        ("instruction", "Alpaca rows (Stanford's template)"),
        ("text", "texts"),
    ]
    for name, kind in order:
        text, passed_over = layouts.read(every)
        assert text.kind == kind
        assert set(passed_over) == set(every) - {name} - ({"completion"} if name == "prompt" else set()) - (
            {"output"} if name == "instruction" else set()
        )
        del every[name]
    assert one({"text": "t", "messages": None}) == texts.Text("t")
    assert layouts.read({"text": "t", "prompt": "", "history": []})[1] == ()


def test_sharegpt_is_messages_in_other_words() -> None:
    given = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "observation", "value": "c"}]
    read = one({"conversations": given, "system": "be kind"})
    assert [(t["role"], t["content"]) for t in read.turns] == [
        ("system", "be kind"),
        ("user", "a"),
        ("assistant", "b"),
        ("tool", "c"),
    ]
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "words"}]
    turns = [{"role": "user", "content": parts, "name": None}, TURNS[1]]
    assert list(one({"messages": json.dumps(turns)}).turns) == [{"role": "user", "content": "the words"}, TURNS[1]]


def test_alpaca_is_in_stanfords_template() -> None:
    """Word for word, with and without an input."""
    plain = one({"instruction": "Sort.", "input": "", "output": "Done."})
    assert plain.completion == "Done." and plain.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSort.\n\n### Response:"
    )
    paired = one({"instruction": "Sort {these}.", "input": "b {a}", "output": "a b"})
    assert paired.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSort {these}.\n\n### Input:\nb {a}"
        "\n\n### Response:"
    )


def test_rows_in_memory() -> None:
    """Rows of a data set are text, model inputs are not, and an iterator loses nothing by being looked at."""
    given = [{"messages": TURNS}, {"text": "t"}]
    for data in (given, iter(given)):
        opened, rest = texts.open_texts(data)
        assert opened is not None and rest is None and len(list(opened.texts)) == 2
    batches = [{"input_ids": torch.zeros(1, 2)}, {"input_ids": torch.ones(1, 2)}]
    for data in (batches, iter(batches)):
        opened, rest = texts.open_texts(data)
        assert opened is None and len(list(rest)) == 2
    shuffled = torch.utils.data.DataLoader(torch.arange(50), shuffle=True)
    torch.manual_seed(0)
    wanted = [int(batch) for batch in shuffled]
    torch.manual_seed(0)
    assert [int(batch) for batch in texts.open_texts(shuffled)[1]] == wanted
    with pytest.raises(DataError, match="one split of a data set"):
        texts.open_texts({"train": given})


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_conversations_are_rendered_as_transformers_does(tokenizer: Any) -> None:
    """The tokens are those of apply_chat_template, and the mask is its own where the template marks the assistant's
    words. Without marks a turn is what a conversation has beyond its prompt: the end of the line counts, too."""
    tokenizer.chat_template = MARKED
    marked = tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    (example,), tally = tokens([one({"messages": TURNS})], tokenizer)
    assert list(example.ids) == marked["input_ids"]
    assert [int(label != texts.IGNORED) for label in example.labels] == marked["assistant_masks"]
    assert answers(example, tokenizer) == ["the words</s>", "it was</s>"]
    assert tally.answers == sum(marked["assistant_masks"]) and tally.tokens == len(example.ids)
    tokenizer.chat_template = PLAIN
    (example,), _ = tokens([one({"messages": TURNS})], tokenizer)
    assert list(example.ids) == marked["input_ids"]
    assert answers(example, tokenizer) == ["the words</s>\n", "it was</s>\n"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_conversational_prompt_does_not_count(tokenizer: Any, template: str) -> None:
    """As in TRL: the prompt is rendered with the opening of a turn, and what the conversation has beyond it counts."""
    tokenizer.chat_template = template
    (example,), _ = tokens([one({"prompt": TURNS[:3], "completion": TURNS[3:]})], tokenizer)
    prompt = tokenizer.apply_chat_template(TURNS[:3], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(example.ids) == tokenizer.apply_chat_template(TURNS, return_dict=True)["input_ids"]
    assert example.prompt == len(prompt) and list(example.ids[: example.prompt]) == prompt


def test_without_offsets_the_same_tokens_count(tokenizer: Any) -> None:
    """A tokenizer in Python alone does not say where its tokens lie."""

    class Slow:
        is_fast, chat_template = False, PLAIN

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, *given: Any, **named: Any) -> Any:
            return tokenizer(*given, **named)

    tokenizer.chat_template = PLAIN
    read = one({"messages": TURNS})
    assert ChatTemplate(Slow()).render(read) == ChatTemplate(tokenizer).render(read)


def test_a_template_that_rewrites_turns(tokenizer: Any) -> None:
    """Each turn of the assistant is then an example of its own, as the model wrote it, and the line says so."""
    tokenizer.chat_template = REWRITING
    made, tally = tokens([one({"messages": TURNS})], tokenizer)
    for count, example in zip((2, 4), made, strict=True):
        assert list(example.ids) == tokenizer.apply_chat_template(TURNS[:count], return_dict=True)["input_ids"]
    assert [answers(example, tokenizer) for example in made] == [["(hm) the words</s>\n"], ["(hm) it was</s>\n"]]
    assert tally.kinds.total() == 1 and "1 read turn by turn" in tally.notice()


def test_templates_that_do_not_do_are_refused_by_name(tokenizer: Any, tmp_path: Path) -> None:
    read, _ = read_all(lines(tmp_path / "a.jsonl", {"messages": TURNS}))
    with pytest.raises(DataError, match="has none"):
        tokens(read, tokenizer)
    tokenizer.chat_template = BREAKING
    with pytest.raises(DataError, match=r"begins the assistant's turn with '\(think\).*a.jsonl line 1"):
        tokens(read, tokenizer)
    tokenizer.chat_template = STRICT
    system = {"role": "system", "content": "be kind"}
    strict, _ = read_all(lines(tmp_path / "b.jsonl", {"messages": TURNS}, {"messages": [system, *TURNS]}))
    made, tally = tokens(strict, tokenizer)
    assert len(made) == 1 and "line 2: the chat template refuses it: no system turn here" in tally.notice()
    with pytest.raises(DataError, match=r"b.jsonl: line 2: the chat template refuses it"):
        tokens(strict[1:], tokenizer)
    with pytest.raises(DataError, match="the base is an encoder"):
        texts.tokenize(read, tokenizer, "encoder", 64, 0, {})


def test_tools_reach_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ tools[0]['name'] ~ style }}" + PLAIN
    row = {"messages": TURNS, "tools": '[{"name": "clock"}]', "chat_template_kwargs": {"style": "plain"}}
    (example,), _ = tokens([one(row)], tokenizer)
    assert tokenizer.decode(example.ids).startswith("clockplain")


def test_long_and_empty_examples(tokenizer: Any) -> None:
    """What was cut is counted; an example without an answer is left out, unless inputs alone are asked for."""
    tokenizer.chat_template = PLAIN
    read = [one({"messages": TURNS}), one({"prompt": "many words " * 20, "completion": "x"}), one({"text": "t"})]
    whole = tokens(read[:1], tokenizer)[0][0]
    made, tally = tokens(read, tokenizer, length=whole.answers[1][0] + 1, answers_only=True)
    assert len(made[0].ids) == whole.answers[1][0] + 1 and len(made) == 2
    assert made[0].answers == (whole.answers[0], (whole.answers[1][0], whole.answers[1][0] + 1))
    assert tally.cut == 1 and dict(tally.left_out) == {"too long": 1}
    assert "1 whose prompt alone fills length" in tally.notice()
    made, tally = tokens(read, tokenizer, length=whole.answers[0][0])
    assert len(made) == 3 and not made[0].has_answer and not tally.left_out
    cut, _ = tokens(read[:1], tokenizer, length=whole.answers[0][0] + 2)
    assert cut[0].prompt == whole.answers[0][0] and not cut[0].answers  # all that follows the prompt


def test_labels_that_are_no_class_are_named(tokenizer: Any) -> None:
    tally = texts.Tally()
    read = [one({"text": "a", "label": label}) for label in ("happy", 1, "unheard", "unheard")]
    _, made = texts.tokenize(read, tokenizer, "encoder", 16, 0, {"sad": 0, "happy": 1}, tally)
    assert [example.label for example in made] == [1, 1, None, None]
    assert tally.notice().is_warning and "2 labels are no class of the model ('unheard')" in tally.notice()


def test_reading_ends_with_the_tokens_that_were_asked_for(tokenizer: Any) -> None:
    """Of a file without end only that much is read, and the line says that there is more."""
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield texts.Text("the words")

    tally = texts.Tally()
    texts.tokenize(endless(), tokenizer, "decoder", 64, 50, {}, tally)
    assert taken < 50 and 50 <= tally.tokens < 80 and "the rest is beyond" in tally.notice()


# --- batches --------------------------------------------------------------------------------------------------------


def test_batches(tmp_path: Path, tokenizer: Any) -> None:
    running = [texts.Text(f"line {n}\n", running=True) for n in range(30)]
    packing = texts.Packing("decoder", length=16, batch_tokens=32)
    batches = texts.batches(running, tokenizer, packing)
    stream = torch.cat([b["input_ids"].reshape(-1) for b in batches]).tolist()
    whole: list[int] = []
    for t in running:
        whole += tokenizer(t.completion, add_special_tokens=not whole)["input_ids"]
    assert stream == whole and all("attention_mask" not in b for b in batches)
    assert all(b["input_ids"].shape == (2, 16) for b in batches[:-2])
    examples = [texts.Text("x" * n, prompt="ab") for n in (3, 9, 1, 5, 20)]
    for kind in ("decoder", "encoder", "encoder-decoder"):
        batches = texts.batches(examples, tokenizer, texts.Packing(kind, length=12, batch_tokens=24))
        assert sum(len(b["input_ids"]) for b in batches) == 5
        assert max(b["input_ids"].numel() for b in batches) <= 24
        assert ("labels" in batches[0]) == (kind == "encoder-decoder")
        assert all(b["attention_mask"].sum(1).diff().ge(0).all() for b in batches)
    few = texts.batches(running, tokenizer, texts.Packing("decoder", 16, 32, max_tokens=20))
    assert sum(b["input_ids"].numel() for b in few) < 40
    with pytest.raises(DataError, match="the data has no token"):
        texts.batches([], tokenizer, packing)


def test_compare_counts_answers_alone(tokenizer: Any) -> None:
    """The places whose next token is an answer; of plain texts, and of labels that leave out nothing, every one."""
    tokenizer.chat_template = PLAIN
    model = load_model.load_model(LLAMA)
    packing = texts.Packing("decoder", 256, 1024, answers=True)
    (batch,) = texts.batches([one({"messages": TURNS}), one({"messages": TURNS[:2]})], tokenizer, packing)
    with torch.no_grad():
        rows_of_answers = _outputs(model, batch).rows
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    counted = (batch["labels"] != texts.IGNORED).roll(-1, 1)
    counted[:, -1] = False
    assert torch.equal(rows_of_answers, logits[counted])
    assert len(rows_of_answers) == int((batch["labels"] != texts.IGNORED).sum())
    (plain,) = texts.batches([one({"text": "the words"})], tokenizer, packing)
    assert "labels" not in plain
    with torch.no_grad():
        assert len(_outputs(model, plain).rows) == plain["input_ids"].numel()
        assert len(_outputs(model, {**plain, "labels": plain["input_ids"]}).rows) == plain["input_ids"].numel()


def test_statistics_tell_what_was_read(tmp_path: Path) -> None:
    """One line through the progress callback; to a caller without one what was left out is a Python warning."""
    file = lines(tmp_path / "a.jsonl", {"text": "the words"}, "{")
    told: list[str] = []
    api.statistics(LLAMA, file, include=["0.self_attn.q_proj"], progress=lambda share, text: told.append(text))
    assert [text for text in told if text.startswith("data: ")] == [
        "data: a.jsonl: 1 text, 11 tokens; left out: 1 bad row (line 2: is not JSON)"
    ]
    with pytest.warns(UserWarning, match="left out: 1 bad row"):
        api.statistics(LLAMA, file, include=["0.self_attn.q_proj"])
