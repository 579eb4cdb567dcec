"""Make the environments of the peers, from pinned lists: ``python tests/peers/make.py [PEER ...]``.

A peer's environment is one folder of Python files in ``.envs/``, put before the packages that are installed already. It
needs pip and a registry; without one, or after `LIMIT` seconds, it says so and makes nothing.
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
LIMIT = 180  # seconds for one peer; they take 1 to 15
MERGERS = ("axolotl", "mergekit")  # peers that merge, or take merges apart; the others load adapters
OF_BASES = ("compressedtensors",)  # peers that read quantized bases
OF_EXPORTS = ("diffusers", "dynamo", "loralib", "onnxruntime", "xllamacpp")  # others that load our exports only
STORES = ("s3",)  # servers of stores, and their drivers
SCHEDULERS = ("dask", "ray")  # they do the work of batches
OF_KINDS = ("lycoris",)  # peers that write adapters of other kinds
# What is kept of a large distribution (patterns of member names); a peer without an entry is installed as it is.
KEEP = {
    "axolotl": ("axolotl/cli/utils/lora_merge.py",),
    "dynamo": ("dynamo/common/__init__.py", "dynamo/common/lora/*.py", "dynamo/common/utils/env.py"),
    "vllm": (
        *("vllm/lora/*.py", "vllm/config/lora.py", "vllm/model_executor/models/*.py"),
        *("vllm/plugins/*.py", "vllm/envs.py", "vllm/exceptions.py", "vllm/utils/counter.py"),
        *("vllm/entrypoints/openai/models/*.py", "vllm/entrypoints/serve/engine/*.py"),
        *("vllm/entrypoints/serve/lora/*.py", "vllm/entrypoints/serve/exception_handling/*.py"),
    ),
    "sglang": (
        *("sglang/srt/lora/*.py", "sglang/srt/layers/utils/*.py"),
        *("sglang/srt/managers/io_struct.py", "sglang/srt/entrypoints/http_server.py"),
    ),
    "llamacpp": (
        "*/vendor/llama.cpp/convert_lora_to_gguf.py",
        "*/vendor/llama.cpp/conversion/*.py",
        "*/vendor/llama.cpp/gguf-py/gguf/*",
    ),
}


def peers() -> list[str]:
    return sorted(path.stem for path in (HERE / "requirements").glob("*.txt"))


def loaders() -> list[str]:
    return [peer for peer in peers() if peer not in (*MERGERS, *OF_BASES, *OF_KINDS, *OF_EXPORTS, *STORES, *SCHEDULERS)]


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
    command = [sys.executable, "-m", "pip", *words, "--no-deps", "--quiet", "--retries", "1"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT)


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
    """Make the environment of one peer. Raises CalledProcessError or TimeoutExpired if pip cannot."""
    folder = ENVS / peer
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    keep = KEEP.get(peer)
    if keep is None:
        _pip("install", "--target", str(folder / "lib"), *requirements(peer))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            # Its own source only: what pip needs to look into it would be built from source, too, for minutes.
            source = ("--no-binary", "llama-cpp-python") if peer == "llamacpp" else ("--only-binary", ":all:")
            *beside, own = requirements(peer)
            if beside:
                _pip("install", "--target", str(folder / "lib"), *beside)
            _pip("download", "--dest", scratch, *source, own)
            (archive,) = Path(scratch).iterdir()
            for name, data in _members(archive):
                if ".." not in Path(name).parts and any(fnmatch.fnmatch(name, pattern) for pattern in keep):
                    short = name.partition("vendor/llama.cpp/")[2] or name
                    target = folder / "lib" / short
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(data)
    (folder / "requirements.txt").write_text("\n".join(requirements(peer)) + "\n")  # last: the environment is complete


def attempt(peer: str) -> str:
    """See that a peer has its environment; returns why it has none, or ""."""
    if environment(peer):
        return ""
    try:
        make(peer)
    except subprocess.TimeoutExpired:
        return f"pip took more than {LIMIT} seconds"
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.startswith("ERROR: ")]
        return (lines or ["pip failed"])[-1].removeprefix("ERROR: ")
    return ""


def main(names: list[str]) -> int:
    reasons = {peer: attempt(peer) for peer in names or peers()}
    for peer, reason in reasons.items():
        print(f"{peer} {version(peer)}: {f'not made, {reason}' if reason else 'is there'}")
    return 1 if any(reasons.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
