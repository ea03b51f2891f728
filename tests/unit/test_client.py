"""The small Python client against canned answers; against a real pipeline it is tested with contract D."""

from collections.abc import Callable, Iterator

import httpx
import pytest

from sightline.client import Client, RequestFailed

Answering = Callable[[httpx.Response | Exception], Client]


@pytest.fixture
def answering() -> Iterator[Answering]:
    clients: list[Client] = []

    def build(answer: httpx.Response | Exception) -> Client:
        def reply(request: httpx.Request) -> httpx.Response:
            if isinstance(answer, Exception):
                raise answer
            return answer

        client = Client("http://pipeline")
        client.close()
        client._http = httpx.Client(transport=httpx.MockTransport(reply), base_url="http://pipeline")
        clients.append(client)
        return client

    yield build
    for client in clients:
        client.close()


def events(*blocks: str) -> httpx.Response:
    return httpx.Response(200, text="".join(f"{block}\n\n" for block in blocks))


def test_events_in_their_order(answering: Answering) -> None:
    stream = events(
        'event: caption\ndata: {"caption":"a"}', 'event: enhancement.delta\ndata: {"delta":"b"}',
        'event: done\ndata: {"caption":"b","enhanced":true}',
    )  # fmt: skip
    assert list(answering(stream).watch(b"x")) == [
        ("caption", {"caption": "a"}), ("enhancement.delta", {"delta": "b"}),
        ("done", {"caption": "b", "enhanced": True}),
    ]  # fmt: skip


def test_an_error_among_them_is_raised(answering: Answering) -> None:
    stream = events('event: caption\ndata: {"caption":"a"}', 'event: error\ndata: {"detail":"Broken.","code":"c"}')
    watching = answering(stream).watch(b"x")
    assert next(watching) == ("caption", {"caption": "a"})
    with pytest.raises(RequestFailed, match="Broken") as raised:
        next(watching)
    assert raised.value.code == "c"


@pytest.mark.parametrize("ask", [lambda client: client.caption(b"x"), lambda client: list(client.watch(b"x"))])
@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (httpx.Response(400, json={"detail": "No image.", "code": "image_undecodable"}), 400, "image_undecodable"),
        (httpx.Response(502, text="<html>"), 502, None),
        (httpx.ConnectError("refused"), None, None),
    ],
    ids=["refused", "a proxy", "nobody there"],
)
def test_what_goes_wrong(
    answering: Answering,
    ask: Callable[[Client], object],
    answer: httpx.Response | Exception,
    status: int | None,
    code: str | None,
) -> None:
    with pytest.raises(RequestFailed) as raised:
        ask(answering(answer))
    assert (raised.value.status, raised.value.code) == (status, code)
