"""OpenAI's client, the gateway, the operator and real workers over a real S3: a batch is a VisionBatch and its Jobs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from sightline_operator.observe import endpoints
from tests.jobs.openai_gateway import Gateway, album, ended, free_port, jsonl, request, rows, running_gateway, submit
from tests.jobs.openai_gateway import until as blocking_until
from tests.jobs.pictures import picture
from tests.jobs.stub import Stub, running_stub
from tests.operator.conftest import ApiServer
from tests.operator.controllers import Container, Pod, Program, Server, environment_of, kubelet
from tests.operator.harness import User, connected, operating, pipeline, until
from tests.operator.live import is_true
from tests.s3 import S3Server, running_s3

ROLE = Path(__file__).parents[2] / "manifests" / "rbac" / "gateway-batches.yaml"
PIPELINE, BUCKET, KEY = "demo", "storage", "one"


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FAILED_SECONDS", "OK_SECONDS", "PROGRESS_SECONDS"):
        monkeypatch.setattr(endpoints, name, 0.3)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_s3(tmp_path_factory.mktemp("s3")) as server:
        server.bucket(BUCKET)
        yield server


@dataclass
class Whole:
    """A namespace with a pipeline, its gateway, the operator and a kubelet."""

    user: User
    gateway: Gateway
    stub: Stub

    def batches(self) -> list[dict[str, Any]]:
        return self.user.list("VisionBatch")

    def pods(self) -> list[dict[str, Any]]:
        return self.user.http.get(f"/api/v1/namespaces/{self.user.namespace}/pods").json()["items"]


@pytest.fixture
async def whole(
    controlled: ApiServer, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Whole]:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with contextlib.AsyncExitStack() as stack:
        user = stack.enter_context(User(controlled, stack.enter_context(controlled.namespace())))
        stub = stack.enter_context(running_stub())
        await stack.enter_async_context(
            kubelet(controlled, user.namespace, lambda pod: start(pod, user, url, tmp_path, s3))
        )
        client = await stack.enter_async_context(connected(controlled))
        await stack.enter_async_context(operating(client, user.namespace, gateway_url=url))
        revision = await serving(user, stub.url, s3)
        folder = service_account(user, controlled, tmp_path)
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(controlled.port))
        gateway = running_gateway(
            stub.url,
            f"s3://{BUCKET}/sightline",
            port=port,
            s3_endpoint_url=s3.endpoint_url,
            s3_path_style=True,
            s3_buckets=(BUCKET,),
            aws_region=s3.region,
            batch_backend="kubernetes",
            batch_pipeline=PIPELINE,
            service_account_folder=folder,
            pipeline_revision=revision,
        )
        told = await asyncio.to_thread(gateway.__enter__)
        stack.push_async_callback(asyncio.to_thread, gateway.__exit__, None, None, None)
        yield Whole(user, told, stub)


async def serving(user: User, step_url: str, s3: S3Server) -> str:
    """The pipeline, when it is Ready. Returns its revision."""
    storage = {"s3": {"bucket": BUCKET, "endpoint": s3.endpoint_url, "region": s3.region, "pathStyle": True}}
    user.apply(pipeline(PIPELINE, user.namespace, url=step_url, storage=storage, gateway={"batches": "VisionBatches"}))
    await until(lambda: is_true(user.get("VisionPipeline", PIPELINE), "Ready"), "the pipeline is Ready")
    return str((user.get("VisionPipeline", PIPELINE) or {})["status"]["revision"])


def service_account(user: User, apiserver: ApiServer, folder: Path) -> Path:
    """The gateway's own account, with the role that comes with us and no other right: its folder, as in its pod."""
    for document in yaml.safe_load_all(ROLE.read_text()):
        document["metadata"]["namespace"] = user.namespace
        for subject in document.get("subjects", ()):
            subject["namespace"] = user.namespace
        apiserver.apply(document)
    path = f"/api/v1/namespaces/{user.namespace}/serviceaccounts/{PIPELINE}-gateway/token"
    answer = user.http.post(path, json={"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}})
    answer.raise_for_status()
    account = folder / "account"
    account.mkdir()
    (account / "token").write_text(answer.json()["status"]["token"])
    (account / "namespace").write_text(user.namespace)
    (account / "ca.crt").write_bytes(apiserver.certificate.read_bytes())
    return account


def start(pod: Pod, user: User, gateway_url: str, folder: Path, s3: S3Server) -> Container:
    """The real worker as a process, with the page that the operator made; other pods are servers."""
    container = pod["spec"]["containers"][0]
    if container["name"] != "worker":
        return Server()
    own = folder / "pods" / pod["metadata"]["uid"]
    own.mkdir(parents=True)
    (own / "key").write_text(KEY)
    volumes = [each["configMap"]["name"] for each in pod["spec"]["volumes"] if "configMap" in each]
    page = json.loads(user.http.get(user.url("ConfigMap", volumes[0])).json()["data"]["batch.json"])
    page["pipeline"] |= {"url": gateway_url, "apiKeyFile": str(own / "key")}  # what DNS and a Secret do in a cluster
    (own / "batch.json").write_text(json.dumps(page))
    environment = environment_of(pod) | s3.environment() | {"BATCH_FILE": str(own / "batch.json")}
    return Program([sys.executable, *container["command"][1:], *container["args"]], environment, own)


# ---------------------------------------------------------------------------------------------------------------------


async def test_a_batch_of_openais_client_is_a_vision_batch(whole: Whole) -> None:
    def go() -> None:
        with whole.gateway.client() as client, whole.gateway.client("two") as other:
            batch = submit(client, album(25, {3: "422"}), metadata={"album": "holidays"})
            assert (batch.status, batch.request_counts.to_dict()) == (  # type: ignore[union-attr]
                "validating",
                {"total": 25, "completed": 0, "failed": 0},
            )
            (cr,) = whole.batches()
            assert batch.id.replace("_", "-") == cr["metadata"]["name"]
            with pytest.raises(openai.NotFoundError):
                other.batches.retrieve(batch.id)
            assert list(other.batches.list()) == []

            batch = ended(client, batch)
            assert (batch.status, batch.errors, batch.metadata) == ("completed", None, {"album": "holidays"})
            assert batch.request_counts is not None
            assert batch.request_counts.to_dict() == {"total": 25, "completed": 24, "failed": 1}
            answers, errors = rows(client, batch.output_file_id), rows(client, batch.error_file_id)
            assert [row["custom_id"] for row in answers] == [f"i{number}" for number in range(25) if number != 3]
            assert [row["custom_id"] for row in errors] == ["i3"]
            assert {row["response"]["status_code"] for row in answers} == {200}
            assert [each.id for each in client.batches.list()] == [batch.id]
            with pytest.raises(openai.NotFoundError):
                other.files.content(batch.output_file_id or "")
            with pytest.raises(openai.BadRequestError, match="completed already"):
                client.batches.cancel(batch.id)
        assert max(whole.stub.answered.values()) == 1

    await asyncio.to_thread(go)


async def test_a_cancelled_batch_tells_of_every_request(whole: Whole) -> None:
    def go() -> None:
        whole.stub.delay_seconds = 0.2
        with whole.gateway.client() as client:
            batch = submit(client, album(300))
            blocking_until(lambda: whole.stub.given > 20, "twenty answers")
            assert client.batches.cancel(batch.id).status == "cancelling"
            batch = ended(client, batch)
            assert batch.status == "cancelled"
            answers, errors = rows(client, batch.output_file_id), rows(client, batch.error_file_id)
            ids = [row["custom_id"] for row in [*answers, *errors]]
            assert sorted(ids) == sorted(f"i{number}" for number in range(300))
            assert Counter(row["error"]["code"] for row in errors).keys() == {"batch_cancelled"}
            assert answers
            assert batch.request_counts is not None
            assert batch.request_counts.to_dict() == {"total": 300, "completed": len(answers), "failed": len(errors)}

    await asyncio.to_thread(go)


async def test_a_file_that_is_no_good_starts_no_pod(whole: Whole) -> None:
    def go() -> None:
        with whole.gateway.client() as client:
            before = len(whole.pods())
            file = client.files.create(
                file=("bad.jsonl", jsonl([request("a", picture(1)), {"custom_id": "b"}])), purpose="batch"
            )
            batch = client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
            batch = ended(client, batch)
            assert (batch.status, batch.errors is not None) == ("failed", True)
            assert [(fault.code, fault.line) for fault in batch.errors.data] == [("invalid_method", 2)]  # type: ignore[union-attr]
            name = batch.id.replace("_", "-")
            blocking_until(lambda: is_true(whole.user.get("VisionBatch", name), "Failed"), "the operator has seen it")
            assert len(whole.pods()) == before

    await asyncio.to_thread(go)
