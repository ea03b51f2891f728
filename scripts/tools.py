"""Put the programs that tests and clusters take into .tools, in pinned versions: Go modules, by Go's checksum database.

    python3 scripts/tools.py [NAME …]      without names: all of them; needs Go

kind, helm, helm-unittest, kubeconform, actionlint and versitygw come to .tools/bin; `envtest` is etcd, kube-apiserver
and kubectl in .tools/envtest (fetched by controller-runtime's setup-envtest); `kserve` is the charts of KSERVE in
.tools/kserve.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1] / ".tools"
BIN = TOOLS / "bin"
PROGRAMS = {
    "kind": ("sigs.k8s.io/kind", "v0.33.0", ""),
    "helm": ("helm.sh/helm/v3", "v3.22.0", "/cmd/helm"),
    "helm-unittest": ("github.com/helm-unittest/helm-unittest", "v1.1.2", "/cmd/helm-unittest"),
    "kubeconform": ("github.com/yannh/kubeconform", "v0.7.0", "/cmd/kubeconform"),
    "actionlint": ("github.com/rhysd/actionlint", "v1.7.7", "/cmd/actionlint"),
    "versitygw": ("github.com/versity/versitygw", "v1.8.0", "/cmd/versitygw"),
    "setup-envtest": ("sigs.k8s.io/controller-runtime/tools/setup-envtest", "v0.25.1", ""),
}
"""Module, version and the folder of its main package."""
KSERVE = os.environ.get("KSERVE") or "0.20.0"
KUBERNETES = "1.35.x"
NOT_INSTALLABLE = {"helm-unittest"}
"""`go install` refuses a module with `replace` lines; it is built inside of a copy of its source."""


def main() -> None:
    wanted = sys.argv[1:] or [*(name for name in PROGRAMS if name != "setup-envtest"), "envtest", "kserve"]
    unknown = set(wanted) - {*PROGRAMS, "envtest", "kserve"}
    if unknown:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}. There are {', '.join(PROGRAMS)}, envtest and kserve.")
    if shutil.which("go") is None:
        sys.exit("Go is not on PATH; these programs come as Go modules.")
    BIN.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        print(f"--- {name}", flush=True)
        if name == "envtest":
            envtest()
        elif name == "kserve":
            _link(TOOLS / "kserve", kserve_charts(KSERVE))
        else:
            program(name)


def program(name: str) -> None:
    """Build it into .tools/bin, unless this version is there."""
    module, version, package = PROGRAMS[name]
    stamp = BIN / f".{name}"
    if (BIN / name).exists() and stamp.exists() and stamp.read_text() == version:
        return
    if name in NOT_INSTALLABLE:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "source"
            shutil.copytree(module_folder(module, version), source, copy_function=shutil.copyfile)
            source.chmod(0o755)
            for path in source.rglob("*"):
                path.chmod(0o755)  # Go's cache is read-only, and so would be the copy
            _go("build", "-mod=mod", "-o", str(BIN / name), f".{package}", cwd=source)
    else:
        _go("install", f"{module}{package}@{version}")
    stamp.write_text(version)


def envtest() -> None:
    program("setup-envtest")
    words = [str(BIN / "setup-envtest"), "use", KUBERNETES, "-p", "path", "--bin-dir", str(TOOLS / "k8s")]
    found = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    _link(TOOLS / "envtest", Path(found))
    _link(BIN / "kubectl", Path(found) / "kubectl")


def kserve_charts(version: str) -> Path:
    """The folder of KServe's charts, `kserve-crd` and `kserve-resources` among them, of a version such as 0.20.0."""
    return module_folder("github.com/kserve/kserve", f"v{version}") / "charts"


def module_folder(module: str, version: str) -> Path:
    """The source of a Go module in Go's cache; whatever `go` has against it is raised as it stands."""
    words = ["go", "mod", "download", "-json", f"{module}@{version}"]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{module}@{version}: {done.stderr or done.stdout}")
    return Path(json.loads(done.stdout)["Dir"])


def _go(*words: str, cwd: Path | None = None) -> None:
    subprocess.run(["go", *words], check=True, cwd=cwd, env=os.environ | {"GOBIN": str(BIN)})


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)


if __name__ == "__main__":
    main()
