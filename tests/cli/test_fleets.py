"""What became of a batch, said from its manifest alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import lrconvert
from lrconvert.api.batch import parquet
from lrconvert.api.batch.manifest import Asked, Manifest, Record, sealed
from lrconvert.cli import cli
from lrconvert.core import errors
from lrconvert.core.errors import LrcError


def record(number: int, **more: object) -> Record:
    values = {"bytes": 100 + number, "adapter_bytes": 100 + number, "captured": 1 - number / 100, "ratio": 10.0}
    values |= {"dropped": 0, "method": "lowrank", "seconds": 0.5, "settings": "0" * 32, **more}
    return Record("done", f"/data/in/adapter-{number:02}", f"adapter-{number:02}.lrc", **values)  # type: ignore[arg-type]


def failed(number: int, code: str) -> Record:
    message = f"{code}: /data/in/adapter-{number:02}: is broken"
    return Record("failed", f"/data/in/adapter-{number:02}", f"adapter-{number:02}.lrc", code=code, message=message)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """20 done, one of them after it had failed, 5 failed in two ways, one left."""
    path = tmp_path / "jobs.jsonl"
    lines = [failed(0, "E-WORKER"), *(record(n) for n in range(20)), *(failed(n, "E-HDR-LEN") for n in range(20, 24))]
    left = json.dumps({"source": "in/last", "output": "last.lrc"}).encode() + b"\n"
    path.write_bytes(left + b"".join(map(sealed, [*lines, failed(24, "E-BUDGET")])))
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, ["fleet", *map(str, words)])


def test_the_report_in_a_terminal(manifest: Path) -> None:
    """Counts, bytes, shares, time; the worst first; failures by their code, the most frequent first; status 1."""
    shown = run("report", manifest)
    lines = shown.stdout.splitlines()
    assert shown.exit_code == 1 and max(map(len, lines)) <= 100
    assert lines[0] == "adapters  26: 20 done, 5 failed, 1 left"
    assert lines[1] == "bytes     2,190 B in all, median 109 B, most 119 B; median 10.0 times smaller"
    assert lines[2] == "captured  median 90.0%, least 81.0%, most 100.0%"
    assert lines[3].startswith("work      10.0 s in all; median 0.5 s")
    table = [line.split()[0] for line in lines if line.startswith("adapter-")]
    assert table == [f"adapter-{n:02}" for n in range(19, 9, -1)] and "... and 10 more (-v shows all)" in lines
    assert lines.index("E-HDR-LEN: 4 failed") < lines.index("E-BUDGET: 1 failed")
    assert "  ... and 1 more (-v shows all)" in lines
    whole = run("report", manifest, "-v").stdout
    assert "-v" not in whole and whole.count("is broken") == 5 and whole.count("lowrank") == 20


def test_the_report_as_json_and_as_a_page(manifest: Path, tmp_path: Path) -> None:
    shown = run("report", manifest, "--json", "--html", tmp_path / "fleet.html")
    told = json.loads(shown.stdout)
    assert [told[name] for name in ("adapters", "done", "failed", "left", "total_bytes")] == [26, 20, 5, 1, 2190]
    assert told["captured"] == {"least": 0.81, "median": 0.9, "p95": 0.99, "most": 1.0}
    assert told["codes"] == {"E-HDR-LEN": 4, "E-BUDGET": 1} and len(told["failures"]) == 5
    assert told["worst"][0] == {
        "source": "/data/in/adapter-19",
        "output": "adapter-19.lrc",
        "captured": 0.81,
        "ratio": 10.0,
    }
    page = (tmp_path / "fleet.html").read_text()
    assert "26 adapters made smaller" in page and page.count("is broken") == 5 and "1 is left to do" in page
    assert "20 of 26 adapters" in page and "in/last" not in page
    assert run("report", manifest, "--html", tmp_path / "fleet.html").exception is not None  # it exists
    assert run("report", manifest, "--html", tmp_path / "fleet.html", "--overwrite").exit_code == 1


def test_a_report_of_a_manifest_at_a_url(manifest: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe_file("/fleet/manifest.jsonl", manifest.read_bytes())
    assert run("report", "memory://fleet/manifest.jsonl").stdout == run("report", manifest).stdout
    assert isinstance(run("report", "memory://fleet/none.jsonl").exception, errors.FileReadError)


def test_a_report_of_success_ends_with_0(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b"".join(sealed(record(n, verdict="do not ship" if n else "ship")) for n in range(3)))
    shown = run("report", path)
    assert shown.exit_code == 0 and "3 done, 0 failed, 0 left; do not ship 2 of them" in shown.stdout


@pytest.mark.parametrize("text", ["", "{}\n", "no JSON\n"], ids=repr)
def test_what_is_no_manifest(text: str, tmp_path: Path) -> None:
    """An empty one is a fleet of none; another file is refused by its first line."""
    (tmp_path / "x").write_text(text)
    shown = run("report", tmp_path / "x")
    if text:
        assert isinstance(shown.exception, LrcError) and "line 1" in str(shown.exception)
    else:
        assert shown.stdout.strip() == "adapters  0: 0 done, 0 failed, 0 left" and shown.exit_code == 0


def test_a_table_has_a_row_for_each_output(manifest: Path, tmp_path: Path) -> None:
    assert run("table", manifest, "-o", tmp_path / "t.jsonl").stdout.endswith("t.jsonl: 26 rows\n")
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert rows[0] == {"source": "in/last", "output": "last.lrc"} and rows[1]["captured"] == 1.0
    assert [row.get("state") for row in rows].count("done") == 20 and "seal" not in rows[1]
    assert isinstance(run("table", manifest, "-o", tmp_path / "t.csv").exception, errors.OptionError)


def test_without_pyarrow(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for words in (("table", manifest, "-o", tmp_path / "t.parquet"), ("report", tmp_path / "t.parquet")):
        assert isinstance(run(*words).exception, errors.DependencyError)
    assert not (tmp_path / "t.parquet").exists()


def test_parquet_there_and_back(manifest: Path, tmp_path: Path) -> None:
    """Every value of every row; a report of the table is that of the manifest. Skipped without pyarrow."""
    pytest.importorskip("pyarrow")
    assert run("table", manifest, "-o", tmp_path / "t.parquet").exit_code == 0
    assert parquet.read(tmp_path / "t.parquet") == list(Manifest(manifest).records())
    assert run("report", tmp_path / "t.parquet").stdout == run("report", manifest).stdout


def test_jobs_of_parquet(tmp_path: Path) -> None:
    """The manifest of a table of jobs are JSON lines beside it; rows that come later are appended, and columns that no
    manifest has are refused. Skipped without pyarrow."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    def table(*rows: dict[str, str]) -> Path:
        files.write_table(arrow.Table.from_pylist(list(rows)), tmp_path / "jobs.parquet")
        return tmp_path / "jobs.parquet"

    rows = [{"source": f"in/{n}", "output": f"out/{n}.lrc"} for n in range(3)]
    lines = parquet.as_lines(table(*rows[:2]))
    assert lines == tmp_path / "jobs.jsonl" and [*Manifest(lines).records()] == [Asked(**row) for row in rows[:2]]
    before = lines.read_bytes()
    assert parquet.as_lines(table(*rows)) == lines and lines.read_bytes().startswith(before)
    assert [*Manifest(lines, asks=True).records()] == [Asked(**row) for row in rows]
    batch = lrconvert.convert_many(None, None, "lowrank", manifest=table(*rows), dry_run=True, jobs=1)
    assert {outcome.code for outcome in batch.outcomes} <= {"E-IO-KIND", "E-LAYOUT"} and len(batch.outcomes) == 3
    with pytest.raises(errors.UnknownFieldError, match="customer"):
        parquet.as_lines(table({**rows[0], "customer": "x"}))
    with pytest.raises(errors.MissingFieldError, match="output"):
        parquet.as_lines(table({"source": "x"}))
