"""Build the wheel and the source distribution of a clean copy of the tree, check them, and try the wheel elsewhere.

    python .ci/release.py dist

Needs the extra `release`, and an environment with what lrconvert depends on: nothing is downloaded. It checks that both
hold every file of the package, that twine takes them, and that the installed wheel shows its help, runs
the demo, reads the bundled adapter, compresses it and validates the result.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent


def tracked() -> list[Path]:
    """Return the files of the tree, relative; without git all but caches and what is built."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [path for name in listed.split("\0") if name and (ROOT / (path := Path(name))).is_file()]
    built = {"__pycache__", "build", "dist", "site"}
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [p for p in paths if not any(part in built or part.startswith(".") for part in p.parts)]


def build(tree: Path, out: Path) -> tuple[Path, Path]:
    """Copy the tree, build both distributions of the copy, the wheel from the source distribution; return them."""
    for path in tracked():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tree / path)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree)
    run(sys.executable, "-m", "twine", "check", "--strict", *out.iterdir())
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, source


def check_complete(wheel: Path, source: Path) -> None:
    """Exit unless both distributions hold every file of the package, and the wheel nothing else but its metadata."""
    package = {path.as_posix() for path in tracked() if path.parts[0] == "lrconvert"}
    with zipfile.ZipFile(wheel) as opened:
        in_wheel = {name for name in opened.namelist() if ".dist-info/" not in name}
    with tarfile.open(source) as opened:
        in_source = {PurePosixPath(*PurePosixPath(m.name).parts[1:]).as_posix() for m in opened if m.isfile()}
    for what, names in (
        ("the wheel lacks", package - in_wheel),
        ("the wheel has, and the tree has not,", in_wheel - package),
        ("the source distribution lacks", (package | {"CHANGELOG.md", "LICENSE", "README.md"}) - in_source),
    ):
        if names:
            sys.exit(f"{what} {', '.join(sorted(names)[:5])} ({len(names)} in all)")


def try_installed(wheel: Path, place: Path) -> None:
    """Install the wheel into an environment of its own, whose dependencies are those of this one, and use it."""
    venv.create(place / "env", with_pip=True)
    python = place / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    own = [path for path in sys.path if path.endswith("site-packages")]
    (Path(packages) / "dependencies.pth").write_text("".join(f"{path}\n" for path in own))
    home = place / "elsewhere"
    home.mkdir()
    program = place / "env" / "bin" / "lrconvert"
    code = "import lrconvert, lrconvert.demo; print(lrconvert.__file__); print(lrconvert.demo.ADAPTER)"
    module, adapter = run(python, "-c", code, cwd=home).split()
    if not (module.startswith(packages) and adapter.startswith(packages)):
        sys.exit(f"what was imported is {module}, and not the wheel")
    run(program, "--version", cwd=home)
    run(program, "--help", cwd=home)
    run(program, "demo", cwd=home)
    if not (home / "lrconvert-demo" / "report.html").exists():
        sys.exit("the demo left no report")
    run(program, "inspect", adapter, cwd=home)
    run(program, "compress", adapter, "--methods", "lowrank,sbora", "-q", "-o", "small.lrc", cwd=home)
    run(program, "validate", "small.lrc", cwd=home)


def run(*command: object, cwd: Path | None = None) -> str:
    """Run a command outside of the tree; its output, if it fails with it, is shown."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words, place = [str(word) for word in command], cwd or tempfile.gettempdir()
    done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    out = Path(sys.argv[1]).resolve()
    if out.exists() and any(out.iterdir()):
        sys.exit(f"{out} is not empty")
    with tempfile.TemporaryDirectory() as scratch:
        wheel, source = build(Path(scratch) / "lrconvert", out)
        check_complete(wheel, source)
        try_installed(wheel, Path(scratch))
    print(f"{wheel.name} ({wheel.stat().st_size:,} bytes), {source.name} ({source.stat().st_size:,} bytes): complete")


if __name__ == "__main__":
    main()
