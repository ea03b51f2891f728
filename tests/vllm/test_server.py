"""Servers on vLLM end to end: the texts of `hf` by V2 and OpenAI, the bound on what waits, and every way to end."""

import base64
import json
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from sightline.models.gpt_oss.model import GptOss
from sightline.settings import EnhanceSettings
from sightline.wire import Sampling, Turn
from tests.conftest import Server
from tests.scenes import RED_CIRCLE, red_circle
from tests.vllm.conftest import children, wait_gone, wait_ready, wait_until

pytestmark = pytest.mark.vllm

CACHE = ["--engine", "vllm", "--vllm-cache-gib", "0.25"]


@pytest.fixture(scope="module")
def server(serve) -> Server:
    return wait_ready(serve("describe", "--queue-size", "6", *CACHE))


def image() -> str:
    return base64.b64encode(red_circle()).decode()


def ask(client: httpx.Client, model: str, tensor: str, value: str, **parameters: object) -> httpx.Response:
    body = {
        "inputs": [{"name": tensor, "datatype": "BYTES", "shape": [1], "data": [value]}],
        "parameters": parameters,
    }
    return client.post(f"/v2/models/{model}/infer", json=body)


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["outputs"][0]["data"][0]


def test_the_metadata_tells_the_engine(server: Server) -> None:
    with server.client() as client:
        assert '"vllm"' in client.get("/v2/models/describe").text


def test_a_picture_is_described(server: Server) -> None:
    with server.client() as client:
        answer = ask(client, "describe", "image", image())

    assert text(answer) == RED_CIRCLE
    assert answer.json()["parameters"]["image_tokens"] > 0


def test_openai_streams_the_same_text(server: Server) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + image()}}
    body = {"model": "describe", "messages": [{"role": "user", "content": [part]}], "stream": True}
    pieces = []
    with server.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                pieces += [choice["delta"].get("content") or "" for choice in json.loads(line[6:])["choices"]]

    assert "".join(pieces) == RED_CIRCLE
    assert sum(map(bool, pieces)) > 1


def test_more_than_may_wait_is_429(server: Server) -> None:
    def one(index: int) -> httpx.Response:
        with server.client() as client:
            return ask(client, "describe", "image", image(), max_tokens=2048, temperature=2.0, seed=index)

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(one, range(24)))

    assert {answer.status_code for answer in answers} == {200, 429}
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)


def test_a_deadline_is_504_and_the_next_request_is_answered(server: Server) -> None:
    with server.client(headers={"X-Request-Timeout-Ms": "1"}) as client:
        late = ask(client, "describe", "image", image())
    with server.client() as client:
        answer = ask(client, "describe", "image", image())

    assert late.status_code == 504
    assert text(answer) == RED_CIRCLE


def test_an_engine_that_ends_takes_the_server_with_it(server: Server) -> None:
    """The last with this server. Whoever runs it starts it again: nothing in it can bring an engine back."""
    processes = children(server.process.pid)
    engines = [child for child in processes if "resource_tracker" not in " ".join(child.cmdline())]
    assert engines, [child.cmdline() for child in processes]

    for engine in engines:
        engine.kill()

    wait_until(lambda: not server.is_ready(), server)
    assert server.process.wait(120) == 1
    assert "the vLLM engine's process has ended" in server.log()
    wait_gone(processes)


def test_captions_are_enhanced_as_hf_does_it_and_sigterm_ends_the_server_with_its_engine(serve) -> None:
    model = GptOss(EnhanceSettings(auth="off"))
    captions = [RED_CIRCLE, "a small blue star above a large green square on a black background"]
    wanted: list[tuple[str | None, int]] = []
    for caption in captions:
        (made,) = model.generate(
            [model.preprocess([Turn("user", (caption,))], "low")], Sampling(max_tokens=1024), lambda index: False
        )
        wanted.append((model.postprocess(made)[0], len(made.token_ids)))
    server = wait_ready(serve("enhance", *CACHE))

    with server.client() as client:
        answers = [ask(client, "enhance", "text", caption) for caption in captions]
    processes = children(server.process.pid)
    server.process.send_signal(signal.SIGTERM)

    assert [(text(item), item.json()["parameters"]["completion_tokens"]) for item in answers] == wanted
    assert processes
    assert server.process.wait(120) == 0, server.log()[-3000:]
    wait_gone(processes)


def test_sigterm_while_the_engine_loads(serve) -> None:
    server = serve("enhance", *CACHE)
    wait_until(lambda: bool(children(server.process.pid)) or server.process.poll() is not None, server)
    processes = children(server.process.pid)

    server.process.send_signal(signal.SIGTERM)

    assert server.process.wait(120) == 0, server.log()[-3000:]
    wait_gone(processes)
