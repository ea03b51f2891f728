"""A VisionBatch as OpenAI's batch, and the calls that make it, against an API server that says what a test wants."""

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from obstore.store import MemoryStore

from sightline.errors import Unavailable
from sightline.jobs.items import Fault, Item, Line
from sightline.jobs.layout import Layout
from sightline.jobs.objects import Objects
from sightline.jobs.openai.batch import Order
from sightline.jobs.openai.cluster import ABOUT, OWNER, ClusterBackend, manifest, read
from sightline.jobs.openai.files import File
from sightline.jobs.openai.kubernetes import VisionBatches
from sightline.jobs.openai.requests import Checked, LineFault
from sightline.jobs.page import Input, Location, Outputs, Page, Target
from sightline.jobs.plan import make_plan
from sightline_operator.api import Batch

FILE = File("file-1", "a.jsonl", "batch", 10, 0.0, 1.0, Checked(3, ("/v1/chat/completions",), ("m",)))
ORDER = Order(FILE, "/v1/chat/completions", "me", "24h", 86_400, {"a": "b"})
FINGERPRINT = "0123456789ab"


def cr(state: str | None = None, order: Order = ORDER, **status: Any) -> dict[str, Any]:
    """A VisionBatch as the API server has it."""
    made = manifest("0" * 32, order, pipeline="p", ttl_seconds=60)
    made["metadata"] |= {"uid": "u-1", "creationTimestamp": "2026-11-22T00:00:00Z"}
    return made | ({} if state is None else {"status": {"state": state, **status}})


def test_what_is_made_is_a_vision_batch() -> None:
    made = manifest("0" * 32, ORDER, pipeline="p", ttl_seconds=60)
    spec = Batch.model_validate(made["spec"])
    assert spec.input.upload is not None
    assert (spec.pipeline_ref.name, spec.input.upload.file_id) == ("p", "file-1")
    assert (spec.completion_window, spec.ttl_after_finished, spec.desired_state) == ("86400s", "60s", "Running")
    assert spec.chunk_size <= spec.shard_size
    assert made["metadata"]["labels"][OWNER] == "me"
    assert orjson.loads(made["metadata"]["annotations"][ABOUT])["metadata"] == {"a": "b"}


@pytest.mark.parametrize("requests", [1, 99, 100, 5_000, 50_000])
def test_a_large_batch_is_cut_into_more_shards_than_workers(requests: int) -> None:
    file = File("file-1", "a.jsonl", "batch", 10, 0.0, 1.0, Checked(requests))
    spec = Batch.model_validate(manifest("0" * 32, Order(file, "e", "", "24h", 1), pipeline="p", ttl_seconds=1)["spec"])
    shards = -(-requests // spec.shard_size)
    assert shards <= 50
    assert requests < 1000 or shards >= 2 * spec.parallelism


@pytest.mark.parametrize(
    ("state", "wish", "status"),
    [
        (None, "Running", "validating"),
        ("Pending", "Running", "validating"),
        ("Planning", "Running", "validating"),
        ("Running", "Running", "in_progress"),
        ("Paused", "Paused", "in_progress"),
        ("Finishing", "Running", "finalizing"),
        ("Complete", "Running", "completed"),
        ("Expired", "Running", "expired"),
        ("Failed", "Running", "failed"),
        ("Running", "Cancelled", "cancelling"),
        ("Cancelled", "Cancelled", "cancelled"),
        ("Complete", "Cancelled", "completed"),
    ],
)
def test_every_state_has_its_status(state: str | None, wish: str, status: str) -> None:
    found = cr(state)
    found["spec"]["desiredState"] = wish
    assert read(found, ORDER.about()).status == status


def test_counts_tokens_and_moments_are_the_operators() -> None:
    found = cr(
        "Complete",
        progress={"total": 3, "succeeded": 2, "failed": 1, "unenhanced": 1},
        usage={"promptTokens": 7, "completionTokens": 5},
        startTime="2026-11-22T00:00:05Z",
        completionTime="2026-11-22T00:01:00Z",
    )
    told = read(found, ORDER.about()).to_json()
    assert told["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert told["usage"] == {"input_tokens": 7, "output_tokens": 5, "total_tokens": 12}
    assert (told["in_progress_at"] - told["created_at"], told["completed_at"] - told["created_at"]) == (5, 60)
    assert told["expires_at"] == told["created_at"] + 86_400
    assert (told["output_file_id"], told["error_file_id"]) == (f"file-{'0' * 32}-output", f"file-{'0' * 32}-errors")


def test_a_failure_tells_why() -> None:
    why = {"type": "Failed", "status": "True", "reason": "InvalidManifest", "message": "line 3 is no JSON"}
    faults = read(cr("Failed", conditions=[why]), ORDER.about()).to_json()["errors"]["data"]
    assert [(fault["code"], fault["message"]) for fault in faults] == [("InvalidManifest", "line 3 is no JSON")]


def test_a_bad_file_is_a_batch_that_is_never_begun() -> None:
    order = Order(FILE, "e", "me", "24h", 1, faults=(LineFault("invalid_url", "No.", 2, "url"),))
    found = cr(order=order)
    assert found["spec"]["desiredState"] == "Cancelled"
    told = read(found, order.about())
    assert (told.status, told.faults) == ("failed", order.faults)
    assert told.to_json()["failed_at"] is not None


# --- the backend -----------------------------------------------------------------------------------------------------


class Server:
    """What an API server keeps, and what it was asked."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, str]] = []
        self.tokens: list[str] = []
        self.refusal: int | None = None

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.method, request.url.path))
        self.tokens.append(request.headers["authorization"])
        if self.refusal:
            return httpx.Response(self.refusal, json={"kind": "Status", "message": "secret words of the cluster"})
        name = request.url.path.partition("/visionbatches")[2].strip("/")
        if request.method == "POST":
            made = orjson.loads(request.content)
            made["metadata"] |= {"uid": f"u-{len(self.kept)}", "creationTimestamp": "2026-11-22T00:00:00Z"}
            self.kept[made["metadata"]["name"]] = made
            return httpx.Response(201, json=made)
        if not name:
            owner = request.url.params["labelSelector"].removeprefix(f"{OWNER}=")
            mine = [each for each in self.kept.values() if each["metadata"]["labels"][OWNER] == owner]
            start = int(request.url.params.get("continue", 0))
            more = {"continue": str(start + 2)} if len(mine) > start + 2 else {}
            return httpx.Response(200, json={"items": mine[start : start + 2], "metadata": more})
        if name not in self.kept:
            return httpx.Response(404, json={})
        if request.method == "PATCH":
            self.kept[name]["spec"] |= orjson.loads(request.content)["spec"]
        return httpx.Response(200, json=self.kept[name])

    def say(self, key: str, state: str, **status: Any) -> None:
        self.kept[f"batch-{key}"]["status"] = {"state": state, **status}


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def objects() -> Objects:
    return Objects(MemoryStore())


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("first\n")
    return tmp_path


@pytest.fixture
async def backend(server: Server, objects: Objects, account: Path) -> AsyncIterator[ClusterBackend]:
    client = httpx.AsyncClient(transport=httpx.MockTransport(server.answer))
    cluster = VisionBatches("https://cluster", "vision", account, client)
    backend = ClusterBackend(cluster, objects, pipeline="p", ttl_seconds=60, clock=Clock())
    await backend.start()
    yield backend
    await backend.close()


async def test_batches_are_listed_newest_first_in_pages(backend: ClusterBackend, server: Server) -> None:
    keys = [(await backend.create(ORDER)).key for _ in range(5)]
    await backend.create(Order(FILE, "e", "you", "24h", 1))
    assert [batch.key for batch in await backend.list("me", after=None, limit=10)] == keys[::-1]
    assert [batch.key for batch in await backend.list("me", after=keys[3], limit=2)] == [keys[2], keys[1]]
    assert await backend.get(keys[0], "you") is None
    assert await backend.cancel(keys[0], "you") is None
    assert (
        "PATCH",
        "/apis/sightline.dev/v1alpha1/namespaces/vision/visionbatches/batch-" + keys[0],
    ) not in server.asked


async def test_the_token_is_read_for_every_call(backend: ClusterBackend, server: Server, account: Path) -> None:
    await backend.create(ORDER)
    (account / "token").write_text("second")
    await backend.list("me", after=None, limit=1)
    assert server.tokens == ["Bearer first", "Bearer second"]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (401, "cluster_forbidden"),
        (403, "cluster_forbidden"),
        (404, "cluster_without_batches"),
        (429, "cluster_unavailable"),
        (500, "cluster_unavailable"),
    ],
)
async def test_a_cluster_that_refuses_is_said_without_its_words(
    backend: ClusterBackend, server: Server, status: int, code: str
) -> None:
    server.refusal = status
    with pytest.raises(Unavailable) as caught:
        await backend.create(ORDER)
    assert (caught.value.code, caught.value.status) == (code, 503)
    assert "secret" not in caught.value.message
    assert "secret" in str(caught.value.__cause__)


async def test_a_batch_that_has_gone_is_none(backend: ClusterBackend, server: Server) -> None:
    batch = await backend.create(ORDER)
    server.kept.clear()
    assert await backend.get(batch.key, "me") is None
    assert await backend.cancel(batch.key, "me") is None
    assert [line async for line in backend.lines(batch, "results")] == []


async def test_an_object_with_our_label_and_no_word_of_ours_is_none_of_ours(
    backend: ClusterBackend, server: Server
) -> None:
    batch = await backend.create(ORDER)
    server.kept[f"batch-{batch.key}"]["metadata"]["annotations"] = {}
    assert await backend.get(batch.key, "me") is None
    assert await backend.list("me", after=None, limit=10) == []


async def planned(objects: Objects, uid: str, items: int, chunk_size: int) -> list[Item]:
    """A plan in the store as a worker makes it."""
    named = [Item(f"i{number}", url="/v1/chat/completions", body={"model": "m"}) for number in range(items)]
    nowhere = Location("memory://")
    page = Page(
        name="b",
        uid=uid,
        fingerprint=FINGERPRINT,
        input=Input("upload", nowhere),
        outputs=Outputs(nowhere),
        target=Target(""),
        shard_size=100,
        chunk_size=chunk_size,
    )

    async def each() -> AsyncIterator[Item]:
        for item in named:
            yield item

    await make_plan(page, objects.below("batches/"), each())
    return named


async def settled(backend: ClusterBackend, key: str) -> Mapping[str, Any]:
    """The batch when it is over; sealing goes on behind those who ask."""
    while True:
        batch = await backend.get(key, "me")
        assert batch is not None
        if batch.status in ("cancelled", "expired"):
            return batch.to_json()
        assert batch.status in ("cancelling", "finalizing")


@pytest.mark.parametrize(("state", "code"), [("Cancelled", "batch_cancelled"), ("Expired", "batch_expired")])
async def test_a_batch_that_is_cut_off_tells_of_every_request(
    backend: ClusterBackend, server: Server, objects: Objects, state: str, code: str
) -> None:
    batch = await backend.create(ORDER)
    uid = server.kept[f"batch-{batch.key}"]["metadata"]["uid"]
    items = await planned(objects, uid, 5, 2)
    layout = Layout.of("", uid, FINGERPRINT)
    fault = Fault("caption", "caption_rejected", "No.", 422, 1)
    lines = [Line(items[2], {"response": {"status_code": 200}}), Line(items[3], fault=fault)]
    await objects.create("batches/" + layout.chunk(0, 1), b"".join(line.encoded() for line in lines))
    server.say(batch.key, state, fingerprint=FINGERPRINT, progress={"total": 5, "succeeded": 1, "failed": 1})

    (listed,) = await backend.list("me", after=None, limit=1)
    assert listed.status in ("cancelling", "finalizing")
    told = await settled(backend, batch.key)
    assert told["request_counts"] == {"total": 5, "completed": 1, "failed": 4}
    seen = await backend.get(batch.key, "me")
    assert seen is not None
    errors = b"".join([line async for line in backend.lines(seen, "errors")]).splitlines()
    assert [(orjson.loads(line)["custom_id"], orjson.loads(line)["error"]["code"]) for line in errors] == [
        ("i0", code),
        ("i1", code),
        ("i3", "caption_rejected"),
        ("i4", code),
    ]
    (listed,) = await backend.list("me", after=None, limit=1)
    assert listed == seen


async def test_a_batch_whose_plan_is_broken_ends_all_the_same(
    backend: ClusterBackend, server: Server, objects: Objects
) -> None:
    batch = await backend.create(ORDER)
    uid = server.kept[f"batch-{batch.key}"]["metadata"]["uid"]
    await planned(objects, uid, 5, 2)
    for key in await objects.keys("batches/"):
        if key.endswith(".jsonl"):
            await objects.write(key, b"{")
    progress = {"total": 5, "succeeded": 0, "failed": 0}
    server.say(batch.key, "Expired", fingerprint=FINGERPRINT, progress=progress)
    assert (await settled(backend, batch.key))["request_counts"] == {"total": 5, "completed": 0, "failed": 0}


async def test_a_batch_that_was_cancelled_before_its_plan_has_no_lines(backend: ClusterBackend, server: Server) -> None:
    batch = await backend.create(ORDER)
    seen = await backend.cancel(batch.key, "me")
    assert seen is not None
    assert seen.status == "cancelling"
    server.say(batch.key, "Cancelled", fingerprint=FINGERPRINT)
    seen = await backend.cancel(batch.key, "me")
    assert seen is not None
    assert seen.to_json()["output_file_id"] is None
    assert (seen.status, [line async for line in backend.lines(seen, "errors")]) == ("cancelled", [])
    assert [method for method, _ in server.asked].count("PATCH") == 1


def test_outside_a_cluster_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(FileNotFoundError, match="KUBERNETES_SERVICE_HOST"):
        VisionBatches.inside(tmp_path)
