"""Where data is read from: files, folders, data sets in the local Hugging Face cache; never from a network."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lrconvert.api.batch import request
from lrconvert.api.batch.job import Work
from lrconvert.core.errors import DataError
from lrconvert.live.texts import sources

ROW = json.dumps({"text": "the words"}) + "\n"


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(ROW)
    return folder


def found(*items: object) -> list[str]:
    return [path.name for path in sources.find(map(str, items)).files]


def test_files_and_folders_in_the_order_given(tmp_path: Path) -> None:
    files(
        tmp_path, "b/part-1.jsonl", "b/more/part-0.jsonl", "b/README.md", "b/.hidden/x.jsonl", "b/license.txt", "a.csv"
    )
    assert found(tmp_path / "a.csv", tmp_path / "b") == ["a.csv", "part-0.jsonl", "part-1.jsonl"]
    assert found(tmp_path / "absent.jsonl") == ["absent.jsonl"]  # whoever reads it says so
    files(tmp_path, "c/one.txt", "c/dataset_info.json")
    assert found(tmp_path / "c") == ["one.txt"]


def test_of_several_splits_it_is_train_and_that_is_said(tmp_path: Path) -> None:
    files(tmp_path, "a/train-00000-of-00002.jsonl", "a/train-00001-of-00002.jsonl", "a/test-00000-of-00001.jsonl")
    chosen = sources.find([tmp_path / "a"])
    assert [path.name[:5] for path in chosen.files] == ["train", "train"]
    assert chosen.notes == ("of a the split train, not test",)
    files(tmp_path, "saved/train/data-00000-of-00001.arrow", "saved/validation/data-00000-of-00001.arrow")
    assert [path.parent.name for path in sources.find([tmp_path / "saved"]).files] == ["train"]
    assert not sources.find([tmp_path / "saved" / "validation"]).notes


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["README.md"], "holds no data"),
        (["a.jsonl", "a.csv"], r"several kinds \(.csv, .jsonl\)"),
        (["test.jsonl", "dev.jsonl"], "holds test, validation, and no split 'train'"),
        (["test.jsonl", "rest.jsonl"], "files of no split, test, and no split 'train'"),
    ],
)
def test_what_would_be_a_guess_is_refused(tmp_path: Path, names: list[str], why: str) -> None:
    with pytest.raises(DataError, match=why):
        sources.find([files(tmp_path / "data", *names)])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a data set as `datasets` prepares it, one in two configurations, and one as it was downloaded."""
    from huggingface_hub import constants

    root = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HOME", str(root))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root / "hub"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    made = root / "datasets"
    one = "org___some_words/default/0.0.0/abc"
    files(made, f"{one}/dataset_info.json", f"{one}/some_words-train-00000-of-00002.arrow")
    files(made, f"{one}/some_words-train-00001-of-00002.arrow", f"{one}/some_words-test.arrow")
    for config in ("easy", "hard"):
        files(made, f"two/{config}/0.0.0/abc/dataset_info.json", f"two/{config}/0.0.0/abc/two-{config}-train.arrow")
    repository = root / "hub" / "datasets--org--raw"
    files(repository, "blobs/1", "blobs/2")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    (snapshot / "data").mkdir(parents=True)
    for name, blob in (("train", "1"), ("test", "2")):
        (snapshot / "data" / f"{name}.jsonl").symlink_to(Path("../../../blobs") / blob)
    return root


def test_data_sets_of_the_cache(cache: Path) -> None:
    """As `datasets` prepared them, in the configuration and split asked for; else as they were downloaded."""
    assert found("org/SomeWords") == [f"some_words-train-0000{n}-of-00002.arrow" for n in range(2)]
    assert found("org/SomeWords:test") == found("org/SomeWords:default:test") == ["some_words-test.arrow"]
    assert found("two:easy:train") == ["two-easy-train.arrow"]
    assert found("org/raw") == ["train.jsonl"] and found("org/raw:test") == ["test.jsonl"]
    assert sources.find(["org/raw"]).notes == ("of org--raw the split train, not test",)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("two", "has several configurations: easy, hard. Name one"),
        ("two:odd:train", "has no 'odd' among its configurations"),
        ("org/SomeWords:odd", "and no split 'odd'"),
        ("org/absent", "no such data set in the Hugging Face cache. If it is a data set: hf download"),
        ("org/raw@other", "no such data set"),
        ("a:b:c:d", "is no file, and no name of a data set"),
    ],
)
def test_names_that_are_not_in_the_cache(cache: Path, name: str, why: str) -> None:
    with pytest.raises(DataError, match=why):
        sources.find([name])


def test_links_out_of_the_cache_are_refused(cache: Path, tmp_path: Path) -> None:
    files(tmp_path, "private.jsonl")
    link = next((cache / "hub").rglob("train.jsonl"))
    link.unlink()
    link.symlink_to(tmp_path / "private.jsonl")
    with pytest.raises(DataError, match="a link that leaves"):
        sources.find(["org/raw"])


def test_a_batch_knows_its_data_by_contents(cache: Path, tmp_path: Path) -> None:
    """A folder and a name stand for their files, as these do themselves."""
    folder = files(tmp_path / "data", "train.jsonl", "test.jsonl")
    kinds = [folder / "train.jsonl"], [folder], ["org/raw"]
    inputs = [request.prepared(Work("allocate", "", {"data": kind})).inputs for kind in kinds]
    assert inputs[0] and inputs[0] == inputs[1] == inputs[2]


def test_the_cache_of_datasets_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library prepares and saves is found and read; skipped where it is not installed."""
    datasets = pytest.importorskip("datasets")
    from huggingface_hub import constants

    from lrconvert.live import texts

    files(tmp_path, "SomeWords/train.jsonl", "SomeWords/test.jsonl")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    made = datasets.load_dataset(str(tmp_path / "SomeWords"), cache_dir=str(tmp_path / "datasets"))
    made.save_to_disk(str(tmp_path / "saved"))
    for item in ("SomeWords:test", os.fspath(tmp_path / "saved")):
        assert [text.completion for text in texts.read(sources.find([item]).files)] == ["the words"]
    opened, _ = texts.open_texts(made["train"])
    assert opened is not None and [text.completion for text in opened.texts] == ["the words"]
