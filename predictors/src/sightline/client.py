"""A small Python client of the pipeline.

>>> Client("http://127.0.0.1:8080").caption(open("scene.png", "rb").read())  # doctest: +SKIP
{'caption': 'The image shows a large red circle on a white background.', 'enhanced': True, ...}
"""

import contextlib
import json
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Any, Self, cast

import httpx


class RequestFailed(Exception):
    """The pipeline refused, failed or could not be reached.

    status  HTTP status, None when there was no answer
    code    the pipeline's stable code, if it gave one
    """

    def __init__(self, message: str, *, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Client:
    """Talks to one pipeline. Not thread-safe; close it, or use it as a context manager."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout_seconds: float = 150) -> None:
        headers = {"X-API-Key": api_key} if api_key else {}
        self._http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout_seconds, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def caption(
        self,
        image: bytes,
        *,
        filename: str = "image",
        enhance: bool | None = None,
        level: str | None = None,
        preset: str | None = None,
        explain: bool = False,
    ) -> dict[str, Any]:
        """Caption one encoded image; returns the pipeline's JSON answer. Raises RequestFailed."""
        fields = _fields(enhance, level, preset) | ({"explain": "true"} if explain else {})
        return self._send("POST", "/caption", files={"image": (filename, image)}, data=fields)

    def watch(
        self,
        image: bytes,
        *,
        filename: str = "image",
        enhance: bool | None = None,
        level: str | None = None,
        preset: str | None = None,
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """The same as it is made: `caption`, pieces as `enhancement.delta`, and `done` with the whole answer.

        Raises RequestFailed, also when the pipeline breaks off with an `error`.
        """
        request = self._http.build_request(
            "POST",
            "/caption",
            files={"image": (filename, image)},
            data=_fields(enhance, level, preset),
            headers={"Accept": "text/event-stream"},
        )
        with _reaching(self._http):
            response = self._http.send(request, stream=True)
        with contextlib.closing(response), _reaching(self._http):
            if response.is_error:
                response.read()
                _answer(response)
            name = ""
            for line in response.iter_lines():
                kind, _, value = line.partition(": ")
                if kind == "event":
                    name = value
                elif kind == "data":
                    data = cast("dict[str, Any]", json.loads(value))
                    if name == "error":
                        raise RequestFailed(data["detail"], code=data.get("code"))
                    yield name, data

    def health(self) -> dict[str, Any]:
        """What the pipeline says of itself. Raises RequestFailed."""
        return self._send("GET", "/health")

    def _send(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401
        with _reaching(self._http):
            return _answer(self._http.request(method, path, **arguments))


def _fields(enhance: bool | None, level: str | None, preset: str | None) -> dict[str, str]:
    fields = {"reasoning_level": level, "preset": preset}
    if enhance is not None:
        fields["use_gpt_oss"] = "true" if enhance else "false"
    return {name: value for name, value in fields.items() if value is not None}


@contextlib.contextmanager
def _reaching(http: httpx.Client) -> Generator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise RequestFailed(f"{http.base_url} cannot be reached ({type(error).__name__})") from error


def _answer(response: httpx.Response) -> dict[str, Any]:
    try:
        body = cast("dict[str, Any]", response.json())
    except ValueError as error:
        raise RequestFailed(f"HTTP {response.status_code}: no JSON", status=response.status_code) from error
    if response.is_error:
        message = body.get("detail") or body.get("error") or "no reason given"
        raise RequestFailed(
            f"HTTP {response.status_code}: {message}",
            status=response.status_code,
            code=body.get("code"),
        )
    return body
