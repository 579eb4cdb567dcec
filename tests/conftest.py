"""Shared paths and builders. Real material outside the repository is optional: tests skip, by name, without it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from lrconvert.core.dtypes import Stored
from lrconvert.lora.adapter import MATRIX, LoraAdapter, LoraTarget, Target, View
from lrconvert.testing import faults

if TYPE_CHECKING:
    from crashes import Scene

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # tests start hundreds of processes: each would compile all it loads
if "PYTEST_XDIST_WORKER" in os.environ:  # several workers with several threads each wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says something of the machine, not of the code.
settings.register_profile("lrconvert", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lrconvert")

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"
ADAPTERS = FIXTURES / "adapters"
BASES = FIXTURES / "bases"
ASSETS = ROOT.parent / "shared" / "assets"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `quick` whatever is neither `medium` nor `slow`."""
    for item in items:
        if not any(item.iter_markers("medium")) and not any(item.iter_markers("slow")):
            item.add_marker("quick")


def asset(name: str) -> Path:
    """A real adapter or base; skips the test where it is absent."""
    path = ASSETS / name
    if not path.exists():
        pytest.skip(f"real material is absent: {name}")
    return path


def since_transformers(version: str) -> pytest.MarkDecorator:
    """Skip what compares with a part of transformers that is younger than the lower bound in pyproject.toml."""
    have, need = (tuple(map(int, text.split(".")[:2])) for text in (metadata.version("transformers"), version))
    return pytest.mark.skipif(have < need, reason=f"compares with transformers {version}")


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write {name: bytes} into the folder, which may be new; return it."""
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def random_lora(
    shapes: Sequence[tuple[int, int]] = ((24, 16), (16, 40)),
    *,
    rank: int = 4,
    decay: float = 0.7,
    scale: float = 2.0,
    seed: int = 0,
    view: View = MATRIX,
) -> LoraAdapter:
    """A LoRA with a decaying spectrum; `shapes` are (out, in)."""
    rng = np.random.default_rng(seed)
    pairs = []
    for n, (out, inner) in enumerate(shapes):
        weights = decay ** np.arange(rank, dtype=np.float32)
        a = rng.standard_normal((rank, inner)).astype(np.float32) * weights[:, None]
        b = rng.standard_normal((out, rank)).astype(np.float32)
        shape = (inner, out) if view.kind == "transposed" else (out, inner)
        pairs.append(
            LoraTarget(Target(f"layers.{n}.proj.weight", shape, view), Stored("F32", a), Stored("F32", b), scale)
        )
    return LoraAdapter(tuple(pairs))


def dense(pair: LoraTarget) -> np.ndarray:
    """scale * B @ A in float64."""
    return pair.scale * (pair.B.astype(np.float64) @ pair.A.astype(np.float64))


CommandLine = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """Run the command line with these words; returns (exit status, stdout, stderr)."""
    from lrconvert import cli

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["lrconvert", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scene]:
    """Small models and their merges, by kind (`crashes.KINDS`); tests work on copies."""
    from crashes import KINDS, scene  # it builds on this module

    folder = tmp_path_factory.mktemp("scenes")
    return {kind: scene(folder, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def hostile_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that fixtures/hostile.py makes, written once by each worker (0.1 s). Tests do not change it."""
    import hostile

    folder = tmp_path_factory.mktemp("made") / "hostile"
    hostile.write(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def quick_disk() -> Iterator[None]:
    """No call waits for the disk: nothing here loses power really. tests/io/test_durable.py asks the disk itself, and
    so does every command in a process of its own."""
    with faults.installed(faults.Quick()):
        yield


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where the system has such, for files that are made and deleted many thousand times."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)
