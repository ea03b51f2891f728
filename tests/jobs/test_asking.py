"""One item asked: what goes over the wire to each kind of target, what answers mean, what is asked again, how long."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from obstore.store import MemoryStore

from sightline import v2
from sightline.jobs.asking import Asker, RevisionMismatch, TargetRefuses, readiness, request_id
from sightline.jobs.items import Item, Line
from sightline.jobs.layout import Layout
from sightline.jobs.objects import AccessDenied, BucketMissing, Changed, Missing, Objects, StoreUnavailable, TooLarge
from sightline.jobs.pace import Pace, TargetGone
from sightline.jobs.page import Input, Location, Options, Outputs, Page, Target
from sightline.jobs.reuse import Reuse
from sightline.services.pipeline import PipelineService
from tests.jobs.pictures import picture
from tests.unit.test_pipeline_service import CAPTION, PROSE, Model, Shelf, application, at_once, settings

PLACE = Location("memory://")
PLAIN = Options()
PNG = picture(1)
ITEM = Item("a.png", "s3://b/a.png", size=len(PNG))
CAPTIONED = {"caption": "A dog.", "enhanced": False}


def page(options: Options = PLAIN, chunk_size: int = 50, **target: Any) -> Page:
    said = Target("http://target", **target)
    return Page(
        "b", "uid", "0123456789ab", Input("prefix", PLACE), Outputs(PLACE), said, options, chunk_size=chunk_size
    )


class Server:
    """Answers as it is told, the last answer again and again; an exception is a broken connection."""

    def __init__(self) -> None:
        self.answers: list[httpx.Response | Exception] = [httpx.Response(200, json=CAPTIONED)]
        self.asked: list[httpx.Request] = []
        self.by_image: dict[bytes, httpx.Response] = {}
        self.is_ready = True

    def says(self, *answers: httpx.Response | Exception | int) -> None:
        self.answers = [httpx.Response(answer) if isinstance(answer, int) else answer for answer in answers]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200 if self.is_ready else 503, json={"ok": self.is_ready})
        self.asked.append(request)
        if (answer := self.by_image.get(request.content)) is not None:
            return fresh(answer)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return fresh(answer)


def fresh(answer: httpx.Response) -> httpx.Response:
    return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


class Desk:
    """An asker with its server, on time of its own."""

    def __init__(self, server: Callable[[httpx.Request], Any]) -> None:
        self.client = httpx.AsyncClient(transport=httpx.MockTransport(server))
        self.now = 1_000_000.0
        self.slept: list[float] = []
        self.images: dict[str, bytes | Exception] = {ITEM.uri: PNG}
        self.fetches = 0
        self.patience = 300.0
        self.paces: list[Pace] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)

    async def fetch(self, item: Item) -> bytes:
        self.fetches += 1
        found = self.images[item.uri]
        if isinstance(found, Exception):
            raise found
        return found

    def asker(self, said: Page, **options: Any) -> Asker:
        pace = Pace(
            said.max_in_flight,
            readiness(said, self.client),
            patience_seconds=self.patience,
            clock=lambda: self.now,
            sleep=self.sleep,
            jitter=lambda: 0.5,
        )
        self.paces.append(pace)
        return Asker(said, self.fetch, pace, client=self.client, wall=lambda: self.now, **options)

    async def ask(self, said: Page | None = None, item: Item = ITEM) -> Line:
        return await self.asker(said or page())(item)

    async def aclose(self) -> None:
        for pace in self.paces:
            await pace.aclose()
        await self.client.aclose()


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
async def desk(server: Server) -> AsyncIterator[Desk]:
    made = Desk(server)
    yield made
    await made.aclose()


def fault_of(line: Line) -> tuple[str, str, int | None, int]:
    assert line.fault is not None
    return line.fault.step, line.fault.code, line.fault.http_status, line.fault.attempts


class TestOverTheWire:
    async def test_the_gateway_gets_the_image_as_its_body(self, desk: Desk, server: Server) -> None:
        line = await desk.ask(page(Options(enhance="Never", generation={"maxTokens": 32, "topP": 0.5})))
        (asked,) = server.asked
        assert asked.content == PNG
        assert (asked.method, asked.url.path, asked.headers["content-type"]) == ("POST", "/caption", "image/png")
        assert dict(asked.url.params) == {"use_gpt_oss": "false", "max_tokens": "32", "top_p": "0.5", "explain": "true"}
        assert orjson.loads(line.encoded()) == {"custom_id": "a.png", "uri": "s3://b/a.png", **CAPTIONED}

    async def test_it_is_told_that_there_is_no_hurry_and_how_long(self, desk: Desk, server: Server) -> None:
        await desk.ask(page(timeout_seconds=30))
        headers = server.asked[0].headers
        assert (headers["x-priority"], headers["x-request-timeout-ms"]) == ("batch", "30000")
        assert headers["x-request-id"] == request_id(page(), ITEM)
        assert re.fullmatch(r"[\w.:-]{1,128}", headers["x-request-id"]), "as our servers take it"

    async def test_an_items_own_options_win(self, desk: Desk, server: Server) -> None:
        item = replace(ITEM, body={"prompt": "What colour?", "enhance": "Always", "seed": 7})
        await desk.ask(page(Options(enhance="Never", prompt="Describe.")), item)
        assert dict(server.asked[0].url.params) == {
            "prompt": "What colour?", "use_gpt_oss": "true", "seed": "7", "explain": "true",
        }  # fmt: skip

    async def test_a_prompt_too_long_for_an_address_goes_as_a_form(self, desk: Desk, server: Server) -> None:
        await desk.ask(page(Options(prompt="日" * 8000)))
        (asked,) = server.asked
        assert asked.headers["content-type"].startswith("multipart/form-data; boundary=")
        assert ("日" * 8000).encode() in asked.content
        assert PNG in asked.content

    @pytest.mark.parametrize(("uri", "kind"), [("s3://b/x.JPG", "image/jpeg"), ("s3://b/x.txt", "image/x-unknown")])
    async def test_an_image_is_called_what_its_name_says(self, desk: Desk, server: Server, uri: str, kind: str) -> None:
        desk.images[uri] = b"hello"
        await desk.ask(item=Item("x", uri))
        assert (server.asked[0].headers["content-type"], server.asked[0].content) == (kind, b"hello")

    async def test_a_predictor_gets_v2_in_binary_form(self, desk: Desk, server: Server) -> None:
        answer = v2.InferResponse(
            "m", (v2.Tensor.of_texts("text", ["A dog."]),), {"prompt_tokens": 9, "milliseconds": 3}
        )
        request = v2.InferRequest(answer.outputs)
        server.says(httpx.Response(200, content=v2.render_response(answer, request)[0]))
        line = await desk.ask(
            page(Options(prompt="Well?", generation={"temperature": 0.0}), kind="v2", model="my model")
        )
        (asked,) = server.asked
        assert asked.url.raw_path == b"/v2/models/my%20model/infer"
        told = v2.parse_request(asked.content, asked.headers[v2.HEADER_LENGTH])
        assert [tensor.name for tensor in told.inputs] == ["image", "prompt"]
        assert told.inputs[0].elements() == (PNG,)
        assert told.parameters == {"temperature": 0.0}
        assert line.result == {
            "caption": "A dog.",
            "enhanced": False,
            "usage": {"prompt_tokens": 9, "completion_tokens": 0},
        }
        assert line.prompt_tokens == 9

    async def test_an_openai_line_goes_where_it_says_with_its_own_body(self, desk: Desk, server: Server) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
        answer = {"id": "c", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}
        server.says(httpx.Response(200, json=answer, headers={"x-request-id": "r"}))
        item = Item("r-1", url="/v1/chat/completions", body=body)
        line = await desk.ask(page(kind="openai"), item)
        assert str(server.asked[0].url) == "http://target/v1/chat/completions"
        assert orjson.loads(server.asked[0].content) == body
        told = {"custom_id": "r-1", "response": {"status_code": 200, "request_id": "r", "body": answer}}
        assert orjson.loads(line.encoded()) == told
        assert (line.prompt_tokens, line.completion_tokens) == (3, 5)
        assert desk.fetches == 0

    @pytest.mark.parametrize(
        "url", ["http://elsewhere/v1/x", "//elsewhere/v1/x", "/internal/batches", "/v1/../metrics"]
    )
    async def test_an_openai_line_goes_nowhere_else(self, desk: Desk, server: Server, url: str) -> None:
        line = await desk.ask(page(kind="openai"), Item("r-1", url=url, body={"model": "m"}))
        assert fault_of(line) == ("caption", "caption_rejected", None, 1)
        assert server.asked == []


class TestKeys:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        file = tmp_path / "api-keys"
        file.write_text("first\nsecond\n")
        return file

    async def test_the_first_key_of_the_file_is_shown(self, desk: Desk, server: Server, file: Path) -> None:
        await desk.ask(page(api_key_file=file))
        await desk.ask(page(api_key_file=file, kind="openai"), Item("r", url="/v1/embeddings", body={"model": "m"}))
        assert server.asked[0].headers["x-api-key"] == "first"
        assert server.asked[1].headers["authorization"] == "Bearer first"

    async def test_a_key_that_was_changed_is_read_again(self, desk: Desk, server: Server, file: Path) -> None:
        asker = desk.asker(page(api_key_file=file))
        file.write_text("third\n")
        server.says(
            httpx.Response(403, json={"detail": "Invalid", "code": "invalid_api_key"}),
            httpx.Response(200, json=CAPTIONED),
        )
        assert (await asker(ITEM)).fault is None
        assert [asked.headers["x-api-key"] for asked in server.asked] == ["first", "third"]

    @pytest.mark.parametrize("answer", [httpx.Response(401), httpx.Response(403, json={"code": "invalid_api_key"})])
    async def test_keys_that_are_refused_are_no_items_fault(
        self, desk: Desk, server: Server, file: Path, answer: httpx.Response
    ) -> None:
        server.says(answer)
        with pytest.raises(TargetRefuses):
            await desk.ask(page(api_key_file=file))

    async def test_a_403_to_one_item_of_many_is_its_own(self, desk: Desk, server: Server) -> None:
        server.says(httpx.Response(200, json=CAPTIONED), httpx.Response(403, text="forbidden words"))
        asker = desk.asker(page())
        assert (await asker(ITEM)).fault is None
        assert fault_of(await asker(ITEM)) == ("caption", "caption_rejected", 403, 1)

    def test_a_file_without_a_key(self, desk: Desk, tmp_path: Path) -> None:
        (tmp_path / "empty").write_text("\n")
        for name in ("empty", "absent"):
            with pytest.raises(TargetRefuses):
                desk.asker(page(api_key_file=tmp_path / name))


class TestRevision:
    async def test_another_than_the_batchs_ends_it(self, desk: Desk, server: Server) -> None:
        server.says(httpx.Response(200, json=CAPTIONED, headers={"x-pipeline-revision": "two"}))
        with pytest.raises(RevisionMismatch, match="two"):
            await desk.ask(page(revision="one"))

    async def test_so_does_an_error_of_another(self, desk: Desk, server: Server) -> None:
        server.says(httpx.Response(422, json={"code": "x"}, headers={"x-pipeline-revision": "two"}))
        with pytest.raises(RevisionMismatch):
            await desk.ask(page(revision="one"))

    @pytest.mark.parametrize("headers", [{}, {"x-pipeline-revision": "one"}])
    async def test_the_same_or_none_does_not(self, desk: Desk, server: Server, headers: dict[str, str]) -> None:
        server.says(httpx.Response(200, json=CAPTIONED, headers=headers))
        assert (await desk.ask(page(revision="one"))).fault is None


class TestAnswers:
    async def test_a_result_says_what_does_not_change_and_its_tokens(self, desk: Desk, server: Server) -> None:
        steps = [
            {"name": "caption", "model": "m", "milliseconds": 12.5, "prompt_tokens": 19, "completion_tokens": 7},
            {"name": "enhance", "model": "n", "milliseconds": 3.5, "prompt_tokens": 40, "completion_tokens": 30},
        ]
        said = {
            "caption": "Prose.",
            "original_caption": "A dog.",
            "enhanced": True,
            "truncated": True,
            "added_terms": [],
        }
        server.says(httpx.Response(200, json=said | {"steps": steps, "processing_time": 0.7}))
        line = await desk.ask()
        assert line.result == {
            "caption": "Prose.",
            "original_caption": "A dog.",
            "enhanced": True,
            "truncated": True,
            "usage": {"prompt_tokens": 59, "completion_tokens": 37},
        }

    async def test_a_caption_whose_enhancement_failed_is_a_success_that_says_so(
        self, desk: Desk, server: Server
    ) -> None:
        error = {"code": "enhancer_timeout", "message": "Too late."}
        server.says(httpx.Response(200, json=CAPTIONED | {"enhancement_error": error}))
        line = await desk.ask()
        assert line.is_unenhanced
        assert line.result == CAPTIONED | {"enhance_error": error}

    @pytest.mark.parametrize(
        ("status", "code", "said"),
        [
            (400, "image_undecodable", ("decode", "decode_failed")),
            (400, "image_truncated", ("decode", "decode_failed")),
            (400, "image_format_unsupported", ("decode", "unsupported_media")),
            (413, "image_too_many_pixels", ("decode", "input_too_large")),
            (413, None, ("decode", "input_too_large")),
            (415, None, ("decode", "unsupported_media")),
            (422, "invalid_parameter", ("caption", "caption_rejected")),
            (400, "content_refused", ("caption", "content_filter")),
            (404, "some_code", ("caption", "caption_rejected")),
        ],
    )
    async def test_a_refusal_of_the_item_is_final(
        self, desk: Desk, server: Server, status: int, code: str | None, said: tuple[str, str]
    ) -> None:
        server.says(httpx.Response(status, json={"detail": "No.", "code": code}))
        line = await desk.ask()
        assert fault_of(line) == (*said, status, 1)
        assert len(server.asked) == 1

    async def test_the_targets_words_are_told_short_and_on_one_line(self, desk: Desk, server: Server) -> None:
        server.says(httpx.Response(422, json={"error": {"message": "No\nsuch" + "x" * 1000, "code": "y"}}))
        line = await desk.ask()
        assert line.fault is not None
        assert line.fault.message.startswith("No suchxxx")
        assert len(line.fault.message) == 300

    @pytest.mark.parametrize("body", [b"not json", b"[]", b'{"caption": 3}', b"{}"])
    async def test_an_answer_that_is_none_is_asked_again_and_then_told(
        self, desk: Desk, server: Server, body: bytes
    ) -> None:
        server.says(httpx.Response(200, content=body))
        assert fault_of(await desk.ask()) == ("caption", "internal", 200, 3)


class TestAgain:
    @pytest.mark.parametrize("status", [408, 409, 425, 500, 501, 502, 504, 507])
    async def test_an_error_that_may_pass_is_asked_again(self, desk: Desk, server: Server, status: int) -> None:
        server.says(httpx.Response(status, json={"code": "some_code"}), httpx.Response(200, json=CAPTIONED))
        assert (await desk.ask()).fault is None
        assert len(server.asked) == 2

    @pytest.mark.parametrize(
        ("status", "code"), [(500, "internal"), (504, "caption_timeout"), (507, "caption_rejected")]
    )
    async def test_as_often_as_the_page_allows(self, desk: Desk, server: Server, status: int, code: str) -> None:
        server.says(httpx.Response(status, json={"code": "some_code"}))
        line = await desk.ask(replace(page(), max_attempts=4))
        assert fault_of(line) == ("caption", code, status, 4)
        assert len(server.asked) == 4
        assert line.fault is not None
        assert line.fault.last_at - line.fault.first_at == pytest.approx(sum(desk.slept))

    async def test_a_strict_enhancement_that_failed_is_a_fault_of_enhancing(self, desk: Desk, server: Server) -> None:
        server.says(httpx.Response(503, json={"detail": "Away.", "code": "enhancer_unavailable"}))
        assert fault_of(await desk.ask()) == ("enhance", "enhance_unavailable", 503, 3)

    @pytest.mark.parametrize("is_date", [False, True])
    async def test_retry_after_is_kept(self, desk: Desk, server: Server, is_date: bool) -> None:
        given = format_datetime(datetime.now(UTC) + timedelta(seconds=50), usegmt=True) if is_date else "50"
        server.says(httpx.Response(500, headers={"retry-after": given}), httpx.Response(200, json=CAPTIONED))
        await desk.ask()
        assert 20 < desk.slept[0] < 70

    async def test_busy_is_no_attempt_however_often(self, desk: Desk, server: Server) -> None:
        server.says(*[429] * 20, httpx.Response(200, json=CAPTIONED))
        assert (await desk.ask(replace(page(), max_attempts=1))).fault is None

    async def test_an_outage_is_waited_out(self, desk: Desk, server: Server) -> None:
        server.is_ready = False
        server.says(httpx.ConnectError("refused"))
        task = asyncio.create_task(desk.ask(replace(page(), max_attempts=1)))
        while desk.now < 1_000_200:
            await asyncio.sleep(0)
        asked = len(server.asked)
        assert asked <= 3, "nobody asks while the target is not ready"
        server.says(httpx.Response(200, json=CAPTIONED))
        server.is_ready = True
        assert (await task).fault is None

    async def test_for_as_long_as_patience_lasts(self, desk: Desk, server: Server) -> None:
        server.is_ready = False
        server.says(503)
        with pytest.raises(TargetGone):
            await desk.ask()

    @pytest.mark.parametrize("refusal", [503, httpx.ReadError("cut"), httpx.RemoteProtocolError("gone"), 502])
    async def test_a_target_that_works_but_never_for_this_item(
        self, desk: Desk, server: Server, refusal: Exception | int
    ) -> None:
        """It says that it is ready again and again: this item is what breaks it."""
        server.says(refusal)
        line = await desk.ask()
        assert line.fault is not None
        assert (line.fault.step, line.fault.code, line.fault.attempts) == ("caption", "caption_unavailable", 3)
        assert len(server.asked) > 3

    async def test_an_item_that_nobody_answers_in_time_while_others_are_answered(
        self, desk: Desk, server: Server
    ) -> None:
        slow = picture(2)
        desk.images["s3://b/slow.png"] = slow

        async def answer(request: httpx.Request) -> httpx.Response:
            if request.method == "POST" and request.content == slow:
                for _ in range(50):
                    await asyncio.sleep(0)
                raise httpx.ReadTimeout("slow")
            await asyncio.sleep(0)
            return server(request)

        other = Desk(answer)
        other.images = desk.images
        asker = other.asker(page())
        task = asyncio.create_task(asker(Item("slow", "s3://b/slow.png")))
        while not task.done():
            assert (await asker(ITEM)).fault is None
        assert fault_of(await task) == ("caption", "caption_timeout", None, 3)
        await other.aclose()


class TestImages:
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (Missing("x"), "input_not_found"),
            (Changed("x"), "input_changed"),
            (TooLarge("x"), "input_too_large"),
            (AccessDenied("x"), "input_not_found"),
            (BucketMissing("x"), "input_not_found"),
            (ValueError("x"), "unsupported_media"),
        ],
    )
    async def test_one_that_cannot_be_had_is_an_error_of_its_item(
        self, desk: Desk, server: Server, error: Exception, code: str
    ) -> None:
        desk.images[ITEM.uri] = error
        assert fault_of(await desk.ask()) == ("fetch", code, None, 1)
        assert server.asked == []

    async def test_one_that_is_too_large_is_not_fetched(self, desk: Desk) -> None:
        line = await desk.ask(item=replace(ITEM, size=21 * 1024 * 1024))
        assert fault_of(line) == ("fetch", "input_too_large", None, 1)
        assert desk.fetches == 0

    async def test_a_store_that_is_away_is_waited_for(self, desk: Desk) -> None:
        desk.images[ITEM.uri] = StoreUnavailable("away")
        task = asyncio.create_task(desk.ask())
        while desk.now < 1_000_100:
            await asyncio.sleep(0)
        desk.images[ITEM.uri] = PNG
        assert (await task).fault is None

    async def test_for_as_long_as_patience_lasts(self, desk: Desk) -> None:
        desk.images[ITEM.uri] = StoreUnavailable("away")
        with pytest.raises(StoreUnavailable):
            await desk.ask()

    async def test_a_store_that_gives_nobody_anything_ends_the_work_before_a_chunk_is_full(self, desk: Desk) -> None:
        desk.images[ITEM.uri] = AccessDenied("no")
        asker = desk.asker(page(chunk_size=5))
        for _ in range(4):
            assert (await asker(ITEM)).fault is not None
        with pytest.raises(AccessDenied):
            await asker(ITEM)

    async def test_one_that_gave_something_does_not(self, desk: Desk) -> None:
        asker = desk.asker(page(chunk_size=5))
        await asker(ITEM)
        desk.images[ITEM.uri] = AccessDenied("no")
        for _ in range(40):
            assert (await asker(ITEM)).fault is not None

    async def test_what_is_counted_is_what_was_planned(self, desk: Desk) -> None:
        assert (await desk.ask(item=replace(ITEM, size=None))).size == 0
        assert (await desk.ask()).size == len(PNG)


class TestReuse:
    @pytest.fixture
    def objects(self) -> Objects:
        return Objects(MemoryStore())

    @pytest.fixture
    def asker(self, desk: Desk, objects: Objects) -> Callable[..., Asker]:
        def asker(said: Page | None = None) -> Asker:
            return desk.asker(said or page(), reuse=Reuse(objects, Layout("r/")))

        return asker

    async def test_the_same_bytes_are_asked_once_and_every_item_has_its_line(
        self, server: Server, asker: Callable[..., Asker]
    ) -> None:
        one = asker()
        lines = await asyncio.gather(*(one(replace(ITEM, custom_id=f"i{number}")) for number in range(20)))
        assert len(server.asked) == 1
        assert [line.item.custom_id for line in lines] == [f"i{number}" for number in range(20)]
        assert {line.result["caption"] for line in lines if line.result} == {"A dog."}

    async def test_by_other_workers_too(self, server: Server, asker: Callable[..., Asker]) -> None:
        first = await asker()(ITEM)
        assert (await asker()(ITEM)).encoded() == first.encoded()
        assert len(server.asked) == 1

    @pytest.mark.parametrize(
        "other",
        [page(Options(prompt="Else?")), page(Options(enhance="Never")), page(revision="two"), page(kind="openai")],
    )
    async def test_another_question_or_revision_is_another_content(
        self, server: Server, asker: Callable[..., Asker], other: Page
    ) -> None:
        await asker()(ITEM)
        await asker(other)(ITEM)
        assert len(server.asked) == 2

    async def test_other_bytes_too(self, desk: Desk, server: Server, asker: Callable[..., Asker]) -> None:
        one = asker()
        await one(ITEM)
        desk.images[ITEM.uri] = picture(2)
        await one(ITEM)
        assert len(server.asked) == 2

    @pytest.mark.parametrize(
        "poor",
        [
            httpx.Response(422, json={"code": "x"}),
            httpx.Response(200, json=CAPTIONED | {"enhancement_error": {"code": "c", "message": "m"}}),
        ],
    )
    async def test_what_may_come_out_better_is_not_kept(
        self, server: Server, asker: Callable[..., Asker], poor: httpx.Response
    ) -> None:
        server.says(poor, httpx.Response(200, json=CAPTIONED))
        one = asker()
        await one(ITEM)
        line = await one(ITEM)
        assert line.result == CAPTIONED
        assert len(server.asked) == 2

    async def test_half_a_result_in_the_store_is_none(
        self, server: Server, objects: Objects, asker: Callable[..., Asker]
    ) -> None:
        await asker()(ITEM)
        (key,) = await objects.keys("r/cache/")
        await objects.write(key, b'{"result"')
        assert (await asker()(ITEM)).result == CAPTIONED
        assert len(server.asked) == 2

    async def test_an_item_whose_twin_was_cancelled_asks_itself(self, desk: Desk, objects: Objects) -> None:
        begun, go = asyncio.Event(), asyncio.Event()

        async def answer(_: httpx.Request) -> httpx.Response:
            begun.set()
            await go.wait()
            return httpx.Response(200, json=CAPTIONED)

        slow = Desk(answer)
        asker = slow.asker(page(), reuse=Reuse(objects, Layout("r/")))
        first = asyncio.create_task(asker(ITEM))
        await begun.wait()
        second = asyncio.create_task(asker(replace(ITEM, custom_id="b")))
        await asyncio.sleep(0)
        first.cancel()
        go.set()
        assert (await second).result == CAPTIONED
        await slow.aclose()


@pytest.fixture
async def gateway() -> AsyncIterator[tuple[Page, Callable[..., Any]]]:
    """The gateway's own code behind its routes, with models that answer at once."""
    describe, enhance = Model("describe", CAPTION), Model("enhance", PROSE, image_tokens=0)
    service = PipelineService(
        settings(), sources=Shelf(), caption=describe.step("caption"), enhance=enhance.step("enhance"), sleep=at_once
    )
    client = httpx.AsyncClient(transport=httpx.ASGITransport(application(service)))

    async def ask(options: Options, image: bytes = PNG) -> Line:
        said = page(options)
        pace = Pace(4, readiness(said, client))

        async def fetch(_: Item) -> bytes:
            return image

        try:
            return await Asker(said, fetch, pace, client=client)(ITEM)
        finally:
            await pace.aclose()

    yield page(), ask
    await client.aclose()
    await service.close()


class TestTheRealGateway:
    async def test_it_captions_and_enhances_and_says_its_tokens(self, gateway: Any) -> None:
        line = await gateway[1](Options())
        assert line.result == {
            "caption": PROSE,
            "original_caption": CAPTION,
            "enhanced": True,
            "usage": {"prompt_tokens": 38, "completion_tokens": 14},
        }

    async def test_or_does_not(self, gateway: Any) -> None:
        line = await gateway[1](Options(enhance="Never", generation={"maxTokens": 16, "temperature": 0.0}))
        assert line.result == {
            "caption": CAPTION,
            "enhanced": False,
            "usage": {"prompt_tokens": 19, "completion_tokens": 7},
        }

    async def test_a_long_prompt_arrives(self, gateway: Any) -> None:
        line = await gateway[1](Options(prompt="日" * 8000, enhance="Never", generation={"maxTokens": 16}))
        assert line.result["caption"] == CAPTION

    @pytest.mark.parametrize(
        ("image", "said"),
        [
            (b"hello", ("decode", "decode_failed")),
            (PNG[:40], ("decode", "decode_failed")),
            (b"%PDF-1.7 hello", ("decode", "unsupported_media")),
            (b"", ("decode", "decode_failed")),
        ],
    )
    async def test_what_is_no_image_is_told(self, gateway: Any, image: bytes, said: tuple[str, str]) -> None:
        assert fault_of(await gateway[1](Options(), image))[:2] == said

    async def test_a_parameter_out_of_range_is_rejected(self, gateway: Any) -> None:
        line = await gateway[1](Options(generation={"temperature": 9.0}))
        assert fault_of(line) == ("caption", "caption_rejected", 422, 1)

    async def test_it_says_when_it_is_ready(self, gateway: Any) -> None:
        """`/health` of the gateway is what an outage waits for."""
        asked = readiness(gateway[0], gateway[1].__closure__[0].cell_contents)
        assert await asked()
