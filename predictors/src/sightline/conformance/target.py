"""The server under test: where it is, what its model takes, and what it says to faulty requests."""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, Self, TypeVar, cast
from urllib.parse import quote

import httpx

from sightline.conformance.suite import Failed, Skipped, shortened
from sightline.conformance.tensors import Json, Request, candidates, picture, request_from

HEADER_LENGTH = "Inference-Header-Content-Length"
NO_SUCH_MODEL = "no-such-model"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server is and how to talk to it.

    grpc         host:port, None when it has none
    model        None: the server's first
    openai       True: it must have OpenAI routes; None: checked when it has them; False: never
    request      a V2 JSON body that the model accepts; None: made from its metadata
    intrusive    also run the checks that may harm the server
    """

    url: str
    grpc: str | None = None
    model: str | None = None
    api_key: str | None = None
    openai: bool | None = None
    request: Json | None = None
    timeout_seconds: float = 60.0
    intrusive: bool = False

    @property
    def netloc(self) -> str:
        """host:port, as Triton's clients want it."""
        return self.url.partition("://")[2]

    @property
    def is_tls(self) -> bool:
        """True for https."""
        return self.url.startswith("https://")

    @property
    def headers(self) -> dict[str, str]:
        """The API key, under both names that servers look at."""
        return {"X-API-Key": self.api_key, "Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


class Target:
    """One model of one server; a context manager. What is found out about it is found out once."""

    def __init__(self, address: Address) -> None:
        self.address = address
        # One connection a request: a server that drops connections must not spoil the check after it.
        self._http = httpx.Client(
            base_url=address.url,
            headers=address.headers,
            timeout=address.timeout_seconds,
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=0),
        )
        self._known: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str) -> httpx.Response:
        """GET."""
        return self._http.get(path)

    def post(self, path: str, content: bytes, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """POST; the body is called JSON unless `headers` say otherwise."""
        return self._http.post(path, content=content, headers={"Content-Type": "application/json", **(headers or {})})

    def infer(self, body: Json, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """POST a JSON body to the model."""
        return self.post(f"{self.model_path}/infer", json.dumps(body).encode(), headers)

    def infer_binary(self, body: bytes, header_length: int | str) -> httpx.Response:
        """POST a body of the binary extension to the model."""
        headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(header_length)}
        return self.post(f"{self.model_path}/infer", body, headers)

    @cached_property
    def model(self) -> str:
        """The model's name: the given one, or the first that the server lists. Raises Failed."""
        if self.address.model is not None:
            return self.address.model
        for method, path in (("GET", "/v2/models"), ("POST", "/v2/repository/index")):
            with contextlib.suppress(httpx.HTTPError, ValueError, LookupError, TypeError):
                listed: Any = self._http.request(method, path).json()
                listed = listed["models"] if isinstance(listed, dict) else listed
                first: Any = listed[0]
                return str(first["name"] if isinstance(first, dict) else first)
        raise Failed("the server lists no models; name one with --model")

    @property
    def model_path(self) -> str:
        """`/v2/models/<name>`."""
        return f"/v2/models/{quote(self.model, safe='')}"

    @cached_property
    def server_metadata(self) -> Json:
        """`GET /v2`. Raises Failed."""
        return mapping_of(self.get("/v2"))

    @cached_property
    def metadata(self) -> Json:
        """The model's metadata. Raises Failed."""
        return mapping_of(self.get(self.model_path))

    @cached_property
    def request(self) -> Request:
        """A request that the model answers with 200. Raises Skipped when none is known."""
        if isinstance(self._request, str):
            raise Skipped(f"no request that the model takes: {self._request}")
        return self._request

    @cached_property
    def _request(self) -> Request | str:
        """The request, or why there is none."""
        if self.address.request is not None:
            return request_from(self.address.request)
        refusals: list[str] = []
        try:
            for request in candidates(self.metadata):
                response = self.infer(request.as_json())
                if response.status_code == 200:
                    return request
                refusals.append(said(response))
        except (Failed, LookupError, TypeError, ValueError, httpx.HTTPError) as error:
            return f"{type(error).__name__}: {error}"
        return refusals[0] if refusals else "its metadata names no inputs"

    @property
    def image_request(self) -> Request:
        """A request with an image in it. Raises Skipped when the model takes none."""
        if not self.request.images:
            raise Skipped("the model takes no encoded image")
        return self.request

    def faults(self) -> dict[str, httpx.Response]:
        """What the server says to each faulty request, sent once."""
        requests = self.faulty_requests()
        return self.once("faults", lambda: {name: self.post(*request) for name, request in requests.items()})

    def once(self, key: str, find_out: Callable[[], T]) -> T:
        """What `find_out` returned or raised the first time."""
        if key not in self._known:
            try:
                self._known[key] = find_out()
            except Exception as error:
                self._known[key] = error
        if isinstance(self._known[key], Exception):
            raise self._known[key]
        return self._known[key]

    def faulty_requests(self) -> "dict[str, tuple[str, bytes, Mapping[str, str]]]":
        """Faulty requests by name: path, body and headers."""
        infer = f"{self.model_path}/infer"
        plain: dict[str, tuple[str, bytes, Mapping[str, str]]] = {
            "invalid JSON": (infer, b'{"inputs": [', {}),
            "empty body": (infer, b"", {}),
            "no inputs": (infer, b"{}", {}),
            "a list for a body": (infer, b"[]", {}),
        }
        with contextlib.suppress(Skipped):
            plain |= self._faults_of_a_valid_request(self.request, infer)
        return plain

    def _faults_of_a_valid_request(
        self, request: Request, infer: str
    ) -> "dict[str, tuple[str, bytes, Mapping[str, str]]]":
        def spoilt(**changes: object) -> bytes:
            body = request.as_json()
            body["inputs"][0] |= changes
            return json.dumps(body).encode()

        def too_short() -> tuple[bytes, int]:
            """The binary extension with a last tensor that announces 8 bytes more than follow."""
            head = json.loads(whole[:length])
            head["inputs"][-1]["parameters"]["binary_data_size"] += 8
            rendered = json.dumps(head).encode()
            return rendered + whole[length:], len(rendered)

        def extension(body: bytes, length: int | str) -> tuple[str, bytes, Mapping[str, str]]:
            return infer, body, {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(length)}

        first = request.inputs[0]
        too_many = [first.shape[0] + 1, *first.shape[1:]] if first.shape else [2]
        whole, length = request.as_text().as_binary()
        unknown = f"/v2/models/{NO_SUCH_MODEL}/infer"
        faults: dict[str, tuple[str, bytes, Mapping[str, str]]] = {
            "unknown model": (unknown, json.dumps(request.as_json()).encode(), {}),
            "wrong shape": (infer, spoilt(shape=too_many), {}),
            "unknown datatype": (infer, spoilt(datatype="FLOAT99"), {}),
            "unknown output": (infer, json.dumps(request.as_json(outputs=[{"name": "no-such-output"}])).encode(), {}),
            "binary data too short": extension(*too_short()),
            "binary data too long": extension(whole + bytes(8), length),
            "header longer than body": extension(whole, len(whole) + 100),
            "header length no number": extension(whole, "many"),
        }
        if request.images:
            jpeg = picture("JPEG")
            broken = request.with_image(jpeg[: len(jpeg) // 2])
            faults["broken image"] = extension(*broken.as_binary())
        return faults


def mapping_of(response: httpx.Response) -> Json:
    """The JSON object of a 200 answer. Raises Failed."""
    if response.status_code != 200:
        raise Failed(f"HTTP {said(response)}")
    return json_object(response)


def json_object(response: httpx.Response) -> Json:
    """The JSON object of any answer. Raises Failed."""
    try:
        parsed: object = response.json()
    except ValueError:
        raise Failed(f"HTTP {response.status_code} with a body that is no JSON: {_start(response)}") from None
    if not isinstance(parsed, dict):
        raise Failed(f"HTTP {response.status_code} with JSON that is no object: {_start(response)}")
    return cast("Json", parsed)


def said(response: httpx.Response) -> str:
    """Status and the start of the body, for a reason."""
    return f"{response.status_code} {_start(response)}".strip()


def _start(response: httpx.Response) -> str:
    text = shortened(response.text[:160])
    return text if len(text) < 120 else text[:119] + "…"
