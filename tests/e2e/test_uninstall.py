"""What `helm uninstall` leaves, and how a namespace with a batch in it ends; `scripts/e2e.py` runs this last."""

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from tests.e2e.conftest import RELEASE, Cluster
from tests.e2e.test_quick import batch, is_over, seeded

OURS = "app.kubernetes.io/part-of=sightline"


def objects(cluster: Cluster, *, namespaced: bool) -> Iterator[dict[str, Any]]:
    """Everything there is with our label."""
    words = ("api-resources", "--verbs=list", f"--namespaced={str(namespaced).lower()}", "-o", "name")
    kinds = [kind for kind in cluster.kubectl(*words).split() if not kind.startswith(("events", "componentstatuses"))]
    yield from json.loads(cluster.kubectl("get", ",".join(kinds), "-l", OURS, "-o", "json"))["items"]


def is_of_a_batch(item: dict[str, Any]) -> bool:
    return "sightline.dev/batch" in item["metadata"]["labels"]


def named(items: Iterator[dict[str, Any]]) -> set[str]:
    return {f"{item['kind']}/{item['metadata']['name']}" for item in items}


def test_uninstall_leaves_nothing_of_ours_and_the_namespace_ends(cluster: Cluster, store: Any):
    seeded(store, "leaving/", 400, seed=3)
    cluster.apply(batch("leaving", "leaving/"))
    running = "sightline.dev/batch=leaving,batch.kubernetes.io/job-completion-index"

    def is_running() -> bool:
        return any(pod["status"].get("phase") == "Running" for pod in cluster.all("pods", running))

    cluster.until(is_running, "a worker runs")
    done = subprocess.run(
        ["helm", "uninstall", RELEASE, "-n", cluster.namespace, "--wait"],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    kept = {f"Secret/{RELEASE}-keys"}  # by its policy: a new key would lock out whoever has the old one

    def left() -> set[str]:
        return named(item for item in objects(cluster, namespaced=True) if not is_of_a_batch(item)) - kept

    cluster.until(lambda: not left(), f"nothing but {kept} is left", 300)
    crds = {f"CustomResourceDefinition/{kind}.sightline.dev" for kind in ("visionpipelines", "visionbatches")}
    cluster_wide = {
        name for name in named(objects(cluster, namespaced=False)) if f"/{cluster.namespace}-" in name or name in crds
    }
    assert cluster_wide == crds  # Helm keeps them, and by that everybody's objects
    assert not is_over(cluster, "leaving")

    begun = time.monotonic()
    # Kubernetes' Job controller waits for a killed worker's successor, which a namespace that ends refuses: see
    # docs/operator/failures.md. Without its batch, nothing of ours holds the namespace.
    cluster.kubectl("delete", "vbatch", "--all", "--wait=false")
    cluster.kubectl("delete", "namespace", cluster.namespace, "--wait=false")
    gone = lambda: not cluster.kubectl("get", "namespace", cluster.namespace, "--ignore-not-found")  # noqa: E731
    cluster.until(gone, "the namespace has ended", 400)
    print(f"the namespace ended after {time.monotonic() - begun:.0f} s")
