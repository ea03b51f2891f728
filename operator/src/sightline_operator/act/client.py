"""The only door to the API server: the official client's connection, with explicit paths and plain objects.

The client's typed models and its discovery cost memory and calls that an operator of a dozen known kinds does not
need; its configuration, TLS, token refresh and connection pool are what we use.
"""

from __future__ import annotations

import asyncio
import os
import random
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import aiohttp
import orjson
from kubernetes.aio import config as kube_config
from kubernetes.aio.client import ApiClient, Configuration

from sightline_operator.resources import Resource, resource_of
from sightline_operator.settings import FIELD_MANAGER

Object = dict[str, Any]
CALL = aiohttp.ClientTimeout(total=30, sock_connect=10)
WATCH_SILENCE_SECONDS = 75.0
"""The API server sends a bookmark about every minute; a longer silence is a dead connection."""
PAGE = 500
TRIES = 5


class ApiError(Exception):
    """What the API server answered, or why it did not. `status` 0: no answer."""

    def __init__(self, status: int, reason: str, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after_seconds = retry_after_seconds


class Conflict(ApiError):
    """409: the object is not what the call assumed (version, uid), or exists already."""


class Gone(ApiError):
    """410: the watch's resourceVersion is too old; list again."""


class Silent(ApiError):
    """Nothing came over a watch for longer than bookmarks are apart: go on from the last version on a new one."""


class Client(Protocol):
    """What the operator asks of an API server; tests wrap it, and another client can take its place."""

    async def get(self, resource: Resource, namespace: str, name: str) -> Object | None: ...

    async def list(self, resource: Resource, namespace: str | None, version: str = "") -> tuple[list[Object], str]: ...

    def watch(
        self, resource: Resource, namespace: str | None, since: str, *, version: str = "", seconds: int = 290
    ) -> AsyncIterator[tuple[str, Object]]: ...

    async def served(self, resource: Resource) -> str | None: ...

    async def apply(self, manifest: Mapping[str, Any], *, is_dry_run: bool = False) -> Object: ...

    async def apply_status(self, manifest: Mapping[str, Any]) -> Object: ...

    async def create(self, manifest: Mapping[str, Any], *, is_dry_run: bool = False) -> Object: ...

    async def replace(self, manifest: Mapping[str, Any]) -> Object: ...

    async def delete(self, resource: Resource, namespace: str, name: str, uid: str) -> bool: ...

    async def create_event(self, event: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Credentials:
    """How we reach the API server, for whoever else in this process must (Kopf)."""

    host: str
    ca_path: str | None
    ca_data: str | None
    certificate_path: str | None
    key_path: str | None
    token: str | None
    is_verified: bool


def _proxy(url: str) -> str | None:
    """The environment's proxy for this URL: HTTPS_PROXY, NO_PROXY and their kin, asked once."""
    parts = urllib.parse.urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc):
        return None
    return urllib.request.getproxies().get(parts.scheme)


class KubernetesClient:
    """`Client` on the official client's asyncio connection."""

    def __init__(self, configuration: Configuration, *, user_agent: str = FIELD_MANAGER) -> None:
        configuration.connection_pool_maxsize = 0  # each watch holds a connection for as long as it lives
        # By default every call looks up proxies and ~/.netrc anew, in two threads: a tenth of all our time.
        configuration.client_session_kwargs = {"trust_env": False, "read_bufsize": 2**21}
        configuration.proxy = configuration.proxy or _proxy(configuration.host)
        self._configuration = configuration
        self._api = ApiClient(configuration)
        self._api.user_agent = user_agent
        self._random = random.Random()  # noqa: S311  jitter, not a secret

    @classmethod
    async def connect(cls, kubeconfig: str | None = None, context: str | None = None) -> KubernetesClient:
        """From a kubeconfig (argument, $KUBECONFIG), else the pod's service account, else ~/.kube/config."""
        configuration = Configuration()
        path = kubeconfig or os.environ.get("KUBECONFIG")
        if not path and "KUBERNETES_SERVICE_HOST" in os.environ:
            kube_config.load_incluster_config(client_configuration=configuration)
        else:
            file = path or str(Path.home() / ".kube" / "config")
            await kube_config.load_kube_config(file, context=context, client_configuration=configuration)
        return cls(configuration)

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    async def credentials(self) -> Credentials:
        """The address and the identity in use now; the token is refreshed first where it rotates."""
        headers: dict[str, str] = {}
        await self._api.update_params_for_auth(headers, None, ["BearerToken"], "", "GET", None)
        words = headers.get("authorization", "").split(maxsplit=1)
        own = self._configuration
        return Credentials(
            host=own.host,
            ca_path=own.ssl_ca_cert,
            ca_data=cast("str | None", own.ca_cert_data),
            certificate_path=own.cert_file,
            key_path=own.key_file,
            token=words[1] if len(words) == 2 else None,
            is_verified=bool(own.verify_ssl),
        )

    # Reading.

    async def get(self, resource: Resource, namespace: str, name: str) -> Object | None:
        """One object, or None."""
        return await self._call("GET", resource.path(namespace, name), absent_is_none=True)

    async def list(self, resource: Resource, namespace: str | None, version: str = "") -> tuple[list[Object], str]:
        """All objects of a kind, in pages, and the resourceVersion to watch from.

        Raises ApiError 404: the kind is not served.
        """
        items: list[Object] = []
        query = self._selectors(resource) | {"limit": str(PAGE)}
        api_version = f"{resource.group}/{version or resource.versions[0]}".lstrip("/")
        while True:
            page = await self._call("GET", resource.path(namespace, version=version), query=query)
            if page is None:
                raise ApiError(404, "NotFound", resource.plural)
            # Items of a list of built-in kinds come without their kind.
            items += [{"apiVersion": api_version, "kind": resource.kind} | item for item in page.get("items") or []]
            token = page["metadata"].get("continue")
            if not token:
                return items, str(page["metadata"]["resourceVersion"])
            query["continue"] = str(token)

    async def watch(
        self, resource: Resource, namespace: str | None, since: str, *, version: str = "", seconds: int = 290
    ) -> AsyncIterator[tuple[str, Object]]:
        """Events after `since`, bookmarks included, until the server ends the stream; first, one when it is open.

        Raises Gone: list again. Silent: watch again. ApiError: anything else that ended it.
        """
        query = self._selectors(resource)
        query |= {"watch": "1", "allowWatchBookmarks": "true", "resourceVersion": since, "timeoutSeconds": str(seconds)}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=WATCH_SILENCE_SECONDS)
        try:
            response = await self._request("GET", resource.path(namespace, version=version), query, None, "", timeout)
            try:
                await self._raise_for(response)
                yield "BOOKMARK", {"metadata": {"resourceVersion": since}}
                async for line in response.content:
                    if line.strip():
                        yield self._event(orjson.loads(line))
            finally:
                response.close()
        except TimeoutError as error:
            raise Silent(0, "Silent", f"{resource.plural}: {WATCH_SILENCE_SECONDS:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ApiError(0, "WatchBroken", f"{type(error).__name__}: {error}") from error

    async def served(self, resource: Resource) -> str | None:
        """The best of our versions in which the cluster serves this kind now, or None."""
        for version in resource.versions:
            root = f"/apis/{resource.group}/{version}" if resource.group else f"/api/{version}"
            answer = await self._call("GET", root, absent_is_none=True)
            if answer and any(row["name"] == resource.plural for row in answer.get("resources", [])):
                return version
        return None

    # Writing.

    async def apply(self, manifest: Mapping[str, Any], *, is_dry_run: bool = False) -> Object:
        """Server-side apply as our field manager, by force on the fields that the manifest holds."""
        query = {"fieldManager": FIELD_MANAGER, "force": "true"} | ({"dryRun": "All"} if is_dry_run else {})
        return await self._written("PATCH", manifest, query, "application/apply-patch+yaml")

    async def apply_status(self, manifest: Mapping[str, Any]) -> Object:
        """Server-side apply of the status; a uid in the metadata must be the live one."""
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return await self._written("PATCH", manifest, query, "application/apply-patch+yaml", subresource="status")

    async def create(self, manifest: Mapping[str, Any], *, is_dry_run: bool = False) -> Object:
        """Create, or raise Conflict when the name is taken."""
        query = {"fieldManager": FIELD_MANAGER} | ({"dryRun": "All"} if is_dry_run else {})
        return await self._written("POST", manifest, query)

    async def replace(self, manifest: Mapping[str, Any]) -> Object:
        """Update exactly this resourceVersion, or raise Conflict."""
        return await self._written("PUT", manifest, {"fieldManager": FIELD_MANAGER})

    async def delete(self, resource: Resource, namespace: str, name: str, uid: str) -> bool:
        """Delete the object with this uid. False: it is not there, or another one has its name."""
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": {"uid": uid}}
        body |= {"propagationPolicy": "Background"}
        try:
            path = resource.path(namespace, name)
            return await self._call("DELETE", path, body=body, absent_is_none=True) is not None
        except Conflict:
            return False

    async def create_event(self, event: Mapping[str, Any]) -> None:
        """Create an events.k8s.io/v1 Event."""
        path = f"/apis/events.k8s.io/v1/namespaces/{event['metadata']['namespace']}/events"
        await self._call("POST", path, body=event)

    # Below: one call.

    async def _written(
        self,
        method: str,
        manifest: Mapping[str, Any],
        query: dict[str, str],
        content_type: str = "application/json",
        subresource: str = "",
    ) -> Object:
        metadata = manifest["metadata"]
        name = "" if method == "POST" else str(metadata["name"])
        path = resource_of(manifest).path(metadata.get("namespace"), name, subresource)
        answer = await self._call(method, path, query=query, body=manifest, content_type=content_type)
        if answer is None:
            raise ApiError(404, "NotFound", path)
        return answer

    @staticmethod
    def _selectors(resource: Resource) -> dict[str, str]:
        pairs = {"labelSelector": resource.selector, "fieldSelector": resource.fields}
        return {name: value for name, value in pairs.items() if value}

    @staticmethod
    def _event(event: Mapping[str, Any]) -> tuple[str, Object]:
        if event["type"] == "ERROR":
            status = event["object"]
            kind = Gone if status.get("code") == 410 else ApiError
            raise kind(int(status.get("code", 0)), str(status.get("reason")), str(status.get("message")))
        return str(event["type"]), cast("Object", event["object"])

    async def _call(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        absent_is_none: bool = False,
    ) -> Object | None:
        """One call; 429 is obeyed and tried again a few times, as it says that nothing was done."""
        for attempt in range(1, TRIES + 1):
            try:
                response = await self._request(method, path, query or {}, body, content_type, CALL)
                async with response:
                    await self._raise_for(response)
                    return cast("Object", orjson.loads(await response.read()))
            except ApiError as error:
                if error.status == 404 and absent_is_none:
                    return None
                if error.status != 429 or attempt == TRIES:
                    raise
                pause = min(error.retry_after_seconds or 1.0, 30.0)
                await asyncio.sleep(pause * self._random.uniform(0.5, 1.5))
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                raise ApiError(0, "Unreachable", f"{method} {path}: {type(error).__name__}: {error}") from error
        raise AssertionError("unreachable")

    async def _request(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        body: Mapping[str, Any] | None,
        content_type: str,
        timeout: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        _, url, headers, _, _ = await self._api.param_serialize(
            method, path, query_params=list(query.items()), header_params={}, auth_settings=["BearerToken"]
        )
        headers = dict(headers) | {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = content_type
        answer = await self._api.rest_client.request(method, url, headers=headers, body=body, _request_timeout=timeout)
        return cast("aiohttp.ClientResponse", answer.response)

    @staticmethod
    async def _raise_for(response: aiohttp.ClientResponse) -> None:
        if response.status < 400:
            return
        text = await response.text()
        try:
            status = orjson.loads(text)
            reason, message = str(status.get("reason", "")), str(status.get("message", text))
        except (ValueError, AttributeError):
            reason, message = response.reason or "", text[:500]
        raw = response.headers.get("Retry-After", "")
        kind = {409: Conflict, 410: Gone}.get(response.status, ApiError)
        raise kind(response.status, reason, message, float(raw) if raw.replace(".", "", 1).isdigit() else None)
