"""Contract E, row by row: the BLIP service's own routes."""

import base64
import io
import json
import os
import random
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
from PIL import Image

from tests.conftest import Launcher, Server, free_port
from tests.scenes import RED_CIRCLE, encoded, random_scene, red_circle

DEMO = {"demo_model", "model"}
MESSAGE = "Batch captioning started in the background."
FINISH_SECONDS = 240


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mounted folder, and beside it what must not be read."""
    folder = tmp_path_factory.mktemp("blip")
    (folder / "outside.png").write_bytes(red_circle())
    root = folder / "images"
    (root / "below").mkdir(parents=True)
    (root / "a.png").write_bytes(red_circle())
    (root / "below" / "b c.png").write_bytes(red_circle(300))
    (root / "text.png").write_text("text that claims to be an image")
    (root / "inside.png").symlink_to(root / "a.png")
    (root / "leaving.png").symlink_to(folder / "outside.png")
    (root / "everything").symlink_to("/")
    os.mkfifo(root / "fifo.png")
    return root


@pytest.fixture(scope="module")
def blip(session_launcher: Launcher, s3_server, root: Path) -> Server:
    return session_launcher.start("blip", "--image-root", str(root), env=s3_server.environment()).wait_ready()


@pytest.fixture
def http(blip: Server) -> Iterator[httpx.Client]:
    with blip.client() as client:
        yield client


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def uploads(*files: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", (f"{number}.png", data)) for number, data in enumerate(files)]


def until(http: httpx.Client, task_id: str, is_enough: Callable[[dict], bool]) -> dict:
    """Poll a task until its state is what is waited for."""
    deadline = time.monotonic() + FINISH_SECONDS
    while True:
        answer = http.get(f"/task-status/{task_id}")
        answer.raise_for_status()
        if is_enough(answer.json()):
            return answer.json()
        assert time.monotonic() < deadline, answer.json()["progress"]
        time.sleep(0.05)


def is_finished(state: dict) -> bool:
    return state["status"] != "in_progress"


def test_e1_health(http):
    response = http.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "healthy"})


class TestE2Caption:
    def test_of_a_path_repeats_the_path(self, http):
        response = http.post("/caption", json={"image_path": "a.png"})
        assert response.status_code == 200
        body = response.json()
        assert body.keys() - DEMO == {"image_path", "caption"}
        assert (body["image_path"], body["caption"]) == ("a.png", RED_CIRCLE)

    def test_says_that_the_model_is_a_demonstration(self, http):
        body = http.post("/caption", json={"image_path": "a.png"}).json()
        assert (body["demo_model"], body["model"]) == (True, "sightline-tiny-blip")

    def test_of_an_upload_tells_its_name_and_the_time_it_took(self, http):
        body = http.post("/caption", files={"image": ("scene.png", red_circle())}).json()
        assert body.keys() - DEMO == {"filename", "caption", "processing_time"}
        assert (body["filename"], body["caption"]) == ("scene.png", RED_CIRCLE)
        assert 0 < body["processing_time"] < 60

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
    def test_of_any_format(self, http, kind):
        data = encoded(Image.open(io.BytesIO(red_circle())), kind)
        assert (
            http.post("/caption", content=data, headers={"Content-Type": "image/png"}).json()["caption"] == RED_CIRCLE
        )

    @pytest.mark.parametrize("field", ["image", "image_url", "image_bytes", "b64"])
    def test_of_every_other_way_to_bring_an_image(self, http, field):
        for value in (data_uri(red_circle()), base64.b64encode(red_circle()).decode()):
            body = http.post("/caption", json={field: value}).json()
            assert body.keys() - DEMO == {"caption"}
            assert body["caption"] == RED_CIRCLE

    def test_of_an_object_in_a_store(self, http, s3_server):
        uri = s3_server.put("blip", "folder/a b.png", red_circle())
        body = http.post("/caption", json={"s3_uri": uri}).json()
        assert (body["s3_uri"], body["caption"]) == (uri, RED_CIRCLE)

    @pytest.mark.parametrize("path", ["nope.png", "", "below", "text", "a" * 5000, "a\x00.png"])
    def test_a_bad_path_is_404_or_said_to_be_missing(self, http, path):
        response = http.post("/caption", json={"image_path": path})
        assert response.status_code == (404 if path else 422)
        assert isinstance(response.json()["detail"], str)

    @pytest.mark.parametrize(
        "data", [b"text that claims to be an image", b"\x89PNG\r\n\x1a\n", b"GIF89a", red_circle()[:99]]
    )
    def test_a_file_that_is_no_image_is_400(self, http, data):
        response = http.post("/caption", files={"image": ("a.png", data)})
        assert response.status_code == 400
        assert set(response.json()) == {"detail", "code", "request_id"}

    def test_a_file_below_the_root_that_is_no_image_is_400(self, http):
        response = http.post("/caption", json={"image_path": "text.png"})
        assert (response.status_code, response.json()["code"]) == (400, "image_undecodable")

    @pytest.mark.parametrize(
        "body",
        [{}, {"image_path": None}, {"image_path": 5}, {"image_path": ["a.png"]}, {"picture": "a.png"}, {"text": "a"}],
        ids=json.dumps,
    )
    def test_without_an_image_it_is_422(self, http, body):
        assert http.post("/caption", json=body).status_code == 422

    @pytest.mark.parametrize("body", [b"", b"{", b"nonsense", b"\xff\xfe", b"[" * 100_000])
    def test_no_json_is_400(self, http, body):
        response = http.post("/caption", content=body, headers={"Content-Type": "application/json"})
        assert (response.status_code, response.json()["code"]) == (400, "invalid_json")


class TestE3Batch:
    def test_of_paths_is_a_bare_list_in_order(self, http):
        paths = ["a.png", "nope.png", "below/b c.png", "a.png", "text.png"]
        response = http.post("/batch-caption", json={"image_paths": paths})
        assert response.status_code == 200
        results = response.json()
        assert [result["image_path"] for result in results] == paths
        assert [result.get("caption") for result in results] == [RED_CIRCLE, None, RED_CIRCLE, RED_CIRCLE, None]

    def test_a_failed_item_has_an_error_and_no_caption(self, http):
        good, bad = http.post("/batch-caption", json={"image_paths": ["a.png", "nope.png"]}).json()
        assert good.keys() - DEMO == {"image_path", "caption"}
        assert bad.keys() - DEMO == {"image_path", "error", "code"}
        assert bad["code"] == "image_not_found"

    def test_of_uploads_is_an_object_with_times(self, http):
        body = http.post("/batch-caption", files=uploads(red_circle(), b"no image", red_circle(96))).json()
        assert body.keys() - DEMO == {"results", "total_processing_time"}
        first, second, third = body["results"]
        assert first.keys() == {"filename", "caption", "processing_time"}
        assert (first["filename"], first["caption"]) == ("0.png", RED_CIRCLE)
        assert second.keys() == {"filename", "error", "code", "processing_time"}
        assert third["caption"] == RED_CIRCLE

    @pytest.mark.parametrize("name", ["images", "image_urls"])
    def test_of_every_other_way_to_bring_images(self, http, name):
        values = [data_uri(red_circle()), "https://example.com/a.png", "data:image/png;base64,!!", "s3://b"]
        results = http.post("/batch-caption", json={name: values}).json()
        assert results[0]["caption"] == RED_CIRCLE
        assert [result["code"] for result in results[1:]] == [
            "url_not_allowed",
            "image_base64_invalid",
            "s3_uri_invalid",
        ]
        assert results[1][{"images": "image", "image_urls": "image_url"}[name]] == "https://example.com/a.png"
        assert values[0] not in json.dumps(results)

    def test_answers_are_those_of_each_image_alone(self, http, root):
        rng = random.Random(3)
        for number in range(24):
            (root / f"scene{number}.png").write_bytes(encoded(random_scene(rng, 1 + number % 2)[0]))
        paths = [f"scene{number}.png" for number in range(24)]
        together = [result["caption"] for result in http.post("/batch-caption", json={"image_paths": paths}).json()]
        alone = [http.post("/caption", json={"image_path": path}).json()["caption"] for path in paths]
        assert together == alone

    def test_nothing_to_do_is_an_empty_list(self, http):
        assert http.post("/batch-caption", json={"image_paths": []}).json() == []

    @pytest.mark.parametrize(
        "body",
        [
            {}, {"image_paths": None}, {"image_paths": "a.png"}, {"image_paths": [5]}, {"image_paths": [None]},
            {"image_paths": {"0": "a.png"}}, {"image_paths": ["a.png"], "images": ["x"]}, {"image_path": "a.png"},
        ],
        ids=json.dumps,
    )  # fmt: skip
    @pytest.mark.parametrize("route", ["/batch-caption", "/async-batch-caption"])
    def test_not_one_list_of_texts_is_422(self, http, route, body):
        response = http.post(route, json=body)
        assert response.status_code == 422
        assert set(response.json()) == {"detail", "code", "request_id"}

    @pytest.mark.parametrize("route", ["/batch-caption", "/async-batch-caption"])
    def test_more_than_a_thousand_is_413(self, http, route):
        response = http.post(route, json={"image_paths": ["a.png"] * 1001})
        assert (response.status_code, response.json()["code"]) == (413, "too_many_items")


class TestE4AsyncBatch:
    def test_answers_202_with_an_id_that_cannot_be_guessed(self, http):
        answers = [http.post("/async-batch-caption", json={"image_paths": ["a.png"]}) for _ in range(3)]
        assert {answer.status_code for answer in answers} == {202}
        for answer in answers:
            body = answer.json()
            assert body.keys() - DEMO == {"message", "task_id"}
            assert body["message"] == MESSAGE
            assert uuid.UUID(body["task_id"]).version == 4
        assert len({answer.json()["task_id"] for answer in answers}) == 3

    def test_uploads_are_captioned_behind_the_request(self, http):
        answer = http.post("/async-batch-caption", files=uploads(red_circle(), b"no image", red_circle(200)))
        state = until(http, answer.json()["task_id"], is_finished)
        assert state["status"] == "completed"
        assert [result.get("caption") for result in state["results"]] == [RED_CIRCLE, None, RED_CIRCLE]
        assert [result["filename"] for result in state["results"]] == ["0.png", "1.png", "2.png"]

    def test_takes_more_uploads_than_other_forms_have_parts(self, http):
        small = red_circle(96)
        answer = http.post("/async-batch-caption", files=uploads(*[small] * 100))
        assert answer.status_code == 202
        state = until(http, answer.json()["task_id"], is_finished)
        assert state["progress"] == {"done": 100, "total": 100, "failed": 0}

    def test_a_form_with_even_more_parts_is_413(self, http):
        answer = http.post("/async-batch-caption", files=uploads(*[b"x"] * 1030))
        assert (answer.status_code, answer.json()["code"]) == (413, "too_many_parts")

    def test_nothing_to_do_is_completed(self, http):
        task_id = http.post("/async-batch-caption", json={"image_paths": []}).json()["task_id"]
        state = until(http, task_id, is_finished)
        assert (state["status"], state["results"]) == ("completed", [])


class TestE5Status:
    @pytest.mark.parametrize("route", ["/task-status/{}", "/async-batch-caption/status/{}"])
    def test_has_the_results_in_order_on_both_routes(self, http, route):
        paths = ["a.png", "nope.png", "below/b c.png"]
        task_id = http.post("/async-batch-caption", json={"image_paths": paths}).json()["task_id"]
        until(http, task_id, is_finished)
        body = http.get(route.format(task_id)).json()
        assert body.keys() - DEMO == {"task_id", "status", "results", "progress"}
        assert (body["task_id"], body["status"]) == (task_id, "completed")
        assert body["progress"] == {"done": 3, "total": 3, "failed": 1}
        assert [result["image_path"] for result in body["results"]] == paths
        assert [result["index"] for result in body["results"]] == [0, 1, 2]
        assert body["results"][0]["caption"] == RED_CIRCLE
        assert body["results"][1].keys() - DEMO == {"index", "image_path", "error", "code"}

    @pytest.mark.parametrize("task_id", ["nope", str(uuid.uuid4()), "..%2f..", "a" * 300])
    @pytest.mark.parametrize("route", ["/task-status/", "/async-batch-caption/status/"])
    def test_is_404_for_an_unknown_id(self, http, route, task_id):
        response = http.get(route + task_id)
        assert response.status_code == 404
        assert set(response.json()) == {"detail", "code", "request_id"}

    def test_belongs_to_the_key_that_asked(self, launcher: Launcher, tmp_path):
        keys = tmp_path / "keys"
        keys.write_text("one\ntwo\n")
        server = launcher.start("blip", "--api-key-file", str(keys), auth="api-key").wait_ready()
        with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client:
            mine, other = {"X-API-Key": "one"}, {"Authorization": "Bearer two"}
            body = {"images": [data_uri(red_circle())]}
            task_id = client.post("/async-batch-caption", json=body, headers=mine).json()["task_id"]
            assert client.get(f"/task-status/{task_id}", headers=mine).status_code == 200
            assert client.get(f"/task-status/{task_id}", headers=other).status_code == 404
            assert client.get(f"/task-status/{task_id}").status_code == 403

    @pytest.mark.slow
    def test_a_killed_server_loses_nothing_and_doubles_nothing(self, launcher: Launcher, tmp_path, root):
        """kill -9 in the middle: a replica on the same store shows what was done, and goes on with the rest."""
        flags = ("--job-store", f"file://{tmp_path}/jobs", "--image-root", str(root), "--max-batch", "2")
        first, second = launcher.start("blip", *flags), launcher.start("blip", *flags)
        first.wait_ready()
        second.wait_ready()
        total = 240
        with first.client() as one, second.client() as two:
            task_id = one.post("/async-batch-caption", files=uploads(*[red_circle(700)] * total)).json()["task_id"]
            seen = until(two, task_id, lambda state: state["progress"]["done"] > 0)
            first.process.send_signal(signal.SIGKILL)
            first.process.wait()
            before = until(two, task_id, lambda state: True)
            assert before["status"] == "in_progress", "all was over before the kill: the test proves nothing"
            assert before["progress"]["done"] < total

            after = until(two, task_id, is_finished)

        assert after["status"] == "completed"
        assert after["progress"] == {"done": total, "total": total, "failed": 0}
        assert [result["index"] for result in after["results"]] == list(range(total))
        known = {result["index"]: result for result in after["results"]}
        assert all(known[result["index"]] == result for result in [*seen["results"], *before["results"]])

    @pytest.mark.slow
    def test_survives_a_restart(self, launcher: Launcher, tmp_path, root):
        flags = ("--job-store", f"file://{tmp_path}/jobs", "--image-root", str(root))
        first = launcher.start("blip", *flags).wait_ready()
        with first.client() as client:
            task_id = client.post("/async-batch-caption", json={"image_paths": ["a.png"] * 3}).json()["task_id"]
            before = until(client, task_id, is_finished)
        assert first.stop() == 0
        second = launcher.start("blip", *flags).wait_ready()
        with second.client() as client:
            assert client.get(f"/task-status/{task_id}").json() == before


class TestE6Prefix:
    @pytest.mark.parametrize("name", ["text", "prefix", "prompt"])
    def test_is_continued_by_the_caption(self, http, name):
        by_json = http.post("/caption", json={"image_path": "a.png", name: "a picture of"}).json()["caption"]
        by_form = http.post("/caption", files={"image": ("a", red_circle())}, data={name: "A Picture of"}).json()
        assert by_json == by_form["caption"] == f"a picture of {RED_CIRCLE}"

    def test_may_be_the_beginning_of_the_caption_itself(self, http):
        body = http.post("/caption", json={"image_path": "a.png", "text": "a large red"}).json()
        assert body["caption"] == RED_CIRCLE

    @pytest.mark.parametrize("text", [None, "", "   "])
    def test_nothing_is_no_prefix(self, http, text):
        assert http.post("/caption", json={"image_path": "a.png", "text": text}).json()["caption"] == RED_CIRCLE

    def test_is_that_of_every_image_of_a_batch(self, http):
        body = {"image_paths": ["a.png", "below/b c.png"], "text": "there is"}
        results = http.post("/batch-caption", json=body).json()
        assert {result["caption"] for result in results} == {f"there is {RED_CIRCLE}"}
        task_id = http.post("/async-batch-caption", json=body).json()["task_id"]
        state = until(http, task_id, is_finished)
        assert {result["caption"] for result in state["results"]} == {f"there is {RED_CIRCLE}"}

    @pytest.mark.parametrize("text", ["x" * 8193, 5, ["a"]], ids=["too long", "number", "list"])
    def test_that_is_none_is_422(self, http, text):
        assert http.post("/caption", json={"image_path": "a.png", "text": text}).status_code == 422

    def test_longer_than_the_model_reads_is_422(self, http):
        response = http.post("/caption", json={"image_path": "a.png", "text": "a " * 2000})
        assert (response.status_code, response.json()["code"]) == (422, "prompt_too_long")

    def test_is_the_prompt_of_v1_and_v2(self, http):
        image = base64.b64encode(red_circle()).decode()
        body = {"instances": [{"image": image, "prompt": "a photo of"}, {"b64": image}]}
        predictions = http.post("/v1/models/blip:predict", json=body).json()["predictions"]
        assert [item["text"] for item in predictions] == [f"a photo of {RED_CIRCLE}", RED_CIRCLE]
        tensors = [
            {"name": "image", "shape": [2], "datatype": "BYTES", "data": [image, image]},
            {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a photo of"]},
        ]
        answer = http.post("/v2/models/blip/infer", json={"inputs": tensors}).json()
        assert answer["outputs"][0]["data"] == [f"a photo of {RED_CIRCLE}"] * 2
        assert answer["parameters"]["image_tokens"] == 2 * 145
        assert answer["parameters"]["demo_model"] is True


class TestE7Root:
    REFUSED = (
        "../outside.png", "below/../../outside.png", "leaving.png", "everything/etc/hostname", "/etc/hostname",
        "nope.png", "below", "fifo.png", ".", "/", "~/a.png", "file:///etc/hostname", "a.png\x00.txt",
    )  # fmt: skip

    def test_outside_and_absent_are_the_same_404(self, http, root):
        paths = [*self.REFUSED, str(root.parent / "outside.png"), str(root.parent / "absent.png")]
        answers = [http.post("/caption", json={"image_path": path}) for path in paths]
        assert {answer.status_code for answer in answers} == {404}
        said = [{name: value for name, value in answer.json().items() if name != "request_id"} for answer in answers]
        assert all(words == said[0] for words in said)

    @pytest.mark.parametrize("path", ["a.png", "./a.png", "below/../a.png", "inside.png", "below/b c.png"])
    def test_below_the_root_is_read(self, http, path):
        assert http.post("/caption", json={"image_path": path}).json()["caption"] == RED_CIRCLE

    def test_also_when_the_client_names_the_root(self, http, root):
        assert http.post("/caption", json={"image_path": str(root / "a.png")}).json()["caption"] == RED_CIRCLE

    @pytest.mark.parametrize("field", ["image", "image_url", "b64"])
    @pytest.mark.parametrize("value", ["a.png", "file:///etc/hostname", "/etc/hostname", "ftp://x/y"])
    def test_no_other_field_reads_paths(self, http, field, value):
        response = http.post("/caption", json={field: value})
        assert response.status_code == 400


class TestE8CommandLine:
    def test_the_older_flags_are_understood(self, launcher: Launcher, tmp_path):
        server = launcher.start("blip", "--workers", "1", "--log-level", "info").wait_ready()
        assert "ready model=blip" in server.log()

    def test_more_workers_are_refused_in_words(self, launcher: Launcher):
        server = launcher.start("blip", "--workers", "4")
        assert server.process.wait(60) == 2
        assert "start replicas instead" in server.log()

    @pytest.mark.slow
    def test_reload_serves_and_stops_as_a_whole(self, launcher: Launcher):
        server = launcher.start("blip", "--reload").wait_ready()
        with server.client() as client:
            assert client.post("/caption", files={"image": ("a", red_circle())}).json()["caption"] == RED_CIRCLE
        assert server.stop() == 0
        with pytest.raises(httpx.TransportError), server.client() as client:
            client.get("/health")

    def test_the_page_is_at_the_root_and_asks_nobody_else(self, http):
        response = http.get("/")
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not [line for line in response.text.splitlines() if "src=" in line or "http://" in line]

    def test_the_page_needs_a_key_where_the_rest_does(self, launcher: Launcher):
        server = launcher.start("blip", "--api-keys", "one", auth="api-key").wait_live()
        with httpx.Client(base_url=server.url, trust_env=False) as client:
            assert client.get("/").status_code == 403
            assert client.get("/", headers={"X-API-Key": "one"}).status_code == 200


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("NO BROWSER: the page is not tested; install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """The page in a browser, with what it said and whom it asked."""

    def __init__(self, browser, url: str, key: str = "") -> None:
        from playwright.sync_api import expect

        self._expect = expect
        self.page = browser.new_page()
        self.page.set_default_timeout(60_000)
        self.faults: list[str] = []
        self.asked: set[str] = set()
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.asked.add(request.url))
        if key:  # as a proxy would, for the page alone
            self.page.route(url + "/", lambda route: route.continue_(headers={"X-API-Key": key}))
        self.page.goto(url + "/")

    def says(self, selector: str, text: str) -> None:
        self._expect(self.page.locator(selector).first).to_contain_text(text, timeout=60_000)

    def pick(self, *files: tuple[str, bytes]) -> None:
        payloads = [{"name": name, "mimeType": "image/png", "buffer": data} for name, data in files]
        self.page.set_input_files("#files", payloads)

    def cards(self) -> dict[str, str]:
        """What is said of each file, by its name."""
        cards = [card.inner_text().strip().split("\n") for card in self.page.locator("#cards li").all()]
        return {lines[-1]: lines[0] for lines in cards}


class TestE8Page:
    def test_captions_several_pictures_and_says_what_is_wrong_with_one(self, browser, blip: Server):
        page = Page(browser, blip.url)
        page.says("#about", "Served here: blip")
        page.pick(("one.png", red_circle()), ("two.png", b"no image"), ("three.png", red_circle(200)))
        page.says("#count", "3 of 3, 1 failed")
        assert page.cards() == {
            "one.png": RED_CIRCLE,
            "two.png": "These bytes are no image. (400, image_undecodable)",
            "three.png": RED_CIRCLE,
        }
        page.says("#demo", "demonstration model sightline-tiny-blip")
        assert page.faults == []
        assert all(url.startswith((blip.url, "blob:", "data:")) for url in page.asked), page.asked

    def test_continues_a_text(self, browser, blip: Server):
        page = Page(browser, blip.url)
        page.says("#about", "Served here")
        page.page.fill("#prompt", "a picture of")
        page.pick(("one.png", red_circle()))
        page.says("#cards li", f"a picture of {RED_CIRCLE}")

    def test_can_use_the_model_s_own_route(self, browser, blip: Server):
        page = Page(browser, blip.url)
        page.says("#about", "Served here")
        page.page.select_option("#way", label="model blip")
        page.pick(("one.png", red_circle()))
        page.says("#cards li", RED_CIRCLE)
        assert f"{blip.url}/v2/models/blip/infer" in page.asked

    def test_never_reads_an_answer_or_a_name_as_html(self, browser, blip: Server):
        evil = "<img src=x onerror=document.title='taken'><b>bold</b>"
        page = Page(browser, blip.url)
        page.says("#about", "Served here")
        page.page.route("**/caption", lambda route: route.fulfill(json={"caption": evil, "filename": evil}))
        page.pick((f"{evil}.png", red_circle()))
        page.says("#cards li", evil)
        assert page.page.locator("#cards b").count() == 0
        assert page.page.title() == "Sightline"

    def test_takes_an_api_key(self, browser, launcher: Launcher):
        server = launcher.start("blip", "--api-keys", "one", auth="api-key").wait_ready()
        page = Page(browser, server.url, key="one")
        page.says("#about", "Invalid API key (403")
        page.page.fill("#key", "one")
        page.page.locator("#prompt").focus()
        page.says("#about", "Served here: blip")
        page.pick(("one.png", red_circle()))
        page.says("#cards li", RED_CIRCLE)

    def test_says_that_the_server_is_gone(self, browser, blip: Server):
        page = Page(browser, blip.url)
        page.says("#about", "Served here")
        page.page.route("**/caption", lambda route: route.abort())
        page.pick(("one.png", red_circle()))
        page.says("#cards li", "The server cannot be reached.")


def test_e9_names_of_the_older_service_are_understood(launcher: Launcher, tmp_path):
    import sightline

    model = f"{sightline.__path__[0]}/tiny/blip"
    port = free_port()
    env = {"HOST": "127.0.0.1", "WORKERS": "1", "RELOAD": "false", "LOG_LEVEL": "INFO", "MODEL_PATH": model}
    server = launcher.start("blip", "--port", str(port), env=env | {"MODEL_NAME": "not/this"}, port=port).wait_ready()
    assert model in server.log()


@pytest.mark.parametrize(("name", "value"), [("MODEL_PATH", "x/y"), ("MODEL_NAME", "x/y")])
def test_e9_either_name_of_the_model_is_enough(name, value):
    from sightline.configuration import configure
    from sightline.settings import BlipSettings

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        patch.setenv("PORT", "9123")
        settings = configure({"blip": BlipSettings}, ["--auth", "off"])["blip"].settings
    assert (settings.model, settings.port, settings.model_name) == (value, 9123, "blip")


class TestHostile:
    """Whatever comes is answered by a 4xx or an item's error with a code; the connection and the server stay."""

    IMAGES: ClassVar = {
        "empty": b"",
        "truncated": red_circle()[:-40],
        "one pixel": encoded(Image.new("RGB", (1, 1))),
        "a line": encoded(Image.new("RGB", (2000, 5))),
        "a bomb": encoded(Image.new("1", (20_000, 20_000))),
        "html": b"<html><script>alert(1)</script>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }

    @pytest.mark.parametrize("name", IMAGES)
    def test_images_are_refused_with_a_code(self, http, name):
        response = http.post("/caption", files={"image": ("a.png", self.IMAGES[name])})
        assert 400 <= response.status_code < 500
        assert response.json()["code"]

    def test_images_fail_alone_in_a_batch(self, http):
        body = http.post("/batch-caption", files=uploads(*self.IMAGES.values(), red_circle())).json()
        assert [("code" in result, "caption" in result) for result in body["results"]] == (
            [(True, False)] * len(self.IMAGES) + [(False, True)]
        )

    @pytest.mark.parametrize(
        "image",
        [
            Image.open(io.BytesIO(red_circle())).convert("CMYK"),
            Image.open(io.BytesIO(red_circle())).convert("P"),
            Image.open(io.BytesIO(red_circle())).convert("I;16"),
            Image.new("RGB", (3, 3)),
            Image.new("L", (600, 3)),
        ],
        ids=["CMYK", "palette", "16 bits", "tiny", "200:1"],
    )
    def test_odd_images_are_taken(self, http, image):
        response = http.post("/caption", files={"image": ("a", encoded(image, "TIFF"))})
        assert response.status_code == 200

    @pytest.mark.parametrize("route", ["/caption", "/batch-caption", "/async-batch-caption"])
    @pytest.mark.parametrize(
        ("content", "kind"),
        [
            (b"--x\r\n", "multipart/form-data; boundary=x"),
            (b"", "multipart/form-data"),
            (b"image=1", "application/x-www-form-urlencoded"),
            (b"null", "application/json"),
            (b"[]", "application/json"),
            (b'{"image_paths": [[[[]]]]}', "application/json"),
            (b"\x00" * 1000, "application/octet-stream"),
            (b"<xml/>", "text/xml"),
        ],
    )
    def test_bodies_are_refused_with_a_code(self, http, route, content, kind):
        response = http.post(route, content=content, headers={"Content-Type": kind})
        assert 400 <= response.status_code < 500, response.text
        assert response.json()["code"]
        assert http.get("/health").status_code == 200

    def test_a_file_name_is_only_a_name(self, http):
        body = http.post("/caption", files={"image": ("../../<b>\"'.png", red_circle())}).json()
        assert body["caption"] == RED_CIRCLE
        assert set(body) - DEMO == {"filename", "caption", "processing_time"}
