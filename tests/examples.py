"""Good requests for every documented route of every predictor: what truth is measured with, and fuzz made of."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.documents import Operation
from tests.scenes import red_circle

Request = Mapping[str, Any]
"""Keyword arguments of `httpx.Client.request`; `path` where the documented one has parameters."""


@cache
def picture() -> str:
    """A data URI."""
    return f"data:image/png;base64,{base64.b64encode(red_circle()).decode()}"


def _tensor(name: str, *values: str) -> dict[str, Any]:
    return {"name": name, "shape": [len(values)], "datatype": "BYTES", "data": list(values)}


def _file(name: str) -> tuple[str, tuple[str, bytes, str]]:
    return name, ("a.png", red_circle(), "image/png")


@dataclass(frozen=True)
class Inputs:
    """What a predictor is asked by the common protocols."""

    v1: Any
    v2: Mapping[str, Any]
    chat: Sequence[Any]


def _inputs(predictor: str) -> Inputs:
    image = {"type": "image_url", "image_url": {"url": picture()}}
    few = {"max_tokens": 32}
    if predictor == "enhance":
        text = "a large red circle on a white background"
        return Inputs(
            {"text": text, "reasoning_level": "low"},
            {"inputs": [_tensor("text", text)], "parameters": {"reasoning_level": "low"}},
            [{"type": "text", "text": text}],
        )
    if predictor == "embed":
        return Inputs({"image": picture()}, {"inputs": [_tensor("image", picture())]}, [])
    if predictor == "pipeline":
        return Inputs(
            {"image": picture(), "use_gpt_oss": False},
            {"inputs": [_tensor("image", picture())], "parameters": {"enhance": False}},
            [image],
        )
    prompt = "Describe this image in detail"
    return Inputs(
        {"image": picture(), "prompt": prompt} | few,
        {"inputs": [_tensor("image", picture()), _tensor("prompt", prompt)], "parameters": few},
        [{"type": "text", "text": prompt}, image],
    )


def requests(operation: Operation) -> Sequence[Request]:
    """Good requests to an operation. Raises KeyError when nobody has written one."""
    name = operation.predictor
    path = operation.path.replace("{model_name}", name)
    if path == "/" and name in {"blip", "pipeline"}:
        return [{"path": path, "headers": {"accept": "text/html"}}]
    if operation.method == "GET":
        return [{"path": _GETS.get(path, path)}]
    asked = _inputs(name)
    if path == f"/v1/models/{name}:predict":
        return [{"path": path, "json": {"instances": [asked.v1]}}]
    if path == f"/v2/models/{name}/infer":
        return [{"path": path, "json": dict(asked.v2)}]
    if path.startswith("/v2/repository/"):
        return [{"path": path}]
    if path == "/v1/chat/completions":
        body = {"model": name, "messages": [{"role": "user", "content": list(asked.chat)}], "max_tokens": 64}
        return [{"path": path, "json": body}, {"path": path, "json": body | {"stream": True}}]
    return [{"path": path} | request for request in _OWN[name, path]()]


def _captions() -> list[Request]:
    return [
        {"json": {"image": picture(), "use_gpt_oss": False}},
        {"json": {"image": picture(), "use_gpt_oss": True, "reasoning_level": "low", "explain": True, "strict": True}},
        {"files": [_file("image")], "data": {"detailed": "false", "use_gpt_oss": "false"}},
        {"content": red_circle(), "headers": {"content-type": "image/png"}},
    ]


def _orders() -> list[Request]:
    """A file of requests, as OpenAI's batch API takes it."""
    image = {"type": "image_url", "image_url": {"url": picture()}}
    body = {"model": "pipeline", "messages": [{"role": "user", "content": [image]}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    file = ("orders.jsonl", json.dumps(line).encode(), "application/jsonl")
    return [{"files": [("file", file)], "data": {"purpose": "batch"}}]


_OWN: Mapping[tuple[str, str], Any] = {
    ("pipeline", "/v1/files"): _orders,
    ("pipeline", "/v1/files/{file_id}"): lambda: [{"path": f"/v1/files/{UNKNOWN}"}],
    ("pipeline", "/v1/batches"): lambda: [
        {"json": {"input_file_id": UNKNOWN, "endpoint": "/v1/chat/completions", "completion_window": "24h"}},
    ],
    ("pipeline", "/v1/batches/{batch_id}/cancel"): lambda: [{"path": f"/v1/batches/{UNKNOWN}/cancel"}],
    ("pipeline", "/caption"): _captions,
    ("describe", "/api/v1/run"): lambda: [
        {"json": {"image_url": picture(), "prompt": "Describe this image in detail", "max_tokens": 32, "seed": 1}},
        {"json": {"input": {"image_url": picture()}, "action": "inference"}},
        {"json": {"action": "warmup"}},
        {"files": [_file("image")], "data": {"prompt": "What is this?"}},
        {"json": {"image_url": picture()}, "params": {"wait": "0"}},
    ],
    ("generate", "/generate/text"): lambda: [
        {"json": {"prompt": "Which shapes do you know?", "max_tokens": 32, "temperature": 0.7, "seed": 3}},
        {"json": {"prompt": "Who are you?", "max_tokens": 32, "stream": True}},
    ],
    ("generate", "/generate/image"): lambda: [
        {"files": [_file("images"), _file("images")], "data": {"prompt": "Which image holds a star?"}},
        {"json": {"image_url": picture(), "prompt": "What is this?", "max_tokens": 32}},
    ],
    ("generate", "/generate/image_url"): lambda: [
        {"json": {"image_url": [picture(), picture()], "prompt": "Which image holds a star?", "max_tokens": 32}},
        {"data": {"image_url": picture(), "prompt": "What is this?", "max_tokens": "32"}},
    ],
    ("embed", "/patches"): lambda: [
        {"json": {"dimensions": [{"width": 1024, "height": 768}, {"width": 0, "height": "x"}]}},
    ],
    ("embed", "/embed/queries"): lambda: [
        {"json": {"queries": ["a red circle", "a star"]}},
        {"json": {"queries": "a red circle", "encoding_format": "base64"}},
        {"json": {"queries": "a red circle", "encoding_format": "binary"}},
    ],
    ("embed", "/embed/images"): lambda: [
        {"files": [_file("files"), _file("files")]},
        {"json": {"images": [picture()], "encoding_format": "base64", "pool_factor": 3}},
    ],
    ("embed", "/score"): lambda: [
        {"json": {"queries": ["a red circle"], "images": [picture(), picture()]}},
        {"files": [_file("files")], "data": {"queries": "a red circle"}},
    ],
    ("embed", "/interpret"): lambda: [
        {"json": {"query": "a red circle", "image": picture(), "output": "both"}},
        {"files": [_file("image")], "data": {"query": "a red circle"}},
    ],
    ("embed", "/v1/embeddings"): lambda: [
        {"json": {"model": "embed", "input": ["a red circle", "a star"]}},
        {"json": {"model": "embed", "input": "a red circle", "encoding_format": "base64"}},
    ],
    ("blip", "/caption"): lambda: [
        {"json": {"image_path": "circle.png"}},
        {"files": [_file("image")], "data": {"text": "a large"}},
        {"content": red_circle(), "headers": {"content-type": "image/png"}},
    ],
    ("blip", "/batch-caption"): lambda: [
        {"json": {"image_paths": ["circle.png", "absent.png"]}},
        {"files": [_file("images"), _file("images")]},
    ],
    ("blip", "/async-batch-caption"): lambda: [
        {"json": {"image_paths": ["circle.png", "absent.png"]}},
        {"files": [_file("images")]},
    ],
}  # fmt: skip

UNKNOWN = "00000000-0000-4000-8000-000000000000"
_GETS: Mapping[str, str] = {
    "/v1/files/{file_id}": f"/v1/files/{UNKNOWN}",
    "/v1/files/{file_id}/content": f"/v1/files/{UNKNOWN}/content",
    "/v1/batches/{batch_id}": f"/v1/batches/{UNKNOWN}",
    "/internal/batches/{uid}/progress": f"/internal/batches/{UNKNOWN}/progress"
    "?fingerprint=0123456789ab&output=s3://nowhere",
    "/api/v1/status/{run_id}": f"/api/v1/status/{UNKNOWN}",
    "/task-status/{task_id}": f"/task-status/{UNKNOWN}",
    "/async-batch-caption/status/{task_id}": f"/async-batch-caption/status/{UNKNOWN}",
}
