"""Resolve requirements/*.in into locks with hashes and without index lines (which would name a registry).

dev.in holds everything and is resolved first; the others take its versions, so that all of them are one stack.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"


def main() -> None:
    _compile("dev", constraints=())
    for path in sorted(FOLDER.glob("*.in")):
        if path.stem != "dev":
            _compile(path.stem, constraints=("dev",))


def _compile(name: str, constraints: tuple[str, ...]) -> None:
    lock = FOLDER / f"{name}.txt"
    command = [
        str(ROOT / ".venv/bin/uv"), "-q", "pip", "compile", "--universal", "--python-version", "3.11",
        "--generate-hashes", "--no-emit-index-url", "--no-annotate", "--no-header",
        f"requirements/{name}.in", "-o", str(lock),
    ]  # fmt: skip
    for constraint in constraints:
        command += ["-c", f"requirements/{constraint}.txt"]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        sys.exit(f"cannot resolve {name}.in")
    text = lock.read_text()
    text = re.sub(r"(?m)^sightline\b.*\n", "", text)  # installed from its folder, without a hash
    lock.write_text(f"# Made by `make lock` from {name}.in; do not edit.\n{text}")


if __name__ == "__main__":
    main()
