"""Make .venv from a lock file, with nothing but a Python and a way to PyPI.

    python3 scripts/environment.py demo|dev

The demo's packages are a subset of the developers', in the same versions, so one environment serves both.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
UV = VENV / "bin" / "uv"
DISTRIBUTIONS = {"demo": ("predictors",), "dev": ("predictors", "operator")}
STAMPS = {"demo": ("demo",), "dev": ("dev", "demo")}


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in STAMPS:
        sys.exit(__doc__)
    lock = sys.argv[1]
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(
            f"Sightline needs Python 3.11, 3.12 or 3.13; this is {sys.version.split()[0]} "
            "(say `make PYTHON=python3.12 …` if you have another)."
        )
    if lock == "demo" and (VENV / ".dev").exists() and _is_fresh(VENV / ".dev", "dev"):
        (VENV / ".demo").touch()  # the larger environment holds the smaller one
        return
    _make_venv()
    print(f"Installing the {lock} environment into .venv (some minutes the first time) …", flush=True)
    _uv("pip", "install", "--require-hashes", "-r", f"requirements/{lock}.txt")
    # The build backend is locked, too: no isolated build, which would fetch an unpinned one.
    for folder in DISTRIBUTIONS[lock]:
        _uv("pip", "install", "--no-deps", "--no-build-isolation", "-e", folder)
    for stamp in STAMPS[lock]:
        (VENV / f".{stamp}").touch()


def _is_fresh(stamp: Path, lock: str) -> bool:
    projects = [ROOT / folder / "pyproject.toml" for folder in DISTRIBUTIONS[lock]]
    inputs = [ROOT / f"requirements/{lock}.txt", *projects, Path(__file__)]
    return all(stamp.stat().st_mtime >= path.stat().st_mtime for path in inputs)


def _make_venv() -> None:
    if not PYTHON.exists():
        shutil.rmtree(VENV, ignore_errors=True)
        made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=False)
        if made.returncode != 0:
            sys.exit("This Python cannot make virtual environments (on Debian: apt install python3-venv).")
    if not UV.exists():
        pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "-q", "install"]
        _run([*pip, "--require-hashes", "-r", str(ROOT / "requirements/uv.txt")])


def _uv(*arguments: str) -> None:
    quiet = [] if sys.stderr.isatty() else ["-q"]  # a person wants to see the download move
    _run([str(UV), *quiet, *arguments])


def _run(command: list[str]) -> None:
    environment = os.environ | {"VIRTUAL_ENV": str(VENV)}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    if done.returncode != 0:
        sys.exit(f"failed: {' '.join(command)}")


if __name__ == "__main__":
    main()
