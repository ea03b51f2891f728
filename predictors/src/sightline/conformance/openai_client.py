"""Checks with the openai client, for servers that have OpenAI's routes beside V2."""

import base64
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sightline.conformance.suite import Failed, Group, Level, Skipped, expect
from sightline.conformance.target import NO_SUCH_MODEL, Target
from sightline.conformance.tensors import TEXT, picture

if TYPE_CHECKING:
    from openai import OpenAI

OPENAI = Group("openai", "OpenAI client")

PREFIXES = ("/openai/v1", "/v1")
_ABSENT = frozenset({404, 405, 501})


@OPENAI.check("models", Level.EXTENSION)
def models(target: Target) -> None:
    """`models.list` holds the model."""
    with _client(target) as client:
        names = [model.id for model in client.models.list()]
    expect(target.model in names, f"it holds {names}")


@OPENAI.check("chat", Level.EXTENSION)
def chat(target: Target) -> None:
    """`chat.completions.create` answers text and counts tokens; with an image part where the model takes images."""
    with _client(target) as client:
        answer: Any = _chat(client, target)
    (choice,) = answer.choices
    expect(choice.message.role == "assistant", f"the role is {choice.message.role!r}")
    expect(choice.message.content, "no text")
    expect(choice.finish_reason in {"stop", "length"}, f"finish_reason is {choice.finish_reason!r}")
    expect(answer.usage and answer.usage.completion_tokens > 0, f"usage is {answer.usage}")


@OPENAI.check("chat-stream", Level.EXTENSION)
def chat_stream(target: Target) -> None:
    """With `stream` the text comes in pieces that add up to the whole answer, and the usage last when asked for."""
    with _client(target) as client:
        whole: Any = _chat(client, target)
        chunks = list(_chat(client, target, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    expect(text == whole.choices[0].message.content, f"streamed {text!r}, at once {whole.choices[0].message.content!r}")
    expect(chunks[-1].usage is not None and not chunks[-1].choices, "the last piece is not the usage")


@OPENAI.check("embeddings", Level.EXTENSION)
def embeddings(target: Target) -> None:
    """`embeddings.create` answers a vector (or, late interaction, several) for each text."""
    if _datatypes(target) == {"BYTES"}:
        raise Skipped("the model makes text")
    with _client(target) as client:
        try:
            answer: Any = client.embeddings.create(
                model=target.model, input=[TEXT, "A blue square."], encoding_format="float"
            )
        except Exception as error:
            _skip_absent(error)
            raise
    expect([item.index for item in answer.data] == [0, 1], f"{len(answer.data)} items")
    for item in answer.data:
        numbers = _numbers(item.embedding)
        expect(numbers and all(isinstance(number, float | int) for number in numbers), "a vector holds no numbers")


@OPENAI.check("errors", Level.EXTENSION)
def errors(target: Target) -> None:
    """An unknown model is a 404 whose body is OpenAI's error object."""
    import openai

    with _client(target) as client:
        for call in (_chat, _embed):
            try:
                call(client, target, model=NO_SUCH_MODEL)
            except openai.NotFoundError as error:
                body: Any = error.body
                is_object = isinstance(body, dict) and isinstance(body.get("message"), str)
                expect(is_object, f"404 with {body!r}")
                return
            except Skipped:
                continue
            raise Failed("an unknown model answered")
    raise Skipped("it offers neither chat nor embeddings")


def _embed(client: "OpenAI", target: Target, *, model: str) -> object:
    return client.embeddings.create(model=model, input=[TEXT])


def _chat(client: "OpenAI", target: Target, **options: Any) -> Any:  # noqa: ANN401 - an answer or a stream
    """One question at temperature 0. Raises Skipped where the model does not chat."""
    if "BYTES" not in _datatypes(target):
        raise Skipped("the model makes no text")
    text = {"type": "text", "text": "Describe this image in detail"}
    content: Any = TEXT
    if target.request.images:
        url = "data:image/png;base64," + base64.b64encode(picture()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, text]
    arguments: dict[str, Any] = {
        "model": target.model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
    }
    try:
        return client.chat.completions.create(**(arguments | options))
    except Exception as error:
        if "model" not in options:
            _skip_absent(error)
        raise


def _datatypes(target: Target) -> set[str]:
    """Of the model's outputs."""
    return {str(spec["datatype"]) for spec in target.metadata["outputs"]}


def _skip_absent(error: Exception) -> None:
    """Raise Skipped when the error says that the route does not exist."""
    import openai

    if isinstance(error, openai.APIStatusError) and error.status_code in _ABSENT:
        raise Skipped(f"not offered: HTTP {error.status_code}") from error


def _numbers(value: Any) -> list[Any]:  # noqa: ANN401
    return [number for item in value for number in _numbers(item)] if isinstance(value, list) else [value]


@contextmanager
def _client(target: Target) -> "Generator[OpenAI]":
    prefix = _prefix(target)
    import openai

    key = target.address.api_key
    with openai.OpenAI(
        base_url=target.address.url + prefix,
        api_key=key or "none",
        default_headers={"X-API-Key": key} if key else None,
        timeout=target.address.timeout_seconds,
        max_retries=0,
        # The proxies of the environment are not for a server under test.
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as client:
        yield client


def _prefix(target: Target) -> str:
    if target.address.openai is False:
        raise Skipped("not asked for (--no-openai)")
    said: list[str] = []
    for prefix in PREFIXES:
        response = target.get(f"{prefix}/models")
        said.append(f"{prefix}/models: HTTP {response.status_code}")
        try:
            body: Any = response.json()
        except ValueError:
            continue
        if response.status_code == 200 and isinstance(body, dict) and isinstance(body.get("data"), list):
            return prefix
    if target.address.openai:
        raise Failed("; ".join(said))
    raise Skipped("the server has no OpenAI routes: " + "; ".join(said))
