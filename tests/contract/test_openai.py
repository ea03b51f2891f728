"""OpenAI's routes as its own client speaks them, against real processes: describe, enhance, pipeline."""

import base64
import io
import json

import httpx
import openai
import pytest
from PIL import Image

from tests.conftest import Launcher, Server
from tests.scenes import RED_CIRCLE, red_circle

PROSE = "The image shows a large red circle on a white background."


class Clients:
    """OpenAI's clients, closed at the end of the test."""

    def __init__(self) -> None:
        self._open: list[openai.OpenAI] = []

    def __call__(self, server: Server, prefix: str = "/v1", key: str = "none") -> openai.OpenAI:
        http = httpx.Client(trust_env=False)
        client = openai.OpenAI(base_url=server.url + prefix, api_key=key, max_retries=0, http_client=http)
        self._open.append(client)
        return client

    def close(self) -> None:
        for client in self._open:
            client.close()


@pytest.fixture
def client_of():
    clients = Clients()
    yield clients
    clients.close()


@pytest.fixture(params=["describe", "enhance", "pipeline"])
def server(request, chain_servers) -> Server:
    return chain_servers[request.param]


@pytest.fixture(scope="module")
def data_uri() -> str:
    return "data:image/png;base64," + base64.b64encode(red_circle()).decode()


def image_part(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def question(server: Server, data_uri: str) -> list[dict]:
    """What each of the three is made for."""
    if server.name == "enhance":
        return [{"role": "user", "content": RED_CIRCLE}]
    return [{"role": "user", "content": [image_part(data_uri)]}]


ANSWERS = {"describe": RED_CIRCLE, "enhance": PROSE, "pipeline": PROSE}


class TestChat:
    @pytest.mark.parametrize("prefix", ["/v1", "/openai/v1"])
    def test_answers(self, client_of, server, data_uri, prefix):
        client = client_of(server, prefix)

        answer = client.chat.completions.create(model=server.name, messages=question(server, data_uri))

        assert answer.choices[0].message.content == ANSWERS[server.name]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.model == server.name
        assert answer.system_fingerprint
        assert answer.model_extra["demo_model"] is True
        assert answer._request_id

    def test_counts_what_it_used(self, client_of, server, data_uri):
        answer = client_of(server).chat.completions.create(model=server.name, messages=question(server, data_uri))

        usage = answer.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 0
        image_tokens = usage.prompt_tokens_details.image_tokens
        assert (image_tokens > 0) == (server.name != "enhance"), "the proof that the image was seen"
        assert (usage.completion_tokens_details.reasoning_tokens > 0) == (server.name != "describe")

    def test_streams_the_same_text(self, client_of, server, data_uri):
        stream = client_of(server).chat.completions.create(
            model=server.name,
            messages=question(server, data_uri),
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)

        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == ANSWERS[server.name]
        assert sum(map(bool, pieces)) > 3 or server.name == "pipeline", "it came in pieces; V2 steps have none"
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].choices == []
        assert chunks[-1].usage.total_tokens > 0

    async def test_streams_to_the_asynchronous_client(self, server, data_uri):
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", http_client=httpx.AsyncClient(trust_env=False)
        ) as client:
            messages = question(server, data_uri)
            whole = await client.chat.completions.create(model=server.name, messages=messages)
            async with await client.chat.completions.create(
                model=server.name, messages=messages, stream=True
            ) as stream:
                pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]

        assert "".join(pieces) == whole.choices[0].message.content

    def test_max_tokens_cuts(self, client_of, describe, data_uri):
        client = client_of(describe)
        for name in ("max_tokens", "max_completion_tokens"):
            answer = client.chat.completions.create(
                model="describe", messages=question(describe, data_uri), **{name: 2}
            )
            assert answer.choices[0].finish_reason == "length"
            assert answer.usage.completion_tokens == 2

    def test_a_seed_repeats(self, client_of, describe, data_uri):
        texts = [
            client_of(describe)
            .chat.completions.create(model="describe", messages=question(describe, data_uri), temperature=1.9, seed=5)
            .choices[0]
            .message.content
            for _ in range(2)
        ]
        assert texts[0] == texts[1]

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    @pytest.mark.parametrize(("name", "stop", "text"), [
        ("describe", ["circle"], "a large red"),
        ("describe", " on a", "a large red circle"),
        ("enhance", ["red", "white"], "The image shows a large"),
    ])  # fmt: skip
    def test_stops_before_a_stop_sequence(self, client_of, chain_servers, data_uri, name, stop, text, stream):
        server = chain_servers[name]
        answer = client_of(server).chat.completions.create(
            model=name, messages=question(server, data_uri), stop=stop, stream=stream
        )
        if stream:
            chunks = list(answer)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
            assert chunks[-1].choices[0].finish_reason == "stop"
        else:
            assert answer.choices[0].message.content == text
            assert answer.choices[0].finish_reason == "stop"
            assert answer.usage.completion_tokens < 40

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    def test_reasoning_is_counted_and_never_shown(self, client_of, enhance, data_uri, stream):
        answer = client_of(enhance).chat.completions.create(
            model="enhance",
            messages=question(enhance, data_uri),
            reasoning_effort="high",
            stream=stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        )
        chunks = list(answer) if stream else [answer]
        text = "".join(
            (chunk.choices[0].delta.content if stream else chunk.choices[0].message.content) or ""
            for chunk in chunks
            if chunk.choices
        )
        assert chunks[-1].usage.completion_tokens_details.reasoning_tokens > 13
        assert text.startswith(PROSE)
        assert "analysis" not in text

    def test_the_client_s_own_system_message_is_honoured(self, client_of, enhance):
        client = client_of(enhance)

        def prompt_tokens(*messages: dict) -> int:
            return client.chat.completions.create(
                model="enhance", messages=[*messages, {"role": "user", "content": RED_CIRCLE}], max_tokens=60
            ).usage.prompt_tokens

        assert prompt_tokens({"role": "system", "content": "Write."}) < prompt_tokens()

    def test_an_image_comes_from_s3(self, client_of, describe, s3_server):
        url = s3_server.put("chat", "a.png", red_circle())

        answer = client_of(describe).chat.completions.create(
            model="describe", messages=[{"role": "user", "content": [image_part(url)]}]
        )

        assert answer.choices[0].message.content == RED_CIRCLE

    def test_a_large_image_is_taken(self, client_of, describe):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(red_circle())).convert("RGB").resize((2400, 2400)).save(buffer, "BMP")
        assert buffer.tell() > 16 * 2**20
        url = "data:image/bmp;base64," + base64.b64encode(buffer.getvalue()).decode()

        answer = client_of(describe).chat.completions.create(
            model="describe", messages=[{"role": "user", "content": [image_part(url)]}]
        )

        assert answer.choices[0].message.content == RED_CIRCLE


class TestErrors:
    def test_an_unknown_model(self, client_of, server):
        with pytest.raises(openai.NotFoundError) as caught:
            client_of(server).chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "x"}])
        assert caught.value.code == "model_not_found"
        assert caught.value.type == "invalid_request_error"

    @pytest.mark.parametrize(
        "field",
        [
            {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"n": 2}, {"logprobs": True},
            {"response_format": {"type": "json_object"}}, {"max_tokens": 0}, {"temperature": 5},
        ],
        ids=json.dumps,
    )  # fmt: skip
    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    def test_what_is_not_supported(self, client_of, enhance, field, stream):
        with pytest.raises(openai.BadRequestError) as caught:
            client_of(enhance).chat.completions.create(
                model="enhance", messages=[{"role": "user", "content": "x"}], stream=stream, **field
            )
        assert caught.value.code in {"unsupported_parameter", "invalid_parameter"}
        assert caught.value.request_id

    @pytest.mark.parametrize(
        ("url", "code"),
        [
            ("https://example.com/a.png", "url_not_allowed"),
            ("http://169.254.169.254/latest", "url_not_allowed"),
            ("file:///etc/passwd", "source_scheme_unsupported"),
            ("data:image/png;base64,bm8=", "image_undecodable"),
            ("data:image/png;base64,!!!", "image_base64_invalid"),
            ("s3://no-such-bucket-of-ours/a", "s3_not_found"),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    @pytest.mark.parametrize("name", ["describe", "pipeline"])
    def test_images_that_cannot_be_had(self, client_of, chain_servers, name, url, code, stream):
        with pytest.raises(openai.BadRequestError) as caught:
            client_of(chain_servers[name]).chat.completions.create(
                model=name, messages=[{"role": "user", "content": [image_part(url)]}], stream=stream
            )
        assert caught.value.code == code

    def test_an_image_for_a_model_of_text(self, client_of, enhance, data_uri):
        with pytest.raises(openai.BadRequestError) as caught:
            client_of(enhance).chat.completions.create(
                model="enhance", messages=[{"role": "user", "content": [image_part(data_uri)]}]
            )
        assert caught.value.code == "image_unsupported"

    def test_no_image_for_a_chain_that_needs_one(self, client_of, pipeline):
        with pytest.raises(openai.BadRequestError) as caught:
            client_of(pipeline).chat.completions.create(model="pipeline", messages=[{"role": "user", "content": "x"}])
        assert caught.value.code == "image_missing"

    def test_a_deadline_that_is_too_short(self, client_of, describe, data_uri):
        with pytest.raises(openai.InternalServerError) as caught:
            client_of(describe).chat.completions.create(
                model="describe",
                messages=question(describe, data_uri),
                extra_headers={"X-Request-Timeout-Ms": "1"},
            )
        assert caught.value.status_code == 504
        assert caught.value.code == "deadline_exceeded"

    def test_a_wrong_key(self, client_of, launcher: Launcher):
        server = launcher.start("enhance", auth="api-key", env={"API_KEY": "right"}).wait_live()
        with pytest.raises(openai.PermissionDeniedError) as caught:
            client_of(server, key="wrong").models.list()
        assert caught.value.code == "invalid_api_key"
        client_of(server, key="right").models.list()


class TestModels:
    @pytest.mark.parametrize("prefix", ["/v1", "/openai/v1"])
    def test_are_listed_and_retrieved(self, client_of, server, prefix):
        client = client_of(server, prefix)

        (card,) = client.models.list().data

        assert card.id == server.name
        assert card.object == "model"
        assert client.models.retrieve(server.name).id == server.name
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nothing")

    def test_serve_v1_clients_too(self, server):
        with server.client() as http:
            assert http.get("/v1/models").json()["models"] == [server.name]
            card = http.get(f"/v1/models/{server.name}").json()
        assert (card["name"], card["ready"]) == (server.name, True)
