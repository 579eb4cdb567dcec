"""Make the environments of the peers, from pinned lists: ``python tests/peers/make.py [PEER ...]``.

A peer's environment is one folder of Python files in ``.envs/``, put before the packages that are installed already. It
needs pip and a registry; without one it says so and changes nothing.
"""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVS = HERE / ".envs"
# What is kept of a large distribution (patterns of member names); a peer without an entry is installed as it is.
KEEP = {
    "vllm": ("vllm/lora/*.py", "vllm/config/lora.py", "vllm/model_executor/models/*.py"),
    "sglang": ("sglang/srt/lora/*.py", "sglang/srt/layers/utils/*.py"),
    "llamacpp": (
        "*/vendor/llama.cpp/convert_lora_to_gguf.py",
        "*/vendor/llama.cpp/conversion/*.py",
        "*/vendor/llama.cpp/gguf-py/gguf/*",
    ),
}


def peers() -> list[str]:
    return sorted(path.stem for path in (HERE / "requirements").glob("*.txt"))


def requirements(peer: str) -> list[str]:
    lines = (HERE / "requirements" / f"{peer}.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def version(peer: str) -> str:
    """The pinned version of the peer itself, the last of its list."""
    return requirements(peer)[-1].partition("==")[2]


def environment(peer: str) -> Path | None:
    """The folder of a peer whose pinned list is the one here, or None."""
    folder = ENVS / peer
    made = folder / "requirements.txt"
    return folder if made.exists() and made.read_text().splitlines() == requirements(peer) else None


def _pip(*words: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", *words, "--no-deps", "--quiet"], check=True, capture_output=True, text=True
    )


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                yield name, opened.read(name) if name.endswith(".py") else b""
    else:
        with tarfile.open(archive) as opened:
            for member in opened:
                handle = opened.extractfile(member) if member.isfile() else None
                if handle is not None:
                    yield member.name, handle.read()


def make(peer: str) -> None:
    """Make the environment of one peer. Raises CalledProcessError if pip cannot."""
    folder = ENVS / peer
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    keep = KEEP.get(peer)
    if keep is None:
        _pip("install", "--target", str(folder / "lib"), *requirements(peer))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            source = ("--no-binary", ":all:") if peer == "llamacpp" else ("--only-binary", ":all:")
            _pip("download", "--dest", scratch, *source, *requirements(peer))
            (archive,) = Path(scratch).iterdir()
            for name, data in _members(archive):
                if ".." not in Path(name).parts and any(fnmatch.fnmatch(name, pattern) for pattern in keep):
                    short = name.partition("vendor/llama.cpp/")[2] or name
                    target = folder / "lib" / short
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(data)
    (folder / "requirements.txt").write_text("\n".join(requirements(peer)) + "\n")  # last: the environment is complete


def main(names: list[str]) -> int:
    failed = 0
    for peer in names or peers():
        if environment(peer):
            print(f"{peer} {version(peer)}: is there")
            continue
        try:
            make(peer)
            print(f"{peer} {version(peer)}: made")
        except subprocess.CalledProcessError as error:
            failed += 1
            reason = (error.stderr or "pip failed").strip().splitlines()[-1]
            print(f"{peer} {version(peer)}: not made, {reason}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
