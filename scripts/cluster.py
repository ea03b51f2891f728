"""A cluster to try things on: kind's, unless one answers, with KServe of a version in Standard mode and no ingress.

    python3 scripts/cluster.py [--kserve 0.20.0]

KUBECONFIG or the current context names a cluster that is there; KIND_NODE_IMAGE the image of one to be made. KServe's
charts come from KSERVE_CHARTS, a folder, or else as a Go module. In place of cert-manager, which the charts expect, its
webhooks get a certificate that is made here.
"""

import argparse
import base64
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from tools import KSERVE, kserve_charts

Manifest = dict[str, Any]
SERVICE = "kserve-webhook-server-service.kserve.svc"
SECRET = "kserve-webhook-server-cert"
VALUES = (
    "kserve.controller.deploymentMode=Standard",
    "kserve.controller.gateway.disableIngressCreation=true",
    "kserve.controller.gateway.disableIstioVirtualHost=true",
)
ASKED = {
    "apiVersion": "serving.kserve.io/v1beta1",
    "kind": "InferenceService",
    "metadata": {"name": "asked", "namespace": "default"},
    "spec": {"predictor": {"containers": [{"name": "kserve-container", "image": "none"}]}},
}
ANSWER_SECONDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kserve", default=KSERVE, help=f"version of KServe, without a v ({KSERVE})")
    options = parser.parse_args()
    if not _says("kubectl", "get", "nodes", "-o", "name", "--request-timeout=5s"):
        image = os.environ.get("KIND_NODE_IMAGE")
        _run("kind", "create", "cluster", "--wait", "180s", *(["--image", image] if image else []))
    charts = Path(os.environ.get("KSERVE_CHARTS") or kserve_charts(options.kserve))
    _apply(_rendered(charts / "kserve-crd"))
    _run("kubectl", "wait", "--for=condition=Established", "crd/inferenceservices.serving.kserve.io", "--timeout=120s")
    certificate, secret = certified()
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kserve"}}
    _apply([namespace, secret, *without_cert_manager(_rendered(charts / "kserve-resources"), certificate)])
    _run("kubectl", "-n", "kserve", "rollout", "status", "deployment/kserve-controller-manager", "--timeout=300s")
    _wait_for_an_answer()


def without_cert_manager(manifests: Iterable[Manifest], certificate: bytes) -> Iterator[Manifest]:
    """What is left when nobody makes certificates: the webhooks are told `certificate` (PEM) themselves."""
    for manifest in manifests:
        if manifest["apiVersion"].startswith("cert-manager.io/"):
            continue
        for webhook in manifest.get("webhooks", []):
            webhook["clientConfig"]["caBundle"] = base64.b64encode(certificate).decode()
        yield manifest


def certified() -> tuple[bytes, Manifest]:
    """A self-signed certificate of KServe's webhook service, and the Secret that its controller mounts."""
    with tempfile.TemporaryDirectory() as folder:
        key, crt = Path(folder) / "key", Path(folder) / "crt"
        words = ["-subj", f"/CN={SERVICE}", "-addext", f"subjectAltName=DNS:{SERVICE}", "-keyout", key, "-out", crt]
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "365", *map(str, words)]
        subprocess.run(command, check=True, capture_output=True)
        parts = {"tls.crt": crt.read_bytes(), "tls.key": key.read_bytes()}
    return parts["tls.crt"], {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/tls",
        "metadata": {"name": SECRET, "namespace": "kserve"},
        "data": {name: base64.b64encode(value).decode() for name, value in parts.items()},
    }


def _rendered(chart: Path) -> list[Manifest]:
    settings = [f"--set={value}" for value in VALUES] if chart.name == "kserve-resources" else []
    words = ["helm", "template", "kserve", str(chart), "-n", "kserve", "--kube-version", "1.35.0", *settings]
    text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # two megabytes
    return [item for item in yaml.load_all(text, Loader=loader) if item]


def _apply(manifests: Iterable[Manifest]) -> None:
    text = yaml.safe_dump_all(manifests)
    subprocess.run(
        ["kubectl", "apply", "--server-side", "--force-conflicts", "-f", "-"], input=text, text=True, check=True
    )


def _wait_for_an_answer() -> None:
    """Its pod is available a little before its webhooks are reached."""
    deadline = time.monotonic() + ANSWER_SECONDS
    words = ["kubectl", "create", "--dry-run=server", "-f", "-"]
    asked = yaml.safe_dump(ASKED)
    while (done := subprocess.run(words, check=False, input=asked, text=True, capture_output=True)).returncode:
        if time.monotonic() > deadline:
            sys.exit(f"KServe does not answer: {done.stderr}")
        time.sleep(1)


def _run(*words: str) -> None:
    print("+", " ".join(words), flush=True)
    subprocess.run(words, check=True)


def _says(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
