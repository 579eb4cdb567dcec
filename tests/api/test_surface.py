"""Python as people expect it: wrong arguments are refused in one line, names are found, results show themselves."""

from __future__ import annotations

import inspect
import pydoc
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ADAPTERS, BASES

import lrconvert
from lrconvert.core.errors import LrcError, all_errors
from lrconvert.core.notebook import html_table
from lrconvert.lora.input_statistics import InputStatistics

PLAIN, BASE = ADAPTERS / "llama-plain", BASES / "tiny-llama"
VERBS = sorted(name for name in lrconvert.__all__ if inspect.isfunction(getattr(lrconvert, name)))
NONSENSE: list[Any] = [None, 5, 0.5, b"bytes", {"a": 1}, object(), [5], "", "a\0b"]


@pytest.fixture(scope="module")
def made() -> Any:
    return lrconvert.convert(PLAIN, "lowrank", target_size=6000)


@pytest.mark.parametrize("verb", VERBS)
def test_nonsense_is_refused_in_our_words(verb: str, made: Any, tmp_path: Path) -> None:
    """Whatever stands in place of any argument of a verb, all others being right, the error is one of ours: never a
    TypeError or an AttributeError from somewhere inside."""
    right: dict[str, Any] = {
        **dict.fromkeys(("lora", "path", "source", "teacher"), PLAIN),
        **dict.fromkeys(("adapter", "compact", "files", "adapters"), made),
        **{
            "method": "lowrank",
            "base": BASE,
            "merged": BASE,
            "finetuned": BASE,
            "out": tmp_path / "out",
            "to": "peft-lora",
        },
        **{"paths": [PLAIN], "sources": [PLAIN], "consumers": ["vllm"], "data": tmp_path / "absent.txt"},
        **{"model": BASE, "names": "one", "name": "one", "statistics": tmp_path / "absent"},
        "job": lrconvert.Job(str(PLAIN), "", lrconvert.Work("convert", "lowrank")),
    }
    function = getattr(lrconvert, verb)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = [p.name for p in parameters if p.default is p.empty]
    for name in names:
        for nonsense in NONSENSE:
            if (name, nonsense) == ("out", None) and verb == "convert_many":
                continue  # a dry run has no output
            arguments = {**{other: right[other] for other in names}, name: nonsense}
            if verb == "convert_many":
                arguments["dry_run"] = True
            with pytest.raises(LrcError) as caught:
                function(**arguments)
            assert "\n" not in str(caught.value), (name, nonsense)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lrconvert.convert(PLAIN, "lowrank", "8KB"), lrconvert.ArgumentError, "target_size='8KB'"),  # type: ignore[arg-type]
        (lambda: lrconvert.convert(PLAIN, "lowrnk"), lrconvert.OptionError, "is it 'lowrank'"),
        (lambda: lrconvert.convert(PLAIN, "lowrank", rnk=4), lrconvert.OptionError, "[Ii]s it 'rank'"),
        (lambda: lrconvert.convert(PLAIN, "lowrank", rank="4"), lrconvert.OptionError, "takes a whole number"),
        (lambda: lrconvert.convert(PLAIN, "lowrank", target_ratio=True), lrconvert.OptionError, "takes a number"),
        (lambda: lrconvert.convert(PLAIN, "lowrank", include=5), lrconvert.OptionError, "takes a list of texts"),
        (lambda: lrconvert.convert(PLAIN, "lowrank", seed=None), lrconvert.OptionError, "takes a whole number"),
        (lambda: lrconvert.convert(PLAIN, "bat", variant="mini"), lrconvert.OptionError, "bat is bone with"),
        (lambda: lrconvert.load(PLAIN, allow_pickle="no"), lrconvert.OptionError, "takes True or False"),
        (lambda: lrconvert.merge(BASE, (PLAIN, 0.5), "x"), lrconvert.ArgumentError, r"Scaled\(adapter, 0.5\)"),
        (lambda: lrconvert.attach(BASE, PLAIN), lrconvert.ArgumentError, "from_pretrained"),
        (lambda: lrconvert.compress(PLAIN, forms="lowrnk"), lrconvert.OptionError, "is it 'lowrank'"),
        (lambda: lrconvert.load_lora(PLAIN.parent), lrconvert.ConfigError, "convert_many or compress_many"),
        (lambda: lrconvert.compare(PLAIN, [], base=BASE, data=["a text"]), lrconvert.DataError, r"\{'text': \.\.\.\}"),
        (lambda: lrconvert.compare(PLAIN, [], base=BASE, data=5), lrconvert.ArgumentError, "data is 5; files of texts"),
        (lambda: lrconvert.export(PLAIN, "x", to=None), lrconvert.ArgumentError, "known: comfyui, diffusers, "),  # type: ignore[arg-type]
    ],
)
def test_what_is_probably_meant_is_said(call: Callable[[], Any], error: type[LrcError], message: str) -> None:
    with pytest.raises(error, match=f"(?i:{message})"):
        call()


def test_one_text_is_a_list_of_one() -> None:
    one, several = (lrconvert.convert(PLAIN, "lowrank", rank=2, include=i) for i in ("q_proj", ["q_proj"]))
    assert one.compact.targets == several.compact.targets and len(one.compact.targets) < 14
    assert lrconvert.check(PLAIN, "vllm") == lrconvert.check(PLAIN, ["vllm"])


def test_weighed_adapters_are_paths_or_results(made: Any, tmp_path: Path) -> None:
    lrconvert.write(made, tmp_path / "x.lrc")
    halves = (0.5, np.float32(0.5), np.float64(0.5))
    items = (made, made.compact, tmp_path / "x.lrc")
    scaled = [lrconvert.Scaled(item, half) for item, half in zip(items, halves, strict=True)]
    for number, item in enumerate(scaled):
        lrconvert.merge(BASE, item, tmp_path / str(number))
    assert lrconvert.verify(tmp_path / "0", BASE, scaled[2]).ok and lrconvert.verify(tmp_path / "2", BASE, scaled[0]).ok


def test_all_errors_are_exported() -> None:
    """Whoever catches an error by its class finds the class in the package."""
    assert {error.__name__ for error in all_errors()} <= set(dir(lrconvert))
    assert all(getattr(lrconvert, error.__name__) is error for error in all_errors())


def test_help_and_dir_show_the_verbs() -> None:
    """`dir` has the verbs and their types and nothing private; `help` has every verb with its signature."""
    errors = {error.__name__ for error in all_errors()}
    assert {name for name in dir(lrconvert) if not name.startswith("__")} == set(lrconvert.__all__) | errors
    text = pydoc.plain(pydoc.render_doc(lrconvert))
    missing = [verb for verb in VERBS if f"    {verb}(" not in text]
    unlisted = [verb for verb in VERBS if not re.search(rf"\b{verb}\b", lrconvert.__doc__ or "")]
    assert missing == unlisted == [] and "target_ratio=50" in text


def test_results_print_themselves_briefly(made: Any, tmp_path: Path) -> None:
    """No result prints its tensors, or hundreds of rows."""
    lrconvert.write(made, tmp_path / "x.lrc")
    merged = lrconvert.merge(BASE, made, tmp_path / "merged")
    shown = [
        made,
        merged,
        lrconvert.verify(tmp_path / "merged", BASE, made),
        lrconvert.unmerge(tmp_path / "merged", tmp_path / "again"),
        lrconvert.validate(tmp_path / "x.lrc"),
        lrconvert.convert_many([PLAIN], tmp_path / "many", "lowrank", dry_run=True, target_size=6000, jobs=1),
        lrconvert.export(made, tmp_path / "folder", to="peft-lora"),
        lrconvert.recover(BASE),
        lrconvert.check(PLAIN, "mlx")[0],
        lrconvert.load_lora(PLAIN).targets[0],
        InputStatistics((), lambda n: None),  # type: ignore[arg-type, return-value]
    ]
    for item in shown:
        assert repr(item).startswith(f"<{type(item).__name__}: ") and len(repr(item)) < 160, repr(item)


class Page(HTMLParser):
    """The tags of a text, which must be balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert attrs == []
        self.open.append(tag)
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_notebooks_show_tables(made: Any) -> None:
    """Results and comparisons are small tables of HTML without anything external, and every text in them is escaped."""
    best = lrconvert.compress(PLAIN, forms=["lowrank", "sbora"], target_size=6000)
    compared = lrconvert.compare(PLAIN, [made, best])
    batch = lrconvert.convert_many([PLAIN], "unwritten", "lowrank", dry_run=True, target_size=6000, jobs=1)
    for item in (made, best, compared, compared[0], lrconvert.allocate(PLAIN, total_rank=9), batch):
        text = item._repr_html_()
        assert set(Page(text).seen) <= {"table", "caption", "tr", "th", "td", "div"} and len(text) < 4000
    assert isinstance(compared, list) and "<td>5,991</td>" in compared._repr_html_()
    hostile = html_table("<b>", ["<script>"], [["&", "\x1b[2J"]] * 60, ["<img src=x>"])
    assert set(Page(hostile).seen) == {"table", "caption", "tr", "th", "td", "div"}
    assert "\x1b" not in hostile and "and 10 more" in hostile and hostile.count("<tr>") == 51
