"""The few calls of the Kubernetes API that VisionBatches take, by httpx: create, get, list, merge-patch.

As a pod makes them: address from the environment, namespace, authority and token from the folder of its service
account. The token is read again for every call, since the kubelet replaces it.
"""

import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import httpx
import orjson

from sightline.errors import InternalError, SightlineError, Unavailable

API = "sightline.dev/v1alpha1"
KIND = "VisionBatch"
ANSWER_SECONDS = 10.0
PAGE = 500
ROLE = "manifests/rbac/gateway-batches.yaml"


class VisionBatches:
    """The VisionBatches of one namespace. Raises Unavailable (503) when the API server is away or refuses us."""

    def __init__(self, url: str, namespace: str, folder: Path, client: httpx.AsyncClient) -> None:
        self._url = f"{url}/apis/{API}/namespaces/{namespace}/visionbatches"
        self._token = folder / "token"
        self._client = client

    @classmethod
    def inside(cls, folder: Path) -> "VisionBatches":
        """As a pod of the cluster. Raises OSError when this process is none: no address, or no service account."""
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise FileNotFoundError("no API server: KUBERNETES_SERVICE_HOST is not set")
        trusted = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        client = httpx.AsyncClient(verify=trusted, timeout=ANSWER_SECONDS, trust_env=False)
        name = f"[{host}]" if ":" in host else host
        return cls(f"https://{name}:{port}", (folder / "namespace").read_text().strip(), folder, client)

    async def aclose(self) -> None:
        await self._client.aclose()

    async def create(self, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
        """Make an object. It is a fault when there is one of that name: names are drawn by chance."""
        body = {"apiVersion": API, "kind": KIND, **manifest}
        return await self._asked("POST", "", body)

    async def get(self, name: str) -> Mapping[str, Any] | None:
        """An object; None when there is none."""
        return await self._asked("GET", f"/{name}", is_optional=True) or None

    async def list(self, selector: str) -> list[Mapping[str, Any]]:
        """All objects that a label selector picks."""
        found: list[Mapping[str, Any]] = []
        query = {"labelSelector": selector, "limit": str(PAGE)}
        while True:
            said = await self._asked("GET", "", query=query)
            found += said["items"]
            if not (more := said["metadata"].get("continue")):
                return found
            query["continue"] = more

    async def patch(self, name: str, change: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Merge a change into an object; None when there is none."""
        kind = "application/merge-patch+json"
        return await self._asked("PATCH", f"/{name}", change, kind=kind, is_optional=True) or None

    async def _asked(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, str] | None = None,
        kind: str = "application/json",
        is_optional: bool = False,
    ) -> Mapping[str, Any]:
        """The object that was answered; empty when there is none and there need be none."""
        try:
            response = await self._client.request(
                method,
                self._url + path,
                params=query,
                content=None if body is None else orjson.dumps(body),
                headers={"Authorization": f"Bearer {self._token.read_text().strip()}", "Content-Type": kind},
            )
        except (httpx.TransportError, OSError) as error:
            message = "The cluster does not answer."
            raise Unavailable(message, code="cluster_unavailable", retry_after=5) from error
        if response.status_code == 404 and is_optional:
            return {}
        if response.is_error:
            raise _refusal(response)
        return cast("Mapping[str, Any]", orjson.loads(response.content))


def _refusal(response: httpx.Response) -> SightlineError:
    """Why the API server did not do it; its own words go to the log."""
    cause = RuntimeError(f"{response.status_code}: {response.text[:500]}")
    if response.status_code in (401, 403):
        error: SightlineError = Unavailable(f"The gateway may not: see {ROLE}.", code="cluster_forbidden")
    elif response.status_code == 404:
        error = Unavailable("The cluster has no VisionBatches.", code="cluster_without_batches")
    elif response.status_code == 429 or response.status_code >= 500:
        error = Unavailable("The cluster has too much to do.", code="cluster_unavailable", retry_after=5)
    else:
        error = InternalError("The cluster refused the batch.")
    error.__cause__ = cause
    return error
