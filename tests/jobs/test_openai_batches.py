"""OpenAI's files and batches on a gateway, as OpenAI's own client sees them."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import openai
import pytest

from sightline.server import openai_batches
from tests.jobs import pictures
from tests.jobs.openai_gateway import (
    ENDPOINT,
    KEYS,
    Gateway,
    album,
    ended,
    jsonl,
    request,
    rows,
    running_gateway,
    submit,
    until,
)
from tests.jobs.stub import Stub, running_stub

_UNUSED = iter(KEYS[2:])


@pytest.fixture(scope="module")
def shared_stub() -> Iterator[Stub]:
    with running_stub() as stub:
        yield stub


@pytest.fixture(scope="module")
def shared_gateway(shared_stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_gateway(shared_stub.url, f"file://{tmp_path_factory.mktemp('store')}") as gateway:
        yield gateway


@pytest.fixture
def stub(shared_stub: Stub) -> Stub:
    """As new: quick, and nobody has asked it."""
    shared_stub.delay_seconds, shared_stub.asks, shared_stub.given = 0.0, 0, 0
    shared_stub.answered.clear()
    shared_stub.refused.clear()
    return shared_stub


@pytest.fixture
def store(tmp_path: Path) -> str:
    """Of gateways of a test's own."""
    return f"file://{tmp_path / 'store'}"


@pytest.fixture
def client(shared_gateway: Gateway, stub: Stub) -> Iterator[openai.OpenAI]:
    """With a key of the test's own, for which there is nothing yet."""
    with shared_gateway.client(next(_UNUSED)) as client:
        yield client


# --- a batch ---------------------------------------------------------------------------------------------------------


def test_every_request_is_answered_once_and_failures_lie_apart(client: openai.OpenAI, stub: Stub) -> None:
    requests = album(25, {3: "422", 11: "text"})
    batch = submit(client, requests, metadata={"album": "holidays"})
    assert (batch.status, batch.object, batch.endpoint) == ("validating", "batch", ENDPOINT)
    assert batch.expires_at == batch.created_at + 86_400
    assert batch.output_file_id is None

    batch = ended(client, batch)
    assert (batch.status, batch.metadata, batch.errors) == ("completed", {"album": "holidays"}, None)
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 25, "completed": 23, "failed": 2}
    assert batch.completed_at is not None
    assert batch.created_at <= (batch.in_progress_at or 0) <= (batch.finalizing_at or 0) <= batch.completed_at

    answers = rows(client, batch.output_file_id)
    assert [row["custom_id"] for row in answers] == [f"i{number}" for number in range(25) if number not in (3, 11)]
    for row in answers:
        assert row.keys() == {"id", "custom_id", "response", "error"}
        body = row["response"]["body"]
        caption = pictures.caption_of(pictures.picture(int(row["custom_id"][1:])))
        assert body["choices"][0]["message"]["content"].startswith(caption)
        assert (row["response"]["status_code"], row["error"], body["object"]) == (200, None, "chat.completion")
    assert len({row["id"] for row in answers}) == len({row["response"]["request_id"] for row in answers}) == 23

    errors = {row["custom_id"]: row for row in rows(client, batch.error_file_id)}
    assert errors.keys() == {"i3", "i11"}
    assert errors["i11"]["response"]["status_code"] == 400
    assert (errors["i11"]["error"]["code"], errors["i11"]["error"]["step"]) == ("decode_failed", "decode")
    assert max(stub.answered.values()) == 1


def test_answers_are_those_of_the_same_requests_asked_one_by_one(client: openai.OpenAI) -> None:
    body = request("a", pictures.picture(1), temperature=0)["body"]
    alone = client.chat.completions.create(**body).to_dict()
    (row,) = rows(
        client, ended(client, submit(client, [request("a", pictures.picture(1), temperature=0)])).output_file_id
    )
    changing = {"id", "created"}
    assert {k: v for k, v in row["response"]["body"].items() if k not in changing} == {
        k: v for k, v in alone.items() if k not in changing
    }


def test_output_files_are_files(client: openai.OpenAI) -> None:
    batch = ended(client, submit(client, album(3, {0: "422"})))
    assert batch.output_file_id is not None
    assert batch.error_file_id is not None
    output, error = client.files.retrieve(batch.output_file_id), client.files.retrieve(batch.error_file_id)
    assert (output.purpose, output.object, output.status) == ("batch_output", "file", "processed")
    assert output.bytes == len(client.files.content(output.id).read())
    assert output.expires_at == output.created_at + 30 * 86_400
    assert output.filename != error.filename
    assert [file.id for file in client.files.list(purpose="batch_output")] == [output.id, error.id]
    with pytest.raises(openai.BadRequestError, match="stays until it expires"):
        client.files.delete(output.id)


def test_a_file_serves_two_batches(client: openai.OpenAI) -> None:
    file = client.files.create(file=("a.jsonl", jsonl(album(2))), purpose="batch")
    made = [client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h") for _ in range(2)]
    outputs = [rows(client, ended(client, batch).output_file_id) for batch in made]
    assert [[row["custom_id"] for row in output] for output in outputs] == [["i0", "i1"]] * 2
    assert outputs[0][0]["id"] != outputs[1][0]["id"]


def test_the_routes_lie_below_openai_too(shared_gateway: Gateway, stub: Stub) -> None:
    with shared_gateway.client("one") as client, shared_gateway.http("one") as http:
        batch = ended(client, submit(client, album(1)))
        assert http.get(f"/openai/v1/batches/{batch.id}").json()["status"] == "completed"
        lines = http.get(f"/openai/v1/files/{batch.output_file_id}/content").text
        assert json.loads(lines)["custom_id"] == "i0"


# --- whose it is -----------------------------------------------------------------------------------------------------


def test_to_another_key_none_of_it_exists(shared_gateway: Gateway, stub: Stub) -> None:
    with shared_gateway.client(next(_UNUSED)) as mine, shared_gateway.client(next(_UNUSED)) as yours:
        file = mine.files.create(file=("a.jsonl", jsonl(album(1))), purpose="batch")
        batch = ended(mine, mine.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h"))
        assert batch.output_file_id is not None
        assert list(yours.files.list()) == list(yours.batches.list()) == []
        for ask in (
            lambda: yours.files.retrieve(file.id),
            lambda: yours.files.content(file.id),
            lambda: yours.files.delete(file.id),
            lambda: yours.batches.retrieve(batch.id),
            lambda: yours.batches.cancel(batch.id),
            lambda: yours.files.retrieve(batch.output_file_id or ""),
            lambda: yours.files.content(batch.output_file_id or ""),
        ):
            with pytest.raises(openai.NotFoundError):
                ask()
        with pytest.raises(openai.BadRequestError, match="no such file"):
            yours.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
        assert [each.id for each in mine.files.list()] == [file.id]


def test_without_a_key_nothing_is_answered(shared_gateway: Gateway) -> None:
    with shared_gateway.client("three") as nobody:
        for ask in (nobody.files.list, nobody.batches.list, lambda: submit(nobody, album(1))):
            with pytest.raises(openai.PermissionDeniedError):
                ask()


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_comes_back_until_it_is_deleted(client: openai.OpenAI) -> None:
    content = jsonl(album(3))
    file = client.files.create(
        file=("three.jsonl", content),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (file.bytes, file.filename, file.purpose, file.status) == (len(content), "three.jsonl", "batch", "processed")
    assert file.expires_at == file.created_at + 3600
    assert client.files.retrieve(file.id) == file
    with client.files.with_streaming_response.content(file.id) as answer:
        assert answer.headers["content-length"] == str(len(content))
        assert b"".join(answer.iter_bytes()) == content
    assert client.files.delete(file.id).deleted
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(file.id)


def test_lists_come_in_pages(client: openai.OpenAI) -> None:
    files = [client.files.create(file=(f"{n}.jsonl", jsonl(album(1))), purpose="batch").id for n in range(5)]
    assert [file.id for file in client.files.list(limit=2)] == files[::-1]  # the client turns the pages
    assert [file.id for file in client.files.list(limit=2, order="asc")] == files
    assert list(client.files.list(purpose="vision")) == []
    batches = [
        client.batches.create(input_file_id=file, endpoint=ENDPOINT, completion_window="24h").id for file in files[:3]
    ]
    assert [batch.id for batch in client.batches.list(limit=1)] == batches[::-1]
    page = client.batches.list(limit=2)
    assert ([batch.id for batch in page.data], page.has_more) == (batches[:0:-1], True)


def test_outputs_come_in_pages_too(client: openai.OpenAI) -> None:
    batches = [ended(client, submit(client, album(2, {1: "422"}))) for _ in range(3)]
    wanted = [file for batch in batches[::-1] for file in (batch.output_file_id, batch.error_file_id)]
    for limit in (1, 2, 3, 10):
        assert [file.id for file in client.files.list(purpose="batch_output", limit=limit)] == wanted


def test_a_batch_whose_file_is_no_good_fails_and_says_where(client: openai.OpenAI, stub: Stub) -> None:
    good = request("a", pictures.picture(1))
    file = client.files.create(file=("bad.jsonl", jsonl([good, good, {"custom_id": "b"}]) + b"{"), purpose="batch")
    assert (file.status, file.status_details) == ("error", "Line 2: Another line has the same custom_id.")
    batch = ended(client, client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h"))
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert batch.errors is not None
    assert [(fault.code, fault.line, fault.param) for fault in batch.errors.data or ()] == [
        ("duplicate_custom_id", 2, "custom_id"),
        ("invalid_method", 3, "method"),
        ("invalid_json_line", 4, None),
    ]
    assert not stub.asks


def test_a_model_that_nobody_serves_costs_nothing(client: openai.OpenAI, stub: Stub) -> None:
    batch = ended(client, submit(client, [request("a", pictures.picture(1), model="gpt-6-astra")]))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [fault.code for fault in batch.errors.data or ()] == ["model_not_found"]
    assert not stub.asks


def test_a_file_may_be_deleted_while_its_batch_begins(client: openai.OpenAI) -> None:
    file = client.files.create(file=("a.jsonl", jsonl(album(2))), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
    client.files.delete(file.id)
    batch = ended(client, batch)
    # Whoever was faster: it has its requests, or it says that it has none.
    if batch.status == "failed":
        assert batch.errors is not None
        assert [fault.code for fault in batch.errors.data or ()] == ["InputNotFound"]
    else:
        assert len(rows(client, batch.output_file_id)) == 2


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "30s"}, "completion_window"),
        ({"completion_window": "15d"}, "completion_window"),
        ({"input_file_id": "file-1"}, "input_file_id"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after.anchor"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(client: openai.OpenAI, options: dict[str, object], param: str) -> None:
    file = client.files.create(file=("a.jsonl", jsonl(album(1))), purpose="batch")
    said = {"input_file_id": file.id, "endpoint": ENDPOINT, "completion_window": "24h", **options}
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(**said)  # type: ignore[arg-type]
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert list(client.batches.list()) == []


def test_a_wrong_upload_is_refused_and_leaves_nothing(stub: Stub, store: str, tmp_path: Path) -> None:
    file = ("a.jsonl", jsonl(album(1)))
    with running_gateway(stub.url, store) as gateway, gateway.http() as http:
        for answer, code in (
            (http.post("/v1/files", files={"file": file}, data={"purpose": "fine-tune"}), "invalid_value"),
            (http.post("/v1/files", files={"file": file}), "invalid_value"),
            (http.post("/v1/files", data={"purpose": "batch"}, files={"other": b""}), "file_missing"),
            (http.post("/v1/files", json={"purpose": "batch"}), "invalid_form"),
            (http.post("/v1/files", files=[("file", file)] * 2, data={"purpose": "batch"}), "too_many_parts"),
            (
                http.post(
                    "/v1/files",
                    files={"file": file},
                    data={"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "1"},
                ),
                "invalid_value",
            ),
            (http.get("/v1/files?limit=0"), "invalid_value"),
            (http.get("/v1/files?order=up"), "invalid_value"),
            (http.get("/v1/batches?limit=101"), "invalid_value"),
            (http.get("/v1/batches?after=x"), "invalid_value"),
            (http.post("/v1/batches", content=b"{"), "invalid_json"),
            (http.get("/v1/batches/batch_1"), "batch_not_found"),
            (http.get("/v1/files/file-1/content"), "file_not_found"),
        ):
            assert 400 <= answer.status_code < 500
            assert answer.json()["error"]["code"] == code
        assert http.get("/v1/files").json()["data"] == []
    assert [path for path in (tmp_path / "store").rglob("file-*") if path.is_file()] == []


def test_files_have_limits_of_their_own(stub: Stub, store: str) -> None:
    limits = {"max_request_bytes": 2000, "max_upload_bytes": 20_000, "max_batch_lines": 20}
    with running_gateway(stub.url, store, **limits) as gateway, gateway.client() as client:
        batch = ended(client, submit(client, album(20)))  # more than any other request may have
        assert batch.status == "completed"
        file = client.files.create(file=("a.jsonl", jsonl(album(21))), purpose="batch")
        assert (file.status, file.status_details) == ("error", "Line 21: A file may have at most 20 requests.")
        with pytest.raises(openai.APIStatusError) as caught:
            client.files.create(file=("a.jsonl", b" " * 20_001), purpose="batch")
        assert (caught.value.status_code, caught.value.code) == (413, "file_too_large")
        with pytest.raises(openai.APIStatusError) as caught:
            client.files.create(file=("a.jsonl", b" " * 200_000), purpose="batch")
        assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")


# --- the end before the end ------------------------------------------------------------------------------------------


def told(client: openai.OpenAI, batch: openai.types.Batch) -> tuple[list[str], Counter[str]]:
    """All ids that were told of a batch, in their files' order, and how often each error code."""
    answers, errors = rows(client, batch.output_file_id), rows(client, batch.error_file_id)
    return [row["custom_id"] for row in [*answers, *errors]], Counter(row["error"]["code"] for row in errors)


def test_a_cancelled_batch_keeps_what_is_done(client: openai.OpenAI, stub: Stub) -> None:
    stub.delay_seconds = 0.05
    batch = submit(client, album(200))
    until(lambda: (client.batches.retrieve(batch.id).request_counts or batch.request_counts).completed > 5, "some")  # type: ignore[union-attr]
    seen = client.batches.cancel(batch.id)
    assert seen.status in ("cancelling", "cancelled")
    assert seen.cancelling_at is not None
    batch = ended(client, batch)
    assert (batch.status, batch.cancelled_at is not None) == ("cancelled", True)
    ids, codes = told(client, batch)
    assert sorted(ids) == sorted(f"i{number}" for number in range(200))
    assert codes.keys() == {"batch_cancelled"}
    assert batch.request_counts is not None
    assert batch.request_counts.completed > 5
    assert batch.request_counts.failed == codes["batch_cancelled"]
    assert client.batches.cancel(batch.id).status == "cancelled"


def test_a_batch_that_is_over_cannot_be_cancelled(client: openai.OpenAI) -> None:
    batch = ended(client, submit(client, album(1)))
    with pytest.raises(openai.BadRequestError, match="completed already"):
        client.batches.cancel(batch.id)


def test_what_is_not_done_in_its_window_expires(
    client: openai.OpenAI, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_batches, "SECONDS_OF_WINDOW", (1, 60))
    stub.delay_seconds = 0.1
    batch = ended(client, submit(client, album(200), completion_window="2s"))
    assert (batch.status, batch.expired_at is not None) == ("expired", True)
    ids, codes = told(client, batch)
    assert sorted(ids) == sorted(f"i{number}" for number in range(200))
    assert codes.keys() == {"batch_expired"}


# --- bad days --------------------------------------------------------------------------------------------------------


def test_an_outage_of_the_step_costs_no_request(client: openai.OpenAI, stub: Stub) -> None:
    stub.delay_seconds = 0.02
    batch = submit(client, album(60))
    until(lambda: stub.given > 10, "ten answers")
    stub.is_unavailable = True
    until(lambda: stub.refused[503] > 3, "refusals")
    stub.is_unavailable = False
    batch = ended(client, batch)
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 60, "completed": 60, "failed": 0}


def test_a_gateway_that_ends_hands_its_batches_on(stub: Stub, store: str) -> None:
    stub.delay_seconds = 0.05
    with running_gateway(stub.url, store) as first, first.client() as client:
        batch = submit(client, album(100))
        until(lambda: stub.given > 20, "twenty answers")
    assert stub.given < 100
    with running_gateway(stub.url, store) as second, second.client() as client:
        batch = ended(client, batch)
        assert batch.status == "completed"
        assert told(client, batch) == ([f"i{number}" for number in range(100)], Counter())
    assert sum(stub.answered.values()) <= 100 + 8 + 2  # what was under way when the first one ended


@contextmanager
def two_replicas(stub: Stub, store: str) -> Iterator[tuple[openai.OpenAI, openai.OpenAI]]:
    with ExitStack() as stack:
        both = [stack.enter_context(running_gateway(stub.url, store)) for _ in range(2)]
        here, there = (stack.enter_context(each.client()) for each in both)
        yield here, there


def test_any_replica_answers(stub: Stub, store: str) -> None:
    stub.delay_seconds = 0.05
    with two_replicas(stub, store) as (here, there):
        batch = submit(here, album(30))
        assert there.batches.retrieve(batch.id).id == batch.id
        assert [each.id for each in there.batches.list()] == [batch.id]
        batch = ended(there, batch)
        assert told(there, batch) == ([f"i{number}" for number in range(30)], Counter())
    assert max(stub.answered.values()) == 1


def test_a_batch_can_be_cancelled_at_a_replica_that_does_not_do_it(stub: Stub, store: str) -> None:
    stub.delay_seconds = 0.1
    with two_replicas(stub, store) as (here, there):
        batch = submit(here, album(1000))
        until(lambda: stub.given > 5, "it runs")
        assert there.batches.cancel(batch.id).status == "cancelling"
        assert ended(there, batch).status == "cancelled"


def test_while_the_store_is_away_the_gateway_says_so(stub: Stub, tmp_path: Path) -> None:
    blocked = tmp_path / "store"
    blocked.write_text("a file where a folder should be")
    with running_gateway(stub.url, f"file://{blocked}") as gateway, gateway.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.batches.list()
        assert (caught.value.status_code, caught.value.code) == (503, "store_unavailable")
        assert client.chat.completions.create(**request("a", pictures.picture(1))["body"]).choices
        blocked.unlink()

        def has_opened() -> bool:
            try:
                return client.batches.list() is not None
            except openai.InternalServerError:
                return False

        until(has_opened, "the store")
