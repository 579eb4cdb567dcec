"""Ask the peers: ``python tests/peers/oracle.py [PEER ...]`` prints for each whether it ran, and how many of the
synthetic adapters it treats as `check` says."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))

from peers import cases, make
from peers.runner import norm

import lrconvert
from lrconvert.formats.compat import base as consumers
from lrconvert.formats.compat.shared.subject import Subject, look

BASE = HERE.parent.parent / "fixtures" / "bases" / "tiny-llama"
Answer = dict[str, Any]
GGUF_FIELDS = ["general.architecture", "general.type", "general.quantization_version"]
GGUF_FIELDS += ["adapter.type", "adapter.lora.alpha"]


def needed(peer: str) -> Path:
    """Return the library of a peer; skip the test, by name, without its environment."""
    import pytest

    folder = make.environment(peer)
    if folder is None:
        pytest.skip(f"the peer {peer} has no environment: python tests/peers/make.py {peer}")
    return folder / "lib"


def run(peer: str, *words: object, text: str = "") -> str:
    """Run a peer in a process of its own, which takes longer to start than to work; return what it prints."""
    done = subprocess.run(
        [sys.executable, str(HERE / f"run_{peer}.py"), *map(str, words)],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        raise RuntimeError(f"{peer} did not run: {done.stderr[-2000:]}")
    return done.stdout


def ask(peer: str, jobs: Sequence[tuple[Path, dict[str, Any]]], base: Path = BASE) -> list[Answer]:
    """Return what a peer does with each folder."""
    printed = run(peer, base, text=json.dumps([[str(folder), options] for folder, options in jobs]))
    answers: list[Answer] = json.loads(printed.strip().splitlines()[-1])
    return answers


def truth(folder: Path, adapter: cases.Adapter) -> dict[str, float]:
    """Return ||scale * B @ A|| of every module that is not zero, by the rules of the tool that wrote the folder;
    infinite where the folder contradicts itself: nothing is right there."""
    subject = look(folder)
    stored = {name.removeprefix(cases.PREFIX): value for name, value in adapter.tensors.items()}
    norms = {}
    for name in stored:
        norms |= _of_half(stored, name, subject)
    return {module: value for module, value in norms.items() if value}


_HALVES = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.style.weight", ".lora_B.style.weight"),
    (".lora_embedding_A", ".lora_embedding_B"),
    (".lora_a", ".lora_b"),
)


def _of_half(stored: dict[str, Any], name: str, subject: Subject) -> dict[str, float]:
    for ends in _HALVES:
        for end, other in (ends, ends[::-1]):
            if name.endswith(end):
                module = name.removesuffix(end)
                if module + other not in stored:
                    return {_full(module): math.inf}
                a, b = stored[module + ends[0]], stored[module + ends[1]]
                if end in (".lora_a", ".lora_b"):
                    return {_full(module): norm(subject.config["lora_parameters"].get("scale", 0.0), b.T, a.T)}
                scale, fits = subject.scale(module), subject.rank(module) == a.shape[0]
                return {_full(module): norm(scale or 0.0, b, a) if fits else math.inf}
    return {}


_BESIDE = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|base_model\.model\.|^module\.")


def _full(module: str) -> str:
    """Return the module of the base that a name means: without wrappers, with `model.` once."""
    bare = _BESIDE.sub("", module).replace("model.model.", "model.")
    return f"model.{bare}" if bare.startswith("layers.") else bare


def verdict(answer: Answer, right: dict[str, float], adapter: cases.Adapter) -> str:
    """ "refuses", "wrong" or "right": what the peer did, compared with what it should have done."""
    if answer["outcome"] == "refuses":
        return "refuses"
    got = answer["norms"]
    same = set(got) == set(right) and all(math.isclose(got[m], right[m], rel_tol=1e-3) for m in right)
    halves = tuple(end for ends in _HALVES for end in ends)
    others = [name for name in adapter.tensors if not name.endswith((*halves, ".m"))]
    return "right" if same and len(others) <= len(answer.get("saved", ())) else "wrong"


def predicted(folder: Path, consumer: str, options: dict[str, Any]) -> str:
    """Return the verdict of `check`, with the base given."""
    fields = {field.name for field in dataclasses.fields(consumers.get(consumer).Options)}
    own = {key: value for key, value in options.items() if key in fields}
    severities = {finding.severity for finding in lrconvert.check(folder, (consumer,), base=BASE, **own)}
    return next((severity for severity in ("refuses", "wrong") if severity in severities), "right")


def disagreements(peer: str) -> tuple[int, list[str]]:
    """Return (cases, one line for each in which the peer does otherwise than `check` says)."""
    listed = cases.MLX_CASES if peer == "mlx" else cases.PEFT_CASES
    asked = [c for c in listed if peer not in c.unrun | c.unseen]
    with tempfile.TemporaryDirectory() as scratch:
        adapters = [c.build() for c in asked]
        folders = [a.write(Path(scratch) / c.name) for a, c in zip(adapters, asked, strict=True)]
        answers = ask(peer, [(folder, c.options) for folder, c in zip(folders, asked, strict=True)])
        lines = []
        for c, adapter, folder, answer in zip(asked, adapters, folders, answers, strict=True):
            does = verdict(answer, truth(folder, adapter), adapter)
            says = predicted(folder, peer, c.options)
            if does != says:
                lines.append(f"{c.name}: check says {says}, {peer} does {does} {answer.get('why', '')}".strip())
    return len(asked), lines


def main(names: list[str]) -> int:
    failed = 0
    for peer in names or make.loaders():
        if make.environment(peer) is None:
            print(f"{peer} {make.version(peer)}: skipped, no environment (python tests/peers/make.py {peer})")
            continue
        count, lines = disagreements(peer)
        failed += bool(lines)
        print(f"{peer} {make.version(peer)}: ran, {count - len(lines)} of {count} adapters as check says")
        for line in lines:
            print(f"  {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
