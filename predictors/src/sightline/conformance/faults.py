"""Checks of what happens to faulty requests, to the connection they came by, and to the server afterwards."""

import base64
import http.client
import json
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

import httpx

from sightline.conformance.infer import check_response
from sightline.conformance.suite import Failed, Group, Level, Skipped, expect
from sightline.conformance.target import NO_SUCH_MODEL, Target, json_object, mapping_of, said
from sightline.conformance.tensors import MARKER

ERRORS = Group("errors", "Errors")
CONNECTION = Group("connection", "Connection reuse")
SAFETY = Group("safety", "Safety")

INTERNALS = re.compile(
    r"Traceback|site-packages|File \"|\.py\b|\b[A-Z]\w*(?:Error|Exception)\b|object at 0x|JSONDecode", re.ASCII
)


@ERRORS.check("invalid-json", Level.MUST)
def invalid_json(target: Target) -> None:
    """A body that is no JSON is an HTTP error with `{"error": string}`."""
    _is_error(target, "invalid JSON")


@ERRORS.check("empty-body", Level.MUST)
def empty_body(target: Target) -> None:
    """A body of 0 bytes is an HTTP error with `{"error": string}`."""
    _is_error(target, "empty body")


@ERRORS.check("no-inputs", Level.MUST)
def no_inputs(target: Target) -> None:
    """A request without inputs is an HTTP error with `{"error": string}`."""
    _is_error(target, "no inputs")


@ERRORS.check("not-an-object", Level.MUST)
def not_an_object(target: Target) -> None:
    """A JSON body that is no object is an HTTP error with `{"error": string}`."""
    _is_error(target, "a list for a body")


@ERRORS.check("unknown-model", Level.MUST)
def unknown_model(target: Target) -> None:
    """Inference by a model that does not exist is an HTTP error with `{"error": string}`."""
    _is_error(target, "unknown model")


@ERRORS.check("unknown-model-404", Level.PROMISE)
def unknown_model_404(target: Target) -> None:
    """Everything about a model that does not exist is a 404."""
    for path in ("", "/ready"):
        response = target.get(f"/v2/models/{NO_SUCH_MODEL}{path}")
        expect(response.status_code == 404, f"GET {response.request.url.path}: HTTP {said(response)}")
    response = _fault(target, "unknown model")
    expect(response.status_code == 404, f"infer: HTTP {said(response)}")


@ERRORS.check("wrong-shape", Level.PROMISE)
def wrong_shape(target: Target) -> None:
    """Data that do not fill their shape are a 4xx with `{"error": string}`."""
    _is_refused(target, "wrong shape")


@ERRORS.check("unknown-datatype", Level.PROMISE)
def unknown_datatype(target: Target) -> None:
    """A datatype that does not exist is a 4xx with `{"error": string}`."""
    _is_refused(target, "unknown datatype")


@ERRORS.check("unknown-output", Level.PROMISE)
def unknown_output(target: Target) -> None:
    """A wish for an output that does not exist is a 4xx with `{"error": string}`."""
    _is_refused(target, "unknown output")


@ERRORS.check("binary-too-short", Level.PROMISE)
def binary_too_short(target: Target) -> None:
    """A `binary_data_size` beyond the end of the body is a 4xx with `{"error": string}`."""
    _is_refused(target, "binary data too short")


@ERRORS.check("binary-too-long", Level.PROMISE)
def binary_too_long(target: Target) -> None:
    """Bytes that no `binary_data_size` accounts for are a 4xx with `{"error": string}`."""
    _is_refused(target, "binary data too long")


@ERRORS.check("header-length", Level.PROMISE)
def header_length(target: Target) -> None:
    """An `Inference-Header-Content-Length` beyond the body, or no number, is a 4xx with `{"error": string}`."""
    _is_refused(target, "header longer than body")
    _is_refused(target, "header length no number")


@ERRORS.check("broken-image", Level.PROMISE)
def broken_image(target: Target) -> None:
    """A JPEG that is cut off, where the model looks into it, is a 4xx with `{"error": string}`."""
    if not target.request.images:
        raise Skipped("the model takes no encoded image")
    response = _fault(target, "broken image")
    if response.status_code == 200:
        raise Skipped("the model does not look into it")
    _is_refused(target, "broken image")


@ERRORS.check("client-faults-are-4xx", Level.PROMISE)
def client_faults_are_4xx(target: Target) -> None:
    """No fault of the client is answered with a 5xx."""
    wrong = {name: response.status_code for name, response in target.faults().items() if response.status_code >= 500}
    expect(not wrong, "; ".join(f"{name}: {status}" for name, status in wrong.items()))


@ERRORS.check("no-internals", Level.PROMISE)
def no_internals(target: Target) -> None:
    """No error names an exception class, a source file or a trace."""
    for name, response in target.faults().items():
        found = INTERNALS.search(response.text) if response.is_error else None
        expect(found is None, f"{name}: {said(response)}")


@ERRORS.check("no-echo", Level.PROMISE)
def no_echo(target: Target) -> None:
    """No error repeats the image that it was sent."""
    images = target.image_request.images
    needles = {MARKER.decode()}
    needles |= {base64.b64encode(element).decode()[:32] for element in images[0].elements if isinstance(element, bytes)}
    for name, response in target.faults().items():
        is_echo = response.is_error and any(needle in response.text for needle in needles)
        expect(not is_echo, f"{name}: an answer of {len(response.content)} bytes holds the image")


@ERRORS.check("unknown-route", Level.PROMISE)
def unknown_route(target: Target) -> None:
    """An unknown route below `/v2` is a 404 with `{"error": string}`, which is what V2 clients read."""
    response = target.get(f"{target.model_path}/no-such-route")
    expect(response.status_code == 404, f"HTTP {said(response)}")
    expect(isinstance(json_object(response).get("error"), str), f"no error object: {said(response)}")


@CONNECTION.check("reused", Level.PROMISE)
def reused(target: Target) -> None:
    """A connection stays open from one good request to the next."""
    infer = (f"{target.model_path}/infer", json.dumps(target.request.as_json()).encode(), {})
    expect(not _dropped_by(target, {"a good request": infer}), "closed after a good request")


@CONNECTION.check("after-errors", Level.PROMISE)
def after_errors(target: Target) -> None:
    """A connection stays usable after every faulty request."""
    dropped = _dropped_by(target, target.faulty_requests())
    expect(not dropped, f"dropped by: {', '.join(dropped)}")


@CONNECTION.check("alive", Level.MUST)
def alive(target: Target) -> None:
    """After all faulty requests the server is live, the model ready, and a good request answered."""
    request = target.request
    target.faults()
    expect(target.get("/v2/health/live").status_code == 200, "not live")
    expect(target.get(f"{target.model_path}/ready").status_code == 200, "not ready")
    check_response(mapping_of(target.infer(request.as_json())), target)


@SAFETY.check("unload", Level.PROMISE, is_intrusive=True)
def unload(target: Target) -> None:
    """Nobody can take the model away: `POST /v2/repository/models/{model}/unload` does not unload it.

    Asked without the key, as anybody who reaches the port could.
    """
    path = f"{target.address.url}/v2/repository/models/{target.model}/unload"
    httpx.post(path, json={}, timeout=target.address.timeout_seconds, trust_env=False)
    response = target.get(f"{target.model_path}/ready")
    expect(response.status_code == 200, f"afterwards the model is not ready: HTTP {said(response)}")


def _fault(target: Target, name: str) -> httpx.Response:
    response = target.faults().get(name)
    if response is None:
        raise Skipped("no request is known that the model takes")
    return response


def _is_error(target: Target, name: str) -> None:
    response = _fault(target, name)
    expect(response.status_code >= 400, f"HTTP {said(response)}")
    expect(isinstance(json_object(response).get("error"), str), f"no error object: {said(response)}")


def _is_refused(target: Target, name: str) -> None:
    response = _fault(target, name)
    expect(400 <= response.status_code < 500, f"{name}: HTTP {said(response)}")
    expect(isinstance(json_object(response).get("error"), str), f"{name}: no error object: {said(response)}")


def _dropped_by(target: Target, requests: Mapping[str, tuple[str, bytes, Mapping[str, str]]]) -> list[str]:
    """The requests after which the connection they came by takes no other."""
    dropped: list[str] = []
    prefix = urlsplit(target.address.url).path  # a server may live below one
    connection = _connect(target)
    headers = {"Content-Type": "application/json", **target.address.headers}
    for name, (path, body, more) in requests.items():
        try:
            connection.request("POST", prefix + path, body, headers | dict(more))
            connection.getresponse().read()
            is_open = connection.sock is not None  # None: the answer said that it would be closed
            connection.request("GET", f"{prefix}/v2/health/live", headers=target.address.headers)
            connection.getresponse().read()
        except (http.client.HTTPException, OSError):
            is_open = False
        if not is_open:
            dropped.append(name)
            connection.close()
            connection = _connect(target)
    connection.close()
    return dropped


def _connect(target: Target) -> http.client.HTTPConnection:
    address = urlsplit(target.address.url)
    if address.hostname is None:
        raise Failed(f"{target.address.url} names no host")
    kind = http.client.HTTPSConnection if target.address.is_tls else http.client.HTTPConnection
    return kind(address.hostname, address.port, timeout=target.address.timeout_seconds)
