"""Hostile input on every documented route: a 4xx or a per-item error with a stable code, and a server none the worse.

What is sent is made from the OpenAPI documents and from one good request a route, so that no route is forgotten. Every
answer must be a documented one.
"""

import base64
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests import hostile
from tests.conftest import Server
from tests.documents import Operation, check, check_error, operations
from tests.examples import picture, requests
from tests.unit.images.pictures import encoded

PATIENCE_SECONDS = 120
GROWTH_BYTES = 800 * 2**20
"""What a process may hold more after all of it, in pools of its allocator: less than a tenth of what was unpacked."""
LEVEL_BYTES = 120 * 2**20
"""What it may hold more after heavy rounds than after the first of them."""

POSTS = [operation for operation in operations() if operation.method == "POST"]
NAMES = sorted({operation.predictor for operation in POSTS})
COMMON = ("/v1/", "/v2/")

Sent = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module")
def client(everything: Server) -> Iterator[httpx.Client]:
    limits = httpx.Limits(max_connections=1)
    with httpx.Client(base_url=everything.url, timeout=PATIENCE_SECONDS, trust_env=False, limits=limits) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def is_none_the_worse(everything: Server, client: httpx.Client) -> Iterator[None]:
    """Alive, ready, without a bug in its log, and about as large as before."""
    for name in NAMES:  # what every model needs once
        for operation in POSTS:
            if operation.predictor == name and operation.path.endswith(":predict"):
                ask(client, operation, {name: value for name, value in requests(operation)[0].items()})
    before, bugs = resident(everything), everything.log().count(" bug ")
    yield
    assert client.get("/v2/health/ready").status_code == 200
    assert everything.log().count(" bug ") == bugs
    assert resident(everything) - before < GROWTH_BYTES


def resident(server: Server) -> int:
    """Bytes of memory that the process holds."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


def ask(client: httpx.Client, operation: Operation, request: dict[str, Any]) -> httpx.Response:
    rest = {name: value for name, value in request.items() if name != "path"}
    return client.request(operation.method, request.get("path", path_of(operation)), **rest)


def path_of(operation: Operation) -> str:
    return requests(operation)[0]["path"]


def refused(client: httpx.Client, operation: Operation, told: str, request: dict[str, Any]) -> None:
    """Fail unless it is answered by a documented 4xx, or taken after all, and the server is alive."""
    response = ask(client, operation, request)
    is_refused = 400 <= response.status_code < 500
    is_off = response.status_code == 501 and "501" in operation.spec["responses"]
    assert is_refused or is_off or response.status_code in {200, 202}, f"{told}: {response.status_code} {response.text}"
    if operation.path != "/caption":  # two documents there, and the body decides which holds
        check(operation, response)
    if is_refused:
        check_error(response)


@pytest.fixture(autouse=True)
def is_alive(client: httpx.Client) -> Iterator[None]:
    yield
    assert client.get("/v2/health/live").status_code == 200


def is_own(operation: Operation) -> bool:
    """Whether the route is the predictor's own; the common protocols' bodies are fuzzed for each predictor, too."""
    return not operation.path.startswith(COMMON)


@pytest.mark.parametrize("operation", POSTS, ids=str)
def test_bodies_that_are_none(operation: Operation, client: httpx.Client):
    for told, body in hostile.BODIES.items():
        kinds = ["application/json"]
        if is_own(operation) or operation.path.endswith("/infer"):
            kinds += ["multipart/form-data; boundary=x", "application/octet-stream"]
        for kind in kinds:
            refused(client, operation, f"{told} as {kind}", {"content": body, "headers": {"content-type": kind}})


@pytest.mark.parametrize("operation", POSTS, ids=str)
def test_headers_that_do_not_fit(operation: Operation, client: httpx.Client):
    for told, headers in hostile.HEADERS.items():
        encoded = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
        refused(client, operation, told, {"content": b"{}", "headers": encoded})
    bomb = {"content": hostile.gzip_bomb(), "headers": {"content-encoding": "gzip", "content-type": "application/json"}}
    response = ask(client, operation, bomb)
    if "requestBody" in operation.spec:  # nobody reads what nobody takes
        assert 400 <= response.status_code < 500, response.text


@pytest.mark.parametrize(
    "operation", [item for item in POSTS if any("json" in good for good in requests(item))], ids=str
)
def test_fields_that_are_wrong(operation: Operation, client: httpx.Client):
    good = next(request for request in requests(operation) if "json" in request)
    body = good["json"]
    for told, wrong in hostile.replaced(body):
        if not is_work(wrong):
            refused(client, operation, told, dict(good) | {"json": wrong})


def is_work(body: dict[str, Any]) -> bool:
    """Whether a body asks for so much good work that it is no test of refusals."""
    return body.get("max_tokens", 0) is None


@pytest.mark.parametrize("operation", [item for item in POSTS if is_own(item)], ids=str)
def test_fields_of_forms_that_are_wrong(operation: Operation, client: httpx.Client):
    good = next((request for request in requests(operation) if "files" in request), None)
    if good is None:
        for files in ([("image", ("a.png", b"x"))], [("x", (None, "1"))] * 3):
            refused(client, operation, "a form where none is taken", {"files": files})
        return
    files, data = good["files"], dict(good.get("data", {}))
    (name, part), wrong = files[0], {}
    wrong["no file"] = ([("other", (None, "x"))], data)
    wrong["a misspelt file"] = ([(f"{name}x", part)], data)
    wrong["text for a file"] = ([(name, (None, "not a file"))], data)
    wrong["a file for text"] = (files, {}) if not data else ([*files, *((key, ("t.txt", b"x")) for key in data)], {})
    wrong["many files"] = ([(name, ("a.png", b"x", "image/png"))] * 1_200, data)
    wrong["many fields"] = (files, data | {f"field{index}": "x" for index in range(1_200)})
    wrong["no UTF-8"] = (files, data | {"prompt": b"\xff\xfe", "text": b"\xff"})
    wrong["a long field"] = (files, data | {"prompt": "x" * 1_000_000, "query": "x" * 1_000_000})
    wrong["no numbers"] = (files, data | {"max_tokens": "many", "temperature": "hot", "seed": "0x1", "top_p": "1e999"})
    wrong["no truths"] = (files, data | {"detailed": "perhaps", "strict": "2", "explain": "[]", "stream": "maybe"})
    for filename in ("../../etc/passwd", "a\r\nX-Injected: 1", "\0", "x" * 10_000, "\u202egnp.exe", ""):
        wrong[f"the name {filename[:20]!r}"] = ([(name, (filename, b"no image", "image/png"))], data)
    for told, (parts, fields) in wrong.items():
        refused(client, operation, told, {"files": parts, "data": fields})


@pytest.mark.parametrize("name", hostile.images())
@pytest.mark.parametrize(
    "operation", [item for item in POSTS if is_own(item) and "files" in str(requests(item))], ids=str
)
def test_pictures_in_forms(operation: Operation, name: str, client: httpx.Client):
    good = next(request for request in requests(operation) if "files" in request)
    field = good["files"][0][0]
    data = dict(good.get("data", {}))
    request = {"files": [(field, ("a.png", hostile.images()[name], "image/png"))], "data": data}
    response = ask(client, operation, request)
    if operation.path != "/caption":
        check(operation, response)
    if response.status_code == 202:  # the batch tells each item's fate later
        return
    if response.status_code == 200:
        codes = item_codes(response.json())
        assert (
            codes if name in hostile.REFUSED_IMAGES else not codes or codes < {"image_undecodable", "image_too_complex"}
        )
        return
    assert name in hostile.REFUSED_IMAGES or name in {"text bomb", "many scans"}, response.text
    assert 400 <= response.status_code < 500, response.text
    check_error(response)


def item_codes(node: Any) -> set[str]:
    """The codes of the items that failed alone."""
    if isinstance(node, list):
        return set().union(*map(item_codes, node)) if node else set()
    if isinstance(node, dict):
        own = {node["code"]} if "error" in node and "code" in node else set()
        return own.union(*(item_codes(value) for value in node.values()))
    return set()


@pytest.mark.parametrize("name", hostile.REFUSED_IMAGES)
@pytest.mark.parametrize("predictor", [name for name in NAMES if name != "enhance"])
def test_pictures_by_the_common_protocols(predictor: str, name: str, client: httpx.Client):
    text = base64.b64encode(hostile.images()[name]).decode()
    for path in ("/v1/models/{model_name}:predict", "/v2/models/{model_name}/infer", "/v1/chat/completions"):
        operation = Operation(predictor, "POST", path)
        if path not in operation.document["paths"]:
            continue
        good = requests(operation)[0]
        for value in (text, f"data:image/png;base64,{text}"):
            body = json.loads(json.dumps(good["json"]).replace(picture(), value))
            refused_image(client, operation, name, {"path": good["path"], "json": body})


def refused_image(client: httpx.Client, operation: Operation, told: str, request: dict[str, Any]) -> None:
    response = ask(client, operation, request)
    check(operation, response)
    assert 400 <= response.status_code < 500 or item_codes(response.json()), f"{told}: {response.text}"
    if response.status_code >= 400:
        check_error(response)


TENSORS: tuple[dict[str, Any], ...] = (
    {"shape": [-1]}, {"shape": [2**40]}, {"shape": [2**70]}, {"shape": []}, {"shape": [1] * 200}, {"shape": "1"},
    {"shape": [1.5]}, {"shape": [None]}, {"datatype": "FP128"}, {"datatype": "FP32"}, {"datatype": None},
    {"datatype": ["BYTES"]}, {"data": []}, {"data": [[[[["x"]]]]]}, {"data": {"a": 1}}, {"data": [1, "x", None]},
    {"data": ["x"] * 5_000, "shape": [5_000]}, {"name": ""}, {"name": None}, {"name": "x" * 10_000},
    {"parameters": []}, {"parameters": {"binary_data_size": -1}}, {"parameters": {"binary_data_size": 2**60}},
    {"parameters": {"content_type": "base64" * 1_000}},
)  # fmt: skip


@pytest.mark.parametrize("predictor", NAMES)
def test_tensors_that_lie(predictor: str, client: httpx.Client):
    operation = Operation(predictor, "POST", "/v2/models/{model_name}/infer")
    good = requests(operation)[0]["json"]
    for wrong in TENSORS:
        inputs = [good["inputs"][0] | wrong, *good["inputs"][1:]]
        refused(client, operation, str(wrong)[:80], {"json": good | {"inputs": inputs}})
    for inputs in ([], [good["inputs"][0]] * 3, [good["inputs"][0]] * 2_000, None, {}, [None], "inputs"):
        refused(client, operation, "inputs", {"json": good | {"inputs": inputs}})
    for outputs in ([{"name": "no such"}], [{}], [None], {}, "x", [{"name": "text"}] * 1_000):
        refused(client, operation, "outputs", {"json": good | {"outputs": outputs}})


@pytest.mark.parametrize("predictor", NAMES)
def test_binary_tensors_that_lie(predictor: str, client: httpx.Client):
    operation = Operation(predictor, "POST", "/v2/models/{model_name}/infer")
    name = requests(operation)[0]["json"]["inputs"][0]["name"]

    def send(size: object, tail: bytes, length: object = None, count: int = 1) -> None:
        tensor = {"name": name, "shape": [count], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
        head = json.dumps({"inputs": [tensor]}).encode()
        headers = {
            "inference-header-content-length": str(len(head) if length is None else length),
            "content-type": "application/octet-stream",
        }
        refused(client, operation, f"{size} {length}", {"content": head + tail, "headers": headers})

    for size in (0, 3, 4, 2**31, -4, None, "4", 1.5):
        send(size, b"\xff\xff\xff\xff")
    send(8, b"\x04\0\0\0\0\0\0\0", count=2**31)
    send(12, b"\xff\xff\xff\x7f" + b"x" * 8)
    for length in (0, 1, 10**9, -1, "x", "1e3", ""):
        send(4, b"\0\0\0\0", length)


@pytest.mark.parametrize("operation", [item for item in operations() if "{" in item.path], ids=str)
def test_paths_that_lead_astray(operation: Operation, client: httpx.Client):
    for value in ("..%2f..%2fetc%2fpasswd", "%00", "x" * 4_000, "%ff%fe", "a b", "%E2%80%AE", "{id}", "-1", "%2e%2e"):
        path = operation.path.partition("{")[0] + value + operation.path.partition("}")[2]
        response = client.request(operation.method, path, json={} if operation.method == "POST" else None)
        assert response.status_code in {400, 404, 405, 422, 501}, f"{path}: {response.status_code} {response.text}"
        check_error(response)


@pytest.mark.parametrize("path", sorted({operation.path for operation in operations()}))
def test_methods_that_are_none(path: str, client: httpx.Client):
    known = {operation.method for operation in operations() if operation.path == path}
    for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "TRACE"} - known:
        response = client.request(method, path.replace("{", "").replace("}", ""))
        assert response.status_code in {404, 405}, f"{method}: {response.status_code} {response.text}"
        check_error(response)


@pytest.mark.parametrize("operation", [item for item in POSTS if "requestBody" in item.spec], ids=str)
def test_the_connection_stays_usable_after_an_error(operation: Operation, everything: Server):
    connection = http.client.HTTPConnection("127.0.0.1", everything.port, timeout=PATIENCE_SECONDS)
    try:
        for _ in range(3):
            connection.request("POST", path_of(operation), b"{", {"content-type": "application/json"})
            response = connection.getresponse()
            assert 400 <= response.status < 500
            assert response.read()
            assert response.getheader("connection", "").lower() != "close"
            sock = connection.sock
            connection.request("GET", "/v2/health/live")
            assert connection.getresponse().read() == b'{"live":true}'
            assert connection.sock is sock, "the server closed the connection"
    finally:
        connection.close()


def test_memory_is_level(everything: Server, client: httpx.Client):
    """Rounds of the largest that may be sent, and of what pretends to be small."""
    large = encoded(Image.new("RGB", (6_300, 6_300), "red"))
    bombs = [large, *(hostile.images()[name] for name in ("PNG bomb", "text bomb", "many scans", "WEBP bomb"))]
    deep, bomb = hostile.BODIES["deep lists"], {"content": hostile.gzip_bomb(), "headers": {"content-encoding": "gzip"}}
    levels: list[int] = []
    for _ in range(4):
        for operation in POSTS:
            if operation.path.endswith("/infer"):
                ask(client, operation, bomb)
            if is_own(operation):
                ask(client, operation, {"content": deep})
        for path, field, data in (
            ("/caption", "image", {}),
            ("/api/v1/run", "image", {"max_tokens": "8"}),
            ("/generate/image", "images", {"prompt": "What is this?", "max_tokens": "8"}),
            ("/embed/images", "files", {}),
        ):
            for data_of_picture in bombs:
                response = client.post(path, files={field: data_of_picture}, data=data)
                assert response.status_code < 500, response.text
        levels.append(resident(everything))
    assert min(levels[1:]) - levels[0] < LEVEL_BYTES, [level // 2**20 for level in levels]


def test_a_body_beyond_the_limit_is_refused_while_it_comes(everything: Server, client: httpx.Client):
    def endless() -> Iterator[bytes]:
        for _ in range(150):
            yield b" " * 2**20

    for path in ("/v2/models/describe/infer", "/caption", "/generate/image", "/embed/images", "/v1/chat/completions"):
        before = resident(everything)
        try:
            response = client.post(path, content=endless(), headers={"content-type": "application/json"})
            assert response.status_code == 413
            check_error(response)
        except (httpx.WriteError, httpx.RemoteProtocolError):  # it hung up while we were still talking
            pass
        assert resident(everything) - before < GROWTH_BYTES
        assert client.get("/v2/health/live").status_code == 200
