"""What CI runs: make the environments that can be made, run the peers' tests, and print which ran and which did not.

    python tests/peers/table.py                          all peers
    LRCONVERT_PEERS="vllm mlx" python tests/peers/table.py     these; LRCONVERT_PEERS=none for none

A peer that cannot be had is skipped, with the reason. The exit status is 1 if a test fails, and if a peer that is there
ran none.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))

from peers import make

TESTS = [
    "test_peers.py",
    "merge/test_merge_peers.py",
    "merge/test_quantized_peers.py",
    "formats/test_export_peers.py",
    "formats/test_gguf_names.py",
    "formats/test_other_kinds.py",
]
TESTS += ["api/test_batch_schedulers.py"]
TESTS += ["formats/families/test_families_peers.py", "formats/test_compat_diffusion.py", "merge/test_dora_peers.py"]
TESTS += [
    "formats/test_unet_names.py",
    "formats/test_llamacpp_runtime.py",
    "serving/test_serving_peers.py",
    "io/test_remote_peers.py",
]


def reason(peer: str, chosen: Sequence[str]) -> str:
    """Why a peer does not run, or ""."""
    return make.attempt(peer) if "all" in chosen or peer in chosen else "not in LRCONVERT_PEERS"


def run(peers: Sequence[str]) -> tuple[int, Counter[tuple[str, str]]]:
    """pytest's exit status, and how many tests of each peer ended how: (peer, "passed"), (peer, "failed"), ..."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        words = ["-q", "-n", "2", "--dist", "worksteal", "-m", "not long", "-p", "no:cacheprovider"]
        words += ["-k", " or ".join(peers), f"--junitxml={report}"]
        tests = [str(HERE.parent / name) for name in TESTS]
        status = subprocess.run([sys.executable, "-m", "pytest", *words, *tests], check=False).returncode
        cases = ElementTree.parse(report).iter("testcase")
        return status, Counter((p, outcome(case)) for case in cases for p in peers if is_of(p, case.attrib["name"]))


def is_of(peer: str, test: str) -> bool:
    """Whether a test is named after a peer: its name may be the end of another one's."""
    return re.search(f"(?<![a-z]){peer}", test) is not None


def outcome(case: ElementTree.Element) -> str:
    kinds = {part.tag for part in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


def line(peer: str, why: str, counts: Counter[tuple[str, str]]) -> str:
    passed, failed, skipped = (counts[peer, kind] for kind in ("passed", "failed", "skipped"))
    bad = "".join(f", {count} {kind}" for kind, count in (("FAILED", failed), ("skipped", skipped)) if count)
    return f"{peer:17} {make.version(peer):16} {f'skipped: {why}' if why else f'ran {passed + failed} tests{bad}'}"


def peft() -> str:
    """PEFT has no environment of its own: it is a test dependency, and the suite asks it everywhere."""
    try:
        return f"{'peft':17} {version('peft'):16} ran with the suite"
    except PackageNotFoundError:
        return f"{'peft':17} {'':16} skipped: not installed"


def main() -> int:
    chosen = os.environ.get("LRCONVERT_PEERS", "all").replace(",", " ").split()
    why = {peer: reason(peer, chosen) for peer in make.peers()}
    ready = [peer for peer, text in why.items() if not text]
    status, counts = run(ready) if ready else (0, Counter())
    print(
        "peers:", *(f"  {line(peer, text, counts)}" for peer, text in why.items()), f"  {peft()}", sep="\n", flush=True
    )
    silent = [peer for peer in ready if not any(counts[peer, kind] for kind in ("passed", "failed"))]
    if silent:
        print(f"no test ran for: {', '.join(silent)}")
    return 1 if status or silent else 0


if __name__ == "__main__":
    sys.exit(main())
