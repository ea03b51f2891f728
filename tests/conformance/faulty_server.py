"""A small V2 server that does everything right, and any one thing wrong: the proof that a check can fail.

HTTP as a bare ASGI application, gRPC beside it; `faults` holds the names of what is wrong at the moment.
"""

import asyncio
import base64
import gzip
import json
import math
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import uvicorn
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as service

from tests.conftest import free_port

MODEL = "probe"
INPUTS = [
    {"name": "image", "datatype": "BYTES", "shape": [-1]},
    {"name": "scores", "datatype": "FP32", "shape": [-1, 2]},
]
OUTPUTS = [
    {"name": "text", "datatype": "BYTES", "shape": [-1]},
    {"name": "totals", "datatype": "FP32", "shape": [-1, 2]},
]
MIB = 1 << 20
KEY = "correct-horse"


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FaultyServer:
    def __init__(self) -> None:
        self.faults: frozenset[str] = frozenset()
        self.is_unloaded = self.is_hurt = False
        self.port, self.grpc_port = free_port(), free_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def has(self, fault: str) -> bool:
        return fault in self.faults

    @contextmanager
    def with_faults(self, *faults: str) -> Iterator[None]:
        self.faults = frozenset(faults)
        self.is_unloaded = self.is_hurt = False
        try:
            yield
        finally:
            self.faults = frozenset()
            self.is_unloaded = self.is_hurt = False

    async def __call__(self, scope, receive, send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode().lower(): value.decode() for name, value in scope["headers"]}
        more: dict[str, str] = {}
        try:
            status, answer = self.route(scope["method"], scope["path"], headers, body, more)
        except Refused as refused:
            status, answer = refused.status, self.error_body(refused, body)
        except (AttributeError, LookupError, TypeError, ValueError):  # a generated body of yet another shape
            status, answer = 400, {"error": "cannot be read"}
        if status == 405:
            more["allow"] = "POST" if scope["path"].endswith("/infer") else "GET"
        if isinstance(answer, dict | list):
            answer = json.dumps(answer).encode()
            more.setdefault("content-type", "application/json")
        if self.has("says it is text") and scope["path"] == "/v2":
            more["content-type"] = "text/plain"
        if self.has("closes after errors") and status >= 400:
            more["connection"] = "close"
        if self.has("closes after answers") and status == 200:
            more["connection"] = "close"
        raw = [(name.encode(), value.encode()) for name, value in more.items()]
        raw.append((b"content-length", str(len(answer)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": answer})

    def error_body(self, refused: Refused, body: bytes) -> dict[str, object]:
        message = str(refused)
        if isinstance(refused, Detail):
            return {"detail": message}
        if self.has("names its exceptions"):
            message = f"ValueError : {message}"
        if self.has("repeats what it got"):
            message += repr(body)
        return {"error": message}

    def route(self, method, path, headers, body, more):
        if self.has("wants a key") and headers.get("x-api-key") != KEY:
            raise Refused(403, "no key")
        if path.startswith("/openai/v1"):
            return self.openai(method, path.removeprefix("/openai/v1"), body, more)
        if method not in {"GET", "POST"} or (method == "POST") != path.endswith(("/infer", "/unload")):
            if self.has("takes any method"):
                return 200, {}
            raise Refused(405, "no such method")
        if path == "/v2":
            return 200, self.server_metadata()
        if path == "/v2/models":
            return 200, {"models": [MODEL]}
        if path == "/v2/health/live":
            return (503 if self.has("not live") else 202 if self.has("answers 202") else 200), (
                {} if self.has("health says nothing") else {"live": True}
            )
        if path == "/v2/health/ready":
            return 200, {} if self.has("health says nothing") else {"ready": not self.has("not ready")}
        parts = path.removeprefix("/v2/models/").split("/")
        if path.startswith("/v2/repository/models/"):
            self.is_unloaded = self.has("can be unloaded")
            return (200, {}) if self.is_unloaded else (501, {"error": "no"})
        if not path.startswith("/v2/models/"):
            raise Refused(404, "no such route")
        return self.model(parts, headers, body, more)

    def server_metadata(self) -> dict[str, object]:
        answer: dict[str, object] = {"name": "probe", "version": "1", "extensions": ["binary_tensor_data"]}
        if self.has("no extensions"):
            del answer["extensions"]
        if self.has("announces nothing"):
            answer["extensions"] = []
        return answer

    def model(self, parts, headers, body, more):
        name, *rest = parts
        verb = rest[-1] if rest and rest[-1] in {"ready", "infer"} else ""
        version = rest[1] if len(rest) > 1 and rest[0] == "versions" else None
        is_known = rest in ([], [verb], ["versions", version], ["versions", version, verb])
        if not is_known:
            return (404, {"detail": "Not Found"}) if self.has("own words for unknown routes") else self.refuse(404)
        if name != MODEL:
            return self.unknown_model(verb)
        if version is not None and (version != "1" or self.has("no versions")):
            self.refuse(404, "no such version")
        if version is not None and verb == "infer" and self.has("no infer of versions"):
            self.refuse(501)
        if verb == "ready":
            if self.is_unloaded:
                self.refuse(503)
            return 200, {"name": "other" if self.has("ready of another") else MODEL, "ready": True}
        return self.infer(headers, body, more) if verb == "infer" else (200, self.metadata())

    def refuse(self, status: int, message: str = "cannot be had"):
        raise Refused(status, message)

    def unknown_model(self, verb: str):
        if self.has("every model is ready") and verb == "ready":
            return 200, {"name": "x", "ready": True}
        if self.has("unknown models answer") and verb == "infer":
            return 200, {"model_name": "x", "outputs": []}
        if self.has("detail for unknown models"):
            return 404, {"detail": "Not Found"}
        return self.refuse(400 if self.has("400 for unknown models") else 404, "no such model")

    def metadata(self) -> dict[str, object]:
        answer = {"name": MODEL, "versions": ["1"], "platform": "python", "inputs": INPUTS, "outputs": OUTPUTS}
        if self.has("null versions"):
            answer["versions"] = None
        if self.has("tensors without shape"):
            answer["outputs"] = [{"name": "text", "datatype": "BYTES"}, OUTPUTS[1]]
        if self.has("metadata without name"):
            del answer["name"]
        if self.has("declares another datatype"):
            answer["outputs"] = [OUTPUTS[0], OUTPUTS[1] | {"datatype": "FP64"}]
        return answer

    def infer(self, headers, body, more):
        if self.is_hurt:
            self.refuse(503, "hurt")
        encoding = headers.get("content-encoding")
        if encoding:
            body = self.decompressed(body, encoding)
        if self.has("wants a content type") and "content-type" not in headers:
            self.refuse(400, "no content type")
        if self.has("takes 8 MiB") and len(body) > 8 * MIB:
            self.refuse(413, "too large")
        if self.has("an empty body is fine") and not body:
            return 200, {"model_name": MODEL, "outputs": []}
        head, blob = self.parsed(body, headers.get("inference-header-content-length"))
        if self.has("an empty answer without inputs") and "inputs" not in head:
            return 200, {"model_name": MODEL, "outputs": []}
        inputs = self.inputs(head, blob)
        self.look_into(inputs["image"])
        answer = self.answer(head, inputs)
        return self.rendered(answer, head, headers, more)

    def decompressed(self, body: bytes, encoding: str) -> bytes:
        if self.has(f"no {encoding}"):
            self.refuse(400, "not compressed, please")
        try:
            return gzip.decompress(body) if encoding == "gzip" else zlib.decompress(body)
        except (OSError, EOFError, zlib.error):
            raise Refused(500 if self.has("500 for broken gzip") else 400, "cannot be read") from None

    def parsed(self, body: bytes, announced: str | None):
        blob = b""
        if announced is not None:
            if self.has("no binary"):
                self.refuse(400, "no binary, please")
            if not announced.isdigit() or int(announced) > len(body):
                self.refuse(500 if self.has("500 for header lengths") else 400, "a strange header")
            body, blob = body[: int(announced)], body[int(announced) :]
        try:
            head = json.loads(body)
        except ValueError:
            self.is_hurt = self.has("dies of bad JSON")
            if self.has("detail for invalid JSON"):
                raise Detail(422) from None
            raise Refused(400, "no JSON") from None
        if not isinstance(head, dict):
            if self.has("detail for lists"):
                raise Detail(422)
            self.refuse(400, "no object")
        is_odd = any(head.get(key) is not None and not isinstance(head[key], kind)
                     for key, kind in (("id", str), ("parameters", dict), ("outputs", list)))  # fmt: skip
        if is_odd and not self.has("takes any member"):
            self.refuse(400, "a member of another type")
        return head, blob

    def inputs(self, head, blob):
        tensors = head.get("inputs")
        if not isinstance(tensors, list) or not tensors:
            self.refuse(400, "no inputs")
        found, at = {}, 0
        for tensor in tensors:
            if not isinstance(tensor, dict) or not {"name", "shape", "datatype"} <= tensor.keys():
                self.refuse(400, "no tensor")
            shape, datatype, parameters = tensor["shape"], tensor["datatype"], tensor.get("parameters") or {}
            if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
                self.refuse(400, "no shape")
            if datatype not in ("BYTES", "FP32") and not self.has("any datatype"):
                self.refuse(400, "no such datatype")
            if not isinstance(parameters, dict) or not isinstance(tensor["name"], str):
                self.refuse(400, "no parameters")
            size = parameters.get("binary_data_size")
            if size is not None:
                if type(size) is not int or at + size > len(blob):
                    self.refuse(500 if self.has("500 for short data") else 400, "too short")
                values = self.from_blob(blob[at : at + size], datatype)
                if self.has("text only") and datatype == "BYTES" and values[0][:2] == b"\xff\xd8":
                    self.refuse(400, "text, please")
                at += size
            elif isinstance(tensor.get("data"), list):
                if self.has("no nested data") and any(isinstance(item, list) for item in tensor["data"]):
                    self.refuse(400, "flat data, please")
                values = [value.encode() if isinstance(value, str) else value for value in flat(tensor["data"])]
            else:
                self.refuse(400, "no data")
            if len(values) != math.prod(shape):
                status = 500 if self.has("500 for wrong shapes") else 400
                self.refuse(status, "not as many elements as the shape says")
            kind = object if self.has("any datatype") else bytes if datatype == "BYTES" else int | float
            if not all(isinstance(value, kind) and not isinstance(value, bool) for value in values):
                self.refuse(400, "an element of another type")
            found[tensor["name"]] = values
        if at != len(blob) and not self.has("ignores what is left over"):
            self.refuse(400, "too long")
        if set(found) != {"image", "scores"}:
            self.refuse(400, "other inputs, please")
        return found

    def from_blob(self, blob: bytes, datatype: str):
        values, at = [], 0
        try:
            if datatype != "BYTES":
                return list(struct.unpack(f"<{len(blob) // 4}f", blob))
            while at < len(blob):
                (length,) = struct.unpack_from("<I", blob, at)
                values.append(blob[at + 4 : at + 4 + length])
                at += 4 + length
        except struct.error:
            raise Refused(400, "cannot be read") from None
        if at != len(blob) and not self.has("ignores what is left over"):
            self.refuse(400, "cannot be read")
        return values

    def look_into(self, images) -> None:
        for image in images:
            data = image if image[:2] in (b"\x89P", b"\xff\xd8") else base64.b64decode(image + b"===")
            is_whole = data.endswith((b"IEND\xaeB`\x82", b"\xff\xd9"))
            if not is_whole:
                self.refuse(500 if self.has("500 for broken images") else 400, "a broken image")

    def answer(self, head, inputs):
        count, pairs = len(inputs["image"]), len(inputs["scores"]) // 2
        answer = {
            "model_name": MODEL,
            "model_version": "1",
            "outputs": [
                {"name": "text", "datatype": "BYTES", "shape": [count], "data": ["a picture"] * count},
                {"name": "totals", "datatype": "FP32", "shape": [pairs, 2], "data": [0.0] * pairs * 2},
            ],
        }
        if isinstance(head.get("id"), str) and not self.has("forgets ids"):
            answer["id"] = head["id"]
        if self.has("null for absent"):
            answer["parameters"] = None
        if self.has("loses an element"):
            answer["outputs"][1]["data"].pop()
        return answer

    def rendered(self, answer, head, headers, more):
        wishes = {}
        for wish in head.get("outputs") or []:
            if not isinstance(wish, dict) or not isinstance(wish.get("name"), str):
                self.refuse(400, "no output")
            wishes[wish["name"]] = (wish.get("parameters") or {}).get("binary_data")
        known = {output["name"] for output in answer["outputs"]}
        if not known.issuperset(wishes) and not self.has("any output"):
            self.refuse(400, "no such output")
        if wishes and not self.has("returns all outputs") and known & set(wishes):
            answer["outputs"] = [output for output in answer["outputs"] if output["name"] in wishes]
        is_binary = (head.get("parameters") or {}).get("binary_data_output") is True and not self.has(
            "no default binary"
        )
        blobs = []
        for output in answer["outputs"]:
            wish = wishes.get(output["name"])
            if self.has("no binary outputs"):
                wish = None
            if self.has("binary always wins") and is_binary:
                wish = True
            if wish or (wish is None and is_binary):
                blobs.append(self.to_blob(output))
        if not blobs:
            return 200, self.compressed(json.dumps(answer).encode(), headers, more)
        rendered = json.dumps(answer).encode()
        more |= {"inference-header-content-length": str(len(rendered)), "content-type": "application/octet-stream"}
        return 200, self.compressed(b"".join([rendered, *blobs]), headers, more)

    def to_blob(self, output) -> bytes:
        data = output.pop("data")
        if output["datatype"] == "BYTES":
            blob = b"".join(struct.pack("<I", len(text)) + text.encode() for text in data)
        else:
            blob = struct.pack(f"<{len(data)}f", *data)
        output["parameters"] = {"binary_data_size": len(blob)}
        return blob

    def compressed(self, body: bytes, headers, more) -> bytes:
        more.setdefault("content-type", "application/json")
        accepted = headers.get("accept-encoding")
        if accepted == "gzip":
            more["content-encoding"] = "gzip"
            return body if self.has("only says gzip") else gzip.compress(body)
        if accepted == "deflate":
            more["content-encoding"] = "deflate"
            return zlib.compress(body)
        return body

    def openai(self, method, path, body, more):
        if path == "/models":
            return 200, {"object": "list", "data": [{"id": "x" if self.has("lists another model") else MODEL}]}
        asked = json.loads(body)
        if asked["model"] != MODEL:
            status = 400 if self.has("400 for unknown models") else 404
            return status, {"error": {"message": "no such model", "code": "model_not_found"}}
        if path == "/embeddings":
            vector = ["x"] if self.has("words for vectors") else [0.5, 0.25]
            data = [
                {"object": "embedding", "index": index, "embedding": vector} for index in range(len(asked["input"]))
            ]
            return 200, {
                "object": "list",
                "data": data,
                "model": MODEL,
                "usage": {"prompt_tokens": 1, "total_tokens": 1},
            }
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        common = {"id": "1", "created": 1, "model": MODEL}
        if not asked.get("stream"):
            text = "" if self.has("says nothing") else "a picture"
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            return 200, common | {"object": "chat.completion", "choices": [choice], "usage": usage}
        pieces = ["a "] if self.has("stops streaming") else ["a ", "picture"]
        events = [
            {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces
        ] + [{"choices": [], "usage": usage}]
        lines = [json.dumps(common | {"object": "chat.completion.chunk"} | event) for event in events] + ["[DONE]"]
        more["content-type"] = "text/event-stream"
        return 200, "".join(f"data: {line}\n\n" for line in lines).encode()


class Detail(Refused):
    """An error in FastAPI's words instead of the protocol's."""

    def __init__(self, status: int) -> None:
        super().__init__(status, "detail")


class Servicer(service.GRPCInferenceServiceServicer):
    """The same model over gRPC."""

    def __init__(self, server: FaultyServer) -> None:
        self.server = server

    def ServerLive(self, request, context):
        return pb.ServerLiveResponse(live=not self.server.has("not live"))

    def ServerReady(self, request, context):
        return pb.ServerReadyResponse(ready=True)

    def ModelReady(self, request, context):
        return pb.ModelReadyResponse(ready=request.name == MODEL)

    def ServerMetadata(self, request, context):
        return pb.ServerMetadataResponse(name="probe", version="" if self.server.has("no extensions") else "1")

    def ModelMetadata(self, request, context):
        self.find(request.name, context)
        outputs = OUTPUTS[:1] if self.server.has("forgets an output") else OUTPUTS
        return pb.ModelMetadataResponse(name=MODEL, versions=["1"], platform="python", inputs=INPUTS, outputs=outputs)

    def ModelInfer(self, request, context):
        if not (self.server.has("unknown models answer") and request.model_name != MODEL):
            self.find(request.model_name, context)
        if self.server.has("takes 8 MiB") and request.ByteSize() > 8 * MIB:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too large")
        found = {}
        for index, tensor in enumerate(request.inputs):
            if request.raw_input_contents:
                raw = request.raw_input_contents[index]
                if self.server.has("text only") and raw[4:6] == b"\xff\xd8":
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, "text, please")
                values = self.server.from_blob(raw, tensor.datatype)
            elif self.server.has("raw contents only"):
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "raw contents, please")
            else:
                values = list(tensor.contents.bytes_contents or tensor.contents.fp32_contents)
            if len(values) != math.prod(tensor.shape):
                code = grpc.StatusCode.INTERNAL if self.server.has("500 for wrong shapes") else None
                context.abort(code or grpc.StatusCode.INVALID_ARGUMENT, "not as many elements as the shape says")
            found[tensor.name] = values
        response = pb.ModelInferResponse(model_name=MODEL, id="" if self.server.has("forgets ids") else request.id)
        wanted = {output.name for output in request.outputs}
        is_wanted = wanted and not self.server.has("returns all outputs")
        for output in self.server.answer({}, found)["outputs"]:
            if is_wanted and output["name"] not in wanted:
                continue
            shape = output["shape"]
            response.raw_output_contents.append(self.server.to_blob(output))
            response.outputs.add(name=output["name"], datatype=output["datatype"], shape=shape)
        return response

    def find(self, name: str, context) -> None:
        if self.server.has("wants a key") and dict(context.invocation_metadata()).get("x-api-key") != KEY:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no key")
        if name != MODEL:
            code = grpc.StatusCode.INTERNAL if self.server.has("400 for unknown models") else grpc.StatusCode.NOT_FOUND
            context.abort(code, "no such model")


def flat(value) -> Iterator[object]:
    if not isinstance(value, list):
        yield value
        return
    for item in value:
        yield from flat(item)


@contextmanager
def running() -> Iterator[FaultyServer]:
    """The server on free ports, in threads of this process."""
    app = FaultyServer()
    web = uvicorn.Server(uvicorn.Config(app, port=app.port, log_level="critical", lifespan="off", ws="none"))
    thread = threading.Thread(target=lambda: asyncio.run(web.serve()), daemon=True)
    thread.start()
    workers = ThreadPoolExecutor(4)
    calls = grpc.server(workers, options=[("grpc.max_receive_message_length", 64 * MIB)])
    service.add_GRPCInferenceServiceServicer_to_server(Servicer(app), calls)
    calls.add_insecure_port(f"127.0.0.1:{app.grpc_port}")
    calls.start()
    while not web.started:
        thread.join(0.01)
        assert thread.is_alive()
    try:
        yield app
    finally:
        web.should_exit = True
        thread.join(10)
        calls.stop(None).wait(5)
        workers.shutdown()
