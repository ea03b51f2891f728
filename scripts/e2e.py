"""The product on a cluster: images built and loaded, the chart installed, then tests/e2e; times in a report.

KUBECONFIG or the current context names the cluster; without one, kind makes it (KIND_NODE_IMAGE). KServe must be there,
or KSERVE_CHARTS is a folder with its charts kserve-crd and kserve-resources. BASE_IMAGE goes to the Dockerfile. What
E2E_REGISTRY names (such as localhost:5001) is pushed to, instead of `kind load`. E2E_S3_IMAGE is an image of versitygw,
by default built of the executable on PATH. Exit status: 0 all passed, 3 no images, 1 anything else.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import e2e_report as report

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"gateway": "sightline-gateway", "operator": "sightline-operator", "predictor-cpu": "sightline-predictor"}
TIMES: list[tuple[str, float]] = []
TESTS: list[report.Test] = []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only tests/e2e/test_quick.py")
    parser.add_argument("--namespace", default="sightline-e2e", help="of the release; made, and deleted in the end")
    parser.add_argument("--tag", default="e2e", help="of the images")
    parser.add_argument("--skip-images", action="store_true", help="they are where the nodes pull from already")
    parser.add_argument(
        "--mounted", action="store_true", help="models run on this .venv, mounted into the node: .ci/quick"
    )
    parser.add_argument("--keep", action="store_true", help="leave the release there: no test of its uninstall")
    parser.add_argument("--report", type=Path, help="file for times, versions and sizes, as Markdown")
    parser.add_argument("--picture", type=Path, help="file for what `kubectl get vpipe,vbatch` shows, as SVG")
    options = parser.parse_args()
    missing = [name for name in ("kubectl", "helm") if shutil.which(name) is None]
    if missing:
        sys.exit(f"{' and '.join(missing)} must be on PATH")
    begun = time.monotonic()
    with _step("cluster"):
        _cluster()
    with _step("images"):
        try:
            s3_image = _s3_image(options.tag) if options.skip_images else _images(options)
        except subprocess.CalledProcessError as error:
            print(f"the images could not be made: {error}", flush=True)
            return 3
    with _step("install"):
        _install(options.namespace, options.tag, is_mounted=options.mounted)
    code, shown = _all_tests(options, s3_image)
    print(shown, flush=True)
    TIMES.append(("all", time.monotonic() - begun))
    images = [f"{_prefix()}{name}:{options.tag}" for name in TARGETS.values()]
    text = report.text(TIMES, TESTS, images, shown)
    print(text, flush=True)
    if options.report is not None:
        options.report.write_text(text)
    if options.picture is not None:
        options.picture.write_text(report.picture(shown))
    return 1 if code else 0


def _all_tests(options: argparse.Namespace, s3_image: str) -> tuple[int, str]:
    """Run them, the end of the release last. Returns pytest's exit status, and what kubectl shows of our kinds."""
    rest = [] if options.quick else ["test_cluster.py", "test_samples.py"]
    with _step("tests"):
        code = _test(options, s3_image, "test_quick.py", *rest)
    shown = _says("kubectl", "get", "vpipe,vbatch", "-n", options.namespace)
    if code == 0 and not options.keep:
        with _step("uninstall"):
            if options.quick:
                _uninstall(options.namespace)
            else:
                code = _test(options, s3_image, "test_uninstall.py")
    if code:
        _keep_evidence(options.namespace)
    return code, shown


@contextlib.contextmanager
def _step(name: str) -> Iterator[None]:
    print(f"--- {name}", flush=True)
    begun = time.monotonic()
    yield
    TIMES.append((name, time.monotonic() - begun))


def _run(*words: str, **more: object) -> None:
    print("+", " ".join(words), flush=True)
    subprocess.run(words, check=True, cwd=ROOT, **more)  # pyright: ignore


def _says(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def _cluster() -> None:
    if not _says("kubectl", "get", "nodes", "-o", "name", "--request-timeout=5s"):
        image = os.environ.get("KIND_NODE_IMAGE")
        _run("kind", "create", "cluster", *(["--image", image] if image else []))
    if not _says("kubectl", "get", "crd", "inferenceservices.serving.kserve.io", "-o", "name"):
        charts = os.environ.get("KSERVE_CHARTS")
        if not charts:
            sys.exit("this cluster has no KServe: install it, or say where its charts are by KSERVE_CHARTS")
        settings = "kserve.controller.deploymentMode=Standard,kserve.controller.gateway.disableIngressCreation=true"
        _run("helm", "install", "kserve-crd", f"{charts}/kserve-crd", "-n", "kserve", "--create-namespace", "--wait")
        _run("helm", "install", "kserve", f"{charts}/kserve-resources", "-n", "kserve", "--set", settings, "--wait")


def _prefix() -> str:
    registry = os.environ.get("E2E_REGISTRY")
    return f"{registry}/" if registry else ""


def _s3_image(tag: str) -> str:
    return os.environ.get("E2E_S3_IMAGE") or f"{_prefix()}versitygw:{tag}"


def _images(options: argparse.Namespace) -> str:
    """Build ours, and one of the S3 server. Returns the latter's name."""
    base = os.environ.get("BASE_IMAGE")
    argument = ["--build-arg", f"BASE_IMAGE={base}"] if base else []
    built = []
    for target, name in TARGETS.items():
        built.append(f"{_prefix()}{name}:{options.tag}")
        if options.mounted and target == "predictor-cpu":
            _build_mounted(built[-1], f"{_prefix()}{TARGETS['gateway']}:{options.tag}")
        else:
            _run("docker", "build", "-q", "--target", target, *argument, "-t", built[-1], ".")
    if not options.quick:  # what the release is upgraded to
        built.append(f"{_prefix()}{TARGETS['operator']}:{options.tag}-next")
        words = ("--build-arg", f"VERSION={options.tag}-next", "-t", built[-1])
        _run("docker", "build", "-q", "--target", "operator", *argument, *words, ".")
    if "E2E_S3_IMAGE" not in os.environ:
        built.append(_s3_image(options.tag))
        _build_s3(built[-1], argument)
    if _prefix():
        for image in built:
            _run("docker", "push", "-q", image)
    else:
        _run("kind", "load", "docker-image", *built)  # together: what they share travels once
    return _s3_image(options.tag)


def _build_mounted(image: str, gateway: str) -> None:
    """The models' code without their packages, which are gigabytes; tests/e2e/mounted.yaml mounts those."""
    lines = [
        f"FROM {gateway}",
        "COPY sightline /opt/code/sightline",
        "ENV PYTHONPATH=/opt/code:/opt/host/packages LD_LIBRARY_PATH=/opt/host/python/lib",
        'ENTRYPOINT ["/opt/host/python/bin/python3", "-m", "sightline", "serve"]',
    ]
    _run("docker", "build", "-q", "-f", "-", "-t", image, "predictors/src", input="\n".join(lines).encode())


def _build_s3(image: str, argument: list[str]) -> None:
    executable = shutil.which("versitygw")
    if executable is None:
        sys.exit("versitygw is not on PATH: install it, or name an image of it by E2E_S3_IMAGE")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(executable, Path(folder) / "versitygw")
        lines = ["ARG BASE_IMAGE=python:3.12-slim", "FROM ${BASE_IMAGE}", "COPY versitygw /usr/local/bin/"]
        lines += [
            "RUN mkdir -p /data",
            'ENTRYPOINT ["/bin/sh", "-c", "mkdir -p /data/meta /data/objects; exec versitygw \\"$@\\"", "-"]',
        ]
        (Path(folder) / "Dockerfile").write_text("\n".join(lines) + "\n")
        _run("docker", "build", "-q", *argument, "-t", image, folder)


def _install(namespace: str, tag: str, *, is_mounted: bool) -> None:
    words = ["--set", f"imagePrefix={_prefix()},imageTag={tag}", "-f", str(ROOT / "tests/e2e/values.yaml")]
    words += ["-f", str(ROOT / "tests/e2e/mounted.yaml")] if is_mounted else []
    _run("helm", "upgrade", "--install", "sightline", "charts/sightline", "-n", namespace, "--create-namespace", *words)


def _test(options: argparse.Namespace, s3_image: str, *files: str) -> int:
    ours = {
        "E2E_NAMESPACE": options.namespace,
        "E2E_S3_IMAGE": s3_image,
        "E2E_TAG": options.tag,
        "E2E_NEXT_TAG": f"{options.tag}-next",
    }
    with tempfile.NamedTemporaryFile(suffix=".xml") as times:
        tests = [f"tests/e2e/{file}" for file in files]
        command = [sys.executable, "-m", "pytest", "-v", "--timeout=1800", f"--junitxml={times.name}", *tests]
        code = subprocess.run(command, cwd=ROOT, env=os.environ | ours, check=False).returncode
        TESTS.extend(report.tests(Path(times.name)))
    return code


def _uninstall(namespace: str) -> None:
    """Nothing of ours may hold up the end of a namespace."""
    _run("helm", "uninstall", "sightline", "-n", namespace, "--wait")
    _run("kubectl", "delete", "namespace", namespace, "--timeout=300s")


def _keep_evidence(namespace: str) -> None:
    folder = Path(os.environ.get("E2E_EVIDENCE") or tempfile.mkdtemp(prefix="sightline-e2e-"))
    folder.mkdir(parents=True, exist_ok=True)
    kinds = "vpipe,vbatch,isvc,deployments,jobs,pods,services,configmaps,events"
    (folder / "objects.yaml").write_text(_says("kubectl", "get", kinds, "-n", namespace, "-o", "yaml"))
    (folder / "events.txt").write_text(_says("kubectl", "get", "events", "-n", namespace, "--sort-by=.lastTimestamp"))
    for pod in _says("kubectl", "get", "pods", "-n", namespace, "-o", "name").splitlines():
        log = _says("kubectl", "logs", "-n", namespace, pod, "--all-containers", "--tail=500")
        (folder / f"{pod.rpartition('/')[2]}.log").write_text(log)
    print(f"logs, events and objects are in {folder}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
