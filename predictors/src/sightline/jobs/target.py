"""How an item is written for its target, and what an answer means for it: results and faults. Pure, no I/O.

    (page, item, image bytes) ──write──▶ Outgoing ──POST──▶ Answer ──read──▶ Success | Refusal

Three targets: the gateway's `POST /caption` (the image as the raw body, options in the query; as a form when the prompt
is too long for an address), KServe V2 of one predictor (binary extension), and an OpenAI batch line's own url and body.
"""

import email.utils
import hashlib
import mimetypes
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from urllib.parse import quote, urlencode

import orjson

from sightline.errors import BadRequest
from sightline.jobs.items import Code, Item, StepName
from sightline.jobs.page import Options, Page, Target
from sightline.wire import REQUEST_ID_HEADER

MAX_QUERY_CHARACTERS = 4096
"""Servers take addresses of 8 KiB and more; a prompt may be 32 KiB of UTF-8."""
MAX_WORDS_CHARACTERS = 300
OPENAI_ROUTES = "/v1/"

PASSED_ON = (
    "preset",
    "detailed",
    "reasoning_level",
    "strict",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "max_width",
)
"""Options that an item may have of its own beside `prompt` and `enhance`, in the words of every route."""
_SNAKE = {"maxTokens": "max_tokens", "topP": "top_p"}

Health = Literal["answered", "throttled", "refused"]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A POST, but for what every request has: key, deadline, priority."""

    url: str
    body: bytes = field(repr=False)
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `headers` by their names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Success:
    """What a line says of an item beside its id and uri (`Line.result`), and what is counted of it."""

    result: Mapping[str, Any]
    is_unenhanced: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is no result.

    step, code, message  of the fault, should this be the last word
    health               what it says about the target
    may_retry            asking again may help
    retry_after          seconds that the target asked for
    """

    step: StepName
    code: Code
    message: str
    health: Health = "answered"
    may_retry: bool = False
    retry_after: float | None = None


# --- writing ---------------------------------------------------------------------------------------------------------


def write(page: Page, item: Item, image: bytes) -> Outgoing | Refusal:
    """The request for an item; a Refusal when it cannot be asked at all."""
    if item.url or page.target.kind == "openai":
        return _openai(page.target, item)
    if page.target.kind == "v2":
        return _v2(page.target, item, image, asked(page.options, item))
    return _gateway(page.target, item, image, asked(page.options, item))


def asked(options: Options, item: Item) -> dict[str, Any]:
    """What is asked about an item's image, in the words of the gateway's `POST /caption`: the item's own word wins."""
    fields: dict[str, Any] = {_SNAKE.get(name, name): value for name, value in options.generation.items()}
    fields |= {name: item.body[name] for name in PASSED_ON if item.body.get(name) is not None}
    enhance = _wish(item.body.get("enhance"), _wish(options.enhance, None))
    if enhance is not None:
        fields["use_gpt_oss"] = enhance
    prompt = item.body.get("prompt") or options.prompt
    return fields | ({"prompt": prompt} if prompt else {})


def digest(page: Page, item: Item, image: bytes) -> str:
    """64 hexadecimal digits over all that decides an item's result: bytes, options, target and revision."""
    target = page.target
    wanted = asked(page.options, item)
    decides = [target.kind, target.model, target.revision, wanted, item.url, dict(item.body) if item.url else None]
    told = hashlib.sha256(orjson.dumps(decides, option=orjson.OPT_SORT_KEYS))
    told.update(hashlib.sha256(image).digest())
    return told.hexdigest()


def ready_url(target: Target) -> str:
    """What says whether the target could answer now: 200, and no `ok` or `ready` that is false."""
    base = target.url.rstrip("/")
    return f"{base}/v2/models/{quote(target.model, safe='')}/ready" if target.kind == "v2" else f"{base}/health"


def is_ready(target: Target, status: int, body: bytes) -> bool:
    """What the answer to `ready_url` says. Somebody else's server that has no such route is one that answers."""
    if target.kind == "openai" and status in (404, 405):
        return True
    said = _object(body)
    return status == 200 and said.get("ok", True) is not False and said.get("ready", True) is not False


def _gateway(target: Target, item: Item, image: bytes, fields: Mapping[str, Any]) -> Outgoing:
    told = {name: _text(value) for name, value in fields.items()} | {"explain": "true"}
    query = urlencode(told)
    url = f"{target.url.rstrip('/')}/caption"
    if len(query) <= MAX_QUERY_CHARACTERS:
        return Outgoing(f"{url}?{query}", image, {"content-type": _media_type(item.uri)})
    return _form(url, told, image)


def _media_type(uri: str) -> str:
    """By the name alone; the gateway goes by the bytes, and only wants to hear that this should be an image."""
    kind, _ = mimetypes.guess_type(uri.rpartition("/")[2])
    return kind if kind is not None and kind.startswith("image/") else "image/x-unknown"


def _form(url: str, fields: Mapping[str, str], image: bytes) -> Outgoing:
    """For what has no place in an address."""
    mark = f"sightline-{hashlib.sha256(image).hexdigest()[:32]}"
    parts = [
        f'--{mark}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    head = f'--{mark}\r\ncontent-disposition: form-data; name="image"; filename="image"\r\n'
    parts.append(f"{head}content-type: application/octet-stream\r\n\r\n".encode() + image + b"\r\n")
    return Outgoing(
        url, b"".join([*parts, f"--{mark}--\r\n".encode()]), {"content-type": f"multipart/form-data; boundary={mark}"}
    )


def _v2(target: Target, item: Item, image: bytes, fields: Mapping[str, Any]) -> Outgoing:
    from sightline import v2  # brings numpy, which other targets do without

    inputs = [v2.Tensor.of_bytes("image", [image])]
    if prompt := fields.get("prompt"):
        inputs.append(v2.Tensor.of_texts("prompt", [str(prompt)]))
    parameters = {
        name: value
        for name, value in fields.items()
        if name not in ("prompt", "use_gpt_oss") and isinstance(value, bool | int | float | str)
    }
    body, header_length = v2.render_request(v2.InferRequest(tuple(inputs), parameters))
    headers = {"content-type": "application/octet-stream", v2.HEADER_LENGTH: str(header_length)}
    url = f"{target.url.rstrip('/')}/v2/models/{quote(target.model, safe='')}/infer"
    return Outgoing(url, body, headers)


def _openai(target: Target, item: Item) -> Outgoing | Refusal:
    """Below the target only: a line's url is a path, whoever wrote it."""
    path = item.url or "/v1/chat/completions"
    if not path.startswith(OPENAI_ROUTES) or ".." in path:
        return Refusal("caption", "caption_rejected", "The url of this line is no path below /v1/.")
    if item.body.get("stream"):
        return Refusal("caption", "caption_rejected", "A batch line cannot be streamed.")
    url = target.url.rstrip("/") + quote(path, safe="/")
    return Outgoing(url, orjson.dumps(dict(item.body)), {"content-type": "application/json"})


def _wish(value: object, otherwise: bool | None) -> bool | None:
    """Whether to enhance: true, false, or as the operator and the page say it."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return {"never": False, "false": False, "always": True, "true": True}.get(value.lower(), otherwise)
    return otherwise


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- reading ---------------------------------------------------------------------------------------------------------


def read(page: Page, item: Item, answer: Answer) -> Success | Refusal:
    """What an answer means for its item."""
    if answer.status != 200:
        return _refusal(answer)
    try:
        if item.url or page.target.kind == "openai":
            return _read_openai(answer)
        if page.target.kind == "v2":
            return _read_v2(answer)
        return _read_gateway(answer)
    except (BadRequest, KeyError, TypeError, ValueError):
        return Refusal("caption", "internal", "The target's answer cannot be understood.", may_retry=True)


_KEPT = ("caption", "original_caption", "enhanced", "truncated", "downscaled", "demo_model", "model")
"""Of the gateway's answer. What changes from one attempt to the next (times) is not."""


def _read_gateway(answer: Answer) -> Success:
    said = cast("Mapping[str, Any]", orjson.loads(answer.body))
    if not isinstance(said["caption"], str):
        raise TypeError("no caption")
    result = {name: said[name] for name in _KEPT if name in said}
    fault = said.get("enhancement_error")
    if fault:
        result["enhance_error"] = {"code": fault["code"], "message": fault["message"]}
    steps = cast("list[Mapping[str, Any]]", said.get("steps") or [])
    usage = {name: sum(int(step.get(name) or 0) for step in steps) for name in _USAGE}
    return _counted(result, usage, is_unenhanced=bool(fault))


def _read_v2(answer: Answer) -> Success:
    from sightline import v2

    response = v2.parse_response(answer.body, answer.headers.get(v2.HEADER_LENGTH))
    output = response.output("text") or response.output("caption")
    if output is None:
        raise ValueError("no output 'text'")
    (text,) = output.texts()
    said = response.parameters
    result: dict[str, Any] = {"caption": text, "enhanced": False}
    if said.get("finish_reason") == "length":
        result["truncated"] = True
    if said.get("downscaled") is True:
        result["downscaled"] = True
    if said.get("demo_model") is True:
        result |= {"demo_model": True, "model": said.get("model")}
    return _counted(result, {name: said.get(name) or 0 for name in _USAGE})


def _read_openai(answer: Answer) -> Success:
    body = cast("Mapping[str, Any]", orjson.loads(answer.body))
    usage = cast("Mapping[str, Any]", body.get("usage") or {})
    told = answer.headers.get(REQUEST_ID_HEADER, "")  # ours, the same for every attempt, where the target gives it back
    result = {"response": {"status_code": answer.status, "request_id": told, "body": body}}
    return Success(result, False, *(int(usage.get(name) or 0) for name in _USAGE))


_USAGE = ("prompt_tokens", "completion_tokens")


def _counted(result: dict[str, Any], usage: Mapping[str, Any], *, is_unenhanced: bool = False) -> Success:
    tokens = {name: int(usage[name]) for name in _USAGE}
    if any(tokens.values()):
        result["usage"] = tokens
    return Success(result, is_unenhanced, tokens["prompt_tokens"], tokens["completion_tokens"])


# --- refusals --------------------------------------------------------------------------------------------------------

_BY_CODE: Mapping[str, tuple[StepName, Code]] = {
    "request_too_large": ("decode", "input_too_large"),
    "payload_too_large": ("decode", "input_too_large"),
    "image_too_many_bytes": ("decode", "input_too_large"),
    "image_too_many_pixels": ("decode", "input_too_large"),
    "image_format_unsupported": ("decode", "unsupported_media"),
    "image_unsupported": ("caption", "unsupported_media"),
    "invalid_image": ("decode", "decode_failed"),
    "image_not_found": ("fetch", "input_not_found"),
    "image_missing": ("caption", "caption_rejected"),
    "content_refused": ("caption", "content_filter"),
    "content_filter": ("caption", "content_filter"),
    "enhancer_timeout": ("enhance", "enhance_timeout"),
    "enhancer_unavailable": ("enhance", "enhance_unavailable"),
    "enhancer_failed": ("enhance", "enhance_unavailable"),
    "enhancer_not_configured": ("enhance", "enhance_unavailable"),
    "no_final_answer": ("enhance", "enhance_unavailable"),
    "enhance_step_unavailable": ("enhance", "enhance_unavailable"),
}
"""What our own servers say, by their stable codes. Other `image_…` are decode_failed."""

REFUSES_KEYS = "invalid_api_key"

_OF_THE_TARGET = frozenset({"route_not_found", "model_not_found", "model_not_ready"})
"""Said of the target and not of the item: it is waited for."""


def refuses_us(answer: Answer) -> bool:
    """Whether an answer is about our key and not about the item."""
    if answer.status not in (401, 403):
        return False
    code, _ = _spoken(answer)
    return answer.status == 401 or code is None or code == REFUSES_KEYS


def _refusal(answer: Answer) -> Refusal:
    code, words = _spoken(answer)
    wait = retry_after(answer)
    status = answer.status
    if status == 429:
        return Refusal("caption", "caption_unavailable", words or "The target is busy.", "throttled", True, wait)
    if code in _BY_CODE or (code or "").startswith("image_"):
        step, ours = _BY_CODE.get(code or "", ("decode", "decode_failed"))
        return Refusal(step, ours, words or "The target refused the image.", "answered", status >= 500, wait)
    if status == 503 or (status in (404, 502) and (code is None or code in _OF_THE_TARGET)):
        return Refusal("caption", "caption_unavailable", words or "The target is not there.", "refused", True, wait)
    if status in (408, 504):
        return Refusal("caption", "caption_timeout", words or "The target took too long.", "throttled", True, wait)
    if status == 413:
        return Refusal("decode", "input_too_large", words or "The target takes no image of this size.")
    if status == 415:
        return Refusal("decode", "unsupported_media", words or "The target does not take this kind of image.")
    if status >= 500:
        ours: Code = "internal" if status == 500 else "caption_unavailable" if status == 502 else "caption_rejected"
        return Refusal("caption", ours, words or "The target failed.", "answered", True, wait)
    said = words or "The target refused the request."
    return Refusal("caption", "caption_rejected", said, "answered", status in (409, 425), wait)


def _spoken(answer: Answer) -> tuple[str | None, str | None]:
    """Code and words of an error in any of the three shapes; None where the body has none."""
    said = _object(answer.body)
    error = said.get("error")
    inner = cast("Mapping[str, Any]", error) if isinstance(error, dict) else said
    code, words = inner.get("code"), inner.get("message") or said.get("detail") or error
    text = (
        "".join(c if c.isprintable() else " " for c in words)[:MAX_WORDS_CHARACTERS] if isinstance(words, str) else None
    )
    return code if isinstance(code, str) and code else None, text or None


def retry_after(answer: Answer) -> float | None:
    """Seconds, or a date (RFC 9110); None when there is none that can be read."""
    said = answer.headers.get("retry-after")
    if not said:
        return None
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except ValueError:
        return None


def _object(body: bytes) -> Mapping[str, Any]:
    try:
        said: object = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return cast("Mapping[str, Any]", said) if isinstance(said, dict) else {}
