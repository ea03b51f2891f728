"""A release of the chart on a real cluster, as `scripts/e2e.py` installed it; without one these tests are not run."""

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

PATIENCE_SECONDS = float(os.environ.get("E2E_PATIENCE", "900"))
RELEASE = "sightline"
PIPELINE = "captions"
"""As in values.yaml of the chart."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("E2E_NAMESPACE"):
        return
    mark = pytest.mark.skip(reason="E2E_NAMESPACE is not set: `make e2e` installs a release and runs these")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(mark)


@dataclass(frozen=True)
class Cluster:
    """A namespace of a cluster, by kubectl."""

    namespace: str

    def kubectl(self, *words: str, stdin: str | None = None, check: bool = True) -> str:
        command = ["kubectl", "--namespace", self.namespace, *words]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=300)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def apply(self, *manifests: dict[str, Any]) -> None:
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=yaml.safe_dump_all(manifests))

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        text = self.kubectl("get", kind, name, "--ignore-not-found", "-o", "json")
        return json.loads(text) if text.strip() else None

    def all(self, kind: str, selector: str = "") -> list[dict[str, Any]]:
        return json.loads(self.kubectl("get", kind, "-l", selector, "-o", "json"))["items"]

    def condition(self, kind: str, name: str, type_: str) -> dict[str, Any]:
        found = self.get(kind, name) or {}
        conditions = (found.get("status") or {}).get("conditions") or []
        return next((item for item in conditions if item["type"] == type_), {})

    def until(self, is_so: Callable[[], object], told: str, seconds: float = PATIENCE_SECONDS) -> Any:
        deadline = time.monotonic() + seconds
        while not (answer := is_so()):
            assert time.monotonic() < deadline, f"not so after {seconds:.0f} s: {told}\n{self.summary()}"
            time.sleep(1)
        return answer

    def summary(self) -> str:
        kinds = "visionpipelines,visionbatches,inferenceservices,jobs,pods"
        return self.kubectl("get", kinds, "-o", "wide", check=False)

    @contextlib.contextmanager
    def forwarded(self, target: str, port: int) -> Iterator[str]:
        """The URL under which a port of a Service or pod is reached from here."""
        command = ["kubectl", "--namespace", self.namespace, "port-forward", target, f":{port}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            try:
                line = process.stdout.readline()
                match = re.search(r"127\.0\.0\.1:(\d+)", line)
                assert match, f"{' '.join(command)}: {line}{process.stdout.read() if process.poll() else ''}"
                yield f"http://127.0.0.1:{match[1]}"
            finally:
                process.terminate()


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    return Cluster(os.environ["E2E_NAMESPACE"])


@pytest.fixture(scope="session")
def api_key(cluster: Cluster) -> str:
    import base64

    secret = cluster.get("secret", f"{RELEASE}-keys")
    assert secret is not None
    return base64.b64decode(secret["data"]["keys"]).decode().split()[0]


@pytest.fixture
def gateway(cluster: Cluster, api_key: str) -> Iterator[httpx.Client]:
    """The pipeline's gateway, by a port of this machine; made anew for each test, as gateways are killed here."""
    cluster.until(
        lambda: cluster.condition("vpipe", PIPELINE, "Ready").get("status") == "True", "the pipeline is Ready"
    )
    with (
        cluster.forwarded(f"service/{PIPELINE}-gateway", 80) as url,
        httpx.Client(base_url=url, headers={"X-API-Key": api_key}, timeout=180, trust_env=False) as client,
    ):
        yield client


@pytest.fixture(scope="session")
def store(cluster: Cluster) -> Iterator[Any]:
    """An S3 server in the cluster and a client of it here; Secret `store` opens it for batches."""
    import boto3
    from botocore.config import Config

    cluster.apply(
        *yaml.safe_load_all(
            (Path(__file__).parent / "s3.yaml").read_text().replace("IMAGE", os.environ["E2E_S3_IMAGE"])
        )
    )
    cluster.kubectl("rollout", "status", "deployment/s3", f"--timeout={PATIENCE_SECONDS}s")
    with cluster.forwarded("service/s3", 9000) as url:
        client = boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id="e2e-access",
            aws_secret_access_key="e2e-secret-key",
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"mode": "standard", "total_max_attempts": 5}),
        )
        for bucket in ("images", "captions"):
            with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
                client.create_bucket(Bucket=bucket)
        yield client
